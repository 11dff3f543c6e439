"""Left-over tensors that differ in one number of their names, and the one tensor that stacks them.

Rows too short or too few to be found one by one (norms of scanned layers), and stacks of which values say nothing
(gains that are all one): whole members are held against the slices of an axis.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lineage.layout.induce import Match
from lineage.layout.mapping import How
from lineage.layout.operations import Stack, Unstack
from lineage.match.chains import OVER, Names, reordered
from lineage.match.structure import CLASH, CLOSENESS, EQUAL, LEAST_SCORE, LIKENESS, POOLED, VALUE, Links, assign
from lineage.match.values import Values, agreement, lattice
from lineage.match.whole import Order, moved, orders, turned_over
from lineage.match.words import Roles

__all__ = ["stacked"]

#: elements of a member that are compared
SAMPLE = 2048
#: pairs of a tensor and a family beyond which none are looked at
MOST_PAIRS = 1_000_000

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


class _Fit(NamedTuple):
    """How a family fits into a tensor: along which axis, each member with its axes in which order."""

    score: float
    axis: int
    order: Order
    how: How


_Chosen = tuple[str, tuple[str, ...], _Fit]


def stacked(
    a: Values, b: Values, left_a: Sequence[str], left_b: Sequence[str], links: Links, roles: Roles, names: Names,
    *,
    expected: float,
    seed: int,
    turn: bool = False,
) -> list[Match]:  # fmt: skip
    """Matches of a left-over tensor of one side with a family of left-over tensors of the other.

    Parameters
    ----------
    expected : the correlation that values show elsewhere, 0 where the weights share none
    seed : of the shuffle that breaks ties
    turn : matrices go over transposed where values do not say so
    """
    found = []
    for whole_is_a in (False, True):
        wholes, parts, left, others = (a, b, left_a, left_b) if whole_is_a else (b, a, left_b, left_a)
        chosen = _Stacks(wholes, parts, links, roles, expected, whole_is_a).chosen(left, others, seed)
        if not expected:
            chosen = _one_way(chosen, wholes, parts, turn=turn)
        for whole, family, fit in chosen:
            shape, member = wholes.checkpoint.specs[whole].shape, parts.checkpoint.specs[family[0]].shape
            rest = shape[: fit.axis] + shape[fit.axis + 1 :]
            if whole_is_a:
                back = _turned(parts.shape(family[0]), fit.order, rest)
                ops = (Unstack(fit.axis, OVER), *reordered(rest, back, member, names))
                found.append(Match(targets=(family,), sources=(whole,), ops=ops, how=fit.how))
            else:
                made = (*reordered(member, fit.order, rest, names), Stack(fit.axis, OVER))
                found.append(Match(targets=(whole,), sources=(family,), ops=made, how=fit.how))
    return found


def _one_way(chosen: Sequence[_Chosen], wholes: Values, parts: Values, *, turn: bool) -> list[_Chosen]:
    """The same stacks with all matrices that values say nothing of turned over, where those are whose shapes tell."""
    rests = [_without(wholes.checkpoint.specs[whole].shape, fit.axis) for whole, _, fit in chosen]
    shapes = [parts.shape(family[0]) for _, family, _ in chosen]
    votes = [
        1 if shape != rest else -1
        for shape, rest in zip(shapes, rests, strict=True)
        if len(shape) == len(rest) == 2 and shape[0] != shape[1]
    ]
    if sum(votes) < 0 or sum(votes) == 0 and not turn:
        return list(chosen)
    found = []
    for (whole, family, fit), shape, rest in zip(chosen, shapes, rests, strict=True):
        over = turned_over(shape, rest)
        if fit.how != "values" and over is not None and over in orders(shape, rest):
            fit = fit._replace(order=over)
        found.append((whole, family, fit))
    return found


def _without(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    """A shape without one axis, and without those of length 1."""
    return tuple(n for i, n in enumerate(shape) if i != axis and n != 1)


class _Stacks:
    """Scores families against tensors and assigns them."""

    def __init__(
        self, wholes: Values, parts: Values, links: Links, roles: Roles, expected: float, whole_is_a: bool
    ) -> None:
        self.wholes, self.parts, self.links, self.roles = wholes, parts, links, roles
        self.expected, self.whole_is_a = expected, whole_is_a

    def chosen(self, left: Sequence[str], others: Sequence[str], seed: int) -> list[_Chosen]:
        """(tensor, family, fit), each tensor and each family once."""
        families = _families(self.parts, others)
        by_size: dict[int, list[int]] = defaultdict(list)
        for number, family in enumerate(families):
            by_size[len(family) * self.parts.size(family[0])].append(number)
        rows = [n for n in left if by_size.get(self.wholes.size(n))]
        if sum(len(by_size[self.wholes.size(n)]) for n in rows) > MOST_PAIRS:
            return []
        fits: dict[tuple[int, int], _Fit] = {}
        for i, whole in enumerate(rows):
            for j in by_size[self.wholes.size(whole)]:
                fit = self.fit(whole, families[j])
                if fit is not None and fit.score >= LEAST_SCORE:
                    fits[i, j] = fit
        scores = np.full((len(rows), len(families)), -np.inf)
        for (i, j), fit in fits.items():
            scores[i, j] = fit.score
        used: set[str] = set()
        result = []
        for i, j in sorted(assign(scores, seed=seed), key=lambda ij: -fits[ij].score):
            if not used & set(families[j]):
                used |= set(families[j])
                result.append((rows[i], families[j], fits[i, j]))
        return result

    def fit(self, whole: str, family: tuple[str, ...]) -> _Fit | None:
        """The best way in which the family fits into the tensor."""
        shape = self.wholes.checkpoint.specs[whole].shape
        some = family[:: max(1, len(family) // POOLED)]
        pairs = [(whole, n) if self.whole_is_a else (n, whole) for n in some]
        names = [CLOSENESS * self.links.closeness(x, y) + LIKENESS * self.roles.likeness(x, y) for x, y in pairs]
        score = float(np.mean(names))
        if not self.expected and self.roles.clash(*pairs[0]):
            score -= CLASH
        best: _Fit | None = None
        for axis, length in enumerate(shape):
            if length != len(family):
                continue
            rest = _without(shape, axis)
            for order in orders(self.parts.shape(family[0]), rest):
                told, ground = self._values(whole, family, axis, order)
                fit = None if told is None else _Fit(score + ground, axis, order, told)
                if fit is not None and (best is None or fit.score > best.score):
                    best = fit
        return best

    def _values(self, whole: str, family: tuple[str, ...], axis: int, order: Order) -> tuple[How | None, float]:
        """What values say of a fit, and what that adds to its score."""
        shape = self.wholes.checkpoint.specs[whole].shape
        rest = shape[:axis] + shape[axis + 1 :]
        places = lattice([n for n in rest if n != 1], SAMPLE, 0)
        mine, theirs = [], []
        for number in range(0, len(family), max(1, len(family) // POOLED)):
            mine.append(self.wholes.at(whole, _inside(places, shape, axis, number)))
            member = family[number]
            theirs.append(self.parts.at(member, moved(places, self.parts.shape(member), order)))
        x, y = np.concatenate(mine), np.concatenate(theirs)
        if np.ptp(x) == 0 and np.ptp(y) == 0:
            return ("structure", EQUAL) if x[0] == y[0] else (None, 0.0)
        if self.expected:
            # members are compared less their means: gains have means that any two share
            told, r = agreement(_centred(mine), _centred(theirs), self.expected)
            return ("values", VALUE * r) if told == "values" else (None, 0.0)
        return "structure", 0.0


def _centred(members: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([m - m.mean() for m in members])


def _inside(places: NDArray[np.int64], shape: Sequence[int], axis: int, number: int) -> NDArray[np.int64]:
    """Flat positions in a tensor of flat positions in its slice `number` along an axis."""
    inner = math.prod(shape[axis + 1 :])
    at: NDArray[np.int64] = (places // inner * shape[axis] + number) * inner + places % inner
    return at


def _turned(shape: Sequence[int], order: Order, target: Sequence[int]) -> Order:
    """The order of the axes of `target` (those of length 1 left out) that undoes one of `shape`'s.

    Where axes were merged or split as well, only the plain order is known to undo them.
    """
    lengths = [n for n in target if n != 1]
    if [shape[i] for i in order] == lengths:
        return tuple(int(i) for i in np.argsort(order))
    return next(iter(orders(tuple(lengths), tuple(shape))), tuple(range(len(lengths))))


def _families(values: Values, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Tensors of one shape whose names differ in one number only, in the order of the numbers."""
    groups: dict[Any, list[tuple[int, str]]] = defaultdict(list)
    for name in names:
        shape = values.checkpoint.specs[name].shape
        for hit in _NUMBER.finditer(name):
            groups[name[: hit.start()], name[hit.end() :], shape].append((int(hit.group()), name))
    found = [tuple(name for _, name in sorted(members)) for members in groups.values() if len(members) > 1]
    return sorted(dict.fromkeys(found), key=len, reverse=True)
