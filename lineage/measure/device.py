"""The kernel in torch, for `--device cuda`: the same sums and ranks as everywhere, in float64 on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError
from lineage.measure.metrics import SUMS, Order
from lineage.measure.plain import PlainKernel, interpolate, positions

__all__ = ["DeviceKernel"]


class DeviceKernel:
    """Sums and order statistics of float codes with torch.

    Parameters
    ----------
    device : `cuda`, `cuda:1`, …; `cpu` works too and serves the tests

    Raises
    ------
    InputError : torch is missing, or has no such device
    """

    name = "cuda"
    words = frozenset(("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2"))

    def __init__(self, device: str) -> None:
        try:
            import torch
        except ImportError as exc:
            raise InputError("--device", "torch is not installed", "install torch or use --device cpu") from exc
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise InputError("--device", "torch sees no CUDA device", "use --device cpu")
        self._torch: Any = torch
        try:
            self._device = torch.device(device)
            torch.zeros(1, device=self._device)
        except RuntimeError as exc:
            raise InputError("--device", f"no device {device!r}", "use cpu or cuda") from exc
        self._dtypes = {
            "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
            "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
        }  # fmt: skip
        self._plain = PlainKernel()

    def _values(self, codes: NDArray[Any], word: str) -> Any:
        """Codes as a float64 tensor on the device; bytes travel as they are stored."""
        raw = np.require(codes, requirements=["C", "W"]).view(np.uint8)
        return self._torch.from_numpy(raw).to(self._device).view(self._dtypes[word]).to(self._torch.float64)

    def sums(self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, *, tiny: float) -> NDArray[np.float64]:
        """Sums over one block; see `Kernel.sums`."""
        torch = self._torch
        x, y = self._values(a, word_a), self._values(b, word_b)
        good_a, good_b = torch.isfinite(x), torch.isfinite(y)
        good = good_a & good_b
        whole = len(x)
        other = 0.0
        if not bool(good.all()):
            # broken pairs are few: the NumPy kernel tells which of them differ
            bad = (~good).cpu().numpy()
            other = float(self._plain.sums(a[bad], word_a, b[bad], word_b, tiny=tiny)[SUMS.index("other")])
            x, y = x[good], y[good]
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        size, base = (y - x).abs(), x.abs()
        relative = torch.where(base >= tiny, size / base, zero)
        parts = (
            zero + len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum(),
            size.sum(), (size * size).sum(), base.sum(), relative.sum(), (base >= tiny).sum(),
            (x == 0).sum(), (y == 0).sum(), (x != y).sum(),
            whole - good_a.sum(), whole - good_b.sum(), zero + other,
            size.max() if len(x) else zero, relative.max() if len(x) else zero,
        )  # fmt: skip
        return np.asarray(torch.stack([part.to(torch.float64) for part in parts]).cpu().numpy())

    def order(
        self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, probabilities: Sequence[float]
    ) -> Order:
        """Ranks and quantiles over all given elements; see `Kernel.order`."""
        torch = self._torch
        if not len(a):
            return Order(None, (None,) * len(probabilities))
        x, y = self._values(a, word_a), self._values(b, word_b)
        one, two = self._ranks(x), self._ranks(y)
        scale = float(torch.sqrt((one * one).sum()) * torch.sqrt((two * two).sum()))
        spearman = max(-1.0, min(1.0, float((one * two).sum()) / scale)) if scale else None
        if "F64" in (word_a, word_b):
            size = (y - x).abs()
        else:
            size = (y.to(torch.float32) - x.to(torch.float32)).abs()
        size = size.sort().values
        below, above, share = positions(len(a), probabilities)
        low, high = (size[torch.from_numpy(at).to(self._device)].cpu().numpy() for at in (below, above))
        return Order(spearman, interpolate(low, high, share))

    def _ranks(self, values: Any) -> Any:
        """Average ranks with mean zero."""
        torch = self._torch
        _, inverse, counts = torch.unique(values + 0.0, return_inverse=True, return_counts=True)
        counts = counts.to(torch.float64)
        middle = counts.cumsum(0) - counts + (counts - 1) / 2 - (len(values) - 1) / 2
        return middle[inverse]

    def equal_when_rounded(self, fine: NDArray[Any], coarse: NDArray[Any], word: str) -> bool:
        """True where rounding the values `fine` to the dtype `word` gives the codes `coarse`."""
        return self._plain.equal_when_rounded(fine, coarse, word)

    def copy_runs(self, codes: NDArray[Any], starts: NDArray[np.int64], run: int, out: NDArray[Any]) -> None:
        """Copies runs one behind the other; see `Kernel.copy_runs`."""
        self._plain.copy_runs(codes, starts, run, out)
