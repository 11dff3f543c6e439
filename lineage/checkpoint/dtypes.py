"""Number formats of stored tensors: their NumPy storage and how codes become values and back.

Words are those of safetensors (`BF16`, `F8_E4M3`, …). NumPy lacks bf16 and fp8: their codes travel as
unsigned integers and are decoded block by block, exactly, to float32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOATS", "STORAGE", "TINY", "UNPACKED", "decode", "decode_packed", "encode", "itemsize"]

#: storage of one element; bf16 and fp8 as unsigned codes
STORAGE: dict[str, np.dtype[Any]] = {
    word: np.dtype(code)
    for word, code in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1",
        "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1", "F8_E8M0": "u1",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
    }.items()
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16", "F8_E5M2", "F8_E4M3", "F8_E5M2FNUZ", "F8_E4M3FNUZ", "F8_E8M0")
#: smallest normal number of each float format
TINY = {"F64": 2.0**-1022, "F32": 2.0**-126, "BF16": 2.0**-126, "F16": 2.0**-14,
        "F8_E5M2": 2.0**-14, "F8_E4M3": 2.0**-6, "F8_E5M2FNUZ": 2.0**-15, "F8_E4M3FNUZ": 2.0**-7,
        "F8_E8M0": 2.0**-127}  # fmt: skip
#: elements smaller than a byte: (elements, bytes) of the smallest whole group
UNPACKED = {"F4": (2, 1), "F6_E2M3": (4, 3), "F6_E3M2": (4, 3)}


def itemsize(dtype: str) -> int:
    """Bytes of one element of the dtype word."""
    return STORAGE[dtype].itemsize


#: (exponent bits, mantissa bits, bias, what the special codes are)
_SMALL = {
    "F8_E4M3": (4, 3, 7, "nan"), "F8_E5M2": (5, 2, 15, "ieee"),
    "F8_E4M3FNUZ": (4, 3, 8, "unsigned zero"), "F8_E5M2FNUZ": (5, 2, 16, "unsigned zero"),
}  # fmt: skip
#: E2M1 by code, OCP microscaling formats, section 5.3.3
_F4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


@lru_cache
def _table(dtype: str) -> NDArray[np.float32]:
    """The 256 values of an 8-bit float, as float32 (OCP 8-bit floating point, section 5; FNUZ: arXiv 2206.02915)."""
    code = np.arange(256)
    if dtype == "F8_E8M0":
        return np.where(code == 255, np.nan, 2.0 ** (code - 127.0)).astype(np.float32)
    exponent_bits, mantissa_bits, bias, special = _SMALL[dtype]
    sign = np.where(code >> 7, -1.0, 1.0)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (code & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - bias))
    if special == "nan":
        value[(code & 0x7F) == 0x7F] = np.nan
    elif special == "unsigned zero":
        value[0x80] = np.nan
    else:
        top = exponent == 31
        value[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    return (sign * value).astype(np.float32)


def decode(codes: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values of stored codes: float64 for F64, the integers themselves, float32 for all other floats.

    Raises
    ------
    KeyError : the dtype word is not one of `STORAGE`
    """
    if dtype == "BF16":
        wide = codes.astype(np.uint32)
        wide <<= np.uint32(16)
        single: NDArray[np.float32] = wide.view(np.float32)
        return single
    if dtype == "F16":
        return codes.astype(np.float32)
    if dtype.startswith("F8"):
        small: NDArray[np.float32] = _table(dtype)[codes]
        return small
    STORAGE[dtype]
    return codes


def decode_packed(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    """Values of elements smaller than a byte, the low bits first.

    Raises
    ------
    ValueError : 6-bit types, whose packing no writer documents
    """
    if dtype != "F4":
        raise ValueError(f"{dtype} is not decoded")
    codes = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)
    values: NDArray[np.float32] = np.where(codes & 8, -_F4[codes & 7], _F4[codes & 7])
    return values


def encode(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Codes of `values` in the format `dtype`, rounded to nearest even, NaN kept.

    Values beyond an 8-bit format's range become NaN (E4M3) or infinity (E5M2), as in `ml_dtypes`; E8M0 has
    no sign and no zero: both become NaN.
    """
    storage = STORAGE[dtype]
    if dtype == "BF16":
        single: NDArray[np.float32] = np.ascontiguousarray(values, np.float32)
        bits = single.view(np.uint32)
        rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
        codes: NDArray[Any] = np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(storage)
        return codes
    if dtype.startswith("F8"):
        return _encode_small(np.asarray(values, np.float64), dtype)
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(storage)


def _encode_small(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Nearest of the finite 8-bit values, ties to the even code."""
    first, last, over = _ENDS[dtype]
    grid = _table(dtype)[first : last + 1].astype(np.float64)
    size = np.abs(values)
    middle = (grid[1:] + grid[:-1]) / 2
    code = np.searchsorted(middle, size, side="left")
    tie = (code < len(middle)) & (size == middle[np.minimum(code, len(middle) - 1)])
    up = (code % 2 == 1) | (dtype == "F8_E8M0")  # a format of powers of two has no even neighbour
    code = np.where(tie & up, code + 1, code) + first
    beyond = grid[-1] + (grid[-1] - grid[-2]) / 2
    code = np.where((size >= beyond) if last % 2 else (size > beyond), over, code)
    nan = np.isnan(size)
    if dtype == "F8_E8M0":
        return np.where(nan | np.signbit(values) | (size == 0), 0xFF, code).astype(np.uint8)
    if _SMALL[dtype][3] == "unsigned zero":
        signed = np.where(np.signbit(values) & (code > 0), code | 0x80, code)
        return np.where(nan, 0x80, signed).astype(np.uint8)
    code = np.where(nan, 0x7F if dtype == "F8_E4M3" else 0x7E, code)
    return (code + np.where(np.signbit(values), 128, 0)).astype(np.uint8)


#: codes of the first and the last finite value, and of what lies beyond
_ENDS = {
    "F8_E4M3": (0, 0x7E, 0x7F), "F8_E5M2": (0, 0x7B, 0x7C), "F8_E4M3FNUZ": (0, 0x7F, 0x80),
    "F8_E5M2FNUZ": (0, 0x7F, 0x80), "F8_E8M0": (0, 0xFE, 0xFF),
}  # fmt: skip
