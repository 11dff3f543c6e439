"""Axes whose units are large and few: attention heads and experts, found by shapes first and words second.

A head is a run of rows of its query, key and value and of columns of its output. Heads that share a key and value
form a group. Whole groups may be permuted, and heads inside a group; rows inside a head may not (rotary planes).
An expert is named by its row of the router. Which rows belong to one head can often not be read from the shapes: the
axis is then tested in larger units, that hold whole heads whatever their size, or left out.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from lineage.judge.align.anatomy import Attention, Part
from lineage.judge.align.dissection import anatomies
from lineage.judge.axes import Axis, Block, Matrix, Member, Shape, template
from lineage.match.words import load_roles

__all__ = ["expert_axes", "head_axes", "reordered"]

Shapes = Mapping[str, tuple[Shape, Shape]]

#: sizes of heads in use; where the shapes leave it open, units are the least common multiple of those that fit:
#: whole heads may be joined in one unit, never cut
USUAL = (32, 40, 48, 64, 72, 80, 88, 96, 104, 112, 120, 128, 160, 192, 224, 256, 512)
#: keys of fewer rows belong to networks whose heads may have any size
SMALL = 256
_COUNTER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
#: blocks of one axis at most: heads of a group are blocks of their own
MOST_BLOCKS = 256


def head_axes(shapes: Shapes, bound: Callable[[str], bool]) -> list[Axis]:
    """Groups of heads among themselves, and heads inside their group.

    Parameters
    ----------
    shapes : shapes in A and in B by name in the common layout
    bound : says of a tensor's name whether its axes are bound to an index (attention)

    Notes
    -----
    Groups are seen by key and value alone wherever heads share them, heads inside a group by query and output
    alone: what deals labels to the ones does not touch the others, so both laws may be convolved. Tensors that hold
    query, key and value together on both sides are left out: nothing says in which order.
    """
    # experts of all layers would cost time and tell nothing here
    attending = {n: pair for n, pair in shapes.items() if bound(n) or len(_COUNTER.findall(n)) < 2}
    axes: dict[tuple[str, int, int, str], list[Block]] = defaultdict(list)
    for anatomy in anatomies(attending):
        for layer in anatomy.layers:
            for attention in layer.attentions:
                for note, block in _blocks(attention, attending):
                    axes[template(block.path), block.a, block.b, note].append(block)
    return [Axis("heads", tuple(_turned(b)[:MOST_BLOCKS]), note) for (*_, note), b in sorted(axes.items())]


def expert_axes(found: Sequence[Matrix], hidden: Iterable[Axis]) -> list[Axis]:
    """Experts of each layer, named by their rows of the router.

    Parameters
    ----------
    found : of `matrices`
    hidden : the hidden axes; experts are blocks of theirs
    """
    places: dict[tuple[str, ...], set[int]] = defaultdict(set)
    inside: set[Matrix] = set()
    for block in (block for axis in hidden for block in axis.blocks if len(block.numbers) > 1):
        places[_layer(block)].add(block.numbers[-1])
        inside |= {member.matrix for member in block.members}
    axes: dict[tuple[str, int], list[Block]] = defaultdict(list)
    for path, numbers in places.items():
        count = max(numbers) + 1
        routers = [
            Member(matrix, side)
            for matrix in found
            for side in (0, 1)
            if matrix.path[: len(path)] == path and matrix not in inside and matrix.kernel == 1
            if matrix.a[side] == matrix.b[side] == count != matrix.b[1 - side]
        ]
        if count > 1 and len(routers) == 1:
            axes[template(path), count].append(Block(routers[0].matrix.path, (routers[0],), count, count))
    return [Axis("experts", tuple(blocks)) for _, blocks in sorted(axes.items())]


def reordered(hidden: Sequence[Axis], orders: Mapping[tuple[str, ...], Mapping[int, int]]) -> list[Axis]:
    """Neurons of experts, each expert of B beside the one of A that the router says it was.

    Parameters
    ----------
    orders : by layer (the path of its router cut to it), A's expert for each of B's

    Returns
    -------
    axes of those layers only
    """
    result = []
    for axis in hidden:
        homes = {(_layer(block), block.numbers[-1]): block for block in axis.blocks if len(block.numbers) > 1}
        moved = []
        for (layer, number), block in homes.items():
            origin = homes.get((layer, orders.get(layer, {}).get(number, -1)))
            if origin is not None:
                theirs = {_role(m): m.matrix for m in origin.members}
                moved.append(_beside(block, theirs))
        kept = tuple(block for block in moved if block is not None)
        if kept:
            result.append(Axis("hidden", kept, ", experts paired by the router"))
    return result


def _beside(block: Block, theirs: Mapping[tuple[str, int], Matrix]) -> Block | None:
    """The block with A's matrices taken from another one."""
    if any(_role(m) not in theirs for m in block.members):
        return None
    members = tuple(Member(m.matrix, m.side, origin=theirs[_role(m)]) for m in block.members)
    return Block(block.path, members, block.a, block.b)


def _role(member: Member) -> tuple[str, int]:
    return template(member.matrix.path), member.side


def _layer(block: Block) -> tuple[str, ...]:
    """The path up to its first counter."""
    first = next(at for at, part in enumerate(block.path) if any(ch.isdigit() for ch in part))
    return block.path[: first + 1]


def _turned(blocks: Sequence[Block]) -> list[Block]:
    """First groups of all layers, then second ones, …: a negative control takes the next block, of another layer."""
    return sorted(blocks, key=lambda block: (block.members[0].start, block.numbers, block.path))


def _blocks(attention: Attention, shapes: Shapes) -> list[tuple[str, Block]]:
    """The blocks of one attention, with what people should know of them."""
    parts = {name: getattr(attention, name) for name in ("query", "key", "value", "out")}
    if any(part.units != part.whole for part in parts.values()):
        return []
    size, sure = _size(attention, shapes)
    lengths = (*attention.query.units, *attention.key.units)
    if size < 1 or any(n % size for n in lengths):
        return []
    made = {name: _member(part, shapes, size) for name, part in parts.items()}
    members = {name: member for name, member in made.items() if member is not None}
    if len(members) < len(made):
        return []
    groups_a, groups_b = (n // size for n in attention.key.units)
    each = attention.query.units[0] // attention.key.units[0]
    path = _place(attention)
    whole = tuple(members.values()) if each == 1 else (members["key"], members["value"])
    found = []
    if min(groups_a, groups_b) > 1:
        found.append(("" if sure else f" or more, in units of {size} rows", Block(path, whole, groups_a, groups_b)))
    # inside a group the size must be known: a unit of several heads may be cut by the next group
    same = groups_a == groups_b and attention.query.units[1] == each * attention.key.units[1]
    if sure and each > 1 and same:
        for group in range(groups_b):
            start = group * each * members["query"].width
            held = tuple(Member(m.matrix, m.side, m.width, start) for m in (members["query"], members["out"]))
            found.append((" in each group", Block(path, held, each, each)))
    return found


def _parts(name: str) -> tuple[str, ...]:
    return tuple(name.replace("/", ".").split("."))


def _place(attention: Attention) -> tuple[str, ...]:
    """What the names of its four matrices have in common."""
    names = [_parts(part.name) for part in (attention.query, attention.key, attention.value, attention.out)]
    return tuple(parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*names, strict=False)))


def _member(part: Part, shapes: Shapes, size: int) -> Member | None:
    """The matrix of a part with its heads as units; an axis of heads is read as it stands."""
    a, b = shapes[part.name]
    others = [at for at, n in enumerate(b) if n > 1 and at != part.axis]
    if len(others) not in (1, 2):
        return None
    axes = tuple(sorted((part.axis, others[0])))
    side = axes.index(others[0])
    kernel = b[others[1]] if len(others) == 2 else 1
    matrix = Matrix(
        part.name, (), _parts(part.name), (axes[0], axes[1]), (a[axes[0]], a[axes[1]]), (b[axes[0]], b[axes[1]]), kernel
    )
    return Member(matrix, side, 1 if kernel > 1 else size)


def _size(attention: Attention, shapes: Shapes) -> tuple[int, bool]:
    """Rows of a unit, and whether that is one head; 0 where nothing is sure enough."""
    told = {n for part in (attention.query, attention.key) for n in _inner(part, shapes)}
    if not told:
        told = _normed(attention, shapes)
    if len(told) == 1:
        return told.pop(), True
    if told:
        return 0, False
    lengths = (*attention.query.units, *attention.key.units)
    sizes = USUAL if min(lengths) > SMALL else range(8, min(lengths) + 1, 2)
    fitting = [n for n in sizes if all(length % n == 0 for length in lengths)]
    return (math.lcm(*fitting) if fitting else 0), False


def _inner(part: Part, shapes: Shapes) -> set[int]:
    """Size of a head where the tensor has an axis for it."""
    others = [n for at, n in enumerate(shapes[part.name][1]) if n > 1 and at != part.axis]
    return {others[1]} if len(others) == 2 else set()


def _normed(attention: Attention, shapes: Shapes) -> set[int]:
    """Lengths of vectors that norm queries and keys head by head."""
    roles, place, whole = load_roles(), _place(attention), {*attention.query.units, *attention.key.units}
    found = set()
    for name, (a, b) in shapes.items():
        here = _parts(name)[: len(place)] == place and len(b) == 1 and a == b and b[0] not in whole
        if here and b[0] > 1 and roles.of(name) & {"query", "key"} and not any(n % b[0] for n in whole):
            found.add(b[0])
    return found
