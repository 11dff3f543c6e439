"""Matrices of the common layout as units over the residual space, read when they are needed."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.anatomy import Part
from lineage.judge.common import Common

__all__ = ["Moments", "Weights", "cosine", "moments", "unit_cosines"]

Floats = NDArray[np.floating[Any]]

#: elements of tensors that are kept decoded: both sides of the largest layers in use
KEPT = 1 << 28
#: rows are read one by one where there are this many times as many
FEW = 8
#: median size of a norm's weights below which one is added to them
AROUND_ZERO = 0.1
#: elements whose products are summed in one go
BLOCK = 1 << 16


class Weights:
    """Tensors of both sides, the latest kept; safe to share between threads.

    Parameters
    ----------
    common : both checkpoints in one layout
    """

    def __init__(self, common: Common) -> None:
        self.sides = (common.a, common.b)
        self._kept: OrderedDict[tuple[int, str], Floats] = OrderedDict()
        self._around: dict[str, bool] = {}
        self._lock = threading.Lock()

    def tensor(self, side: int, name: str) -> Floats:
        """A whole tensor in float32; what is not finite counts as 0."""
        key = (side, name)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        array = np.asarray(self.sides[side].tensor(name), np.float32)
        if not np.isfinite(array).all():
            array = np.nan_to_num(array, nan=0.0, posinf=0.0, neginf=0.0)
        with self._lock:
            self._kept[key] = array
            while len(self._kept) > 2 and sum(kept.size for kept in self._kept.values()) > KEPT:
                self._kept.popitem(last=False)
        return array

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


class Moments(msgspec.Struct, frozen=True):
    """Products of units with their counterparts: all that scales and signs need to be fitted and shown.

    Attributes
    ----------
    dots, one, two : of each pair of units, float64: x · y, x · x and y · y
    """

    dots: Floats
    one: Floats
    two: Floats

    @property
    def cosines(self) -> Floats:
        """Cosine of each unit with its counterpart, 0 for units of nothing."""
        sizes = np.sqrt(self.one * self.two)
        return np.asarray(np.divide(self.dots, sizes, out=np.zeros_like(self.dots), where=sizes > 0))

    def cosine(self, scale: Floats | float = 1.0) -> float:
        """Cosine of all elements together, each unit of the first times its scale; 0 where either holds nothing."""
        size = float(np.sqrt(np.sum(self.one * np.square(scale)) * self.two.sum()))
        return float(np.sum(self.dots * scale)) / size if size > 0 else 0.0


def moments(one: Floats, two: Floats, take: NDArray[np.intp] | None = None) -> Moments:
    """Moments of the rows of `two` with those of `one`, or with `one[take]`; block by block, without copies of both."""
    count = len(two)
    found = np.empty((3, count))
    step = max(1, BLOCK // max(1, math.prod(two.shape[1:])))
    for low in range(0, count, step):
        some = slice(low, low + step)
        x = one[some if take is None else take[some]].reshape(len(two[some]), -1).astype(np.float64)
        y = two[some].reshape(len(x), -1).astype(np.float64)
        found[0, some] = np.einsum("ij,ij->i", x, y)
        found[1, some] = np.einsum("ij,ij->i", x, x)
        found[2, some] = np.einsum("ij,ij->i", y, y)
    return Moments(*found)


def cosine(one: Floats, two: Floats) -> float:
    """Cosine of all elements together, 0 where either holds nothing."""
    if one.ndim > 1:
        return moments(one, two).cosine()
    x, y = one.reshape(-1), two.reshape(-1)
    even = len(x) - len(x) % BLOCK
    blocks = moments(x[:even].reshape(-1, BLOCK), y[:even].reshape(-1, BLOCK))
    rest = moments(x[even:, None], y[even:, None])
    parts = ((blocks.dots, rest.dots), (blocks.one, rest.one), (blocks.two, rest.two))
    return Moments(*map(np.concatenate, parts)).cosine()


def unit_cosines(one: Floats, two: Floats) -> Floats:
    """Cosine of each row with its counterpart, 0 for rows of nothing."""
    return moments(one, two).cosines
