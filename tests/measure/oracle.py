"""The figures as plain NumPy one-liners in float64: what every kernel must agree with."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray


def figures(a: NDArray[Any], b: NDArray[Any], tiny: float) -> dict[str, float | None]:
    """Every figure of two equally long arrays of values."""
    whole_a, whole_b = a.astype(np.float64), b.astype(np.float64)
    good = np.isfinite(whole_a) & np.isfinite(whole_b)
    x, y = whole_a[good], whole_b[good]
    d, normal = y - x, np.abs(x) >= tiny
    q = np.quantile(np.abs(b[good] - a[good]), [0.01, 0.05, 0.5, 0.95, 0.99])
    return {
        "cosine": x @ y / np.sqrt((x @ x) * (y @ y)),
        "pearson": np.corrcoef(x, y)[0, 1],
        "spearman": scipy.stats.spearmanr(x, y).statistic,
        "l2": np.linalg.norm(d),
        "l1": np.abs(d).sum(),
        "rel_l2": np.linalg.norm(d) / np.linalg.norm(x),
        "max_abs": np.abs(d).max(),
        "mean_abs": np.abs(d).mean(),
        "max_rel": (np.abs(d)[normal] / np.abs(x)[normal]).max(),
        "mean_rel": (np.abs(d)[normal] / np.abs(x)[normal]).mean(),
        "norm_ratio": np.linalg.norm(y) / np.linalg.norm(x),
        "mean_ratio": y.mean() / x.mean(),
        "std_ratio": y.std() / x.std(),
        "q01": q[0], "q05": q[1], "q50": q[2], "q95": q[3], "q99": q[4],
        "zero_a": (x == 0).mean(), "zero_b": (y == 0).mean(), "changed": (x != y).mean(),
        "nan_a": int((~np.isfinite(whole_a)).sum()), "nan_b": int((~np.isfinite(whole_b)).sum()),
    }  # fmt: skip
