"""Emitted Python run beside `lineage apply` on the same tensors."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE, encode
from lineage.emit.python import emit_python
from lineage.emit.steps import DTYPES
from lineage.errors import InputError
from lineage.filling import Filled
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.mapping import Mapping
from tests.layout.memory import Memory

#: name -> dtype word, shape and bytes
Bits = dict[str, tuple[str, Shape, bytes]]


def emitted(mapping: Mapping) -> str:
    """The Python file for a mapping."""
    return emit_python(mapping, name="mapping.yaml", beside="convert.py.safetensors").text


def loaded(text: str, path: Path | None = None) -> dict[str, Any]:
    """What an emitted file defines."""
    space: dict[str, Any] = {"__name__": "emitted", "__file__": str(path or "emitted.py")}
    exec(compile(text, "emitted.py", "exec"), space)
    return space


def random(shape: Shape, word: str, seed: int = 0) -> NDArray[Any]:
    """Random values for a dtype, halves of units in the last place among them so that rounding has ties."""
    values = np.random.default_rng(seed).integers(-60, 60, shape) / 4
    if word.startswith("U") or word in ("BOOL", "F8_E8M0"):
        values = np.abs(values) + (word == "F8_E8M0")
    return np.asarray(values, np.float64 if word == "F64" else np.float32)


def tensor(codes: NDArray[Any], word: str) -> torch.Tensor:
    """Stored codes as a tensor."""
    dtype = getattr(torch, DTYPES[word])
    if not codes.size:
        return torch.empty(codes.shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(codes.tobytes(), np.uint8).copy()).view(dtype).reshape(codes.shape)


def of_tensors(tensors: Dict[str, torch.Tensor]) -> Bits:
    """Bits of what emitted code gives."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    result = {}
    for name, x in tensors.items():
        raw = x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
        result[name] = (words[str(x.dtype).removeprefix("torch.")], tuple(x.shape), raw)
    return result


def of_checkpoint(checkpoint: Filled) -> Bits:
    """Bits of what `lineage apply` writes."""
    return {
        spec.name: (spec.dtype, spec.shape, np.asarray(checkpoint.codes(spec.name), STORAGE[spec.dtype]).tobytes())
        for spec in checkpoint
    }


def agree(mapping: Mapping, given: Dict[str, NDArray[Any]], words: str | Dict[str, str] = "U16") -> Bits:
    """Proves that the emitted code does what `lineage apply` does, there and back, and gives what came out.

    Parameters
    ----------
    given : values by name
    words : dtype words by name, or one for all
    """
    words = dict.fromkeys(given, words) if isinstance(words, str) else words
    try:
        wanted = of_checkpoint(Filled(mapping, Memory(given, words=words)))
    except InputError:
        with pytest.raises((ValueError, RuntimeError, IndexError)):
            loaded(emitted(mapping))["convert"](
                {name: tensor(encode(values, words[name]), words[name]) for name, values in given.items()}
            )
        return {}
    try:
        space = loaded(emitted(mapping))
    except LayoutError:
        assert not wanted
        return {}
    state = {name: tensor(encode(values, words[name]), words[name]) for name, values in given.items()}
    before = of_tensors(state)
    filled = Filled(mapping, Memory(given, words=words))
    found = space["convert"](state)
    assert of_tensors(found) == wanted
    assert of_tensors(state) == before
    if "revert" in space:
        assert of_tensors(space["revert"](found)) == of_checkpoint(Filled.inverse(mapping, filled))
    return of_tensors(found)
