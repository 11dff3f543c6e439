"""Arrays put together and taken apart: `concat` and `split`, `stack` and `unstack`.

Without `over` they act on the chain's own list (all arrays become one, one becomes several); with `over` on the list
over that placeholder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError, Shape
from lineage.layout.operations.base import Operation, Segment, axis_of, outer

__all__ = ["Concat", "Split", "Stack", "Unstack"]


@dataclass(frozen=True)
class Concat(Operation):
    """All arrays of the list joined along an axis.

    Attributes
    ----------
    axis : which, negative from the end
    sizes : lengths of the parts along it; needed for the inverse where they are unequal
    over : placeholder whose list is joined, None for the chain's own list
    """

    word: ClassVar[str] = "concat"
    gathers: ClassVar[bool] = True
    axis: int = 0
    sizes: tuple[int, ...] | None = None
    over: str | None = None

    def __post_init__(self) -> None:
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))

    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        self.shapes([a.shape for a in arrays])
        return [np.concatenate(arrays, axis=self.axis)]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        if not shapes:
            raise LayoutError("concat: no arrays")
        axis = axis_of(self.axis, len(shapes[0]), self.word)
        rest = {(s[:axis], s[axis + 1 :]) for s in shapes}
        if len(rest) > 1 or len({len(s) for s in shapes}) > 1:
            raise LayoutError(f"concat: along axis {axis} the shapes {_listed(shapes)} do not fit")
        found = tuple(s[axis] for s in shapes)
        if self.sizes is not None and found != self.sizes:
            raise LayoutError(f"concat: parts of {list(found)} along axis {axis}, expected {list(self.sizes)}")
        return [(*shapes[0][:axis], sum(found), *shapes[0][axis + 1 :])]

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        count = lengths.get(self.over) if self.over else count
        if self.sizes is None and count is None:
            raise LayoutError("concat: its inverse needs the parts; add sizes, or where for the placeholder")
        return (Split(self.axis, None if self.sizes else count, self.sizes, self.over),)

    def arity(self, count: int | None) -> int | None:
        return count if self.over else 1

    def flat(self, shapes: Sequence[Shape]) -> list[list[Segment]] | None:
        return _joined(shapes, axis_of(self.axis, len(shapes[0]), self.word))

    def inside(self, dimensions: int) -> Concat | None:
        axis = axis_of(self.axis, dimensions, self.word)
        return replace(self, axis=axis - 1, over=None) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        return _document(self, sizes=self.sizes)


@dataclass(frozen=True)
class Split(Operation):
    """One array cut along an axis, into equal parts or parts of given lengths.

    Attributes
    ----------
    axis : which, negative from the end
    parts : how many equal ones, or None
    sizes : their lengths, or None; exactly one of the two is given
    over : placeholder that numbers the parts, None where they are the chain's list
    """

    word: ClassVar[str] = "split"
    axis: int = 0
    parts: int | None = None
    sizes: tuple[int, ...] | None = None
    over: str | None = None

    def __post_init__(self) -> None:
        if (self.parts is None) == (self.sizes is None):
            raise LayoutError("split: give either parts or sizes")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", tuple(self.sizes))
        if (self.parts is not None and self.parts < 1) or self.sizes == ():
            raise LayoutError("split: at least one part is needed")

    def _cuts(self, shapes: Sequence[Shape]) -> tuple[int, tuple[int, ...]]:
        """Axis and lengths of the parts."""
        if len(shapes) != 1:
            raise LayoutError(f"split: takes one array, the list holds {len(shapes)}")
        axis = axis_of(self.axis, len(shapes[0]), self.word)
        length = shapes[0][axis]
        if self.sizes is not None:
            if sum(self.sizes) != length:
                raise LayoutError(f"split: {list(self.sizes)} add up to {sum(self.sizes)}, axis {axis} has {length}")
            return axis, self.sizes
        assert self.parts is not None
        if length % self.parts:
            raise LayoutError(f"split: axis {axis} of {length} does not divide into {self.parts} parts")
        return axis, (length // self.parts,) * self.parts

    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        axis, sizes = self._cuts([a.shape for a in arrays])
        return list(np.split(arrays[0], list(accumulate(sizes))[:-1], axis=axis))

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        axis, sizes = self._cuts(shapes)
        return [(*shapes[0][:axis], n, *shapes[0][axis + 1 :]) for n in sizes]

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        return (Concat(self.axis, self.sizes, self.over),)

    def arity(self, count: int | None) -> int | None:
        return count if self.over else self.parts or len(self.sizes or ())

    def flat(self, shapes: Sequence[Shape]) -> list[list[Segment]] | None:
        axis, sizes = self._cuts(shapes)
        if not outer(shapes[0], axis):
            return None
        width = math.prod(shapes[0][axis + 1 :])
        return [[(0, a * width, b * width)] for a, b in pairwise(accumulate(sizes, initial=0))]

    def inside(self, dimensions: int) -> Split | None:
        axis = axis_of(self.axis, dimensions, self.word)
        return replace(self, axis=axis - 1, over=None) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        return _document(self, parts=self.parts, sizes=self.sizes)


@dataclass(frozen=True)
class Stack(Operation):
    """All arrays of the list as one, along a new axis.

    Attributes
    ----------
    axis : place of the new axis in the result, negative from the end
    over : placeholder whose list is stacked, None for the chain's own list
    """

    word: ClassVar[str] = "stack"
    gathers: ClassVar[bool] = True
    axis: int = 0
    over: str | None = None

    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        self.shapes([a.shape for a in arrays])
        return [np.stack(arrays, axis=self.axis)]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        if len(set(shapes)) != 1:
            raise LayoutError(f"stack: the shapes {_listed(shapes)} are not equal" if shapes else "stack: no arrays")
        axis = axis_of(self.axis, len(shapes[0]) + 1, self.word)
        return [(*shapes[0][:axis], len(shapes), *shapes[0][axis:])]

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        return (Unstack(self.axis, self.over),)

    def arity(self, count: int | None) -> int | None:
        return count if self.over else 1

    def flat(self, shapes: Sequence[Shape]) -> list[list[Segment]] | None:
        return _joined(shapes, axis_of(self.axis, len(shapes[0]) + 1, self.word))

    def inside(self, dimensions: int) -> Stack | None:
        axis = axis_of(self.axis, dimensions + 1, self.word)
        return replace(self, axis=axis - 1, over=None) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        return _document(self)


@dataclass(frozen=True)
class Unstack(Operation):
    """One array as the list of its slices along an axis, which goes away.

    Attributes
    ----------
    axis : which, negative from the end
    over : placeholder that numbers the slices, None where they are the chain's list
    """

    word: ClassVar[str] = "unstack"
    axis: int = 0
    over: str | None = None

    def _axis(self, shapes: Sequence[Shape]) -> int:
        if len(shapes) != 1:
            raise LayoutError(f"unstack: takes one array, the list holds {len(shapes)}")
        return axis_of(self.axis, len(shapes[0]), self.word)

    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return list(np.moveaxis(arrays[0], self._axis([a.shape for a in arrays]), 0))

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(shapes)
        return [(*shapes[0][:axis], *shapes[0][axis + 1 :])] * shapes[0][axis]

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        return (Stack(self.axis, self.over),)

    def arity(self, count: int | None) -> int | None:
        return count if self.over else None

    def flat(self, shapes: Sequence[Shape]) -> list[list[Segment]] | None:
        axis = self._axis(shapes)
        if not outer(shapes[0], axis):
            return None
        width = math.prod(shapes[0][axis + 1 :])
        return [[(0, i * width, (i + 1) * width)] for i in range(shapes[0][axis])]

    def inside(self, dimensions: int) -> Unstack | None:
        axis = axis_of(self.axis, dimensions, self.word)
        return replace(self, axis=axis - 1, over=None) if axis else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        return _document(self)


def _joined(shapes: Sequence[Shape], axis: int) -> list[list[Segment]] | None:
    """Whole inputs one after the other, where nothing of length stands before the axis."""
    if not all(outer(s, axis) for s in shapes):
        return None
    return [[(k, 0, math.prod(s)) for k, s in enumerate(shapes)]]


def _document(operation: Concat | Split | Stack | Unstack, **more: Any) -> Any:
    """`{word: axis}` where that says all, else the word with its named arguments."""
    given = {k: list(v) if isinstance(v, tuple) else v for k, v in more.items() if v is not None}
    if operation.over:
        given["over"] = operation.over
    return {operation.word: {"axis": operation.axis, **given} if given else operation.axis}


def _listed(shapes: Sequence[Shape]) -> str:
    """The different shapes, few of them."""
    different = [str(list(s)) for s in dict.fromkeys(shapes)]
    return ", ".join(different[:4]) + (", …" if len(different) > 4 else "")
