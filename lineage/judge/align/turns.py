"""What one index space went through between A and B (order, signs, scales, a new basis), as arrays and operations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.layout.operations import Concat, Data, Each, Matmul, Operation, Scale, Split, Take

__all__ = ["Turn", "along", "identity"]

Floats = NDArray[np.floating[Any]]

#: a scale this near to 1 in every unit is none
PLAIN = 1e-9


class Turn(msgspec.Struct, frozen=True, dict=True, kw_only=True):
    """Units of B as made of units of A: chosen, then scaled, then mixed by equal blocks.

    Attributes
    ----------
    length : units of A
    take : A's unit for each unit of B, None for the same order
    scale : factor of each unit of B after that, None for 1
    blocks : square matrices along the diagonal after that, or a single one (rows: B's units); none leaves all as is
    orthogonal : the blocks' inverses are their transposes

    Notes
    -----
    Tensors that write into the space are turned by this; tensors that read from it by the inverse transpose (`dual`),
    so that products through the space stay what they are.
    """

    length: int
    take: NDArray[np.intp] | None = None
    scale: Floats | None = None
    blocks: tuple[Floats, ...] = ()
    orthogonal: bool = False

    @property
    def units(self) -> int:
        """Units of B."""
        if self.blocks:
            return sum(len(block) for block in self.blocks)
        return self.length if self.take is None else len(self.take)

    @property
    def moved(self) -> int:
        """Units of B that stand elsewhere than in A."""
        return 0 if self.take is None else int(np.count_nonzero(self.take != np.arange(len(self.take))))

    @property
    def plain(self) -> bool:
        """True where nothing happened."""
        return (
            self.units == self.length
            and not self.moved
            and not self.blocks
            and (self.scale is None or bool(np.all(np.abs(self.scale - 1.0) < PLAIN)))
        )

    @cached_property
    def _dual(self) -> Turn:
        scale = None if self.scale is None else 1.0 / self.scale
        blocks = self.blocks if self.orthogonal else tuple(np.linalg.inv(block).T for block in self.blocks)
        return Turn(length=self.length, take=self.take, scale=scale, blocks=blocks, orthogonal=self.orthogonal)

    def side(self, dual: bool) -> Turn:
        """The turn for tensors that write into the space, or (`dual`) for those that read from it."""
        return self._dual if dual else self

    def over(self, array: Floats, axis: int) -> Floats:
        """The array with one axis turned."""
        result = np.moveaxis(array, axis, 0)
        if self.take is not None:
            result = result[self.take]
        if self.scale is not None:
            result = result * self.scale.astype(result.dtype).reshape(-1, *[1] * (result.ndim - 1))
        if len(self.blocks) == 1:
            result = np.tensordot(self.blocks[0].astype(result.dtype), result, (1, 0))
        elif self.blocks:
            parts = np.split(result, np.cumsum([block.shape[1] for block in self.blocks])[:-1])
            turned = [
                np.tensordot(block.astype(result.dtype), part, (1, 0))
                for block, part in zip(self.blocks, parts, strict=True)
            ]
            result = np.concatenate(turned)
        return np.moveaxis(result, 0, axis)

    def operations(self, axis: int, dimensions: int) -> tuple[Operation, ...]:
        """The same as layout operations on an array of so many dimensions.

        Raises
        ------
        ValueError : a basis along an axis that is neither the first nor the last
        """
        ops: list[Operation] = []
        if self.take is not None and (self.moved or len(self.take) != self.length):
            ops.append(Take(axis, self.take.astype(np.int64), self.length))
        if self.scale is not None and np.any(np.abs(self.scale - 1.0) >= PLAIN):
            ops.append(Scale(Data(self.scale), axis))
        if self.blocks:
            products = self._products(axis, dimensions)
            sizes, made = zip(*(block.shape[::-1] for block in self.blocks), strict=True)
            parted = (Split(axis, sizes=sizes), Each(dict(enumerate(products))), Concat(axis, made))
            ops += products if len(products) == 1 else parted
        return tuple(ops)

    def _products(self, axis: int, dimensions: int) -> list[Operation]:
        """One product a block; every tensor shares the arrays."""
        if axis not in (0, dimensions - 1):
            raise ValueError(f"a basis along axis {axis} of {dimensions}")
        if axis == 0:
            return [Matmul("left", data) for data in self._left]
        return [Matmul("right", data) for data in self._right]

    @cached_property
    def _left(self) -> list[Data]:
        return [Data(block) for block in self.blocks]

    @cached_property
    def _right(self) -> list[Data]:
        return [Data(block.T) for block in self.blocks]


def identity(length: int) -> Turn:
    """The turn of a space in which nothing happened."""
    return Turn(length=length)


def along(axis: int, dimensions: int, parts: Sequence[Turn]) -> tuple[Operation, ...]:
    """Operations for an axis on which several spaces stand one after the other."""
    chains = {k: part.operations(axis, dimensions) for k, part in enumerate(parts)}
    chains = {k: chain for k, chain in chains.items() if chain}
    if not chains:
        return ()
    if len(parts) == 1:
        return chains[0]
    return (
        Split(axis, sizes=tuple(part.length for part in parts)),
        Each(chains),
        Concat(axis, tuple(part.units for part in parts)),
    )
