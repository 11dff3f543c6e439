"""What values cannot tell: all-ones gains, zero biases, weights that were trained anew.

Neighbours already matched say most: a tensor's parents, grandparents, … have images on the other side, seen from the
links found so far. Then shape, name tokens, and place among the tensors left over. All of this is a guess with a
score, assigned one to one (Hungarian), and never called certified.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lineage.layout.induce import Match
from lineage.layout.mapping import How
from lineage.match.chains import Names, reordered
from lineage.match.values import Values, agreement, lattice
from lineage.match.whole import Order, moved, orders
from lineage.match.words import Roles, ancestors, numbers, skeleton

__all__ = ["LEAST_SCORE", "Links", "Structure"]

#: score that a pair needs: close neighbours, or names that share most of their words
LEAST_SCORE = 0.35
#: what each ground adds to a score
CLOSENESS, LIKENESS, VALUE, SAME, EQUAL, PLACE, NUMBERS, CLASH = 1.0, 0.8, 1.5, 1.0, 0.3, 0.1, 0.3, 0.6
#: what it adds that nothing else of a size is left over on either side
ONLY = 0.15
#: pairs of one shape beyond which they are not scored one by one
MOST_PAIRS = 4_000_000
#: members of two families that are looked at to score the families
POOLED = 8


_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


class Links:
    """Pairs of tensors known to correspond, and what they say about the trees of names above them."""

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self.both: Counter[tuple[str, str]] = Counter()
        self.a: Counter[str] = Counter()
        self.b: Counter[str] = Counter()
        self.total = 0
        for a, b in pairs:
            self.add(a, b)

    def add(self, a: str, b: str) -> None:
        """Adds one pair."""
        self.total += 1
        up_a, up_b = _near(a), _near(b)
        self.a.update(up_a)
        self.b.update(up_b)
        self.both.update((x, y) for x in up_a for y in up_b)

    def closeness(self, a: str, b: str) -> float:
        """0 to 1: how well an ancestor of A's tensor is the image of one of B's, close ancestors counting most."""
        best = 0.0
        for x in _near(a):
            for y in _near(b):
                both = self.both.get((x, y), 0)
                if both:
                    share = both / max(self.a[x], self.b[y])
                    special = 1 - math.log(max(self.a[x], self.b[y])) / math.log(self.total + 2)
                    best = max(best, share * share * special)
        return best

    def one_layer(self, a: str, b: str) -> bool | None:
        """Whether what is known of the layer of B's tensor comes from the layer of A's; None where nothing is."""
        x, y = _layer(a), _layer(b)
        if not x or not y or not self.b[y]:
            return None
        return self.both[x, y] * 2 >= self.b[y]


@lru_cache(1 << 16)
def _near(name: str) -> tuple[str, ...]:
    """Ancestors that say something, at most eight."""
    return tuple(a for a in ancestors(name) if a)[:8]


@lru_cache(1 << 16)
def _layer(name: str) -> str:
    """The name up to its first number."""
    hit = _NUMBER.search(name)
    return name[: hit.end()] if hit else ""


def assign(scores: NDArray[np.float64], *, seed: int) -> list[tuple[int, int]]:
    """Row-column pairs of the best one-to-one assignment, ties broken by a seeded shuffle.

    Pairs that scored -inf are left out.
    """
    if not np.isfinite(scores).any():
        return []
    from scipy.optimize import linear_sum_assignment

    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    mixed = scores[np.ix_(rows, columns)]
    finite = np.isfinite(mixed)
    low = (mixed[finite].min() if finite.any() else 0.0) - 1e6
    i, j = linear_sum_assignment(np.where(finite, mixed, low), maximize=True)
    return [(int(rows[x]), int(columns[y])) for x, y in zip(i, j, strict=True) if finite[x, y]]


class Structure:
    """Scores pairs of left-over tensors and assigns them.

    Parameters
    ----------
    expected : the correlation that values show elsewhere, 0 where the weights share none
    """

    def __init__(self, a: Values, b: Values, links: Links, roles: Roles, *, expected: float, seed: int) -> None:
        self.a, self.b, self.links, self.roles = a, b, links, roles
        self.expected, self.seed = expected, seed

    def matches(self, left_a: Sequence[str], left_b: Sequence[str], names: Names) -> list[Match]:
        """Matches among what is left: whole families first where values say nothing, then one by one."""
        found: dict[str, tuple[str, How]] = {}
        if not self.expected:
            for family, other in self._families(left_a, left_b):
                found |= {y: (x, "name" if x == y else "structure") for x, y in zip(family, other, strict=True)}
        used = {x for x, _ in found.values()}
        rest_a, rest_b = [n for n in left_a if n not in used], [n for n in left_b if n not in found]
        found |= self._singles(rest_a, rest_b)
        specs_a, specs_b = self.a.checkpoint.specs, self.b.checkpoint.specs
        made = []
        for y, (x, how) in found.items():
            order = self._turned(x, y)[0]
            ops = reordered(specs_a[x].shape, order, specs_b[y].shape, names)
            made.append(Match(targets=(y,), sources=(x,), ops=ops, how=how))
        return made

    def _families(self, left_a: Sequence[str], left_b: Sequence[str]) -> list[tuple[list[str], list[str]]]:
        """Families (names that differ in numbers only) of equal size and shapes, paired by their mean score."""
        mine, theirs = _grouped(left_b), _grouped(left_a)
        scores = np.full((len(mine), len(theirs)), -np.inf)
        for i, family in enumerate(mine):
            for j, other in enumerate(theirs):
                if len(family) != len(other):
                    continue
                step = max(1, len(family) // POOLED)
                pairs = list(zip(other, family, strict=True))[::step]
                pooled = [self.score(x, y)[0] for x, y in pairs]
                if min(pooled) > -math.inf and float(np.mean(pooled)) >= LEAST_SCORE:
                    scores[i, j] = float(np.mean(pooled)) - PLACE * abs(i / len(mine) - j / len(theirs))
        return [(theirs[j], mine[i]) for i, j in assign(scores, seed=self.seed)]

    def _singles(self, left_a: Sequence[str], left_b: Sequence[str]) -> dict[str, tuple[str, How]]:
        """B's tensors with A's, one by one, within groups of one size."""
        place_a, place_b = _places(left_a), _places(left_b)
        groups_a, groups_b = _by_size(self.a, left_a), _by_size(self.b, left_b)
        found: dict[str, tuple[str, How]] = {}
        for key, mine in groups_b.items():
            theirs = groups_a.get(key, [])
            if not theirs or len(mine) * len(theirs) > MOST_PAIRS:
                continue
            scores = np.full((len(mine), len(theirs)), -np.inf)
            hows: dict[tuple[int, int], How] = {}
            for i, y in enumerate(mine):
                for j, x in enumerate(theirs):
                    score, hows[i, j] = self.score(x, y)
                    if self.expected and len(mine) == len(theirs) == 1:
                        score += ONLY
                    if score >= LEAST_SCORE:
                        scores[i, j] = score - PLACE * abs(place_a[x] - place_b[y])
            for i, j in assign(scores, seed=self.seed):
                found[mine[i]] = theirs[j], hows[i, j]
        return found

    def score(self, name_a: str, name_b: str) -> tuple[float, How]:
        """How likely two left-over tensors correspond, and on what ground."""
        a, b = self.a, self.b
        if not orders(a.shape(name_a), b.shape(name_b)):
            return -math.inf, "structure"
        score = CLOSENESS * self.links.closeness(name_a, name_b) + LIKENESS * self.roles.likeness(name_a, name_b)
        told = self.links.one_layer(name_a, name_b)
        numbers_a, numbers_b = numbers(name_a), numbers(name_b)
        if numbers_a and numbers_b:
            score += NUMBERS if (numbers_a == numbers_b if told is None else told) else -NUMBERS
        if not self.expected and self.roles.clash(name_a, name_b):
            score -= CLASH
        if name_a == name_b and told is not False:
            return self._by_values(name_a, name_b, score + SAME, "name")
        return self._by_values(name_a, name_b, score, "structure")

    def _turned(self, name_a: str, name_b: str) -> tuple[Order, How | None, float]:
        """The order of A's axes under which values agree best, the plain one where they do not tell, with what they say
        under it and their correlation."""
        options = orders(self.a.shape(name_a), self.b.shape(name_b))
        if len(options) == 1 and not self.expected:
            return options[0], "structure", 0.0
        places = lattice(self.b.shape(name_b), 2048, 0)
        y = self.b.at(name_b, places)
        found: list[tuple[Order, How | None, float]] = []
        for order in options:
            x = self.a.at(name_a, moved(places, self.a.shape(name_a), order))
            found.append((order, *agreement(x, y, self.expected)))
        best = max(found, key=lambda f: f[2])
        return best if best[1] == "values" else next((f for f in found if f[1]), found[0])

    def _by_values(self, name_a: str, name_b: str, score: float, how: How) -> tuple[float, How]:
        """The score with what values say of the pair."""
        x, y = self.a.sample(name_a), self.b.sample(name_b)
        flat_x, flat_y = bool(np.ptp(x) == 0), bool(np.ptp(y) == 0)
        if flat_x and flat_y:
            return (score + (SAME if _odd(x[0]) else EQUAL), how) if x[0] == y[0] else (-math.inf, "structure")
        if flat_x != flat_y:
            return score - EQUAL, how
        if self.a.shape(name_a) == self.b.shape(name_b):
            told, r = agreement(x, y, self.expected)
        elif self.expected:
            _, told, r = self._turned(name_a, name_b)
        else:
            return score, how
        if told == "values":
            how = "values"
        elif told is None and self.expected:
            if how != "name":
                return -math.inf, "structure"
            score -= SAME
        if self.expected or told == "values":
            score += VALUE * max(r, 0.0)
        return score, how


def _odd(value: np.float32) -> bool:
    """Whether a number is too odd to stand in two places by chance: more than a few bits of mantissa.

    Examples
    --------
    >>> _odd(np.float32(1.0)), _odd(np.float32(-10000.0)), _odd(np.float32(4.605))
    (False, False, True)
    """
    mantissa = math.frexp(float(value))[0] * 1024
    return math.isfinite(mantissa) and mantissa != round(mantissa)


def _grouped(names: Sequence[str]) -> list[list[str]]:
    """Families of names, the members of each in the order of their numbers."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[skeleton(name)].append(name)
    return [sorted(g, key=numbers) for g in groups.values()]


def _by_size(values: Values, names: Sequence[str]) -> Mapping[int, list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name in names:
        groups[values.size(name)].append(name)
    return groups


def _places(names: Sequence[str]) -> dict[str, float]:
    """Place of each name in the given order, 0 to 1."""
    return {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}
