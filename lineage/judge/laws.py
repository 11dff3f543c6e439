"""Exact null distributions of unit tests, in log10, so that p may reach 1e-100000 and beyond.

Null hypothesis everywhere: the labels of A's units were dealt at random (hidden units carry no meaning in their
index), whatever the weights are. What is matched to what, and which axes are exchangeable, is decided elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "corrected",
    "log10_fixed_points",
    "log10_fixed_points_in_equal_groups",
    "log10_fixed_points_in_groups",
    "log10_fixed_points_in_parts",
    "log10_fixed_points_together",
    "log10_order_kept",
    "log10_orders_kept_together",
    "longest_increasing",
]

Floats = NDArray[np.floating[Any]]

LN10 = math.log(10.0)
#: multiplications that an exact convolution of blocks may cost (about 0.2 s); above, an upper bound is given
EXACT_WORK = 2e8
#: terms of each law that such a bound keeps: more fixed points than this in one block have chance 1e-216
CUT = 128
#: an exponential tilt beyond this changes nothing: e^80 is above the square of any number of units
STEEPEST = 80.0


def log10_fixed_points(units: int, agreed: int, places: int | None = None) -> float:
    """Chance that a random assignment of `units` gives `agreed` or more of them their own label.

    Parameters
    ----------
    units : matched pairs, 1 or more
    agreed : pairs whose two labels are equal, 0 to `units`
    places : labels in all, `units` or more; None: as many as units

    Returns
    -------
    log10 of the exact probability, never above 0.0 ("no evidence"); -inf for what cannot happen

    Notes
    -----
    Null: labels drawn without replacement from `places`. Source: rencontres numbers (de Montmort, 1713); with more
    places than units by inclusion-exclusion from E[C(F, k)] = C(units, k)·(places - k)!/places!.

    Examples
    --------
    >>> round(log10_fixed_points(4096, 40), 2)
    -48.34
    >>> round(10 ** log10_fixed_points(3, 1), 6), log10_fixed_points(3, 0)
    (0.666667, 0.0)
    """
    return log10_fixed_points_together([(units, units if places is None else places)], agreed)


def log10_fixed_points_together(blocks: Sequence[tuple[int, int]], agreed: int) -> float:
    """Chance that independent blocks of (units, places) have `agreed` or more fixed points together.

    Returns
    -------
    log10 of the probability: exact by convolution of the blocks' laws; where that costs too much, an upper bound
    (E[C(F, agreed)], or the convolution of the laws' first terms plus what they leave out)

    Notes
    -----
    Null: the blocks' labels are dealt independently of each other.

    Examples
    --------
    >>> both = log10_fixed_points_together([(160, 160), (160, 160)], 320)
    >>> math.isclose(both, 2 * log10_fixed_points(160, 160))
    True
    """
    blocks = [_checked(units, places) for units, places in blocks if units]
    total = sum(units for units, _ in blocks)
    if agreed <= 0:
        return 0.0
    if agreed > total:
        return -math.inf
    known = {block: _log_fixed_points(*block) for block in set(blocks)}
    laws = [known[block] for block in blocks]
    if _work([units for units, _ in blocks]) <= EXACT_WORK:
        return min(0.0, _tail(laws, agreed) / LN10)
    # every factorial moment of a block is at most that of Poisson(1): E[C(ΣF, k)] <= L^k / k!
    moment = agreed * math.log(len(blocks)) - math.lgamma(agreed + 1)
    return min(0.0, moment / LN10, _cut_tail(known, laws, agreed) / LN10)


def log10_fixed_points_in_groups(agreed: int) -> float:
    """Bound on the chance of `agreed` fixed points where units stand in groups of unknown size.

    Returns
    -------
    log10 of Bell(agreed)/agreed!, capped at 0.0

    Notes
    -----
    Null: groups are dealt at random and so are units inside each group (channels under a group normalisation,
    grouped convolutions). For G groups of s units, E[C(F, k)] <= Σ_t 1/t!·[x^k](Σ_{1<=j<=s} x^j/j!)^t
    <= [x^k] exp(e^x - 1) = Bell(k)/k!, whatever G and s are, for any matching. Bell(k) < (0.792·k/ln(k + 1))^k:
    Berend and Tassa, Improved bounds on Bell numbers (2010), theorem 2.1.

    Examples
    --------
    >>> round(log10_fixed_points_in_groups(48), 1)
    -13.6
    """
    if agreed <= 0:
        return 0.0
    bell = agreed * math.log(0.792 * agreed / math.log(agreed + 1))
    return min(0.0, (bell - math.lgamma(agreed + 1)) / LN10)


def log10_fixed_points_in_equal_groups(units: Sequence[int], agreed: int) -> float:
    """Bound on the chance of `agreed` fixed points in independent blocks whose units may stand in equal groups.

    Parameters
    ----------
    units : labels of each block, 1 or more
    agreed : units at their own label in all blocks together

    Returns
    -------
    log10 of the bound, the greatest over all sizes of groups; never above 0.0

    Notes
    -----
    Null: in every block G groups of s units are dealt at random, and units inside each group (experts that are routed
    by groups); G = 1 is a random permutation. A matching may respect the groups, so the law of a permutation would
    accuse. E[C(F, k)] <= Σ_{t<=G} 1/t!·[x^k](Σ_{1<=j<=s} x^j/j!)^t in each block, blocks are convolved, and Markov's
    inequality gives the tail.

    Examples
    --------
    >>> round(log10_fixed_points_in_equal_groups([8], 8), 4), round(math.log10(1 / (math.factorial(4) * 2**4)), 4)
    (-2.5843, -2.5843)
    """
    if agreed <= 0:
        return 0.0
    if agreed > sum(units):
        return -math.inf
    # one fraction of the units in all blocks: a network groups its experts alike in every layer
    splits = {n for length in units for n in range(1, length + 1) if length % n == 0}
    bounds = [_coefficient([_log_grouped(n, math.gcd(n, groups)) for n in units], agreed) for groups in splits]
    return min(0.0, max(bounds) / LN10)


def log10_fixed_points_in_parts(agreed: int, parts: int) -> float:
    """Bound on the chance of `agreed` fixed points where units may be of so many kinds, all dealt by one permutation.

    Returns
    -------
    log10 of parts / ceil(agreed / parts)!, capped at 0.0

    Notes
    -----
    Null: a random permutation, or one for each kind of units, however these depend on each other (rows of a recurrent
    layer's gates, of which nobody says whether they stand gate by gate or unit by unit). One of the kinds must have
    its share of the fixed points, and P(F >= k) <= E[C(F, k)] <= 1/k! for each.

    Examples
    --------
    >>> round(log10_fixed_points_in_parts(88, 4), 2), log10_fixed_points_in_parts(4, 4)
    (-20.45, 0.0)
    """
    if agreed <= 0:
        return 0.0
    return min(0.0, (math.log(parts) - math.lgamma(math.ceil(agreed / parts) + 1)) / LN10)


def log10_order_kept(units: int, kept: int) -> float:
    """Bound on the chance that `kept` of `units` randomly placed units stand in increasing order.

    Returns
    -------
    log10 of C(units, kept)/kept!, the expected number of increasing subsequences of that length, capped at 0.0

    Notes
    -----
    Null: a random injection into any number of places, so it also holds for units that were pruned or inserted.

    Examples
    --------
    >>> round(log10_order_kept(120, 120), 2)
    -198.83
    """
    return log10_orders_kept_together([units], kept)


def log10_orders_kept_together(units: Sequence[int], kept: int) -> float:
    """Bound on the chance that independent blocks have increasing subsequences of `kept` units together.

    Notes
    -----
    Markov's inequality on the number of ways to choose such subsequences in all blocks at once.
    """
    units = [n for n in units if n]
    if kept <= 0:
        return 0.0
    if kept > sum(units):
        return -math.inf
    if _work(units) <= EXACT_WORK:
        return min(0.0, _coefficient([_log_increasing(n) for n in units], kept) / LN10)
    # C(n, k)/k! summed over all splits of k is at most C(Σn, k)·L^k/k!
    total = sum(units)
    chosen = math.lgamma(total + 1) - math.lgamma(kept + 1) - math.lgamma(total - kept + 1)
    return min(0.0, (chosen + kept * math.log(len(units)) - math.lgamma(kept + 1)) / LN10)


def corrected(log10_p: float, log10_tries: float) -> float:
    """A p-value after Bonferroni's correction for 10**`log10_tries` tests of which the best one is reported.

    Examples
    --------
    >>> corrected(-8.0, 2.0), corrected(-1.0, 2.0)
    (-6.0, 0.0)
    """
    return min(0.0, log10_p + max(0.0, log10_tries))


def longest_increasing(order: Sequence[int] | NDArray[np.integer[Any]]) -> int:
    """Length of the longest strictly increasing subsequence (patience sorting).

    Examples
    --------
    >>> longest_increasing([3, 0, 1, 7, 2])
    3
    """
    from bisect import bisect_left

    piles: list[int] = []
    for value in order:
        at = bisect_left(piles, value)
        piles[at : at + 1] = [int(value)]
    return len(piles)


def _checked(units: int, places: int) -> tuple[int, int]:
    if not 0 < units <= places:
        raise ValueError(f"{units} units have no distinct labels among {places}")
    return units, places


def _work(units: Sequence[int]) -> float:
    """Multiplications of convolving polynomials of these degrees one after the other."""
    work, degree = 0.0, 0
    for n in sorted(units):
        work, degree = work + float(degree + 1) * (n + 1) * (degree > 0), degree + n
    return work


def _log_factorials(n: int) -> Floats:
    """ln k! for k = 0 … n, summed in extended precision."""
    steps = np.log(np.arange(1, n + 1, dtype=np.longdouble))
    return np.concatenate([[0.0], np.cumsum(steps)]).astype(np.float64)


def _log_fixed_points(units: int, places: int) -> Floats:
    """ln P(F = k) for k = 0 … units."""
    logs = _log_factorials(places)
    k = np.arange(units + 1)
    chosen = logs[units] - logs[k] - logs[units - k]
    with np.errstate(divide="ignore"):
        result: Floats = chosen + logs[places - k] - logs[places] + np.log(_none_fixed(units - k, places - k))
    return result


def _none_fixed(units: NDArray[Any], places: NDArray[Any]) -> Floats:
    """P(no fixed point) of injections of `units` into `places`, elementwise; Σ (-1)^j C(u, j)·(m - j)!/m!."""
    term = np.ones(len(units))
    total = term.copy()
    for j in range(25):  # terms are at most 1/j!: the 25th is below 1e-25
        term = term * -(units - j) / ((j + 1) * np.maximum(places - j, 1))
        total += term
    # one unit in one place is always at home; elsewhere the sum is far from 0
    total[(units == 1) & (places == 1)] = 0.0
    return np.maximum(total, 0.0)


@lru_cache(256)
def _log_increasing(n: int) -> Floats:
    """ln of the expected number of increasing subsequences of length k = 0 … n among n shuffled units."""
    logs = _log_factorials(n)
    result: Floats = logs[n] - 2 * logs - logs[::-1]
    return result


@lru_cache(256)
def _log_grouped(units: int, groups: int) -> Floats:
    """ln of the greatest E[C(F, k)] for k = 0 … units, where so many equal groups and their units are dealt."""
    size = units // groups
    logs = _log_factorials(max(units, groups))
    one = np.full(units + 1, -np.inf)
    one[1 : size + 1] = -logs[1 : size + 1]
    power, total = np.full(units + 1, -np.inf), np.full(units + 1, -np.inf)
    power[0] = total[0] = 0.0
    for t in range(1, groups + 1):
        terms = [power[: units + 1 - j] + one[j] for j in range(1, size + 1)]
        power = np.logaddexp.reduce([np.concatenate([np.full(units + 1 - len(x), -np.inf), x]) for x in terms])
        total = np.logaddexp(total, power - logs[t])
    return total


def _tail(laws: Sequence[Floats], k: int) -> float:
    """ln P(sum >= k) of independent laws, each given by ln P(value = 0, 1, …)."""
    product, tilt, scale = _tilted_product(laws, k)
    terms = np.arange(len(product) - k)
    return scale - tilt * k + math.log(math.fsum(product[k:] * np.exp(-tilt * terms)))


def _cut_tail(known: Mapping[tuple[int, int], Floats], laws: Sequence[Floats], k: int) -> float:
    """Upper bound of ln P(sum >= k) from the first `CUT` terms of each law and the chance that any passes them."""
    cut = {id(law): law[:CUT] for law in known.values()}
    rest = -math.lgamma(CUT + 1) + math.log(len(laws))  # P(F >= c) <= E[C(F, c)] <= 1/c!
    short = [cut[id(law)] for law in laws]
    if k > sum(len(law) - 1 for law in short):
        return rest
    return float(np.logaddexp(_tail(short, k), rest))


def _coefficient(laws: Sequence[Floats], k: int) -> float:
    """ln of the coefficient of t^k in the product of polynomials, each given by ln of its coefficients."""
    product, tilt, scale = _tilted_product(laws, k)
    return scale - tilt * k + math.log(product[k])


def _tilted_product(laws: Sequence[Floats], k: int) -> tuple[Floats, float, float]:
    """Product of polynomials in e^tilt·t, scaled to sum 1, with tilt and ln of the scale.

    The tilt moves the weight to t^k, so that nothing that counts for t^k underflows; all terms are positive, so
    the relative error stays near the rounding of the logarithms.
    """
    tilt = _tilt(laws, k)
    product, scale = np.ones(1), 0.0
    for law in sorted(laws, key=len):
        moved = law + tilt * np.arange(len(law))
        top = float(np.max(moved))
        weights = np.exp(moved - top)
        scale += top + math.log(weights.sum())
        product = np.convolve(product, weights / weights.sum())
    return product, tilt, scale


def _tilt(laws: Sequence[Floats], k: int) -> float:
    """The tilt that moves the mean of the sum to k, found by bisection; never negative."""
    if _mean(laws, 0.0) >= k:
        return 0.0
    low, high = 0.0, STEEPEST
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _mean(laws, middle) < k else (low, middle)
    return high


def _mean(laws: Sequence[Floats], tilt: float) -> float:
    total = 0.0
    known: dict[int, float] = {}
    for law in laws:
        if id(law) not in known:
            steps = np.arange(len(law))
            moved = law + tilt * steps
            weights = np.exp(moved - np.max(moved))
            known[id(law)] = float((weights * steps).sum() / weights.sum())
        total += known[id(law)]
    return total
