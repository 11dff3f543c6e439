"""Which row of A each row of B is: provenance through every way of seeing a tensor as rows and columns.

A *view* picks the axes that make a row's content; the others, in order, count the rows. Rows are compared exactly,
by a key of a few of their values, or nearly, by their correlation over sampled columns.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import decode, encode
from lineage.match.nearest import MANY_ROWS, RIVAL, highest
from lineage.match.spread import spread
from lineage.match.values import SMALL, Values
from lineage.match.words import families

__all__ = [
    "Provenance",
    "Rows",
    "View",
    "columns",
    "contiguous",
    "exact_rows",
    "families",
    "near_rows",
    "probe_rows",
    "provenance",
    "views",
]

#: columns of a row that make its key, and columns that a correlation is taken over
KEY = 16
COLUMNS = 256
FEWEST_COLUMNS = 48
#: values sampled of all rows together, which bounds memory
SAMPLED = 16 << 20
#: rows of a tensor that are looked up among all rows before it is compared as a whole
PROBES = 48
#: rows that no source is known of, for one that is looked up among all: hundreds of short sources are then found in
#: three or four rounds, each with a few votes
PER_PROBE = 16
#: rows of a tensor whose keys are looked up before all are, where there are so many times more: a fiftieth of the rows
#: escapes them once in 200 times
LOOKED_UP, MANY_PROBES = 256, 8
#: size of values from which on squares leave float32
HUGE = 1e15
#: elements above which only views are tried whose rows and columns are unbroken runs of axes, in every slab of a stack
LARGE = 1 << 24
#: a row wider than this is read at the chosen places only
WIDE = 1 << 16
#: a row narrower than this says too little about where it comes from
NARROW = 4
#: correlation of two rows below which they are strangers
LEAST_COSINE = 0.3
#: deviations by which a tensor of one row must stand above chance, less where there are more rows
ALONE = 3.0
#: share of the probes that found a row in a source from which on one vote is enough
LEAST_VOTES = 0.02
#: share of a representative's rows that must be found for its family to be looked at
LEAST_FOUND = 0.2
#: share of the best view's correlation from which on another view shows the same rows
SAME_SCORE = 0.85


class View(NamedTuple):
    """Axes (of the shape without 1-long ones) that count rows, and those that make a row."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]


class Provenance(NamedTuple):
    """For each row of B's tensor under `view`: the index in `sources` and the row there, or -1."""

    name: str
    view: View
    sources: tuple[tuple[str, View], ...]
    source: NDArray[np.int64]
    row: NDArray[np.int64]


def views(shape: Sequence[int]) -> list[View]:
    """Views of a tensor, the usual ones first: trailing axes as columns, then leading ones, then any.

    Examples
    --------
    >>> views((6, 4))
    [View(rows=(0,), columns=(1,)), View(rows=(1,), columns=(0,)), View(rows=(), columns=(0, 1))]
    """
    axes = range(len(shape))
    found = []
    for split in range(len(shape) - 1, -1, -1):
        found.append(View(tuple(axes[:split]), tuple(axes[split:])))
    found[1:1] = [View(tuple(axes[split:]), tuple(axes[:split])) for split in range(1, len(shape))]
    found += [View((0, *axes[split:]), tuple(axes[1:split])) for split in range(2, len(shape))]
    if math.prod(shape) <= LARGE:
        for count in range(1, len(shape)):
            for columns in itertools.combinations(axes, count):
                view = View(tuple(i for i in axes if i not in columns), columns)
                if view not in found:
                    found.append(view)
    return [v for v in dict.fromkeys(found) if v.columns and math.prod(shape[i] for i in v.columns) >= NARROW]


def columns(
    values: Values, name: str, view: View, chosen: NDArray[np.int64], rows: NDArray[np.int64] | None = None
) -> NDArray[np.float32]:
    """Values of the `chosen` columns of every row (or of the given `rows`), shape (rows, chosen)."""
    shape = values.shape(name)
    height = math.prod(shape[i] for i in view.rows)
    width = math.prod(shape[i] for i in view.columns)
    plain = values.size(name) > SMALL and values.checkpoint.specs[name].plain
    if plain and _turned_slabs(view):
        across = height // shape[0]
        if rows is not None:
            slab, place = np.divmod(rows, across)
            wanted = (slab[:, None] * width + chosen) * across + place[:, None]
            return values.at(name, wanted.ravel()).reshape(len(rows), len(chosen))
        slabs = [
            np.stack([values.rows(name, at + c, at + c + 1, across)[0] for c in chosen.tolist()], axis=1)
            for at in range(0, shape[0] * width, width)
        ]
        return np.concatenate(slabs)
    if not plain or not contiguous(view):
        full = values.whole(name).reshape(shape).transpose(view.rows + view.columns).reshape(height, width)
        return full[:, chosen] if rows is None else full[rows][:, chosen]
    if view.rows and view.columns and view.rows[0] < view.columns[0] or not view.rows:
        if rows is not None or width >= WIDE:
            wanted = np.arange(height) if rows is None else rows
            return values.at(name, (wanted[:, None] * width + chosen).ravel()).reshape(len(wanted), len(chosen))
        out = np.empty((height, len(chosen)), np.float32)
        step = max(1, (1 << 21) // width)
        for low in range(0, height, step):
            high = min(height, low + step)
            out[low:high] = values.columns(name, low, high, width, chosen)
        return out
    if rows is not None:
        return values.at(name, (chosen[None, :] * height + rows[:, None]).ravel()).reshape(len(rows), len(chosen))
    return np.stack([values.rows(name, c, c + 1, height)[0] for c in chosen.tolist()], axis=1)


def _turned_slabs(view: View) -> bool:
    """True where a row stands in a column of each slab of a stack."""
    joined = view.rows[:1] + view.columns + view.rows[1:]
    return len(view.rows) > 1 and list(joined) == list(range(len(joined)))


def contiguous(view: View) -> bool:
    """True where rows and columns are each an unbroken run of axes."""
    joined = view.rows + view.columns
    turned = view.columns + view.rows
    return list(joined) == sorted(joined) or list(turned) == sorted(turned)


def _chosen(width: int, count: int, seed: int) -> NDArray[np.int64]:
    if width <= count:
        return np.arange(width, dtype=np.int64)
    rng = np.random.default_rng([seed, width])
    return np.sort(rng.choice(width, count, replace=False)).astype(np.int64)


class Rows(NamedTuple):
    """Rows of many tensors under one width."""

    owners: list[tuple[str, View]]
    owner: NDArray[np.int64]
    row: NDArray[np.int64]


def _owners(values: Values, names: Iterable[str]) -> dict[int, list[tuple[str, View]]]:
    """(tensor, view) by the width of a row."""
    found: dict[int, list[tuple[str, View]]] = defaultdict(list)
    for name in names:
        shape = values.shape(name)
        for view in views(shape):
            found[math.prod(shape[i] for i in view.columns)].append((name, view))
    return found


def _gather(
    values: Values,
    owners: list[tuple[str, View]],
    chosen: NDArray[np.int64],
    form: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    threads: int,
) -> tuple[Rows, NDArray[np.float32]]:
    """The rows of all owners and, in the `form` asked for, the values of their chosen columns."""
    alike: dict[tuple[tuple[int, ...], View], list[str]] = defaultdict(list)
    for name, view in owners:
        alike[values.shape(name), view].append(name)
    groups, listed, heights = [], [], []
    for (shape, view), names in alike.items():
        height = math.prod(shape[i] for i in view.rows)
        many = max(1, SMALL // max(1, math.prod(shape)))
        for low in range(0, len(names), many):
            groups.append((names[low : low + many], shape, view))
        listed += [(name, view) for name in names]
        heights += [height] * len(names)
    if not groups:
        return Rows([], np.empty(0, np.int64), np.empty(0, np.int64)), np.empty((0, len(chosen)), np.float32)
    sizes = [len(names) * math.prod(shape) for names, shape, _ in groups]
    parts = spread(lambda group: form(_together(values, *group, chosen)), groups, sizes, threads)
    owner = np.repeat(np.arange(len(listed)), heights)
    starts = np.repeat(np.cumsum([0, *heights[:-1]]), heights)
    return Rows(listed, owner, np.arange(len(owner)) - starts), np.concatenate(parts)


def _together(
    values: Values, names: list[str], shape: tuple[int, ...], view: View, chosen: NDArray[np.int64]
) -> NDArray[np.float32]:
    """The chosen columns of every row of equal tensors, one tensor after the other."""
    if len(names) == 1:
        return columns(values, names[0], view, chosen)
    whole = np.stack([values.whole(n) for n in names]).reshape(len(names), *shape)
    turned = whole.transpose(0, *(i + 1 for i in view.rows + view.columns))
    picked: NDArray[np.float32] = turned.reshape(-1, math.prod(shape[i] for i in view.columns))[:, chosen]
    return picked


def _keys(samples: NDArray[np.float32], level: str) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """One 64-bit key a row, and which rows say something (not constant, all finite)."""
    if len(samples) > MANY_ROWS:
        done = [_keys(samples[low : low + MANY_ROWS], level) for low in range(0, len(samples), MANY_ROWS)]
        return np.concatenate([k for k, _ in done]), np.concatenate([s for _, s in done])
    with np.errstate(invalid="ignore"):
        rounded = decode(encode(samples, level), level).astype(np.float32) + np.float32(0)
    says = np.isfinite(rounded).all(axis=1) & (rounded != rounded[:, :1]).any(axis=1)
    weights = np.random.default_rng(20_241).integers(1, 2**63, rounded.shape[1], dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    codes = np.ascontiguousarray(rounded).view(np.uint32).astype(np.uint64)
    codes ^= codes >> np.uint64(15)
    codes *= np.uint64(0x9E3779B97F4A7C15)
    codes ^= codes >> np.uint64(29)
    return (codes * weights).sum(axis=1, dtype=np.uint64), says


def _spread(first: list[str], family: dict[str, list[str]], found: Iterable[str]) -> list[str]:
    """The rest of every family of which a representative was found."""
    wanted = dict.fromkeys(n for name in found for n in family[name])
    return [n for n in wanted if n not in set(first)]


def exact_rows(
    a: Values,
    b: Values,
    names_a: Sequence[str],
    names_b: Sequence[str],
    *,
    level: str,
    seed: int,
    threads: int = 2,
) -> list[Provenance]:
    """Provenance of B's tensors by equal keys; for each tensor the view under which most rows are found."""
    first, family = families(names_b)
    tables = _Tables(a, names_a, level=level, seed=seed, threads=threads)
    best = tables.look_up(b, first)
    hits = [n for n, p in best.items() if (p.source >= 0).mean() >= LEAST_FOUND]
    best |= tables.look_up(b, _spread(first, family, hits))
    return list(best.values())


class _Tables:
    """Sorted row keys of A's tensors by width, made when first asked for."""

    def __init__(self, a: Values, names: Sequence[str], *, level: str, seed: int, threads: int) -> None:
        self.a, self.level, self.seed, self.threads = a, level, seed, threads
        self.owners = _owners(a, names)
        self.made: dict[int, tuple[Rows, NDArray[np.int64], NDArray[np.uint64]]] = {}

    def at(self, width: int) -> tuple[Rows, NDArray[np.int64], NDArray[np.uint64]]:
        """Rows of a width, the order that sorts their keys, and the sorted keys."""
        if width not in self.made:
            rows, samples = _gather(
                self.a, self.owners[width], _chosen(width, KEY, self.seed), np.asarray, self.threads
            )
            keys, says = _keys(samples, self.level)
            order = np.flatnonzero(says)
            order = order[np.argsort(keys[order], kind="stable")]
            self.made[width] = rows, order, keys[order]
        return self.made[width]

    def look_up(self, b: Values, names: Sequence[str]) -> dict[str, Provenance]:
        """The best provenance of each tensor of B of which a row is found."""
        best: dict[str, Provenance] = {}
        for width, owners in _owners(b, names).items():
            if width not in self.owners:
                continue
            rows, order, sorted_keys = self.at(width)
            if not len(order):
                continue
            chosen = _chosen(width, KEY, self.seed)
            found = partial(self._found, b, chosen=chosen, width=width)
            for one in spread(found, owners, [b.size(name) for name, _ in owners], self.threads):
                if one is not None:
                    _keep(best, one)
        return best

    def _found(self, b: Values, owner: tuple[str, View], *, chosen: NDArray[np.int64], width: int) -> Provenance | None:
        """Provenance of one tensor under one view, None where a few of its rows are not found."""
        name, view = owner
        rows, order, sorted_keys = self.made[width]
        height = math.prod(b.shape(name)[i] for i in view.rows)
        if height > MANY_PROBES * LOOKED_UP:
            probes = columns(b, name, view, chosen, probe_rows(height, LOOKED_UP, self.seed))
            if (_equal(probes, order, sorted_keys, self.level) < 0).all():
                return None
        found = _equal(columns(b, name, view, chosen), order, sorted_keys, self.level)
        return provenance(name, view, rows, found)


def _equal(
    samples: NDArray[np.float32], order: NDArray[np.int64], sorted_keys: NDArray[np.uint64], level: str
) -> NDArray[np.int64]:
    """For each row the one with its key, -1 where there is none."""
    keys, says = _keys(samples, level)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(order) - 1)
    return np.where(says & (sorted_keys[place] == keys), order[place], -1)


def provenance(name: str, view: View, rows: Rows, found: NDArray[np.int64]) -> Provenance:
    owner = np.where(found >= 0, rows.owner[found] if len(rows.owner) else -1, -1)
    used = sorted(set(owner[owner >= 0].tolist()), key=lambda o: int(np.flatnonzero(owner == o)[0]))
    number = {o: i for i, o in enumerate(used)}
    source = np.array([number.get(int(o), -1) for o in owner], np.int64)
    row = np.where(found >= 0, rows.row[found] if len(rows.row) else -1, -1)
    return Provenance(name, view, tuple(rows.owners[o] for o in used), source, row)


def _keep(best: dict[str, Provenance], new: Provenance) -> None:
    """Prefers the larger share of rows found, then more rows (they say more about the layout), then the first seen."""
    if not (new.source >= 0).any():
        return
    old = best.get(new.name)

    def rank(p: Provenance) -> tuple[float, bool, int]:
        names = {n for n, _ in p.sources}
        return (round(float((p.source >= 0).mean()), 2), len(p.source) > 1, -len(names))

    if old is None or rank(new) > rank(old):
        best[new.name] = new


def _unit(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows centred and scaled to length one; constant ones become zero."""
    if not (samples.max(initial=0) < HUGE and samples.min(initial=0) > -HUGE):
        # numbers whose squares float32 cannot hold say as little as those that are none
        samples = np.where(np.abs(samples) < HUGE, samples, 0).astype(np.float32)
    centred: NDArray[np.float32] = samples - samples.mean(axis=1, keepdims=True)
    length = np.sqrt(np.einsum("ij,ij->i", centred, centred))[:, None]
    centred /= np.where(length > 0, length, np.inf)
    return centred


def near_rows(
    a: Values, b: Values, names_a: Sequence[str], names_b: Sequence[str], *, seed: int, threads: int = 2
) -> list[Provenance]:
    """Provenance of B's tensors by correlation: a few rows against all of A's first, then whole against the sources.

    A row without a clear nearest neighbour stays -1; single errors are expected and left to the explanation.
    """
    first, family = families(names_b)
    by_width = _owners(a, names_a)
    best: dict[str, list[tuple[float, Provenance]]] = defaultdict(list)
    todo = first
    while todo:
        for width, owners_b in _owners(b, todo).items():
            if width not in by_width or width < 2 * NARROW:
                continue
            height = sum(math.prod(a.shape(n)[i] for i in v.rows) for n, v in by_width[width])
            chosen = _chosen(width, max(FEWEST_COLUMNS, min(COLUMNS, SAMPLED // max(1, height))), seed)
            rows_a, unit_a = _gather(a, by_width[width], chosen, _unit, threads)
            nearest = partial(_nearest, b, chosen=chosen, rows=rows_a, unit_a=unit_a, seed=seed)
            found = spread(nearest, owners_b, [b.size(name) for name, _ in owners_b], threads)
            for (name, _), got in zip(owners_b, found, strict=True):
                if got is not None:
                    best[name].append(got)
        todo = _spread(first, family, best) if todo is first else []
    return [_usual(a, b, found) for found in best.values()]


def _usual(a: Values, b: Values, found: list[tuple[float, Provenance]]) -> Provenance:
    """Of the views that show (nearly) the same correlation the most usual one, so that all layers get the same."""
    top = max(score for score, _ in found)

    def oddness(p: Provenance) -> tuple[int, int]:
        mine = views(b.shape(p.name)).index(p.view)
        return mine, min(views(a.shape(name)).index(view) for name, view in p.sources)

    return min((p for score, p in found if score >= SAME_SCORE * top), key=oddness)


def probe_rows(height: int, count: int, seed: int) -> NDArray[np.int64]:
    """Rows to look up: one from each of `count` equal stretches, so that no large part goes unseen."""
    if height <= count:
        return np.arange(height, dtype=np.int64)
    edges = np.linspace(0, height, count + 1).astype(np.int64)
    return np.random.default_rng([seed, height]).integers(edges[:-1], edges[1:], dtype=np.int64)


def _nearest(
    b: Values,
    owner: tuple[str, View],
    *,
    chosen: NDArray[np.int64],
    rows: Rows,
    unit_a: NDArray[np.float32],
    seed: int,
) -> tuple[float, Provenance] | None:
    """Provenance of one tensor under one view, with its mean correlation."""
    name, view = owner
    shape = b.shape(name)
    height = math.prod(shape[i] for i in view.rows)
    probes = probe_rows(height, PROBES if len(unit_a) < MANY_ROWS else PROBES // 2, seed)
    top, high = highest(_unit(columns(b, name, view, chosen, probes)), unit_a)
    noise = 1 / math.sqrt(max(1, len(chosen) - 1))
    alone = ALONE / height**2  # one row has no others to bear it out
    floor = max(LEAST_COSINE, noise * (math.sqrt(2 * math.log(max(2, len(unit_a)))) + alone))
    sure = high > floor
    if sure.mean() < 0.3:
        return None
    full = _unit(columns(b, name, view, chosen))
    owners = _voted(rows.owner[top[sure]], least=2 if height > 1 else 1)
    found, value = _among(full, rows, unit_a, owners, noise)
    lost = np.flatnonzero(found < 0)
    while len(lost):  # a source of few rows may have had no probe
        some = lost[probe_rows(len(lost), max(PROBES, len(lost) // PER_PROBE), seed)]
        top, high = highest(full[some], unit_a)
        more = np.union1d(owners, _voted(rows.owner[top[high > floor]], least=2))
        if len(more) == len(owners):
            break
        owners = more
        found, value = _among(full, rows, unit_a, owners, noise)
        lost = np.flatnonzero(found < 0)
    if not (found >= 0).any():
        return None
    return float(np.where(found >= 0, value, 0).mean()), provenance(name, view, rows, found)


def _voted(owners: NDArray[np.int64], *, least: int) -> NDArray[np.int64]:
    """Tensors that own several of the rows found, or a good share of them."""
    found, votes = np.unique(owners, return_counts=True)
    chosen: NDArray[np.int64] = found[(votes >= least) | (votes >= LEAST_VOTES * len(owners))]
    return chosen


def _among(
    full: NDArray[np.float32], rows: Rows, unit_a: NDArray[np.float32], owners: NDArray[np.int64], noise: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest row of these owners for each row, -1 where none is near, and its correlation."""
    inside = np.flatnonzero(np.isin(rows.owner, owners))
    where, value = highest(full, unit_a[inside])
    place = inside[where]
    floor = max(LEAST_COSINE, noise * math.sqrt(2 * math.log(max(2, len(inside)))))
    best = np.zeros(len(unit_a), np.float32)
    np.maximum.at(best, place, value)
    # a row that another claims with far more right came there by chance
    return np.where((value > floor) & (value >= RIVAL * best[place]), place, -1), value
