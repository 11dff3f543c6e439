"""Hidden units of an MLP: matched on what they read, shown on what they write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.choice import LEAST_BLOCK, simplest
from lineage.judge.align.turns import Turn
from lineage.judge.align.weights import Moments, moments, unit_cosines
from lineage.match.units import normalised, pair_units

__all__ = ["Hidden", "fit_hidden", "match_units"]

Floats = NDArray[np.floating[Any]]
Sides = tuple[Floats, Floats]

#: a unit counts as moved where what it writes says so: by this much more than the unit of its own index
CONVINCED = 0.2
#: cosine from which the sign of what a unit reads is believed
SIGNED = 0.3
#: units up to which the assignment is solved (0.1 s); of more, pairs that are each other's nearest go first
SOLVED = 768
#: units of A that are compared with all of B's in one go
ROWS = 512
#: features that units are compared by; more are mixed down by a seeded projection
FEATURES = 384


class Hidden(msgspec.Struct, frozen=True):
    """The transform of the hidden units of one MLP.

    Attributes
    ----------
    readers : one a reader, for its units
    writer : for what the writers read (`Turn.side(dual=True)`)
    family : `identity`, `order`, `signs` or `scales`: the freest one that was needed
    moved, flipped : units in another place, units whose sign changed
    spread : relative spread of the scales, 0 where there are none
    shown : cosine of the writers after the transform
    read : cosine of each reader, which the transform was fitted on
    matched : the same as `shown` with every unit where its reading puts it, believed or not
    """

    readers: tuple[Turn, ...]
    writer: Turn
    family: str
    moved: int
    flipped: int
    spread: float
    shown: float
    matched: float
    read: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether this layer's own agreement says that its transform is real."""
        return self.shown >= LEAST_BLOCK


def fit_hidden(readers: Sequence[Sides], writers: Sequence[Sides], *, seed: int) -> Hidden:
    """Fits order, signs and scales of hidden units on the readers; the writers say which of them are real.

    Parameters
    ----------
    readers, writers : (units, channels) of A, channels already those of B, and of B
    """
    take = match_units([a for a, _ in readers], [b for _, b in readers], seed=seed)
    read, written = ([moments(a, b, take) for a, b in sides] for sides in (readers, writers))
    matched = _reached(written, np.prod([_signs(part) for part in read], axis=0))
    length = len(readers[0][0])
    home = np.arange(len(take))
    moved = _moved(take, writers, written) if length == len(take) else np.flatnonzero(take != home)
    if length == len(take) and len(moved) < 2:
        if not np.array_equal(take, home):
            read, written = ([moments(a, b) for a, b in sides] for sides in (readers, writers))
        take, moved = home, moved[:0]
    options = list(_options(read))
    scores = [_reached(written, np.prod(scales, axis=0)) for _, scales in options]
    chosen = simplest(scores)
    (family, scales), shown = options[chosen], scores[chosen]
    whole = np.prod(scales, axis=0)
    place = take if len(moved) or length != len(take) else None
    return Hidden(
        tuple(_turn(length, place, scale) for scale in scales),
        _turn(length, place, whole),
        family if family != "identity" or place is None else "order",
        len(moved),
        int(np.count_nonzero(whole < 0)),
        float(max(np.std(np.log(np.abs(scale))) for scale in scales)),
        shown,
        max(matched, shown),
        tuple(part.cosine(scale) for part, scale in zip(read, scales, strict=True)),
    )


def match_units(a: Sequence[Floats], b: Sequence[Floats], *, seed: int) -> NDArray[np.intp]:
    """A's unit for each unit of B, by the mean |cosine| over the parts.

    Parameters
    ----------
    a, b : (units, features) a part; A has at least as many units as B
    """
    mixed = [_mixed(one, two, seed) for one, two in zip(a, b, strict=True)]
    sides = [(normalised(x, centred=False), normalised(y, centred=False)) for x, y in mixed]
    take = np.full(len(b[0]), -1, np.intp)
    if min(len(a[0]), len(b[0])) > SOLVED:
        best, back = _nearest(sides)
        mutual = np.flatnonzero(back[best] == np.arange(len(best)))
        take[mutual] = best[mutual]
    rows = np.setdiff1d(np.arange(len(a[0])), take[take >= 0])
    columns = np.flatnonzero(take < 0)
    if len(columns) > SOLVED:  # most units find nothing: any order of the rest is as good
        take[columns] = np.random.default_rng(seed).permutation(rows)[: len(columns)]
    elif len(columns):
        found = pair_units(_alike([(x[rows], y[columns]) for x, y in sides]), seed=seed)
        take[columns[found.b]] = rows[found.a]
    return take


def _alike(sides: Sequence[Sides]) -> Floats:
    """Sum of |cosine| over the parts, shape (units of A, units of B)."""
    return np.asarray(sum(np.abs(x @ y.T) for x, y in sides))


def _nearest(sides: Sequence[Sides]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """A's nearest unit for each of B's, and B's for each of A's; never all products at once."""
    rows, columns = len(sides[0][0]), np.arange(len(sides[0][1]))
    best, top = np.zeros(len(columns), np.intp), np.full(len(columns), -1.0, np.float32)
    back = np.empty(rows, np.intp)
    for low in range(0, rows, ROWS):
        block = _alike([(x[low : low + ROWS], y) for x, y in sides])
        back[low : low + ROWS] = block.argmax(axis=1)
        here = block.argmax(axis=0)
        better = block[here, columns] > top
        best[better], top[better] = here[better] + low, block[here, columns][better]
    return best, back


def _mixed(one: Floats, two: Floats, seed: int) -> Sides:
    """Both sides with fewer features, by the same projection."""
    width = one.shape[1]
    if width <= FEATURES or len(one) * len(two) < SOLVED * SOLVED:
        return one, two
    mix = np.random.default_rng(seed).standard_normal((width, FEATURES), dtype=np.float32)
    return one @ mix, two @ mix


def _signs(part: Moments, *, least: float = 0.0) -> Floats:
    """-1 for each unit that points the other way, where its cosine is large enough to be believed."""
    return np.where((part.cosines < 0) & (np.abs(part.cosines) >= least), -1.0, 1.0)


def _moved(take: NDArray[np.intp], writers: Sequence[Sides], written: Sequence[Moments]) -> NDArray[np.intp]:
    """Units of B whose writing, too, says that they stand elsewhere in A."""
    away = np.flatnonzero(take != np.arange(len(take)))
    if not len(away):
        return away
    there = np.mean([np.abs(part.cosines[away]) for part in written], axis=0)
    here = np.mean([np.abs(unit_cosines(a[away], b[away])) for a, b in writers], axis=0)
    return np.asarray(away[there > here + CONVINCED])


def _options(read: Sequence[Moments]) -> Iterator[tuple[str, list[Floats]]]:
    """Families of scales, one array a reader, the simplest first."""
    signs = [_signs(part, least=SIGNED) for part in read]
    yield "identity", [np.ones(len(sign)) for sign in signs]
    yield "signs", signs
    sized = [sign * _sizes(part) for part, sign in zip(read, signs, strict=True)]
    for count in range(1, len(read) + 1):
        for some in combinations(range(len(read)), count):
            yield "scales", [sized[k] if k in some else signs[k] for k in range(len(read))]


def _sizes(part: Moments) -> Floats:
    """How much longer each of B's units is along A's; 1 where that cannot be told."""
    along = np.abs(part.dots)
    known = (along > 0) & (part.one > 0)
    return np.where(known, along / np.where(part.one > 0, part.one, 1.0), 1.0)


def _reached(written: Sequence[Moments], scale: Floats) -> float:
    """Cosine of the writers under the transform that their readers gave."""
    return float(np.mean([part.cosine(1.0 / scale) for part in written]))


def _turn(length: int, take: NDArray[np.intp] | None, scale: Floats) -> Turn:
    return Turn(length=length, take=take, scale=None if np.all(scale == 1.0) else scale)
