"""Arrays that an operation carries: index lists in their shortest form, vectors and matrices with value equality."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError

__all__ = ["Data", "Run", "compressed", "key_of", "positions"]

#: one place, or a range as `range(start, stop, step)` counts it
Run = int | tuple[int, int, int]
#: largest number of places that an index list may name
MOST_PLACES = 1 << 31


class Data:
    """An array that compares by its values and is never changed.

    Parameters
    ----------
    array : any shape; kept as float64 or int64, so that printing and reading give it back
    """

    __slots__ = ("array", "key")

    def __init__(self, array: NDArray[Any] | Sequence[float]) -> None:
        given = np.asarray(array)
        self.array: NDArray[Any] = np.array(given, np.int64 if given.dtype.kind in "iub" else np.float64)
        self.array.flags.writeable = False
        self.key = key_of(self.array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Data) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Data({self.array.dtype}, {self.array.shape}, {self.key})"


def key_of(array: NDArray[Any]) -> str:
    """A name made of the array's contents: equal arrays share one entry of the file beside the mapping."""
    digest = hashlib.blake2b(repr((array.dtype.str, array.shape)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def positions(runs: Iterable[Run]) -> NDArray[np.int64]:
    """The places that an index list names, in order.

    Raises
    ------
    LayoutError : a range of step 0, or absurdly many places

    Examples
    --------
    >>> positions([(2, 4, 1), 0, (9, 5, -2)]).tolist()
    [2, 3, 0, 9, 7]
    """
    parts, total = [], 0
    for run in runs:
        if isinstance(run, int):
            part = range(run, run + 1)
        elif run[2] == 0:
            raise LayoutError("an index range needs a step other than 0")
        else:
            part = range(*run)
        total += len(part)
        if total > MOST_PLACES:
            raise LayoutError(f"an index list of more than {MOST_PLACES:,} places")
        parts.append(part)
    if sum(len(p) == 1 for p in parts) == total:
        return np.array([p[0] for p in parts if p], np.int64)
    return np.concatenate([np.arange(p.start, p.stop, p.step, dtype=np.int64) for p in parts])


def compressed(index: NDArray[np.int64]) -> tuple[Run, ...]:
    """The shortest index list, read from the left, that names these places.

    Examples
    --------
    >>> compressed(np.array([4, 5, 6, 7, 0, 9, 7, 5]))
    ((4, 8, 1), 0, (9, 3, -2))
    """
    found: list[Run] = []
    values = index.tolist()
    steps = np.diff(index)
    # a run may go on until the first place where the step changes
    changes = np.append(np.flatnonzero(steps[1:] != steps[:-1]) + 1, len(steps)).tolist() if len(steps) else []
    at, k = 0, 0
    while at < len(values):
        while k < len(changes) and changes[k] <= at:
            k += 1
        end = changes[k] if k < len(changes) else at
        step = values[at + 1] - values[at] if at + 1 < len(values) else 0
        if end - at >= 2 and step and values[at] >= 0:
            found.append((values[at], values[end] + step, step))
            at = end + 1
        else:
            found.append(values[at])
            at += 1
    return tuple(found)
