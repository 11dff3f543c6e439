"""What the functions of one emitted file share: sizes and arrays by name, rearrangements, and the helpers in use."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.emit.source import Group, quoted, statement, string
from lineage.layout.axes import LayoutError, Pattern
from lineage.layout.operations.data import Data, Run, key_of
from lineage.layout.operations.rearrange import Rearrange

__all__ = ["Module"]

#: numbers of a vector, and ranges of an index list, that stand in the code itself; longer ones beside it
EMBEDDED = 32
#: longest name of a size that is used in the code
_LONGEST_SIZE = 24
#: longest rearrangement that stands where it is used
_SHORT = 60


class Module:
    """One emitted file in the making.

    Parameters
    ----------
    sizes : lengths of the axes that the mapping names

    Attributes
    ----------
    arrays : arrays too long for the code, by key
    helpers : names of the functions that the file carries along
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.arrays: dict[str, NDArray[Any]] = {}
        self.helpers: set[str] = set()
        self._sizes = dict(sizes)
        self._constants: dict[str, str | Group] = {}
        self._functions: dict[Rearrange, str] = {}
        self._words: dict[str, str] = {}

    def use(self, helper: str) -> str:
        """The helper's name, which the file will carry."""
        self.helpers.add(helper)
        return helper

    def constant(self, name: str, value: str | Group) -> str:
        """A name for a value at the top of the file; equal values share one."""
        for known, given in self._constants.items():
            if given == value and known.startswith(name):
                return known
        count = sum(known.startswith(name) for known in self._constants)
        self._constants[f"{name}_{count + 1}"] = value
        return f"{name}_{count + 1}"

    def size(self, name: str, length: int) -> str:
        """A length, by its name where the mapping names it."""
        if self._sizes.get(name) != length or len(name) > _LONGEST_SIZE:
            return str(length)
        if name not in self._words:
            word = name.upper()
            taken = set(self._words.values()) | self._constants.keys()
            # I and O look like numbers
            free = word not in taken and word not in ("I", "O")
            self._words[name] = word if free else f"{word}_{len(self._words)}_SIZE"
            self._constants[self._words[name]] = str(length)
        return self._words[name]

    def lengths(self, sizes: tuple[int, ...]) -> str:
        """A tuple of lengths."""
        group = Group("(", tuple(map(str, sizes)), ")")
        return str(group) if len(sizes) <= 4 else self.constant("LENGTHS", group)

    def places(self, index: tuple[Run, ...], places: NDArray[np.int64]) -> str:
        """An index list."""
        if len(index) > EMBEDDED:
            return self._beside(f"take-{key_of(places)}", places)
        items = [str(r) if isinstance(r, int) else f"*range({', '.join(map(str, _short(r)))})" for r in index]
        group = Group("[", tuple(items), "]")
        return str(group) if len(str(group)) <= 40 else self.constant("PLACES", group)

    def vector(self, data: Data) -> str:
        """A vector or matrix as a tensor of float64."""
        array = data.array.astype(np.float64)
        if array.size <= EMBEDDED and np.isfinite(array).all():
            values = Group("torch.tensor(", (_listed(array.tolist()), "dtype=torch.float64"), ")")
            return self.constant("VALUES", values)
        return self._beside(f"values-{data.key}", array)

    def _beside(self, key: str, array: NDArray[Any]) -> str:
        self.arrays[key] = array
        self.use("_arrays")
        return f"arrays[{string(key)}]"

    def rearranged(self, op: Rearrange, x: str) -> str:
        """A rearrangement of x: one method, or a call of a function for it."""
        steps = _steps(op.parsed, dict(op.sizes), self)
        if not steps:
            return x
        if len(steps) == 1 and steps[0].before.startswith("x.") and len(str(steps[0])) <= _SHORT:
            return str(steps[0]).replace("x.", f"{x}.")
        if op not in self._functions:
            self._functions[op] = f"_rearranged_{len(self._functions) + 1}"
        return f"{self._functions[op]}({x})"

    def _rearrangement(self, op: Rearrange) -> list[str]:
        """Lines of the function for a rearrangement."""
        steps = _steps(op.parsed, dict(op.sizes), self)
        text = f'    """{quoted(op.pattern)}"""'
        lines = [f"def {self._functions[op]}(x: Tensor) -> Tensor:"]
        lines += [text] if len(text) <= 4096 else []
        for step in steps[:-1]:
            lines += statement(4, _prefixed("x = ", step))
        return [*lines, *statement(4, _prefixed("return ", steps[-1]))]

    def head(self) -> list[str]:
        """Lines that define the constants."""
        lines: list[str] = []
        for name, value in self._constants.items():
            lines += statement(0, _prefixed(f"{name} = ", value))
        return lines

    def functions(self) -> list[list[str]]:
        """Lines of each function that the file carries along."""
        made = [self._rearrangement(op) for op in self._functions]
        return [*made, *(text.splitlines() for text in _carried(self.helpers).values())]

    def imports(self, text: str) -> list[str]:
        """Import lines for what the file's text uses."""
        used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        lines = ["from __future__ import annotations", ""]
        plain = [f"import {name}" for name in ("json", "re") if name in used]
        abstract = [name for name in ("Iterable", "Sequence") if name in used]
        plain += [f"from collections.abc import {', '.join(abstract)}"] if abstract else []
        plain += ["from pathlib import Path"] if "Path" in used else []
        lines += [*plain, ""] if plain else []
        return [*lines, *(["import torch"] if "torch" in used else []), "from torch import Tensor"]


def _short(run: tuple[int, int, int]) -> tuple[int, ...]:
    return run if run[2] != 1 else run[:2] if run[0] else run[1:2]


def _listed(values: Any) -> str | Group:
    return Group("[", tuple(map(_listed, values)), "]") if isinstance(values, list) else repr(values)


def _prefixed(prefix: str, item: str | Group) -> str | Group:
    return prefix + item if isinstance(item, str) else Group(prefix + item.before, item.items, item.after)


def _steps(pattern: Pattern, sizes: Mapping[str, int], module: Module) -> list[Group]:
    """A pattern as steps on x: axes taken apart, put in another order, joined."""
    left, right = pattern.left, pattern.right
    steps: list[Group] = []
    rest = ("...",)
    # from the ends inwards to the ellipsis, so that no step moves the axes that are still to come
    here = left.index(rest) if rest in left else len(left)
    tail = list(enumerate(left))[here + 1 :]
    for at, group in [(k - len(left), g) for k, g in tail] + list(reversed(list(enumerate(left[:here])))):
        if not group:
            steps.append(Group(f"{module.use('_dropped')}(", ("x", str(at)), ")"))
        elif len(group) > 1:
            unknown = [n for n in group if n not in sizes]
            if len(unknown) > 1:
                raise LayoutError(f'"{pattern}": give a size for {" or ".join(unknown)}')
            lengths = [module.size(n, sizes[n]) if n in sizes else "-1" for n in group]
            steps.append(Group("x.unflatten(", (str(at), Group("(", tuple(lengths), ")")), ")"))
    flat = [n for group in left for n in group]
    wanted = [n for group in right for n in group]
    if flat != wanted:
        steps.append(Group("x.permute(", tuple(_order(flat, wanted)), ")"))
    here = right.index(rest) if rest in right else len(right)
    sides = [(-len(right) + k, g) for k, g in list(enumerate(right))[here + 1 :]]
    joins: list[Group] = []
    for at, group in enumerate(right[:here]):
        if not group:
            joins.append(Group("x.unsqueeze(", (str(at),), ")"))
        elif len(group) > 1:
            joins.append(Group("x.flatten(", (str(at), str(at + len(group) - 1)), ")"))
    back: list[Group] = []
    end = -1
    for _, group in reversed(sides):
        if not group:
            back.append(Group("x.unsqueeze(", (str(end),), ")"))
        elif len(group) > 1:
            back.append(Group("x.flatten(", (str(end - len(group) + 1), str(end)), ")"))
        end -= 1
    return steps + joins + back


def _order(flat: list[str], wanted: list[str]) -> list[str]:
    """Arguments of `permute`; an ellipsis is the range of axes that it stands for."""
    if "..." not in flat:
        return [str(flat.index(n)) for n in wanted]
    at, after = flat.index("..."), len(flat) - flat.index("...") - 1
    rest = f"*range({at}, x.ndim - {after})" if after else f"*range({at}, x.ndim)"
    places = [flat.index(n) for n in wanted]
    return [rest if k == at else str(k) if k < at else str(k - len(flat)) for k in places]


@lru_cache
def _helpers() -> dict[str, tuple[str, frozenset[str]]]:
    """Each helper's text, and the helpers that it calls."""
    text = Path(__file__).with_name("runtime.py").read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    names = {node.name for node in nodes}
    found = {}
    for node in nodes:
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & names
        found[node.name] = (ast.get_source_segment(text, node) or "", frozenset(used))
    return found


def _carried(wanted: set[str]) -> dict[str, str]:
    """Texts of these helpers and of those that they call, in the order of their file."""
    needed, left = set[str](), list(wanted)
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += _helpers()[name][1]
    return {name: text for name, (text, _) in _helpers().items() if name in needed}
