"""A mapping as weight conversions of Transformers 5: what its renamings and operations can say, the rest by name.

Loading renames every key of a checkpoint by all renamings in turn, then lets at most one converter take it; patterns
are searched for, and of a match only the found text is replaced (transformers 5.24, `core_model_loading.py`). So
renamings here are anchored on both sides, the numbers of a name travel as the one group that a renaming has, and
converters speak of what follows the last number. `_Simulation` runs the finished list on names of every rule, and a
rule whose names do not arrive is taken out and told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from itertools import product

import msgspec

from lineage.emit.conversions import Unsayable, heads_of, operations
from lineage.emit.emitted import Emitted
from lineage.emit.source import WIDTH, Group, comment, quoted, statement
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.templates import Affine, Template

__all__ = ["emit_transformers"]

#: characters that names may hold in its patterns without a meaning of their own; a dot is escaped
_PLAIN = re.compile(r"[A-Za-z0-9_.:/-]*")
#: the end of a name; Transformers removes it where it turns a pattern round to save
_END = "(?!.)"
#: any number; a number that a name is tried with
_NUMBER, _TRIED = r"\d+", (0, 3, 12)
#: values of `where` that stand in a pattern one by one, and rows of a table that are said one by one
_MOST_VALUES = 256

#: a pattern and what replaces it
Renaming = tuple[str, str]


@dataclass
class _Said:
    """What is said for one rule.

    Attributes
    ----------
    place : of the rule in the mapping
    renamings : in order
    late : renamings that come after those of all rules
    sources, targets, operations : of the converter, empty where names alone change
    needs : what the model's config has to say
    names : source names with the names that the parameters they go to have
    """

    place: int
    renamings: list[Renaming] = field(default_factory=list)
    late: list[Renaming] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    needs: str = ""
    names: list[tuple[str, list[str]]] = field(default_factory=list)


def emit_transformers(mapping: Mapping, *, name: str, beside: str, shapes: Dict[str, Shape] | None = None) -> Emitted:
    """The file for a mapping.

    Parameters
    ----------
    name : of the mapping, for the docstring
    beside : not needed: nothing with long arrays can be said
    shapes : of the source's tensors; where they are known, numbers that are computed can be said one by one
    """
    del beside
    heads = max((h for rule in mapping.rules for h in heads_of(rule)), default=0)
    parts = [(k, part) for k, rule in enumerate(_listed(mapping, shapes)) for part in _parts(rule)]
    said: dict[int, _Said] = {}
    reasons: dict[int, str] = {}
    taken: list[Rule] = []
    for n, (_, rule) in enumerate(parts):
        try:
            said[n] = _say(rule, n, taken, heads)
            taken.append(rule)
        except Unsayable as exc:
            reasons[n] = str(exc)
    _settle(said, reasons, [rule for _, rule in parts])
    unsaid = tuple(f"rules[{parts[n][0]}] {parts[n][1].to[0]}: {reasons[n]}" for n in sorted(reasons))
    return Emitted(text=_text(mapping, name, list(said.values()), unsaid), unsaid=unsaid)


def _listed(mapping: Mapping, shapes: Dict[str, Shape] | None) -> list[Rule]:
    """The rules; those whose numbers no group can carry with a table of them, where the source's names are known."""
    rules = list(mapping.rules)
    wanted = {k for k, rule in enumerate(rules) if not rule.table and (_computes(rule) or _scattered(rule))}
    found: dict[int, list[dict[str, int]]] = {k: [] for k in wanted}
    if shapes is not None and wanted:
        for instance in mapping.instances(shapes):
            if instance.number in wanted:
                found[instance.number].append(instance.bindings)
    for k, rows in found.items():
        if rows and rows[0] and all(row.keys() == rows[0].keys() for row in rows):
            table = {name: tuple(row[name] for row in rows) for name in rows[0]}
            rules[k] = msgspec.structs.replace(rules[k], table=table, where=None)
    return rules


def _computes(rule: Rule) -> bool:
    numbers = [n for side in rule.templates for t in side for n in t.numbers]
    return any(n.terms and (n.constant or [f for _, f in n.terms] != [1]) for n in numbers)


def _scattered(rule: Rule) -> bool:
    """Whether a name has more numbers than renamings can carry between new texts."""
    pairs = [(_pieces(target)[0], _pieces(source)[0]) for target in rule.templates[0] for source in rule.templates[1]]
    return any(len(before) > 3 and before[1:-1] != after[1:-1] for after, before in pairs)


def _parts(rule: Rule) -> list[Rule]:
    """A rule with a short table as rules for its rows, without numbers left open."""
    table = rule.table
    if not table or len(next(iter(table.values()))) > _MOST_VALUES:
        return [rule]
    allowed = rule.values
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    rows = [row for row in rows if all(row[n] in allowed.get(n, (row[n],)) for n in row)]
    where = {n: text for n, text in (rule.where or {}).items() if n not in table} or None
    try:
        sides = [[tuple(str(_bound(t, row)) for t in side) for side in rule.templates] for row in rows]
    except LayoutError:
        return [rule]
    return [msgspec.structs.replace(rule, to=to, source=source, table=None, where=where) for to, source in sides]


def _bound(template: Template, row: Dict[str, int]) -> Template:
    """The template with these values of placeholders filled in."""
    numbers = []
    for number in template.numbers:
        constant = number.constant + sum(row[n] * f for n, f in number.terms if n in row)
        numbers.append(Affine(constant, tuple(t for t in number.terms if t[0] not in row)))
        if not numbers[-1].terms and constant < 0:
            raise LayoutError(f"{template}: a number in the name would be {constant}")
    return Template(template.texts, tuple(numbers))


def _text(mapping: Mapping, name: str, said: list[_Said], unsaid: tuple[str, ...]) -> str:
    """The file."""
    lines: list[str] = []
    for one in said:
        if any(target.startswith("\\1") for _, target in one.renamings):
            lines += comment("for loading only: saving does not turn these two round", 4)
        for pair in one.renamings:
            lines += _renaming(pair)
    for one in said:
        for pair in one.late:
            lines += _renaming(pair)
    for one in said:
        if one.operations:
            lines += comment(f"needs {one.needs}", 4) if one.needs else []
            parts = [Group("[", tuple(map(_raw, side)), "]") for side in (one.sources, one.targets)]
            group = Group("WeightConverter(", (*parts, Group("[", tuple(one.operations), "]")), ")")
            lines += statement(4, group, closing=",")
    used = sorted({op.partition("(")[0] for one in said for op in one.operations})
    used += ["WeightConverter"] if any(one.operations for one in said) else []
    used += ["WeightRenaming"] if any(one.renamings for one in said) else []
    body = ["CONVERSIONS = [", *lines, "]"] if lines else ["CONVERSIONS = []"]
    imports = statement(0, Group("from transformers.core_model_loading import (", tuple(used), ")")) if used else []
    flat = f"from transformers.core_model_loading import {', '.join(used)}"
    imports = [flat] if used and len(flat) <= WIDTH else imports
    told = [line for text in unsaid for line in comment(f"cannot be said: {text}")]
    parts_of_file = [_docstring(mapping, name), "\n".join(imports), "\n".join(told), "\n".join(body)]
    text = "\n\n".join(part for part in parts_of_file if part) + "\n"
    if any(len(line) > WIDTH for line in text.splitlines()):
        # names too long for a line cannot be laid out
        text = "# ruff: noqa: E501\n# fmt: off\n" + text
    return text


def _docstring(mapping: Mapping, name: str) -> str:
    return "\n".join([
        f'"""Weight conversions for Transformers 5, from {quoted(name[:60])}, {len(mapping.rules):,} rules.',
        "",
        "A model of the target's layout loads a checkpoint of the source's:",
        "",
        "    from transformers.conversion_mapping import register_checkpoint_conversion_mapping",
        "",
        '    register_checkpoint_conversion_mapping("ClassOfTheModel", CONVERSIONS, overwrite=True)',
        '    ClassOfTheModel.from_pretrained("folder of the checkpoint")',
        '"""',
    ])  # fmt: skip


def _renaming(pair: Renaming) -> list[str]:
    return statement(4, Group("WeightRenaming(", tuple(map(_raw, pair)), ")"), closing=",")


def _raw(pattern: str) -> str:
    """A pattern as a literal; its characters were checked."""
    return f'r"{pattern}"' if "\\" in pattern else f'"{pattern}"'


def _say(rule: Rule, place: int, taken: list[Rule], heads: int) -> _Said:
    """The conversions for one rule.

    Raises
    ------
    Unsayable : with the reason
    """
    targets, sources = rule.templates
    for template in (*targets, *sources):
        if not all(_PLAIN.fullmatch(text) for text in template.texts):
            raise Unsayable("its names hold characters that mean something in a pattern")
    if rule.table:
        raise Unsayable("its numbers come from a long table")
    if _computes(rule):
        raise Unsayable("numbers in its names are computed; give A and B")
    if any(_overlap(one, rule) for one in taken):
        raise Unsayable("a tensor that an earlier rule reads can go to one place only")
    made = [n for t in targets for n in t.placeholders]
    lists = {n for t in sources for n in t.placeholders} - set(made)
    if any(n not in t.placeholders for n in made for t in sources):
        raise Unsayable("loading makes no lists of tensors")
    said = _Said(place, names=_names(rule))
    if len(sources) == len(targets) == 1 and not rule.ops:
        if sources != targets:
            said.renamings = _renamings(rule, sources[0], targets[0])
        return said
    kept = _kept(sources[0], lists)
    for template in (*sources, *targets):
        if _kept(template, lists) != kept:
            raise Unsayable("its names hold their numbers in different orders")
    head = _head(targets[0], len(kept))
    for target in targets:
        if _head(target, len(kept)) != head:
            raise Unsayable("its targets stand at different places")
    for source in sources:
        tail = _tail(source, len(kept), lists, pattern=True)
        said.sources.append(("^" if not kept else r"(?<=\d)") + tail + _END)
        texts = _head(source, len(kept))
        if kept and texts != head:
            ahead = f"(?={_tail(source, len(kept), lists, pattern=False)}{_END})"
            said.renamings += _moves(texts, head, _groups(rule, kept), ahead)
        elif rule.where and any(n in rule.where for n in kept):
            raise Unsayable("a converter takes every layer, not those of a list")
    said.targets = [_tail(t, len(kept), set(), pattern=None) for t in targets]
    if kept and "" in (*said.targets, *(_tail(s, len(kept), lists, pattern=False) for s in sources)):
        raise Unsayable("a name ends with its number")
    said.operations, said.needs = operations(rule, lists, said.sources, said.targets, heads)
    return said


def _overlap(one: Rule, other: Rule) -> bool:
    """Whether two rules may read one tensor."""
    pairs = product(one.templates[1], other.templates[1])
    return any(
        a.skeleton == b.skeleton
        and all(_meet(_values(one, m), _values(other, n)) for m, n in zip(a.numbers, b.numbers, strict=True))
        for a, b in pairs
    )


def _values(rule: Rule, number: Affine) -> set[int] | None:
    """What a number of a name may be; None for anything."""
    if not number.terms:
        return {number.constant}
    allowed = rule.values.get(number.terms[0][0])
    return None if allowed is None else set(allowed)


def _meet(one: set[int] | None, other: set[int] | None) -> bool:
    return one is None or other is None or bool(one & other)


def _pieces(template: Template) -> tuple[list[str], list[str]]:
    """The texts between a template's placeholders, and the placeholders; other numbers are text."""
    texts, names = [template.texts[0]], []
    for value, text in zip(template.numbers, template.texts[1:], strict=True):
        if value.terms:
            names.append(value.terms[0][0])
            texts.append(text)
        else:
            texts[-1] += f"{value.constant}{text}"
    return texts, names


def _kept(template: Template, lists: set[str]) -> list[str]:
    """Placeholders that both sides have; those of lists come after them, once."""
    names = _pieces(template)[1]
    kept = [n for n in names if n not in lists]
    if names[: len(kept)] != kept or len(set(names)) < len(names):
        raise Unsayable("its names hold their numbers in different orders")
    return kept


def _head(template: Template, count: int) -> list[str]:
    """Texts before each of the first numbers."""
    return _pieces(template)[0][:count] + ([""] if count else [])


def _tail(template: Template, count: int, lists: set[str], *, pattern: bool | None) -> str:
    """What follows the last number that both sides have: `pattern` tells a list by a star, or by any number."""
    texts, _ = _pieces(template)
    rest = texts[count:]
    if pattern is None:
        if len(rest) > 1:
            raise Unsayable("its names hold their numbers in different orders")
        return rest[0]
    if pattern and any(not text.startswith(".") for text in rest[1:]):
        raise Unsayable("a list's number is not followed by a dot")
    return ("*" if pattern else _NUMBER).join(map(_escaped, rest)).replace(r"*\.", "*.")


def _escaped(text: str) -> str:
    return text.replace(".", r"\.")


def _groups(rule: Rule, kept: Sequence[str]) -> list[str]:
    """A pattern for each number."""
    values = rule.values
    if not any(n in values for n in kept):
        return [_NUMBER] * len(kept)
    if len(kept) > 1 or len(values[kept[0]]) > _MOST_VALUES:
        raise Unsayable("its numbers are restricted by where")
    return ["|".join(map(str, sorted(values[kept[0]])))]


def _renamings(rule: Rule, source: Template, target: Template) -> list[Renaming]:
    """Renamings from one name to another."""
    (before, numbers), (after, wanted) = _pieces(source), _pieces(target)
    if numbers != wanted or len(set(numbers)) < len(numbers):
        raise Unsayable("its names hold their numbers in different orders")
    return _moves(before, after, _groups(rule, numbers), _END)


def _moves(before: list[str], after: list[str], groups: list[str], ahead: str) -> list[Renaming]:
    """Renamings that put other texts around numbers."""
    old = [_escaped(text) for text in before]
    kept = [_escaped(text) for text in after]
    if not groups:
        return [(f"^{old[0]}{ahead}", after[0])]
    if before[1:-1] == after[1:-1]:
        inside = groups[0] + "".join(text + group for text, group in zip(old[1:-1], groups[1:], strict=True))
        return [(f"^{old[0]}({inside}){old[-1]}{ahead}", f"{after[0]}\\1{after[-1]}")]
    if len(groups) > 2:
        raise Unsayable("more than two numbers with other texts between")
    first, second = groups
    moves = [(f"^{old[0]}({first}){old[1]}(?={second}{old[2]}{ahead})", f"{after[0]}\\1{after[1]}")]
    if before[2] != after[2]:
        moves.append((f"^({kept[0]}{first}{kept[1]}{second}){old[2]}{ahead}", f"\\1{after[2]}"))
    return moves


def _names(rule: Rule) -> list[tuple[str, list[str]]]:
    """Some source names of a rule, each with the names of its targets."""
    targets, sources = rule.templates
    placeholders = list(dict.fromkeys(n for t in sources for n in t.placeholders))
    values = [rule.values.get(n, _TRIED)[:3] for n in placeholders]
    found: dict[str, list[str]] = {}
    for row in product(*values):
        bound = dict(zip(placeholders, row, strict=True))
        for source in sources:
            found[source.name(bound)] = [t.name({n: bound[n] for n in t.placeholders}) for t in targets]
    return list(found.items())


def _settle(said: dict[int, _Said], reasons: dict[int, str], rules: Sequence[Rule]) -> None:
    """Rules whose names do not arrive go by names of their own, or are taken out."""
    apart: set[int] = set()
    while True:
        run = _Simulation(list(said.values()))
        wrong = [k for k, one in said.items() if not all(run.arrives(s, targets, one) for s, targets in one.names)]
        swapped = [k for k in wrong if k not in apart and len(said[k].renamings) == 1 and not said[k].operations]
        for k in swapped:
            apart.add(k)
            said[k] = _by_way(said[k])
        if swapped:
            continue
        read = {name for one in said.values() for name, _ in one.names}
        gone = [name for k in reasons for name in _sampled(rules[k]) if name not in read and run.moved(name)]
        # a name that nobody may touch is touched: a rule that does so goes first
        wrong = wrong or [k for k, one in said.items() if any(run.touches(name, one) for name in gone)]
        if not wrong:
            return
        reasons[wrong[0]] = "its patterns would match names of other rules"
        del said[wrong[0]]


def _sampled(rule: Rule) -> Iterator[str]:
    """Some source names of a rule, one template at a time."""
    for source in rule.templates[1]:
        rows = [dict(zip(source.placeholders, row, strict=True))
                for row in product(*(rule.values.get(n, _TRIED)[:3] for n in source.placeholders))]  # fmt: skip
        if rule.table:
            rows = [dict(zip(rule.table, row, strict=True)) for row in list(zip(*rule.table.values(), strict=True))[:3]]
        for bound in rows:
            if {*source.placeholders} <= bound.keys():
                numbers = [n.constant + sum(bound[p] * f for p, f in n.terms) for n in source.numbers]
                if min(numbers, default=0) >= 0:
                    yield source.name(bound)


def _by_way(said: _Said) -> _Said:
    """A renaming in two steps, the second after those of all rules, so that names can be swapped."""
    ((pattern, target),) = said.renamings
    way = f"lineage-{said.place}"
    group = re.search(r"\((?!\?)[^()]*\)", pattern)
    if group is None:
        return _Said(said.place, [(pattern, way)], [(f"^{way}{_END}", target)], names=said.names)
    first = (pattern, f"{way}.\\1")
    return _Said(said.place, [first], [(f"^{way}\\.{group[0]}{_END}", target)], names=said.names)


class _Simulation:
    """What Transformers does with a key.

    Parameters
    ----------
    said : of all rules, in order
    """

    def __init__(self, said: list[_Said]) -> None:
        pairs = [pair for one in said for pair in one.renamings] + [pair for one in said for pair in one.late]
        # compiled here: there may be more patterns than `re` remembers
        self._renamings = [(re.compile(pattern), target) for pattern, target in pairs]
        self._converters = [(re.compile(p.replace("*.", r".*\.")), one) for one in said for p in one.sources]

    def _run(self, key: str) -> tuple[str, _Said | None]:
        """The renamed key, and what converts it."""
        for pattern, target in self._renamings:
            match = pattern.search(key)
            if match:
                key = key.replace(match[0], target.replace("\\1", match[1] if match.re.groups else ""), 1)
        for pattern, one in self._converters:
            match = pattern.search(key)
            if match:
                return key.replace(match[0], one.targets[0], 1), one
        return key, None

    def arrives(self, key: str, targets: list[str], said: _Said) -> bool:
        """Whether the key goes to these targets, by this rule."""
        found, converter = self._run(key)
        if converter is not (said if said.operations else None):
            return False
        if converter is None:
            return [found] == targets
        part = next((found.partition(t) for t in converter.targets if t in found), ("", "", ""))
        return [part[0] + t + part[2] for t in converter.targets] == targets

    def moved(self, key: str) -> bool:
        """Whether a key that no rule here speaks of would be changed."""
        return self._run(key) != (key, None)

    def touches(self, key: str, said: _Said) -> bool:
        """Whether this rule's patterns match the key."""
        patterns = [p for p, _ in said.renamings] + [p.replace("*.", r".*\.") for p in said.sources]
        return any(re.search(pattern, key) for pattern in patterns)
