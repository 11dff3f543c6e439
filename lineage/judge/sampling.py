"""Units of both checkpoints as rows: sampled at the same places, read by ranges, put into one frame of features."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.metered import Spent
from lineage.judge.axes import FEWEST_UNITS, KERNEL, Block, Matrix, Member, Shape, template
from lineage.judge.common import Common
from lineage.judge.tables import DIAGONAL, banded, diagonal, sinusoidal, uniform
from lineage.match.units import normalised

__all__ = ["Frame", "Units", "load_groups", "load_units", "read_units", "token_frames"]

Floats = NDArray[np.floating[Any]]

#: a part of a tensor up to this many elements is read in one piece, whatever the order of its axes
WHOLE = 1 << 19
#: elements of a matrix from which rows are not read whole where some of their places are wanted
LARGE = 1 << 23
#: places along the other axis that are looked at where units stand in columns and every place costs a read
MOST_READS = 128
#: features of a unit that are compared; more would not tell units apart any better
MOST_FEATURES = 512
#: neighbouring rows of a unit of many rows (a head) that are read, and features of each
MOST_ROWS, MOST_COLUMNS = 8, 128
#: rows of the embeddings that make the token frame
MOST_TOKENS = 256
#: standard errors by which a diagonal must stand out where no negative control would see it: by chance once in 30,000
#: matrices, and 14 units are enough to show an identity
UNCONTROLLED = 4.0


class Units(msgspec.Struct, frozen=True):
    """The sampled units of one block on one side.

    Attributes
    ----------
    parts : (units, features) a member, normalised
    labels : index of each unit; units that are dead or equal to another are left out
    total : indices that were sampled
    """

    parts: tuple[Floats, ...]
    labels: NDArray[np.intp]
    total: int

    def first(self, most: int) -> Units:
        """The units whose labels lie below `most`."""
        kept = self.labels < most
        return Units(tuple(part[kept] for part in self.parts), self.labels[kept], min(self.total, most))


class Frame(msgspec.Struct, frozen=True):
    """What channels of equal length mean, seen from tensors outside the layers.

    Attributes
    ----------
    a, b : (tokens, channels): sampled rows of embeddings, heads and the like, the same rows on both sides

    Notes
    -----
    A unit's weights times the frame say what it does for each token, however the channels between them were
    permuted, flipped, rotated or cut; nothing is fitted, and no hidden unit takes part.
    """

    a: Floats
    b: Floats


def token_frames(common: Common, found: Sequence[Matrix], *, seed: int) -> dict[tuple[int, int], Frame]:
    """A frame for each pair of channel lengths (A's, B's) that stand beside an axis bound to an index.

    Parameters
    ----------
    found : the matrices of the common layout
    """
    inside = {n for m in found if _numbered(m) for n in m.b}
    parts: dict[tuple[int, int], list[tuple[Floats, Floats]]] = {}
    for matrix in found:
        for side in (0, 1):
            tokens = min(matrix.a[1 - side], matrix.b[1 - side])
            if _numbered(matrix) or matrix.b[side] not in inside or matrix.b[1 - side] in inside or tokens < 8:
                continue
            member = Member(matrix, side)
            rng = np.random.default_rng([seed, *matrix.b])
            rows = _places(member, tokens, max(8, MOST_TOKENS // matrix.kernel), rng)
            rows = np.arange(tokens) if rows is None else rows
            whole = slice(0, max(matrix.a[side], matrix.b[side]))
            try:
                one = read_units(common.a, member, whole, length=matrix.a[side], features=rows).T
                two = read_units(common.b, member, whole, length=matrix.b[side], features=rows).T
            except Spent:
                continue
            parts.setdefault((matrix.a[side], matrix.b[side]), []).append((_scaled(one), _scaled(two)))
    return {
        lengths: Frame(np.concatenate([one for one, _ in pairs]), np.concatenate([two for _, two in pairs]))
        for lengths, pairs in parts.items()
    }


def load_units(
    common: Common,
    block: Block,
    share: int,
    *,
    seed: int,
    frames: Mapping[tuple[int, int], Frame] | None = None,
    controlled: bool = True,
) -> tuple[Units, Units] | str | None:
    """The sampled units of a block on both sides.

    Parameters
    ----------
    share : units wanted
    frames : features are seen through these frames; None: as they stand
    controlled : a negative control follows; else tables are suspected sooner

    Returns
    -------
    units of A and of B; why the block counts for nothing (a table that anyone computes alike); or None where
    nothing can be compared
    """
    rng = np.random.default_rng([seed, block.a, block.b])
    window = _window(block, share, rng)
    sides: tuple[list[Floats], list[Floats]] = ([], [])
    for member in sorted(block.members, key=lambda m: (m.side, template(m.matrix.path))):
        lengths = (member.matrix.a[1 - member.side], member.matrix.b[1 - member.side])
        frame = None if frames is None else frames.get(lengths)
        features = _features(member, lengths, frames, rng)
        if features is _NOTHING:
            continue
        for side, parts, length in ((common.a, sides[0], block.a), (common.b, sides[1], block.b)):
            own = Member(member.of(int(side is common.b)), member.side)
            first, end = member.start, member.start + length
            part = slice(first + window.start, min(first + window.stop, end))
            try:
                units = read_units(side, own, part, length=end, features=features)
            except Spent:
                return None  # no more bytes may be read: the blocks before this one are the sample
            if _table(units, member, window.start, features, DIAGONAL if controlled else UNCONTROLLED):
                return f"{member.matrix.name} holds a table that anyone computes alike"
            if frame is not None:
                units = units @ (frame.a if side is common.a else frame.b).T
            parts.append(units)
    if not sides[0]:
        return None
    one, two = (_alive(parts, window.stop - window.start) for parts in sides)
    return (one, two) if min(len(one.labels), len(two.labels)) >= FEWEST_UNITS else None


def load_groups(common: Common, block: Block, *, seed: int) -> tuple[Units, Units] | None:
    """Units of many rows (heads), or few in number (experts), on both sides; None where nothing can be compared.

    Notes
    -----
    A few neighbouring rows stand for a unit, the same ones in every unit. The mean is not taken off: of two units
    that would leave one and its negative.
    """
    rng = np.random.default_rng([seed, block.a, block.b])
    sides: tuple[list[Floats], list[Floats]] = ([], [])
    for member in sorted(block.members, key=lambda m: (m.side, template(m.matrix.path))):
        other = (member.matrix.a[1 - member.side], member.matrix.b[1 - member.side])
        rows = min(member.width, MOST_ROWS)
        first = int(rng.integers(0, member.width - rows + 1))
        wanted = min(*other, MOST_COLUMNS)
        features = np.arange(wanted) + int(rng.integers(0, min(other) - wanted + 1))
        if other[0] != other[1]:
            continue  # channels were cut: nothing says which feature is which
        for side, parts, count in ((common.a, sides[0], block.a), (common.b, sides[1], block.b)):
            own = Member(member.of(int(side is common.b)), member.side, member.width, member.start)
            try:
                parts.append(_grouped(side, own, count, first, rows, features))
            except Spent:
                return None  # no more bytes may be read: the blocks before this one are the sample
    if not sides[0]:
        return None
    one, two = (_alive(parts, len(parts[0]), centred=False) for parts in sides)
    return (one, two) if min(len(one.labels), len(two.labels)) > 1 else None


def _grouped(
    checkpoint: Checkpoint, member: Member, count: int, first: int, rows: int, features: NDArray[np.intp]
) -> Floats:
    """Some rows of each of so many units, shape (units, rows × features)."""
    shape = checkpoint.specs[member.matrix.name].shape
    length = shape[member.matrix.axes[member.side]]
    starts = [member.start + at * member.width + first for at in range(count)]
    if member.matrix.axes[member.side] == len(member.matrix.index):  # rows: each unit's stand together in the file
        parts = [
            read_units(checkpoint, member, slice(at, at + rows), length=length, features=features) for at in starts
        ]
        return np.stack(parts).reshape(count, -1)
    window = slice(member.start, member.start + count * member.width)
    whole = read_units(checkpoint, member, window, length=length, features=features)
    return whole.reshape(count, member.width, -1)[:, first : first + rows].reshape(count, -1)


def read_units(
    checkpoint: Checkpoint, member: Member, window: slice, *, length: int, features: NDArray[np.intp] | None = None
) -> Floats:
    """Units of one matrix as rows, shape (units of the window, features).

    Parameters
    ----------
    member : the matrix, and the side on which the units stand
    window : units wanted; what lies beyond the end is left out
    length : units that this side's tensor has
    features : places on the other axis, ascending; None for all of them

    Notes
    -----
    Reads ranges: the window's rows, or its part of each place's row. A convolution's kernel elements stand beside
    each other as features. What is not finite counts as 0.
    """
    units = _stored(checkpoint, member, window, length, features)
    finite = np.isfinite(units)
    return units if finite.all() else np.where(finite, units, 0)


def _stored(
    checkpoint: Checkpoint, member: Member, window: slice, length: int, features: NDArray[np.intp] | None
) -> Floats:
    """The units as they are stored."""
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
    width = size // inner[0]
    if axis == 0 and features is not None and len(inner) == 2 and (stop - start) * width > LARGE:
        return _neighbours(checkpoint, matrix.name, base, width, start, stop, features)
    if axis == 0:
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


def _neighbours(
    checkpoint: Checkpoint, name: str, base: int, width: int, start: int, stop: int, features: NDArray[np.intp]
) -> Floats:
    """Part of each unit's row, from the first to the last feature, shape (units, features)."""
    first, last = int(features[0]), int(features[-1]) + 1
    rows = [
        checkpoint.read(name, at + first, at + last) for at in range(base + start * width, base + stop * width, width)
    ]
    return np.stack(rows)[:, features - first]


def _segments(
    checkpoint: Checkpoint, name: str, base: int, inner: Shape, start: int, stop: int, features: NDArray[np.intp]
) -> Iterator[Floats]:
    """The window's part of each feature's row, shape (units, kernel)."""
    kernel = int(np.prod(inner[2:], dtype=np.int64))
    row = inner[1] * kernel
    for place in features.tolist():
        at = base + place * row
        yield checkpoint.read(name, at + start * kernel, at + stop * kernel).reshape(stop - start, kernel)


def _places(member: Member, length: int, wanted: int, rng: np.random.Generator) -> NDArray[np.intp] | None:
    """At most `wanted` places beside the units, ascending; None where that is all of them.

    Neighbours where the units are rows of a large matrix, so that a row need not be read whole.
    """
    if length <= wanted:
        return None
    matrix = member.matrix
    if matrix.axes[member.side] < matrix.axes[1 - member.side] and matrix.b[0] * matrix.b[1] > LARGE:
        return np.arange(wanted) + int(rng.integers(0, length - wanted + 1))
    return np.sort(rng.choice(length, wanted, replace=False))


#: stands for a member that cannot be compared
_NOTHING = np.zeros(0, np.intp)


def _features(
    member: Member, lengths: tuple[int, int], frames: Mapping[tuple[int, int], Frame] | None, rng: np.random.Generator
) -> NDArray[np.intp] | None:
    """Places on the other axis that a test looks at; None for all, `_NOTHING` where there is nothing to compare."""
    matrix = member.matrix
    columns = matrix.axes[member.side] > matrix.axes[1 - member.side]
    costly = columns and matrix.b[0] * matrix.b[1] * matrix.kernel > WHOLE
    if frames is not None:
        return None if lengths in frames and matrix.kernel == 1 and not costly else _NOTHING
    if lengths[0] != lengths[1] and _numbered(matrix):
        return _NOTHING  # channels were cut: nothing says which feature is which
    shared = min(lengths)
    wanted = MOST_READS if costly else MOST_FEATURES
    chosen = _places(member, shared, max(8, wanted // matrix.kernel), rng)
    return np.arange(shared) if chosen is None and lengths[0] != lengths[1] else chosen


def _numbered(matrix: Matrix) -> bool:
    return any(ch.isdigit() for part in matrix.path for ch in part)


def _table(units: Floats, member: Member, start: int, features: NDArray[np.intp] | None, errors: float) -> bool:
    """True where the units are written by rule, not by training."""
    matrix = member.matrix
    rows = np.arange(start, start + len(units))
    columns = np.arange(units.shape[1] // matrix.kernel) if features is None else features
    strongest = np.abs(units).reshape(len(units), -1, matrix.kernel).max(axis=2)
    if diagonal(strongest, rows, columns, period=min(matrix.b), errors=errors):
        return True
    if matrix.kernel > KERNEL and min(matrix.b) == 1:  # filters of one signal, which many banks are made to be
        return sinusoidal(units.T) or banded(units) or uniform(units)
    if matrix.kernel > 1 or _numbered(matrix):
        return False
    return sinusoidal(units.T) or banded(units) or uniform(units)


def _window(block: Block, share: int, rng: np.random.Generator) -> slice:
    """Neighbouring units that are sampled on both sides; all of them where the sides' lengths differ."""
    if block.a != block.b:
        return slice(0, max(block.a, block.b))
    wanted = min(block.a, share)
    start = int(rng.integers(0, block.a - wanted + 1))
    return slice(start, start + wanted)


def _alive(parts: Sequence[Floats], total: int, *, centred: bool = True) -> Units:
    """Normalised units without those that are dead or equal to another one."""
    length = len(parts[0])
    alive = np.ones(length, bool)
    rng = np.random.default_rng(0)
    prints = np.zeros(length)
    for part in parts:
        alive &= np.abs(part).max(axis=1, initial=0.0) > 0
        prints += np.nan_to_num(part).astype(np.float64) @ rng.standard_normal(part.shape[1])
    _, inverse, times = np.unique(prints, return_inverse=True, return_counts=True)
    alive &= times[inverse] == 1
    rows = tuple(normalised(part[alive], centred=centred) for part in parts)
    return Units(rows, np.flatnonzero(alive), max(total, length))


def _scaled(rows: Floats) -> Floats:
    """Rows centred and divided by their spread, so that several tensors weigh alike."""
    centred = rows - rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)
    spread_ = float(np.sqrt(np.mean(np.square(centred, dtype=np.float64))))
    return np.asarray(centred / spread_ if spread_ > 0 else centred)
