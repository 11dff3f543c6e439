"""Relations that names, shapes and layout show: renamed, fused, cast, pruned, grown, extended, upcycled."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from lineage.judge.material import ALIKE, Material, Pair, counters
from lineage.judge.relations.finding import Finding
from lineage.layout.mapping import Instance
from lineage.layout.operations import (
    Concat,
    Each,
    Operation,
    Pad,
    Rearrange,
    Slice,
    Split,
    Take,
    Unstack,
)
from lineage.layout.operations import Stack as Piled

__all__ = [
    "cast",
    "cut",
    "depth_grown",
    "depth_pruned",
    "expert_upcycled",
    "fused",
    "identical",
    "layers_reordered",
    "permuted",
    "renamed",
    "transposed",
    "vocabulary_extended",
    "width_grown",
    "width_pruned",
]

#: share of a hidden axis' units at their own index up to which they count as reordered
REORDERED = 0.06
#: relative difference of two vectors that are one to the eye (biases with equal gradients: 1e-6), and the longest
#: vectors that are compared
TWINS, LARGEST_VECTOR = 1e-3, 1 << 16
_NUMBER = re.compile(r"\d+")


def identical(material: Material) -> Finding | None:
    """Same names, shapes and dtypes, and no value differs."""
    a, b = material.a.specs, material.b.specs
    if a.keys() != b.keys() or any(a[n].shape != b[n].shape or a[n].dtype != b[n].dtype for n in a):
        return None
    equal = {pair.name for pair in material.pairs if pair.equal and pair.origins == (pair.name,)}
    if equal != set(b) or any(rule.ops for rule in material.mapping.rules):
        return None
    return Finding("identical", 1.0, f"all {len(b)} tensors are equal under equal names")


def renamed(material: Material) -> Finding | None:
    """Tensors that kept their values or their place under other names."""
    single = [pair for pair in material.pairs if len(pair.origins) == 1]
    moved = [pair for pair in single if pair.origins[0] != pair.name and not _same_place(pair)]
    moved = [pair for pair in moved if pair.content or not _twins(material, pair)]
    return _of("renamed", len(moved), len(material.pairs), "tensors stand under other names", _example(moved))


def _same_place(pair: Pair) -> bool:
    """True where only the layer's number differs: that is a matter of depth."""
    return _NUMBER.sub("{}", pair.origins[0]) == _NUMBER.sub("{}", pair.name)


def _twins(material: Material, pair: Pair) -> bool:
    """True for a vector whose namesake in A is as good as what it was matched to (biases that are added together)."""
    one, two = (material.a.specs.get(name) for name in (pair.origins[0], pair.name))
    if one is None or two is None or one.shape != two.shape or one.size > LARGEST_VECTOR:
        return False
    x, y = (material.a.read(spec.name, 0, spec.size).astype(float) for spec in (one, two))
    return bool(((x - y) ** 2).sum() <= TWINS**2 * (x**2).sum())


def fused(material: Material) -> Finding | None:
    """Tensors split, joined, stacked, interleaved or reshaped."""
    vocabulary = material.asked(_shortened)
    changed = [
        i
        for i in material.instances
        if any(_relays(op) for op in _lasting(i.rule.ops)) and not set(i.target_names) <= vocabulary
    ]
    names = [name for i in changed for name in i.target_names]
    count = len(dict.fromkeys(names))
    what = "tensors are laid out anew (split, joined, stacked or interleaved)"
    return _of("fused", count, len(material.pairs), what)


def _shortened(material: Material) -> set[str]:
    """Tensors outside the layers that were only cut to fewer rows: that is a matter of vocabulary."""
    return {
        name
        for i in material.instances
        if len(i.rule.ops) == 1 and isinstance(i.rule.ops[0], Slice) and len(i.source_names) == 1
        for name in i.target_names
        if not counters(name)
    }


def transposed(material: Material) -> Finding | None:
    """Matrices stored the other way round."""
    changed = [i for i in material.instances if _transposes(i)]
    names = dict.fromkeys(name for i in changed for name in i.target_names)
    return _of("transposed", len(names), len(material.pairs), "matrices are stored transposed")


def permuted(material: Material) -> Finding | None:
    """Units in another order, found by what they hold."""
    content = {pair.name for pair in material.content}
    names = [
        name
        for i in material.instances
        if any(isinstance(op, Take) and _reorders(op) for op in _flat(i.rule.ops))
        for name in i.target_names
        if name in content
    ]
    if names:
        what = "matrices hold A's rows or columns in another order"
        return _of("permuted", len(dict.fromkeys(names)), len(content), what)
    for test in material.significance.tests:
        moved = test.fixed <= REORDERED * test.units and test.ordered < test.units / 2
        if test.kind == "hidden" and test.stands_out and moved:
            return Finding("permuted", 1.0, f"the units of {test.axis} are A's in another order")
    return None


def cast(material: Material) -> Finding | None:
    """Content stored in another float dtype, with nothing but the rounding in between."""
    other = [p for p in material.content if p.equal and p.dtype_a != p.dtype_b]
    if not other:
        return None
    words = sorted({f"{p.dtype_a} to {p.dtype_b}" for p in other})
    what = f"matrices were cast ({', '.join(words)}) and are equal otherwise"
    return _of("cast", len(other), len(material.content), what)


def depth_pruned(material: Material) -> Finding | None:
    """B lacks layers of A."""
    return _depth(material, "depth-pruned")


def depth_grown(material: Material) -> Finding | None:
    """B has more layers than A."""
    return _depth(material, "depth-grown")


def _depth(material: Material, tag: str) -> Finding | None:
    """The first stack with more or fewer layers in B, of which one has nothing on the other side."""
    for stack in material.asked(_stacks):
        more, fewer = (stack.a, stack.b) if tag == "depth-pruned" else (stack.b, stack.a)
        if len(more) <= len(fewer) or not _alone(material, stack, tag):
            continue
        order = ", ".join(str(a) for _, a in stack.pairs)
        text = f"B has {len(stack.b)} layers and A {len(stack.a)}; B's matched layers are A's layers {order}"
        return Finding(tag, 1.0, text)
    return None


def _alone(material: Material, stack: Stack, tag: str) -> bool:
    """True where tensors of the longer side's layers have none of their own on the other one.

    Another count alone says nothing: programs number the blocks of one network differently.
    """
    if tag == "depth-pruned":
        checkpoint, name, left = material.a, stack.name_a, material.mapping.unmatched_source
        taken = [n for i in material.instances for n in i.target_names if _stack(n)[0] == stack.name_b]
    else:
        checkpoint, name, left = material.b, stack.name_b, material.mapping.unmatched_target
        taken = [str(p.origins) for p in material.content if _kept(p) and _stack(p.name)[0] == name]
    if len(set(taken)) < len(taken):  # two layers are one
        return True
    layers = stack.a.difference(a for _, a in stack.pairs) if tag == "depth-pruned" else stack.b
    places = [_stack(n) for n in left if n in checkpoint.specs and len(checkpoint.specs[n].shape) > 1]
    return any(place == name and number in layers for place, number in places)


def layers_reordered(material: Material) -> Finding | None:
    """A's layers in another order, where each is built like the others: else their numbers are mere names."""
    for stack in material.asked(_stacks):
        order = [a for _, a in stack.pairs]
        if len(stack.a) != len(stack.b) or order == sorted(order) or len(set(order)) < len(order):
            continue
        if len({_build(material, stack.name_b, b) for b, _ in stack.pairs}) == 1:
            return Finding("layers-reordered", 1.0, f"B's layers are A's layers {', '.join(map(str, order))}")
    return None


def _build(material: Material, name: str, layer: int) -> frozenset[tuple[str, tuple[int, ...]]]:
    """What a layer of B is made of: its tensors' names without the number, and their shapes."""
    at, specs = len(name) + 1, material.b.specs.items()
    return frozenset((_NUMBER.sub("", n[at:], count=1), s.shape) for n, s in specs if _stack(n) == (name, layer))


class Stack(NamedTuple):
    """Layers of A and of B under one name each; `pairs` says which layer of B is which of A, in B's order."""

    name_a: str
    name_b: str
    a: frozenset[int]
    b: frozenset[int]
    pairs: list[tuple[int, int]]


def _stacks(material: Material) -> list[Stack]:
    """The stacks of B, each beside that of A which it holds most of; the longest first."""
    votes: dict[tuple[str, str], dict[int, dict[int, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    for pair in material.content:
        if not _kept(pair) or len(pair.origins) != 1:
            continue
        stack_a, layer_a = _stack(pair.origins[0])
        stack_b, layer_b = _stack(pair.name)
        if layer_a is not None and layer_b is not None:
            votes[stack_a, stack_b][layer_b][layer_a] += pair.size
    best: dict[str, tuple[int, str]] = {}
    for (stack_a, stack_b), seen in votes.items():
        size = sum(sum(of.values()) for of in seen.values())
        best[stack_b] = max(best.get(stack_b, (0, "")), (size, stack_a))
    stacks = []
    for stack_b, (_, stack_a) in best.items():
        chosen = votes[stack_a, stack_b]
        pairs = sorted((b, max(of, key=of.__getitem__)) for b, of in chosen.items())
        numbers = ((material.a, stack_a), (material.b, stack_b))
        a, b = (frozenset(n for s, n in map(_stack, c.specs) if s == name and n is not None) for c, name in numbers)
        stacks.append(Stack(stack_a, stack_b, a, b, pairs))
    return sorted(stacks, key=lambda stack: -len(stack.pairs))


def _stack(name: str) -> tuple[str, int | None]:
    """The name up to its first counter, and the counter."""
    parts = re.split(r"[./]", name)
    at = next((k for k, part in enumerate(parts) if part.isdigit()), None)
    return (name, None) if at is None else (".".join(parts[:at]), int(parts[at]))


def width_pruned(material: Material) -> Finding | None:
    """B's layers are narrower than A's."""
    return _width(material, "width-pruned")


def width_grown(material: Material) -> Finding | None:
    """B's layers are wider than A's."""
    return _width(material, "width-grown")


def _width(material: Material, tag: str) -> Finding | None:
    changed = []
    for name, (a, b) in material.common.shapes.items():
        if a != b and len(a) == len(b) and len(b) > 1 and counters(name):
            pruned = all(y <= x for x, y in zip(a, b, strict=True))
            grown = all(y >= x for x, y in zip(a, b, strict=True))
            if (tag == "width-pruned") is pruned and pruned != grown:
                changed.append((name, a, b))
    if changed:
        name, a, b = changed[0]
        size = "narrower" if tag == "width-pruned" else "wider"
        text = f"{len(changed)} matrices in layers are {size}: {name} has shape {list(a)} in A and {list(b)} in B"
        return Finding(tag, 1.0, text)
    lost = {name: n for name, n in material.asked(cut).items() if counters(name)} if tag == "width-pruned" else {}
    if not lost:
        return None
    name, gone = next(iter(lost.items()))
    text = f"{len(lost)} matrices in layers are narrower: of {name} in A, {gone} elements have no place in B"
    return Finding(tag, 1.0, text)


def cut(material: Material) -> dict[str, int]:
    """Elements that matched tensors leave out of A's matrices, by A's name; only where there are some.

    Tensors that are laid out anew together are counted together: what one of them leaves out another may hold.
    """
    parent: dict[tuple[int, str], tuple[int, str]] = {}

    def root(node: tuple[int, str]) -> tuple[int, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    given: set[tuple[str, ...]] = set()
    for i in material.instances:
        if i.target_names in given:  # another layer of A that is the same
            continue
        given.add(i.target_names)
        nodes = [*((0, n) for n in i.source_names), *((1, n) for n in i.target_names)]
        for node in nodes[1:]:
            parent[root(node)] = root(nodes[0])
    left: dict[tuple[int, str], int] = defaultdict(int)
    for side, name in list(parent):
        spec = (material.b if side else material.a).specs.get(name)
        left[root((side, name))] += 0 if spec is None else -spec.size if side else spec.size
    lost: dict[str, int] = {}
    for side, name in parent:
        gone = left[root((side, name))]
        if side == 0 and gone > 0 and len(material.a.specs[name].shape) > 1:
            lost[name] = gone
            left[root((side, name))] = 0
    return lost


def vocabulary_extended(material: Material) -> Finding | None:
    """Rows were appended to tensors outside the layers, on either side."""
    inside = {n for name, shapes in material.common.shapes.items() if counters(name) for n in (*shapes[0], *shapes[1])}
    for name, a, b in _outside(material):
        axis = next((k for k in (0, 1) if a[k] != b[k] and a[1 - k] == b[1 - k]), None)
        if axis is not None and not {a[axis], b[axis]} & inside:
            more = b[axis] - a[axis]
            word = "more" if more > 0 else "fewer"
            text = f"the tensor {name} has {abs(more)} {word} entries than in A: {b[axis]} against {a[axis]}"
            return Finding("vocabulary-extended", 1.0, text)
    return None


def _outside(material: Material) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Matrices outside the layers that are made of one matrix: B's name, and both shapes."""
    a, b = material.a.specs, material.b.specs
    for name, shapes in material.common.shapes.items():
        if not counters(name) and len(shapes[0]) == len(shapes[1]) == 2:
            yield (name, *shapes)
    for i in material.instances:
        if len(i.source_names) == len(i.target_names) == 1 and not counters(i.target_names[0]):
            one, two = a[i.source_names[0]].shape, b[i.target_names[0]].shape if i.target_names[0] in b else ()
            if len(one) == len(two) == 2:
                yield i.target_names[0], one, two


def expert_upcycled(material: Material) -> Finding | None:
    """One matrix of A stands in several places of one layer of B, or the other way round."""
    uses: dict[tuple[tuple[str, ...], int], set[str]] = defaultdict(set)
    for pair in material.content:
        numbers = counters(pair.name)
        if len(numbers) < 2 or not _kept(pair) or len(pair.origins) != 1:
            continue
        # a tensor that holds all experts is larger than any of them
        if len(counters(pair.origins[0])) < len(numbers) and material.a.specs[pair.origins[0]].size == pair.size:
            uses[pair.origins, numbers[0]].add(pair.name)
    clones = [names for names in uses.values() if len(names) > 1]
    if clones:
        first = sorted(clones[0])
        text = f"{len(clones)} matrices of A each became several experts, such as {', '.join(first[:2])}"
        return Finding("expert-upcycled", 1.0, text)
    return _merged_experts(material)


def _merged_experts(material: Material) -> Finding | None:
    """A holds several near copies of what B has once."""
    for pair in material.content:
        if len(pair.origins) != 1 or not _kept(pair):
            continue
        origin, numbers = pair.origins[0], counters(pair.origins[0])
        if len(numbers) < 2 or len(counters(pair.name)) >= len(numbers):
            continue
        parts = re.split(r"([./])", origin)
        at = max(k for k, part in enumerate(parts) if part.isdigit())
        for other in (f"{numbers[-1] + 1}", f"{numbers[-1] - 1}"):
            twin = "".join([*parts[:at], other, *parts[at + 1 :]])
            if twin in material.a.specs and _cosine(material, origin, twin) > ALIKE:
                text = f"the tensors {origin} and {twin} of A are near copies of each other, and of B's {pair.name}"
                return Finding("expert-upcycled", 1.0, text)
    return None


def _cosine(material: Material, one: str, two: str) -> float:
    """Cosine of the beginnings of two of A's tensors."""
    size = min(material.a.specs[one].size, material.a.specs[two].size, 1 << 14)
    x, y = material.a.read(one, 0, size).astype(float), material.a.read(two, 0, size).astype(float)
    lengths = float((x @ x) * (y @ y)) ** 0.5
    return float(x @ y) / lengths if lengths > 0 else 0.0


def _kept(pair: Pair) -> bool:
    return pair.equal or (pair.cosine or 0.0) >= ALIKE


def _flat(ops: tuple[Operation, ...]) -> Iterator[Operation]:
    for op in ops:
        if isinstance(op, Each):
            for _, chain in op.chains:
                yield from _flat(chain)
        else:
            yield op


def _lasting(ops: tuple[Operation, ...]) -> list[Operation]:
    """The operations without rearrangements that a later one takes back: units were picked in between."""
    kept: list[Operation] = []
    for op in _flat(ops):
        back = " -> ".join(reversed(op.pattern.split(" -> "))) if isinstance(op, Rearrange) else ""
        other = next((k for k in kept if isinstance(k, Rearrange) and k.pattern == back), None)
        if other is None:
            kept.append(op)
        else:
            kept.remove(other)
    return kept


def _relays(op: Operation) -> bool:
    """True for operations that join, cut or interleave; turning a matrix round is none of them, nor is padding."""
    if isinstance(op, Rearrange):
        return not _turns(op)
    if isinstance(op, Take):
        return _halves_swapped(op)
    return isinstance(op, (Concat, Split, Piled, Unstack, Slice)) and not isinstance(op, Pad)


def _turns(op: Rearrange) -> bool:
    """True for a pattern that only changes the order of whole axes."""
    return "(" not in op.pattern and op.pattern.count("->") == 1


def _transposes(instance: Instance) -> bool:
    """True where the chain leaves the axes of a matrix in another order; two turns undo each other."""
    turns = 0
    for op in _flat(instance.rule.ops):
        if isinstance(op, Rearrange):
            left, right = (side.replace("(", " ").replace(")", " ").split() for side in op.pattern.split("->"))
            long = [name for name in left if name in right and name != "1"]
            turns += [name for name in right if name in long] != long and (_turns(op) or _outer_turns(op))
    return turns % 2 == 1


def _outer_turns(op: Rearrange) -> bool:
    """True for a pattern whose last axis on the left is first on the right, or the other way round."""
    left, right = (side.replace("(", " ").replace(")", " ").split() for side in op.pattern.split("->"))
    return bool(left and right) and (left[-1] == right[0] or left[0] == right[-1])


def _reorders(op: Take) -> bool:
    """True where the indices are no plain ascending selection; two halves may be laid out either way round."""
    indices = op.places
    return bool((indices[1:] < indices[:-1]).any()) and not _halves_swapped(op)


def _halves_swapped(op: Take) -> bool:
    """True where the second half of an axis comes first (scale before shift, gate before up)."""
    indices = op.places
    half = len(indices) // 2
    return half > 0 and indices.tolist() == [*range(half, 2 * half), *range(half)]


def _of(tag: str, count: int, total: int, what: str, example: str = "") -> Finding | None:
    if not count:
        return None
    return Finding(tag, count / max(1, total), f"{count} of {total} {what}{example}")


def _example(pairs: list[Pair]) -> str:
    return f", such as {pairs[0].name} for {pairs[0].origins[0]}" if pairs else ""
