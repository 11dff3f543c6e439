"""Weights stored as 8-bit codes with scales in a tensor of their own, read as the real values.

`decode_scales` wraps a checkpoint of any format: `X.weight` (fp8 or int8) with `X.weight_scale_inv` (one scale a
block), `X.weight_scale` (one scale, or one a row) or `X.scale_weight` (one scale) becomes one tensor of dtype
`F8_E4M3+scale` (or `I8+scale`, …), whose values are code times scale; the scale tensors vanish from the specs.
Despite its name `weight_scale_inv` is multiplied too (transformers: integrations/finegrained_fp8.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import FLOATS
from lineage.errors import InputError, printable

__all__ = ["Scaled", "decode_scales"]

#: names of the scale tensor, from the weight's name
_COMPANIONS = ("{name}_scale_inv", "{name}_scale", "{stem}.scale_weight")
_CODES = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
#: block of rows and columns where the file does not say: the size in use (DeepSeek-V3, config.json)
_USUAL_BLOCK = 128
#: a scale tensor has at most this many elements; larger ones are not scales
_MAX_SCALES = 2**26


class _Scale(msgspec.Struct, frozen=True):
    """How a weight's scales lie over it: rows and columns of one scale, or one for the whole tensor."""

    name: str
    rows: int
    columns: int
    whole: bool = False


class Scaled(Checkpoint):
    """A checkpoint whose 8-bit weights are read with their scales applied."""

    def __init__(self, base: Checkpoint, scales: Mapping[str, _Scale]) -> None:
        self.base, self._scales = base, scales
        self.path, self.format, self.metadata = base.path, base.format, base.metadata
        hidden = {scale.name for scale in scales.values()}
        specs: dict[str, TensorSpec] = {}
        for name, spec in base.specs.items():
            if name in scales:
                nbytes = spec.nbytes + base.specs[scales[name].name].nbytes
                spec = msgspec.structs.replace(spec, dtype=f"{spec.dtype}+scale", nbytes=nbytes)
            if name not in hidden:
                specs[name] = spec
        self.specs = specs
        note = f"{len(scales)} 8-bit weights are decoded with their scales; the scale tensors are not listed"
        self.notes = (*base.notes, note)

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        return self.base._codes(self.base.specs[spec.name], start, stop, out)

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        values = self.base._values(self.base.specs[spec.name], start, stop)
        scale = self._scales.get(spec.name)
        if scale is None:
            return values
        values = values.astype(np.float32)
        with np.errstate(all="ignore"):
            _multiply(values, start, spec.shape, scale, lambda first, last: self.base.read(scale.name, first, last))
        return values

    def close(self) -> None:
        self.base.close()


def decode_scales(base: Checkpoint, *, block: tuple[int, int] | None = None) -> Checkpoint:
    """`base` with its scaled 8-bit weights decoded; `base` itself where it has none.

    Parameters
    ----------
    block : rows and columns that share a scale, where the checkpoint's configuration says so

    Raises
    ------
    InputError : a scale tensor does not fit its weight
    """
    found: dict[str, _Scale] = {}
    for name, spec in base.specs.items():
        if spec.dtype in _CODES and spec.size:
            stem = name.rpartition(".")[0]
            for pattern in _COMPANIONS:
                companion = base.specs.get(pattern.format(name=name, stem=stem))
                if companion is not None and companion.dtype in FLOATS and companion.size <= _MAX_SCALES:
                    found[name] = _fit(base.path, spec, companion, block)
                    break
    return Scaled(base, found) if found else base


def _fit(path: str, weight: TensorSpec, scale: TensorSpec, block: tuple[int, int] | None) -> _Scale:
    """How the scales lie over the weight: one for all, one a row, or one a block."""
    shape = weight.shape if len(weight.shape) > 1 else (1, *weight.shape)
    *outer, rows, columns = shape
    have = scale.shape
    if scale.size == 1:
        return _Scale(scale.name, rows, columns, whole=True)
    if have in ((*outer, rows), (*outer, rows, 1)):
        return _Scale(scale.name, 1, columns)
    if scale.size == math.prod(outer):
        return _Scale(scale.name, rows, columns)
    if have[:-2] == tuple(outer) and len(have) == len(shape):
        usual = block or (_USUAL_BLOCK, _USUAL_BLOCK)
        tall, wide = (_length(n, s, b) for n, s, b in zip((rows, columns), have[-2:], usual, strict=True))
        if tall and wide:
            return _Scale(scale.name, tall, wide)
    cause = f'"{printable(scale.name, 80)}" of shape {have} does not fit "{printable(weight.name, 80)}" {weight.shape}'
    raise InputError(path, cause)


def _length(length: int, scales: int, usual: int) -> int:
    """Elements that share a scale along an axis of `length` with `scales` scales; 0 where nothing fits."""
    if scales == 1:
        return length
    if usual > 0 and -(-length // usual) == scales:
        return usual
    if scales and length % scales == 0:
        return length // scales
    fitting = [2**k for k in range(1, 16) if -(-length // 2**k) == scales]
    return fitting[0] if fitting else 0


def _multiply(
    values: NDArray[Any], start: int, shape: tuple[int, ...], how: _Scale, read: Callable[[int, int], NDArray[Any]]
) -> None:
    """Multiplies the flat range that begins at element `start` by its scales, in place; only those are read."""
    columns = shape[-1]
    rows = shape[-2] if len(shape) > 1 else 1
    bands, wide = -(-rows // how.rows), -(-columns // how.columns)

    def band(element: int) -> int:
        outer, row = divmod(element // columns, rows)
        return outer * bands + row // how.rows

    if how.whole:
        values *= np.float32(read(0, 1)[0])
        return
    first = band(start)
    last = band(start + max(len(values), 1) - 1)
    grid = read(first * wide, (last + 1) * wide).astype(np.float32).reshape(-1, wide)
    done = 0
    while done < len(values):
        line, column = divmod(start + done, columns)
        row, here = line % rows, band(start + done) - first
        if column or len(values) - done < columns:
            count = min(len(values) - done, columns - column)
            values[done : done + count] *= np.repeat(grid[here], how.columns)[column : column + count]
            done += count
            continue
        # Whole rows: all that share their scales, or with a scale for each row as many as there are.
        count = min((len(values) - done) // columns, rows - row)
        count = min(count, how.rows - row % how.rows) if how.rows > 1 else count
        factors = grid[here : here + (count if how.rows == 1 else 1)]
        part = values[done : done + count * columns].reshape(count, columns)
        part *= np.repeat(factors, how.columns, axis=1)[:, :columns]
        done += count * columns
