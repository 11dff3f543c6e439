"""Both checkpoints in one layout, before anything was fitted: what unit tests may look at.

Mapping rules that carry fitted data (a permutation, per-channel scales, a rotation) were made from the values that a
test would look at; a test on the result would find its own fit. Such operations are left out here, and rules that
make no sense without them. The side with more tensors gives the names: there, units of fused tensors stand apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.errors import InputError
from lineage.filling import Filled
from lineage.judge.axes import Matrix, Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.mapping import Rule
from lineage.layout.operations import Add, Each, Matmul, Operation, Pad, Scale, Take

__all__ = ["Common", "common_layout", "unfitted"]

#: tensors that are paired by equal names where the mapping left them over; more than this make no better test
MOST_ALIKE = 4096


class Common(msgspec.Struct, frozen=True):
    """Two checkpoints under common names.

    Attributes
    ----------
    a, b : the same names on both sides; shapes may differ where B was cut
    origin : name in the other layout by common name: B's where A gives the names, A's where B does
    named_by_a : which side gives the names
    sizes : elements of the other side's own tensors
    """

    a: Checkpoint
    b: Checkpoint
    origin: dict[str, tuple[str, ...]]
    named_by_a: bool
    sizes: dict[str, int]

    @property
    def shapes(self) -> dict[str, tuple[Shape, Shape]]:
        """Shapes in A and in B of all tensors that both sides have, in order."""
        return {n: (s.shape, self.b.specs[n].shape) for n, s in self.a.specs.items() if n in self.b.specs}

    def names(self, name: str) -> tuple[str, str]:
        """A's and B's (first) name of a common tensor."""
        other = (self.origin.get(name) or (name,))[0]
        return (name, other) if self.named_by_a else (other, name)

    def place(self, matrix: Matrix, side: int) -> str:
        """Where a matrix stands on one side: the tensor, and the place in it where the tensor holds many."""
        name = self.names(matrix.name)[side]
        whole = (side == 0) is self.named_by_a or len(self.origin.get(matrix.name, ())) != 1
        checkpoint = self.a if side == 0 else self.b
        own = checkpoint.specs[matrix.name].size
        if whole or self.sizes[name] > own:  # it holds more than this matrix: the common name tells them apart
            return f"{name} {matrix.name} {matrix.index}"
        return f"{name} {matrix.index}"


def common_layout(a: Checkpoint, b: Checkpoint, mapping: LayoutMapping) -> Common:
    """Both checkpoints in the finer one of their two layouts, with nothing fitted.

    Parameters
    ----------
    mapping : from A's layout to B's
    """
    plain, filled = _fitting(_named_alike(unfitted(mapping), a, b), a)
    sources = {name for origins in filled.origins.values() for name in origins}
    if len(sources) > len(filled.specs):
        _, back = _fitting(plain.inverse(), b)
        return Common(a, back, back.origins, True, {s.name: s.size for s in b})
    return Common(filled, b, filled.origins, False, {s.name: s.size for s in a})


def _named_alike(mapping: LayoutMapping, a: Checkpoint, b: Checkpoint) -> LayoutMapping:
    """The mapping, and a rule for each tensor that it left over and that only one of the other side can be.

    Equal names pair tensors, and outside the layers a shape that nothing else has: an embedding that A stores once and
    B twice, as its head, too. Neither looks at values.
    """
    left_a = [n for n in dict.fromkeys(mapping.unmatched_source) if n in a.specs and "{" not in n]
    left_b = [n for n in dict.fromkeys(mapping.unmatched_target) if n in b.specs]
    there = set(left_b)
    shared = [n for n in left_a if n in there and len(a.specs[n].shape) == len(b.specs[n].shape)]
    del shared[MOST_ALIKE:]
    pairs = [(n, n) for n in shared]
    alone = [(c, [n for n in left if n not in shared and not _numbered(n)]) for c, left in ((a, left_a), (b, left_b))]
    shapes: list[dict[Shape, list[str]]] = [{}, {}]
    for side, (checkpoint, names) in enumerate(alone):
        for name in names:
            shapes[side].setdefault(checkpoint.specs[name].shape, []).append(name)
    for shape, (mine, theirs) in ((shape, (shapes[0][shape], shapes[1].get(shape, []))) for shape in shapes[0]):
        if len(mine) == 1 and len(theirs) <= 2 and sum(n > 1 for n in shape) > 1:
            pairs += [(mine[0], name) for name in theirs]
    if not pairs:
        return mapping
    return msgspec.structs.replace(mapping, rules=(*mapping.rules, *(Rule(to=(y,), source=(x,)) for x, y in pairs)))


def _numbered(name: str) -> bool:
    return any(part.isdigit() for part in name.replace("/", ".").split("."))


def unfitted(mapping: LayoutMapping) -> LayoutMapping:
    """The mapping without operations whose data were fitted to values."""
    rules = [msgspec.structs.replace(rule, ops=_without(rule.ops)) if rule.ops else rule for rule in mapping.rules]
    return msgspec.structs.replace(mapping, rules=tuple(rules))


def _without(ops: Sequence[Operation]) -> tuple[Operation, ...]:
    kept: list[Operation] = []
    for op in ops:
        if isinstance(op, Each):
            chains = {place: _without(chain) for place, chain in op.chains}
            chains = {place: chain for place, chain in chains.items() if chain}
            kept += [Each(chains)] if chains else []
        elif not _fitted(op):
            kept.append(op)
    return tuple(kept)


def _fitted(op: Operation) -> bool:
    """True for operations that carry data found in the values, and for padding that nobody can fill."""
    if isinstance(op, Pad):
        return op.value is None and not op.before
    return isinstance(op, (Take, Matmul)) or (isinstance(op, (Scale, Add)) and op.axis is not None)


def _fitting(mapping: LayoutMapping, given: Checkpoint) -> tuple[LayoutMapping, Filled]:
    """The mapping without rules that do not fit the tensors (any more), found by halving, and what it fills."""
    try:
        return mapping, Filled(mapping, given)
    except InputError:
        rules = mapping.rules
    if len(rules) == 1:
        kept: tuple[Rule, ...] = ()
    else:
        parts = (rules[: len(rules) // 2], rules[len(rules) // 2 :])
        halves = [_fitting(msgspec.structs.replace(mapping, rules=part), given)[0] for part in parts]
        kept = (*halves[0].rules, *halves[1].rules)
    mapping = msgspec.structs.replace(mapping, rules=kept)
    return mapping, Filled(mapping, given)
