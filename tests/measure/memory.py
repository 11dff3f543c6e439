"""A checkpoint that lives in memory, and small pairs of tensors for the tests of measuring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import encode


class Memory(Checkpoint):
    """Tensors given as (dtype word, values); values are rounded to the dtype."""

    def __init__(self, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
        self.path, self.format, self.metadata = "memory", "memory", {}
        self.held = {name: encode(np.asarray(values), word) for name, (word, values) in tensors.items()}
        self.specs = {
            name: TensorSpec(name=name, shape=np.shape(values), dtype=word, nbytes=self.held[name].nbytes)
            for name, (word, values) in tensors.items()
        }

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        found = self.held[spec.name].reshape(-1)[start:stop]
        if out is None:
            return found
        out[: len(found)] = found
        return out[: len(found)]


class Quantised(Memory):
    """The same, but its tensors only offer decoded values, as quantised formats do."""

    def __init__(self, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
        super().__init__(tensors)
        self.plain = self.specs
        self.specs = {
            name: TensorSpec(name=name, shape=spec.shape, dtype="Q8_0", nbytes=spec.nbytes)
            for name, spec in self.plain.items()
        }

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        return super()._values(self.plain[spec.name], start, stop)


def numbers(seed: int, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
    """Normal numbers."""
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def tuned(values: NDArray[Any], seed: int, size: float = 0.02) -> NDArray[np.float32]:
    """The values with normal noise of a relative size."""
    noise = np.random.default_rng(seed).standard_normal(values.shape)
    return np.asarray(values + size * float(np.std(values)) * noise, np.float32)
