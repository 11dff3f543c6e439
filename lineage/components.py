"""Which component of one checkpoint goes with which of the other, and one mapping of all of them.

A pipeline folder, or a file that holds several networks, is matched part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.layout.mapping import Mapping, Rule, Side, settled

__all__ = ["component_of", "matched_components", "whole_mapping"]

#: share of a component's parameters certified by values from which on its namesake is not doubted, and below which
#: values count for nothing: tables that anyone computes alike (positions, frequencies) are found everywhere
UNDOUBTED, NOTHING = 0.5, 0.1


def matched_components(
    a: Checkpoint,
    b: Checkpoint,
    *,
    seed: int,
    threads: int,
    progress: Callable[[str], None],
    find: Callable[[Checkpoint, Checkpoint, Callable[[str], None]], Mapping] | None = None,
) -> Iterator[tuple[str | None, str, Mapping]]:
    """Every component of B, largest first, with the one of A that it corresponds to, and their mapping.

    The component of the same name comes first. Where values certify nothing between those two, every other one of A
    is tried: parts change places between pipelines, and a part may be there twice.

    Parameters
    ----------
    find : gives the mapping between two of them; None: `find_mapping`

    Returns
    -------
    name in A, name in B, mapping; None for A's name where no component of A corresponds at all
    """
    parts = sorted(b.components, key=lambda name: -component_of(b, name).parameters)

    @cache
    def found(x: str, y: str) -> Mapping:
        def told(step: str) -> None:
            progress(f"{step} {y}".rstrip())

        return (find or search)(component_of(a, x), component_of(b, y), told)

    def search(one: Checkpoint, two: Checkpoint, told: Callable[[str], None]) -> Mapping:
        from lineage.match.finder import find_mapping

        return find_mapping(one, two, seed=seed, threads=threads, progress=told)

    @cache
    def explained(x: str, y: str) -> float:
        share = _certified(found(x, y), component_of(a, x), component_of(b, y))
        return share if share >= NOTHING else 0.0

    if a.components == b.components and len(parts) == 1:  # two networks: there is nothing to choose
        yield parts[0], parts[0], found(parts[0], parts[0])
        return
    taken = {y for y in parts if y in a.components and explained(y, y) >= UNDOUBTED}
    settled = set(taken)
    for y in parts:
        free = [y] if y in settled else [x for x in a.components if x not in taken or explained(x, y)]
        best = max(free, key=lambda x: (explained(x, y), _matched(found(x, y)), x == y), default=None)
        if best is not None and found(best, y).rules:
            taken.add(best)
            yield best, y, found(best, y)
        elif y in a.components:
            yield y, y, found(y, y)
        else:
            yield None, y, Mapping(target=Side(y, len(component_of(b, y))))


def whole_mapping(a: Checkpoint, b: Checkpoint, found: Sequence[tuple[str | None, str, Mapping]]) -> Mapping:
    """One mapping of all components, whose tensors carry the components' names."""
    if len(found) == 1 and not found[0][0] and not found[0][1]:
        return found[0][2]
    rules: list[Rule] = []
    used_a: set[str] = set()
    used_b: set[str] = set()
    for x, y, mapping in found:
        for rule in mapping.rules:
            to = tuple(_inside(y, template) for template in rule.to)
            source = tuple(_inside(x or "", template) for template in rule.source)
            rules.append(msgspec.structs.replace(rule, to=to, source=source))
    whole = Mapping(rules=tuple(rules))
    for instance in whole.instances({spec.name: spec.shape for spec in a}):
        used_a.update(instance.source_names)
        used_b.update(instance.target_names)
    final, sizes = settled(rules)
    return Mapping(
        source=Side(a.path, len(a)), target=Side(b.path, len(b)), sizes=sizes, rules=final,
        unmatched_source=tuple(n for n in a.specs if n not in used_a),
        unmatched_target=tuple(n for n in b.specs if n not in used_b),
        pair=tuple(dict.fromkeys(name for _, _, mapping in found for name in mapping.pair)),
    )  # fmt: skip


def component_of(checkpoint: Checkpoint, name: str | None) -> Checkpoint:
    """A component; the whole where there is only one network; nothing where there is no such part."""
    if name is None:
        return _empty(checkpoint)
    return checkpoint.component(name) if name else checkpoint


def _empty(checkpoint: Checkpoint) -> Checkpoint:
    from lineage.checkpoint.base import Part as View

    return View(checkpoint, {}, "")


def _matched(mapping: Mapping) -> int:
    """Tensors of B that a rule speaks of."""
    return sum(rule.evidence.tensors for rule in mapping.rules if rule.evidence)


def _certified(mapping: Mapping, a: Checkpoint, b: Checkpoint) -> float:
    """Share of B's parameters that values certify."""
    sure = Mapping(rules=tuple(rule for rule in mapping.rules if rule.evidence and rule.evidence.certified))
    names = {n for i in sure.instances({spec.name: spec.shape for spec in a}) for n in i.target_names}
    return sum(b.specs[n].size for n in names if n in b.specs) / max(1, b.parameters)


def _inside(component: str, template: str) -> str:
    """A template of the component's tensors under the names that they have in the whole."""
    if not component:
        return template
    return component.replace("{", "{{").replace("}", "}}") + "/" + template
