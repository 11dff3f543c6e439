"""Tensors that are known by where their elements come from, before anything is read.

A `Lazy` is a shape and a list of flat ranges: of stored tensors, of computed ones, or of nothing (places that nobody
knows). Chains run over them (`laid_out`); operations that move contiguous ranges stay ranges, all others become a
computed tensor that knows its inputs.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import itemsize
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.operations.base import NOTHING, Operation

__all__ = ["Computed", "Lazy", "Merged", "Piece", "Stored", "known", "laid_out", "united", "widest"]

#: elements from which on a tensor is laid out slice by slice where the first axis allows it, and most such slices
LARGE = 1 << 22
MOST_SLICES = 256
#: a source, and its flat range
Piece = tuple["Stored | Computed | Merged | None", int, int]


class Stored:
    """A tensor of the source, as its file holds it, or decoded.

    Parameters
    ----------
    name : in the source
    word : dtype word of the values
    decoded : values, not codes, are wanted
    """

    __slots__ = ("decoded", "name", "word")
    partial = False

    def __init__(self, name: str, word: str, *, decoded: bool) -> None:
        self.name, self.word, self.decoded = name, word, decoded


class Computed:
    """One result of an operation that interleaves or changes elements.

    Parameters
    ----------
    op : the operation
    inputs : what it acts on
    output : which of its results
    shape : of that result
    decoded : it acts on values, not on codes
    """

    __slots__ = ("decoded", "inputs", "op", "output", "partial", "shape", "word")

    def __init__(self, op: Operation, inputs: Sequence[Lazy], output: int, shape: Shape, *, decoded: bool) -> None:
        self.op, self.inputs, self.output, self.shape, self.decoded = op, tuple(inputs), output, shape, decoded
        self.word = op.dtype(widest(i.word for i in inputs))
        self.partial = op.partial or any(i.partial for i in inputs)


class Merged:
    """A tensor put together from several that each know some of its places; the first that knows one gives it."""

    __slots__ = ("decoded", "parts", "shape", "word")
    partial = False

    def __init__(self, parts: Sequence[Lazy]) -> None:
        self.parts, self.shape = tuple(parts), parts[0].shape
        words = {p.word for p in parts}
        self.word, self.decoded = widest(words), len(words) > 1 or any(p.decoded for p in parts)


class Lazy:
    """A tensor as flat ranges of others, in C order.

    Parameters
    ----------
    shape : its shape
    pieces : ranges that add up to it; a source of None stands for places that nobody knows
    """

    __slots__ = ("_starts", "pieces", "shape")

    def __init__(self, shape: Shape, pieces: Sequence[Piece]) -> None:
        self.shape = shape
        self.pieces = tuple(pieces)
        self._starts: list[int] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def word(self) -> str:
        """Dtype word that holds every piece exactly."""
        return widest({source.word for source, _, _ in self.pieces if source is not None})

    @property
    def decoded(self) -> bool:
        """Whether the pieces are values, not codes."""
        return any(source.decoded for source, _, _ in self.pieces if source is not None)

    @property
    def partial(self) -> bool:
        """Whether some places may be unknown."""
        return any(source is None or source.partial for source, _, _ in self.pieces)

    def between(self, start: int, stop: int) -> Iterator[Piece]:
        """The pieces of the flat range [start, stop)."""
        if start == 0 and len(self.pieces) == 1:
            source, first, last = self.pieces[0]
            if first < min(last, first + stop):
                yield source, first, min(last, first + stop)
            return
        if self._starts is None:
            self._starts = list(accumulate((b - a for _, a, b in self.pieces), initial=0))
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self.pieces) and self._starts[at] < stop:
            source, first, _ = self.pieces[at]
            a, b = max(start, self._starts[at]), min(stop, self._starts[at + 1])
            if a < b:
                yield source, first + a - self._starts[at], first + b - self._starts[at]
            at += 1


def widest(words: Iterable[str]) -> str:
    """The dtype word that holds values of all these dtypes: the wider one, F32 or F16 where two do not nest.

    Examples
    --------
    >>> widest(["BF16", "F16"]), widest(["I8", "I64"]), widest([])
    ('F32', 'I64', 'F32')
    """
    found = sorted(set(words))
    if len(found) == 1:
        return found[0]
    floats = [w for w in found if w in ("F64", "F32", "BF16", "F16") or w.startswith("F8_")]
    if not found or (floats and len(floats) < len(found)):
        return "F64" if "F64" in found else "F32"
    if floats:
        for word in ("F64", "F32"):
            if word in found:
                return word
        small = [w for w in found if not w.startswith("F8_")]
        return "F16" if not small else small[0] if len(small) == 1 else "F32"
    return max(found, key=lambda w: (itemsize(w), w))


def laid_out(op: Operation, inputs: Sequence[Lazy], *, decoded: bool) -> list[Lazy]:
    """What the operation makes of lazy tensors.

    Raises
    ------
    LayoutError : the operation does not fit their shapes
    """
    given = [i.shape for i in inputs]
    shapes = op.shapes(given)
    ranges = op.flat(given) if op.moves else None
    if ranges is None and (sliced := _by_slices(op, inputs, shapes, decoded=decoded)):
        return sliced
    if ranges is None:
        # operations on each array by itself must not make one result wait for the other inputs
        needs = [[i] for i in inputs] if op.single else [list(inputs)] * len(shapes)
        return [
            Lazy(shape, [(Computed(op, needs[k], 0 if op.single else k, shape, decoded=decoded), 0, math.prod(shape))])
            for k, shape in enumerate(shapes)
        ]
    result = []
    for shape, segments in zip(shapes, ranges, strict=True):
        pieces: list[Piece] = []
        for which, start, stop in segments:
            found = [(None, 0, stop - start)] if which == NOTHING else inputs[which].between(start, stop)
            for source, first, last in found:
                if pieces and pieces[-1][0] is source and pieces[-1][2] == first:
                    pieces[-1] = (source, pieces[-1][1], last)
                else:
                    pieces.append((source, first, last))
        if not pieces and inputs:
            # nothing to read, but the dtype has to come from somewhere
            pieces += [(source, 0, 0) for source, _, _ in inputs[0].pieces[:1]]
        result.append(Lazy(shape, pieces))
    return result


def _by_slices(op: Operation, inputs: Sequence[Lazy], shapes: Sequence[Shape], *, decoded: bool) -> list[Lazy] | None:
    """What the operation makes of large tensors slice by slice along the first axis, so that one can be had alone."""
    given = [i.shape for i in inputs]
    length = given[0][0] if given[0] else 0
    fits = 1 < length <= MOST_SLICES and all(s[:1] == (length,) for s in (*given, *shapes))
    if not fits or max(i.size for i in inputs) < LARGE or len({len(s) for s in given}) > 1:
        return None
    inside = op.inside(len(given[0])) if op.moves else None
    if inside is None:
        return None
    pieces: list[list[Piece]] = [[] for _ in shapes]
    for k in range(length):
        parts = [
            Lazy(i.shape[1:], list(i.between(k * (i.size // length), (k + 1) * (i.size // length)))) for i in inputs
        ]
        for found, result in zip(pieces, laid_out(inside, parts, decoded=decoded), strict=True):
            found += result.pieces
    return [Lazy(shape, found) for shape, found in zip(shapes, pieces, strict=True)]


def known(tensor: Lazy) -> NDArray[np.bool_]:
    """Which places somebody knows, in the tensor's shape."""
    result = np.empty(tensor.size, np.bool_)
    at = 0
    for source, start, stop in tensor.pieces:
        if isinstance(source, Computed) and source.partial:
            mask = source.op.known([known(i) for i in source.inputs])[source.output]
            result[at : at + stop - start] = mask.reshape(-1)[start:stop]
        else:
            result[at : at + stop - start] = source is not None
        at += stop - start
    return result.reshape(tensor.shape)


def united(tensors: Sequence[Lazy]) -> Lazy | None:
    """The tensors as one, each giving the places that those before it do not know; None where some stay unknown.

    Raises
    ------
    LayoutError : their shapes differ
    """
    for tensor in tensors:
        if not tensor.partial:
            return tensor
    if len({t.shape for t in tensors}) > 1:
        listed = ", ".join(sorted({str(list(t.shape)) for t in tensors}))
        raise LayoutError(f"its parts have different shapes: {listed}")
    if any(source is not None and source.partial for t in tensors for source, _, _ in t.pieces):
        covered = np.logical_or.reduce([known(t) for t in tensors]).all()
        return Lazy(tensors[0].shape, [(Merged(tensors), 0, tensors[0].size)]) if covered else None
    whole = tensors[0]
    for tensor in tensors[1:]:
        whole = _filled(whole, tensor)
    return None if whole.partial else whole


def _filled(whole: Lazy, more: Lazy) -> Lazy:
    """The unknown ranges of one tensor taken from another."""
    pieces: list[Piece] = []
    at = 0
    for source, start, stop in whole.pieces:
        length = stop - start
        pieces += [(source, start, stop)] if source is not None else more.between(at, at + length)
        at += length
    return Lazy(whole.shape, pieces)
