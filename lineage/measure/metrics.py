"""Figures of a tensor pair from its sums; sums of blocks, tensors, shards and machines merge.

Kernels produce sums (`SUMS`, in that order); here they become the figures of `lineage diff`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["FIGURES", "MERGED", "SUMS", "Metrics", "Order", "empty_sums", "figures", "merge"]

#: what a kernel sums over the elements that are finite on both sides (a, b values; d = b - a). The counts
#: `nan_a`, `nan_b` (NaN and infinities) and `other` (non-finite pairs that differ) are over all elements.
SUMS = (
    "n", "a", "b", "aa", "bb", "ab", "abs_d", "dd", "abs_a", "rel", "rel_n",
    "zero_a", "zero_b", "changed", "nan_a", "nan_b", "other", "max_d", "max_rel",
)  # fmt: skip
AT = {name: at for at, name in enumerate(SUMS)}
#: the last two are maxima, all others add up
_ADDED = len(SUMS) - 2
#: relative variance below which a tensor counts as constant: its true variance drowns in the rounding of Σa²
CONSTANT = 1e-13


class Order(msgspec.Struct, frozen=True):
    """Figures that need ranks: Spearman's correlation and quantiles of |d|, None where undefined."""

    spearman: float | None = None
    quantiles: tuple[float | None, ...] = (None,) * 5


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one tensor pair; None where a figure is not defined, never NaN.

    Attributes
    ----------
    cosine, pearson, spearman : -1 to 1
    l2, l1, max_abs, mean_abs : of d = b - a
    rel_l2 : l2 over the norm of a
    max_rel, mean_rel : |d| / |a| where |a| is a normal number of a's dtype
    norm_ratio, mean_ratio, std_ratio : b's over a's
    q01 … q99 : quantiles of |d|, interpolated linearly
    zero_a, zero_b, changed : shares, 0 to 1
    nan_a, nan_b : counts of NaN and infinities; every other figure is over elements finite on both sides
    """

    cosine: float | None = None
    pearson: float | None = None
    spearman: float | None = None
    l2: float | None = None
    l1: float | None = None
    rel_l2: float | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    max_rel: float | None = None
    mean_rel: float | None = None
    norm_ratio: float | None = None
    mean_ratio: float | None = None
    std_ratio: float | None = None
    q01: float | None = None
    q05: float | None = None
    q50: float | None = None
    q95: float | None = None
    q99: float | None = None
    zero_a: float | None = None
    zero_b: float | None = None
    changed: float | None = None
    nan_a: int = 0
    nan_b: int = 0


FIGURES: tuple[str, ...] = Metrics.__struct_fields__
#: figures that follow from sums alone, so that they also exist for groups, layers and whole checkpoints
MERGED = tuple(f for f in FIGURES if f != "spearman" and not f.startswith("q"))


def empty_sums() -> NDArray[np.float64]:
    """The sums of no element at all."""
    return np.zeros(len(SUMS))


def merge(parts: Iterable[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Sums of all parts together; correctly rounded, so neither order nor grouping of equal parts matters.

    Examples
    --------
    >>> float(merge([np.ones(19), np.ones(19)])[0])
    2.0
    """
    rows = [part.tolist() for part in parts]
    if len(rows) == 1:
        return np.array(rows[0])
    out = empty_sums()
    for at, column in enumerate(zip(*rows, strict=True)):
        out[at] = _total(column) if at < _ADDED else max(column)
    return out


def _total(values: tuple[float, ...]) -> float:
    """Correctly rounded sum; infinite or NaN where the values are too large for float64."""
    try:
        return math.fsum(values)
    except (OverflowError, ValueError):
        return math.inf


def figures(sums: NDArray[np.float64], order: Order | None = None) -> Metrics:
    """The figures that follow from the sums, with ranks and quantiles from `order`.

    Notes
    -----
    Where no value differs, cosine and Pearson are exactly 1. `rel_l2` comes from Σd² itself, never from a
    difference of large sums, so that it obeys rel_l2² = 1 + r² - 2·r·cosine with r = norm_ratio.
    """
    s = dict(zip(SUMS, sums.tolist(), strict=True))
    order = order or Order()
    n, same = s["n"], s["changed"] == 0
    nan_a, nan_b = int(s["nan_a"]), int(s["nan_b"])
    if not n:
        return Metrics(nan_a=nan_a, nan_b=nan_b)
    var_a, var_b = _variance(n, s["a"], s["aa"]), _variance(n, s["b"], s["bb"])
    norm_a, norm_b = math.sqrt(s["aa"]), math.sqrt(s["bb"])
    q01, q05, q50, q95, q99 = order.quantiles
    return Metrics(
        cosine=_correlation(s["ab"], s["aa"], s["bb"], same),
        pearson=_correlation(s["ab"] - s["a"] * (s["b"] / n), var_a, var_b, same),
        spearman=order.spearman,
        l2=_finite(math.sqrt(s["dd"])),
        l1=_finite(s["abs_d"]),
        rel_l2=_ratio(math.sqrt(s["dd"]), norm_a),
        max_abs=_finite(s["max_d"]),
        mean_abs=_finite(s["abs_d"] / n),
        max_rel=_finite(s["max_rel"]) if s["rel_n"] else None,
        mean_rel=_ratio(s["rel"], s["rel_n"]),
        norm_ratio=_ratio(norm_b, norm_a),
        mean_ratio=_ratio(s["b"], s["a"]),
        std_ratio=_ratio(math.sqrt(var_b), math.sqrt(var_a)),
        q01=q01, q05=q05, q50=q50, q95=q95, q99=q99,
        zero_a=s["zero_a"] / n, zero_b=s["zero_b"] / n, changed=s["changed"] / n,
        nan_a=nan_a, nan_b=nan_b,
    )  # fmt: skip


def _variance(n: float, total: float, squares: float) -> float:
    """n times the variance; exactly zero for what is constant up to rounding."""
    left = squares - total * (total / n)
    return left if left > CONSTANT * squares else 0.0


def _correlation(cross: float, one: float, two: float, same: bool) -> float | None:
    """cross / √(one·two) within [-1, 1], 1.0 where no value differs, None where a side is zero."""
    if not one > 0 or not two > 0 or not math.isfinite(one) or not math.isfinite(two):
        return None
    if same:
        return 1.0
    product = one * two
    scale = math.sqrt(product) if 0 < product < math.inf else math.sqrt(one) * math.sqrt(two)
    return _finite(max(-1.0, min(1.0, cross / scale))) if scale and math.isfinite(cross) else None


def _ratio(over: float, under: float) -> float | None:
    """over / under, None where that is no finite number."""
    return _finite(over / under) if under and math.isfinite(under) else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
