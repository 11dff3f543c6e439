"""Axes of units that a whole layer puts out: chains of plain linear layers, and recurrent layers.

No block of names holds such units' writer and reader, and a file may hold two networks of which one reads what the
other one puts out (pixels, classes): an index that means something. So shapes must leave no doubt, and in chains units
are compared by features that are such units, too: two axes would have to be bound for strangers to agree. What is in
doubt is left out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from lineage.judge.axes import FEWEST_UNITS, Axis, Block, Matrix, Member, Path, Shape, template
from lineage.match.words import load_roles

__all__ = ["chain_axes", "recurrent_axes"]

Edge = tuple[int, int]

#: gates whose rows stand below each other in the matrices of a recurrent layer: GRU 3, LSTM 4
GATES = (3, 4)
#: role of a matrix that reads the layer's own units: its rows and its columns share their labels
RECURRENT = "recurrent"


def chain_axes(
    found: Sequence[Matrix], others: Iterable[tuple[Path, Shape]], bound: Callable[[str], bool]
) -> list[Axis]:
    """Units between two linear layers of one chain, each matrix with features that are such units, too.

    Parameters
    ----------
    found, others : of `axes.matrices`
    bound : says of a tensor's name whether its axes are bound to an index

    Notes
    -----
    A length counts where one matrix writes it and has a vector of that length beside it, one matrix of the same name
    but for its numbers reads it, and no other one shows it. Lengths on a circle do not count: an autoencoder's pixels
    are read and written as well, and of two such networks nobody knows where the circle begins.
    """
    biased = _vectors(others)
    edges: set[Edge] = set()
    writers: dict[int, list[Member]] = defaultdict(list)
    readers: dict[int, list[Member]] = defaultdict(list)
    shown: Counter[int] = Counter()
    for matrix in found:
        shown.update({*matrix.a, *matrix.b})
        sides = [side for side in (0, 1) if matrix.b[side] in biased.get(matrix.path[:-1], ())]
        if len(sides) != 1 or matrix.kernel > 1 or matrix.a != matrix.b or bound(matrix.name):
            edges |= {matrix.b, (matrix.b[1], matrix.b[0])}  # either may be what it puts out
            continue
        written, read = Member(matrix, sides[0]), Member(matrix, 1 - sides[0])
        edges.add((_length(read), _length(written)))
        writers[_length(written)].append(written)
        readers[_length(read)].append(read)
    free = set(writers) - _circling(edges)
    free = {n for n in free if n >= FEWEST_UNITS and shown[n] == 2 and _linked(writers[n], readers[n])}
    axes = []
    for length in sorted(free):
        members = [m for m in (*writers[length], *readers[length]) if m.matrix.b[1 - m.side] in free]
        blocks = tuple(Block(m.matrix.path, (m,), length, length) for m in members)
        axes += [Axis("outputs", blocks)] if blocks else []
    return axes


def recurrent_axes(found: Sequence[Matrix], bound: Callable[[str], bool]) -> list[Axis]:
    """Units of recurrent layers, each named by its rows of all gates in a matrix that reads the layer's input.

    Parameters
    ----------
    found : of `axes.matrices`
    bound : says of a tensor's name whether its axes are bound to an index

    Notes
    -----
    A recurrent layer is seen by two matrices under one name that have an axis of three or four times the units, one of
    which has the units on its other axis. That one is left out: an identity there would stay one whatever the order
    of the units. Where other matrices have its shape, words say which they are.
    """
    roles = load_roles()
    layers: dict[tuple[Path, int], list[Member]] = defaultdict(list)
    for matrix in found:
        for side in (0, 1):
            layers[matrix.path[:-1], matrix.b[side]].append(Member(matrix, side))
    axes: dict[tuple[str, int, int], list[Block]] = defaultdict(list)
    for (path, length), members in layers.items():
        for gates in GATES:
            units = length // gates
            square = [m for m in members if length == gates * m.matrix.b[1 - m.side]]
            if not square or len(members) < 2 or units < FEWEST_UNITS or not all(_plain(m, bound) for m in members):
                continue
            told = {m for m in square if RECURRENT in roles.of(m.matrix.name)}
            reading = [m for m in members if m not in (told if 2 * len(told) == len(members) else square)]
            axes[template(path), units, gates] += [_gated(m, units, gates) for m in reading]
    return [Axis("outputs", tuple(blocks), gates=gates) for (*_, gates), blocks in axes.items() if blocks]


def _plain(member: Member, bound: Callable[[str], bool]) -> bool:
    """True for a matrix of one shape on both sides, without places, that no word binds to an index."""
    matrix = member.matrix
    return matrix.kernel == 1 and matrix.a == matrix.b and not bound(matrix.name)


def _gated(member: Member, units: int, gates: int) -> Block:
    parts = (Member(member.matrix, member.side, start=gate * units) for gate in range(gates))
    return Block(member.matrix.path, tuple(parts), units, units)


def _length(member: Member) -> int:
    return member.matrix.b[member.side]


def _vectors(others: Iterable[tuple[Path, Shape]]) -> dict[Path, set[int]]:
    """Lengths of the vectors of each module."""
    found: dict[Path, set[int]] = defaultdict(set)
    for path, shape in others:
        if len(shape) == 1:
            found[path[:-1]].add(shape[0])
    return found


def _linked(writers: Sequence[Member], readers: Sequence[Member]) -> bool:
    """True for one writer and one reader whose names differ in numbers only."""
    if len(writers) != 1 or len(readers) != 1:
        return False
    return template(writers[0].matrix.path) == template(readers[0].matrix.path)


def _circling(edges: Iterable[Edge]) -> set[int]:
    """Lengths on circles, and between two of them: what is left when ends are taken off again and again."""
    left = set(edges)
    while True:
        read, written = {a for a, _ in left}, {b for _, b in left}
        kept = {(a, b) for a, b in left if a in written and b in read}
        if len(kept) == len(left):
            return read | written
        left = kept
