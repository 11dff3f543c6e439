"""Attention heads: their order, and new bases inside them that cancel between query and key, value and output.

The transform of a group of heads is fitted on its key and on its value; the query shows the one, the output the
other. Rotary embeddings leave only turns and scales of the planes that they rotate (two ways of pairing units are in
use, halves and neighbours); without them any basis goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.choice import LEAST_BLOCK, simplest
from lineage.judge.align.turns import Turn
from lineage.judge.align.weights import cosine
from lineage.match.units import pair_units

__all__ = ["Block", "Heads", "agreement", "choose_families", "fit_heads", "head_sizes", "likely_size"]

Floats = NDArray[np.floating[Any]]
Sides = tuple[Floats, Floats]

#: smallest head that is looked for, and how much a difference of overlap or cosine must be to count
LEAST_SIZE, NEARLY = 8, 0.05
#: where keys have more units than this, only the usual sizes of heads are tried
MOST_TRIED = 256
USUAL = (32, 40, 48, 64, 72, 80, 88, 96, 104, 112, 120, 128, 160, 192, 224, 256, 512)


class Block:
    """One attention block; each matrix as (units, channels) of A, channels already those of B, and of B.

    Parameters
    ----------
    query, key, value, out : make the matrices when they are asked for: turning a wide one takes seconds
    lengths : units of A and of B, of queries and of keys
    """

    def __init__(
        self,
        query: Callable[[], Sides],
        key: Callable[[], Sides],
        value: Callable[[], Sides],
        out: Callable[[], Sides],
        lengths: Sequence[tuple[int, int]],
    ) -> None:
        self._made = query, key, value, out
        self.lengths = lengths

    @cached_property
    def query(self) -> Sides:
        """The query's matrix, A's and B's."""
        return self._made[0]()

    @cached_property
    def key(self) -> Sides:
        """The key's matrix."""
        return self._made[1]()

    @cached_property
    def value(self) -> Sides:
        """The value's matrix."""
        return self._made[2]()

    @cached_property
    def out(self) -> Sides:
        """The output's matrix, turned so that its units come first."""
        return self._made[3]()


class Heads(msgspec.Struct, frozen=True):
    """The transform of one attention block.

    Attributes
    ----------
    query, key, value, out : for the units of each matrix; `out` is meant for `Turn.side(dual=True)`
    moved, count : key/value groups and query heads in another place, and their number
    shown_query, shown_out : cosines of what took no part
    """

    query: Turn
    key: Turn
    value: Turn
    out: Turn
    moved: int
    count: int
    shown_query: float
    shown_out: float

    @property
    def holds(self) -> bool:
        """Whether this layer's own agreement says that its transform is real."""
        return (self.shown_query + self.shown_out) / 2 >= LEAST_BLOCK


# -- families of transforms of one head's units: B's rows from A's


def _identity(a: Floats, b: Floats) -> Floats:
    del b
    return np.eye(len(a))


def _signs(a: Floats, b: Floats) -> Floats:
    return np.diag(np.where(np.einsum("ij,ij->i", a, b) < 0, -1.0, 1.0))


def _inside(a: Floats, b: Floats) -> Floats:
    one, two = (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30) for rows in (a, b))
    dots = two @ one.T
    found = pair_units(np.abs(dots), seed=0)
    result = np.zeros_like(dots)
    result[found.a, found.b] = np.where(dots[found.a, found.b] < 0, -1.0, 1.0)
    return np.asarray(result)


def _scales(a: Floats, b: Floats) -> Floats:
    power = np.einsum("ij,ij->i", a, a)
    along = np.einsum("ij,ij->i", a, b)
    return np.diag(np.where((power > 0) & (along != 0), along / np.where(power > 0, power, 1.0), 1.0))


def _orthogonal(a: Floats, b: Floats) -> Floats:
    u, _, v = np.linalg.svd(b @ a.T)
    return np.asarray(u @ v)


def _basis(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.linalg.lstsq(a.T, b.T, rcond=None)[0].T)


def _halves(size: int) -> NDArray[np.intp]:
    """Places of the two units of each rotary plane, first ones then second ones, where halves are paired."""
    return np.arange(size)


def _neighbours(size: int) -> NDArray[np.intp]:
    """The same where neighbours are paired."""
    return np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])


def _planes(
    pair_a: Callable[[int], NDArray[np.intp]], pair_b: Callable[[int], NDArray[np.intp]], *, turned: bool
) -> Callable[[Floats, Floats], Floats]:
    """Rotary planes of A laid out as in B, each turned and scaled where asked."""

    def fit(a: Floats, b: Floats) -> Floats:
        size = len(a)
        half, at, to = size // 2, pair_a(size), pair_b(size)
        x, y = a[at[:half]] + 1j * a[at[half:]], b[to[:half]] + 1j * b[to[half:]]
        power = np.einsum("ij,ij->i", x, x.conj()).real
        factor = np.einsum("ij,ij->i", y, x.conj()) / np.where(power > 0, power, 1.0)
        factor = np.where((power > 0) & (factor != 0) if turned else False, factor, 1.0)
        result = np.zeros((size, size))
        result[to[:half], at[:half]] = factor.real
        result[to[:half], at[half:]] = -factor.imag
        result[to[half:], at[:half]] = factor.imag
        result[to[half:], at[half:]] = factor.real
        return result

    return fit


Family = Callable[[Floats, Floats], Floats]
VALUE_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("identity", _identity),
    ("signs", _signs),
    ("order", _inside),
    ("scales", _scales),
    ("rotation", _orthogonal),
    ("basis", _basis),
)
KEY_FAMILIES: tuple[tuple[str, Family], ...] = (
    ("identity", _identity),
    ("pairing", _planes(_halves, _neighbours, turned=False)),
    ("pairing", _planes(_neighbours, _halves, turned=False)),
    ("planes", _planes(_halves, _halves, turned=True)),
    ("planes", _planes(_neighbours, _neighbours, turned=True)),
    ("planes", _planes(_halves, _neighbours, turned=True)),
    ("planes", _planes(_neighbours, _halves, turned=True)),
    ("basis", _basis),
)


def head_sizes(block: Block) -> list[int]:
    """Units that a head may have: what divides the units of queries and of keys on both sides."""
    lengths = [length for pair in block.lengths for length in pair]
    top = min(lengths)
    usual = range(LEAST_SIZE, top + 1, 2) if top <= MOST_TRIED else USUAL
    sizes = [n for n in usual if all(length % n == 0 for length in lengths)]
    return [n for n in sizes if _fits(block, n)]


def _fits(block: Block, size: int) -> bool:
    """Whether B has no more heads than A, and as many queries a key."""
    queries, keys = ([length // size for length in pair] for pair in block.lengths)
    return queries[0] >= queries[1] and keys[0] >= keys[1] and queries[0] * keys[1] == queries[1] * keys[0]


def likely_size(blocks: Sequence[Block], sizes: Sequence[int]) -> int:
    """The smallest size whose subspaces of keys and values come out again."""
    scores = []
    for size in sizes:
        chance = min(size / blocks[0].key[0].shape[1], 0.99)
        scores.append((float(np.mean([agreement(block, size) for block in blocks])) - chance) / (1 - chance))
    return next(n for n, score in zip(sizes, scores, strict=True) if score >= max(scores) - NEARLY)


def agreement(block: Block, size: int) -> float:
    """Mean overlap of the best-matched subspaces of keys and values, 0 to 1."""
    alike = np.asarray(sum(_overlap(*pair, size) for pair in (block.key, block.value)) / 2)
    return float(pair_units(alike, seed=0).likeness.mean())


def choose_families(blocks: Sequence[Block], size: int, *, seed: int) -> tuple[tuple[int, int], float]:
    """Which family of transforms keys and which values need, told by queries and outputs of all these blocks.

    Returns
    -------
    places in `KEY_FAMILIES` and `VALUE_FAMILIES`, and the mean cosine that queries and outputs reach
    """
    orders = [_groups(block, size, seed) for block in blocks]
    keys = []
    for _, family in KEY_FAMILIES:
        turns = [_fitted(block.key, groups, size, family) for block, groups in zip(blocks, orders, strict=True)]
        keys.append(
            float(np.mean([_query(b, g, t, size, seed)[1] for b, g, t in zip(blocks, orders, turns, strict=True)]))
        )
    key = simplest(keys)
    values = []
    for _, family in VALUE_FAMILIES:
        found = []
        for block, groups in zip(blocks, orders, strict=True):
            turns_k = _fitted(block.key, groups, size, KEY_FAMILIES[key][1])
            order, _ = _query(block, groups, turns_k, size, seed)
            found.append(_out(block, order, _fitted(block.value, groups, size, family), size)[1])
        values.append(float(np.mean(found)))
    value = simplest(values)
    return (key, value), (keys[key] + values[value]) / 2


def fit_heads(block: Block, size: int, families: tuple[int, int], *, seed: int) -> Heads:
    """Fits the order of heads and the bases inside them.

    Parameters
    ----------
    size : units of a head
    families : of `choose_families`
    """
    groups = _groups(block, size, seed)
    keys = _fitted(block.key, groups, size, KEY_FAMILIES[families[0]][1])
    values = _fitted(block.value, groups, size, VALUE_FAMILIES[families[1]][1])
    order, shown_query = _query(block, groups, keys, size, seed)
    turns, shown_out = _out(block, order, values, size)
    each = len(order) // len(groups)
    key_turn = _turn(groups, keys, size, len(block.key[0]))
    value_turn = _turn(groups, values, size, len(block.value[0]))
    spread = [np.linalg.inv(keys[h // each]).T for h in range(len(order))]
    moved = np.count_nonzero(groups != np.arange(len(groups))) + np.count_nonzero(order != np.arange(len(order)))
    return Heads(
        _turn(order, spread, size, len(block.query[0])), key_turn, value_turn,
        _turn(order, turns, size, len(block.out[0])), int(moved), len(groups) + len(order), shown_query, shown_out,
    )  # fmt: skip


def _overlap(a: Floats, b: Floats, size: int) -> Floats:
    """Share of the subspace of each head of A that lies in that of each head of B, shape (heads of A, of B)."""
    one, two = (_bases(rows, size) for rows in (a, b))
    cross = np.square(one @ two.T).reshape(len(one) // size, size, len(two) // size, size)
    return np.asarray(cross.sum(axis=(1, 3)) / size)


def _bases(rows: Floats, size: int) -> Floats:
    """An orthonormal basis of each head's rows, below each other."""
    stacked = rows.reshape(-1, size, rows.shape[1]).transpose(0, 2, 1)
    return np.asarray(np.linalg.qr(stacked)[0].transpose(0, 2, 1).reshape(-1, rows.shape[1]))


def _groups(block: Block, size: int, seed: int) -> NDArray[np.intp]:
    """A's key/value group for each of B's; the order that stands unless another one is clearly better."""
    alike = np.asarray(sum(_overlap(*pair, size) for pair in (block.key, block.value)) / 2)
    return _order(alike, seed)


def _order(alike: Floats, seed: int) -> NDArray[np.intp]:
    found = pair_units(alike, seed=seed)
    take = np.empty(alike.shape[1], np.intp)
    take[found.b] = found.a
    if alike.shape[0] == alike.shape[1] and not _clearly(alike, take):
        return np.arange(len(take))
    return take


def _clearly(alike: Floats, take: NDArray[np.intp]) -> bool:
    """Whether an order explains clearly more than the one that stands."""
    at = np.arange(len(take))
    return bool(alike[take, at].mean() > alike[at, at].mean() + NEARLY)


def _fitted(sides: Sides, order: NDArray[np.intp], size: int, family: Family) -> list[Floats]:
    """The transform of each group, fitted on these rows."""
    a, b = (rows.reshape(-1, size, rows.shape[1]).astype(np.float64) for rows in sides)
    made = [family(a[g], b[k]) for k, g in enumerate(order)]
    return [m if np.linalg.cond(m) < 1e6 else np.eye(size) for m in made]


def _query(
    block: Block, groups: NDArray[np.intp], keys: Sequence[Floats], size: int, seed: int
) -> tuple[NDArray[np.intp], float]:
    """A's query head for each of B's, inside its group, and the cosine of the queries."""
    a, b = (rows.reshape(-1, size, rows.shape[1]) for rows in block.query)
    each = len(b) // len(groups)
    order = np.empty(len(b), np.intp)
    made = np.empty(b.shape)
    for k, group in enumerate(groups):
        turned = np.linalg.inv(keys[k]).T @ a[group * each : (group + 1) * each]
        mine = b[k * each : (k + 1) * each]
        alike = np.array([[cosine(x, y) for y in mine] for x in turned])
        take = _order(alike, seed) if group == k else _any_order(alike, seed)
        order[k * each : (k + 1) * each] = group * each + take
        made[k * each : (k + 1) * each] = turned[take]
    return order, cosine(made, b)


def _any_order(alike: Floats, seed: int) -> NDArray[np.intp]:
    found = pair_units(alike, seed=seed)
    take = np.empty(alike.shape[1], np.intp)
    take[found.b] = found.a
    return take


def _out(block: Block, order: NDArray[np.intp], values: Sequence[Floats], size: int) -> tuple[list[Floats], float]:
    """The transform of each head of the output, which the values gave, and the cosine that it reaches."""
    a, b = (rows.reshape(-1, size, rows.shape[1]) for rows in block.out)
    each = len(order) // len(values)
    turns = [values[h // each] for h in range(len(order))]
    duals = np.stack([np.linalg.inv(turn).T for turn in values])
    made = duals[np.arange(len(order)) // each] @ a[order]
    return turns, cosine(made, b)


def _turn(order: NDArray[np.intp], matrices: Sequence[Floats], size: int, length: int) -> Turn:
    """Heads in this order, each then mixed; as scales or as an order of units where the matrices are no more."""
    take = (order[:, None] * size + np.arange(size)).reshape(-1)
    stacked = np.stack(matrices)
    diagonal = np.einsum("hii->hi", stacked)
    if np.array_equal(stacked, diagonal[:, :, None] * np.eye(size)):
        scale = diagonal.reshape(-1)
        return Turn(length=length, take=take, scale=None if np.all(scale == 1) else scale)
    if np.all(np.isin(stacked, (-1.0, 0.0, 1.0))):
        inner = np.abs(stacked).argmax(axis=2)
        signs = np.where(stacked.sum(axis=2) < 0, -1.0, 1.0).reshape(-1)
        take = (order[:, None] * size + inner).reshape(-1)
        return Turn(length=length, take=take, scale=None if np.all(signs > 0) else signs)
    return Turn(length=length, take=take, blocks=tuple(np.asarray(m) for m in stacked))
