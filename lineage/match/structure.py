"""What values cannot tell: all-ones gains, zero biases, weights that were trained anew.

Neighbours already matched say most: a tensor's parents, grandparents, … have images on the other side, seen from the
links found so far. Then shape, name tokens, and place among the tensors left over. All of this is a guess with a
score, assigned one to one (Hungarian), and never called certified.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lineage.layout.induce import Match
from lineage.layout.mapping import How
from lineage.match.chains import Names, reordered
from lineage.match.values import Values, agreement
from lineage.match.whole import orders

__all__ = ["Links", "Roles", "ancestors", "by_structure", "leaf", "load_order", "load_roles", "stem", "tokens"]

_SEPARATOR = re.compile(r"[./_\s\[\]'-]+")


def stem(name: str) -> str:
    """The name without its last word: what a weight and its bias share.

    Examples
    --------
    >>> stem("layers.0.attn.in_proj_bias"), stem("mlp/wi_0/kernel")
    ('layers.0.attn.in_proj', 'mlp/wi_0')
    """
    cut = max(name.rfind(c) for c in "./_")
    return name[:cut] if cut > 0 else ""


def leaf(name: str) -> str:
    """The last word of a name."""
    cut = max(name.rfind(c) for c in "./_")
    return name[cut + 1 :]


def ancestors(name: str) -> list[str]:
    """All stems of a name, the nearest first, the empty one last."""
    found = []
    while name:
        name = stem(name)
        found.append(name)
    return found


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


@lru_cache(1 << 16)
def _near(name: str) -> tuple[str, ...]:
    """Ancestors that say something, at most eight."""
    return tuple(a for a in ancestors(name) if a)[:8]


@lru_cache(1 << 16)
def tokens(name: str) -> tuple[str, ...]:
    """Words of a name, lower case, numbers left out."""
    return tuple(t for t in _SEPARATOR.split(name.lower()) if t and not t.isdigit())


@lru_cache(1 << 16)
def _words(name: str) -> frozenset[str]:
    """Tokens, path components, and neighbouring tokens joined: what a table of roles may list."""
    parts = [p for p in re.split(r"[./\s]+", name.lower()) if p and not p.isdigit()]
    stripped = [re.sub(r"_?\d+$", "", p) for p in parts]
    return frozenset(parts) | frozenset(stripped) | frozenset(tokens(name))


class Roles:
    """Roles by word, from `mappings/names`."""

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.by_word: dict[str, set[str]] = defaultdict(set)
        for role, words in table.items():
            for word in words:
                self.by_word[word].add(role)

    def of(self, name: str) -> frozenset[str]:
        """Roles that words of a name may have."""
        return frozenset(r for w in _words(name) for r in self.by_word.get(w, ()))

    def likeness(self, a: str, b: str) -> float:
        """0 to 1: shared roles and shared words of two names."""
        if a == b:
            return 1.0
        roles_a, roles_b = self.of(a), self.of(b)
        words_a, words_b = set(tokens(a)), set(tokens(b))
        role = len(roles_a & roles_b) / max(1, len(roles_a | roles_b))
        word = len(words_a & words_b) / max(1, len(words_a | words_b))
        return 0.65 * role + 0.35 * word


def numbers(name: str) -> tuple[int, ...]:
    """Integers that are words of a name."""
    return tuple(int(t) for t in _SEPARATOR.split(name) if t.isdigit())


def assign(scores: NDArray[np.float64], *, seed: int) -> list[tuple[int, int]]:
    """Row-column pairs of the best one-to-one assignment, ties broken by a seeded shuffle.

    Pairs that scored -inf are left out.
    """
    from scipy.optimize import linear_sum_assignment

    if not scores.size:
        return []
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(scores.shape[0]), rng.permutation(scores.shape[1])
    mixed = scores[np.ix_(rows, columns)]
    finite = np.isfinite(mixed)
    low = (mixed[finite].min() if finite.any() else 0.0) - 1e6
    i, j = linear_sum_assignment(np.where(finite, mixed, low), maximize=True)
    return [(int(rows[x]), int(columns[y])) for x, y in zip(i, j, strict=True) if finite[x, y]]


def places(names: Sequence[str]) -> dict[str, float]:
    """Place of each name in the given order, 0 to 1."""
    return {name: i / max(1, len(names) - 1) for i, name in enumerate(names)}


def load_roles() -> Roles:
    """The roles that ship in `mappings/names`."""
    import yaml

    from lineage.data import mapping_file

    return Roles(yaml.safe_load(mapping_file("names/roles.yaml").read_text(encoding="utf-8")))


def load_order() -> list[str]:
    """Roles in the order in which fused tensors hold them."""
    import yaml

    from lineage.data import mapping_file

    return list(yaml.safe_load(mapping_file("names/order.yaml").read_text(encoding="utf-8")))


#: score that a pair needs: close neighbours, or names that share most of their words
LEAST_SCORE = 0.35
CLOSENESS, LIKENESS, VALUE, SAME, EQUAL, PLACE, NUMBERS = 1.0, 0.8, 1.5, 1.0, 0.3, 0.1, 0.3


def by_structure(
    a: Values,
    b: Values,
    left_a: Sequence[str],
    left_b: Sequence[str],
    links: Links,
    roles: Roles,
    names: Names,
    *,
    expected: float,
    seed: int,
) -> list[Match]:
    """Matches among what is left, one group of interchangeable shapes at a time."""
    place_a, place_b = places(left_a), places(left_b)
    groups_a: dict[tuple[int, ...], list[str]] = defaultdict(list)
    groups_b: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name in left_a:
        groups_a[tuple(sorted(a.shape(name)))].append(name)
    for name in left_b:
        groups_b[tuple(sorted(b.shape(name)))].append(name)
    found: list[Match] = []
    for key, mine in groups_b.items():
        theirs = groups_a.get(key)
        if not theirs or len(mine) * len(theirs) > 4_000_000:
            continue
        scores = np.full((len(mine), len(theirs)), -np.inf)
        hows: dict[tuple[int, int], How] = {}
        for i, x in enumerate(mine):
            for j, y in enumerate(theirs):
                score, how = _score(a, b, y, x, links, roles, expected)
                if score >= LEAST_SCORE:
                    scores[i, j] = score - PLACE * abs(place_a[y] - place_b[x])
                    hows[i, j] = how
        for i, j in assign(scores, seed=seed):
            shape, target = a.shape(theirs[j]), b.shape(mine[i])
            order = next(iter(orders(shape, target)), None)
            if order is None:
                continue
            specs_a, specs_b = a.checkpoint.specs, b.checkpoint.specs
            ops = reordered(specs_a[theirs[j]].shape, order, specs_b[mine[i]].shape, names)
            found.append(Match(targets=(mine[i],), sources=(theirs[j],), ops=ops, how=hows[i, j]))
    return found


def _score(
    a: Values, b: Values, name_a: str, name_b: str, links: Links, roles: Roles, expected: float
) -> tuple[float, How]:
    """How likely two left-over tensors correspond, and on what ground."""
    if not orders(a.shape(name_a), b.shape(name_b)):
        return -math.inf, "structure"
    score = CLOSENESS * links.closeness(name_a, name_b) + LIKENESS * roles.likeness(name_a, name_b)
    numbers_a, numbers_b = numbers(name_a), numbers(name_b)
    if numbers_a and numbers_b:
        score += NUMBERS if numbers_a == numbers_b else -NUMBERS
    how: How = "structure"
    if name_a == name_b:
        score, how = score + SAME, "name"
    if a.shape(name_a) == b.shape(name_b):
        x, y = a.sample(name_a), b.sample(name_b)
        told, r = agreement(x, y, expected)
        flat_x, flat_y = bool(np.ptp(x) == 0), bool(np.ptp(y) == 0)
        if flat_x and flat_y:
            return (score + EQUAL, how) if x[0] == y[0] else (-math.inf, "")
        if flat_x != flat_y:
            score -= EQUAL
        elif told is None and expected and how != "name":
            return -math.inf, "structure"
        elif told is None and expected:
            score -= SAME
        score += VALUE * max(r, 0.0)
        if told == "values":
            how = "values"
    return score, how
