"""Elements in C order out of storage that lies in another order: views in pickles, Fortran arrays.

Only the pieces of storage that a range touches are read, so memory stays bounded by the range.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

__all__ = ["contiguous", "gather", "span"]

#: a span of storage up to this many times the elements wanted is read in one piece
_WASTE = 4
_SMALL = 2**16

#: elements [start, stop) of the storage, 1-D
ReadStorage = Callable[[int, int], NDArray[Any]]


def contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """True where storage order is C order (axes of length 1 have no order).

    Examples
    --------
    >>> contiguous((2, 3), (3, 1)), contiguous((2, 3), (1, 2))
    (True, False)
    """
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements of storage from the first to the last that the view touches."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))


def gather(
    read: ReadStorage,
    dtype: np.dtype[Any],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    stop: int,
) -> NDArray[Any]:
    """C-order elements [start, stop) of a view with non-negative `strides` (in elements), 1-D."""
    if start == stop:
        return np.empty(0, dtype)
    while len(shape) > 1 and shape[0] == 1:
        shape, strides = shape[1:], strides[1:]
    if not shape:
        return read(0, 1)
    width = math.prod(shape[1:])
    first, last = start // width, -(-stop // width)
    if first + 1 == last and len(shape) > 1:
        base = first * strides[0]
        return gather(
            lambda low, high: read(base + low, base + high),
            dtype,
            shape[1:],
            strides[1:],
            start - first * width,
            stop - first * width,
        )
    rows = np.empty((last - first, *shape[1:]), dtype)
    _fill(read, rows, first * strides[0], strides)
    return rows.reshape(-1)[start - first * width : stop - first * width]


def _fill(read: ReadStorage, out: NDArray[Any], offset: int, strides: tuple[int, ...]) -> None:
    """Fills `out` from the view of its shape that begins at `offset`."""
    reach = span(out.shape, strides)
    if reach <= max(_WASTE * out.size, _SMALL):
        stored = read(offset, offset + reach)
        out[...] = as_strided(stored, out.shape, tuple(s * out.itemsize for s in strides), writeable=False)
        return
    axis = max(range(out.ndim), key=lambda k: strides[k] if out.shape[k] > 1 else -1)
    rest = strides[:axis] + strides[axis + 1 :]
    pieces = np.moveaxis(out, axis, 0)
    for i in range(len(pieces)):
        _fill(read, pieces[i, ...], offset + i * strides[axis], rest)
