"""What the relations look at: the matched tensors with their figures, and samples of their values on demand."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.dtypes import FLOATS, STORAGE, decode, encode
from lineage.filling import Filled
from lineage.judge.common import Common
from lineage.judge.significance import Significance
from lineage.layout.mapping import Instance, Mapping
from lineage.measure.compare import Comparison

__all__ = ["ALIKE", "Material", "Pair", "Sample", "counters", "unstacked"]

Floats = NDArray[np.floating[Any]]
Answer = TypeVar("Answer")

#: rows and columns of a sampled part of a matrix; low ranks up to a quarter of it can be told
SAMPLE_ROWS, SAMPLE_COLUMNS = 192, 512
#: whole rows that are looked at for a lattice, and values where rows are short
WHOLE_ROWS, WHOLE_VALUES = 8, 4096
#: rows of a tensor behind its figures where no comparison was made: at least, and of all tensors together
FEWEST_ROWS, MOST_ROWS = 4, 4096
#: matrices that are sampled at most: three a template, so that early and late layers both speak
MOST_SAMPLES, EACH_TEMPLATE = 24, 3
#: values that tell a causal mask from weights
MOST_IDLE = 1 << 14
#: a first axis shorter than this is taken for a stack, not for rows; so is one whose rows would be longer than any
#: convolution's
FEW_ROWS, LONGEST_ROW = 16, 1 << 16
#: a tensor is content from this size on, if it has two axes: norms and biases say nothing of origin
LEAST_CONTENT = 256
#: cosine from which a changed tensor still is the same tensor: strangers of one recipe stay below 0.45 (zoo: heads
#: that share a vocabulary), continued training at three times the base's steps above 0.5
ALIKE = 0.5
_NUMBER = re.compile(r"\d+")


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One matched tensor of B and what A has in its place.

    Attributes
    ----------
    name : in B
    origins : A's tensors that it is made of
    size : elements
    content : it has two axes of some length and holds real numbers; norms, biases and counters are not
    dtype_a, dtype_b : dtype words
    equal : no value differs but by the rounding of a cast
    cosine, rel_l2, zero_a, zero_b : figures of the comparison, None where undefined or not measured
    """

    name: str
    origins: tuple[str, ...]
    size: int
    content: bool
    dtype_a: str
    dtype_b: str
    equal: bool
    cosine: float | None = None
    rel_l2: float | None = None
    zero_a: float | None = None
    zero_b: float | None = None


class Sample(msgspec.Struct, frozen=True):
    """Neighbouring rows of one matched matrix on both sides, shape (rows, columns); kernels count as columns."""

    name: str
    a: Floats
    b: Floats

    @classmethod
    def of(cls, name: str, a: Floats, b: Floats) -> Sample:
        """The sample with zeros on both sides where either is no number."""
        finite = np.isfinite(a) & np.isfinite(b)
        return cls(name, a, b) if finite.all() else cls(name, np.where(finite, a, 0), np.where(finite, b, 0))


class Material(msgspec.Struct, frozen=True, dict=True):
    """Two checkpoints, the mapping between them, and what was measured.

    Attributes
    ----------
    a, b : as opened
    mapping : from A to B
    filled : B's layout with A's values
    common : both in one layout, with nothing fitted
    comparison : figures of `filled` against `b`, or None
    significance : the exact tests
    seed : of the samples
    """

    a: Checkpoint
    b: Checkpoint
    mapping: Mapping
    filled: Filled
    common: Common
    comparison: Comparison | None
    significance: Significance
    seed: int

    def asked(self, question: Callable[[Material], Answer]) -> Answer:
        """What a function says of this material; asked once."""
        known: dict[Any, Any] = self.__dict__.setdefault("_asked", {})
        if question not in known:
            known[question] = question(self)
        return known[question]  # type: ignore[no-any-return]

    @cached_property
    def pairs(self) -> list[Pair]:
        """All matched tensors, in B's order."""
        rows = {row.b_name: row for row in self.comparison.rows if row.b_name} if self.comparison else {}
        result = []
        for name, spec in self.b.specs.items():
            if name not in self.filled.specs or self.filled.specs[name].size != spec.size:
                continue
            origins = self.filled.origins[name]
            dtypes = sorted({self.a.specs[o].dtype for o in origins if o in self.a.specs})
            content = spec.size >= LEAST_CONTENT and sum(n > 1 for n in spec.shape) > 1 and _real(spec.dtype)
            given: dict[str, Any] = {
                "name": name, "origins": origins, "size": spec.size, "content": content,
                "dtype_a": dtypes[0] if len(dtypes) == 1 else "mixed", "dtype_b": spec.dtype,
            }  # fmt: skip
            row = rows.get(name)
            if row is not None and row.metrics is not None:
                figures = {name: getattr(row.metrics, name) for name in ("cosine", "rel_l2", "zero_a", "zero_b")}
                result.append(Pair(equal=row.status == "unchanged" or not row.metrics.changed, **figures, **given))
            else:
                result.append(self._sampled_pair(given))
        return result

    def _sampled_pair(self, given: dict[str, Any]) -> Pair:
        """A pair whose figures come from a part of its values."""
        sample = self.sample(given["name"], rows=max(FEWEST_ROWS, MOST_ROWS // max(1, len(self.b.specs))))
        a, b = sample.a.astype(np.float64), sample.b.astype(np.float64)
        coarse = given["dtype_b"] if given["dtype_b"] in FLOATS else given["dtype_a"]
        equal = bool(np.array_equal(a, b)) or (
            coarse in FLOATS and np.array_equal(_rounded(sample.a, coarse), _rounded(sample.b, coarse))
        )
        one, two = float(np.linalg.norm(a)), float(np.linalg.norm(b))
        cosine = float((a * b).sum() / (one * two)) if one > 0 and two > 0 else None
        rel = float(np.linalg.norm(a - b) / one) if one > 0 else None
        zeros: dict[str, Any] = {"zero_a": float((a == 0).mean()), "zero_b": float((b == 0).mean())}
        return Pair(equal=equal, cosine=cosine, rel_l2=rel, **zeros, **given)

    @cached_property
    def content(self) -> list[Pair]:
        """Matched tensors that hold weights proper."""
        return [pair for pair in self.pairs if pair.content]

    @cached_property
    def changed(self) -> list[Pair]:
        """Content that differs."""
        return [pair for pair in self.content if not pair.equal]

    @property
    def equal_share(self) -> float:
        """Share of the matched content's elements that stands in equal tensors."""
        total = sum(pair.size for pair in self.content)
        return sum(pair.size for pair in self.content if pair.equal) / total if total else 0.0

    @property
    def coverage(self) -> float:
        """Share of B's parameters in matched tensors."""
        total = self.b.parameters
        return sum(s.size for n, s in self.b.specs.items() if n in self._targets) / total if total else 0.0

    @cached_property
    def covered(self) -> float:
        """As `coverage`, of what may be weights: masks and counters that B alone stores count for nothing."""
        left = [n for n in self.b.specs if n not in self._targets]
        return 1.0 - _left(self.b, left)

    @cached_property
    def used(self) -> float:
        """Share of A's parameters that B's matched tensors are made of, masks and counters left out."""
        return 1.0 - _left(self.a, [n for n in self.mapping.unmatched_source if n in self.a.specs])

    @cached_property
    def instances(self) -> list[Instance]:
        """Every rule for every binding."""
        return list(self.mapping.instances({name: spec.shape for name, spec in self.a.specs.items()}))

    @cached_property
    def _targets(self) -> set[str]:
        return {n for i in self.instances for n in i.target_names if n in self.b.specs}

    @cached_property
    def alike(self) -> list[Pair]:
        """Content that differs and is still recognisably the same."""
        return [pair for pair in self.changed if (pair.cosine or 0.0) >= ALIKE]

    @cached_property
    def sampled(self) -> list[str]:
        """Some of the content that differs and is recognisable, spread over templates and layers."""
        return spread_names([pair.name for pair in self.alike])

    @cached_property
    def samples(self) -> list[Sample]:
        """Samples of it."""
        return [self.sample(name) for name in self.sampled]

    @cached_property
    def rows(self) -> list[Sample]:
        """A few whole rows of the same tensors."""
        specs = [self.b.specs[name] for name in self.sampled]
        counts = [max(WHOLE_ROWS, WHOLE_VALUES * spec.shape[0] // spec.size) for spec in specs]
        return [self.sample(spec.name, rows=rows, columns=None) for spec, rows in zip(specs, counts, strict=True)]

    def has_twin(self, name: str) -> bool:
        """True where A's tensor is a near copy of another one of its template."""
        spec, key = self.a.specs[name], _NUMBER.sub("{}", name)
        size = min(spec.size, 1 << 14)
        mine = self.a.read(name, 0, size).astype(np.float64)
        for other, its in self.a.specs.items():
            if other != name and its.shape == spec.shape and _NUMBER.sub("{}", other) == key:
                values = self.a.read(other, 0, size).astype(np.float64)
                lengths = float(np.linalg.norm(mine) * np.linalg.norm(values))
                if lengths > 0 and float(mine @ values) > ALIKE * lengths:
                    return True
        return False

    def sample(self, name: str, *, rows: int = SAMPLE_ROWS, columns: int | None = SAMPLE_COLUMNS) -> Sample:
        """At most so many neighbouring rows and columns of one matched tensor."""
        spec, other = self.b.specs[name], self.filled.specs[name]
        window = _window(spec.shape, min(rows, SAMPLE_ROWS), np.random.default_rng([self.seed, spec.size % (1 << 31)]))
        a, b = (_rows(c, name, s.size, window, columns) for c, s in ((self.filled, other), (self.b, spec)))
        return Sample.of(name, a, b)


def _left(checkpoint: Checkpoint, names: Sequence[str]) -> float:
    """Share of a checkpoint's weights in these tensors, which nothing on the other side corresponds to."""
    idle = {name for name in names if _idle(checkpoint, name)}
    total = checkpoint.parameters - sum(checkpoint.specs[name].size for name in idle)
    left = sum(checkpoint.specs[name].size for name in names if name not in idle)
    return left / total if total else 0.0


def _idle(checkpoint: Checkpoint, name: str) -> bool:
    """True for what was never trained: integers and truth values, or a causal mask in any dtype."""
    spec = checkpoint.specs[name]
    if not _real(spec.dtype):
        return True
    # masks are stored as (1, 1, length, length); nothing else is read here, since there may be many tensors
    if len(spec.shape) < 3 or spec.shape[0] != 1 or spec.shape[-1] != spec.shape[-2]:
        return False
    return len(np.unique(checkpoint.read(name, 0, min(spec.size, MOST_IDLE)))) <= 2


def spread_names(names: Sequence[str]) -> list[str]:
    """Some names of each template: first, middle and last, as many in all as are sampled."""
    templates: dict[str, list[str]] = defaultdict(list)
    for name in names:
        templates[_NUMBER.sub("{}", name)].append(name)
    each = max(1, min(EACH_TEMPLATE, MOST_SAMPLES // max(1, len(templates))))
    chosen: list[str] = []
    for members in templates.values():
        places = {0} if each == 1 else {round(k * (len(members) - 1) / (each - 1)) for k in range(each)}
        chosen += [members[at] for at in sorted(places)]
    return chosen[:MOST_SAMPLES]


def counters(name: str) -> tuple[int, ...]:
    """The numbers in a name that stand by themselves: layer, expert.

    Examples
    --------
    >>> counters("model.layers.3.experts.12.w1.weight")
    (3, 12)
    """
    return tuple(int(part) for part in re.split(r"[./]", name) if part.isdigit())


def unstacked(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with the axes of a stack of layers or experts taken for rows.

    Examples
    --------
    >>> unstacked((8, 64, 32)), unstacked((64, 768, 1024)), unstacked((64, 32, 3, 3))
    ((512, 32), (49152, 1024), (64, 32, 3, 3))
    """
    while len(shape) > 2 and (shape[0] < FEW_ROWS or math.prod(shape[1:]) > LONGEST_ROW):
        shape = (shape[0] * shape[1], *shape[2:])
    return shape


def _window(shape: tuple[int, ...], most: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """First row, rows and columns of the sampled part."""
    shape = unstacked(shape)
    rows = shape[0] if len(shape) > 1 else 1
    columns = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else (shape[0] if shape else 1)
    taken = min(rows, most)
    return int(rng.integers(0, rows - taken + 1)), taken, columns


def _rows(checkpoint: Checkpoint, name: str, size: int, window: tuple[int, int, int], most: int | None) -> Floats:
    first, rows, columns = window
    start, stop = first * columns, min(size, (first + rows) * columns)
    values = checkpoint.read(name, start, stop).reshape(-1, columns)
    return values[:, : most if rows > 1 else None]


def _rounded(values: Floats, word: str) -> Floats:
    return decode(encode(values, word), word)


def _real(word: str) -> bool:
    """False for integers and truth values, which count something."""
    return word in FLOATS or word not in STORAGE
