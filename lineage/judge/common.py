"""Both checkpoints in one layout, before anything was fitted: what unit tests may look at.

Mapping rules that carry fitted data (a permutation, per-channel scales, a rotation) were made from the values that a
test would look at; a test on the result would find its own fit. Such operations are left out here, and rules that
make no sense without them. The side with more tensors gives the names: there, units of fused tensors stand apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.apply import Filled
from lineage.checkpoint import Checkpoint
from lineage.errors import InputError
from lineage.judge.axes import Member, Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.mapping import Rule
from lineage.layout.operations import Add, Each, Matmul, Operation, Scale, Take

__all__ = ["Common", "read_units", "unfitted"]

Floats = NDArray[np.floating[Any]]

#: a part of a tensor up to this many elements is read in one piece, whatever the order of its axes
WHOLE = 1 << 19
#: places along the other axis that are looked at where units stand in columns and every place costs a read
MOST_READS = 192
#: features of a unit that are compared; more would not tell units apart any better
MOST_FEATURES = 1024


class Common(msgspec.Struct, frozen=True):
    """Two checkpoints under common names.

    Attributes
    ----------
    a, b : the same names on both sides; shapes may differ where B was cut
    origin : name in the other layout by common name: B's where A gives the names, A's where B does
    named_by_a : which side gives the names
    """

    a: Checkpoint
    b: Checkpoint
    origin: dict[str, tuple[str, ...]]
    named_by_a: bool

    @property
    def shapes(self) -> dict[str, tuple[Shape, Shape]]:
        """Shapes in A and in B of all tensors that both sides have, in order."""
        return {n: (s.shape, self.b.specs[n].shape) for n, s in self.a.specs.items() if n in self.b.specs}

    def names(self, name: str) -> tuple[str, str]:
        """A's and B's (first) name of a common tensor."""
        other = (self.origin.get(name) or (name,))[0]
        return (name, other) if self.named_by_a else (other, name)


def common_layout(a: Checkpoint, b: Checkpoint, mapping: LayoutMapping) -> Common:
    """Both checkpoints in the finer one of their two layouts, with nothing fitted.

    Parameters
    ----------
    mapping : from A's layout to B's
    """
    plain = unfitted(mapping)
    sources: set[str] = set()
    targets: set[str] = set()
    shapes = {name: spec.shape for name, spec in a.specs.items()}
    kept = _fitting(plain, a)
    for instance in kept.instances(shapes):
        sources.update(instance.source_names)
        targets.update(instance.target_names)
    if len(sources) > len(targets):
        filled = Filled(_fitting(kept.inverse(), b), b)
        return Common(a, filled, filled.origins, True)
    filled = Filled(kept, a)
    return Common(filled, b, filled.origins, False)


def unfitted(mapping: LayoutMapping) -> LayoutMapping:
    """The mapping without operations whose data were fitted to values."""
    rules = [msgspec.structs.replace(rule, ops=_without(rule.ops)) for rule in mapping.rules]
    return msgspec.structs.replace(mapping, rules=tuple(rules))


def _without(ops: Sequence[Operation]) -> tuple[Operation, ...]:
    kept: list[Operation] = []
    for op in ops:
        if isinstance(op, Each):
            chains = {place: _without(chain) for place, chain in op.chains}
            chains = {place: chain for place, chain in chains.items() if chain}
            kept += [Each(chains)] if chains else []
        elif not (isinstance(op, (Take, Matmul)) or (isinstance(op, (Scale, Add)) and op.axis is not None)):
            kept.append(op)
    return tuple(kept)


def _fitting(mapping: LayoutMapping, given: Checkpoint) -> LayoutMapping:
    """The mapping without rules that do not fit the tensors (any more)."""

    def fits(rule: Rule) -> bool:
        try:
            Filled(msgspec.structs.replace(mapping, rules=(rule,)), given)
        except InputError:
            return False
        return True

    return msgspec.structs.replace(mapping, rules=tuple(rule for rule in mapping.rules if fits(rule)))


def read_units(
    checkpoint: Checkpoint, member: Member, window: slice, *, length: int, features: NDArray[np.intp] | None = None
) -> Floats:
    """Units of one matrix as rows, shape (units of the window, features).

    Parameters
    ----------
    member : the matrix, and the side on which the units stand
    window : units wanted
    length : units that this side's tensor has
    features : places on the other axis, ascending; None for all of them

    Notes
    -----
    Reads ranges: the window's rows, or its part of each place's row. A convolution's kernel elements stand beside
    each other as features.
    """
    matrix, shape = member.matrix, checkpoint.specs[member.matrix.name].shape
    inner = shape[len(matrix.index) :]
    size = int(np.prod(inner, dtype=np.int64))
    base = 0
    for place, extent in zip(matrix.index, shape, strict=False):
        base = base * extent + place
    base *= size
    axis = matrix.axes[member.side] - len(matrix.index)
    other = matrix.axes[1 - member.side] - len(matrix.index)
    start, stop, _ = window.indices(length)
    if axis == 0 and other > 0:
        width = size // length
        block = checkpoint.read(matrix.name, base + start * width, base + stop * width)
        block = block.reshape(stop - start, *inner[1:])
    elif other == 0 and axis == 1 and features is not None and size > WHOLE:
        block = np.stack(list(_segments(checkpoint, matrix.name, base, inner, start, stop, features)), axis=0)
        return np.moveaxis(block, 1, 0).reshape(stop - start, -1)
    else:
        block = checkpoint.read(matrix.name, base, base + size).reshape(inner)
        block = block[(slice(None),) * axis + (slice(start, stop),)]
    if features is not None:
        block = np.take(block, features, axis=other)
    return np.moveaxis(block, (axis, other), (0, 1)).reshape(stop - start, -1)


def _segments(
    checkpoint: Checkpoint, name: str, base: int, inner: Shape, start: int, stop: int, features: NDArray[np.intp]
) -> Iterator[Floats]:
    """The window's part of each feature's row, shape (units, kernel)."""
    kernel = int(np.prod(inner[2:], dtype=np.int64))
    row = inner[1] * kernel
    for place in features.tolist():
        at = base + place * row
        yield checkpoint.read(name, at + start * kernel, at + stop * kernel).reshape(stop - start, kernel)


def spread(length: int, wanted: int, rng: np.random.Generator) -> NDArray[np.intp] | None:
    """At most `wanted` places of an axis, ascending; None where that is all of them."""
    if length <= wanted:
        return None
    return np.sort(rng.choice(length, wanted, replace=False))


def features_of(member: Member, lengths: Mapping[int, int], rng: np.random.Generator) -> NDArray[np.intp] | None:
    """Places on the other axis that a test looks at."""
    matrix = member.matrix
    columns = matrix.axes[member.side] > matrix.axes[1 - member.side]
    other = lengths[1 - member.side]
    wanted = MOST_READS if columns and other * lengths[member.side] * matrix.kernel > WHOLE else MOST_FEATURES
    return spread(other, max(1, wanted // max(1, matrix.kernel // 4)), rng)
