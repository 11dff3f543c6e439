"""A checkpoint in memory, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import encode


class Memory(Checkpoint):
    """Arrays under names.

    Parameters
    ----------
    tensors : stored codes where `word` is given for their dtype, otherwise values to be stored as `words[name]`
    """

    def __init__(self, tensors: Mapping[str, NDArray[Any]], word: str = "U16", words: Mapping[str, str] | None = None):
        self.path, self.format, self.metadata = "memory", "memory", {}
        kinds = {name: (words or {}).get(name, word) for name in tensors}
        self._held = {name: encode(t, kinds[name]) if name in (words or {}) else t for name, t in tensors.items()}
        self.reads: list[tuple[str, int, int]] = []
        self.specs = {
            name: TensorSpec(name=name, shape=t.shape, dtype=kinds[name], nbytes=t.nbytes)
            for name, t in self._held.items()
        }

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        self.reads.append((spec.name, start, stop))
        found = self._held[spec.name].reshape(-1)[start:stop]
        if out is None:
            return found
        out[: stop - start] = found
        return out[: stop - start]
