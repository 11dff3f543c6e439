"""The kernel in plain NumPy: what every other kernel must agree with, and the one that always works."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE, decode, encode
from lineage.measure.metrics import AT, Order, empty_sums

__all__ = ["PlainKernel", "finite_pairs", "interpolate", "positions"]

#: dtypes whose differences need float64; those of all others fit float32 up to its rounding
_WIDE = {"F64", "I64", "I32", "U64", "U32"}
_WHOLE = {word for word in STORAGE if word[0] in "IU" or word == "BOOL"}


class PlainKernel:
    """Sums and order statistics of code blocks with NumPy; every dtype of `STORAGE`."""

    name = "numpy"
    words = frozenset(STORAGE)

    def sums(self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, *, tiny: float) -> NDArray[np.float64]:
        """Sums over one block; see `Kernel.sums`."""
        out = empty_sums()
        x, y = (decode(codes, word).astype(np.float64) for codes, word in ((a, word_a), (b, word_b)))
        differs = a != b if word_a == word_b and word_a in _WHOLE else x != y
        good_a, good_b = np.isfinite(x), np.isfinite(y)
        good = good_a & good_b
        if not good.all():
            out[AT["nan_a"]] = np.count_nonzero(~good_a)
            out[AT["nan_b"]] = np.count_nonzero(~good_b)
            out[AT["other"]] = np.count_nonzero(_unlike(a, b, x, y, word_a == word_b) & ~good)
            x, y, differs = x[good], y[good], differs[good]
        if not len(x):
            return out
        with np.errstate(over="ignore", invalid="ignore"):
            _add_up(out, x, y, differs, tiny)
        return out

    def order(
        self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, probabilities: Sequence[float]
    ) -> Order:
        """Ranks and quantiles over all given elements; see `Kernel.order`."""
        if not len(a):
            return Order(None, (None,) * len(probabilities))
        x, y = decode(a, word_a), decode(b, word_b)
        wide = np.float64 if {word_a, word_b} & _WIDE else np.float32
        with np.errstate(over="ignore"):
            size = np.abs(y.astype(wide) - x.astype(wide))
        below, above, share = positions(len(size), probabilities)
        size.partition(np.unique(np.concatenate([below, above])))
        return Order(_spearman(x, y), interpolate(size[below], size[above], share))

    def equal_when_rounded(self, fine: NDArray[Any], coarse: NDArray[Any], word: str) -> bool:
        """True where rounding the values `fine` to the dtype `word` gives the codes `coarse`."""
        got, want = decode(encode(fine, word), word), decode(coarse, word)
        return bool(np.array_equal(got, want, equal_nan=True))

    def copy_runs(self, codes: NDArray[Any], starts: NDArray[np.int64], run: int, out: NDArray[Any]) -> None:
        """Copies runs one behind the other; see `Kernel.copy_runs`."""
        out.reshape(-1, run)[:] = np.lib.stride_tricks.sliding_window_view(codes, run)[starts]


def _add_up(out: NDArray[np.float64], x: NDArray[Any], y: NDArray[Any], differs: NDArray[Any], tiny: float) -> None:
    """Fills the sums over finite values."""
    size = np.abs(y - x)
    magnitude = np.abs(x)
    normal = magnitude >= tiny
    out[AT["n"]] = len(x)
    out[AT["a"]], out[AT["b"]], out[AT["abs_a"]] = x.sum(), y.sum(), magnitude.sum()
    # not dot: all three must add in one order, so that equal inputs give equal sums
    out[AT["aa"]], out[AT["bb"]], out[AT["ab"]] = (x * x).sum(), (y * y).sum(), (x * y).sum()
    out[AT["abs_d"]], out[AT["dd"]], out[AT["max_d"]] = size.sum(), (size * size).sum(), size.max()
    out[AT["zero_a"]], out[AT["zero_b"]] = np.count_nonzero(x == 0), np.count_nonzero(y == 0)
    out[AT["changed"]] = np.count_nonzero(differs)
    out[AT["rel_n"]] = np.count_nonzero(normal)
    if out[AT["rel_n"]]:
        relative = size[normal] / magnitude[normal]
        out[AT["rel"]], out[AT["max_rel"]] = relative.sum(), relative.max()


def _unlike(a: NDArray[Any], b: NDArray[Any], x: NDArray[Any], y: NDArray[Any], one_dtype: bool) -> NDArray[np.bool_]:
    """Where two elements differ, NaN with the same bits being alike (any NaN where the dtypes differ)."""
    if one_dtype:
        bits = f"u{a.dtype.itemsize}"
        alike = a.view(bits) == b.view(bits)
    else:
        alike = np.isnan(x) & np.isnan(y)
    return np.asarray((x != y) & ~alike)


def finite_pairs(a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The codes of the pairs that are finite on both sides."""
    good = np.isfinite(decode(a, word_a)) & np.isfinite(decode(b, word_b))
    return (a, b) if good.all() else (a[good], b[good])


def positions(n: int, probabilities: Sequence[float]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
    """Order statistics that the quantiles of n values lie between: below, above, and the share of the way."""
    place = np.asarray(probabilities, np.float64) * (n - 1)
    below = np.floor(place).astype(np.int64)
    return below, np.minimum(below + 1, n - 1), place - below


def interpolate(below: NDArray[Any], above: NDArray[Any], share: NDArray[Any]) -> tuple[float | None, ...]:
    """Quantiles between neighbouring order statistics, None where they are infinite."""
    low, high = below.astype(np.float64), above.astype(np.float64)
    with np.errstate(invalid="ignore"):
        values = low + (high - low) * share
    return tuple(v if np.isfinite(v) else None for v in values.tolist())


def _spearman(x: NDArray[Any], y: NDArray[Any]) -> float | None:
    """Correlation of average ranks, None where a side is constant."""
    one, two = _ranks(x), _ranks(y)
    scale = float(np.sqrt(np.sum(one * one) * np.sum(two * two)))
    return max(-1.0, min(1.0, float(np.sum(one * two)) / scale)) if scale else None


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Average ranks, shifted to mean zero, so that sums of products stay exact for longer."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - counts + (counts - 1) / 2 - (len(values) - 1) / 2
    return np.asarray(middle[inverse.reshape(-1)])
