"""Compares two checkpoints tensor by tensor: what was added, removed, reshaped or changed, and by how much."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import FLOATS
from lineage.measure.groups import Groups, read_groups
from lineage.measure.kernels import choose
from lineage.measure.metrics import Metrics
from lineage.measure.pairs import MANTISSA, Measured, Side, measure_pairs
from lineage.measure.pattern import Change, Insight, read_insights, read_pattern
from lineage.measure.spectrum import Spectrum
from lineage.measure.summary import summarise, summarise_groups, summarise_layers

if TYPE_CHECKING:
    from lineage.layout.mapping import Mapping

__all__ = [
    "ROUNDING",
    "SAMPLE",
    "Comparison",
    "Status",
    "TensorRow",
    "assemble",
    "compare",
    "compare_mapped",
    "same_names",
]

Status = Literal["unchanged", "changed", "added", "removed", "shape-changed"]
#: elements above which ranks and quantiles come from a sample
SAMPLE = 1 << 22
#: relative L2 that rounding to a format alone leaves on normal values (measured on trained weights, issue 7)
ROUNDING = {"BF16": 1.66e-3, "F16": 2.07e-4, "F8_E4M3": 2.65e-2, "F8_E5M2": 5.28e-2}


class TensorRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the comparison.

    Attributes
    ----------
    name : in A; B's name where the tensor was added
    b_name : in B, None where it was removed
    shape : in A; in B where the tensor was added
    shape_b : in B where it differs from A's, else None
    dtype_a, dtype_b : None on the side that lacks the tensor
    group, layer, stack : by name, see `groups.Place`
    metrics : None where there is nothing to compare element by element
    sampled : the figures that come from a sample, and its size
    spectrum : singular values of B - A, None where it is zero or no matrix; unset where nobody asked
    """

    name: str
    b_name: str | None
    status: Status
    shape: tuple[int, ...]
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None
    dtype_b: str | None
    group: str
    layer: int | None
    stack: str = ""
    metrics: Metrics | None = None
    sampled: dict[str, Any] | None = None
    spectrum: Spectrum | None | msgspec.UnsetType = msgspec.UNSET

    @property
    def size(self) -> int:
        """Number of elements (of A where both sides have the tensor)."""
        out = 1
        for n in self.shape:
            out *= n
        return out


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Two checkpoints, tensor by tensor and in sum.

    Attributes
    ----------
    rows : pairs in the order given, then removed, then added tensors
    statuses : how many rows have each status
    overall : figures of all content weights together (pooled sums), `mean`, `std`, `min` and `max` of the tensors'
        figures, and under `apart` the same for norms, biases and other vectors
    groups : the same by group
    layers : one entry by stack and layer, in order
    change : where the change sits
    insights, warnings : sentences for people
    seed, sample : what ranks and quantiles were sampled with
    """

    rows: tuple[TensorRow, ...]
    statuses: dict[str, int]
    overall: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    layers: list[dict[str, Any]]
    change: Change
    insights: tuple[Insight, ...]
    warnings: tuple[str, ...]
    seed: int
    sample: int

    @property
    def differs(self) -> bool:
        """True where any tensor was added, removed, reshaped or changed."""
        return any(count for status, count in self.statuses.items() if status != "unchanged")


def same_names(a: Checkpoint, b: Checkpoint) -> list[tuple[str, str]]:
    """Pairs of tensors that carry the same name on both sides, in A's order."""
    return [(name, name) for name in a.specs if name in b.specs]


def compare(
    a: Checkpoint,
    b: Checkpoint,
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    threads: int = 2,
    seed: int = 0,
    sample: int = SAMPLE,
    device: str = "cpu",
    threshold: float | None = None,
    groups: Groups | None = None,
    wanted: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Every figure of every pair of tensors, and what they say together.

    Parameters
    ----------
    pairs : (name in A, name in B); None pairs equal names. Tensors in no pair are removed (A) or added (B)
    sample : elements above which Spearman and quantiles come from a seeded sample of about this size
    threshold : a tensor is `changed` where max |b - a| passes it; None: where any value differs
    groups : name patterns, None for those of the package
    wanted : says of a name whether its tensor takes part; None takes all
    progress : called with elements done and elements in all

    Raises
    ------
    KeyError : a pair names a tensor that is not there
    InputError : a file changed or cannot be read

    Notes
    -----
    Time: one pass over both files. Memory: threads × (blocks + samples), never a whole tensor above the sample size.
    """
    groups = groups or read_groups()
    chosen = same_names(a, b) if pairs is None else list(pairs)
    listed_a, listed_b = {one for one, _ in chosen}, {two for _, two in chosen}
    chosen = [pair for pair in chosen if wanted is None or wanted(pair[0]) or wanted(pair[1])]
    found = _measure(a, b, chosen, threads=threads, seed=seed, sample=sample, device=device, progress=progress)
    rows = [_row(a.specs[one], b.specs[two], m, groups, threshold) for (one, two), m in zip(chosen, found, strict=True)]
    rows += _alone((s for s in a if s.name not in listed_a), "removed", groups, wanted)
    rows += _alone((s for s in b if s.name not in listed_b), "added", groups, wanted)
    return assemble(rows, [None if m is None else m.sums for m in found], groups, seed=seed, sample=sample)


def compare_mapped(
    mapping: Mapping,
    a: Checkpoint,
    b: Checkpoint,
    *,
    threads: int = 2,
    seed: int = 0,
    sample: int = SAMPLE,
    device: str = "cpu",
    threshold: float | None = None,
    groups: Groups | None = None,
    wanted: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """The same where names or layouts differ: A's values, laid out anew by `mapping`, against B.

    A row's name is that of the tensor of A, or the names of several joined by ` + `; group and layer go by B's name.

    Raises
    ------
    InputError : the mapping does not fit A, a file changed or cannot be read
    """
    from lineage.filling import Filled

    groups = groups or read_groups()
    filled = Filled(mapping, a)
    used = {name for origins in filled.origins.values() for name in origins}
    pairs = [
        (name, name)
        for name in b.specs
        if name in filled.specs and (wanted is None or any(map(wanted, (name, *filled.origins[name]))))
    ]
    found = _measure(filled, b, pairs, threads=threads, seed=seed, sample=sample, device=device, progress=progress)
    rows = []
    for (name, _), measured in zip(pairs, found, strict=True):
        row = _row(filled.specs[name], b.specs[name], measured, groups, threshold)
        rows.append(msgspec.structs.replace(row, name=" + ".join(filled.origins[name])))
    rows += _alone((s for s in a if s.name not in used), "removed", groups, wanted)
    rows += _alone((s for s in b if s.name not in filled.specs), "added", groups, wanted)
    return assemble(rows, [None if m is None else m.sums for m in found], groups, seed=seed, sample=sample)


def _measure(
    a: Checkpoint, b: Checkpoint, pairs: Sequence[tuple[str, str]], *, device: str, **options: Any
) -> list[Measured | None]:
    """What each pair gave, None where elements do not correspond."""
    sides = [(Side(a, a.specs[one]), Side(b, b.specs[two])) for one, two in pairs]
    alike = [one.comparable(two) for one, two in sides]
    found = iter(measure_pairs([s for s, ok in zip(sides, alike, strict=True) if ok], kernel=choose(device), **options))
    return [next(found) if ok else None for ok in alike]


def assemble(
    rows: Sequence[TensorRow], sums: Sequence[NDArray[np.float64] | None], groups: Groups, *, seed: int, sample: int
) -> Comparison:
    """The comparison that rows and their sums make; `sums` may end earlier than `rows`."""
    measured = [(row, part) for row, part in zip(rows, sums, strict=False) if part is not None]
    layers = summarise_layers(measured, groups)
    by_group = summarise_groups(measured)
    change = read_pattern(measured, groups)
    counted = Counter(row.status for row in rows)
    insights = read_insights(rows, change)
    return Comparison(
        rows=tuple(rows),
        statuses={status: counted[status] for status in get_args(Status)},
        overall=summarise(measured, groups),
        groups=by_group,
        layers=layers,
        change=change,
        insights=insights,
        warnings=tuple(i.text for i in insights if i.severity == "warning"),
        seed=seed,
        sample=sample,
    )


def _row(a: TensorSpec, b: TensorSpec, found: Measured | None, groups: Groups, threshold: float | None) -> TensorRow:
    place = groups.place(a.name)
    reshaped = a.shape != b.shape
    return TensorRow(
        name=a.name, b_name=b.name,
        status="shape-changed" if found is None or reshaped else _status(a, b, found, threshold),
        shape=a.shape, shape_b=b.shape if reshaped else None, dtype_a=a.dtype, dtype_b=b.dtype,
        group=place.group, layer=place.layer, stack=place.stack,
        metrics=None if found is None else found.metrics, sampled=None if found is None else found.sampled,
    )  # fmt: skip


def _status(a: TensorSpec, b: TensorSpec, found: Measured, threshold: float | None) -> Status:
    """Changed where any value differs, or differs by more than the threshold or the rounding of a cast."""
    if found.lost or (threshold is not None and (found.metrics.max_abs or 0.0) > threshold):
        return "changed"
    if threshold is not None or not found.metrics.changed:
        return "unchanged"
    if a.dtype != b.dtype and {a.dtype, b.dtype} <= set(FLOATS):
        # the exact test misses casts that round otherwise (twice, ties away); their size gives them away
        coarse = min(a.dtype, b.dtype, key=lambda word: MANTISSA[word])
        if found.only_rounded or (found.metrics.rel_l2 or 1.0) <= ROUNDING.get(coarse, 0.0):
            return "unchanged"
    return "changed"


def _alone(
    specs: Iterable[TensorSpec], status: Status, groups: Groups, wanted: Callable[[str], bool] | None
) -> list[TensorRow]:
    """Rows of tensors that only one side has."""
    rows = []
    for spec in specs:
        if wanted is None or wanted(spec.name):
            place, added = groups.place(spec.name), status == "added"
            rows.append(TensorRow(
                name=spec.name, b_name=spec.name if added else None, status=status, shape=spec.shape,
                dtype_a=None if added else spec.dtype, dtype_b=spec.dtype if added else None,
                group=place.group, layer=place.layer, stack=place.stack,
            ))  # fmt: skip
    return rows
