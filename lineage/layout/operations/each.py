"""`each`: a chain of its own for some of the arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from numpy.typing import NDArray

from lineage.layout.axes import LayoutError, Shape
from lineage.layout.operations.base import Operation

__all__ = ["Each"]

Chain = tuple[Operation, ...]


@dataclass(frozen=True, init=False)
class Each(Operation):
    """Chains for single arrays of the list; arrays that are not named stay as they are.

    Attributes
    ----------
    chains : pairs of a place in the list and the operations for the array there; each gives one array
    """

    word: ClassVar[str] = "each"
    chains: tuple[tuple[int, Chain], ...]

    def __init__(self, chains: Mapping[int, Sequence[Operation] | Operation]) -> None:
        given = {k: (v,) if isinstance(v, Operation) else tuple(v) for k, v in chains.items()}
        object.__setattr__(self, "chains", tuple(sorted(given.items(), key=lambda kv: kv[0])))

    @property
    def moves(self) -> bool:  # type: ignore[override]
        """Whether all its operations only move elements."""
        return all(op.moves for _, chain in self.chains for op in chain)

    @property
    def over(self) -> None:  # type: ignore[override]
        """The chains inside may have their own."""
        return

    def _run(self, items: Sequence[Any], step: str) -> list[Any]:
        result = list(items)
        for k, chain in self.chains:
            if k >= len(result):
                raise LayoutError(f"each: no array {k} in a list of {len(result)}")
            one = [result[k]]
            for op in chain:
                one = getattr(op, step)(one)
            if len(one) != 1:
                raise LayoutError(f"each: the operations for array {k} give {len(one)} arrays, not one")
            result[k] = one[0]
        return result

    def apply(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        return self._run(arrays, "apply")

    def shapes(self, shapes: Sequence[Shape]) -> list[Shape]:
        return self._run(shapes, "shapes")

    def inverse(self, count: int | None, lengths: Mapping[str, int]) -> tuple[Operation, ...]:
        undone = {
            k: tuple(step for op in reversed(chain) for step in op.inverse(1, lengths)) for k, chain in self.chains
        }
        return (Each({k: chain for k, chain in undone.items() if chain}),)

    def document(self, data: dict[str, NDArray[Any]]) -> Any:
        listed = {k: [op.document(data) for op in chain] for k, chain in self.chains}
        return {self.word: {k: v[0] if len(v) == 1 else v for k, v in listed.items()}}
