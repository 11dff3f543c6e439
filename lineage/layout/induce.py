"""Rules from single correspondences: names become templates, so that few rules say what many matches say.

Matches with equal skeletons and equal operations form a group. Within a group the numbers of one side are expressed
by those of the other: constants, equal, shifted, mixed radix. What the rules give over both checkpoints' names is
exactly the matches: `where` or a `table` restricts a formula that says more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError
from lineage.layout.formulas import Formula, expressed
from lineage.layout.mapping import Evidence, How, Rule
from lineage.layout.names import Binding, Joined, Names, where_text
from lineage.layout.operations import Concat, Each, Operation, Split, Stack, Unstack
from lineage.layout.templates import Affine, Template, affine, skeleton, texts

__all__ = ["Match", "induce"]

#: a group that no formula covers is cut by one number if that number has at most this many values
MOST_CUTS = 16
_LETTERS = "ijklmnpqrstuvwxyz"


class Match(msgspec.Struct, frozen=True):
    """One correspondence: these tensors of B are made of those of A.

    Attributes
    ----------
    targets, sources : names; a tuple of names is the list over a placeholder that an operation works `over`, nested
        where it works over several (sources: the operation that comes last is the outermost list, targets: the first)
    ops : the chain
    how, cosine, certified, margin : as in `Rule` and `Evidence`
    """

    targets: tuple[Any, ...]
    sources: tuple[Any, ...]
    ops: tuple[Operation, ...] = ()
    how: How = "values"
    cosine: float | None = None
    certified: bool = False
    margin: float | None = None


def induce(
    matches: Iterable[Match], source_names: Iterable[str] | None = None, target_names: Iterable[str] | None = None
) -> list[Rule]:
    """Few rules that say exactly what the matches say.

    Parameters
    ----------
    matches : each target name at most once
    source_names, target_names : all names of both checkpoints; those of the matches where None. The rules' instances
        over these names, forwards and backwards, are the matches: none lost, none added

    Returns
    -------
    rules in the order of their first matches; axes are not settled (`lineage.layout.mapping.settled`)

    Raises
    ------
    ValueError : a list that no template can give, in a match of several lists

    Notes
    -----
    Near-linear in the names. A group without a formula becomes one rule with a table.
    """
    groups: dict[Any, list[_Shaped]] = defaultdict(list)
    every: tuple[set[str], set[str]] = (set(), set())
    for match in matches:
        shaped = _shaped(match)
        groups[shaped.key].append(shaped)
        for names, entries in zip(every, (match.targets, match.sources), strict=True):
            names.update(_flat(entries))
    targets = Names(every[0] if target_names is None else target_names)
    sources = Names(every[1] if source_names is None else source_names)
    rules: list[Rule] = []
    for group in groups.values():
        rules += _Group(group, targets, sources).rules()
    return rules


class _Shaped:
    """A match as the key of its group and its numbers.

    Parameters
    ----------
    match : the match, its lists given names
    entries : for targets, then sources: skeleton and columns of each entry
    levels : values of each list's placeholder, less the smallest
    numbers : one for each column of all entries
    """

    __slots__ = ("entries", "key", "levels", "match", "numbers")

    def __init__(self, match: Match, entries: Any, levels: dict[str, tuple[int, ...]], numbers: list[int]) -> None:
        self.match, self.entries, self.levels, self.numbers = match, entries, levels, numbers
        self.key = (entries, tuple(levels.items()), match.ops, match.how, match.certified)


def _shaped(match: Match) -> _Shaped:
    """The match taken apart."""
    levels: dict[str, tuple[int, ...]] = {}
    numbers: list[int] = []
    sides = []
    for side, entries in enumerate((match.targets, match.sources)):
        found: list[tuple[str, tuple[str | None, ...]]] = []
        for k, entry in enumerate(entries):
            if isinstance(entry, str):
                text, values = skeleton(entry)
                numbers += values
                found.append((text, (None,) * len(values)))
                continue
            one = _listed(entry, _overs(match.ops, k, gathers=bool(side)), levels, numbers)
            if one is None:
                return _shaped(_flattened(match))
            found.append(one)
        sides.append(tuple(found))
    return _Shaped(match, tuple(sides), levels, numbers)


def _overs(ops: Sequence[Operation], entry: int, *, gathers: bool) -> list[str]:
    """Placeholders of one entry's lists, outermost first."""
    chain: list[Operation] = []
    for op in ops:
        chain += dict(op.chains).get(entry, ()) if isinstance(op, Each) else (op,)
    found = [op.over for op in chain if op.over and op.gathers == gathers]
    return found[::-1] if gathers else found


def _listed(
    entry: Any, overs: list[str], levels: dict[str, tuple[int, ...]], numbers: list[int]
) -> tuple[str, tuple[str | None, ...]] | None:
    """Skeleton and columns of a list; None where no template gives its names."""
    shape: list[int] = []
    at = entry
    while isinstance(at, tuple):
        shape.append(len(at))
        at = at[0] if at else ""
    taken = [skeleton(name) for name in _flat(entry)]
    if len(shape) != len(overs) or len({text for text, _ in taken}) != 1 or len(taken) != np.prod(shape):
        return None
    values = np.array([v for _, v in taken], np.int64).reshape(*shape, -1)
    columns: list[str | None] = []
    firsts: list[int] = []
    for k in range(values.shape[-1]):
        column = values[..., k]
        found = None
        for axis, over in enumerate(overs):
            line = np.moveaxis(column, axis, 0).reshape(shape[axis], -1)[:, 0]
            if (line == line[0]).all():
                continue
            steps = tuple((line - line.min()).tolist())
            if found or len(set(steps)) < len(steps) or levels.setdefault(over, steps) != steps:
                return None
            found = over
            if (column != line.reshape([-1 if a == axis else 1 for a in range(len(shape))])).any():
                return None
        columns.append(found)
        firsts.append(int(column.min()))
        if found is None and (column != column.min()).any():
            return None
    if set(overs) - set(columns):
        return None
    numbers += firsts
    return taken[0][0], tuple(columns)


def _flattened(match: Match) -> Match:
    """The match with the names of its one list side by side, for a list that no template gives."""
    ops: list[Operation] = []
    for op in match.ops:
        if isinstance(op, Concat | Split | Stack | Unstack) and op.over:
            side = match.sources if op.gathers else match.targets
            if len(side) != 1 or any(isinstance(e, tuple) for e in side[0]):
                raise ValueError(f"the list {str(side)[:80]} over {op.over} fits no template")
            op = replace(op, over=None)
        ops.append(op)
    sides = [
        tuple(side[0]) if len(side) == 1 and isinstance(side[0], tuple) else side
        for side in (match.targets, match.sources)
    ]
    if any(isinstance(entry, tuple) for side in sides for entry in side):
        raise ValueError(f"the list {str(match.sources)[:80]} fits no template")
    return msgspec.structs.replace(match, targets=sides[0], sources=sides[1], ops=tuple(ops))


def _flat(entry: Any) -> Iterator[str]:
    """The names of an entry, in order."""
    if isinstance(entry, str):
        yield entry
    else:
        for item in entry:
            yield from _flat(item)


class _Group:
    """Matches of equal skeletons and operations.

    Parameters
    ----------
    group : the matches, one or more
    targets, sources : all names
    """

    def __init__(self, group: Sequence[_Shaped], targets: Names, sources: Names) -> None:
        self._group, self._names = group, (targets, sources)
        first = group[0]
        self._entries, self._levels, self._match = first.entries, first.levels, first.match
        self._numbers = np.array([s.numbers for s in group], np.int64).reshape(len(group), len(first.numbers))
        self._where = {over: where_text(values) for over, values in first.levels.items()}
        self._made = sum(len(columns) for _, columns in first.entries[0])

    def rules(self) -> list[Rule]:
        """One rule, or a few where one number decides between formulas, or one with a table."""
        rows = np.arange(len(self._group))
        whole = self._by_formula(rows)
        if whole:
            return [whole]
        for column in range(self._numbers.shape[1]):
            values = np.unique(self._numbers[:, column])
            if 2 <= len(values) <= min(MOST_CUTS, len(rows) // 2):
                parts = []
                for value in values:
                    part = self._by_formula(rows[self._numbers[:, column] == value])
                    if part is None:
                        break
                    parts.append(part)
                else:
                    return parts
        return [self._by_table(rows)]

    def _by_formula(self, rows: NDArray[np.intp]) -> Rule | None:
        """One rule for these matches, restricted where it would say more, or None."""
        columns = list(range(self._numbers.shape[1]))
        for order in (columns[self._made :] + columns[: self._made], columns):
            formulas = expressed(self._numbers[rows], order)
            free = _free(formulas)
            letters = self._letters(free)
            to, source = self._templates(formulas, letters)
            if not all({n for t in side for n in t.placeholders} >= set(letters.values()) for side in (to, source)):
                continue
            where = self._restriction(rows, letters, (to, source))
            if where is not None:
                return self._rule(rows, to, source, {**self._where, **where}, None)
        return None

    def _by_table(self, rows: NDArray[np.intp]) -> Rule:
        """One rule that lists every binding."""
        # a number of several others has its own column: what a sum is of cannot be told from it
        formulas = {
            column: formula if len(formula[1]) < 2 else (0, ((column, 1),))
            for column, formula in expressed(self._numbers[rows], range(self._numbers.shape[1])).items()
        }
        letters = self._letters(_free(formulas))
        to, source = self._templates(formulas, letters)
        table = {name: tuple(self._numbers[rows, column].tolist()) for column, name in letters.items()}
        return self._rule(rows, to, source, self._where, table)

    def _letters(self, free: Sequence[int]) -> dict[int, str]:
        """A placeholder for each free column, none that a list has."""
        names = (f"{c}{n or ''}" for n in range(len(free) + 1) for c in _LETTERS)
        unused = (n for n in names if n not in self._levels)
        return {column: next(unused) for column in free}

    def _templates(
        self, formulas: Mapping[int, Formula], letters: Mapping[int, str]
    ) -> tuple[list[Template], list[Template]]:
        """Target and source templates."""
        sides: tuple[list[Template], list[Template]] = ([], [])
        at = 0
        for side, entries in zip(sides, self._entries, strict=True):
            for text, columns in entries:
                numbers: list[Affine] = []
                for level in columns:
                    constant, terms = formulas[at]
                    named = [(letters[c], factor) for c, factor in terms] + ([(level, 1)] if level else [])
                    numbers.append(affine(constant, named))
                    at += 1
                side.append(Template(texts(text), tuple(numbers)))
        return sides

    def _restriction(
        self, rows: NDArray[np.intp], letters: Mapping[int, str], sides: tuple[list[Template], list[Template]]
    ) -> dict[str, str] | None:
        """`where` under which the templates give these matches and no others, or None."""
        if not letters:
            return {}
        wanted = set(map(tuple, self._numbers[np.ix_(rows, np.array(list(letters)))].tolist()))
        placeholders = list(letters.values())
        where = dict(self._levels)
        extra: set[Binding] = set()
        for names, templates in zip(self._names, sides, strict=True):
            try:
                given = {binding for binding, _ in Joined(names, templates, placeholders, where, None)}
            except LayoutError:
                return None
            if not wanted <= given:
                return None
            extra |= given - wanted
        allowed = [{binding[k] for binding in wanted} for k in range(len(placeholders))]
        for some in [[], *([k] for k in range(len(placeholders))), range(len(placeholders))]:
            if not any(all(binding[k] in allowed[k] for k in some) for binding in extra):
                return {placeholders[k]: where_text(sorted(allowed[k])) for k in some}
        return None

    def _rule(
        self,
        rows: NDArray[np.intp],
        to: Sequence[Template],
        source: Sequence[Template],
        where: dict[str, str],
        table: dict[str, tuple[int, ...]] | None,
    ) -> Rule:
        matches = [self._group[k].match for k in rows]
        cosines = [m.cosine for m in matches if m.cosine is not None]
        margins = [m.margin for m in matches if m.margin is not None]
        evidence = Evidence(
            tensors=sum(sum(1 for _ in _flat(m.targets)) for m in matches),
            cosine=min(cosines, default=None),
            certified=all(m.certified for m in matches),
            margin=min(margins, default=None),
        )
        return Rule(
            to=tuple(map(str, to)),
            source=tuple(map(str, source)),
            ops=self._match.ops,
            how=self._match.how,
            evidence=evidence,
            where=where or None,
            table=table,
        )


def _free(formulas: Mapping[int, Formula]) -> list[int]:
    """Columns that stand for themselves."""
    return [column for column, formula in formulas.items() if formula == (0, ((column, 1),))]
