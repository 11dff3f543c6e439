"""From provenance of rows to matches: which tensors form one whole, and by which chain.

Tensors that share rows form a component. One with a single tensor on a side is a fusion (or, seen from the other
side, a split); anything else, and whatever no tiling explains, is written target by target as rows taken.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lineage.layout.induce import Match
from lineage.layout.operations import Operation, Pad, Slice
from lineage.match.chains import Names, PartShape, inverted, picked, tiled, windowed
from lineage.match.explain import Digit, Strides, strides, tile
from lineage.match.rows import Provenance, View, columns
from lineage.match.values import Values

__all__ = ["Fusion", "Piece", "components", "fuse", "matches", "taken"]

#: share of a tensor's rows below which a source is taken for a coincidence
LEAST_SHARE = 0.02
#: share of the shorter tensor's rows that nearly found ones must reach to connect two
GOOD_PART = 0.3
#: share of a target's rows that must be known before rows are taken one by one
LEAST_KNOWN = 0.999
#: rows of a run (even steps in one source) from which on rows that were only nearly found are believed, and how many
#: rows there must be for each run on average
LEAST_RUN, LEAST_ROWS_A_RUN = 3, 4
#: rows looked at for what new rows hold; the logarithm of the ratio of mean squares that counts as none, and its
#: deviations by chance
PROBED, SAME_CHANGE, CHANCE = 64, 0.4, 4.0


class Piece(NamedTuple):
    """One part: its full shape, the view that gave its rows, and where they lie in the whole, -1 where unknown."""

    name: str
    shape: tuple[int, ...]
    view: View
    rows: NDArray[np.int64]


class Fusion(NamedTuple):
    """A whole and the parts that may make it up; `grows` where rows of the whole without a part hold more than 0."""

    whole: str
    shape: tuple[int, ...]
    view: View
    pieces: tuple[Piece, ...]
    whole_is_a: bool
    grows: bool = False

    @property
    def rows(self) -> int:
        """Rows of the whole under its view."""
        lengths = [n for n in self.shape if n != 1]
        return math.prod(lengths[i] for i in self.view.rows)

    def match(self, entries: Sequence[str | tuple[str, ...]], chain: tuple[Operation, ...]) -> Match:
        """The match for a chain from the parts to the whole, in the direction from A to B."""
        if self.whole_is_a:
            return Match(targets=tuple(entries), sources=(self.whole,), ops=inverted(chain, entries))
        return Match(targets=(self.whole,), sources=tuple(entries), ops=chain)


class Component(NamedTuple):
    """Tensors linked by shared rows, with B's provenance."""

    a: tuple[str, ...]
    b: tuple[Provenance, ...]


def components(found: Sequence[Provenance], a: Values, *, exact: bool) -> list[Component]:
    """Connected sets of A's and B's tensors; sources that gave next to no rows do not connect.

    Rows that were only nearly found also point to strangers by chance: there, a source must have given a good part
    of its own rows, or of the tensor's.
    """
    import networkx as nx  # a tenth of a second, which only fusions need

    graph = nx.Graph()
    by_name = {p.name: p for p in found}
    for p in found:
        counts = np.bincount(p.source[p.source >= 0], minlength=len(p.sources))
        graph.add_node(("b", p.name))
        for (name, view), count in zip(p.sources, counts, strict=True):
            least = LEAST_SHARE if exact else GOOD_PART
            if count >= max(1, least * min(len(p.source), _height(a, name, view))):
                graph.add_edge(("b", p.name), ("a", name))
    out = []
    for nodes in nx.connected_components(graph):
        sources = tuple(sorted(n for side, n in nodes if side == "a"))
        targets = tuple(by_name[n] for n in sorted(n for side, n in nodes if side == "b"))
        if sources:
            out.append(Component(sources, targets))
    return out


def matches(component: Component, a: Values, b: Values, names: Names, *, exact: bool) -> list[Match]:
    """Matches that explain a component.

    Where no tiling explains the component, each of its targets is looked at alone: as a window of a larger tensor
    that others share, or as rows taken one by one. Among rows that were only nearly found single errors are
    expected: they are taken in long runs only.
    """
    whole = _tiled(component, a, b, names)
    if whole is not None:
        return [whole]
    found = []
    for p in component.b:
        match = _tiled(_alone(component, p), a, b, names) if len(component.b) > 1 else None
        if match is None:
            match = taken(p if exact else _mended(p, component), a, b, names, exact=exact)
        if match is not None:
            found.append(match)
    return found


def _tiled(component: Component, a: Values, b: Values, names: Names) -> Match | None:
    """The component as one tensor and its parts."""
    attempts = []
    if len(component.b) == 1:
        attempts.append(_whole_b(component, a, b))
    if len(component.a) == 1:
        attempts.append(_whole_a(component, a, b))
    return next((m for attempt in attempts if attempt is not None and (m := fuse(attempt, names)) is not None), None)


def _alone(component: Component, p: Provenance) -> Component:
    """One target of a component with its own sources."""
    mine = {name for name, _ in p.sources}
    return Component(tuple(n for n in component.a if n in mine), (p,))


def _whole_b(component: Component, a: Values, b: Values) -> Fusion | None:
    """B's tensor as the whole, A's as its parts."""
    p = component.b[0]
    best: dict[str, Piece] = {}
    for number, (name, view) in enumerate(p.sources):
        mine = np.flatnonzero(p.source == number)
        height = _height(a, name, view)
        if name not in component.a or len(mine) < LEAST_SHARE * min(len(p.source), height):
            continue
        rows = np.full(height, -1, np.int64)
        rows[p.row[mine]] = mine
        if name not in best or (rows >= 0).sum() > (best[name].rows >= 0).sum():
            best[name] = Piece(name, a.checkpoint.specs[name].shape, view, rows)
    if not best:
        return None
    grows = len(best) == 1 and _grows(a, b, p, next(iter(best.values())))
    return Fusion(p.name, b.checkpoint.specs[p.name].shape, p.view, tuple(best.values()), False, grows)


def _grows(a: Values, b: Values, p: Provenance, piece: Piece) -> bool:
    """Whether rows of B's tensor that come from nowhere hold more than zeros: zeros, with what its other rows were
    changed by, hold no more than that change."""
    rest = np.setdiff1d(np.arange(len(p.source)), piece.rows)[:PROBED]
    every = np.arange(b.size(p.name) // len(p.source))
    new = columns(b, p.name, p.view, every, rest)
    if not (new != 0).any():
        return False
    mine = np.flatnonzero(piece.rows >= 0)[:PROBED]
    with np.errstate(over="ignore", invalid="ignore"):
        change = columns(b, p.name, p.view, every, piece.rows[mine]) - columns(a, piece.name, piece.view, every, mine)
        there, here = (float(np.square(x, dtype=np.float64).mean()) for x in (change, new))
    chance = CHANCE * math.sqrt(2 / new.size + 2 / change.size)
    if not (math.isfinite(here) and 0 < there < math.inf):
        return True
    return not (abs(math.log(here / there)) < min(SAME_CHANGE, chance))


def _whole_a(component: Component, a: Values, b: Values) -> Fusion | None:
    """A's tensor as the whole, B's as its parts."""
    name = component.a[0]
    votes: Counter[View] = Counter()
    for p in component.b:
        for number, (_, view) in enumerate(p.sources):
            votes[view] += int((p.source == number).sum())
    view = votes.most_common(1)[0][0]
    pieces = []
    for p in component.b:
        if (name, view) not in p.sources:
            return None
        number = p.sources.index((name, view))
        rows = np.where(p.source == number, p.row, -1)
        pieces.append(Piece(p.name, b.checkpoint.specs[p.name].shape, p.view, rows))
    grows = len(pieces) == 1 and _holds(a, name, view, pieces[0].rows)
    return Fusion(name, a.checkpoint.specs[name].shape, view, tuple(pieces), True, grows)


def _holds(a: Values, name: str, view: View, used: NDArray[np.int64]) -> bool:
    """Whether rows of A's tensor that go nowhere hold anything but zeros."""
    height = _height(a, name, view)
    rest = np.setdiff1d(np.arange(height), used)
    every = np.arange(a.size(name) // height)
    return bool(len(rest)) and (
        bool((columns(a, name, view, every, rest[:PROBED]) != 0).any())
        or len(rest) > PROBED
        and bool((columns(a, name, view, every, rest) != 0).any())
    )


def _height(values: Values, name: str, view: View) -> int:
    shape = values.shape(name)
    return math.prod(shape[i] for i in view.rows)


def fuse(fusion: Fusion, names: Names) -> Match | None:
    """The match of a whole and its parts: parts that tile it, one in another order, or a window of it."""
    found = []
    for piece in fusion.pieces:
        place = strides(piece.rows)
        if place is None:
            return None
        found.append(place)
    for grouping in _groupings(fusion.pieces, found):
        tiling = tile([g.strides for g in grouping], fusion.rows)
        if tiling is None:
            continue
        parts = [
            PartShape(g.members[0].shape, g.members[0].view, len(g.members) if g.stacked else None) for g in grouping
        ]
        chain = tiled(tiling, parts, fusion.shape, fusion.view, names)
        if chain is not None:
            return fusion.match([grouping[i].entry for i in tiling.order], chain)
    if len(found) > 1:
        return None
    piece, place = fusion.pieces[0], found[0]
    if len(piece.rows) == fusion.rows:
        return _turned(fusion, piece, place, names)
    if len(piece.rows) < fusion.rows and [d.stride for d in place.digits] == [1]:
        return _window(fusion, piece, place.offset, names)
    return None


def _turned(fusion: Fusion, piece: Piece, place: Strides, names: Names) -> Match | None:
    """One tensor whose rows run in another order than any pattern says (swapped halves), as ranges of rows."""
    rows = place.rows()
    if len(np.unique(rows)) != fusion.rows or rows.min() < 0 or rows.max() >= fusion.rows:
        return None
    part, whole = PartShape(piece.shape, piece.view), PartShape(fusion.shape, fusion.view)
    if fusion.whole_is_a:
        chain = picked([rows], [whole], piece.shape, piece.view, names)
        return None if chain is None else Match(targets=(piece.name,), sources=(fusion.whole,), ops=chain)
    chain = picked([np.argsort(rows)], [part], fusion.shape, fusion.view, names)
    return None if chain is None else Match(targets=(fusion.whole,), sources=(piece.name,), ops=chain)


def _window(fusion: Fusion, piece: Piece, start: int, names: Names) -> Match | None:
    """A part that is an unbroken window of a larger tensor: rows cut off (from A) or rows that are new (in B)."""
    stop = start + len(piece.rows)
    if stop > fusion.rows:
        return None
    if fusion.whole_is_a:
        step = Slice(0, start, stop, fusion.rows, None if fusion.grows else 0.0)
        chain = windowed(PartShape(fusion.shape, fusion.view), step, piece.shape, piece.view, names)
        return None if chain is None else Match(targets=(piece.name,), sources=(fusion.whole,), ops=chain)
    pad = Pad(0, start, fusion.rows - stop, None if fusion.grows else 0.0)
    chain = windowed(PartShape(piece.shape, piece.view), pad, fusion.shape, fusion.view, names)
    return None if chain is None else Match(targets=(fusion.whole,), sources=(piece.name,), ops=chain)


class _Group(NamedTuple):
    members: tuple[Piece, ...]
    strides: Strides
    stacked: bool

    @property
    def entry(self) -> str | tuple[str, ...]:
        return tuple(p.name for p in self.members) if self.stacked else self.members[0].name


_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def _groupings(pieces: Sequence[Piece], found: list[Strides]) -> list[list[_Group]]:
    """Ways to gather parts that differ in one number of their names into stacks; none gathered comes last."""
    plain = [_Group((p,), s, False) for p, s in zip(pieces, found, strict=True)]
    families: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
    for index, piece in enumerate(pieces):
        for hit in _NUMBER.finditer(piece.name):
            key = (piece.name[: hit.start()], piece.name[hit.end() :])
            families[key].append((int(hit.group()), index))
    best: list[_Group] = []
    left = set(range(len(pieces)))
    for members in sorted(families.values(), key=len, reverse=True):
        mine = sorted((n, i) for n, i in members if i in left)
        if len(mine) < 2:
            continue
        stack = _stacked([pieces[i] for _, i in mine], [found[i] for _, i in mine])
        if stack is not None:
            best.append(stack)
            left -= {i for _, i in mine}
    if not best:
        return [plain]
    return [best + [plain[i] for i in sorted(left)], plain]


def _stacked(pieces: Sequence[Piece], found: list[Strides]) -> _Group | None:
    """One stack of equal parts whose offsets rise evenly."""
    first = found[0]
    if any(s.digits != first.digits for s in found) or len({(p.view, p.shape) for p in pieces}) > 1:
        return None
    step = found[1].offset - first.offset
    if step <= 0 or any(s.offset != first.offset + i * step for i, s in enumerate(found)):
        return None
    digits = (Digit(len(found), step), *first.digits)
    return _Group(tuple(pieces), Strides(digits, first.offset, min(s.agreement for s in found)), True)


def taken(p: Provenance, a: Values, b: Values, names: Names, *, exact: bool = True) -> Match | None:
    """B's tensor as rows taken from A's, where (nearly) all are known and lie source by source."""
    if (p.source >= 0).mean() < LEAST_KNOWN or not exact and not _in_runs(p):
        return None
    borders = np.flatnonzero(np.diff(p.source)) + 1
    starts = np.r_[0, borders]
    stops = np.r_[borders, len(p.source)]
    if len(starts) > 64:
        return None
    takes = [p.row[s:e] for s, e in zip(starts, stops, strict=True)]
    sources = [p.sources[p.source[s]] for s in starts]
    parts = [PartShape(a.checkpoint.specs[name].shape, view) for name, view in sources]
    chain = picked(takes, parts, b.checkpoint.specs[p.name].shape, p.view, names)
    if chain is None:
        return None
    return Match(targets=(p.name,), sources=tuple(n for n, _ in sources), ops=chain)


def _mended(p: Provenance, component: Component) -> Provenance:
    """The provenance without coincidental sources; a single row between two that follow each other is between them."""
    kept = np.array([name in component.a for name, _ in p.sources])
    source = np.where((p.source >= 0) & kept[p.source], p.source, -1)
    row = np.where(source >= 0, p.row, -1)
    middle = np.arange(1, len(row) - 1)
    before, after = middle - 1, middle + 1
    between = (source[before] == source[after]) & (source[before] >= 0) & (row[after] - row[before] == 2)
    odd = middle[between & ((source[middle] != source[before]) | (row[middle] != row[before] + 1))]
    source[odd], row[odd] = source[odd - 1], row[odd - 1] + 1
    return p._replace(source=source, row=row)


def _in_runs(p: Provenance) -> bool:
    """Whether the rows come in runs too long for chance, none of them twice."""
    if len(np.unique(np.stack([p.source, p.row]), axis=1).T) < len(p.row):
        return False
    steps = np.where(np.diff(p.source) == 0, np.diff(p.row), 0)
    lengths, at = [], 0
    while at < len(p.row):
        stop = at + 1
        while stop < len(p.row) and steps[stop - 1] and steps[stop - 1] == steps[at]:
            stop += 1
        lengths.append(stop - at)
        at = stop
    return min(lengths) >= LEAST_RUN and len(p.row) >= LEAST_ROWS_A_RUN * len(lengths)
