"""Mappings: rules that say how one checkpoint's tensors are made of another's, and which tensors each rule means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Mapping as Dict
from typing import Literal

import msgspec

from lineage.layout.axes import LayoutError, Shape
from lineage.layout.chain import Entry, Level, chain_shapes, inverse_chain, leaves, mapped
from lineage.layout.names import Joined, Names, parse_where
from lineage.layout.operations import Each, Operation, Rearrange
from lineage.layout.templates import Template, parse_template

__all__ = ["Evidence", "How", "Instance", "Mapping", "Rule", "Side", "settled", "transformed"]

How = Literal["values", "structure", "name", "given"]


class Evidence(msgspec.Struct, frozen=True):
    """What speaks for a rule.

    Attributes
    ----------
    tensors : target tensors that it was found in
    cosine : the smallest one, None where the values say nothing
    certified : applied to A, it gave B's values
    margin : smallest distance of the cosine to the runner-up, or None
    """

    tensors: int
    cosine: float | None = None
    certified: bool = False
    margin: float | None = None


class Side(msgspec.Struct, frozen=True):
    """One checkpoint of a mapping: its name and number of tensors."""

    name: str = ""
    tensors: int = 0


class Rule(msgspec.Struct, frozen=True, kw_only=True):
    """Target templates, source templates and the chain between them.

    Attributes
    ----------
    to, source : templates; a placeholder on one side only is a list, made or collapsed by an operation `over` it
    ops : the chain, from the list of sources to the list of targets
    how : how it was found
    evidence : what speaks for it, None where nothing was counted
    where : values that a placeholder may take, such as "0:32"; their order is the order of lists
    table : bindings one by one where no formula fits: values by placeholder, all of one length
    """

    to: tuple[str, ...]
    source: tuple[str, ...]
    ops: tuple[Operation, ...] = ()
    how: How = "given"
    evidence: Evidence | None = None
    where: dict[str, str] | None = None
    table: dict[str, tuple[int, ...]] | None = None

    @property
    def templates(self) -> tuple[list[Template], list[Template]]:
        """Target and source templates, parsed."""
        return [parse_template(t) for t in self.to], [parse_template(t) for t in self.source]

    @property
    def values(self) -> dict[str, tuple[int, ...]]:
        """Values that `where` lists, by placeholder."""
        return {name: parse_where(text) for name, text in (self.where or {}).items()}

    def inverse(self) -> Rule:
        """The rule from targets to sources.

        Raises
        ------
        LayoutError : an operation cannot be undone
        """
        lengths = {name: len(values) for name, values in self.values.items()}
        ops = inverse_chain(self.ops, len(self.source), lengths)
        return msgspec.structs.replace(self, to=self.source, source=self.to, ops=ops)


class Instance(msgspec.Struct, frozen=True):
    """A rule for one binding of its placeholders.

    Attributes
    ----------
    rule : the rule
    number : its place in the mapping
    bindings : values of the placeholders that both sides share
    sources, targets : one entry a template: a name, or a `Level` of names
    """

    rule: Rule
    number: int
    bindings: dict[str, int]
    sources: tuple[Entry, ...]
    targets: tuple[Entry, ...]

    @property
    def source_names(self) -> tuple[str, ...]:
        """All source tensors, in order."""
        return tuple(name for entry in self.sources for name in leaves(entry))

    @property
    def target_names(self) -> tuple[str, ...]:
        """All target tensors, in order."""
        return tuple(name for entry in self.targets for name in leaves(entry))


class Mapping(msgspec.Struct, frozen=True, kw_only=True):
    """How one checkpoint's tensors are made of another's.

    Attributes
    ----------
    source, target : the two checkpoints
    sizes : lengths of the axes that the patterns name
    rules : in order; a target that several rules give whole is taken from the first
    unmatched_source, unmatched_target : tensors that no rule speaks of
    pair : stored layouts that gave some of the rules, by name
    """

    source: Side = Side()
    target: Side = Side()
    sizes: dict[str, int] = {}
    rules: tuple[Rule, ...] = ()
    unmatched_source: tuple[str, ...] = ()
    unmatched_target: tuple[str, ...] = ()
    pair: tuple[str, ...] = ()

    def instances(self, shapes: Dict[str, Shape]) -> Iterator[Instance]:
        """Every rule for every binding that the source tensors give.

        Parameters
        ----------
        shapes : shape of each source tensor by name

        Raises
        ------
        LayoutError : a rule that does not fit the tensors, with its place (`rules[3]: …`)

        Notes
        -----
        Near-linear in names and rules: names are taken apart once and joined by skeleton.
        """
        names = Names(shapes)
        for number, rule in enumerate(self.rules):
            try:
                yield from _instances(rule, number, names, shapes)
            except LayoutError as exc:
                raise LayoutError(f"rules[{number}]: {exc}") from exc

    def inverse(self) -> Mapping:
        """The mapping from target to source; rules that cannot be undone are left out and their sources listed."""
        rules: list[Rule] = []
        lost: list[str] = []
        for rule in self.rules:
            try:
                rules.append(rule.inverse())
            except LayoutError:
                lost += [t for t in rule.source if t not in lost]
        return Mapping(
            source=self.target,
            target=self.source,
            sizes=self.sizes,
            rules=tuple(rules),
            unmatched_source=self.unmatched_target,
            unmatched_target=(*self.unmatched_source, *lost),
            pair=self.pair,
        )


def _instances(rule: Rule, number: int, names: Names, shapes: Dict[str, Shape]) -> Iterator[Instance]:
    """Instances of one rule."""
    targets, sources = rule.templates
    where, table = rule.values, rule.table or {}
    made = dict.fromkeys(n for t in targets for n in t.placeholders)
    read = dict.fromkeys(n for t in sources for n in t.placeholders)
    kept = [n for n in {**read, **dict.fromkeys(table)} if n in made or n in table]
    spread = [n for n in made if n not in kept]
    joined = Joined(names, sources, kept, where, rule.table)
    namers = [t.namer(kept) for t in targets] if not spread else []
    for binding, entries in joined:
        if spread:
            bound = dict(zip(kept, binding, strict=True))
            made_names = _spread(rule, targets, bound, where, entries, shapes)
        else:
            made_names = tuple([name(binding) for name in namers])
        yield Instance(rule, number, dict(zip(kept, binding, strict=True)), entries, made_names)


def _spread(
    rule: Rule,
    targets: Sequence[Template],
    bound: dict[str, int],
    where: Dict[str, tuple[int, ...]],
    entries: Sequence[Entry],
    shapes: Dict[str, Shape],
) -> tuple[Entry, ...]:
    """Target entries of a rule that makes lists: as long as the shapes make them."""
    given = [mapped(entry, shapes.__getitem__) for entry in entries]
    results = chain_shapes(rule.ops, given)
    if len(results) != len(targets):
        raise LayoutError(f"{targets[0]}: the operations give {len(results)} arrays for {len(targets)} targets")
    return tuple(_named(t, bound, where, result) for t, result in zip(targets, results, strict=True))


def _named(template: Template, bound: dict[str, int], where: Dict[str, tuple[int, ...]], result: Entry) -> Entry:
    """Names for one result, nested as it is."""
    if not isinstance(result, Level):
        missing = [n for n in template.placeholders if n not in bound]
        if missing:
            raise LayoutError(f"{template}: nothing says which values {missing[0]} takes; add an operation over it")
        return template.name(bound)
    values = where.get(result.over, range(len(result.items)))
    if result.over not in template.placeholders or len(values) != len(result.items):
        raise LayoutError(f"{template}: a list over {result.over} of {len(result.items)} items does not fit")
    return Level(
        result.over,
        [_named(template, {**bound, result.over: v}, where, r) for v, r in zip(values, result.items, strict=True)],
    )


def transformed(ops: Sequence[Operation], change: Callable[[Rearrange], Rearrange]) -> tuple[Operation, ...]:
    """The chain with every rearrangement changed, those inside `each` too."""
    result: list[Operation] = []
    for op in ops:
        if isinstance(op, Rearrange):
            result.append(change(op))
        elif isinstance(op, Each):
            result.append(Each({k: transformed(chain, change) for k, chain in op.chains}))
        else:
            result.append(op)
    return tuple(result)


def settled(rules: Iterable[Rule]) -> tuple[tuple[Rule, ...], dict[str, int]]:
    """The rules with axes renamed so that a name means one length everywhere, and the lengths.

    An axis of known length keeps its name where it comes first; the same name with another length, or with none,
    gets a number.
    """
    rules = tuple(rules)
    seen: dict[tuple[str, int | None], str] = {}
    patterns: list[Rearrange] = []
    for rule in rules:
        transformed(rule.ops, lambda op: patterns.append(op) or op)  # type: ignore[func-returns-value]
    taken = {name for op in patterns for name in op.parsed.names}
    used: set[str] = set()
    uses = [(n, dict(op.sizes).get(n)) for op in patterns for n in sorted(op.parsed.names)]
    for name, size in sorted(dict.fromkeys(uses), key=lambda use: use[1] is None):
        new, number = name, 2
        while new in used or (new != name and new in taken):
            new, number = f"{name}{number}", number + 1
        seen[name, size] = new
        used.add(new)

    def change(op: Rearrange) -> Rearrange:
        lengths = dict(op.sizes)
        names = {n: seen[n, lengths.get(n)] for n in op.parsed.names}
        if all(old == new for old, new in names.items()):
            return op
        return Rearrange(str(op.parsed.renamed(names)), {names[n]: size for n, size in op.sizes})

    result = tuple(msgspec.structs.replace(rule, ops=transformed(rule.ops, change)) for rule in rules)
    return result, {new: size for (_, size), new in seen.items() if size is not None}
