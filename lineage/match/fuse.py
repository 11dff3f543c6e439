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

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from lineage.layout.induce import Match
from lineage.layout.operations import Operation, Pad, Slice
from lineage.match.chains import Names, PartShape, inverted, picked, tiled, windowed
from lineage.match.explain import Digit, Strides, strides, tile
from lineage.match.rows import Provenance, View, columns
from lineage.match.values import Values

__all__ = ["Embedding", "Piece", "components", "matches"]

#: share of a tensor's rows below which a source is taken for a coincidence
LEAST_SHARE = 0.02
#: share of the shorter tensor's rows that nearly found ones must reach to connect two
GOOD_PART = 0.3
#: share of a target's rows that must be known before rows are taken one by one
LEAST_KNOWN = 0.999


class Piece(NamedTuple):
    """Rows of one part and where they lie in the whole, -1 where unknown."""

    name: str
    view: View
    rows: NDArray[np.int64]


class Embedding(NamedTuple):
    """How parts lie in the rows of a whole; the same arrangement serves their biases."""

    whole: str
    rows: int
    entries: tuple[str | tuple[str, ...], ...]
    strides: tuple[Strides, ...]
    whole_is_a: bool


class Component(NamedTuple):
    """Tensors linked by shared rows, with B's provenance."""

    a: tuple[str, ...]
    b: tuple[Provenance, ...]


def components(found: Sequence[Provenance], a: Values, *, exact: bool) -> list[Component]:
    """Connected sets of A's and B's tensors; sources that gave next to no rows do not connect.

    Rows that were only nearly found also point to strangers by chance: there, a source must have given a good part
    of its own rows, or of the tensor's.
    """
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
        a = tuple(sorted(n for side, n in nodes if side == "a"))
        b = tuple(by_name[n] for n in sorted(n for side, n in nodes if side == "b"))
        if a:
            out.append(Component(a, b))
    return out


def matches(
    component: Component, a: Values, b: Values, names: Names, *, exact: bool
) -> tuple[list[Match], list[Embedding]]:
    """Matches that explain a component, and the embeddings behind them.

    Rows that were only nearly found are never taken one by one: single errors among them are expected.
    """
    attempts = []
    if len(component.b) == 1:
        attempts.append(_whole_b(component, a, b))
    if len(component.a) == 1:
        attempts.append(_whole_a(component, a, b))
    for attempt in attempts:
        if attempt is None:
            continue
        whole, whole_values, part_values, view, pieces, whole_is_a = attempt
        fusion = _fusion(whole, whole_values, part_values, view, pieces, names, whole_is_a)
        if fusion is not None:
            return [fusion[0]], [fusion[1]]
    if not exact:
        return [], []
    return [m for p in component.b if (m := _take(p, a, b, names)) is not None], []


_Attempt = tuple[str, Values, Values, View, list[Piece], bool]


def _whole_b(component: Component, a: Values, b: Values) -> _Attempt | None:
    """B's tensor as the whole, A's as its parts."""
    p = component.b[0]
    pieces = []
    for number, (name, view) in enumerate(p.sources):
        mine = np.flatnonzero(p.source == number)
        height = _height(a, name, view)
        if name not in component.a or len(mine) < LEAST_SHARE * min(len(p.source), height):
            continue
        rows = np.full(height, -1, np.int64)
        rows[p.row[mine]] = mine
        pieces.append(Piece(name, view, rows))
    if len({piece.name for piece in pieces}) < len(pieces):
        pieces = _one_view_each(pieces)
    return p.name, b, a, p.view, pieces, False


def _one_view_each(pieces: list[Piece]) -> list[Piece]:
    best: dict[str, Piece] = {}
    for piece in pieces:
        if piece.name not in best or (piece.rows >= 0).sum() > (best[piece.name].rows >= 0).sum():
            best[piece.name] = piece
    return list(best.values())


def _whole_a(component: Component, a: Values, b: Values) -> _Attempt | None:
    """A's tensor as the whole, B's as its parts."""
    name = component.a[0]
    votes: Counter[View] = Counter()
    for p in component.b:
        for number, (_, view) in enumerate(p.sources):
            votes[view] += int((p.source == number).sum())
    view = votes.most_common(1)[0][0]
    pieces = []
    for p in component.b:
        number = next((i for i, (n, v) in enumerate(p.sources) if n == name and v == view), None)
        if number is None:
            return None
        pieces.append(Piece(p.name, p.view, np.where(p.source == number, p.row, -1)))
    return name, a, b, view, pieces, True


def _height(values: Values, name: str, view: View) -> int:
    shape = values.shape(name)
    return math.prod(shape[i] for i in view.rows)


def _fusion(
    whole: str, whole_values: Values, part_values: Values, view: View, pieces: list[Piece], names: Names, whole_is_a: bool
) -> tuple[Match, Embedding] | None:
    """One match for the whole and its parts, where the parts tile it."""
    rows = _height(whole_values, whole, view)
    found = []
    for piece in pieces:
        place = strides(piece.rows)
        if place is None:
            return None
        found.append(place)
    shape = whole_values.checkpoint.specs[whole].shape
    for grouping in _groupings(pieces, found):
        placed = [g.strides for g in grouping]
        tiling = tile(placed, rows)
        if tiling is None:
            continue
        specs = part_values.checkpoint.specs
        parts = []
        for group in grouping:
            first = group.members[0]
            stacked = len(group.members) if group.stacked else None
            parts.append(PartShape(specs[first.name].shape, first.view, stacked))
        chain = tiled(tiling, parts, shape, view, names)
        if chain is None:
            continue
        entries = tuple(grouping[i].entry for i in tiling.order)
        embedding = Embedding(whole, rows, entries, tuple(placed[i] for i in tiling.order), whole_is_a)
        return made(whole, entries, chain, whole_is_a), embedding
    if len(pieces) == 1 and len(pieces[0].rows) == rows:
        return _turned(whole, whole_values, part_values, view, pieces[0], found[0], names, whole_is_a)
    if len(pieces) == 1 and len(pieces[0].rows) < rows and [d.stride for d in found[0].digits] == [1]:
        return _window(whole, whole_values, part_values, view, pieces[0], found[0], names, whole_is_a)
    return None


def _window(
    whole: str, whole_values: Values, part_values: Values, view: View, piece: Piece, place: Strides, names: Names,
    whole_is_a: bool,
) -> tuple[Match, Embedding] | None:  # fmt: skip
    """A part that is an unbroken window of a larger tensor: rows cut off (from A) or rows that are new (in B)."""
    shape_whole, shape_part = whole_values.checkpoint.specs[whole].shape, part_values.checkpoint.specs[piece.name].shape
    rows, start, stop = _height(whole_values, whole, view), place.offset, place.offset + len(piece.rows)
    if stop > rows:
        return None
    embedding = Embedding(whole, rows, (piece.name,), (place,), whole_is_a)
    if whole_is_a:
        chain = windowed(PartShape(shape_whole, view), Slice(0, start, stop, rows), shape_part, piece.view, names)
        return None if chain is None else (Match(targets=(piece.name,), sources=(whole,), ops=chain), embedding)
    rest = [r for r in range(rows) if not start <= r < stop][:64]
    shape = whole_values.shape(whole)
    new = columns(whole_values, whole, view, np.arange(math.prod(shape[i] for i in view.columns)), np.array(rest))
    pad = Pad(0, start, rows - stop, None if new.any() else 0.0)
    chain = windowed(PartShape(shape_part, piece.view), pad, shape_whole, view, names)
    return None if chain is None else (Match(targets=(whole,), sources=(piece.name,), ops=chain), embedding)


def _turned(
    whole: str, whole_values: Values, part_values: Values, view: View, piece: Piece, place: Strides, names: Names,
    whole_is_a: bool,
) -> tuple[Match, Embedding] | None:  # fmt: skip
    """One tensor whose rows run in another order than any pattern says (swapped halves), as ranges of rows."""
    if len(np.unique(place.rows())) != len(piece.rows):
        return None
    shape_whole, shape_part = whole_values.checkpoint.specs[whole].shape, part_values.checkpoint.specs[piece.name].shape
    embedding = Embedding(whole, len(piece.rows), (piece.name,), (place,), whole_is_a)
    match = taken(embedding, piece.name, whole, (shape_part, piece.view), (shape_whole, view), names)
    return None if match is None else (match, embedding)


def taken(
    embedding: Embedding, part: str, whole: str, part_seen: tuple[tuple[int, ...], View],
    whole_seen: tuple[tuple[int, ...], View], names: Names,
) -> Match | None:  # fmt: skip
    """The match of a part whose rows the embedding puts in another order, as rows taken from A's tensor."""
    rows = embedding.strides[0].rows()
    if embedding.whole_is_a:
        chain = picked([rows], [PartShape(*whole_seen)], part_seen[0], part_seen[1], names)
        targets, sources = (part,), (whole,)
    else:
        chain = picked([np.argsort(rows)], [PartShape(*part_seen)], whole_seen[0], whole_seen[1], names)
        targets, sources = (whole,), (part,)
    return None if chain is None else Match(targets=targets, sources=sources, ops=chain, how="values")


def made(whole: str, entries: Sequence[str | tuple[str, ...]], chain: tuple[Operation, ...], whole_is_a: bool) -> Match:
    """The match of a whole and its parts, in the direction from A to B."""
    if whole_is_a:
        return Match(targets=tuple(entries), sources=(whole,), ops=inverted(chain, entries), how="values")
    return Match(targets=(whole,), sources=tuple(entries), ops=chain, how="values")


class _Group(NamedTuple):
    members: tuple[Piece, ...]
    strides: Strides
    stacked: bool

    @property
    def entry(self) -> str | tuple[str, ...]:
        return tuple(p.name for p in self.members) if self.stacked else self.members[0].name


_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def _groupings(pieces: list[Piece], found: list[Strides]) -> list[list[_Group]]:
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


def _stacked(pieces: list[Piece], found: list[Strides]) -> _Group | None:
    """One stack of equal parts whose offsets rise evenly."""
    first = found[0]
    if any(s.digits != first.digits for s in found) or len({(p.view, len(p.rows)) for p in pieces}) > 1:
        return None
    step = found[1].offset - first.offset
    if step <= 0 or any(s.offset != first.offset + i * step for i, s in enumerate(found)):
        return None
    digits = (Digit(len(found), step), *first.digits)
    return _Group(tuple(pieces), Strides(digits, first.offset, min(s.agreement for s in found)), True)


def _take(p: Provenance, a: Values, b: Values, names: Names) -> Match | None:
    """B's tensor as rows taken from A's, where (nearly) all are known and lie source by source."""
    if (p.source >= 0).mean() < LEAST_KNOWN:
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
    return Match(targets=(p.name,), sources=tuple(n for n, _ in sources), ops=chain, how="values")
