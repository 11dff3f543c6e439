"""What measures blocks of codes: one small interface, and the choice of who serves it.

NumPy (`plain`) serves every dtype everywhere, C (`native`) the common ones at memory speed where it was
compiled, torch (`device`) the same ones on a GPU. All agree to the rounding of float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError
from lineage.measure.metrics import Order

__all__ = ["Kernel", "choose"]


class Kernel(Protocol):
    """Figures of two equally long 1-D blocks of stored codes."""

    @property
    def name(self) -> str:
        """`numpy`, `native` or `cuda`."""

    @property
    def words(self) -> frozenset[str]:
        """Dtypes whose codes it takes; other pairs go to the NumPy kernel."""

    def sums(self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, *, tiny: float) -> NDArray[np.float64]:
        """The sums of `metrics.SUMS`, accumulated in float64.

        Parameters
        ----------
        a, b : codes, dtypes `STORAGE[word_a]` and `STORAGE[word_b]`
        tiny : smallest |a| that relative differences count, above zero

        Notes
        -----
        Relative tolerance 1e-12 against the plain NumPy formula in float64. Where a equals b the sums `aa`, `bb` and
        `ab` have the same bits.
        """

    def order(
        self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, probabilities: Sequence[float]
    ) -> Order:
        """Spearman's correlation (ties share their mean rank) and quantiles of |b - a|; all elements finite.

        Notes
        -----
        Exact for the elements given; |b - a| is rounded to float32 unless a dtype is F64 or an integer of 32 bits
        and more.
        """

    def equal_when_rounded(self, fine: NDArray[Any], coarse: NDArray[Any], word: str) -> bool:
        """True where rounding the values `fine` (decoded) to the dtype `word` gives the codes `coarse`."""

    def copy_runs(self, codes: NDArray[Any], starts: NDArray[np.int64], run: int, out: NDArray[Any]) -> None:
        """Copies the runs of `run` elements that begin at `starts` one behind the other into the contiguous `out`."""


def choose(device: str = "cpu") -> Kernel:
    """The fastest kernel that works here.

    Raises
    ------
    InputError : a device was asked for that this machine lacks
    """
    if device == "cpu":
        try:
            from lineage.measure.native import NativeKernel

            return NativeKernel()
        except ImportError:
            from lineage.measure.plain import PlainKernel

            return PlainKernel()
    if device.partition(":")[0] != "cuda":
        raise InputError("--device", f'no device "{device}"', "use cpu or cuda")
    from lineage.measure.device import DeviceKernel

    return DeviceKernel(device)
