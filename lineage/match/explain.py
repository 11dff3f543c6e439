"""From a sequence of row indices to the shortest chain of operations that makes it.

The side whose rows come from several tensors is the *whole*; its *parts* each lie in it as a strided box: the
digits of a part's row number, in some mixed radix, each move the row of the whole by a fixed stride. Boxes that
tile the whole, side by side or interleaved, are a concatenation between two einops patterns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Digit", "Part", "Strides", "Tiling", "factors", "strides", "tile"]


#: share of even steps inside runs (two right rows make one), and at the
#: borders of shorter runs, where next to none are even if the shorter run is the true one
EVEN_INSIDE, EVEN_AT_BORDERS = 0.5, 0.25
#: share of the known rows that digits must say right
LEAST_AGREEMENT = 0.5
#: pairs of rows said wrong that may follow each other by chance
MOST_FOLLOWING = 2


class Digit(NamedTuple):
    """One digit of a part's row number: how many values it takes and how far each moves in the whole."""

    size: int
    stride: int


class Strides(NamedTuple):
    """Rows of a part inside the whole: `offset` plus the digits' strides, most significant digit first."""

    digits: tuple[Digit, ...]
    offset: int
    agreement: float

    def rows(self) -> NDArray[np.int64]:
        """Row in the whole of every row of the part."""
        out = np.array([self.offset], np.int64)
        for digit in self.digits:
            out = (out[:, None] + np.arange(digit.size) * digit.stride).ravel()
        return out


class Part(NamedTuple):
    """A part's digits placed inside the interleaving: `outer` groups, `width` rows in each, from `start` on."""

    digits: tuple[Digit, ...]
    start: int
    width: int


class Tiling(NamedTuple):
    """Parts that fill `groups` x `width` rows without gap or overlap; `parts` in the order given, `order` by place."""

    groups: int
    width: int
    parts: tuple[Part, ...]
    order: tuple[int, ...]


def divisors(n: int) -> list[int]:
    """Divisors of n above 1, largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({d for s in small for d in (s, n // s)} - {1}, reverse=True)


def strides(sequence: NDArray[np.int64]) -> Strides | None:
    """Digits of a sequence of rows in which -1 is unknown and a minority may be wrong; None where there are none.

    Examples
    --------
    >>> strides(np.array([0, 2, 4, 1, 3, 5])).digits
    (Digit(size=2, stride=1), Digit(size=3, stride=2))
    """
    current = np.asarray(sequence, np.int64)
    if not len(current) or not (current >= 0).any():
        return None
    inner: list[Digit] = []
    while len(current) > 1:
        step = _run(current)
        if step is None:
            return None
        length, stride = step
        inner.append(Digit(length, stride))
        blocks = current.reshape(-1, length)
        bases = np.where(blocks >= 0, blocks - stride * np.arange(length), np.iinfo(np.int64).min)
        current = np.array([_mode(row[row > np.iinfo(np.int64).min], -1) for row in bases], np.int64)
        if (current < 0).all():
            return None
    digits: list[Digit] = []
    for digit in reversed(inner):
        if digits and digits[-1].stride == digit.size * digit.stride:
            digits[-1] = Digit(digits[-1].size * digit.size, digit.stride)
        else:
            digits.append(digit)
    found = Strides(tuple(digits), int(current[0]), 0.0)
    known = sequence >= 0
    wrong = known & (found.rows() != sequence)
    agreement = 1 - float(wrong.sum() / known.sum())
    if agreement <= LEAST_AGREEMENT or _another(sequence, wrong, digits[-1].stride if digits else 1):
        return None
    return found._replace(agreement=agreement)


def _another(sequence: NDArray[np.int64], wrong: NDArray[np.bool_], stride: int) -> bool:
    """Whether the rows that digits say wrong follow each other: not single errors, but another order."""
    pairs = wrong[1:] & wrong[:-1]
    return bool((np.diff(sequence)[pairs] == stride).sum() > MOST_FOLLOWING)


def _mode(values: NDArray[np.int64], default: int) -> int:
    if not len(values):
        return default
    if (values == values[0]).all():
        return int(values[0])
    found, counts = np.unique(values, return_counts=True)
    return int(found[counts.argmax()])


def _run(current: NDArray[np.int64]) -> tuple[int, int] | None:
    """The longest run length that divides the sequence and steps evenly within runs, with its step."""
    known = (current[1:] >= 0) & (current[:-1] >= 0)
    diff = np.diff(current)
    if not known.any():
        return None
    sizes = divisors(len(current))
    at = np.arange(len(diff))
    for length in sizes:
        inside = known & ((at + 1) % length != 0)
        if not inside.any():
            continue
        stride = _mode(diff[inside], 0)
        if stride == 0:
            continue
        good = diff == stride
        if good[inside].mean() <= EVEN_INSIDE:
            continue
        if all(_holds(good, inside, at, shorter) for shorter in sizes if shorter < length):
            return length, stride
    return None


def _holds(good: NDArray[np.bool_], inside: NDArray[np.bool_], at: NDArray[np.int64], shorter: int) -> bool:
    """True where the step also holds across the borders that shorter runs would have."""
    border = inside & ((at + 1) % shorter == 0)
    return not border.any() or bool(good[border].mean() > EVEN_AT_BORDERS)


def tile(parts: Sequence[Strides], rows: int) -> Tiling | None:
    """How strided parts fill `rows` rows: side by side, or interleaved group by group; None where they do not."""
    if not parts or any(d.stride < 1 for p in parts for d in p.digits):
        return None
    for groups in _groupings(parts, rows):
        width = rows // groups
        placed = []
        for part in parts:
            got = _place(part, groups, width)
            if got is None:
                break
            placed.append(got)
        else:
            order = sorted(range(len(placed)), key=lambda i: placed[i].start)
            at = 0
            for i in order:
                if placed[i].start != at:
                    break
                at += placed[i].width
            else:
                if at == width:
                    return Tiling(groups, width, tuple(placed), tuple(order))
    return None


def _groupings(parts: Sequence[Strides], rows: int) -> list[int]:
    """Group counts worth trying: none, then those that some part's strides suggest."""
    hints = {1}
    for part in parts:
        for digit in part.digits:
            if rows % digit.stride == 0 and digit.stride > 0:
                hints.add(rows // digit.stride)
    return sorted(h for h in hints if h >= 1)


def _place(part: Strides, groups: int, width: int) -> Part | None:
    """The part's digits split at the group border, where each group holds one unbroken window of it."""
    digits: list[Digit] = []
    for digit in part.digits:
        if digit.stride < width < digit.stride * digit.size:
            if width % digit.stride or digit.size % (width // digit.stride):
                return None
            within = width // digit.stride
            digits += [Digit(digit.size // within, width), Digit(within, digit.stride)]
        else:
            digits.append(digit)
    outer = math.prod(d.size for d in digits if d.stride >= width)
    inner = sorted((d for d in digits if d.stride < width), key=lambda d: d.stride)
    expected = 1
    for digit in inner:
        if digit.stride != expected:
            return None
        expected *= digit.size
    expected_outer = width
    for digit in sorted((d for d in digits if d.stride >= width), key=lambda d: d.stride):
        if digit.stride != expected_outer:
            return None
        expected_outer *= digit.size
    if outer != groups or part.offset >= width or part.offset + expected > width:
        return None
    return Part(tuple(digits), part.offset, expected)


def factors(*radices: Sequence[int]) -> list[tuple[int, ...]] | None:
    """Common refinement of several factorisations of one number, or None where the borders do not nest.

    Returns
    -------
    one tuple for each elementary factor, most significant first: its size, then its place in each radix

    Examples
    --------
    >>> factors((4, 6), (2, 12))
    [(2, 0, 0), (2, 0, 1), (6, 1, 1)]
    >>> factors((4, 3), (3, 4)) is None
    True
    """
    left = [[n for n in radix if n != 1] for radix in radices]
    index = [[i for i, n in enumerate(radix) if n != 1] for radix in radices]
    found: list[tuple[int, ...]] = []
    while any(left):
        if not all(left):
            return None
        size = min(radix[-1] for radix in left)
        if any(radix[-1] % size for radix in left):
            return None
        found.append((size, *(i[-1] for i in index)))
        for radix, place in zip(left, index, strict=True):
            radix[-1] //= size
            if radix[-1] == 1:
                radix.pop()
                place.pop()
    return found[::-1]
