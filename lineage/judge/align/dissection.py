"""Which axis of which tensor belongs to which index space of a transformer, from shapes first and words second.

All layers of a stack share one residual space. Inside a layer, matrices pair the residual space with hidden units
(an MLP's readers and writers) or with heads (query, key, value, output). Everything else beside the residual space
(vocabulary, positions, classes, patches) is bound to its index. Vectors follow the matrix whose stem they share.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import msgspec

from lineage.judge.align.anatomy import Anatomy, Attention, Layer, Mlp, Pair, Part
from lineage.judge.axes import FEWEST_UNITS, Shape
from lineage.match.words import Roles, load_roles, stem
from lineage.measure.groups import Groups, read_groups

__all__ = ["anatomies"]

Shapes = Mapping[str, tuple[Shape, Shape]]
_DIGITS = re.compile(r"\d+")
_SEPARATOR = re.compile(r"[./]")
#: share of a stack's matrices that know the residual length; adapters and routers beside MLPs leave some out
RESIDUAL_SHARE = 0.75


def anatomies(shapes: Shapes) -> list[Anatomy]:
    """The stacks of layers in the common layout, the one with most parameters first.

    Parameters
    ----------
    shapes : shapes in A and in B by common name

    Notes
    -----
    Stacks that share no length are left out (convolutions): see `channels`.
    """
    roles, groups = load_roles(), read_groups()
    alike = {n: pair for n, pair in shapes.items() if len(pair[0]) == len(pair[1]) and pair[1]}
    stacks, outside = _stacked(alike)
    found = []
    for stack, layers in stacks.items():
        residual = _residual(alike, layers, outside)
        if residual is not None:
            near = [n for n in outside if _near(n, stack, stacks)]
            found.append(_Reader(alike, roles, groups, residual).anatomy(stack, layers, near))
    size = {a.stack: sum(p.whole[1] for p in a.parts) * a.residual[1] for a in found}
    return sorted((a for a in found if a.layers), key=lambda a: -size[a.stack])


def _stacked(shapes: Shapes) -> tuple[dict[str, dict[int, list[str]]], list[str]]:
    """Names by stack and layer number, and names outside of all stacks."""
    values: dict[tuple[str, ...], set[int]] = defaultdict(set)
    parts = {name: _SEPARATOR.split(name) for name in shapes}
    for path in parts.values():
        for at, part in enumerate(path[:-1]):
            number = _DIGITS.search(part)
            if number:
                values[(*path[:at], _DIGITS.sub("#", part))].add(int(number[0]))
    stacks: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    outside = []
    for name, path in parts.items():
        for at, part in enumerate(path[:-1]):
            number = _DIGITS.search(part)
            key = (*path[:at], _DIGITS.sub("#", part))
            if number and (len(values[key]) > 1 or part.isdecimal()):
                stacks[".".join(key)][int(number[0])].append(name)
                break
        else:
            outside.append(name)
    return {stack: dict(sorted(layers.items())) for stack, layers in stacks.items()}, outside


def _residual(shapes: Shapes, layers: Mapping[int, Sequence[str]], outside: Sequence[str]) -> Pair | None:
    """The pair of lengths that nearly every matrix of the stack knows, in every layer."""
    counts: Counter[Pair] = Counter()
    axes: Counter[Pair] = Counter()
    total = 0
    for names in layers.values():
        here: set[Pair] = set()
        for name in names:
            a, b = shapes[name]
            pairs = [(x, y) for x, y in zip(a, b, strict=True) if y > 1]
            if len(pairs) > 1:
                total += 1
                counts.update(set(pairs))
                axes.update(pairs)
            here.update(pairs)
    known = {p for n in outside for p in zip(*shapes[n], strict=True)}
    best = [p for p, n in counts.items() if n >= RESIDUAL_SHARE * total and p[1] >= FEWEST_UNITS]
    return max(best, key=lambda p: (counts[p], p in known, axes[p]), default=None)


def _near(name: str, stack: str, stacks: Mapping[str, object]) -> bool:
    """True where no other stack stands nearer to a name outside of them."""

    def shared(other: str) -> int:
        one, two = _SEPARATOR.split(name), _SEPARATOR.split(other)
        return next((k for k, (x, y) in enumerate(zip(one, two, strict=False)) if x != y), min(len(one), len(two)))

    return shared(stack) == max(shared(other) for other in stacks)


class _Reader:
    """Reads one stack."""

    def __init__(self, shapes: Shapes, roles: Roles, groups: Groups, residual: Pair) -> None:
        self.shapes, self.roles, self.groups, self.residual = shapes, roles, groups, residual

    def anatomy(self, stack: str, layers: Mapping[int, Sequence[str]], outside: Sequence[str]) -> Anatomy:
        flipped = self._flipped([n for names in layers.values() for n in names])
        found: list[Layer] = []
        used: set[str] = set()
        for number, names in layers.items():
            layer = self._layer(number, names, flipped)
            if layer.mlps or layer.attentions:
                found.append(layer)
                used.update(names)
        biases = self._biases([*used, *outside])
        around = [p for n in outside if len(self._axes(n)) == 1 and (p := self._outside(n, biases))]
        every = [n for n in (*used, *outside) if self._vector(n)]
        gains = self._gains([n for n in outside if self._vector(n)], biases)
        taken = {n for layer in found for pair in layer.gains for n in pair} | {n for pair in gains for n in pair}
        return Anatomy(
            stack, self.residual, tuple(found), tuple(around), gains, tuple(n for n in every if n not in taken)
        )

    # -- single tensors

    def _axes(self, name: str) -> list[int]:
        """Axes that have the residual lengths."""
        return [k for k, pair in enumerate(zip(*self.shapes[name], strict=True)) if pair == self.residual]

    def _vector(self, name: str) -> bool:
        long = [k for k, n in enumerate(self.shapes[name][1]) if n > 1]
        return len(long) == 1 and self._axes(name) == long

    def _biases(self, names: Sequence[str]) -> dict[str, str]:
        """The vector that shares its stem with each matrix."""
        matrices = {stem(n): n for n in names if sum(x > 1 for x in self.shapes[n][1]) > 1}
        return {matrices[stem(n)]: n for n in names if len(self.shapes[n][1]) == 1 and stem(n) in matrices}

    def _part(self, name: str, biases: Mapping[str, str], *, flipped: bool, reads: bool) -> Part | None:
        """The matrix as a part; of two residual axes the one that its role asks for."""
        axes = self._axes(name)
        a, b = self.shapes[name]
        if not axes or sum(n > 1 for n in b) < 2:
            return None
        axis = axes[-1] if reads != flipped else axes[0]
        units = (math.prod(a) // a[axis], math.prod(b) // b[axis])
        return Part(name, axis, self.residual, units, (0, 0), reads, units, biases.get(name, ""))

    def _outside(self, name: str, biases: Mapping[str, str]) -> Part | None:
        """A matrix outside the layers; heads read from the residual stream, everything else writes into it."""
        roles = self.roles.of(name)
        return self._part(name, biases, flipped=False, reads="head" in roles and "embedding" not in roles)

    def _gains(self, vectors: Sequence[str], biases: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        """Norms: weight and shift of each."""
        spoken = set(biases.values())
        shifts = {stem(n): n for n in vectors if n not in spoken and "bias" in self.roles.of(n)}
        weights = [n for n in vectors if n not in spoken and n not in shifts.values() and len(self.shapes[n][1]) == 1]
        return tuple((n, shifts.get(stem(n), "")) for n in weights)

    # -- layers

    def _flipped(self, names: Sequence[str]) -> bool:
        """Whether matrices stand (in, out): told by biases, else by words, else no."""
        votes = 0
        biases = self._biases(names)
        for name in names:
            a, b = self.shapes[name]
            axes = self._axes(name)
            if len(b) != 2 or len(axes) != 1:
                continue
            units = 1 - axes[0]
            bias = biases.get(name)
            if bias is not None:
                votes += 1 if self.shapes[bias][1][0] == b[1] else -1
                continue
            found = self.roles.of(name)
            if "down" in found or found & {"gate", "up", "key", "value"}:
                writes = "down" in found and not found & {"gate", "up"}
                votes += 1 if (units == 0) == writes else -1
                del a
        return votes > 0

    def _layer(self, number: int, names: Sequence[str], flipped: bool) -> Layer:
        biases = self._biases(names)
        attending: list[str] = []
        others: list[str] = []
        for name in names:
            if sum(n > 1 for n in self.shapes[name][1]) > 1 and self._axes(name):
                (attending if self._attends(name) else others).append(name)
        blocks, rest = self._attentions(attending, biases, flipped)
        mlps, more = self._mlps(others, biases, flipped)
        gains = self._gains([n for n in names if self._vector(n)], biases)
        return Layer(number, tuple(mlps), tuple(blocks), (*rest, *more), gains)

    def _attends(self, name: str) -> bool:
        group, roles = self.groups.group(name), self.roles.of(name)
        return group != "mlp" and (group == "attention" or bool(roles & {"attention", "query", "key", "value"}))

    def _attentions(
        self, names: Sequence[str], biases: Mapping[str, str], flipped: bool
    ) -> tuple[list[Attention], list[Part]]:
        """Attention blocks by their path, and matrices that do not fit one."""
        grouped: dict[bool, list[str]] = defaultdict(list)
        for name in names:
            grouped["cross" in self.roles.of(name)].append(name)
        blocks, rest = [], []
        for members in grouped.values():
            block = self._attention(members, biases, flipped)
            if block is not None:
                blocks.append(block)
            else:
                made = [self._part(n, biases, flipped=flipped, reads=not self._outward(n)) for n in members]
                rest += [p for p in made if p]
        return blocks, rest

    def _outward(self, name: str) -> bool:
        return not self.roles.of(name) & {"query", "key", "value"}

    def _attention(self, names: Sequence[str], biases: Mapping[str, str], flipped: bool) -> Attention | None:
        """Query, key, value and output among these matrices, taken out of fused ones."""
        found: dict[str, Part] = {}
        outs = [n for n in names if self._outward(n)]
        if len(outs) != 1:
            return None
        out = self._part(outs[0], biases, flipped=flipped, reads=False)
        if out is None:
            return None
        for name in names:
            part = self._part(name, biases, flipped=flipped, reads=True)
            held = [r for r in ("query", "key", "value") if r in self.roles.of(name)]
            if name == outs[0] or part is None:
                continue
            for role, piece in zip(held, _pieces(part, held, out.units), strict=False):
                if role in found:
                    return None
                found[role] = piece
        if len(found) != 3 or found["query"].units != out.units:
            return None
        key, value = found["key"], found["value"]
        if key.units != value.units or any(q % k for q, k in zip(out.units, key.units, strict=True)):
            return None
        path = stem(stem(outs[0]))
        return Attention(path, found["query"], key, value, out)

    def _mlps(self, names: Sequence[str], biases: Mapping[str, str], flipped: bool) -> tuple[list[Mlp], list[Part]]:
        """MLPs (one an expert) by the length that their readers and writers share."""
        places: dict[str, list[str]] = defaultdict(list)
        for name in names:
            places[_numbered(name)].append(name)
        done, rest = [], []
        left: list[str] = []
        for path, members in places.items():
            made, over = self._paired(path, members, biases, flipped)
            done += made
            left += over
        made, over = self._paired("", left, biases, flipped)
        done += made
        for name in over:
            part = self._part(name, biases, flipped=flipped, reads=self._reads(name, biases, flipped))
            rest += [part] if part else []
        return done, rest

    def _reads(self, name: str, biases: Mapping[str, str], flipped: bool) -> bool:
        axis = self._axes(name)[0 if flipped else -1]
        bias = biases.get(name)
        if bias is not None and len(set(self.shapes[name][1])) > 1:
            return self.shapes[bias][1][0] != self.residual[1]
        return (axis == 0) == flipped

    def _paired(
        self, path: str, names: Sequence[str], biases: Mapping[str, str], flipped: bool
    ) -> tuple[list[Mlp], list[str]]:
        """MLPs among matrices of one place, and what is left over."""
        parts = {n: self._part(n, biases, flipped=flipped, reads=self._reads(n, biases, flipped)) for n in names}
        writers = {n: p for n, p in parts.items() if p and not p.reads and p.units[1] >= FEWEST_UNITS}
        lengths: dict[Pair, list[Part]] = defaultdict(list)
        for part in writers.values():
            lengths[part.units].append(part)
        made: list[Mlp] = []
        used: set[str] = set()
        for units, group in lengths.items():
            readers = [p for p in parts.values() if p and p.reads and p.units == units]
            double = (2 * units[0], 2 * units[1])
            fused = [p for p in parts.values() if p and p.reads and p.units == double]
            readers = readers or [piece for part in fused[:1] for piece in _cut(part, (units, units))]
            if readers and len(group) == 1:
                made.append(Mlp(path or stem(stem(group[0].name)), tuple(readers), tuple(group), units))
                used.update(p.name for p in (*readers, *group))
        return made, [n for n in names if n not in used]


def _pieces(part: Part, held: Sequence[str], query: Pair) -> list[Part]:
    """The parts of a matrix that holds one, two or three of query, key and value, one after the other."""
    if len(held) == 1:
        return [part]
    rest = tuple(n - (q if "query" in held else 0) for n, q in zip(part.units, query, strict=True))
    count = len(held) - ("query" in held)
    if any(n <= 0 or n % count for n in rest):
        return []
    each = (rest[0] // count, rest[1] // count)
    return _cut(part, [query if role == "query" else each for role in held])


def _cut(part: Part, lengths: Sequence[Pair]) -> list[Part]:
    """A part cut into parts of these units."""
    made = []
    start = (0, 0)
    for units in lengths:
        made.append(msgspec.structs.replace(part, units=units, start=start))
        start = (start[0] + units[0], start[1] + units[1])
    return made


def _numbered(name: str) -> str:
    """The name up to its last number that is a word of its own."""
    path = _SEPARATOR.split(name)
    last = max((k for k, part in enumerate(path[:-1]) if part.isdecimal()), default=-1)
    return ".".join(path[: last + 1])
