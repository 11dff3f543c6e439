"""Rearrangement in einops words: transpose, reshape, interleave, all that keeps every element once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from lineage.layout.axes import Pattern, Shape, parse_pattern
from lineage.layout.operations.base import Operation, Rows, Segment, Single

__all__ = ["Rearrange"]


@dataclass(frozen=True)
class Rearrange(Single):
    """An einops pattern, applied to every array of the list.

    Attributes
    ----------
    pattern : as `einops.rearrange` takes it, kept in its shortest spelling
    sizes : known lengths of axes (a dictionary or pairs); only those that the pattern names are kept

    Examples
    --------
    >>> import numpy as np
    >>> Rearrange("(two d) k -> (d two) k", {"two": 2}).one(np.arange(4)[:, None]).ravel().tolist()
    [0, 2, 1, 3]
    """

    word: ClassVar[str] = "rearrange"
    pattern: str
    sizes: tuple[tuple[str, int], ...] = ()

    def __init__(self, pattern: str, sizes: Mapping[str, int] | tuple[tuple[str, int], ...] = ()) -> None:
        parsed = parse_pattern(pattern)
        kept = tuple(sorted((n, int(v)) for n, v in dict(sizes).items() if n in parsed.names))
        object.__setattr__(self, "pattern", str(parsed))
        object.__setattr__(self, "sizes", kept)

    @property
    def parsed(self) -> Pattern:
        """The pattern, parsed."""
        return parse_pattern(self.pattern)

    def one(self, array: NDArray[Any]) -> NDArray[Any]:
        return self.parsed.apply(array, dict(self.sizes))

    def one_shape(self, shape: Shape) -> Shape:
        return self.parsed.shape(shape, dict(self.sizes))

    def one_flat(self, shape: Shape) -> list[Segment] | None:
        return [(0, 0, math.prod(shape))] if self.parsed.keeps_order(shape, dict(self.sizes)) else None

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Rearrange]:
        return (Rearrange(str(self.parsed.inverse()), self.sizes),)

    def inside(self, dimensions: int) -> Rearrange | None:
        left, right = self.parsed.left, self.parsed.right
        if not left or left[:1] != right[:1] or len(left[0]) != 1 or left[0][0] == "...":
            return None
        return Rearrange(str(Pattern(left[1:], right[1:])), self.sizes)

    def rows(self, start: int, stop: int, shape: Shape) -> tuple[Operation, Rows] | None:
        if self.inside(len(shape)) is None:
            return None
        # the first axis keeps its name and loses its length
        sizes = tuple((name, size) for name, size in self.sizes if name != self.parsed.left[0][0])
        return Rearrange(self.pattern, sizes), range(start, stop)

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        return self.pattern
