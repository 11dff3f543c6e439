"""Templates as loops: for which numbers a rule's source tensors are there, as statements of emitted code.

The join is that of `lineage.layout.names`: numbers are found in the names, restricted by `where`, or listed by a
table; a placeholder on one side only is a list that must be complete.
"""

from __future__ import annotations

from collections.abc import Sequence

from lineage.emit.module import Module
from lineage.emit.source import WIDTH, Group, Locals, number, statement, string, template, whole
from lineage.layout.axes import LayoutError
from lineage.layout.mapping import Rule
from lineage.layout.templates import Affine, Template

__all__ = ["Loops"]

#: longest name that is looked for inside a test
_LONGEST_TESTED = 80


class Loops:
    """The loops around one rule's statements.

    Parameters
    ----------
    rule : the rule
    module : the file

    Attributes
    ----------
    lines : statements so far
    indent : spaces before the statements inside
    names : the placeholders as variables
    lists : placeholders of the sources that make lists
    values : by placeholder that makes a list, the expression of its values
    listed : whether the variable `names` holds the names of all sources
    """

    def __init__(self, rule: Rule, module: Module) -> None:
        self.rule, self.module = rule, module
        self.targets, self.sources = rule.templates
        read = dict.fromkeys(n for t in self.sources for n in t.placeholders)
        made = dict.fromkeys(n for t in self.targets for n in t.placeholders)
        table = rule.table or {}
        self.where = rule.values
        self.kept = [n for n in {**read, **dict.fromkeys(table)} if n in made or n in table]
        self.lists = [n for n in read if n not in self.kept]
        self.names = Locals([*read, *made, *table])
        self.values: dict[str, str] = {}
        self.listed = False
        self.lines: list[str] = []
        self.indent = 4
        self._bound: set[str] = set()
        self._looping = False
        self._tests: list[str] = []
        self._grids: list[tuple[Template, str]] = []
        self._open()

    def add(self, item: str | Group) -> None:
        """One more statement inside."""
        self.lines += statement(self.indent, item)

    def begin(self, head: str, item: Group | None = None) -> None:
        """A statement that others stand in: `head:`, or `head` + item + `:`."""
        self._looping |= head.startswith("for ")
        if item is None:
            self.add(f"{head}:")
        else:
            self.lines += statement(self.indent, Group(head + item.before, item.items, item.after), closing=":")
        self.indent += 4

    def _skip(self, condition: str) -> None:
        self.add(f"if {condition}:")
        self.add("    continue")

    def _open(self) -> None:
        """Loops, and the tests that all sources are there."""
        self._prepare()
        if self.rule.table:
            self._rows()
        checked: list[Template] = []
        for source in self.sources:
            new = [n for n in source.placeholders if n in self.kept and n not in self._bound]
            grid = next((name for t, name in self._grids if t is source), None)
            if new and grid is not None:
                self._loop_over_groups(source, grid)
            elif new:
                self._loop(source)
            elif grid is None:
                checked.append(source)
        for source in self.sources:
            grid = next((name for t, name in self._grids if t is source), None)
            if grid is not None:
                self._check_grid(source, grid)
        self._check_names(checked)
        self._test()

    def _prepare(self) -> None:
        """Before the loops: the numbers of every template that makes lists."""
        if not self.lists:
            return
        for k, source in enumerate(self.sources):
            if any(n in self.lists for n in source.placeholders):
                name = f"found_{k}"
                kept = [j for j, n in enumerate(source.placeholders) if n in self.kept]
                places = f"({', '.join(map(str, kept))}{',' if len(kept) == 1 else ''})"
                rows = self._relation(source, f"rows_{k}")
                helper = self.module.use("_grouped")
                self.add(Group(f"{name} = {helper}(", (rows, places), ")"))
                self._grids.append((source, name))

    def _relation(self, source: Template, name: str) -> str | Group:
        """All values of a template's placeholders, as an expression; statements that compute it come before."""
        numbers, texts = _open_numbers(source)
        plain = [n.terms[0][0] for n in numbers if n.constant == 0 and len(n.terms) == 1 and n.terms[0][1] == 1]
        if plain == list(source.placeholders) and len(plain) == len(numbers) and not self.where.keys() & {*plain}:
            return Group(f"{self.module.use('_numbers')}(", ("state_dict", *map(string, texts)), ")")
        self.add(f"{name} = []")
        indent = self.indent
        self._loop(source)
        self.add(f"{name}.append({_tuple([self.names[n] for n in source.placeholders])})")
        self.indent, self._bound, self._looping = indent, set(), False
        return name

    def _allowed(self, name: str) -> str:
        """The values that `where` allows."""
        given = whole(self.where[name])
        return given if isinstance(given, str) else self.module.constant("WHERE", given)

    def _rows(self) -> None:
        """The loop over a table."""
        table = self.rule.table or {}
        columns = list(table)
        rows = list(zip(*table.values(), strict=True))
        items = tuple(_tuple(list(map(str, row))) if len(columns) > 1 else str(row[0]) for row in rows)
        value = self.module.constant("TABLE", Group("(", items, ")")) if items else "()"
        self.begin(f"for {', '.join(self.names[n] for n in columns)} in {value}")
        self._bound.update(columns)
        for name in columns:
            if name in self.where:
                self._skip(f"{self.names[name]} not in {self._allowed(name)}")

    def _loop(self, source: Template) -> None:
        """The loop over the names of one template, whose numbers give the placeholders."""
        numbers, texts = _open_numbers(source)
        seen: set[str] = set(self._bound)
        raw: list[str] = []
        open_numbers: list[tuple[Affine, str]] = []
        for k, value in enumerate(numbers):
            name, factor = value.terms[0]
            if len(value.terms) == 1 and factor == 1 and value.constant == 0 and name not in seen:
                raw.append(self.names[name])
                seen.add(name)
            else:
                raw.append(f"number_{k}")
                open_numbers.append((value, raw[-1]))
        call = Group(f"{self.module.use('_numbers')}(", ("state_dict", *map(string, texts)), ")")
        self.begin(f"for {_bare(raw)} in ", call)
        direct = seen - self._bound
        self._bound |= direct
        for name in sorted(direct & self.where.keys()):
            self._skip(f"{self.names[name]} not in {self._allowed(name)}")
        self._solve(open_numbers, source)

    def _solve(self, left: list[tuple[Affine, str]], source: Template) -> None:
        """Placeholders from numbers that are sums of them, those with fewest unknown first."""
        while left:
            left.sort(key=lambda item: sum(name not in self._bound for name, _ in item[0].terms))
            value, raw = left.pop(0)
            known = Affine(value.constant, tuple(t for t in value.terms if t[0] in self._bound))
            unknown = [t for t in value.terms if t[0] not in self._bound]
            if len(unknown) > 1 and (unknown[-1][1] < 1 or len({f for _, f in unknown}) < len(unknown)):
                raise LayoutError(f"{source}: {{{value}}} does not tell its placeholders apart; write a table")
            if not unknown:
                self._skip(f"{raw} != {number(known, self.names)}")
                continue
            rest = raw
            if known.constant or known.terms:
                rest = f"{raw} - ({number(known, self.names)})" if known.terms else _minus(raw, known.constant)
            for name, factor in unknown:
                variable, last = self.names[name], name == unknown[-1][0]
                if last and factor == 1:
                    self.add(f"{variable} = {rest}")
                    test = ""
                else:
                    self.add(f"{variable}, {raw} = divmod({rest}, {factor})")
                    test, rest = (f" or {raw}" if last else ""), raw
                allowed = f" or {variable} not in {self._allowed(name)}" if name in self.where else ""
                self._skip(f"{variable} < 0{test}{allowed}")
                self._bound.add(name)

    def _loop_over_groups(self, source: Template, grid: str) -> None:
        """The loop over the bindings of a template that makes lists."""
        kept = [n for n in source.placeholders if n in self.kept]
        raw = [self.names[n] if n not in self._bound else f"number_{k}" for k, n in enumerate(kept)]
        self.begin(f"for {_bare(raw)} in sorted({grid})")
        for name, variable in zip(kept, raw, strict=True):
            if name in self._bound:
                self._skip(f"{variable} != {self.names[name]}")
        self._bound.update(kept)

    def _check_grid(self, source: Template, grid: str) -> None:
        """The test that a list has all its members and no others."""
        kept = [self.names[n] for n in source.placeholders if n in self.kept]
        lists = [n for n in source.placeholders if n not in self.kept]
        key = _tuple(kept)
        for k, name in enumerate(lists):
            if name in self.values:
                continue
            if name in self.where:
                self.values[name] = self._allowed(name)
            else:
                variable = f"{self.names[name]}_values"
                self.add(f"{variable} = range(len({{row[{k}] for row in {grid}.get({key}, ())}}))")
                self.values[name] = variable
        loops = " ".join(f"for {self.names[n]} in {self.values[n]}" for n in lists)
        wanted = f"{{{_tuple([self.names[n] for n in lists])} {loops}}}"
        # an empty list is no list; one that `where` names never is empty
        counted = [self.values[n] for n in lists if n not in self.where]
        if self._looping:
            self._skip(" or ".join([*(f"not {v}" for v in counted), f"{grid}.get({key}) != {wanted}"]))
        else:
            self._tests += [*counted, f"{grid}.get({key}) == {wanted}"]

    def _check_names(self, checked: list[Template]) -> None:
        """The test that the tensors of these templates are there."""
        if not checked:
            return
        literals = [template(t, self.names) for t in (checked if self.lists else self.sources)]
        if len(literals) == 1 and len(literals[0]) <= _LONGEST_TESTED:
            self._tests.append(f"{literals[0]} in state_dict")
            return
        self.lines += statement(self.indent, Group("names = [", tuple(literals), "]"), always=True)
        self._tests.append("all(name in state_dict for name in names)")
        self.listed = not self.lists

    def _test(self) -> None:
        """One `if` for all tests, a line each where one line grows too long."""
        tests = list(dict.fromkeys(self._tests))
        if tests and self.indent + len(f"if {' and '.join(tests)}:") <= WIDTH:
            self.begin(f"if {' and '.join(tests)}")
        elif tests:
            inside = " " * (self.indent + 4)
            self.add("if (")
            self.lines += [inside + tests[0], *(f"{inside}and {test}" for test in tests[1:])]
            self.begin(")")


def _open_numbers(source: Template) -> tuple[list[Affine], list[str]]:
    """Numbers that are not constants, and the texts around them."""
    texts, numbers = [source.texts[0]], []
    for value, text in zip(source.numbers, source.texts[1:], strict=True):
        if value.terms:
            numbers.append(value)
            texts.append(text)
        else:
            texts[-1] += f"{value.constant}{text}"
    return numbers, texts


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _bare(items: Sequence[str]) -> str:
    return ", ".join(items) if len(items) > 1 else _tuple(items)


def _minus(name: str, constant: int) -> str:
    return f"{name} - {constant}" if constant > 0 else f"{name} + {-constant}"
