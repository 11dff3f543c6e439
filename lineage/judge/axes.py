"""Which axes carry units without a meaningful index, inferred from names' nesting and shapes alone.

A *hidden* axis lives inside one block: one matrix of the block writes it, another reads it, and its length occurs
nowhere outside such blocks (neurons of an MLP, of an expert). *Channels* run through the whole network. Excluded are
lengths that only one side of the matrices knows (vocabulary, classes, positions, q/k/v heads), matrices that the
caller calls bound (attention: rotary planes and heads), and square matrices, where one label may stand on both axes.
Units of many rows each (heads), and experts, are found in `groups`.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import cached_property
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

__all__ = ["Axis", "Block", "Matrix", "Member", "Path", "Shape", "channel_axes", "hidden_axes", "matrices", "template"]

Shape = tuple[int, ...]
Path = tuple[str, ...]

#: other dimensions than the two of a matrix may be a kernel's if none is longer (convolutions up to 11 × 11 × …)
KERNEL = 16
#: axes of fewer units cannot reach log10_p < -6 with room for corrections (1/12! = 2e-9)
FEWEST_UNITS = 12
#: values of each counter of a name (layer, expert) that take part; more would cost time and prove nothing new
MOST_VALUES = 32
_PARTS = re.compile(r"[./]")
_DIGITS = re.compile(r"\d+")


class Matrix(msgspec.Struct, frozen=True):
    """A matrix (or a convolution's kernels) inside a tensor of the common layout.

    Attributes
    ----------
    name : the tensor
    index : its places on leading axes that stack layers or experts
    path : components of the name, stacked places in between
    axes : the tensor's two axes that are no kernel's, in order
    a, b : their lengths on both sides
    kernel : elements of each kernel, 1 for a plain matrix
    """

    name: str
    index: tuple[int, ...]
    path: Path
    axes: tuple[int, int]
    a: tuple[int, int]
    b: tuple[int, int]
    kernel: int = 1


class Member(msgspec.Struct, frozen=True):
    """A matrix that takes part in an axis; `side` (0 or 1) says with which of its two axes.

    Attributes
    ----------
    width : rows along that axis that make one unit (a head); 1 for neurons and channels
    start : row of the first unit
    origin : the matrix that A has in this one's place, where that is another one (experts in another order)
    """

    matrix: Matrix
    side: int
    width: int = 1
    start: int = 0
    origin: Matrix | None = None

    def of(self, side: int) -> Matrix:
        """The matrix on A's (0) or on B's side (1)."""
        return self.matrix if side or self.origin is None else self.origin


class Block(msgspec.Struct, frozen=True):
    """Matrices that share one set of units.

    Attributes
    ----------
    path : deepest place of the names under which they stand
    a, b : units on both sides
    """

    path: Path
    members: tuple[Member, ...]
    a: int
    b: int

    @property
    def numbers(self) -> tuple[int, ...]:
        """The counters in its path: layer, expert."""
        return tuple(int(n) for part in self.path for n in _DIGITS.findall(part))


class Axis(msgspec.Struct, frozen=True, dict=True):
    """Blocks of one kind in different layers; each has units of its own.

    Attributes
    ----------
    kind : `hidden`: members of a block are tested together, blocks are independent of each other;
        `channels`: each block holds one matrix, and all blocks may share their labels;
        `outputs`: as `channels`, of one layer;
        `heads`, `experts`: as `hidden`, of units that are many rows each, or few in number
    note : what else people should know of the units
    gates : parts of a matrix that seem to hold one row of each unit; some programs may store them unit by unit
    """

    kind: Literal["hidden", "channels", "outputs", "heads", "experts"]
    blocks: tuple[Block, ...]
    note: str = ""
    gates: int = 1

    @cached_property
    def title(self) -> str:
        """What people read: where the units stand."""
        first = self.blocks[0]
        units = f"{first.a}" if first.a == first.b else f"{first.a} and {first.b}"
        where = self.kind if self.kind in ("channels", "outputs") else template(first.path)
        return f"{where} ({units} {self.kind if self.kind in ('heads', 'experts') else 'units'}{self.note})"


def template(path: Path) -> str:
    """A path with its counters taken out.

    Examples
    --------
    >>> template(("model", "layers", "3", "mlp"))
    'model.layers.{}.mlp'
    """
    return _DIGITS.sub("{}", ".".join(path))


def matrices(shapes: Mapping[str, tuple[Shape, Shape]]) -> tuple[list[Matrix], list[tuple[Path, Shape]]]:
    """Every matrix of the common layout, and path and shape of what is a vector or no matrix.

    Parameters
    ----------
    shapes : shapes in A and in B by name in the common layout

    Notes
    -----
    Of counters with many values only `MOST_VALUES` are looked at.
    """
    kept = {name: pair for name, pair in shapes.items() if len(pair[0]) == len(pair[1])}
    kept = dict(_thinned(kept))
    stacks = _stacks({tuple(_PARTS.split(name)): pair[1] for name, pair in kept.items()})
    single: list[_Tensor] = []
    for name, (a, b) in kept.items():
        path = tuple(_PARTS.split(name))
        depths = [depth for depth in range(1, len(path)) if path[:depth] in stacks]
        if not depths or a[: len(depths)] != b[: len(depths)]:
            single.append(_Tensor(name, (), path, (a, b)))
            continue
        lead = b[: len(depths)]
        for index in _chosen(lead):
            parts = list(path)
            for place, depth in reversed(list(zip(index, depths, strict=True))):
                parts.insert(depth, str(place))
            single.append(_Tensor(name, index, tuple(parts), (a[len(lead) :], b[len(lead) :])))
    return _sorted_in(single)


def hidden_axes(
    found: Sequence[Matrix], others: Iterable[tuple[Path, Shape]], bound: Callable[[str], bool]
) -> list[Axis]:
    """Axes that live inside one block each, grouped by template and length.

    Parameters
    ----------
    found, others : of `matrices`
    bound : says of a tensor's name whether its axes are bound to an index (attention)
    """
    lengths = _Lengths([m for m in found if not bound(m.name)], others)
    blocks = [block for length in lengths.known for block in lengths.blocks(length)]
    taken = defaultdict(set)
    for block in blocks:
        for member in block.members:
            taken[member.matrix.name].add(block.b)
    # where both axes of a matrix qualify, the residual one is that which also occurs outside of all blocks
    kept = [
        block
        for block in blocks
        if all(len(taken[m.matrix.name]) == 1 for m in block.members) or not lengths.outside(block.b)
    ]
    sure = defaultdict(set)
    for block in kept:
        for member in block.members:
            sure[member.matrix.name].add(block.b)
    axes: dict[tuple[str, int, int], list[Block]] = defaultdict(list)
    for block in kept:
        if all(len(sure[m.matrix.name]) == 1 for m in block.members):
            axes[template(block.path), block.a, block.b].append(block)
    ordered = [sorted(blocks, key=lambda block: (block.numbers, block.path)) for _, blocks in sorted(axes.items())]
    return [Axis("hidden", tuple(blocks)) for blocks in ordered]


def channel_axes(found: Sequence[Matrix], hidden: Sequence[Axis], bound: Callable[[str], bool]) -> list[Axis]:
    """Axes that run through the network: one block for each matrix that shows them beside something else.

    Parameters
    ----------
    found : of `matrices`
    hidden : the hidden axes, whose lengths are taken
    bound : as in `hidden_axes`
    """
    taken = {block.b for axis in hidden for block in axis.blocks}
    inside: dict[int, set[int]] = defaultdict(set)
    for member in (Member(m, side) for m in found for side in (0, 1) if _numbered(m.path)):
        inside[member.matrix.b[member.side]].add(member.side)
    axes: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for matrix in found:
        shows = matrix.kernel > 1 or not _numbered(matrix.path)
        if not shows or matrix.b[0] == matrix.b[1] or matrix.a[0] == matrix.a[1] or bound(matrix.name):
            continue
        for side in (0, 1):
            length = matrix.b[side]
            if length not in taken and length >= FEWEST_UNITS and len(inside[length]) == 2:
                block = Block(matrix.path, (Member(matrix, side),), matrix.a[side], length)
                axes[matrix.a[side], length].append(block)
    return [Axis("channels", tuple(blocks)) for blocks in axes.values()]


class _Lengths:
    """Where each length of an axis occurs in the common layout (B's lengths).

    Attributes
    ----------
    members : matrices by length, vectors' paths by length
    halves : matrices with an axis of twice the length: gate and up stacked in one
    """

    def __init__(self, found: Iterable[Matrix], others: Iterable[tuple[Path, Shape]]) -> None:
        self.members: dict[int, list[Member]] = defaultdict(list)
        self.halves: dict[int, list[Member]] = defaultdict(list)
        self.vectors: dict[int, list[Path]] = defaultdict(list)
        for matrix in found:
            for side in (0, 1):
                self.members[matrix.b[side]].append(Member(matrix, side))
                if matrix.b[side] % 2 == 0:
                    self.halves[matrix.b[side] // 2].append(Member(matrix, side))
        for path, shape in others:
            for length in set(shape):
                self.vectors[length].append(path)

    @property
    def known(self) -> list[int]:
        """Lengths of axes that are long enough for a test."""
        return [length for length in self.members if length >= FEWEST_UNITS]

    def outside(self, length: int) -> bool:
        """True where the length occurs in a tensor outside of numbered blocks."""
        paths = [m.matrix.path for m in self.members[length]] + self.vectors[length]
        return any(not _numbered(path) for path in paths)

    def blocks(self, length: int) -> list[Block]:
        """Blocks with a writer and a reader of this length whose layers do not know the length elsewhere."""
        deepest = self._homes(length)
        grouped: dict[Path, list[Member]] = {path: [] for path in deepest}
        spoilt: set[Path] = set()
        for path in (*(m.matrix.path for m in self.members[length]), *self.vectors[length]):
            if _home(path, deepest) is None:
                spoilt.add(_layer(path))
        for member in self.members[length]:
            home = _home(member.matrix.path, deepest)
            if home is not None:
                grouped[home].append(member)
        made = (_block(path, members) for path, members in grouped.items() if _layer(path) not in spoilt)
        return [block for block in made if block is not None]

    def _homes(self, length: int) -> set[Path]:
        """The deepest numbered places under which one matrix writes the length and another one reads it."""
        ends: dict[tuple[Path, int], dict[int, set[Matrix]]] = defaultdict(lambda: defaultdict(set))
        for member in (*self.members[length], *self.halves[length]):
            matrix, other = member.matrix, member.matrix.b[1 - member.side]
            if matrix.b[0] != matrix.b[1]:
                for depth in range(1, len(matrix.path)):
                    ends[matrix.path[:depth], other][member.side].add(matrix)
        both = {path for (path, _), sides in ends.items() if len(sides) == 2 and _numbered(path)}
        inner = {path[:depth] for path in both for depth in range(1, len(path))}
        return both - inner


def _home(path: Path, homes: set[Path]) -> Path | None:
    return next((path[:depth] for depth in range(len(path), 0, -1) if path[:depth] in homes), None)


def _layer(path: Path) -> Path:
    """The path up to its first counter."""
    return next((path[: at + 1] for at, part in enumerate(path) if _DIGITS.search(part)), ())


def _block(path: Path, members: Sequence[Member]) -> Block | None:
    """The block of these members; None where A's lengths differ among them or labels may stand on two axes."""
    lengths = {(m.matrix.a[m.side], m.matrix.b[m.side]) for m in members}
    square = any(m.matrix.b[0] == m.matrix.b[1] or m.matrix.a[0] == m.matrix.a[1] for m in members)
    if len(lengths) != 1 or square:
        return None
    ((a, b),) = lengths
    return Block(path, tuple(members), a, b)


class _Tensor(NamedTuple):
    """A tensor, or its part at one `place` of a stack, with its shapes on both sides."""

    name: str
    place: tuple[int, ...]
    path: Path
    shapes: tuple[Shape, Shape]


def _sorted_in(tensors: Sequence[_Tensor]) -> tuple[list[Matrix], list[tuple[Path, Shape]]]:
    """Takes tensors as matrices where two of their axes can be told from a kernel's."""
    told: dict[tuple[Path, int], set[int]] = defaultdict(set)
    kernels: Counter[Path] = Counter()
    for tensor in tensors:
        kernels[tensor.path[:-1]] += any(sum(n > 1 for n in shape) > 1 for shape in tensor.shapes)
        for side, shape in enumerate(tensor.shapes):
            long = [n for n in shape if n > 1]
            if len(long) == 1:
                told[tensor.path[:-1], side].add(long[0])
    found: list[Matrix] = []
    others: list[tuple[Path, Shape]] = []
    for name, place, path, (a, b) in tensors:
        # of several kernels under one name nobody says whose the vectors are
        beside = [told[path[:-1], side] if kernels[path[:-1]] == 1 else set() for side in (0, 1)]
        axes = _main(b, beside[1])
        if axes is None or _main(a, beside[0]) != axes:
            others.append((path, tuple(n for n in b if n > 1)))
            continue
        shift = len(place)
        one, two = axes
        kernel = math.prod(b) // (b[one] * b[two])
        found.append(Matrix(name, place, path, (one + shift, two + shift), (a[one], a[two]), (b[one], b[two]), kernel))
    return found, others


def _main(shape: Shape, told: Set[int] = frozenset()) -> tuple[int, int] | None:
    """The two axes of a matrix or of a convolution's kernels (first or last in the shape), None for anything else.

    `told` are the lengths of vectors beside it: biases and norms, which only channels have.
    """
    long = [at for at, n in enumerate(shape) if n > 1]
    if len(long) == 2 and (len(shape) < 3 or long[1] == long[0] + 1):
        return long[0], long[1]
    if len(shape) < 3 or len(long) < 2:
        return None
    # kernels come last (out, in, h, w) or first (h, w, in, out); heads in the middle are no kernel
    last, first = (0, 1), (len(shape) - 2, len(shape) - 1)
    # what a convolution puts out stands at the end; of a transposed one, beside it, where no other layout has it too
    for ends in ((0, -1), (1, -2))[: len(shape) - 2]:
        fitting = [axes for axes, at in zip((last, first), ends, strict=True) if shape[at] > 1 and shape[at] in told]
        if len(fitting) == 1:
            return fitting[0]
    for axes, kernel in ((last, shape[2:]), (first, shape[:-2])):
        odd = len(shape) > 3 or kernel[0] % 2 == 1
        shorter = min(shape[axes[0]], shape[axes[1]])
        if max(kernel) <= KERNEL and odd and shorter > (1 if axes == last else KERNEL):
            return axes
    return None


def _numbered(path: Path) -> bool:
    return any(_DIGITS.search(part) for part in path)


def _stacks(shapes: Mapping[Path, Shape]) -> set[Path]:
    """Places of the names under which every tensor stacks layers (or experts) on its first axis, topmost first."""
    under: dict[Path, list[tuple[Path, Shape]]] = defaultdict(list)
    for path, shape in shapes.items():
        for depth in range(1, len(path)):
            under[path[:depth]].append((path, shape))
    result: set[Path] = set()
    for path in sorted(under, key=len):
        outer = any(path[:depth] in result for depth in range(1, len(path)))
        if _stacked([shape[1:] if outer else shape for _, shape in under[path]]):
            result.add(path)
    return result


def _stacked(shapes: Sequence[Shape]) -> bool:
    """Equal first lengths, and more axes than single layers have: vectors among matrices, or nothing but matrices."""
    if len(shapes) < 2 or any(len(shape) < 2 for shape in shapes) or len({shape[0] for shape in shapes}) != 1:
        return False
    if shapes[0][0] < 2 or not any(len(shape) == 3 for shape in shapes):
        return False
    deep = [shape for shape in shapes if len(shape) >= 3]
    if any(len(shape) == 2 for shape in shapes):
        return len(shapes) >= 3
    return len(deep) == len(shapes) and all(min(shape[1:]) > KERNEL for shape in deep if len(shape) == 3)


def _thinned(shapes: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Names whose counters are among the values that are looked at."""
    values: dict[int, set[int]] = defaultdict(set)
    counted = {name: tuple(int(n) for n in _DIGITS.findall(name)) for name in shapes}
    for numbers in counted.values():
        for place, value in enumerate(numbers):
            values[place].add(value)
    if all(len(v) <= MOST_VALUES for v in values.values()):
        return shapes.items()
    kept = {place: set(_spread(sorted(v))) for place, v in values.items()}
    return [(n, s) for n, s in shapes.items() if all(v in kept[p] for p, v in enumerate(counted[n]))]


def _spread(values: Sequence[int]) -> list[int]:
    """At most `MOST_VALUES` of the values, evenly spread."""
    if len(values) <= MOST_VALUES:
        return list(values)
    return [values[at] for at in np.linspace(0, len(values) - 1, MOST_VALUES).astype(int)]


def _chosen(lead: Shape) -> list[tuple[int, ...]]:
    """Places on stacked axes that are looked at."""
    result: list[tuple[int, ...]] = [()]
    for length in lead:
        result = [(*index, place) for index in result for place in _spread(range(length))]
    return result
