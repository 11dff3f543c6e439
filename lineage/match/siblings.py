"""Biases and gains that go where the matrix beside them went.

A vector says little by itself: after a fusion it is no row of anything. So the way a matrix went is followed with
the numbers of its rows (or columns) in place of its values, and what comes out says where the elements of a vector
with the same stem and that many elements belong. Values are then held against it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError
from lineage.layout.chain import Level, apply_chain, inverse_chain, leaves
from lineage.layout.induce import Match
from lineage.match.certify import flat
from lineage.match.chains import OVER, Names
from lineage.match.fuse import Fusion, Piece, fuse, taken
from lineage.match.rows import Provenance, View
from lineage.match.values import Values, agreement
from lineage.match.words import leaf, stem

__all__ = ["siblings"]

#: elements of a matrix above which its way is not followed
LARGE = 1 << 27

Entries = Sequence[str | tuple[str, ...]]


def siblings(
    a: Values, b: Values, matches: Sequence[Match], left_a: Iterable[str], left_b: Iterable[str], names: Names
) -> list[Match]:
    """Matches of left-over tensors that go the way of a matrix with the same stem."""
    beside_a, beside_b = _by_stem(left_a), _by_stem(left_b)
    found: list[Match] = []
    for match in matches:
        if len(match.sources) == 1 and isinstance(match.sources[0], str):
            whole, parts, whole_is_a = match.sources[0], match.targets, True
        elif len(match.targets) == 1 and isinstance(match.targets[0], str):
            whole, parts, whole_is_a = match.targets[0], match.sources, False
        else:
            continue
        wholes, others = (beside_a, beside_b) if whole_is_a else (beside_b, beside_a)
        for other in _neighbours(whole, wholes):
            got = _follow(match, whole, other, parts, others, (a, b) if whole_is_a else (b, a), names, whole_is_a)
            found += got
    return found


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[stem(name)].append(name)
    return found


def _neighbours(name: str, by_stem: dict[str, list[str]]) -> list[str]:
    """Tensors with the stem of a matrix, or whose stem is its name (`w` and `w_bias`)."""
    return [*by_stem.get(stem(name), ()), *by_stem.get(name, ())]


def _beside(entries: Entries, others: dict[str, list[str]], like: str, whole: Values, parts: Values) -> list[list[str]]:
    """For every part the tensors that may stand beside it as `like` stands beside the whole: same last word first."""
    found = []
    for name in flat(entries):
        options = [o for o in _neighbours(name, others) if parts.size(o) <= whole.size(like)]
        options.sort(key=lambda o: leaf(o) != leaf(like))
        found.append(options)
    return found


def _follow(
    match: Match, whole: str, other: str, parts: Entries, others: dict[str, list[str]], values: tuple[Values, Values],
    names: Names, whole_is_a: bool,
) -> list[Match]:  # fmt: skip
    """The match of `other`, beside the whole, and of what stands beside the parts."""
    of_whole, of_parts = values
    options = _beside(parts, others, other, of_whole, of_parts)
    if not all(options) or of_whole.size(whole) > LARGE:
        return []
    chosen = [o[0] for o in options]
    sizes = [of_parts.size(n) for n in chosen]
    if sum(sizes) != of_whole.size(other):
        return []
    shapes = [of_parts.checkpoint.specs[n].shape for n in flat(parts)]
    for axes in _axes(shapes, sizes):
        places = _carried(match, parts, shapes, sizes, axes, whole_is_a)
        if places is None or len(places) != of_whole.size(other):
            continue
        got = _written(other, chosen, sizes, places, values, names, whole_is_a, told=match.how == "values")
        if got:
            return got
    return []


def _axes(shapes: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Axes of the parts that have as many places as the vectors beside them, output axes first."""
    dimensions = {len(s) for s in shapes}
    if len(dimensions) != 1:
        return []
    count = dimensions.pop()
    found = []
    for length in range(1, count + 1):
        for axes in itertools.combinations(range(count), length):
            fits = all(math.prod(s[i] for i in axes) == n for s, n in zip(shapes, sizes, strict=True))
            if fits and all(any(s[i] != 1 for s in shapes) for i in axes):
                found.append(axes)
    return found


def _carried(
    match: Match, parts: Entries, shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], axes: tuple[int, ...],
    whole_is_a: bool,
) -> NDArray[np.int64] | None:  # fmt: skip
    """For each element beside the whole the number of the element beside the parts that it is; None if they mix."""
    starts = np.cumsum([0, *sizes[:-1]])
    numbered = iter([_numbers(s, axes, int(at)) for s, at in zip(shapes, starts, strict=True)])
    entries: list[Any] = [
        next(numbered) if isinstance(e, str) else Level(OVER, [next(numbered) for _ in e]) for e in parts
    ]
    try:
        chain = match.ops
        if whole_is_a:
            lengths = [len(e) for e in parts if not isinstance(e, str)]
            chain = inverse_chain(match.ops, 1, {OVER: lengths[0]} if lengths else {})
        results = [x for r in apply_chain(chain, entries) for x in leaves(r)]
    except LayoutError:
        return None
    if len(results) != 1:
        return None
    array: NDArray[Any] = results[0]
    for axis in range(array.ndim):
        first = array.take([0], axis=axis)
        if np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array.reshape(-1).astype(np.int64)


def _numbers(shape: tuple[int, ...], axes: tuple[int, ...], start: int) -> NDArray[np.int32]:
    """An array of `shape` that holds, everywhere, the number of its place along `axes`."""
    lengths = [shape[i] for i in axes]
    small = np.arange(start, start + math.prod(lengths), dtype=np.int32).reshape(
        [shape[i] if i in axes else 1 for i in range(len(shape))]
    )
    return np.broadcast_to(small, shape)


def _written(
    other: str, chosen: Sequence[str], sizes: Sequence[int], places: NDArray[np.int64], values: tuple[Values, Values],
    names: Names, whole_is_a: bool,
    *,
    told: bool,
) -> list[Match]:  # fmt: skip
    """What puts the elements of `chosen` at `places`, where their values do not speak against it.

    `told`: the values of the matrix beside them told, so theirs must too.
    """
    of_whole, of_parts = values
    if len(np.unique(places)) != len(places):
        return []
    together = np.concatenate([of_parts.whole(n) for n in chosen])
    how, _ = agreement(together[places], of_whole.whole(other))
    if how is None and told:
        return []
    back = np.argsort(places)
    starts = np.cumsum([0, *sizes])
    shapes = [of_parts.checkpoint.specs[n].shape for n in chosen]
    shape = of_whole.checkpoint.specs[other].shape
    rows = [back[starts[k] : starts[k + 1]] for k in range(len(chosen))]
    pieces = tuple(Piece(n, s, _all_rows(s), r) for n, s, r in zip(chosen, shapes, rows, strict=True))
    got = fuse(Fusion(other, shape, _all_rows(shape), pieces, whole_is_a), names)
    found = [got] if got is not None else []
    if not found:  # an order that no pattern says, element by element
        whole = (other, _all_rows(shape))
        parts = [(n, _all_rows(s)) for n, s in zip(chosen, shapes, strict=True)]
        source = np.repeat(np.arange(len(chosen)), sizes)[places]
        one, two = (of_whole, of_parts) if whole_is_a else (of_parts, of_whole)
        given = (
            [Provenance(*part, (whole,), np.zeros(len(r), np.int64), r) for part, r in zip(parts, rows, strict=True)]
            if whole_is_a
            else [Provenance(*whole, tuple(parts), source, places - starts[source])]
        )
        found = [m for p in given if (m := taken(p, one, two, names)) is not None]
    return [Match(targets=m.targets, sources=m.sources, ops=m.ops, how=how or "structure") for m in found]


def _all_rows(shape: Sequence[int]) -> View:
    return View(tuple(range(sum(n != 1 for n in shape))), ())
