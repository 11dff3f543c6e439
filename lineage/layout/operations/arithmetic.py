"""Operations that change values: `scale`, `add`, `cast`, `matmul`. They see decoded values, never codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE, decode, encode
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.operations.base import Operation, Rows, Single, axis_of
from lineage.layout.operations.data import Data

__all__ = ["Add", "Cast", "Matmul", "Scale"]

#: a matrix whose product with its transpose is this near to the identity is undone by its transpose
ORTHOGONAL = 1e-6


@dataclass(frozen=True)
class _Constant(Single):
    """A number for all elements, or a vector along an axis.

    Attributes
    ----------
    by : the number, or the vector as `Data`
    axis : the vector's axis, None for a number
    """

    moves: ClassVar[bool] = False
    by: float | Data
    axis: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.by, Data):
            if self.axis is None or self.by.array.ndim != 1:
                raise LayoutError(f"{self.word}: a vector needs an axis, and one axis only")
        else:
            object.__setattr__(self, "by", float(self.by))
            if self.axis is not None or not np.isfinite(self.by):
                raise LayoutError(f"{self.word}: a finite number without axis, or a vector with one")

    @property
    def pointwise(self) -> bool:  # type: ignore[override]
        """Whether the operand is one number."""
        return not isinstance(self.by, Data)

    def _operand(self, shape: Shape) -> NDArray[Any] | float:
        if not isinstance(self.by, Data):
            return self.by
        axis = axis_of(self.axis or 0, len(shape), self.word)
        if len(self.by.array) != shape[axis]:
            raise LayoutError(f"{self.word}: {len(self.by.array)} values for axis {axis} of {shape[axis]}")
        return self.by.array.reshape([-1 if k == axis else 1 for k in range(len(shape))])

    def one_shape(self, shape: Shape) -> Shape:
        self._operand(shape)
        return shape

    def rows(self, start: int, stop: int, shape: Shape) -> tuple[Operation | None, Rows] | None:
        if isinstance(self.by, Data) and axis_of(self.axis or 0, len(shape), self.word) == 0:
            return replace(self, by=Data(self.by.array[start:stop])), range(start, stop)
        return self, range(start, stop)

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        if not isinstance(self.by, Data):
            return {self.word: self.by}
        key = f"{self.word}-{self.by.key}"
        data[key] = self.by.array
        return {self.word: {"axis": self.axis, "file": key}}


class Scale(_Constant):
    """Every element times a number, or times the entry of a vector along an axis."""

    word: ClassVar[str] = "scale"

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        return _back(array.astype(np.float64) * self._operand(array.shape), array.dtype)

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        if not np.all(self.by.array if isinstance(self.by, Data) else self.by):
            raise LayoutError("scale: by 0 cannot be undone")
        return (Scale(Data(1.0 / self.by.array) if isinstance(self.by, Data) else 1.0 / self.by, self.axis),)


class Add(_Constant):
    """Every element plus a number, or plus the entry of a vector along an axis."""

    word: ClassVar[str] = "add"

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        return _back(array.astype(np.float64) + self._operand(array.shape), array.dtype)

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        return (Add(Data(-self.by.array) if isinstance(self.by, Data) else -self.by, self.axis),)


@dataclass(frozen=True)
class Cast(Single):
    """Every value rounded to another dtype.

    Attributes
    ----------
    to : dtype word of `lineage.checkpoint.dtypes.STORAGE`

    Notes
    -----
    The inverse keeps the rounded values: what was lost does not come back.
    """

    word: ClassVar[str] = "cast"
    moves: ClassVar[bool] = False
    pointwise: ClassVar[bool] = True
    to: str

    def __post_init__(self) -> None:
        if self.to not in STORAGE:
            raise LayoutError(f"cast: no dtype {self.to}")

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        return decode(encode(array, self.to), self.to)

    def one_shape(self, shape: Shape) -> Shape:
        return shape

    def dtype(self, word: str) -> str:
        return self.to

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        return ()

    def inside(self, dimensions: int) -> Cast:
        return self

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        return {self.word: self.to}


@dataclass(frozen=True)
class Matmul(Single):
    """A matrix applied to the first axis from the left, or to the last from the right.

    Attributes
    ----------
    side : `left` (matrix · W over the first axis) or `right` (W · matrix over the last)
    matrix : two axes
    """

    word: ClassVar[str] = "matmul"
    moves: ClassVar[bool] = False
    side: Literal["left", "right"]
    matrix: Data

    def __post_init__(self) -> None:
        if self.matrix.array.ndim != 2:
            raise LayoutError(f"matmul: a matrix has two axes, this one {self.matrix.array.ndim}")

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        self.one_shape(array.shape)
        wide, matrix = array.astype(np.float64), self.matrix.array
        product = np.tensordot(matrix, wide, (1, 0)) if self.side == "left" else np.tensordot(wide, matrix, (-1, 0))
        return _back(product, array.dtype)

    def known(self, masks: Sequence[NDArray[np.bool_]]) -> list[NDArray[np.bool_]]:
        # every element is a sum over an axis: one unknown place spoils it
        return [np.full(self.one_shape(mask.shape), mask.all()) for mask in masks]

    def one_shape(self, shape: Shape) -> Shape:
        rows, columns = self.matrix.array.shape
        inner, length = (columns, shape[:1]) if self.side == "left" else (rows, shape[-1:])
        if length != (inner,):
            raise LayoutError(f"matmul: a {rows} by {columns} matrix from the {self.side} does not fit {list(shape)}")
        return (rows, *shape[1:]) if self.side == "left" else (*shape[:-1], columns)

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        matrix = self.matrix.array.astype(np.float64)
        rows, columns = matrix.shape
        if rows != columns:
            raise LayoutError(f"matmul: a {rows} by {columns} matrix cannot be undone")
        if np.allclose(matrix @ matrix.T, np.eye(rows), atol=ORTHOGONAL):
            return (Matmul(self.side, Data(matrix.T)),)
        try:
            return (Matmul(self.side, Data(np.linalg.inv(matrix))),)
        except np.linalg.LinAlgError as exc:
            raise LayoutError("matmul: a singular matrix cannot be undone") from exc

    def rows(self, start: int, stop: int, shape: Shape) -> tuple[Operation | None, Rows] | None:
        if self.side == "left":
            return Matmul("left", Data(self.matrix.array[start:stop])), range(shape[0])
        return (self, range(start, stop)) if len(shape) > 1 else None

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        key = f"matmul-{self.matrix.key}"
        data[key] = self.matrix.array
        return {self.word: {"side": self.side, "file": key}}


def _back(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in the dtype that they came in, integers rounded."""
    return (values if dtype.kind == "f" else np.rint(values)).astype(dtype)
