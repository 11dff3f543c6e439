"""Functions that emitted Python code carries along: nothing here but the standard library and torch.

This file is read as text, function by function, and never imported by the package.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor


def _numbers(names: Iterable[str], *texts: str) -> list[tuple[int, ...]]:
    """The numbers that stand between these texts, for every name that is made of them, in order."""
    pattern = re.compile("(0|[1-9][0-9]{0,8})".join(map(re.escape, texts)))
    found = (pattern.fullmatch(name) for name in names)
    return sorted(tuple(map(int, match.groups())) for match in found if match)


def _grouped(rows: Iterable[tuple[int, ...]], kept: Sequence[int]) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """Numbers that make lists, by the numbers at the places `kept`."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in rows:
        key = tuple(row[k] for k in kept)
        found.setdefault(key, set()).add(tuple(n for k, n in enumerate(row) if k not in kept))
    return found


def _common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that holds values of all these dtypes."""
    found = set(dtypes)
    floats = {d for d in found if d.is_floating_point}
    large = {d for d in floats if d.itemsize > 1}
    if len(found) == 1:
        return found.pop()
    if torch.float64 in found:
        return torch.float64
    if not floats:
        return max(found, key=lambda d: (d.itemsize, str(d)))
    if floats == found and len(large) < 2:
        return large.pop() if large else torch.float16
    return torch.float32


def _alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in the one dtype that holds them all."""
    dtype = _common(x.dtype for x in tensors)
    return [_cast(x, dtype) for x in tensors]


def _wide(x: Tensor) -> Tensor:
    """Short floats as float32, so that several steps round once."""
    return x.float() if x.is_floating_point() and x.dtype.itemsize < 4 else x


def _back(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Results in float64 as the dtype that they came from, whole numbers rounded."""
    return (values if dtype.is_floating_point else values.round()).to(dtype)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a dtype; what an 8-bit format cannot hold becomes NaN."""
    name = str(dtype)
    if x.dtype == dtype or name not in ("torch.float8_e4m3fn", "torch.float8_e8m0fnu"):
        return x.to(dtype)
    wide = x.double()
    beyond = wide.abs() > 464 if name == "torch.float8_e4m3fn" else (wide <= 0) | wide.signbit()
    return wide.masked_fill(beyond, torch.nan).to(dtype)


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """A vector laid along one axis of x."""
    if values.shape[0] != x.shape[axis]:
        raise ValueError(f"{values.shape[0]} values for axis {axis} of {x.shape[axis]}")
    return values.to(x.device).reshape([-1 if k == axis % x.ndim else 1 for k in range(x.ndim)])


def _product(matrix: Tensor, x: Tensor, side: str) -> Tensor:
    """The matrix applied to the first axis from the left, or to the last one from the right."""
    wide, matrix = x.double(), matrix.to(x.device)
    pair = (matrix, wide, ([1], [0])) if side == "left" else (wide, matrix, ([-1], [0]))
    return _back(torch.tensordot(*pair), x.dtype)


def _dropped(x: Tensor, axis: int) -> Tensor:
    """x without an axis of length one."""
    if x.shape[axis] != 1:
        raise ValueError(f"axis {axis} of {x.shape[axis]} should have length one")
    return x.squeeze(axis)


def _sliced(x: Tensor, axis: int, start: int, stop: int | None = None, of: int | None = None) -> Tensor:
    """Places start to stop of an axis."""
    length = x.shape[axis]
    if of not in (None, length):
        raise ValueError(f"axis {axis} has {length}, expected {of}")
    last = length if stop is None else stop + length if stop < 0 else stop
    return x.narrow(axis, start, last - start)


def _taken(x: Tensor, axis: int, places: Sequence[int] | Tensor, of: int | None = None) -> Tensor:
    """Chosen places of an axis; 0 where the place is -1."""
    if of not in (None, x.shape[axis]):
        raise ValueError(f"axis {axis} has {x.shape[axis]}, expected {of}")
    rows = x.movedim(axis, 0)
    index = torch.as_tensor(places, dtype=torch.int64, device=x.device)
    if bool((index < 0).any()):
        index = index.where(index >= 0, rows.shape[0])
        rows = torch.cat((rows, torch.zeros((1, *rows.shape[1:]), dtype=torch.bool, device=x.device).to(x.dtype)))
    return rows[index].movedim(0, axis)


def _padded(x: Tensor, axis: int, before: int, after: int, value: float) -> Tensor:
    """x with places added before and after an axis."""
    shape = list(x.shape)
    shape[axis] += before + after
    whole = torch.full(shape, value, dtype=torch.float64, device=x.device).to(x.dtype)
    whole.narrow(axis, before, x.shape[axis]).copy_(x)
    return whole


def _counted(x: Sequence[Tensor], count: int) -> list[Tensor]:
    """The tensors, as many as there are names for."""
    if len(x) != count:
        raise ValueError(f"{len(x)} tensors for {count} names")
    return list(x)


def _own(x: Tensor) -> Tensor:
    """A copy in memory of its own, as files want it."""
    return x.clone(memory_format=torch.contiguous_format)


def _unite(out: dict[str, Tensor], parts: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
    """Tensors that several rules know in part, where every element is known; the first that knows one gives it."""
    for name, found in parts.items():
        known = torch.stack([mask for _, mask in found])
        if name not in out and bool(known.any(0).all()):
            values = _alike([x for x, _ in found])
            whole = values[-1]
            for x, (_, mask) in zip(reversed(values), reversed(found), strict=True):
                whole = torch.where(mask, x, whole)
            out[name] = whole


def _arrays(name: str) -> dict[str, Tensor]:
    """The arrays in the .safetensors file beside this one."""
    raw = bytearray(Path(__file__).with_name(name).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    dtypes = {"F64": torch.float64, "I64": torch.int64}
    found = {}
    for key, entry in json.loads(raw[8:start]).items():
        if key != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            found[key] = torch.frombuffer(raw[first:last], dtype=dtypes[entry["dtype"]]).reshape(entry["shape"])
    return found
