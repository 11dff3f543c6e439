"""What every layout operation answers: apply, inverse, shape rule, contiguous moves and its text form.

An operation takes a list of arrays and gives a list. Operations that only move elements (`moves`) work on stored
codes of any dtype, bit for bit; the others work on decoded values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError, Shape

__all__ = ["NOTHING", "Operation", "Rows", "Segment", "Single", "axis_of", "outer"]

#: input index of a segment whose elements nobody knows
NOTHING = -1
#: (input, start, stop): a flat range of one input, in C order
Segment = tuple[int, int, int]
#: places along the first axis
Rows = Sequence[int]


class Operation(ABC):
    """One step of a chain.

    Attributes
    ----------
    word : its name in a mapping file
    moves : it only says from where each element comes
    single : it acts on each array of the list by itself
    pointwise : each element depends on the same element of one array only, wherever it stands
    partial : it leaves places that nobody knows
    gathers : with `over`, it collapses the list over a placeholder (otherwise it makes one)
    over : placeholder whose list it collapses or makes, None where it acts on the chain's own list
    """

    word: ClassVar[str]
    moves: ClassVar[bool] = True
    single: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False
    partial: ClassVar[bool] = False
    gathers: ClassVar[bool] = False
    over: str | None

    @abstractmethod
    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """The arrays after this step; inputs are never modified, results may be views of them.

        Raises
        ------
        LayoutError : the arrays do not fit
        """

    @abstractmethod
    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        """Shapes of what `apply` gives for arrays of these shapes.

        Raises
        ------
        LayoutError : the shapes do not fit
        """

    @abstractmethod
    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        """The step that undoes this one.

        Parameters
        ----------
        count : arrays that this step takes, None where not known
        lengths : number of values of each placeholder

        Raises
        ------
        LayoutError : it cannot be undone
        """

    def arity(self, count: int | None) -> int | None:
        """Arrays that come out for `count` arrays, None where that depends on shapes."""
        return count

    def dtype(self, word: str) -> str:
        """Dtype word of the results for inputs of the dtype `word`."""
        return word

    def known(self, masks: Sequence[NDArray[np.bool_]]) -> Sequence[NDArray[np.bool_]]:
        """Which places of each result somebody knows, from the places of each input that somebody knows."""
        return self.apply(masks) if self.moves else masks

    def flat(self, shapes: Sequence[Shape]) -> list[list[Segment]] | None:
        """Each result as few flat ranges of the inputs, or None where elements are interleaved."""
        del shapes
        return None

    def inside(self, dimensions: int) -> Operation | None:
        """The operation that does the same to each slice of the first axis, or None where slices mix.

        Parameters
        ----------
        dimensions : axes of each input
        """
        del dimensions
        return None

    def rows(self, start: int, stop: int, shape: Shape) -> tuple[Operation | None, Rows] | None:
        """How rows [start, stop) of a result come from an input of this shape, None where all of it has to be made.

        Returns
        -------
        the operation that makes them (None: nothing is left to do) and the rows of the input that it acts on
        """
        return (self, range(start, stop)) if self.single and shape and self.inside(len(shape)) is not None else None

    @abstractmethod
    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        """The step as it stands in a mapping file: text, numbers, lists and dictionaries.

        Arrays too long for a line are put into `data`, and named.
        """


class Single(Operation):
    """An operation on each array by itself."""

    single = True
    over = None

    @abstractmethod
    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        """One array after this step."""

    @abstractmethod
    def one_shape(self, shape: Shape) -> Shape:
        """Shape of `one` for an array of this shape."""

    def one_flat(self, shape: Shape) -> list[Segment] | None:
        """The result of `one` as flat ranges of input 0, or None."""
        del shape
        return None

    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return [self.one(array) for array in arrays]

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return [self.one_shape(shape) for shape in shapes]

    def flat(self, shapes: Sequence[Shape]) -> list[list[Segment]] | None:
        found = [self.one_flat(shape) for shape in shapes]
        result = [
            [(k, a, b) if i != NOTHING else (i, a, b) for i, a, b in f] for k, f in enumerate(found) if f is not None
        ]
        return result if len(result) == len(found) else None


def axis_of(axis: int, dimensions: int, word: str) -> int:
    """`axis` counted from 0, for an array of so many dimensions.

    Raises
    ------
    LayoutError : there is no such axis
    """
    if not -dimensions <= axis < dimensions:
        raise LayoutError(f"{word}: no axis {axis} in an array of {dimensions} dimensions")
    return axis % dimensions


def outer(shape: Shape, axis: int) -> bool:
    """Whether every axis before `axis` has length one, so that cuts along it are contiguous."""
    return all(n == 1 for n in shape[:axis])
