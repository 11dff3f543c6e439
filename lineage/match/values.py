"""Values of a checkpoint's tensors as the matcher wants them: by position, by row, a few at a time.

Small tensors are read once and kept within a budget; of large ones only the ranges asked for are read.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.dtypes import FLOATS, decode
from lineage.layout.mapping import How

__all__ = ["MANTISSA", "PLACES", "Values", "agreement", "coarsest", "lattice"]

#: tensors up to this many elements are read whole
SMALL = 1 << 16
#: bytes of decoded small tensors that are kept
KEPT = 192 << 20
#: values of a sample: a few thousand tell two tensors apart
PLACES = 2048
#: `Values.gap` where bytes cost little and reads much
GAP = 512

#: correlation below which values speak against a sibling, where there are enough of them to speak
AGAINST = 0.3
#: elements from which on they are enough
ENOUGH = 24
#: deviations above chance from which on a correlation speaks for it
TELLING = 4.0

#: bits of the mantissa, by coarseness
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}


def coarsest(*checkpoints: Checkpoint) -> str:
    """The float format with the fewest mantissa bits that any of the checkpoints stores plainly."""
    words = {spec.dtype for ck in checkpoints for spec in ck if spec.dtype in FLOATS}
    return min(words, key=lambda w: MANTISSA[w], default="F32")


class Values:
    """Reads values of one checkpoint as float32, by tensor name; safe to share between threads.

    Parameters
    ----------
    places : values of a sample

    Attributes
    ----------
    gap : elements between two wanted ones below which one read serves both
    """

    def __init__(self, checkpoint: Checkpoint, *, places: int = PLACES) -> None:
        self.checkpoint, self.places, self.gap = checkpoint, places, GAP
        self._kept: OrderedDict[str, NDArray[Any]] = OrderedDict()
        self._bytes = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._samples: dict[str, NDArray[np.float32]] = {}
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        """Axes of a tensor without those of length one."""
        found = self._shapes.get(name)
        if found is None:
            found = self._shapes[name] = tuple(n for n in self.checkpoint.specs[name].shape if n != 1)
        return found

    def size(self, name: str) -> int:
        """Number of elements."""
        return self.checkpoint.specs[name].size

    def whole(self, name: str) -> NDArray[Any]:
        """All values, 1-D float32; small tensors are kept for the next caller."""
        with self._lock:
            found = self._kept.get(name)
            if found is not None:
                self._kept.move_to_end(name)
                return found
        values = self.checkpoint.read(name).astype(np.float32, copy=False)
        if values.size <= SMALL:
            with self._lock:
                self._kept[name] = values
                self._bytes += values.nbytes
                while self._bytes > KEPT:
                    self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return values

    def at(self, name: str, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Values at flat positions, in their order; reads only the ranges around them."""
        size = self.size(name)
        if not len(positions):
            return np.empty(0, np.float32)
        if size <= SMALL or not self.checkpoint.specs[name].plain:
            picked: NDArray[np.float32] = self.whole(name)[positions]
            return picked
        order = np.argsort(positions, kind="stable")
        wanted = positions[order]
        cuts = np.flatnonzero(np.diff(wanted) > self.gap) + 1
        out = np.empty(len(positions), np.float32)
        for first, last in zip(np.r_[0, cuts], np.r_[cuts, len(wanted)], strict=True):
            lo, hi = int(wanted[first]), int(wanted[last - 1]) + 1
            got = self.checkpoint.read(name, lo, hi)
            out[order[first:last]] = got[wanted[first:last] - lo]
        return out

    def sample(self, name: str) -> NDArray[np.float32]:
        """Some values, at the same places of every tensor of a shape."""
        if name not in self._samples:
            self._samples[name] = self.at(name, lattice(self.shape(name), self.places, 0))
        return self._samples[name]

    def rows(self, name: str, start: int, stop: int, width: int) -> NDArray[np.float32]:
        """Rows [start, stop) of the tensor seen as (size / width, width)."""
        if self.size(name) <= SMALL or not self.checkpoint.specs[name].plain:
            return self.whole(name)[start * width : stop * width].reshape(stop - start, width)
        return self.checkpoint.read(name, start * width, stop * width).astype(np.float32, copy=False).reshape(-1, width)

    def columns(self, name: str, start: int, stop: int, width: int, chosen: NDArray[np.int64]) -> NDArray[np.float32]:
        """The `chosen` columns of rows [start, stop) of the tensor seen as (size / width, width)."""
        spec = self.checkpoint.specs[name]
        codes = self.checkpoint.read_codes(name, start * width, stop * width).reshape(-1, width)
        picked: NDArray[np.float32] = decode(np.ascontiguousarray(codes[:, chosen]), spec.dtype).astype(
            np.float32, copy=False
        )
        return picked


def lattice(shape: Sequence[int], count: int, seed: int) -> NDArray[np.int64]:
    """About `count` flat positions in C order of `shape`: the product of short runs on every axis.

    Runs keep reads of neighbours together, on this side and on a transposed one. Up to `count` elements in all,
    every position is taken.
    """
    size = math.prod(shape)
    if size <= count:
        return np.arange(size, dtype=np.int64)
    rng = np.random.default_rng([seed, *shape])
    flat = np.zeros(1, np.int64)
    for axis, (n, take) in enumerate(zip(shape, grid(shape, count), strict=True)):
        if take == n:
            chosen = np.arange(n)
        else:
            runs = _runs(shape, axis, take)
            length = take // runs
            starts = np.sort(rng.choice(max(1, n // length), runs, replace=False)) * length
            chosen = (starts[:, None] + np.arange(length)).ravel()
        flat = (flat[:, None] * n + chosen).ravel()
    return flat.astype(np.int64)


def grid(shape: Sequence[int], count: int) -> tuple[int, ...]:
    """How many places of each axis `lattice` takes.

    Examples
    --------
    >>> grid((100, 30), 400), grid((10, 4), 400)
    ((20, 20), (10, 4))
    """
    if math.prod(shape) <= count:
        return tuple(shape)
    share = count ** (1 / max(1, sum(n > 1 for n in shape)))
    takes = [min(n, max(2, round(share))) for n in shape]
    return tuple(
        t if t == n else t // _runs(shape, k, t) * _runs(shape, k, t)
        for k, (n, t) in enumerate(zip(shape, takes, strict=True))
    )


def _runs(shape: Sequence[int], axis: int, take: int) -> int:
    """Unbroken runs that so many places of an axis are taken in."""
    return max(1, take // 8 if axis + 1 < len(shape) else min(2, take // 8))


def agreement(x: NDArray[np.float32], y: NDArray[np.float32], expected: float = 0.0) -> tuple[How | None, float]:
    """What the values of two vectors say of them, and their correlation (0 where there is none).

    `values` where they correlate, `structure` where they cannot tell, None where they speak against it. `expected`
    is the correlation that neighbours show: half of it is asked for.

    Examples
    --------
    >>> agreement(np.ones(8, np.float32), np.ones(8, np.float32))
    ('structure', 0.0)
    """
    ok = np.isfinite(x) & np.isfinite(y)
    if ok.sum() < 2:
        return "structure", 0.0
    u, v = x[ok].astype(np.float64), y[ok].astype(np.float64)
    flat_u, flat_v = np.ptp(u) == 0, np.ptp(v) == 0
    if flat_u or flat_v:
        return ("structure" if flat_u and flat_v and u[0] == v[0] else None), 0.0
    r = float(np.corrcoef(u, v)[0, 1])
    if r > max(AGAINST, expected / 2):
        return ("values" if r * math.sqrt(len(u)) > TELLING else "structure"), r
    return ("structure" if len(u) < ENOUGH else None), r
