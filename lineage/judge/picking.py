"""Was B merged value by value: each one the base's, or with the change of one candidate, or of several, added to it?

TIES merging (Yadav et al., NeurIPS 2023) keeps the largest changes of each parent and averages those of one sign, DARE
(Yu et al., ICML 2024) keeps a random part of them, scaled up. No weight that holds for all values explains either; but
where one parent alone was kept, B's change is its change times one factor, which stands out among all ratios.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Picked", "pick"]

Floats = NDArray[np.floating[Any]]

#: candidates up to which all combinations are tried
MOST = 5
#: a value tells something where what was added would be so many times its rounding
CLEAR = 6.0
#: values that must tell something
FEWEST = 512
#: share of them that a combination of the candidates must explain, and that it may explain where B's values are dealt
#: to other places. TIES and DARE of fine-tunes 0.99 to 1, of bf16 too; fine-tunes and linear merges below 0.1
EXPLAINED, CHANCE = 0.9, 0.4
#: share of the values explained that one candidate alone must explain, for two candidates at least
OWN = 0.02
#: factors that are looked at, and the width of a step between them
FACTORS, STEP = (0.05, 20.0), 0.01


class Picked(msgspec.Struct, frozen=True, kw_only=True):
    """B as the base with changes of candidates added value by value.

    Attributes
    ----------
    factors : of the change of each candidate, 0.0 for one that takes no part
    averaged : where several were kept their mean was added, not their sum
    kept : share of the values that are not the base's
    explained : share of the values that this explains, of those that tell something
    """

    factors: tuple[float, ...]
    averaged: bool
    kept: float
    explained: float


def pick(changes: Floats, change: Floats, rounding: Floats, *, seed: int = 0) -> Picked | None:
    """How B's change is picked from those of the candidates; None where it is not.

    Parameters
    ----------
    changes : of the candidates, shape (candidates, values)
    change : of B, shape (values,)
    rounding : greatest error of each value of `change`
    seed : of the dealing that shows what chance explains

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((2, 4000))
    >>> b = (2.0 * x * (rng.random(x.shape) < 0.5)).sum(axis=0)
    >>> found = pick(x, b, np.full(4000, 1e-6))
    >>> found.factors, found.averaged, found.kept > 0.7
    ((2.0, 2.0), False, True)
    >>> pick(x, rng.standard_normal(4000), np.full(4000, 1e-6)) is None
    True
    """
    if not 2 <= len(changes) <= MOST:
        return None
    factors = [_factor(one, change, rounding) for one in changes]
    parts = [k for k, factor in enumerate(factors) if factor]
    if len(parts) < 2:
        return None
    added = np.array([factors[k] for k in parts])[:, None] * changes[parts]
    clear = (np.abs(added) > CLEAR * rounding).all(axis=0)
    if clear.sum() < FEWEST:
        return None
    added, wanted, error = added[:, clear], change[clear], rounding[clear]
    dealt = np.random.default_rng(seed).permutation(len(wanted))
    best: Picked | None = None
    for averaged in (True, False):
        alone, left, explained = _explained(added, wanted, error, averaged=averaged)
        by_chance = _explained(added, wanted[dealt], error, averaged=averaged)[2]
        own = sum(share >= OWN for share in alone)
        if explained >= EXPLAINED and by_chance <= CHANCE and own >= 2 and (not best or explained > best.explained):
            used = tuple(round(f, 4) if k in parts else 0.0 for k, f in enumerate(factors))
            best = Picked(factors=used, averaged=averaged, kept=1.0 - left, explained=explained)
    return best


def _factor(one: Floats, change: Floats, rounding: Floats) -> float:
    """The factor that most values of B's change are of the candidate's; 0.0 where none stands out."""
    clear = (np.abs(one) > CLEAR * rounding) & (np.abs(change) > CLEAR * rounding)
    ratios = change[clear] / one[clear]
    inside = (ratios > FACTORS[0]) & (ratios < FACTORS[1])
    if inside.sum() < FEWEST // 8:
        return 0.0
    places = np.floor(np.log(ratios[inside]) / STEP).astype(np.int64)
    first = int(places.min())
    counts = np.bincount(places - first)
    at = int(np.argmax(counts + np.append(counts[1:], 0)))  # the factor may stand on the edge of two
    low, high = np.exp((first + at) * STEP), np.exp((first + at + 2) * STEP)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = change / one
    near = clear & (ratio >= low) & (ratio <= high)
    weights = (one[near] / rounding[near]) ** 2  # the less a value is rounded the better it tells
    order = np.argsort(ratio[near])
    middle = np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2)
    return float(ratio[near][order][min(middle, len(order) - 1)]) if near.any() else 0.0


def _explained(added: Floats, wanted: Floats, error: Floats, *, averaged: bool) -> tuple[list[float], float, float]:
    """Shares of the values that each candidate alone explains, that nothing was added to, and that are explained."""
    kept = np.abs(wanted) > error
    found = np.zeros(len(wanted), bool)
    alone = []
    for some in _combinations(len(added)):
        total = added[list(some)].mean(axis=0) if averaged else added[list(some)].sum(axis=0)
        hit = kept & (np.abs(wanted - total) <= error + 1e-3 * np.abs(total))
        if len(some) == 1:
            alone.append(float(hit.mean()))
        found |= hit
    return alone, float(1.0 - kept.mean()), float(np.mean(found[kept])) if kept.any() else 0.0


def _combinations(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, count + 1):
        yield from combinations(range(count), size)
