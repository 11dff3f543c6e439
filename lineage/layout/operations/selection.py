"""Parts of an axis: `slice`, `take` (any order of any places), and `pad`, which adds places.

Their inverses may leave places that nobody knows: `pad` with no value, `take` of place -1. What is unknown stays
unknown until another rule fills it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError, Shape
from lineage.layout.operations.base import NOTHING, Operation, Rows, Segment, Single, axis_of, outer
from lineage.layout.operations.data import Run, compressed, key_of, positions

__all__ = ["Pad", "Slice", "Take"]

#: index lists up to this many entries stand in the mapping itself, longer ones beside it
INLINE = 32
#: a `take` of more runs than this is read whole and indexed, not range by range
MOST_SEGMENTS = 256


@dataclass(frozen=True)
class Slice(Single):
    """Places start to stop of an axis, as Python slices count them.

    Attributes
    ----------
    axis : which, negative from the end
    start : first place, 0 or more
    stop : place after the last, negative from the end, None for the end
    of : the whole length, where it is known; the inverse needs it if `stop` is positive
    value : what the places cut off hold (0: padding that goes), None where nobody knows
    """

    word: ClassVar[str] = "slice"
    axis: int = 0
    start: int = 0
    stop: int | None = None
    of: int | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        if self.start < 0 or (self.of is not None and self.of < 0):
            raise LayoutError("slice: start and of are 0 or more")

    def _range(self, shape: Shape) -> tuple[int, int, int]:
        """Axis, start and stop for this shape."""
        axis = axis_of(self.axis, len(shape), self.word)
        length = shape[axis]
        if self.of is not None and length != self.of:
            raise LayoutError(f"slice: axis {axis} has {length}, expected {self.of}")
        stop = length if self.stop is None else self.stop + length if self.stop < 0 else self.stop
        if not self.start <= stop <= length:
            raise LayoutError(f"slice: {self.start} to {stop} is outside axis {axis} of {length}")
        return axis, self.start, stop

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        axis, start, stop = self._range(array.shape)
        return array[(slice(None),) * axis + (slice(start, stop),)]

    def one_shape(self, shape: Shape) -> Shape:
        axis, start, stop = self._range(shape)
        return (*shape[:axis], stop - start, *shape[axis + 1 :])

    def one_flat(self, shape: Shape) -> list[Segment] | None:
        axis, start, stop = self._range(shape)
        width = math.prod(shape[axis + 1 :])
        return [(0, start * width, stop * width)] if outer(shape, axis) else None

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        if self.stop is not None and self.stop >= 0:
            if self.of is None:
                raise LayoutError("slice: its inverse needs the whole length; add of")
            after = self.of - self.stop
        else:
            after = -(self.stop or 0)
        return (Pad(self.axis, self.start, after, self.value),) if self.start or after else ()

    def inside(self, dimensions: int) -> Slice | None:
        axis = axis_of(self.axis, dimensions, self.word)
        return replace(self, axis=axis - 1) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        given = {"axis": self.axis, "start": self.start, "stop": self.stop, "of": self.of, "value": self.value}
        return {self.word: {k: v for k, v in given.items() if v is not None}}


@dataclass(frozen=True, init=False)
class Take(Single):
    """Chosen places of an axis, in any order, as often as named.

    Attributes
    ----------
    axis : which, negative from the end
    index : places and ranges `(start, stop, step)`, in their shortest form; -1 is a place nobody knows
    of : the whole length, where it is known; the inverse needs it unless every place is taken once
    """

    word: ClassVar[str] = "take"
    axis: int
    index: tuple[Run, ...]
    of: int | None

    def __init__(self, axis: int, index: Iterable[Run] | NDArray[np.integer[Any]], of: int | None = None) -> None:
        places = index.astype(np.int64) if isinstance(index, np.ndarray) else positions(index)
        if places.ndim != 1:
            raise LayoutError(f"take: an index list has one axis, this one {places.ndim}")
        if len(places) and int(places.min()) < -1:
            raise LayoutError("take: places are 0 or more")
        object.__setattr__(self, "axis", axis)
        object.__setattr__(self, "index", compressed(places))
        object.__setattr__(self, "of", of)

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """The places one by one."""
        return positions(self.index)

    @cached_property
    def partial(self) -> bool:  # type: ignore[override]
        """Whether some place is -1."""
        return bool((self.places < 0).any())

    def _axis(self, shape: Shape) -> int:
        axis = axis_of(self.axis, len(shape), self.word)
        if self.of is not None and shape[axis] != self.of:
            raise LayoutError(f"take: axis {axis} has {shape[axis]}, expected {self.of}")
        if len(self.places) and int(self.places.max()) >= shape[axis]:
            raise LayoutError(f"take: place {self.places.max()} is outside axis {axis} of {shape[axis]}")
        return axis

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        axis = self._axis(array.shape)
        unknown = self.places == -1
        if not unknown.any():
            return np.take(array, self.places, axis=axis)
        result = np.zeros(self.one_shape(array.shape), array.dtype)
        known = (slice(None),) * axis + (np.flatnonzero(~unknown),)
        result[known] = np.take(array, self.places[~unknown], axis=axis)
        return result

    def one_shape(self, shape: Shape) -> Shape:
        axis = self._axis(shape)
        return (*shape[:axis], len(self.places), *shape[axis + 1 :])

    def one_flat(self, shape: Shape) -> list[Segment] | None:
        axis = self._axis(shape)
        places = self.places
        if not outer(shape, axis) or not len(places):
            return [] if not len(places) else None
        width = math.prod(shape[axis + 1 :])
        steady = (np.diff(places) == 1) & (places[:-1] >= 0) | (places[1:] == -1) & (places[:-1] == -1)
        starts = np.concatenate([[0], np.flatnonzero(~steady) + 1])
        if len(starts) > MOST_SEGMENTS:
            return None
        found = []
        for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(places)], strict=True):
            place, length = int(places[start]), stop - start
            first = max(place, 0) * width
            found.append((NOTHING if place < 0 else 0, first, first + length * width))
        return found

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        known = np.flatnonzero(self.places >= 0)
        used = self.places[known]
        length = self.of
        if length is None:
            # each place once and none left out: that is the whole axis
            if len(used) == 0 or not np.array_equal(np.sort(used), np.arange(len(used))):
                raise LayoutError("take: its inverse needs the whole length; add of")
            length = len(used)
        back = np.full(length, -1, np.int64)
        back[used[::-1]] = known[::-1]
        return (Take(self.axis, back, len(self.places)),)

    def rows(self, start: int, stop: int, shape: Shape) -> tuple[Operation | None, Rows] | None:
        if self.partial or self._axis(shape):
            return super().rows(start, stop, shape)
        return None, self.places[start:stop].tolist()

    def inside(self, dimensions: int) -> Take | None:
        axis = axis_of(self.axis, dimensions, self.word)
        return Take(axis - 1, self.places, self.of) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        given: dict[str, Any] = {"axis": self.axis}
        if len(self.index) > INLINE:
            key = f"take-{key_of(self.places)}"
            data[key] = self.places
            given["file"] = key
        else:
            given["index"] = [_run_text(run) for run in self.index]
        if self.of is not None:
            given["of"] = self.of
        return {self.word: given}


@dataclass(frozen=True)
class Pad(Single):
    """Places added before and after an axis.

    Attributes
    ----------
    axis : which, negative from the end
    before, after : how many
    value : what they hold; only 0 is exact in every dtype; None where nobody knows
    """

    word: ClassVar[str] = "pad"
    axis: int = 0
    before: int = 0
    after: int = 0
    value: float | None = 0.0

    def __post_init__(self) -> None:
        if self.before < 0 or self.after < 0:
            raise LayoutError("pad: before and after are 0 or more")

    @property
    def moves(self) -> bool:  # type: ignore[override]
        """Zero is the code 0 in every dtype; other values have to be encoded."""
        return not self.value

    @property
    def partial(self) -> bool:  # type: ignore[override]
        """Whether nobody knows what the new places hold."""
        return self.value is None and self.before + self.after > 0

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        axis = axis_of(self.axis, array.ndim, self.word)
        width = [(0, 0)] * array.ndim
        width[axis] = (self.before, self.after)
        return np.pad(array, width, constant_values=array.dtype.type(self.value or 0))

    def known(self, masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
        return [replace(self, value=float(self.value is not None)).one(mask) for mask in masks]

    def one_shape(self, shape: Shape) -> Shape:
        axis = axis_of(self.axis, len(shape), self.word)
        return (*shape[:axis], self.before + shape[axis] + self.after, *shape[axis + 1 :])

    def one_flat(self, shape: Shape) -> list[Segment] | None:
        axis = axis_of(self.axis, len(shape), self.word)
        if self.value is not None or not outer(shape, axis):
            return None
        width = math.prod(shape[axis + 1 :])
        found = [(NOTHING, 0, self.before * width), (0, 0, math.prod(shape)), (NOTHING, 0, self.after * width)]
        return [f for f in found if f[2] > f[1]]

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        return (Slice(self.axis, self.before, -self.after or None, value=self.value),)

    def inside(self, dimensions: int) -> Pad | None:
        axis = axis_of(self.axis, dimensions, self.word)
        return replace(self, axis=axis - 1) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        given = {"axis": self.axis, "before": self.before, "after": self.after}
        return {self.word: given if self.value == 0 else {**given, "value": self.value}}


def _run_text(run: Run) -> int | str:
    if isinstance(run, int):
        return run
    start, stop, step = run
    return f"{start}:{stop}" if step == 1 else f"{start}:{stop}:{step}"
