"""Which names of a checkpoint the templates of a rule mean: a join over skeletons, near-linear in the names."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import LayoutError
from lineage.layout.chain import Entry, Level
from lineage.layout.templates import Affine, Skeleton, Template, skeleton

__all__ = ["Binding", "Names", "parse_where", "where_text"]

#: values of placeholders, in the order of the rule's binding placeholders
Binding = tuple[int, ...]
#: largest number of values that a `where` may list
MOST_VALUES = 1_000_000

_RANGE = re.compile(r"\s*([0-9]{1,9})\s*(?::\s*([0-9]{1,9})\s*)?")


class Names:
    """The names of one checkpoint, taken apart once."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names) if not isinstance(names, frozenset) else names
        groups: dict[Skeleton, list[tuple[tuple[int, ...], str]]] = defaultdict(list)
        for name in self.names:
            text, numbers = skeleton(name)
            groups[text].append((numbers, name))
        self._groups = groups
        self._arrays: dict[Skeleton, NDArray[np.int64]] = {}

    def relation(self, template: Template, where: Mapping[str, frozenset[int]]) -> Relation:
        """All names that the template gives, by the values of its placeholders.

        Raises
        ------
        LayoutError : numbers that do not determine the placeholders
        """
        wanted = template.placeholders
        if not wanted:
            name = template.name({})
            return Relation((), {(): name} if name in self.names else {})
        group = self._groups.get(template.skeleton)
        if not group:
            return Relation(wanted, {})
        if template.skeleton not in self._arrays:
            group.sort()
            self._arrays[template.skeleton] = np.array([numbers for numbers, _ in group], np.int64)
        numbers = self._arrays[template.skeleton]
        found, kept = _solved(template, numbers)
        for name, allowed in where.items():
            if name in found:
                kept &= np.isin(found[name], np.fromiter(allowed, np.int64, len(allowed)))
        rows = np.flatnonzero(kept)
        values = zip(*(found[name][rows].tolist() for name in wanted), strict=True)
        return Relation(wanted, {v: group[k][1] for v, k in zip(values, rows.tolist(), strict=True)})


class Relation:
    """Names by the values of some placeholders.

    Parameters
    ----------
    placeholders : in the order of the values
    names : name by values
    """

    __slots__ = ("names", "placeholders")

    def __init__(self, placeholders: tuple[str, ...], names: dict[tuple[int, ...], str]) -> None:
        self.placeholders, self.names = placeholders, names


def _solved(template: Template, numbers: NDArray[np.int64]) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
    """Values of the placeholders for each row of numbers, and which rows fit."""
    kept = np.ones(len(numbers), np.bool_)
    found: dict[str, NDArray[np.int64]] = {}
    left: list[tuple[Affine, NDArray[np.int64]]] = [(n, numbers[:, k]) for k, n in enumerate(template.numbers)]
    while left:
        # the numbers with fewest open placeholders first: they settle the others
        left.sort(key=lambda item: sum(name not in found for name, _ in item[0].terms))
        number, column = left.pop(0)
        rest = column - number.constant
        open_terms = []
        for name, factor in number.terms:
            if name in found:
                rest = rest - factor * found[name]
            else:
                open_terms.append((name, factor))
        if len(open_terms) > 1 and (open_terms[-1][1] < 1 or len({f for _, f in open_terms}) < len(open_terms)):
            raise LayoutError(f"{template}: {{{number}}} does not tell its placeholders apart; write a table")
        for name, factor in open_terms:
            # mixed radix: each placeholder stays below the next larger factor
            value = rest // factor
            if name == open_terms[-1][0]:
                kept &= value * factor == rest
            found[name] = value
            kept &= value >= 0
            rest = rest - value * factor
        kept &= rest == 0
    return found, kept


def parse_where(text: str) -> tuple[int, ...]:
    """The values that a restriction such as `0:32` or `0:3,7` lists, in order.

    Raises
    ------
    LayoutError : not a list of numbers and ranges, a value twice, or absurdly many

    Examples
    --------
    >>> parse_where("0:3, 7")
    (0, 1, 2, 7)
    """
    values: list[int] = []
    for part in str(text).split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise LayoutError(f'"{text}" lists no numbers; write ranges such as "0:32" or lists such as "0,3,7"')
        start, stop = int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1
        if len(values) + stop - start > MOST_VALUES:
            raise LayoutError(f'"{text}" lists more than {MOST_VALUES:,} numbers')
        values.extend(range(start, stop))
    if len(set(values)) < len(values):
        raise LayoutError(f'"{text}" lists a number twice')
    return tuple(values)


def where_text(values: Sequence[int]) -> str:
    """The shortest restriction that lists these values, in their order.

    Examples
    --------
    >>> where_text([0, 1, 2, 7])
    '0:3,7'
    """
    parts: list[list[int]] = []
    for value in values:
        if parts and parts[-1][1] == value:
            parts[-1][1] = value + 1
        else:
            parts.append([value, value + 1])
    return ",".join(str(a) if b == a + 1 else f"{a}:{b}" for a, b in parts)


class Joined:
    """All bindings of a rule's placeholders, joined over its source templates.

    Parameters
    ----------
    names : the checkpoint's
    templates : the rule's source templates
    kept : placeholders that make a binding; the other ones are lists
    where : values that a placeholder may take, in order
    table : explicit bindings, or None
    """

    def __init__(
        self,
        names: Names,
        templates: Sequence[Template],
        kept: Sequence[str],
        where: Mapping[str, tuple[int, ...]],
        table: Mapping[str, Sequence[int]] | None,
    ) -> None:
        allowed = {name: frozenset(values) for name, values in where.items()}
        self.templates, self.where = templates, where
        self.relations = [names.relation(t, allowed) for t in templates]
        self.placeholders = tuple[str, ...]()
        self.rows: list[tuple[int, ...]] = [()]
        if table:
            listed = zip(*table.values(), strict=True)
            tests = [(k, allowed[n]) for k, n in enumerate(table) if n in allowed]
            self._join(tuple(table), [row for row in listed if all(row[k] in a for k, a in tests)])
        for relation in self.relations:
            self._join(relation.placeholders, list(relation.names))
        self.kept: tuple[str, ...] = tuple(kept)
        self.lists = tuple(n for n in self.placeholders if n not in self.kept)

    def _join(self, placeholders: tuple[str, ...], rows: list[tuple[int, ...]]) -> None:
        """The rows so far, each with every row that agrees with it."""
        if not self.placeholders and len(self.rows) == 1:
            self.placeholders, self.rows = placeholders, rows
            return
        new = [k for k, n in enumerate(placeholders) if n not in self.placeholders]
        here = [self.placeholders.index(n) for n in placeholders if n in self.placeholders]
        there = [k for k, n in enumerate(placeholders) if n in self.placeholders]
        table: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for row in rows:
            table[_picked(row, there)].append(_picked(row, new))
        self.placeholders += tuple(placeholders[k] for k in new)
        self.rows = [row + more for row in self.rows for more in table.get(_picked(row, here), ())]

    def __iter__(self) -> Iterator[tuple[Binding, tuple[Entry, ...]]]:
        """Each complete binding with its source entries."""
        if not self.lists:
            order = [self.placeholders.index(n) for n in self.kept]
            picks = [
                (relation.names, _picker([self.placeholders.index(n) for n in relation.placeholders]))
                for relation in self.relations
            ]
            for row in self.rows:
                yield _picked(row, order), tuple(names[pick(row)] for names, pick in picks)
            return
        order = [self.placeholders.index(n) for n in self.kept]
        lists = [self.placeholders.index(n) for n in self.lists]
        groups: dict[Binding, set[tuple[int, ...]]] = defaultdict(set)
        for row in self.rows:
            groups[_picked(row, order)].add(_picked(row, lists))
        counts = [self._counts(relation) for relation in self.relations]
        for binding, found in groups.items():
            values = self._values(found)
            if values is None or any(combination not in found for combination in product(*values.values())):
                continue
            bound = dict(zip(self.kept, binding, strict=True))
            if all(_complete(r, c, bound, values) for r, c in zip(self.relations, counts, strict=True)):
                yield binding, tuple(self._entry(r, bound, values) for r in self.relations)

    def _values(self, found: set[tuple[int, ...]]) -> dict[str, tuple[int, ...]] | None:
        """Values of each list in order, or None where they do not count from 0 and nothing says which are meant."""
        values: dict[str, tuple[int, ...]] = {}
        for k, name in enumerate(self.lists):
            seen = sorted({row[k] for row in found})
            if name not in self.where and seen != list(range(len(seen))):
                return None
            values[name] = self.where.get(name, tuple(seen))
        return values

    def _counts(self, relation: Relation) -> dict[tuple[int, ...], int]:
        """Names of one template by binding."""
        order = [k for k, n in enumerate(relation.placeholders) if n in self.kept]
        counts: dict[tuple[int, ...], int] = defaultdict(int)
        for row in relation.names:
            counts[_picked(row, order)] += 1
        return counts

    def _entry(self, relation: Relation, bound: dict[str, int], values: Mapping[str, Sequence[int]]) -> Entry:
        """The template's names under a binding, as nested lists."""
        for name in relation.placeholders:
            if name not in bound:
                return Level(name, [self._entry(relation, {**bound, name: v}, values) for v in values[name]])
        return relation.names[tuple(bound[n] for n in relation.placeholders)]


def _complete(
    relation: Relation,
    counts: Mapping[tuple[int, ...], int],
    bound: Mapping[str, int],
    values: Mapping[str, Sequence[int]],
) -> bool:
    """Whether the join lost none of the template's names under this binding."""
    wanted = math.prod(len(values[name]) for name in relation.placeholders if name not in bound)
    return counts[tuple(bound[name] for name in relation.placeholders if name in bound)] == wanted


def _picked(row: tuple[int, ...], places: list[int]) -> tuple[int, ...]:
    return tuple([row[k] for k in places])


def _picker(places: list[int]) -> Callable[[tuple[int, ...]], tuple[int, ...]]:
    """`_picked` for many rows."""
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda row: (row[places[0]],)) if places else (lambda row: ())
