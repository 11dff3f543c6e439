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
from lineage.judge.align.weights import cosine, unit_cosines
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
    matched = _written(writers, take, np.prod([_signs(a[take], b) for a, b in readers], axis=0))
    length = len(readers[0][0])
    home = np.arange(len(take))
    moved = _moved(take, writers) if length == len(take) else np.flatnonzero(take != home)
    if length == len(take) and len(moved) < 2:
        take, moved = home, moved[:0]
    (family, scales), shown = _family(readers, writers, take)
    whole = np.prod(scales, axis=0)
    place = take if len(moved) or length != len(take) else None
    turns = tuple(_turn(length, place, scale) for scale in scales)
    return Hidden(
        turns,
        _turn(length, place, whole),
        family if family != "identity" or place is None else "order",
        len(moved),
        int(np.count_nonzero(whole < 0)),
        float(max(np.std(np.log(np.abs(scale))) for scale in scales)),
        shown,
        max(matched, shown),
        tuple(cosine(turn.over(a, 0), b) for turn, (a, b) in zip(turns, readers, strict=True)),
    )


def match_units(a: Sequence[Floats], b: Sequence[Floats], *, seed: int) -> NDArray[np.intp]:
    """A's unit for each unit of B, by the mean |cosine| over the parts.

    Parameters
    ----------
    a, b : (units, features) a part; A has at least as many units as B
    """
    alike = np.zeros((len(a[0]), len(b[0])), np.float32)
    for one, two in zip(a, b, strict=True):
        x, y = _mixed(one, two, seed)
        alike += np.abs(normalised(x, centred=False) @ normalised(y, centred=False).T)
    take = np.full(alike.shape[1], -1, np.intp)
    if min(alike.shape) > SOLVED:
        best, back = alike.argmax(axis=0), alike.argmax(axis=1)
        mutual = np.flatnonzero(back[best] == np.arange(len(best)))
        take[mutual] = best[mutual]
    rows = np.setdiff1d(np.arange(len(alike)), take[take >= 0])
    columns = np.flatnonzero(take < 0)
    if len(columns) > SOLVED:  # most units find nothing: any order of the rest is as good
        take[columns] = np.random.default_rng(seed).permutation(rows)[: len(columns)]
    elif len(columns):
        found = pair_units(alike[np.ix_(rows, columns)], seed=seed)
        take[columns[found.b]] = rows[found.a]
    return take


def _mixed(one: Floats, two: Floats, seed: int) -> Sides:
    """Both sides with fewer features, by the same projection."""
    width = one.shape[1]
    if width <= FEATURES or len(one) * len(two) < SOLVED * SOLVED:
        return one, two
    mix = np.random.default_rng(seed).standard_normal((width, FEATURES), dtype=np.float32)
    return one @ mix, two @ mix


def _family(
    readers: Sequence[Sides], writers: Sequence[Sides], take: NDArray[np.intp]
) -> tuple[tuple[str, list[Floats]], float]:
    """The simplest family of scales for units in this order, and the cosine that the writers reach."""
    signs = []
    for a, b in readers:
        signs.append(_signs(a[take], b, least=SIGNED))
    options = list(_options([(a[take], b) for a, b in readers], signs))
    scores = [_written(writers, take, np.prod(scales, axis=0)) for _, scales in options]
    chosen = simplest(scores)
    return options[chosen], scores[chosen]


def _signs(a: Floats, b: Floats, *, least: float = 0.0) -> Floats:
    """-1 for each unit that points the other way, where its cosine is large enough to be believed."""
    cosines = unit_cosines(a, b)
    return np.where((cosines < 0) & (np.abs(cosines) >= least), -1.0, 1.0)


def _moved(take: NDArray[np.intp], writers: Sequence[Sides]) -> NDArray[np.intp]:
    """Units of B whose writing, too, says that they stand elsewhere in A."""
    away = np.flatnonzero(take != np.arange(len(take)))
    if not len(away):
        return away
    there = np.mean([np.abs(unit_cosines(a[take[away]], b[away])) for a, b in writers], axis=0)
    here = np.mean([np.abs(unit_cosines(a[away], b[away])) for a, b in writers], axis=0)
    return np.asarray(away[there > here + CONVINCED])


def _options(readers: Sequence[Sides], signs: Sequence[Floats]) -> Iterator[tuple[str, list[Floats]]]:
    """Families of scales, one array a reader, the simplest first."""
    ones: list[Floats] = [np.ones(len(sign)) for sign in signs]
    yield "identity", ones
    yield "signs", list(signs)
    sized = [sign * _sizes(a, b) for (a, b), sign in zip(readers, signs, strict=True)]
    for count in range(1, len(readers) + 1):
        for some in combinations(range(len(readers)), count):
            yield "scales", [sized[k] if k in some else signs[k] for k in range(len(readers))]


def _sizes(a: Floats, b: Floats) -> Floats:
    """How much longer each of B's units is along A's; 1 where that cannot be told."""
    along = np.abs(np.einsum("ij,ij->i", a, b, dtype=np.float64))
    power = np.einsum("ij,ij->i", a, a, dtype=np.float64)
    known = (along > 0) & (power > 0)
    return np.where(known, along / np.where(power > 0, power, 1.0), 1.0)


def _written(writers: Sequence[Sides], take: NDArray[np.intp], scale: Floats) -> float:
    """Cosine of the writers under the transform that their readers gave."""
    factor = (1.0 / scale)[:, None].astype(np.float32)
    return float(np.mean([cosine(a[take] * factor, b) for a, b in writers]))


def _turn(length: int, take: NDArray[np.intp] | None, scale: Floats) -> Turn:
    return Turn(length=length, take=take, scale=None if np.all(scale == 1.0) else scale)
