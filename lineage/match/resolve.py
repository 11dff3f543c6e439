"""A stored layout made concrete for two headers: which tensors each rule means, and every size that shapes tell.

Axis names of a stored layout stand for sizes of one model. An axis that stands alone in a rule's first pattern
(`"d -> d"` is enough) says its length outright; where all such places agree, the name has this length in every rule,
and a place that it does not fit is not meant by the rule. What only a division could give (heads and their width,
from the product of both) stays open until values or the user tell it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lineage.layout.axes import LayoutError, OpenSize, Shape
from lineage.layout.chain import Entry, Level, chain_shapes, inverse_chain, leaves, mapped
from lineage.layout.induce import Match
from lineage.layout.mapping import Rule, transformed
from lineage.layout.names import Joined, Names
from lineage.layout.operations import Concat, Each, Operation, Rearrange, Split, Stack, Unstack
from lineage.match.chains import OVER

__all__ = ["Laid", "Layout", "Open", "Place", "first", "turned"]


class Place(NamedTuple):
    """One binding of a rule: its tensors, or lists of them.

    Attributes
    ----------
    number : of the rule
    sources, targets : names, or a `Level` of names
    """

    number: int
    sources: tuple[Entry, ...]
    targets: tuple[Entry, ...]


class Open(NamedTuple):
    """A place that needs a size which shapes do not tell.

    Attributes
    ----------
    place : the tensors
    names : sizes of which one has to be said
    product : what they make together
    """

    place: Place
    names: tuple[str, ...]
    product: int


class Laid(NamedTuple):
    """What a layout says once some sizes are given.

    Attributes
    ----------
    matches : places that fit, from source to target
    open : places that would fit if a size were said
    whole : whether every tensor that a rule with placeholders speaks of fits, on both sides
    """

    matches: list[Match]
    open: list[Open]
    whole: bool


class Layout:
    """Rules of a stored layout over the tensors of two headers.

    Parameters
    ----------
    rules : of the stored mapping
    source, target : shapes by name
    """

    def __init__(self, rules: Sequence[Rule], source: Mapping[str, Shape], target: Mapping[str, Shape]) -> None:
        self.rules, self._shapes = rules, (source, target)
        names = (Names(source), Names(target))
        self.places: list[Place] = []
        self._spoken: tuple[set[str], set[str]] = (set(), set())
        for number, rule in enumerate(rules):
            self.places += _places(rule, number, names)
            allowed = {name: frozenset(values) for name, values in rule.values.items()}
            for side, templates, spoken in zip(names, rule.templates[::-1], self._spoken, strict=True):
                for template in templates:
                    if template.placeholders:
                        spoken.update(side.relation(template, allowed).names.values())
        self._keys = [self._key(place) for place in self.places]
        self._local: set[str] = set()
        self._told = self._sizes()

    def laid(self, given: Mapping[str, int]) -> Laid:
        """All places under the sizes that shapes tell and those that are given.

        Notes
        -----
        Near-linear in tensors: places of one rule whose shapes agree share their chain.
        """
        known = {**self._told, **given}
        known = {**known, **self._divided(known)}
        matches: list[Match] = []
        asked: list[Open] = []
        done: dict[Any, tuple[Operation, ...] | OpenSize | None] = {}
        used: tuple[set[str], set[str]] = (set(), set())
        for place, key in zip(self.places, self._keys, strict=True):
            if key not in done:
                done[key] = self._chain(place, known)
            chain = done[key]
            if chain is None:
                continue
            for names, entries in zip(used, (place.sources, place.targets), strict=True):
                names.update(n for entry in entries for n in leaves(entry))
            if isinstance(chain, OpenSize):
                asked.append(Open(place, chain.names, chain.product))
            else:
                matches.append(_match(place, chain))
        whole = all(spoken <= names for spoken, names in zip(self._spoken, used, strict=True))
        return Laid(first(matches), asked, whole)

    def names(self) -> set[str]:
        """Every axis that a pattern names."""
        found: set[str] = set()

        def note(op: Rearrange) -> Rearrange:
            found.update(op.parsed.names)
            return op

        for rule in self.rules:
            transformed(rule.ops, note)
        return found

    def at(self, place: Place, given: Mapping[str, int]) -> Match | None:
        """One place under given sizes, None where it does not fit or stays open."""
        chain = self._chain(place, {**self._told, **given})
        return None if chain is None or isinstance(chain, OpenSize) else _match(place, chain)

    def _key(self, place: Place) -> tuple[Any, ...]:
        """Places with equal keys have equal operations."""
        return (place.number, *self._entries(place))

    def _entries(self, place: Place) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
        """Shapes in the place of names."""
        source, target = self._shapes
        return (
            tuple(mapped(entry, source.__getitem__) for entry in place.sources),
            tuple(mapped(entry, target.__getitem__) for entry in place.targets),
        )

    def _chain(self, place: Place, known: Mapping[str, int]) -> tuple[Operation, ...] | OpenSize | None:
        """The rule's operations with all sizes, what has to be said, or None where the shapes do not fit."""
        sources, targets = self._entries(place)
        try:
            chain, made = _filled(self.rules[place.number].ops, sources, known)
        except OpenSize as exc:
            return exc if exc.product else None
        except LayoutError:
            return None
        return chain if tuple(made) == targets else None

    def _sizes(self) -> dict[str, int]:
        """Lengths of the axes that stand alone somewhere and have one length everywhere."""
        found: dict[str, set[int]] = defaultdict(set)
        for number, sources, _ in set(self._keys):
            for op, shape in _patterns(self.rules[number].ops[:1], sources):
                for group, length in zip(op.parsed.left, shape, strict=False):
                    if len(group) == 1 and len(op.parsed.left) == len(shape):
                        found[group[0]].add(length)
        self._local |= {name for name, lengths in found.items() if len(lengths) > 1}
        return {name: min(lengths) for name, lengths in found.items() if len(lengths) == 1}

    def _divided(self, known: Mapping[str, int]) -> dict[str, int]:
        """Lengths that follow from a division, the same in every place that fits."""
        told = dict(known)
        different = dict(zip(self._keys, self.places, strict=True)).values()
        while True:
            found: dict[str, set[int]] = defaultdict(set)
            for place in different:
                chain = self._chain(place, told)
                if chain is None or isinstance(chain, OpenSize):
                    continue
                for op, shape in _patterns(chain, self._entries(place)[0]):
                    for name, length in op.parsed.lengths(shape, dict(op.sizes)).items():
                        found[name].add(length)
            new = {n: min(v) for n, v in found.items() if len(v) == 1 and n not in told and n not in self._local}
            if not new:
                return told
            told.update(new)


def _places(rule: Rule, number: int, names: tuple[Names, Names]) -> Iterator[Place]:
    """Every binding of a rule whose tensors are on both sides."""
    targets, sources = rule.templates
    made, read = ({n: None for t in side for n in t.placeholders} for side in (targets, sources))
    shared = [n for n in read if n in made]
    # lists stand on one side only: the names of that side say how long they are
    listed, named = (1, 0) if set(made) - set(read) else (0, 1)
    templates = (sources, targets)
    namers = [t.namer(shared) for t in templates[named]]
    for binding, entries in Joined(names[listed], templates[listed], shared, rule.values, rule.table):
        try:
            others = tuple(name(binding) for name in namers)
        except LayoutError:
            continue  # a number below zero: there is no such name
        if all(other in names[named].names for other in others):
            yield Place(number, entries, others) if listed == 0 else Place(number, others, entries)


def _filled(
    ops: Sequence[Operation], entries: Sequence[Entry], known: Mapping[str, int]
) -> tuple[tuple[Operation, ...], list[Entry]]:
    """The chain with every size that its inverse needs, and the shapes that come out."""
    done: list[Operation] = []
    at = list(entries)
    for op in ops:
        if isinstance(op, Each):
            chains = {k: _filled(chain, at[k : k + 1], known)[0] for k, chain in op.chains if k < len(at)}
            op = Each({k: chain for k, chain in chains.items() if chain})
        elif isinstance(op, Rearrange):
            op = _sized(op, next(leaves(at[0])), known)
        elif isinstance(op, Concat) and op.over is None and op.sizes is None:
            lengths = [next(leaves(entry)) for entry in at]
            cut = [shape[op.axis] for shape in lengths if -len(shape) <= op.axis < len(shape)]
            op = dataclasses.replace(op, sizes=tuple(cut) if len(set(cut)) > 1 else None)
        before, at = at, chain_shapes((op,), at)
        if not _moves_nothing(op, before, at):
            done.append(op)
    return tuple(done), at


def _moves_nothing(op: Operation, before: Sequence[Entry], after: Sequence[Entry]) -> bool:
    """Whether the step leaves everything in its place: sizes of one, or a pattern that only asks for a shape."""
    if isinstance(op, Each):
        return not op.chains
    if not isinstance(op, Rearrange) or list(before) != list(after):
        return False
    shapes = {shape for entry in before for shape in leaves(entry)}
    return all(op.parsed.keeps_order(shape, dict(op.sizes)) for shape in shapes)


def _sized(op: Rearrange, shape: Shape, known: Mapping[str, int]) -> Rearrange:
    """The pattern with the sizes that it and its inverse need."""
    pattern = op.parsed
    sizes = {**{n: v for n, v in known.items() if n in pattern.names}, **dict(op.sizes)}
    lengths = pattern.lengths(shape, sizes)
    alone = {g[0] for g in pattern.left if len(g) == 1} & {g[0] for g in pattern.right if len(g) == 1}
    kept = {n: v for n, v in sizes.items() if n not in alone}
    for group in pattern.right:
        missing = [n for n in group if n not in kept and n in lengths]
        kept.update({n: lengths[n] for n in missing} if len(missing) > 1 else {})
    return Rearrange(op.pattern, kept)


def _patterns(ops: Sequence[Operation], entries: Sequence[Entry]) -> Iterator[tuple[Rearrange, Shape]]:
    """Patterns of a chain with a shape that each meets, as far as the sizes are known."""
    at = list(entries)
    for op in ops:
        if isinstance(op, Each):
            for k, chain in op.chains:
                yield from _patterns(chain, at[k : k + 1])
        elif isinstance(op, Rearrange):
            for entry in at:
                yield op, next(leaves(entry))
        try:
            at = chain_shapes((op,), at)
        except LayoutError:
            return


def _match(place: Place, ops: Sequence[Operation]) -> Match:
    """A place as a match; lists are named as the finder names them."""
    targets, sources = (tuple(_listed(entry) for entry in side) for side in (place.targets, place.sources))
    return Match(targets=targets, sources=sources, ops=tuple(_renamed(op) for op in ops), how="name")


def _listed(entry: Entry) -> Any:
    return tuple(leaves(entry)) if isinstance(entry, Level) else entry


def _renamed(op: Operation) -> Operation:
    """The operation over the placeholder that the finder uses."""
    if isinstance(op, Each):
        return Each({k: tuple(_renamed(step) for step in chain) for k, chain in op.chains})
    if isinstance(op, Concat | Split | Stack | Unstack) and op.over:
        return dataclasses.replace(op, over=OVER)
    return op


def first(matches: Iterable[Match]) -> list[Match]:
    """The matches without those that give a target again; two ways from one source to one target are no answer."""
    ways: dict[Any, set[Any]] = defaultdict(set)
    matches = list(matches)
    for match in matches:
        ways[match.sources, match.targets].add(match.ops)
    seen: set[Any] = set()
    kept = []
    for match in matches:
        if len(ways[match.sources, match.targets]) == 1 and not seen.intersection(match.targets):
            seen.update(match.targets)
            kept.append(match)
    return kept


def turned(match: Match) -> Match | None:
    """The match from target to source, None where an operation cannot be undone."""
    lists = [entry for entry in (*match.sources, *match.targets) if isinstance(entry, tuple)]
    try:
        ops = inverse_chain(match.ops, len(match.sources), {OVER: len(lists[0])} if lists else {})
    except LayoutError:
        return None
    return Match(targets=match.sources, sources=match.targets, ops=ops, how=match.how)
