"""Biases and gains that go where the matrix beside them went.

A vector says little by itself: after a fusion it is no row of anything. So the arrangement found for the rows of a
matrix is tried on the tensors that share its name up to the last word, and held against their values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lineage.layout.induce import Match
from lineage.match.chains import Names, PartShape, reordered, tiled
from lineage.match.explain import tile
from lineage.match.fuse import Embedding, made, taken
from lineage.match.rows import View
from lineage.match.structure import leaf, stem
from lineage.match.values import Values, agreement

__all__ = ["siblings"]

def siblings(
    a: Values, b: Values, embeddings: Sequence[Embedding], matches: Sequence[Match],
    left_a: Iterable[str], left_b: Iterable[str], names: Names,
) -> list[Match]:  # fmt: skip
    """Matches of left-over tensors that follow an embedding or a whole match of their module."""
    beside_a, beside_b = _by_stem(left_a), _by_stem(left_b)
    found: list[Match] = []
    for embedding in embeddings:
        wholes, parts = (beside_a, beside_b) if embedding.whole_is_a else (beside_b, beside_a)
        whole_values, part_values = (a, b) if embedding.whole_is_a else (b, a)
        for whole in wholes.get(stem(embedding.whole), ()):
            match = _follow(embedding, whole, parts, whole_values, part_values, names)
            if match is not None:
                found.append(match)
    for match in matches:
        if len(match.sources) == len(match.targets) == 1 and isinstance(match.sources[0], str) and isinstance(match.targets[0], str):
            found += _beside(match.sources[0], match.targets[0], beside_a, beside_b, a, b, names)
    return found


def _by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        found[stem(name)].append(name)
    return found


def _pick(options: Sequence[str], size: int, like: str, values: Values) -> str | None:
    """The option of that many elements: the one with the same last word, or the only one."""
    fits = [n for n in options if values.size(n) == size]
    same = [n for n in fits if leaf(n) == leaf(like)]
    return same[0] if len(same) == 1 else fits[0] if len(fits) == 1 else None


def _follow(
    embedding: Embedding, whole: str, parts: dict[str, list[str]], whole_values: Values, part_values: Values, names: Names
) -> Match | None:
    """The embedding applied to vectors beside its tensors."""
    if whole_values.size(whole) != embedding.rows:
        return None
    entries: list[str | tuple[str, ...]] = []
    shapes: list[PartShape] = []
    for entry, place in zip(embedding.entries, embedding.strides, strict=True):
        members = (entry,) if isinstance(entry, str) else entry
        size = math.prod(d.size for d in place.digits) // len(members)
        picked = [_pick(parts.get(stem(m), ()), size, whole, part_values) for m in members]
        if any(p is None for p in picked):
            return None
        chosen = tuple(str(p) for p in picked)
        entries.append(chosen[0] if isinstance(entry, str) else chosen)
        shape = part_values.checkpoint.specs[chosen[0]].shape
        shapes.append(PartShape(shape, _all_rows(shape), None if isinstance(entry, str) else len(members)))
    shape = whole_values.checkpoint.specs[whole].shape
    match = _arranged(embedding, whole, shape, entries, shapes, names)
    if match is None:
        return None
    value = np.full(embedding.rows, np.nan, np.float32)
    for entry, place in zip(entries, embedding.strides, strict=True):
        members = (entry,) if isinstance(entry, str) else entry
        value[place.rows()] = np.concatenate([part_values.whole(m) for m in members])
    how, _ = agreement(value, whole_values.whole(whole))
    if how is None:
        return None
    return Match(targets=match.targets, sources=match.sources, ops=match.ops, how=how)


def _arranged(
    embedding: Embedding, whole: str, shape: tuple[int, ...], entries: list[str | tuple[str, ...]],
    shapes: list[PartShape], names: Names,
) -> Match | None:  # fmt: skip
    """The embedding written for vectors: a tiling of patterns, or rows taken."""
    tiling = tile(embedding.strides, embedding.rows)
    if tiling is None:
        seen_part, seen_whole = (shapes[0].shape, shapes[0].view), (shape, _all_rows(shape))
        first = entries[0]
        return taken(embedding, first, whole, seen_part, seen_whole, names) if isinstance(first, str) else None
    chain = tiled(tiling, shapes, shape, _all_rows(shape), names)
    if chain is None:
        return None
    return made(whole, [entries[i] for i in tiling.order], chain, embedding.whole_is_a)


def _all_rows(shape: Sequence[int]) -> View:
    return View(tuple(range(sum(n != 1 for n in shape))), ())


def _beside(
    source: str, target: str, beside_a: dict[str, list[str]], beside_b: dict[str, list[str]], a: Values, b: Values, names: Names
) -> list[Match]:
    """Vectors beside two tensors that correspond as wholes."""
    found = []
    for name in beside_b.get(stem(target), ()):
        size = b.size(name)
        other = _pick(beside_a.get(stem(source), ()), size, name, a)
        if other is None:
            continue
        how, _ = agreement(a.whole(other), b.whole(name))
        if how is None:
            continue
        shape = a.checkpoint.specs[other].shape
        order = tuple(range(sum(n != 1 for n in shape)))
        ops = reordered(shape, order, b.checkpoint.specs[name].shape, names)
        found.append(Match(targets=(name,), sources=(other,), ops=ops, how=how))
    return found
