"""Chains of the layout algebra as operations of Transformers 5, where it has them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from lineage.layout.mapping import Rule
from lineage.layout.operations import Concat, Each, Operation, Rearrange, Split, Stack

__all__ = ["Unsayable", "heads_of", "operations"]

#: what patterns and names have in common: their words, without what regular expressions mean by theirs
_WORD = re.compile(r"(?<=[.])[A-Za-z0-9_-]+")


class Unsayable(Exception):
    """A rule that Transformers' conversions cannot say, with the reason."""


def operations(
    rule: Rule, lists: set[str], sources: Sequence[str], targets: Sequence[str], heads: int
) -> tuple[list[str], str]:
    """The operations for a rule's chain, and what they need of the model's config.

    Parameters
    ----------
    lists : placeholders that make lists of source tensors
    sources, targets : the converter's patterns
    heads : the number of attention heads that rotary orders may rely on

    Raises
    ------
    Unsayable : with the first operation that has no counterpart
    """
    writer = _Writer(rule, lists, sources, targets, heads)
    left = list(rule.ops)
    while left:
        writer.write(left)
    if writer.open or writer.entries != len(targets):
        raise Unsayable("its tensors are not put together")
    if not writer.found:
        raise Unsayable("several tensors without an operation")
    return writer.found, f"config.num_attention_heads == {heads}" if writer.rotary else ""


class _Writer:
    """The state between two operations.

    Attributes
    ----------
    found : the operations so far
    open : the placeholder whose list is not put together yet
    entries : tensors, or lists of them
    rotary : whether the number of heads matters
    """

    def __init__(self, rule: Rule, lists: set[str], sources: Sequence[str], targets: Sequence[str], heads: int) -> None:
        self.sources, self.targets, self.heads = sources, targets, heads
        self.found: list[str] = []
        self.entries, self.rotary = len(sources), False
        if len(lists) > 1 or (lists and any({*t.placeholders} & lists != lists for t in rule.templates[1])):
            raise Unsayable("more than one list, or a tensor beside one")
        self.open = next(iter(lists), "")
        values = rule.values.get(self.open)
        if values is not None and list(values) != list(range(len(values))):
            raise Unsayable("its list is in an order of its own")

    def write(self, left: list[Operation]) -> None:
        """The next operation, or the next two where they are done the other way round."""
        op = left.pop(0)
        if isinstance(op, Concat) and op.over is None and self.open and left and isinstance(left[0], Stack):
            # a list is merged before its entries are joined
            stack = left.pop(0)
            assert isinstance(stack, Stack)
            if stack.over != self.open or stack.axis < 0 or (op.axis < 0 and stack.axis > 0):
                raise Unsayable("concat before stack along these axes")
            self.found.append(f"MergeModulelist(dim={stack.axis})")
            self.open = ""
            self._join(op.axis + (op.axis >= stack.axis if op.axis >= 0 else 0))
        elif isinstance(op, Stack) and op.over and op.over == self.open:
            self.found.append(f"MergeModulelist(dim={op.axis})")
            self.open = ""
        elif isinstance(op, Concat) and op.over and op.over == self.open and self.entries == 1:
            self.open = ""
            self._join(op.axis)
        elif self.open:
            raise Unsayable(f"{op.word} on every tensor of a list has no counterpart")
        elif isinstance(op, Concat) and op.over is None:
            self._join(op.axis)
        elif isinstance(op, Split) and op.over is None and self.entries == 1 and len(self.targets) > 1:
            equal = op.parts or len(set(op.sizes or ())) == 1
            self.found.append(f"{'Chunk' if equal else 'Split'}(dim={op.axis})")
            self.entries = op.arity(1) or 0
        elif isinstance(op, Each):
            self._rotate_some(op)
        elif isinstance(op, Rearrange):
            self._rearrange(op)
        else:
            raise Unsayable(f"{op.word} has no counterpart")

    def _join(self, axis: int) -> None:
        self.found.append(f"Concatenate(dim={axis})")
        self.entries = 1

    def _rearrange(self, op: Rearrange) -> None:
        rotary = _rotary(op)
        swapped = _swapped(op)
        pairs = _pairs(op)
        if rotary and (self.entries == 1 or len(self.targets) > 1 or self._whole()):
            self._rotate(rotary, None)
        elif swapped and self.entries == 1:
            self.found.append(f"Transpose(dim0={swapped[0]}, dim1={swapped[1]})")
        elif pairs and self.entries == 1 and len(self.targets) == 1:
            self.found.append(f"Interleave(dim={pairs[0]}{', inverse=True' if pairs[1] else ''})")
        else:
            raise Unsayable(f'"{op.pattern}" has no counterpart')

    def _whole(self) -> bool:
        """Whether the sources are as they were read."""
        return not self.found and self.entries == len(self.sources)

    def _rotate_some(self, op: Each) -> None:
        """Rotary orders of some tensors of the list."""
        names = self.sources if self._whole() and len(self.targets) == 1 else self.targets
        kinds = set()
        for k, chain in op.chains:
            kind = _rotary(chain[0]) if len(chain) == 1 and isinstance(chain[0], Rearrange) else None
            if kind is None or k >= len(names) or (names is self.sources) != self._whole():
                raise Unsayable("operations on single tensors have no counterpart but rotary orders")
            kinds.add(kind)
        if len(kinds) != 1:
            raise Unsayable("rotary orders of different numbers of heads")
        chosen = {k for k, _ in op.chains}
        self._rotate(kinds.pop(), None if len(names) == 1 else [_telling(names, k, chosen) for k in sorted(chosen)])

    def _rotate(self, kind: tuple[int, bool], names: Sequence[str] | None) -> None:
        heads, inverse = kind
        if heads != self.heads:
            raise Unsayable(f"a rotary order of {heads} heads; PermuteForRope knows config.num_attention_heads only")
        given = [] if names is None else [f"permute_layer_names=[{', '.join(_literal(n) for n in names)}]"]
        given += ["inverse=True"] if inverse else []
        self.found.append(f"PermuteForRope({', '.join(given)})")
        self.rotary = True


def _telling(names: Sequence[str], k: int, chosen: set[int]) -> str:
    """A word of one pattern that stands in none of those that are not chosen, turned round or not."""
    others = [name for n, name in enumerate(names) if n not in chosen]
    words = _WORD.findall(names[k])
    word = next((w for w in sorted(words, key=len) if not any(w in other for other in others)), None)
    return word or names[k]


def _literal(pattern: str) -> str:
    return f'r"{pattern}"' if "\\" in pattern else f'"{pattern}"'


def heads_of(rule: Rule) -> Iterator[int]:
    """The numbers of heads that a rule's rotary orders have."""
    for op in rule.ops:
        inner = [step for _, chain in op.chains for step in chain] if isinstance(op, Each) else [op]
        for step in inner:
            kind = _rotary(step) if isinstance(step, Rearrange) else None
            if kind is not None:
                yield kind[0]


def _rotary(op: Rearrange) -> tuple[int, bool] | None:
    """Heads and direction of a pattern that takes rotary pairs apart: `(h d 2) -> (h 2 d)`, or back."""
    left, right, sizes = op.parsed.left, op.parsed.right, dict(op.sizes)
    if len(left) > 2 or len(left[0]) != 3 or len(right) != len(left) or left[1:] != right[1:]:
        return None
    if ("...",) in left or any(len(group) != 1 for group in left[1:]):
        return None
    head, a, b = left[0]
    if right[0] != (head, b, a) or head not in sizes:
        return None
    if sizes.get(b) == 2:
        return sizes[head], False
    return (sizes[head], True) if sizes.get(a) == 2 else None


def _swapped(op: Rearrange) -> tuple[int, int] | None:
    """The two axes that a pattern swaps, where that is all it does."""
    left, right = op.parsed.left, op.parsed.right
    if len(left) != len(right) or any(len(group) != 1 or group == ("...",) for group in (*left, *right)):
        return None
    moved = [k for k, (a, b) in enumerate(zip(left, right, strict=True)) if a != b]
    return (moved[0], moved[1]) if len(moved) == 2 else None


def _pairs(op: Rearrange) -> tuple[int, bool] | None:
    """Axis and direction of a pattern that takes pairs along it apart: `(d 2) -> (2 d)`, or back."""
    left, right, sizes = op.parsed.left, op.parsed.right, dict(op.sizes)
    moved = [k for k, (a, b) in enumerate(zip(left, right, strict=False)) if a != b]
    if len(left) != len(right) or len(moved) != 1 or ("...",) in left:
        return None
    axis = moved[0]
    if len(left[axis]) != 2 or right[axis] != left[axis][::-1] or any(len(g) != 1 for g in left if g != left[axis]):
        return None
    a, b = left[axis]
    return (axis, False) if sizes.get(b) == 2 else (axis, True) if sizes.get(a) == 2 else None
