"""Strips of rows: a few neighbouring columns of every row of a tensor, read by ranges, and how alike those rows are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE, decode
from lineage.match.nearest import highest
from lineage.match.rows import Provenance, View, columns, contiguous, probe_rows, views
from lineage.match.values import SMALL, Values

__all__ = ["Frame", "correlation", "count_hits", "in_columns", "known_share", "read_strip", "row_width", "strip_views"]

#: neighbouring columns that stand for a row: two strangers' rows agree to 0.125, the best of 10^6 to 0.65
STRIP = 64
#: rows of each of A's tensors that are looked up, in runs of neighbours (one read serves a run that stands in columns)
PROBES, RUN = 32, 4
#: share of them that must be found before any counts
LEAST_HIT_SHARE = 0.05
#: other rows among which a hit may be chance: probes of a few hundred tensors
TRIED = 8192
#: correlation, and deviations above chance, below which values are no evidence
LEAST_COSINE, LEAST_Z = 0.3, 8.0


class Frame:
    """Rows of length one, freed of what their columns have in common.

    Attributes
    ----------
    rows : of the strip that it was made of
    """

    def __init__(self, strip: NDArray[np.float32]) -> None:
        clean = np.where(np.isfinite(strip), strip, 0)
        self.mean = clean.mean(axis=0)
        spread = clean.std(axis=0)
        self.spread = np.where(spread > 0, spread, np.inf)
        self.rows = self.unit(strip)

    def unit(self, strip: NDArray[np.float32]) -> NDArray[np.float32]:
        """Other rows in the same frame."""
        rows = ((np.where(np.isfinite(strip), strip, 0) - self.mean) / self.spread).astype(np.float32)
        rows -= rows.mean(axis=1, keepdims=True)
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        scaled: NDArray[np.float32] = rows / np.where(length > 0, length, np.inf)
        return scaled

    def floor(self, others: int) -> float:
        """A product that the best of all pairs with so many other rows does not reach by chance."""
        noise = 1 / math.sqrt(max(1, self.rows.shape[1] - 1))
        return max(LEAST_COSINE, min(0.95, noise * math.sqrt(2 * math.log(max(2, len(self.rows) * others)))))


def strip_views(shape: Sequence[int]) -> list[View]:
    """Views whose strips can be read by ranges."""
    return [v for v in views(shape) if v.rows and contiguous(v)]


def in_columns(view: View) -> bool:
    """True where a row stands in a column of what is stored."""
    return view.columns[0] < view.rows[0]


def row_width(values: Values, name: str, view: View) -> int:
    """Elements of a row."""
    shape = values.shape(name)
    return math.prod(shape[i] for i in view.columns)


def read_strip(
    values: Values, name: str, view: View, seed: int, rows: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Neighbouring columns of every row (or of the given ones), the same for every tensor of a width."""
    shape, spec = values.shape(name), values.checkpoint.specs[name]
    height, width = math.prod(shape[i] for i in view.rows), row_width(values, name, view)
    count = min(STRIP, width)
    at = int(np.random.default_rng([seed, width]).integers(0, width - count + 1))
    if values.size(name) <= SMALL or in_columns(view):
        return columns(values, name, view, np.arange(at, at + count), rows)
    wanted = range(height) if rows is None else rows.tolist()
    if not spec.plain:
        parts = [values.checkpoint.read(name, r * width + at, r * width + at + count) for r in wanted]
        return np.stack(parts).astype(np.float32, copy=False)
    codes = np.empty((len(wanted), count), STORAGE[spec.dtype])
    for place, row in enumerate(wanted):
        values.checkpoint.read_codes(name, row * width + at, row * width + at + count, out=codes[place])
    return decode(codes.reshape(-1), spec.dtype).astype(np.float32, copy=False).reshape(codes.shape)


def known_share(found: Provenance) -> float:
    """Share of the rows that were found."""
    return float((found.source >= 0).mean())


def count_hits(a: Values, name: str, view: View, mine: Frame, seed: int) -> int:
    """How many of some rows of A's tensor are among B's; 0 where they are too few to count."""
    height = math.prod(a.shape(name)[i] for i in view.rows)
    starts = probe_rows(max(1, height // RUN), PROBES // RUN, seed) * RUN
    probes = np.unique((starts[:, None] + np.arange(min(RUN, height))).ravel())
    _, value = highest(mine.unit(read_strip(a, name, view, seed, probes)), mine.rows)
    found = int((value > mine.floor(TRIED)).sum())
    return found if found >= LEAST_HIT_SHARE * len(probes) else 0


def correlation(ones: Sequence[NDArray[Any]], twos: Sequence[NDArray[Any]]) -> float | None:
    """Correlation of paired values, None where it is no evidence."""
    if not ones:
        return None
    x, y = np.concatenate(ones).astype(np.float64), np.concatenate(twos).astype(np.float64)
    ok = np.isfinite(x) & np.isfinite(y)
    x, y = x[ok], y[ok]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    found = float(np.corrcoef(x, y)[0, 1])
    return found if found >= LEAST_COSINE and found * math.sqrt(len(x)) >= LEAST_Z else None
