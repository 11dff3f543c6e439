"""Einops patterns as index maps: parsed once, applied as views, inverted and measured without any data.

The grammar is that of `einops.rearrange`: names, groups in parentheses, `1` and `()` for an axis of length one,
`...` for any further axes. Nothing is repeated or reduced, so that every pattern has an inverse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["LayoutError", "OpenSize", "Pattern", "Shape", "parse_pattern"]

Shape = tuple[int, ...]
Side = tuple[tuple[str, ...], ...]

_TOKEN = re.compile(r"\s*(\.\.\.|[()]|[^\s()]+)")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_REST = ("...",)


class LayoutError(ValueError):
    """An operation that does not fit the arrays it is given; the message is for the user."""


class OpenSize(LayoutError):
    """A pattern that needs the length of an axis to be said.

    Parameters
    ----------
    names : axes of one group whose lengths are open
    product : what they make together, 0 where the known ones do not divide the group
    """

    def __init__(self, message: str, names: tuple[str, ...], product: int) -> None:
        super().__init__(message)
        self.names, self.product = names, product


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: for each side the groups of axis names, in order.

    Attributes
    ----------
    left, right : one tuple of names for each axis; `()` is an axis of length one, `("...",)` the rest
    """

    left: Side
    right: Side

    def __str__(self) -> str:
        return f"{_text(self.left)} -> {_text(self.right)}"

    @property
    def names(self) -> frozenset[str]:
        """Axis names, without the ellipsis."""
        return frozenset(name for group in self.left for name in group if name != "...")

    def inverse(self) -> Pattern:
        """The pattern that undoes this one.

        Examples
        --------
        >>> str(parse_pattern("(h d) k -> k h d").inverse())
        'k h d -> (h d) k'
        """
        return Pattern(self.right, self.left)

    def renamed(self, names: Mapping[str, str]) -> Pattern:
        """The same pattern with other names for some axes."""
        left, right = (
            tuple(tuple(names.get(n, n) for n in group) for group in side) for side in (self.left, self.right)
        )
        return Pattern(left, right)

    def _plain(self, shape: Shape) -> tuple[Side, Side]:
        """Both sides with the ellipsis spelt out for an array of this shape."""
        extra = len(shape) - len(self.left)
        if _REST in self.left:
            rest = tuple((f"_{i}",) for i in range(extra + 1))
            left, right = (_spelt(side, rest) for side in (self.left, self.right))
            if extra >= -1:
                return left, right
        elif extra == 0:
            return self.left, self.right
        raise LayoutError(f'"{self}" takes {len(self.left)} axes, the shape {list(shape)} has {len(shape)}')

    def _lengths(self, left: Side, shape: Shape, sizes: Mapping[str, int]) -> dict[str, int]:
        """Length of every axis name."""
        found: dict[str, int] = {}
        for group, length in zip(left, shape, strict=True):
            unknown = [n for n in group if n not in sizes]
            known = math.prod(sizes[n] for n in group if n in sizes)
            found.update((n, sizes[n]) for n in group if n in sizes)
            if len(unknown) > 1:
                product = length // known if known and length % known == 0 else 0
                raise OpenSize(f'"{self}": give a size for {" or ".join(unknown)}', tuple(unknown), product)
            if unknown and known and length % known == 0:
                found[unknown[0]] = length // known
            elif unknown or known != length:
                raise LayoutError(
                    f'"{self}": ({" ".join(group)}) does not fit a length of {length}'
                    + "".join(f", {n} = {sizes[n]}" for n in group if n in sizes)
                )
        return found

    def lengths(self, shape: Shape, sizes: Mapping[str, int]) -> dict[str, int]:
        """Length of every axis that the pattern names, for an array of `shape`.

        Raises
        ------
        OpenSize : the shape and the sizes do not say it
        LayoutError : the pattern does not fit
        """
        return self._lengths(self._plain(shape)[0], shape, sizes)

    def shape(self, shape: Shape, sizes: Mapping[str, int]) -> Shape:
        """Shape of the result for an array of `shape`.

        Raises
        ------
        LayoutError : the pattern does not fit, or leaves a length open
        """
        left, right = self._plain(shape)
        found = self._lengths(left, shape, sizes)
        return tuple(math.prod(found[n] for n in group) for group in right)

    def apply(self, array: NDArray[Any], sizes: Mapping[str, int]) -> NDArray[Any]:
        """The array rearranged; a view where NumPy can give one.

        Raises
        ------
        LayoutError : the pattern does not fit, or leaves a length open
        """
        left, right = self._plain(array.shape)
        found = self._lengths(left, array.shape, sizes)
        before = [n for group in left for n in group]
        after = [n for group in right for n in group]
        split = array.reshape([found[n] for n in before])
        if before != after:
            split = np.transpose(split, [before.index(n) for n in after])
        return split.reshape([math.prod(found[n] for n in group) for group in right])

    def keeps_order(self, shape: Shape, sizes: Mapping[str, int]) -> bool:
        """Whether the elements stay in C order for an array of `shape`, so that only the shape changes."""
        left, right = self._plain(shape)
        found = self._lengths(left, shape, sizes)
        before, after = ([n for group in side for n in group if found[n] != 1] for side in (left, right))
        return before == after or math.prod(shape) == 0


@lru_cache(maxsize=4096)
def parse_pattern(text: str) -> Pattern:
    """The pattern that `text` spells.

    Raises
    ------
    LayoutError : not a pattern of `einops.rearrange`

    Examples
    --------
    >>> parse_pattern("(h  d) k 1->k h d")
    Pattern(left=(('h', 'd'), ('k',), ()), right=(('k',), ('h',), ('d',)))
    """
    sides = text.split("->")
    if len(sides) != 2:
        raise LayoutError(f'"{text}" is no einops pattern: one "->" is needed')
    left, right = (_side(side, text) for side in sides)
    names = [sorted(n for group in side for n in group) for side in (left, right)]
    for side in names:
        twice = {n for n in side if side.count(n) > 1}
        if twice:
            raise LayoutError(f'"{text}" is no einops pattern: {min(twice)} stands twice on one side')
    if names[0] != names[1]:
        odd = min(set(names[0]) ^ set(names[1]))
        raise LayoutError(f'"{text}" is no einops pattern: {odd} stands on one side only')
    return Pattern(left, right)


def _side(text: str, whole: str) -> Side:
    """Groups of one side."""
    groups: list[tuple[str, ...]] = []
    opened: list[str] | None = None
    for token in _TOKEN.findall(text):
        if token == "(" and opened is None:
            opened = []
        elif token == ")" and opened is not None:
            groups.append(tuple(opened))
            opened = None
        elif token == "1":
            if opened is None:
                groups.append(())
        elif token == "..." and opened is None:
            groups.append(_REST)
        elif not _NAME.fullmatch(token) or token.endswith("_"):
            raise LayoutError(f'"{whole}" is no einops pattern: unexpected "{token}"')
        elif opened is not None:
            opened.append(token)
        else:
            groups.append((token,))
    if opened is not None:
        raise LayoutError(f'"{whole}" is no einops pattern: a parenthesis stays open')
    return tuple(groups)


def _spelt(side: Side, rest: Side) -> Side:
    return tuple(g for group in side for g in (rest if group == _REST else (group,)))


def _text(side: Side) -> str:
    return " ".join("1" if not g else g[0] if len(g) == 1 else f"({' '.join(g)})" for g in side)
