"""Square matrices that only structure paired: turned like the others of their layers, which shapes tell."""

from __future__ import annotations

import re

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.layout.axes import LayoutError
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Rearrange

__all__ = ["oriented"]

_TRANSPOSED = Rearrange("a b -> b a")
_NUMBER = re.compile(r"\d|\{")


def oriented(mapping: Mapping, a: Checkpoint) -> Mapping:
    """The mapping with square matrices transposed where all oblong ones inside layers are.

    Notes
    -----
    A pairing by names cannot see which way a square matrix stands. Rules found by values are left alone.
    """
    square, votes = [], []
    for at, rule in enumerate(mapping.rules):
        if len(rule.to) != 1 or len(rule.source) != 1 or not _NUMBER.search(rule.source[0]):
            continue
        shape = _shape(mapping, rule, a)
        if len(shape) != 2 or min(shape) < 2:
            continue
        if shape[0] != shape[1]:
            votes.append(_transposes(rule))
        elif rule.how in ("name", "structure") and not rule.ops:
            square.append(at)
    if not square or not votes or not all(votes):
        return mapping
    rules = [msgspec.structs.replace(r, ops=(_TRANSPOSED,)) if k in square else r for k, r in enumerate(mapping.rules)]
    return msgspec.structs.replace(mapping, rules=tuple(rules))


def _transposes(rule: Rule) -> bool:
    return len(rule.ops) == 1 and isinstance(rule.ops[0], Rearrange) and _swaps(rule.ops[0])


def _swaps(op: Rearrange) -> bool:
    left, _, right = op.pattern.partition("->")
    return left.split() == right.split()[::-1] and len(left.split()) == 2


def _shape(mapping: Mapping, rule: Rule, a: Checkpoint) -> tuple[int, ...]:
    """Shape of the first source tensor of a rule, () where it has none."""
    shapes = {name: spec.shape for name, spec in a.specs.items()}
    try:
        instance = next(iter(msgspec.structs.replace(mapping, rules=(rule,)).instances(shapes)), None)
    except LayoutError:
        return ()
    return shapes[instance.source_names[0]] if instance is not None else ()
