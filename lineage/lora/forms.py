"""Shapes that file formats can hold: a delta as up · down, as LoHa, as LoKr, or as stacked pairs.

Every form is exact. Where a network fits no better form, factors of a higher rank say the same; they are made of the
numbers at hand, never by a decomposition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.lora.delta import Delta
from lineage.lora.network import Label, Part, Term, contract, fresh

__all__ = ["LoHa", "LoKr", "LowRank", "dead", "loha", "lokr", "low_rank", "slices"]


#: up, down and scale
Pair = tuple[NDArray[Any], NDArray[Any], float]


class LowRank(msgspec.Struct, frozen=True):
    """scale · up · down, as matrices; with `mid`, scale · Σ up[o,k] mid[k,l,…] down[l,i].

    Attributes
    ----------
    up : (rows, rank)
    down : (rank, columns)
    mid : (rank, rank of down, *kernel), or None
    scale : number
    """

    up: NDArray[Any]
    down: NDArray[Any]
    scale: float
    mid: NDArray[Any] | None = None

    @property
    def rank(self) -> int:
        """Length of the summed axis."""
        return int(self.up.shape[1])


class LoHa(msgspec.Struct, frozen=True):
    """scale · (w1_a · w1_b) ∘ (w2_a · w2_b)."""

    w1_a: NDArray[Any]
    w1_b: NDArray[Any]
    w2_a: NDArray[Any]
    w2_b: NDArray[Any]
    scale: float


class LoKr(msgspec.Struct, frozen=True):
    """scale · kron(w1, w2); each factor whole (one matrix) or a product (two)."""

    w1: tuple[NDArray[Any], ...]
    w2: tuple[NDArray[Any], ...]
    scale: float


def low_rank(delta: Delta, *, rows: Sequence[int] = (0,), keep_mid: bool = False) -> LowRank:
    """The delta as one pair of factors.

    Parameters
    ----------
    rows : axes that make the rows; the other ones are the columns, both in order
    keep_mid : a Tucker core stays a factor of its own where the delta is nothing else

    Notes
    -----
    Terms that share a factor are joined, so that what was cut from one pair becomes one pair again. Unequal scales
    are folded into the up factors, relative to the first.
    """
    if keep_mid and len(delta.terms) == 1 and (found := _tucker(delta.terms[0])) is not None:
        return found
    pairs: list[Pair] = []
    for term in delta.terms:
        pairs.append((*_factors(term, rows), term.scale))
    pairs = _joined(_joined(pairs, shared=1), shared=0)
    height = math.prod(delta.shape[k] for k in rows)
    width = math.prod(n for k, n in enumerate(delta.shape) if k not in rows)
    if not pairs:
        return LowRank(np.zeros((height, 1), np.float32), np.zeros((1, width), np.float32), 1.0)
    scale = pairs[0][2]
    ups = [u if s == scale else u.astype(np.float64) * (s / scale) for u, _, s in pairs]
    if len(pairs) == 1:
        return LowRank(ups[0], pairs[0][1], scale)
    return LowRank(np.concatenate(ups, axis=1), np.concatenate([d for _, d, _ in pairs], axis=0), scale)


def _joined(pairs: list[Pair], *, shared: int) -> list[Pair]:
    """Pairs of equal scale that share their down (1) or up (0) factor as one."""
    groups: dict[tuple[object, ...], list[Pair]] = {}
    for pair in pairs:
        factor = pair[1] if shared else pair[0]
        key = (factor.shape, pair[2], np.ascontiguousarray(factor, np.float64).tobytes())
        groups.setdefault(key, []).append(pair)
    result: list[Pair] = []
    for group in groups.values():
        up, down, scale = group[0]
        if len(group) == 1:
            result.append(group[0])
        elif shared:
            result.append((np.sum([u for u, _, _ in group], axis=0), down, scale))
        else:
            result.append((up, np.sum([d for _, d, _ in group], axis=0), scale))
    return result


def _factors(term: Term, rows: Sequence[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Up and down of one term without its scale: its parts shared out to the two sides."""
    left = [n for k in rows for n in term.layout[k]]
    right = [n for k, group in enumerate(term.layout) if k not in rows for n in group]
    side = _shared_out(term, set(left), set(right))
    ours = [p for p, s in zip(term.parts, side, strict=True) if s]
    theirs = [p for p, s in zip(term.parts, side, strict=True) if not s]
    here, there = ({n for p in some for n in p.labels} for some in (ours, theirs))
    summed = [n for n in term.inner if n in here and n in there]
    sizes = dict(term.sizes)
    # a label on the wrong side of the cut becomes part of the rank: its identity matrix picks the place
    crossing = [n for n in left if n in there], [n for n in right if n in here]
    names = {n: fresh() for some in crossing for n in some}
    sizes |= {new: sizes[n] for n, new in names.items()}
    ours = [p.renamed({n: names[n] for n in crossing[1]}) for p in ours]
    theirs = [p.renamed({n: names[n] for n in crossing[0]}) for p in theirs]
    ours += [_identity(n, names[n], sizes[n]) for n in crossing[0]]
    theirs += [_identity(n, names[n], sizes[n]) for n in crossing[1]]
    rank = [*(names[n] for some in crossing for n in some), *summed]
    up = contract(ours, [*left, *rank], sizes).reshape(term.length(left), -1)
    down = contract(theirs, [*rank, *right], sizes).reshape(-1, term.length(right))
    return up, down


def _identity(label: Label, other: Label, size: int) -> Part:
    return Part(np.eye(size, dtype=np.float32), (label, other))


def _shared_out(term: Term, left: set[Label], right: set[Label]) -> tuple[bool, ...]:
    """Which parts go to the left: what moves numbers only, else what gives the lowest rank."""
    pure = tuple(bool(left & set(p.labels)) for p in term.parts)
    inner = set(term.inner)
    if _moves_only(term, pure, left, right, inner):
        return pure
    best, least = pure, math.inf
    for side in product((True, False), repeat=len(term.parts)):
        ours = {n for p, s in zip(term.parts, side, strict=True) if s for n in p.labels}
        theirs = {n for p, s in zip(term.parts, side, strict=True) if not s for n in p.labels}
        cut = (ours & theirs & inner) | (left & theirs) | (right & ours)
        cost = math.prod(term.sizes[n] for n in cut)
        if cost < least:
            best, least = side, cost
    return best


def _moves_only(term: Term, side: tuple[bool, ...], left: set[Label], right: set[Label], inner: set[Label]) -> bool:
    """Whether this cut gives one part for each side, which is then only transposed."""
    if len(term.parts) != 2 or sum(side) != 1:
        return False
    ours, theirs = (term.parts[side.index(s)] for s in (True, False))
    return set(ours.labels) <= left | inner and set(theirs.labels) <= right | inner


def _tucker(term: Term) -> LowRank | None:
    """up, mid and down of a convolution that has a core."""
    if len(term.layout) < 3 or len(term.parts) != 3:
        return None
    outs, ins, kernel = term.layout[0], term.layout[1], [n for g in term.layout[2:] for n in g]
    up, down, mid = (_alone(term, some) for some in (outs, ins, kernel))
    if up is None or down is None or mid is None:
        return None
    k = [n for n in up.labels if n not in outs]
    m = [n for n in down.labels if n not in ins]
    if len(k) != 1 or len(m) != 1 or set(mid.labels) != {*k, *m, *kernel} or k == m:
        return None
    return LowRank(
        contract([up], [*outs, *k], term.sizes).reshape(-1, term.sizes[k[0]]),
        contract([down], [*m, *ins], term.sizes).reshape(term.sizes[m[0]], -1),
        term.scale,
        contract([mid], [*k, *m, *kernel], term.sizes).reshape(term.sizes[k[0]], term.sizes[m[0]], *term.shape[2:]),
    )


def _alone(term: Term, labels: Sequence[Label]) -> Part | None:
    """The part that holds these open labels and no others."""
    others = set(term.open) - set(labels)
    return next((p for p in term.parts if set(labels) & set(p.labels) and not others & set(p.labels)), None)


def _groups(term: Term) -> list[list[Part]]:
    """Parts that hang together by summed labels."""
    inner = set(term.inner)
    groups: list[tuple[set[Label], list[Part]]] = []
    for part in term.parts:
        labels, parts = set(part.labels) & inner, [part]
        for group in [g for g in groups if g[0] & labels]:
            labels |= group[0]
            parts = group[1] + parts
            groups.remove(group)
        groups.append((labels, parts))
    return [parts for _, parts in groups]


def loha(delta: Delta) -> LoHa | None:
    """The delta as one elementwise product of two pairs, None where it is not one.

    Terms that fill different rows, or different columns, are put side by side in both pairs; a plain pair among them
    counts as a product with ones.
    """
    found = [_products(t) for t in delta.terms]
    if not found or any(f is None for f in found) or not any(f is not None and len(f) == 2 for f in found):
        return None
    pairs = [f if len(f) == 2 else [*f, _ones(f[0])] for f in found if f is not None]
    if len(pairs) > 1 and not any(_apart(pairs, axis) for axis in (0, 1)):
        return None
    scale = delta.terms[0].scale
    ratios = [t.scale / scale for t in delta.terms]
    ups = [p[0][0] if r == 1.0 else p[0][0].astype(np.float64) * r for p, r in zip(pairs, ratios, strict=True)]
    if len(pairs) == 1:
        return LoHa(ups[0], pairs[0][0][1], *pairs[0][1], scale)
    return LoHa(
        np.concatenate(ups, 1),
        np.concatenate([p[0][1] for p in pairs], 0),
        np.concatenate([p[1][0] for p in pairs], 1),
        np.concatenate([p[1][1] for p in pairs], 0),
        scale,
    )


def _products(term: Term) -> list[tuple[NDArray[Any], NDArray[Any]]] | None:
    """The up and down pairs whose elementwise product the term is, two at most; None where a group is no plain pair."""
    groups = _groups(term)
    if len(groups) > 2:
        return None
    found = []
    for parts in groups:
        alone = Term(tuple(parts), term.layout, term.sizes)
        rows, columns = set(term.layout[0]), {n for g in term.layout[1:] for n in g}
        side = tuple(bool(rows & set(p.labels)) for p in parts)
        held = {n for p in parts for n in p.labels}
        if len(parts) > 1 and (len(groups) == 1 or not _moves_only(alone, side, rows, columns, set(alone.inner))):
            if len(groups) > 1:
                return None
        elif len(parts) == 1 and not (held <= rows or held <= columns):
            return None
        found.append(_factors(alone, (0,)))
    return found


def _ones(pair: tuple[NDArray[Any], NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """A pair whose product is one wherever the other pair's rows and columns are not zero."""
    rows, columns = np.any(pair[0], axis=1)[:, None], np.any(pair[1], axis=0)[None]
    return rows.astype(np.float32), columns.astype(np.float32)


def _apart(pairs: Sequence[Sequence[tuple[NDArray[Any], NDArray[Any]]]], axis: int) -> bool:
    """Whether no first pair fills a row (axis 0) or column (1) that the second pair of another term fills."""
    first, second = ([np.any(p[k][axis], axis=1 - axis) for p in pairs] for k in (0, 1))
    return not any((f & s).any() for j, f in enumerate(first) for k, s in enumerate(second) if j != k)


def lokr(delta: Delta) -> LoKr | None:
    """The delta as one Kronecker product, None where it is not one."""
    if len(delta.terms) != 1:
        return None
    term = delta.terms[0]
    groups = _groups(term)
    if len(groups) != 2 or len(term.layout) < 2:
        return None
    for first, second in (groups, groups[::-1]):
        ours = {n for p in first for n in p.labels} & set(term.open)
        theirs = {n for p in second for n in p.labels} & set(term.open)
        if ours & theirs or ours | theirs != set(term.open) or any(n in ours for g in term.layout[2:] for n in g):
            continue
        if all(_leads(group, ours) for group in term.layout[:2]):
            w1 = _kron_factor(first, term, [[n for n in g if n in ours] for g in term.layout[:2]])
            w2 = _kron_factor(second, term, [[n for n in g if n in theirs] for g in term.layout])
            return LoKr(w1, w2, term.scale)
    return None


def _leads(group: Sequence[Label], ours: set[Label]) -> bool:
    """Whether our labels stand before all others."""
    mine = [n in ours for n in group]
    return mine == sorted(mine, reverse=True)


def _kron_factor(parts: Sequence[Part], term: Term, axes: Sequence[Sequence[Label]]) -> tuple[NDArray[Any], ...]:
    """One factor: its two matrices where it is a plain product, otherwise whole, in the shape of the axes."""
    shape = [term.length(group) for group in axes]
    rows, columns = set(axes[0]), {n for g in axes[1:] for n in g}
    alone = Term(tuple(parts), tuple(tuple(g) for g in axes), term.sizes)
    side = tuple(bool(rows & set(p.labels)) for p in parts)
    if _moves_only(alone, side, rows, columns, set(alone.inner)) and len(alone.inner) == 1:
        return _factors(alone, (0,))
    return (contract(parts, [n for g in axes for n in g], term.sizes).reshape(shape),)


def slices(delta: Delta, axes: int) -> list[Delta]:
    """The deltas at every place of the first axes, in C order."""
    result = [delta]
    for _ in range(axes):
        result = [
            d.changed(lambda t, k=k: t.indexed(0, k), d.shape[1:]).compact()  # type: ignore[misc]
            for d in result
            for k in range(d.shape[0])
        ]
    return result


def dead(delta: Delta) -> bool:
    """Whether the delta is zero."""
    return not delta.compact().terms
