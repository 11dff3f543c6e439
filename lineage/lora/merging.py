"""An adapter added into a model's weights, tensor by tensor: a checkpoint that needs no adapter any more."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint
from lineage.checkpoint.dtypes import STORAGE, encode
from lineage.checkpoint.write import write_safetensors
from lineage.errors import InputError
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.lora.carry import carried
from lineage.lora.delta import Delta, Refused, strength
from lineage.lora.reading import read_adapter
from lineage.lora.source import Base, open_adapter

__all__ = ["Merged", "difference", "merge"]

#: dtype of tensors that were stored quantised: their real values do not fit their own format again
_DECODED = "BF16"


class Merged(msgspec.Struct, frozen=True, kw_only=True):
    """What `merge` wrote.

    Attributes
    ----------
    out : the checkpoint
    changed, tensors : tensors that the adapter changed, and all
    left : keys and tensors of the adapter that went nowhere, with the reason
    decoded : tensors that were stored quantised and are now written as numbers
    notes : what a user should know
    """

    out: str
    changed: int
    tensors: int
    left: dict[str, str]
    decoded: int
    notes: tuple[str, ...]


def merge(
    model: Checkpoint,
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    mapping: LayoutMapping | None = None,
    base: Checkpoint | None = None,
    weight: float = 1.0,
    format: str | None = None,
    scale: float | None = None,
    inputs: Sequence[str | Path] = (),
) -> Merged:
    """Writes `model` with the adapter in it; memory is one tensor and its difference.

    Parameters
    ----------
    mapping : from the adapter's base to `model`, None where the adapter is for `model` itself
    base : the adapter's base, where a mapping is given and names or shapes need it
    weight : of the adapter; of the whole change where it is DoRA
    format, scale : of the adapter, where it does not tell

    Raises
    ------
    InputError : the adapter cannot be read, or none of it belongs to the model
    """
    source = open_adapter(adapter)
    if mapping is None:
        read = read_adapter(source, Base.of(model), format=format, scale=scale)
        deltas, left = dict(read.deltas), {f.key: f.reason for f in read.left}
    else:
        own = Base.of(base) if base is not None else Base.named(mapping, source.keys)
        read = read_adapter(source, own, format=format, scale=scale)
        carry = carried(read.deltas, mapping, own)
        deltas, left = carry.deltas, {f.key: f.reason for f in read.left} | carry.reasons
    for name in [n for n in deltas if n not in model.specs or model.specs[n].shape != deltas[n].shape]:
        left[name] = "the model has no such tensor of this shape"
        del deltas[name]
    if not deltas:
        raise InputError(adapter, "none of it belongs to this model: " + next(iter(left.values()), "it is empty"))
    words = {s.name: s.dtype if s.plain else _DECODED for s in model}

    def codes(name: str) -> NDArray[Any]:
        spec = model.specs[name]
        if name not in deltas and spec.plain:
            return model.codes(name)
        values = model.tensor(name)
        if name in deltas:
            values = values.astype(np.float64) + weight * difference(deltas[name], values, name)
        return encode(values, words[name])

    entries = [(s.name, words[s.name], s.shape) for s in model]
    assert all(w in STORAGE for w in words.values())
    write_safetensors(
        out, entries, codes, metadata=_metadata(model.metadata, adapter, weight), inputs=(model.path, adapter, *inputs)
    )
    return Merged(
        out=str(out), changed=len(deltas), tensors=len(model), left=left, notes=read.notes,
        decoded=sum(not s.plain for s in model),
    )  # fmt: skip


def difference(delta: Delta, weight: NDArray[Any], name: str) -> NDArray[Any]:
    """The whole change of a tensor, DoRA applied.

    Raises
    ------
    InputError : its magnitudes do not fit the tensor
    """
    try:
        found = delta.magnitude()
    except Refused as exc:
        raise InputError(name, str(exc)) from exc
    dense = delta.dense()
    if found is None:
        return dense
    axis, vector, given = found
    whole = strength(weight.astype(np.float64), dense, axis, vector)
    shape = [-1 if k == axis else 1 for k in range(dense.ndim)]
    return np.where(given.reshape(shape), whole, dense)


def _metadata(metadata: Mapping[str, str], adapter: str | os.PathLike[str], weight: float) -> dict[str, str]:
    kept = {k: v for k, v in metadata.items() if k in ("format", "modelspec.architecture", "modelspec.title")}
    return {"format": "pt", **kept, "lineage": f"lineage lora merge of {Path(adapter).name} at {weight:g}"}
