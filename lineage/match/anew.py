"""What structure alone tells of weights that were trained anew: which family of tensors is which, and how it lies.

A family is a tensor of every layer. Families whose members have equal sizes on both sides are candidates; where both
sides have as many of them, each has its image, and names only say which. Whether matrices went over transposed is
told by the shapes of all of them together, and square ones follow. Fusions and stacks are left to others.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lineage.match.structure import LEAST_SCORE, LIKENESS, PLACE, POOLED, Links, assign
from lineage.match.values import Values
from lineage.match.whole import Order, orders, turned_over
from lineage.match.words import Roles, leaf, numbers, skeleton

__all__ = ["Anew", "Pair", "turning"]

#: what neighbours that correspond, one direction of all matrices, and names that say different things add to a score
NEAR, SAME_WAY, CLASH = 1.0, 0.5, 0.6
#: share of each side's parameters that stand in equally many families of equal sizes, from which on both sides are
#: taken for one architecture. A convention, not calibrated
ONE_ARCHITECTURE = 0.5

#: pairs of families of equal sizes beyond which they are left alone: seconds of scoring
MOST_PAIRS = 100_000
#: by how much names must speak for the transposition (rounding errors of equal sums are less)
SURE = 0.05

_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


class Pair(NamedTuple):
    """A's tensor, its image in B, and the order of A's axes (those of length 1 left out) that reshapes to B's."""

    a: str
    b: str
    order: Order


Family = tuple[str, ...]
Key = tuple[int, ...]
_Keys = dict[Key, list[Family]]


class Anew:
    """One search among left-over tensors whose values say nothing.

    Parameters
    ----------
    links : what is matched already; pairs found here are added to it
    turn : whether matrices went over transposed, None where that is to be found out
    guessed : pairs that structure has matched already
    seed : of the shuffle that breaks ties
    """

    def __init__(
        self,
        a: Values,
        b: Values,
        links: Links,
        roles: Roles,
        *,
        turn: bool | None = None,
        guessed: Sequence[tuple[str, str]] = (),
        seed: int,
    ) -> None:
        self.a, self.b, self.links, self.roles, self.seed = a, b, links, roles, seed
        self.guessed, self.turn = guessed, turn

    def pairs(self, left_a: Sequence[str], left_b: Sequence[str]) -> list[Pair]:
        """Pairs of tensors, family by family: numbers that stand for roles are told from layers in a second round."""
        if self.turn is None:
            self.turn = self._turning(left_a, left_b)
        found: list[tuple[str, str]] = []
        for blot, back in itertools.product((skeleton, _layered), (False, True)):
            used_a, used_b = {x for x, _ in found}, {y for _, y in found}
            rest_a = _families((n for n in left_a if n not in used_a and self.a.size(n) > 1), blot)
            rest_b = _families((n for n in left_b if n not in used_b and self.b.size(n) > 1), blot)
            found += self._round(list(self._turned_back(rest_a)) if back else rest_a, rest_b)
        inside = [(x, y) for x, y in (*self.guessed, *found) if _matrix(self.a, x) and (numbers(x) or numbers(y))]
        kinds = {(leaf(x), leaf(y)) for x, y in inside}
        if not inside and not self.guessed:  # the way of square ones will be known once stacks are matched
            found = [(x, y) for x, y in found if len(set(self.a.shape(x))) > 1 or not _matrix(self.a, x)]
        return [Pair(x, y, self._order(x, y, kinds)) for x, y in found]

    def _turned_back(self, families: Iterable[Family]) -> Iterator[Family]:
        """Families in the order of a first number that counts backwards (decoders are numbered from either end), those
        whose sizes then come in another order; of the others nothing would say that it does."""
        for family in families:
            back = tuple(sorted(family, key=lambda n: (-(numbers(n) or (0,))[0], numbers(n)[1:])))
            if [self.a.size(n) for n in back] != [self.a.size(n) for n in family]:
                yield back

    def _round(self, mine: list[Family], theirs: list[Family]) -> list[tuple[str, str]]:
        """Families of A with families of B, the least ambiguous and largest first: those that follow lean on them."""
        keys_a, keys_b = _by_key(self.a, mine), _by_key(self.b, theirs)
        both = [k for k in keys_a if k in keys_b]
        one = self._one_architecture(keys_a, keys_b)
        found: list[tuple[str, str]] = []
        for key in sorted(both, key=lambda k: (len(keys_a[k]) * len(keys_b[k]) > 1, -max(k), -len(k), k)):
            some_a, some_b = keys_a[key], keys_b[key]
            if len(some_a) * len(some_b) > MOST_PAIRS:
                continue
            scores = np.full((len(some_a), len(some_b)), -np.inf)
            for i, x in enumerate(some_a):
                for j, y in enumerate(some_b):
                    score = self.score(x, y)
                    if one and len(some_a) == len(some_b) or score >= LEAST_SCORE:
                        place = PLACE * abs(i / len(some_a) - j / len(some_b))
                        scores[i, j] = score + self._same_way(x[0], y[0], bool(self.turn)) - place
            for i, j in assign(scores, seed=self.seed):
                chosen = list(zip(some_a[i], some_b[j], strict=True))
                found += chosen
                for pair in chosen:
                    self.links.add(*pair)
        return found

    def score(self, mine: Family, theirs: Family) -> float:
        """How likely two families correspond, -inf where shapes or constants speak against it."""
        pairs = list(zip(mine, theirs, strict=True))[:: max(1, len(mine) // POOLED)]
        if not all(orders(self.a.shape(x), self.b.shape(y)) for x, y in pairs):
            return -math.inf
        x, y = pairs[0]
        one, two = self.a.sample(x), self.b.sample(y)
        if np.ptp(one) == 0 and np.ptp(two) == 0 and one[0] != two[0]:
            return -math.inf
        near = float(np.mean([self.links.closeness(*p) for p in pairs]))
        total = NEAR * near + LIKENESS * self.roles.likeness(x, y)
        if self.roles.clash(x, y):
            total -= CLASH
        return total

    def _one_architecture(self, mine: _Keys, theirs: _Keys) -> bool:
        """Whether most of either side stands in equally many families of equal sizes, or was matched by structure."""
        equal = sum(sum(k) * len(f) for k, f in mine.items() if len(theirs.get(k, ())) == len(f))
        done_a = sum(self.a.size(n) for n in {x for x, _ in self.guessed})
        done_b = sum(self.b.size(n) for n in {y for _, y in self.guessed})
        sides = ((done_a, mine), (done_b, theirs))
        shares = [(equal + d) / max(1, d + sum(sum(k) * len(f) for k, f in s.items())) for d, s in sides]
        return min(shares) >= ONE_ARCHITECTURE

    def _same_way(self, x: str, y: str, turn: bool) -> float:
        """What the direction of two matrices adds: up where it is that of the others, down where it is not."""
        shape, target = self.a.shape(x), self.b.shape(y)
        if not (_oblong(shape) and _oblong(target)):
            return 0.0
        return SAME_WAY if (shape != target) is turn else -SAME_WAY

    def _turning(self, left_a: Sequence[str], left_b: Sequence[str]) -> bool | None:
        """Whether matrices went over transposed: by what was matched, or by the shapes of all that are left, or, where
        every matrix has one of the turned shape beside it, by the names that would correspond; None if nothing says."""
        votes = sum(_way(self.a.shape(x), self.b.shape(y)) for x, y in self.guessed)
        told = turning(self.a, self.b, left_a, left_b) if not votes else votes > 0
        if told is not None:
            return told
        keys_a, keys_b = _by_key(self.a, _families(left_a)), _by_key(self.b, _families(left_b))
        like = {False: 0.0, True: 0.0}
        for key in keys_a.keys() & keys_b.keys():
            mine = [f for f in keys_a[key] if len(f) > 1 and _oblong(self.a.shape(f[0]))]
            theirs = [f for f in keys_b[key] if len(f) > 1 and _oblong(self.b.shape(f[0]))]
            for turn in like:
                ways = [[self.score(x, y) + self._same_way(x[0], y[0], turn) for y in theirs] for x in mine]
                scores = np.array(ways, np.float64).reshape(len(mine), len(theirs))
                like[turn] += float(sum(scores[ij] for ij in assign(scores, seed=self.seed)))
        return None if abs(like[True] - like[False]) <= SURE else like[True] > like[False]

    def _order(self, x: str, y: str, kinds: set[tuple[str, str]]) -> Order:
        """The order of A's axes: turned over as the other matrices are; outside the layers only where the last words
        of both names are those of matrices inside."""
        shape, target = self.a.shape(x), self.b.shape(y)
        options = orders(shape, target)
        follows = self.turn and (numbers(x) and numbers(y) or (leaf(x), leaf(y)) in kinds)
        over = turned_over(shape, target) if follows else None
        return over if over in options and over is not None else options[0]


def turning(a: Values, b: Values, names_a: Sequence[str], names_b: Sequence[str]) -> bool | None:
    """Whether the matrices of B's layers are those of A's turned over, by the shapes of all that are not square; None
    where these do not tell."""
    counts = {len(f) for values in (names_a, names_b) for f in _families(values)} - {1}
    mine, theirs = _shapes(a, names_a, counts), _shapes(b, names_b, counts)
    plain = sum(min(n, theirs[s]) for s, n in mine.items())
    turned = sum(min(n, theirs[s[::-1]]) for s, n in mine.items())
    return None if turned == plain else turned > plain


def _shapes(values: Values, names: Iterable[str], counts: set[int]) -> Counter[tuple[int, ...]]:
    """Oblong matrices of layers by shape: of numbered tensors, and of the members of stacks of so many layers."""
    found: Counter[tuple[int, ...]] = Counter()
    for name in names:
        shape = values.shape(name)
        if numbers(name) and _oblong(shape):
            found[shape] += 1
        elif len(shape) == 3:
            for axis in (0, 1):
                rest = shape[:axis] + shape[axis + 1 :]
                if shape[axis] in counts and _oblong(rest):
                    found[rest] += shape[axis]
                    break
    return +found


def _oblong(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[0] != shape[1]


def _way(shape: Sequence[int], target: Sequence[int]) -> int:
    """1 where an oblong matrix lies turned over in another tensor, -1 where it lies as it is, 0 where neither shows."""
    if not _oblong(shape) or len(target) > len(shape) + 1:
        return 0
    pairs = [(n, m) for i, n in enumerate(target) for m in target[i + 1 :]]
    return int(tuple(shape[::-1]) in pairs) - int(tuple(shape) in pairs)


def _matrix(values: Values, name: str) -> bool:
    return len(values.shape(name)) > 1


def _layered(name: str) -> str:
    """The name with its first number blotted out, the others kept."""
    return _NUMBER.sub("#", name, count=1)


def _families(names: Iterable[str], blot: Callable[[str], str] = skeleton) -> list[Family]:
    """Names that `blot` makes equal, the members of each in the order of their numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[blot(name)].append(name)
    return [tuple(sorted(g, key=numbers)) for g in groups.values()]


def _by_key(values: Values, families: Iterable[Family]) -> _Keys:
    """Families by the sizes of their members."""
    found: _Keys = defaultdict(list)
    for family in families:
        found[tuple(values.size(n) for n in family)].append(family)
    return found
