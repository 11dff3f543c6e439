"""What a difference must be, without factors: the mapping's rules on whole arrays, or on single places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lineage.layout.chain import apply_chain, leaves, mapped
from lineage.layout.operations import Add, Each, Operation
from lineage.lora.carry import Carried, known, paired
from lineage.lora.delta import Delta
from lineage.lora.source import Base

__all__ = ["Known", "Ruled", "Wanted"]


class Wanted(Protocol):
    """What `verify` asks for."""

    def dense(self, name: str) -> NDArray[Any]:
        """The whole difference of a tensor."""

    def at(self, name: str, places: Sequence[NDArray[np.int64]]) -> NDArray[Any] | None:
        """Its elements at these places, axis by axis; None where only the whole can be had."""


class Known:
    """Differences that stand for themselves."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        self.deltas = deltas

    def dense(self, name: str) -> NDArray[Any]:
        return self.deltas[name].dense()

    def at(self, name: str, places: Sequence[NDArray[np.int64]]) -> NDArray[Any] | None:
        return self.deltas[name].at(places)


class Ruled:
    """Differences of a mapping's targets, from those of its sources.

    Parameters
    ----------
    carry : which instances give which targets
    deltas : of the source's tensors
    base : their shapes
    """

    def __init__(self, carry: Carried, deltas: Mapping[str, Delta], base: Base) -> None:
        self.carry, self.deltas = carry, deltas
        told = {name: delta.shape for name, delta in deltas.items()}
        self.shapes: dict[str, Any] = {n: s if s is not None else told.get(n) for n, s in base.shapes.items()}
        self._kept: dict[str, NDArray[Any]] = {}

    def dense(self, name: str) -> NDArray[Any]:
        sources = [s for s in self.carry.sources[name] if s in self.deltas]
        kept = {s: self._kept[s] for s in sources if s in self._kept}
        self._kept = kept | {s: self.deltas[s].dense() for s in sources if s not in kept}
        result: NDArray[Any] | None = None
        filled: NDArray[np.bool_] | None = None
        for instance, place in self.carry.instances[name]:
            found, masks = self._run(instance.rule.ops, instance, place), known(instance, self.shapes)
            mask = np.ones(found.shape, np.bool_) if masks is None else masks[place]
            if result is None or filled is None:
                result, filled = np.where(mask, found, 0), mask
            else:
                result = np.where(mask & ~filled, found, result)
                filled = filled | mask
        assert result is not None
        return result

    def _run(self, ops: Sequence[Operation], instance: Any, place: int) -> NDArray[Any]:
        """One target of an instance; constants that operations add belong to the weights, not to differences."""

        def run(value: Any) -> NDArray[Any]:
            results = apply_chain(ops, [mapped(entry, value) for entry in instance.sources])
            found: NDArray[Any] = list(paired(instance.targets, results))[place][1]
            return found

        zero: dict[tuple[int, ...], NDArray[Any]] = {}

        def nothing(name: str) -> NDArray[Any]:
            return zero.setdefault(self.shapes[name], np.zeros(self.shapes[name]))

        found = run(lambda name: self._kept[name] if name in self._kept else nothing(name))
        return found - run(nothing) if _adds(ops) else found

    def at(self, name: str, places: Sequence[NDArray[np.int64]]) -> NDArray[Any] | None:
        """Where each place comes from, found by carrying row and column numbers through the rule."""
        instances = self.carry.instances[name]
        instance, place = instances[0]
        ops = instance.rule.ops
        if len(instances) > 1 or not all(op.moves for op in ops) or known(instance, self.shapes) is not None:
            return None
        names = [n for entry in instance.sources for n in leaves(entry)]
        starts = dict(zip(names, np.cumsum([0, *(self.shapes[n][0] for n in names[:-1])]).tolist(), strict=True))

        def numbers(columns: bool) -> NDArray[Any]:
            def view(n: str) -> NDArray[Any]:
                shape = self.shapes[n]
                inner = np.arange(1, 1 + int(np.prod(shape[1:])), dtype=np.int32).reshape(shape[1:])
                outer = np.arange(1 + starts[n], 1 + starts[n] + shape[0], dtype=np.int32)
                return np.broadcast_to(inner if columns else outer.reshape(-1, *[1] * (len(shape) - 1)), shape)

            results = apply_chain(ops, [mapped(entry, view) for entry in instance.sources])
            found: NDArray[Any] = list(paired(instance.targets, results))[place][1][tuple(places)]
            return found

        rows, columns = numbers(False), numbers(True)
        result = np.zeros(len(rows))
        for source, start in starts.items():
            shape = self.shapes[source]
            mine = np.flatnonzero((rows > start) & (rows <= start + shape[0]))
            if source in self.deltas and len(mine):
                inside = np.unravel_index(columns[mine] - 1, shape[1:]) if len(shape) > 1 else ()
                result[mine] = self.deltas[source].at([rows[mine] - 1 - start, *inside])
        return result


def _adds(ops: Sequence[Operation]) -> bool:
    return any(isinstance(op, Add) or (isinstance(op, Each) and any(_adds(c) for _, c in op.chains)) for op in ops)
