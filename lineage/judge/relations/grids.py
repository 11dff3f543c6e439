"""Do a matrix' values stand on a grid that quantising leaves: few codes a block, even steps, or short floats?

A grid is recognised from one side's values alone, in the layout in which that side stores them: blocks follow each
other along the rows (or through them), and each has a scale of its own. What a grid says of A and B together is left
to the relations and the direction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["Grid", "find_grid"]

Floats = NDArray[np.floating[Any]]

#: block lengths of the common formats; a row and the whole tensor come before them, parts of a row after them
BLOCKS = (256, 128, 64, 32, 16)
#: parts into which a row may be cut where none of these lengths divides it
PARTS = (2, 3, 4, 6, 8, 12)
#: codes of the formats with a table or a zero point of their own (4, 3 and 2 bits)
CODES = ((4, 16), (3, 8), (2, 4))
#: values other than zero that a block must have for each code: chance repeats one value in 20 in bf16
ROOM = 1.4
#: levels of the common integer formats: bits and the greatest code
LEVELS = ((4, 7), (4, 8), (8, 127), (8, 128), (3, 3), (3, 4), (5, 15), (5, 16), (6, 31), (6, 32), (2, 1), (2, 2))
#: greatest codes that are tried where a zero point keeps the largest value off the top
UNTIED = range(4, 64)
#: ... and those of a whole tensor in 8 bits of which only the beginning is known
PARTIAL = range(40, 127)
#: short floats: bits of the whole and of the mantissa (E4M3, E5M2, E2M1)
SHORT = ((8, 3), (8, 2), (4, 1))
#: share of a block's greatest value down to which short floats have all bits of their mantissa
NORMAL = {8: 2.0**-6, 4: 0.16}
#: mean distance to the next code, in steps: uniform values give 0.25, int8 stored as bf16 0.02
OFF_GRID = 0.08
#: values off zero that such a mean must rest on
FEWEST = 64
#: what storage may move a code by, in steps of a short float (bf16 moves it and the greatest by 0.03 each), and the
#: share of codes that keep to it
MOVED, KEPT = 0.08, 0.97
#: values of full precision that a block of short floats must have on average
FULL = 12
#: values of a block, and blocks, that are looked at
LONGEST, MOST_BLOCKS = 4096, 64


class Grid(msgspec.Struct, frozen=True):
    """A grid on which values stand.

    Attributes
    ----------
    bits : of a code
    block : values that share a scale; 0 for a row, -1 for the whole tensor
    kind : `steps` of one size, `codes` of any, `floats` with few bits
    top : greatest code where it is tied to the greatest value, else 0
    """

    bits: int
    block: int
    kind: str = "steps"
    top: int = 0

    def __str__(self) -> str:
        where = {0: "rows", -1: "whole matrices"}.get(self.block, f"blocks of {self.block}")
        what = {"steps": f"{self.bits}-bit lattices", "codes": f"{self.bits}-bit codes"}
        return f"{what.get(self.kind, f'{self.bits}-bit floats')} by {where}"

    def rounds(self, fine: Floats, coarse: Floats) -> float:
        """Share of values of `fine` that lie within a step of `coarse`, which stands on this grid."""
        x, y = (_cut(values, self.block) for values in (fine, coarse))
        if self.kind == "codes":
            step = _gaps(y)
        elif self.kind == "floats":
            mantissa = next(bits for total, bits in SHORT if total == self.bits)
            most = np.abs(y).max(axis=1, keepdims=True)
            step = np.exp2(np.floor(np.log2(np.maximum(np.abs(y), most * 2.0**-13 + 1e-38))) - mantissa)
        else:
            step = np.abs(y).max(axis=1, keepdims=True) / (self.top or 2 ** (self.bits - 1))
        return float(np.mean(np.abs(x - y) <= step * (1 + 1e-3)))


def find_grid(values: Floats) -> Grid | None:
    """The grid on which values stand, or None.

    Parameters
    ----------
    values : (rows, columns), the beginning of a tensor as it is stored

    Notes
    -----
    The step of a lattice is the largest value of a block over its greatest code. Distances are taken at codes up to
    16, where storage in bf16 moves a value by less than a tenth of a step.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> w = rng.standard_normal((64, 64)).astype(np.float32)
    >>> step = np.abs(w).max(axis=1, keepdims=True) / 127
    >>> print(find_grid(np.round(w / step) * step), find_grid(w))
    8-bit lattices by rows None
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.size < FEWEST:
        return None
    cut = {block: _filled(_cut(values, block)) for block in _lengths(values.shape[1])}
    cut = {block: blocks for block, blocks in cut.items() if blocks.size}
    fits = [
        (bits, -blocks.shape[1], off, Grid(bits, block, "steps", top))
        for block, blocks in cut.items()
        for bits, top, off in _stepped(blocks, whole=block < 0)
        if off < OFF_GRID
    ]
    if fits:  # codes of few bits stand on finer lattices as well, and parts of blocks on that of the whole
        return min(fits, key=lambda fit: fit[:3])[3]
    for block, blocks in cut.items():
        found = _coded(blocks, block) or _short(blocks, block)
        if found is not None:
            return found
    return None


def _lengths(columns: int) -> Iterator[int]:
    """Block lengths to try: the whole, a row, the common ones, parts of a row."""
    yield -1
    yield 0
    yield from (block for block in BLOCKS if block != columns)
    yield from (columns // n for n in PARTS if columns % n == 0 and columns // n >= 16 and columns // n not in BLOCKS)


def _cut(values: Floats, block: int) -> Floats:
    """The values as (blocks, values of a block); a last part that fills no block is left out."""
    flat = values.reshape(-1)
    length = len(flat) if block < 0 else block or values.shape[1]
    count = len(flat) // length
    return np.asarray(flat[: count * length].reshape(count, length), np.float64)


def _filled(blocks: Floats) -> Floats:
    """Some blocks that are not all zero."""
    blocks = blocks[:MOST_BLOCKS]
    return np.asarray(blocks[(blocks != 0).any(axis=1)])


def _stepped(blocks: Floats, *, whole: bool) -> Iterator[tuple[int, int, float]]:
    """Bits, greatest code (0: no fixed one) and mean distance to the next code, for each format that may fit.

    Of a `whole` tensor only the beginning is known, so the greatest value may stand below the greatest code.
    """
    most = np.abs(blocks).max(axis=1, keepdims=True)
    different = max(_different(np.abs(one[:LONGEST])) for one in blocks[:4])
    for bits, top in (*LEVELS, *((8, top) for top in PARTIAL)) if whole else LEVELS:
        if different > top:
            continue
        codes = np.abs(blocks) * (top / most)
        small = (codes < min(16.5, top - 0.4)) & (blocks != 0)
        zeros = float(np.mean((codes < 0.4) & (blocks != 0)))
        off = np.abs(codes - np.round(codes))[small & (codes > 0.4)]
        if len(off) >= FEWEST and zeros < 0.02:
            yield bits, top, float(off.mean())
    if not whole and blocks.shape[1] <= max(BLOCKS) and different <= UNTIED.stop:
        yield from _untied(blocks, most)


def _untied(blocks: Floats, most: Floats) -> Iterator[tuple[int, int, float]]:
    """The same where each block has a greatest code of its own."""
    if (blocks != 0).sum() < FEWEST:
        return
    tops = np.array(UNTIED)
    codes = blocks[:, None, :] * (tops[None, :, None] / most[:, :, None])
    inner = (np.abs(codes) > 0.4) & (np.abs(codes) < tops[None, :, None] - 0.4)
    off = np.where(inner, np.abs(codes - np.round(codes)), 0.0).sum(axis=2) / np.maximum(inner.sum(axis=2), 1)
    off = np.where((inner.sum(axis=2) >= 8) & ~((np.abs(codes) <= 0.4) & (codes != 0)).any(axis=2), off, 0.25)
    chosen = off.argmin(axis=1)
    low = off[np.arange(len(off)), chosen] < OFF_GRID
    if low.mean() >= KEPT:
        span = (blocks.max(axis=1) - blocks.min(axis=1)) * tops[chosen] / most[:, 0]
        bits = int(np.ceil(np.log2(np.quantile(np.round(span), 0.9) + 1)))
        yield bits, 0, float(off[np.arange(len(off)), chosen].mean())


def _coded(blocks: Floats, block: int) -> Grid | None:
    """Few different values in every block."""
    counts = [(_different(one), int(np.count_nonzero(one))) for one in blocks[:, :LONGEST]]
    codes, filled = max(c for c, _ in counts), float(np.mean([n for _, n in counts]))
    if len(counts) * filled < FEWEST:
        return None
    for bits, most in reversed(CODES):
        if codes <= most and filled >= ROOM * most:
            return Grid(bits, block, "codes")
    return None


def _different(values: Floats) -> int:
    """How many different values there are beside zero."""
    return len(np.unique(values[values != 0]))


def _short(blocks: Floats, block: int) -> Grid | None:
    """Mantissas of few bits, whatever number of the format the greatest value of a block is."""
    most = np.abs(blocks).max(axis=1, keepdims=True)
    for bits, mantissa in reversed(SHORT):
        normal = np.abs(blocks) >= NORMAL[bits] * most * (1 + 1e-6)
        if normal.sum() < FEWEST or normal.sum(axis=1).mean() < FULL:
            continue
        best = np.zeros(len(blocks))
        for greatest in 1 + np.arange(2**mantissa) / 2**mantissa:
            codes = np.frexp(np.abs(blocks) * (greatest / most))[0] * 2 ** (mantissa + 1)
            kept = (np.abs(codes - np.round(codes)) < MOVED) & normal
            best = np.maximum(best, kept.sum(axis=1) / np.maximum(normal.sum(axis=1), 1))
        if float(best.mean()) >= KEPT:
            return Grid(bits, block, "floats")
    return None


def _gaps(blocks: Floats) -> Floats:
    """For each value the distance to the next different one of its block, whichever is further."""
    result = np.empty_like(blocks)
    for at, one in enumerate(blocks):
        codes, place = np.unique(one, return_inverse=True)
        gaps = np.diff(codes)
        if not len(gaps):
            result[at] = np.inf
            continue
        after, before = np.append(gaps, gaps[-1]), np.insert(gaps, 0, gaps[0])
        result[at] = np.maximum(after, before)[place]
    return result
