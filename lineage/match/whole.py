"""Tensors that correspond as wholes: renamed, cast, reshaped or with their axes in another order.

Exactly, by joining keys made of a few values at fixed places; nearly, by cosines over sampled places. A hypothesis
is an order of A's axes (1-long axes left out) whose dimensions, merged or split, give B's.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import decode, encode
from lineage.match.values import Values, grid, lattice
from lineage.match.words import families

__all__ = ["Whole", "exact", "near"]

#: places of a tensor that make its key
KEY = 48
#: neighbouring places in a row: one read serves them
RUN = 6
#: values whose keys are made in one go
TOGETHER = 1 << 20
#: places of a tensor that a cosine is taken over
SAMPLE = 2048
#: a cosine below this is never a correspondence by values (chance over `SAMPLE` places: 0.1 at 1e-5)
LEAST_COSINE = 0.3
#: deviations above chance that a pair must reach: far beyond any number of pairs tried
LEAST_Z = 8.0
#: distance to the runner-up, as a share of the best
LEAST_MARGIN = 0.25
#: a cosine above this leaves no room for rows that moved
SURELY_EVEN = 0.97
#: rows (or columns) that must be there, and values that each must have, for them to be told apart; the correlation
#: of the good ones; the share of those that do not correlate from which on they are no coincidence
FEWEST_LINES, FEWEST_IN_LINE, GOOD_LINE, STRAY_LINES = 8, 16, 0.6, 0.1
#: pairs of one size from which on families are sampled first
MANY_PAIRS = 10_000_000

Order = tuple[int, ...]


class Whole:
    """One correspondence: B's tensor is A's with its axes in `order`, reshaped.

    `ties` names the other tensors of A that would do as well because they hold equal values; `even` says that all
    rows and columns agree about as well (where some agree and others not at all, they may have moved).
    """

    __slots__ = ("a", "b", "cosine", "even", "margin", "order", "ties")

    def __init__(
        self,
        a: str,
        b: str,
        order: Order,
        *,
        cosine: float,
        margin: float,
        ties: tuple[str, ...] = (),
        even: bool = True,
    ) -> None:
        self.a, self.b, self.order = a, b, order
        self.cosine, self.margin, self.ties, self.even = cosine, margin, ties, even


@lru_cache(1 << 14)
def orders(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[Order, ...]:
    """Orders of the axes of `shape` that reshape to `target`, the plain one first.

    Examples
    --------
    >>> orders((4, 8, 2), (8, 8))
    ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1))
    >>> orders((3, 5), (5, 3))
    ((1, 0),)
    """
    if len(shape) > 5 or math.prod(shape) != math.prod(target):
        return ()
    wanted = set(itertools.accumulate(target, lambda x, y: x * y))
    found = []
    for order in itertools.permutations(range(len(shape))):
        edges = set(itertools.accumulate((shape[i] for i in order), lambda x, y: x * y))
        if edges <= wanted or wanted <= edges:
            found.append(order)
    return tuple(found)


def turned_over(shape: Sequence[int], target: Sequence[int]) -> Order | None:
    """The order of axes that puts what a matrix reads in place of what it writes; None where there is none.

    Examples
    --------
    >>> turned_over((96, 6, 16), (96, 96)), turned_over((8, 8), (2, 4, 8)), turned_over((5, 3), (5, 3))
    ((1, 2, 0), (1, 0), None)
    """
    for cut in range(1, len(shape)):
        first, last = math.prod(shape[cut:]), math.prod(shape[:cut])
        edges = [math.prod(target[:k]) for k in range(1, len(target))]
        if first in edges and last * first == math.prod(target):
            return (*range(cut, len(shape)), *range(cut))
    return None


def moved(positions: NDArray[np.int64], shape: Sequence[int], order: Order) -> NDArray[np.int64]:
    """Flat positions in a tensor of `shape` of the elements at flat `positions` of its transpose by `order`."""
    if list(order) == sorted(order):
        return positions
    index = np.unravel_index(positions, [shape[i] for i in order])
    back = [index[order.index(axis)] for axis in range(len(shape))]
    return np.ravel_multi_index(back, tuple(shape)).astype(np.int64)


def _places(size: int, seed: int) -> NDArray[np.int64]:
    """The places of a key: the same for every tensor of a size."""
    if size <= KEY:
        return np.arange(size, dtype=np.int64)
    rng = np.random.default_rng([seed, size])
    starts = np.sort(rng.choice(size // RUN, KEY // RUN, replace=False)) * RUN
    return (starts[:, None] + np.arange(RUN)).ravel().astype(np.int64)


def _keys(values: Values, names: Sequence[str], places: NDArray[np.int64], level: str) -> Iterator[bytes | None]:
    """For each tensor its values at `places`, rounded to `level`, as bytes, or None where they say nothing (all
    equal, or not finite)."""
    step = max(1, TOGETHER // max(1, len(places)))
    for low in range(0, len(names), step):
        taken = np.stack([values.at(name, places) for name in names[low : low + step]])
        with np.errstate(invalid="ignore"):
            rounded = decode(encode(taken, level), level) + np.float32(0)
        telling = np.isfinite(rounded).all(axis=1) & (rounded != rounded[:, :1]).any(axis=1)
        for row, tells in zip(rounded, telling, strict=True):
            yield row.tobytes() if tells else None


def _by_size(values: Values, names: Iterable[str]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for name in names:
        groups[values.size(name)].append(name)
    return groups


def exact(
    a: Values, b: Values, names_a: Sequence[str], names_b: Sequence[str], *, level: str, seed: int
) -> list[Whole]:
    """Pairs whose sampled values agree bit for bit once rounded to `level`.

    Where several tensors of A hold the same values, all of them are named as ties. Constant tensors have no key
    and are left to the caller.
    """
    found: list[Whole] = []
    groups_a = _by_size(a, names_a)
    for size, group in _by_size(b, names_b).items():
        candidates = groups_a.get(size)
        if not candidates:
            continue
        places = _places(size, seed)
        shapes = {b.shape(name) for name in group}
        by_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, name in enumerate(candidates):
            by_shape[a.shape(name)].append(number)
        keyed: list[tuple[int, int, Order, bytes]] = []
        for shape, numbers in by_shape.items():
            members = [candidates[number] for number in numbers]
            tried = {order: None for target in shapes for order in orders(shape, target)}
            for rank, order in enumerate(tried):
                keys = _keys(a, members, moved(places, shape, order), level)
                keyed += [(n, rank, order, key) for n, key in zip(numbers, keys, strict=True) if key is not None]
        table: dict[bytes, list[tuple[str, Order]]] = defaultdict(list)
        for number, _, order, key in sorted(keyed):
            table[key].append((candidates[number], order))
        for name, wanted in zip(group, _keys(b, group, places, level), strict=True):
            if wanted is None or wanted not in table:
                continue
            fits = [(n, o) for n, o in table[wanted] if o in orders(a.shape(n), b.shape(name))]
            if fits:
                (first, order), rest = fits[0], fits[1:]
                ties = tuple(dict.fromkeys(n for n, _ in rest if n != first))
                found.append(Whole(first, name, order, cosine=1.0, margin=1.0, ties=ties))
    return found


def _standard(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows centred and scaled to length one; rows that are constant or not finite become zero."""
    finite = np.asarray(np.isfinite(samples).all(axis=1, keepdims=True))
    centred = np.where(finite, samples, 0).astype(np.float64)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.sqrt((centred**2).sum(axis=1, keepdims=True))
    scale = np.abs(np.nan_to_num(samples[:, :1])).astype(np.float64) * math.sqrt(samples.shape[1]) * 1e-6
    safe = np.where(length > np.where(np.isfinite(scale), scale, np.inf), length, np.inf)
    return (centred / safe).astype(np.float32)


def near(
    a: Values, b: Values, names_a: Sequence[str], names_b: Sequence[str], *, seed: int, places: int = SAMPLE
) -> list[Whole]:
    """Pairs of one size whose correlation over sampled places stands far above chance and above the runner-up.

    Parameters
    ----------
    places : of a tensor that are sampled

    Notes
    -----
    Values are centred: gains and shifts with a common mean would otherwise all look alike. An added constant or
    a positive factor does not change the score.
    """
    found: list[Whole] = []
    groups_a = _by_size(a, names_a)
    for size, group in _by_size(b, names_b).items():
        candidates = groups_a.get(size)
        if not candidates or size < 8:
            continue
        by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in group:
            by_shape[b.shape(name)].append(name)
        for shape, members in by_shape.items():
            sampled = lattice(shape, places, seed)
            trials = [(n, o) for n in candidates for o in orders(a.shape(n), shape)]
            if len(trials) * len(members) > MANY_PAIRS:
                # a family of which no representative is found is not looked at: experts of a stranger are many
                first, family = families(members)
                hits = [w.b for w in _best(a, b, first, trials, sampled, grid(shape, places))]
                members = list(dict.fromkeys(n for name in hits for n in family[name]))
            if trials and members:
                found += _best(a, b, members, trials, sampled, grid(shape, places))
    return found


def _best(
    a: Values,
    b: Values,
    members: list[str],
    trials: list[tuple[str, Order]],
    places: NDArray[np.int64],
    lengths: Sequence[int],
) -> list[Whole]:
    """For each of B's tensors the trial with the highest correlation, where it is beyond doubt.

    `places` are a grid of these `lengths`.
    """
    mine = _standard(np.stack([b.at(n, places) for n in members]))
    trials, ties = _distinct(a, trials, places)
    best = np.full(len(members), -1.0)
    second = np.full(len(members), -1.0)
    who = np.full(len(members), -1)
    block = max(1, (64 << 20) // (4 * len(places)))
    for start in range(0, len(trials), block):
        some = trials[start : start + block]
        theirs = _standard(np.stack([a.at(n, moved(places, a.shape(n), o)) for n, o in some]))
        step = max(1, (64 << 20) // (4 * len(some)))
        for low in range(0, len(members), step):
            scores = mine[low : low + step] @ theirs.T
            top = scores.argmax(axis=1)
            rows = np.arange(len(top))
            high = scores[rows, top]
            scores[rows, top] = -1
            runner = scores.max(axis=1) if scores.shape[1] > 1 else np.full(len(top), -1.0)
            part = slice(low, low + len(top))
            wins = high > best[part]
            second[part] = np.where(
                wins, np.maximum(best[part], np.maximum(runner, second[part])), np.maximum(second[part], high)
            )
            who[part] = np.where(wins, top + start, who[part])
            best[part] = np.where(wins, high, best[part])
    z = best * math.sqrt(len(places))
    sure = (best >= LEAST_COSINE) & (z >= LEAST_Z) & (best - np.maximum(second, 0) >= LEAST_MARGIN * best)
    found = []
    for i in np.flatnonzero(sure):
        name, order = trials[who[i]]
        margin = float(best[i] - max(second[i], 0.0))
        even = bool(best[i] > SURELY_EVEN) or _even(
            mine[i], _standard(a.at(name, moved(places, a.shape(name), order))[None])[0], lengths
        )
        found.append(
            Whole(name, members[i], order, cosine=float(best[i]), margin=margin, ties=ties[name, order], even=even)
        )
    return found


def _even(x: NDArray[np.float32], y: NDArray[np.float32], lengths: Sequence[int]) -> bool:
    """Whether two samples on a grid agree everywhere, not in some rows well and in others not at all."""
    x, y = x.reshape(lengths), y.reshape(lengths)
    for axis, length in enumerate(lengths):
        if length < FEWEST_LINES or x.size // length < FEWEST_IN_LINE:
            continue
        others = tuple(k for k in range(x.ndim) if k != axis)
        size = np.sqrt((x * x).sum(axis=others) * (y * y).sum(axis=others))
        lines = (x * y).sum(axis=others) / np.where(size > 0, size, np.inf)
        good = float(np.quantile(lines, 0.9))
        if good > GOOD_LINE and (lines < good / 3).mean() > STRAY_LINES:
            return False
    return True


def _distinct(
    a: Values, trials: list[tuple[str, Order]], places: NDArray[np.int64]
) -> tuple[list[tuple[str, Order]], dict[tuple[str, Order], tuple[str, ...]]]:
    """One trial for all tensors that hold the same values (tied weights), and the names it stands for."""
    seen: dict[bytes, list[tuple[str, Order]]] = {}
    for name, order in trials:
        seen.setdefault(a.at(name, moved(places, a.shape(name), order)).tobytes(), []).append((name, order))
    kept = [group[0] for group in seen.values()]
    ties = {g[0]: tuple(dict.fromkeys(n for n, _ in g[1:] if n != g[0][0])) for g in seen.values()}
    return kept, ties
