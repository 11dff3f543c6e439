"""Key maps: which keys an adapter of A has, which ones it needs on B, and what happens to the factors in between."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import yaml

from lineage.checkpoint.base import TensorSpec
from lineage.judge.grade import Grade, grade_of
from lineage.layout.chain import leaves
from lineage.layout.mapping import Instance
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.operations import (
    Concat,
    Each,
    Matmul,
    Operation,
    Pad,
    Rearrange,
    Scale,
    Slice,
    Split,
    Stack,
    Take,
    Unstack,
)
from lineage.lora.grammar import grammar
from lineage.lora.modules import components, split_name
from lineage.lora.naming import Namer

__all__ = ["KeyMap", "Line", "key_map"]

_SAID: dict[type[Operation], str] = {
    Concat: "pairs side by side: down factors stacked, up factors block-diagonal",
    Split: "a share of the rows or columns each",
    Slice: "a range of rows or columns",
    Take: "rows or columns in another order",
    Pad: "zero rows or columns added",
    Stack: "pairs stacked, one for each",
    Unstack: "one of the stacked pairs each",
    Scale: "scale folded into the factors",
    Matmul: "rotation multiplied into a factor",
    Rearrange: "rows or columns moved",
}


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """One group of modules.

    Attributes
    ----------
    source, to : keys of the factors, or templates of them
    how : what happens to the factors, in words; "names only" where nothing does
    ops : the operations, as the mapping writes them
    """

    source: tuple[str, ...] = msgspec.field(name="from")
    to: tuple[str, ...]
    how: str
    ops: tuple[str, ...] = ()


class KeyMap(msgspec.Struct, frozen=True, kw_only=True):
    """The whole map.

    Attributes
    ----------
    grade : `remap` key names only, `reshape` exact changes of the factors, `retrain` a map exists but the values
        differ too much, `none`
    source_format, target_format : grammars of the keys
    keys : one line a module or a template
    """

    grade: Grade
    source_format: str
    target_format: str
    keys: tuple[Line, ...]

    def to_yaml(self) -> str:
        """The document `lora_keys.yaml`."""
        return yaml.safe_dump(msgspec.to_builtins(self), sort_keys=False, allow_unicode=True, width=1000)


def key_map(
    mapping: LayoutMapping,
    a_specs: Iterable[TensorSpec],
    b_specs: Iterable[TensorSpec],
    *,
    source_format: str = "peft",
    target_format: str | None = None,
    class_: str | None = None,
    each: bool = False,
) -> KeyMap:
    """The keys of every module that an adapter may change.

    Parameters
    ----------
    a_specs, b_specs : tensors of both models
    source_format, target_format : grammars; the target's is the source's where None
    class_ : of the verdict on the pair, None where nobody judged
    each : one line for every module, instead of one for each rule
    """
    a_shapes = {s.name: s.shape for s in a_specs}
    ours = Namer(grammar(source_format), a_shapes)
    theirs = Namer(grammar(target_format or source_format), (s.name for s in b_specs))
    lines: list[Line] = []
    if each:
        for instance in mapping.instances(a_shapes):
            if any(len(a_shapes[n]) > 1 for n in instance.source_names):
                lines.append(_line(instance, ours, theirs))
    else:
        shown: dict[int, Instance] = {}
        for instance in mapping.instances(a_shapes):
            if any(len(a_shapes[n]) > 1 for n in instance.source_names):
                shown.setdefault(instance.number, instance)
        for number in shown:
            rule = mapping.rules[number]
            lines.append(
                Line(
                    source=tuple(_key(t, ours) for t in rule.source),
                    to=tuple(_key(t, theirs) for t in rule.to),
                    how=said(rule.ops),
                    ops=_written(rule.ops),
                )
            )
    return KeyMap(
        grade=grade_of(mapping, class_),
        source_format=ours.g.format,
        target_format=theirs.g.format,
        keys=tuple(lines),
    )


def _line(instance: Instance, ours: Namer, theirs: Namer) -> Line:
    return Line(
        source=tuple(_key(n, ours) for entry in instance.sources for n in leaves(entry)),
        to=tuple(_key(n, theirs) for entry in instance.targets for n in leaves(entry)),
        how=said(instance.rule.ops),
        ops=_written(instance.rule.ops),
    )


def _key(name: str, namer: Namer) -> str:
    """What the keys of a module have in common, or its tensor's name where the format has no key for it."""
    g, table = namer.g, components()
    path = name if g.named_tensors else split_name(name)[0]
    prefix = g.prefixes.get(namer.component(path), g.prefixes["default"])
    return prefix + g.spelt(path if g.full_names else table.stripped(path))


def said(ops: Sequence[Operation]) -> str:
    """A chain's action on factors in words."""
    words: list[str] = []
    for op in ops:
        if isinstance(op, Each):
            words += [said(chain) for _, chain in op.chains]
        elif isinstance(op, Rearrange) and _transposes(op):
            words.append("down and up change places")
        else:
            words.append(_SAID.get(type(op), ""))
    return "; ".join(dict.fromkeys(w for w in words if w)) or "names only"


def _transposes(op: Rearrange) -> bool:
    left, right = op.parsed.left, op.parsed.right
    return len(left) == len(right) == 2 and left == right[::-1]


def _written(ops: Sequence[Operation]) -> tuple[str, ...]:
    data: dict[str, Any] = {}
    return tuple(str(op.document(data)) for op in ops)
