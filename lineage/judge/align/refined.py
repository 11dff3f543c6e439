"""The mapping with the recovered transforms as operations of its rules."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Dict

import msgspec
import numpy as np

from lineage.checkpoint import Checkpoint
from lineage.judge.align.chains import Chains
from lineage.judge.align.choice import LEAST_SHOWN
from lineage.judge.align.weights import cosine
from lineage.judge.common import Common, unfitted
from lineage.layout.axes import LayoutError
from lineage.layout.chain import Level, apply_chain, chain_shapes, leaves
from lineage.layout.induce import Match, induce
from lineage.layout.mapping import Evidence, Instance, Mapping, Rule, settled
from lineage.layout.operations import Concat, Each, Operation, Split, Stack, Unstack

__all__ = ["cosines", "refined"]

#: elements of tensors that are turned only to say how near they come
MOST = 1 << 22


def cosines(common: Common, chains: Chains, known: Dict[str, float]) -> dict[str, float]:
    """Cosine of each tensor that has a chain, after it, with B's; of large ones only what is known already."""
    found = {name: value for name, value in known.items() if name in chains}
    for name, chain in chains.items():
        if name in found or common.a.specs[name].size > MOST:
            continue
        made = apply_chain(chain, [np.asarray(common.a.tensor(name), np.float32)])[0]
        if made.shape == common.b.specs[name].shape:
            found[name] = cosine(np.nan_to_num(made), np.nan_to_num(np.asarray(common.b.tensor(name), np.float32)))
    return found


def refined(
    a: Checkpoint, b: Checkpoint, mapping: Mapping, common: Common, chains: Chains, found: Dict[str, float]
) -> Mapping:
    """The mapping, with chains for tensors of the common layout built into its rules.

    Parameters
    ----------
    chains : operations by common name; rules that touch none of them stay as they are
    found : cosine of each tensor with a chain
    """
    shapes = {name: spec.shape for name, spec in a.specs.items()}
    targets = {name: spec.shape for name, spec in b.specs.items()}
    plain = _paired_by_name(unfitted(mapping), a, common)
    kept: list[Rule] = []
    matches: list[Match] = []
    for number, rule in enumerate(plain.rules):
        instances = list(_instances(plain, rule, shapes))
        touched = [_names(i, common) & chains.keys() for i in instances]
        made = [
            _match(i, common, chains, found, targets, shapes) if t else None
            for i, t in zip(instances, touched, strict=True)
        ]
        if number < len(mapping.rules) and (
            not any(touched) or any(m is None for m, t in zip(made, touched, strict=True) if t)
        ):
            kept.append(mapping.rules[number])
            continue
        matches += [m or _as_it_stands(i) for m, i in zip(made, instances, strict=True)]
    rules, sizes = settled([*kept, *induce(matches, list(shapes), list(targets))])
    done = msgspec.structs.replace(mapping, rules=rules, sizes=sizes)
    used = [i for rule in rules for i in _instances(done, rule, shapes)]
    sources = {n for i in used for n in i.source_names}
    filled = {n for i in used for n in i.target_names}
    return msgspec.structs.replace(
        done,
        unmatched_source=tuple(n for n in shapes if n not in sources),
        unmatched_target=tuple(n for n in targets if n not in filled),
    )


def _paired_by_name(mapping: Mapping, a: Checkpoint, common: Common) -> Mapping:
    """With a rule for each common tensor that only its name paired."""
    named = set(mapping.unmatched_source) & set(mapping.unmatched_target) & set(common.shapes)
    rules = tuple(Rule(to=(n,), source=(n,), how="name") for n in a.specs if n in named)
    return msgspec.structs.replace(mapping, rules=(*mapping.rules, *rules))


def _instances(mapping: Mapping, rule: Rule, shapes: Dict[str, tuple[int, ...]]) -> Iterator[Instance]:
    """Instances of one rule; none where it does not fit the tensors."""
    try:
        yield from list(msgspec.structs.replace(mapping, rules=(rule,)).instances(shapes))
    except LayoutError:
        return


def _names(instance: Instance, common: Common) -> set[str]:
    return set(instance.source_names if common.named_by_a else instance.target_names)


def _as_it_stands(instance: Instance) -> Match:
    """An instance as a match of its own."""
    evidence = instance.rule.evidence or Evidence(tensors=1)
    literal = _literal(instance)
    sources, targets, ops = literal or (instance.source_names, instance.target_names, instance.rule.ops)
    return Match(targets, sources, ops, how=instance.rule.how, cosine=evidence.cosine, certified=evidence.certified)


def _match(
    instance: Instance,
    common: Common,
    chains: Chains,
    found: Dict[str, float],
    targets: Dict[str, tuple[int, ...]],
    shapes: Dict[str, tuple[int, ...]],
) -> Match | None:
    """The instance with its chains built in; None where that cannot be said or does not fit."""
    literal = _literal(instance)
    if literal is None:
        return None
    sources, made, ops = literal
    names = sources if common.named_by_a else made
    each = {k: chains[name] for k, name in enumerate(names) if name in chains}
    step = each[0] if len(names) == 1 else (Each(each),)
    for relaxed in (False, True):
        around = _relaxed(ops) if relaxed else ops
        whole = (*step, *around) if common.named_by_a else (*around, *step)
        try:
            if [*chain_shapes(whole, [shapes[n] for n in sources])] == [targets[n] for n in made]:
                least = min((found[name] for name in names if name in found), default=None)
                certified = least is not None and least >= LEAST_SHOWN
                return Match(made, sources, whole, how="values", cosine=least, certified=certified)
        except LayoutError:
            continue
    return None


def _relaxed(ops: tuple[Operation, ...]) -> tuple[Operation, ...]:
    """Without the lengths of parts, which change where channels were cut."""
    return tuple(Concat(op.axis) if isinstance(op, Concat) and op.over is None else op for op in ops)


def _literal(instance: Instance) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Operation, ...]] | None:
    """Names and operations without lists over a placeholder; None where lists are nested or stand beside others."""
    levels = [entry for entry in (*instance.sources, *instance.targets) if isinstance(entry, Level)]
    sources, targets = tuple(instance.source_names), tuple(instance.target_names)
    if not levels:
        return sources, targets, instance.rule.ops
    one = len(instance.sources) == len(instance.targets) == 1
    if not one or len(levels) != 1 or any(isinstance(item, Level) for item in levels[0].items):
        return None
    assert len(list(leaves(levels[0]))) == max(len(sources), len(targets))
    return sources, targets, tuple(_own_list(op) for op in instance.rule.ops)


def _own_list(op: Operation) -> Operation:
    """The operation on the chain's own list instead of one over a placeholder."""
    if isinstance(op, (Concat, Stack)) and op.over is not None:
        return Concat(op.axis, op.sizes) if isinstance(op, Concat) else Stack(op.axis)
    if isinstance(op, (Split, Unstack)) and op.over is not None:
        return Split(op.axis, op.parts, op.sizes) if isinstance(op, Split) else Unstack(op.axis)
    return op
