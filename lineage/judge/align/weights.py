"""Matrices of the common layout as units over the residual space, read when they are needed."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.anatomy import Part
from lineage.judge.common import Common

__all__ = ["Weights", "cosine", "unit_cosines"]

Floats = NDArray[np.floating[Any]]

#: elements of tensors that are kept decoded
KEPT = 1 << 24
#: rows are read one by one where there are this many times as many
FEW = 8
#: median size of a norm's weights below which one is added to them
AROUND_ZERO = 0.1


class Weights:
    """Tensors of both sides, the latest kept.

    Parameters
    ----------
    common : both checkpoints in one layout
    """

    def __init__(self, common: Common) -> None:
        self.sides = (common.a, common.b)
        self._kept: OrderedDict[tuple[int, str], Floats] = OrderedDict()
        self._around: dict[str, bool] = {}

    def tensor(self, side: int, name: str) -> Floats:
        """A whole tensor in float32; what is not finite counts as 0."""
        key = (side, name)
        if key not in self._kept:
            array = np.asarray(self.sides[side].tensor(name), np.float32)
            if not np.isfinite(array).all():
                array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
            self._kept[key] = array
            while len(self._kept) > 2 and sum(kept.size for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def part(self, side: int, part: Part, gain: str | None = None) -> Floats:
        """A part as (units, residual), times the gain of the norm that it reads through."""
        array = np.moveaxis(self.tensor(side, part.name), part.axis, -1)
        rows = array.reshape(-1, array.shape[-1])[part.start[side] : part.start[side] + part.units[side]]
        return rows if gain is None else rows * self.gain(side, gain)

    def gain(self, side: int, name: str) -> Floats:
        """What a norm multiplies with: its weight, or one more where weights are stored around zero."""
        return self.tensor(side, name).reshape(-1) + np.float32(self.around_zero(name))

    def around_zero(self, name: str) -> bool:
        """Whether a norm's weight is kept as its distance from one."""
        if name not in self._around:
            sizes = [float(np.median(np.abs(self.tensor(side, name)))) for side in (0, 1)]
            self._around[name] = min(sizes) < AROUND_ZERO
        return self._around[name]

    def rows(self, side: int, part: Part, chosen: NDArray[np.intp], gain: str | None = None) -> Floats:
        """Some units of a part, in ascending order; read one by one where that is less than the tensor."""
        shape = self.sides[side].specs[part.name].shape
        if (side, part.name) in self._kept or part.axis == 0 or len(shape) != 2 or len(chosen) * FEW > shape[0]:
            return self.part(side, part, gain)[chosen]
        at = chosen + part.start[side]
        read = [self.sides[side].rows(part.name, int(k), int(k) + 1) for k in at]
        rows = np.nan_to_num(np.concatenate(read).astype(np.float32), posinf=0.0, neginf=0.0)
        return rows if gain is None else rows * self.gain(side, gain)


def cosine(one: Floats, two: Floats) -> float:
    """Cosine of all elements together, 0 where either holds nothing."""
    x, y = one.reshape(-1).astype(np.float64), two.reshape(-1).astype(np.float64)
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else 0.0


def unit_cosines(one: Floats, two: Floats) -> Floats:
    """Cosine of each row with its counterpart, 0 for rows of nothing."""
    dots = np.einsum("ij,ij->i", one, two)
    sizes = np.sqrt(np.einsum("ij,ij->i", one, one) * np.einsum("ij,ij->i", two, two))
    return np.asarray(np.divide(dots, sizes, out=np.zeros_like(dots), where=sizes > 0))
