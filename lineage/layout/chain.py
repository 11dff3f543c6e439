"""Chains of operations over lists that may be nested: a list over a placeholder is a `Level`.

`run` drives a chain over anything (arrays, shapes, lazy tensors): what one operation does to plain items is given
by the caller.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lineage.layout.axes import LayoutError
from lineage.layout.operations.base import Operation
from lineage.layout.operations.each import Each

__all__ = ["Call", "Entry", "Level", "apply_chain", "chain_shapes", "inverse_chain", "leaves", "mapped", "run"]


class Level:
    """The list over one placeholder: an item for each of its values, in order.

    Parameters
    ----------
    over : the placeholder
    items : plain items, or Levels over further placeholders
    """

    __slots__ = ("items", "over")

    def __init__(self, over: str, items: Sequence[Any]) -> None:
        self.over, self.items = over, tuple(items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Level) and (self.over, self.items) == (other.over, other.items)

    def __hash__(self) -> int:
        return hash((self.over, self.items))

    def __repr__(self) -> str:
        return f"Level({self.over!r}, {self.items!r})"


#: a plain item or a Level
Entry = Any
#: what one operation does to a list of plain items
Call = Callable[[Operation, Sequence[Any]], Sequence[Any]]


def leaves(entry: Entry) -> Iterator[Any]:
    """The plain items of an entry, in order."""
    if isinstance(entry, Level):
        for item in entry.items:
            yield from leaves(item)
    else:
        yield entry


def mapped(entry: Entry, function: Callable[[Any], Any]) -> Entry:
    """The entry with `function` applied to each plain item."""
    if isinstance(entry, Level):
        return Level(entry.over, [mapped(item, function) for item in entry.items])
    return function(entry)


def run(ops: Sequence[Operation], entries: Sequence[Entry], call: Call) -> list[Entry]:
    """What comes out of the chain.

    Raises
    ------
    LayoutError : an operation does not fit what the steps before it give
    """
    result = list(entries)
    for op in ops:
        result = _step(op, result, call)
    return result


def apply_chain(ops: Sequence[Operation], entries: Sequence[Entry]) -> list[Entry]:
    """The chain over arrays."""
    return run(ops, entries, lambda op, arrays: op.apply(arrays))


def chain_shapes(ops: Sequence[Operation], entries: Sequence[Entry]) -> list[Entry]:
    """The chain over shapes."""
    return run(ops, entries, lambda op, shapes: op.shapes(shapes))


def inverse_chain(ops: Sequence[Operation], count: int, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
    """The chain that undoes this one.

    Parameters
    ----------
    count : entries that the chain takes
    lengths : number of values of each placeholder, as far as known

    Raises
    ------
    LayoutError : a step cannot be undone
    """
    undone: list[tuple[Operation, ...]] = []
    known: int | None = count
    for op in ops:
        undone.append(op.inverse(known, lengths))
        known = op.arity(known)
    return tuple(op for steps in reversed(undone) for op in steps)


def _step(op: Operation, entries: list[Entry], call: Call) -> list[Entry]:
    if isinstance(op, Each):
        result = list(entries)
        for k, chain in op.chains:
            if k >= len(result):
                raise LayoutError(f"each: no array {k} in a list of {len(result)}")
            one = run(chain, [result[k]], call)
            if len(one) != 1:
                raise LayoutError(f"each: the operations for array {k} give {len(one)} arrays, not one")
            result[k] = one[0]
        return result
    if op.over is not None and op.gathers:
        if not any(_has(entry, op.over) for entry in entries):
            raise LayoutError(f"{op.word}: no list over {op.over} here")
        return [_gathered(op, entry, call) for entry in entries]
    if op.over is not None:
        if any(_has(entry, op.over) for entry in entries):
            raise LayoutError(f"{op.word}: there is a list over {op.over} already")
        return [mapped(entry, lambda item: Level(op.over or "", call(op, [item]))) for entry in entries]
    if op.single:
        return [mapped(entry, lambda item: call(op, [item])[0]) for entry in entries]
    return _lifted(op, entries, call)


def _has(entry: Entry, over: str) -> bool:
    return isinstance(entry, Level) and (entry.over == over or _has(entry.items[0] if entry.items else None, over))


def _gathered(op: Operation, entry: Entry, call: Call) -> Entry:
    """The level over the operation's placeholder collapsed, wherever it stands."""
    if not isinstance(entry, Level):
        return entry
    if entry.over != op.over:
        return Level(entry.over, [_gathered(op, item, call) for item in entry.items])
    return _lifted(op, list(entry.items), call)[0]


def _lifted(op: Operation, entries: list[Entry], call: Call) -> list[Entry]:
    """A list operation, done once for each place of the levels inside the entries."""
    first = next((e for e in entries if isinstance(e, Level)), None)
    if first is None:
        return list(call(op, entries))
    over, length = first.over, len(first.items)
    if any(isinstance(e, Level) and e.over == over and len(e.items) != length for e in entries):
        raise LayoutError(f"{op.word}: lists over {over} of different lengths")
    each = [
        _lifted(op, [e.items[k] if isinstance(e, Level) and e.over == over else e for e in entries], call)
        for k in range(length)
    ]
    return [Level(over, column) for column in zip(*each, strict=True)]
