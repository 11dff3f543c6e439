"""GGUF files: a typed key table, tensor descriptions, then blocks of quantised numbers.

The header is parsed here with every count held against the file's size; blocks are decoded by `gguf.quants`, only
as many as a range needs. Shapes are given outermost axis first, as NumPy has them (the file says them the other
way round). The order of rotary rows that some converters change belongs to the layout and is left as it is.
Format: ggml docs/gguf.md (github.com/ggml-org/ggml).
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import STORAGE
from lineage.checkpoint.files import File, size_words
from lineage.errors import InputError, printable

__all__ = ["GgufFile", "open_file"]

#: type number -> (word, elements of a block, bytes of a block); ggml.h enum ggml_type, gguf-py constants.py
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
#: value type number -> struct code; 8 is a string, 9 an array
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
#: strings beyond this are skipped (chat templates take some kB)
_LONGEST_KEPT = 2**16
_MAX_AXES = 8
_CHUNK_BYTES = 2**20
#: keys, tensors and list entries of a header together; real ones have some 10^5 (a vocabulary)
_MAX_ENTRIES = 2**21
#: elements decoded at once: the package's decoders take about ten times that in memory
_CHUNK_ELEMENTS = 2**18


class GgufFile(Checkpoint):
    """One GGUF file."""

    format = "gguf"

    def __init__(self, file: File) -> None:
        self.path, self._file = file.path, file
        head = _Cursor(file)
        tensors, keys = _preamble(head)
        self.metadata = metadata = _metadata(head, keys)
        infos = _infos(head, tensors)
        alignment = _alignment(file.path, metadata)
        begin = -(-head.at // alignment) * alignment
        self._offsets: dict[str, int] = {}
        specs: dict[str, TensorSpec] = {}
        for name, shape, kind, offset in infos:
            if name in specs:
                raise InputError(file.path, f"the header lists {_quoted(name)} twice")
            word, nbytes = _measure(file.path, name, shape, kind)
            specs[name] = TensorSpec(name=name, shape=shape, dtype=word, nbytes=nbytes, file=file.path)
            self._offsets[name] = begin + offset
        self.specs = specs
        _check_places(file, specs, self._offsets)

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        storage = STORAGE[spec.dtype]
        return self._file.elements(self._offsets[spec.name] + start * storage.itemsize, stop - start, storage, out)

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        if spec.plain:
            return super()._values(spec, start, stop)
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        _, block, width = _BY_WORD[spec.dtype]
        kind = GGMLQuantizationType[spec.dtype]
        values = np.empty(stop - start, np.float32)
        step = max(_CHUNK_ELEMENTS // block, 1)
        for first in range(start // block, -(-stop // block), step):
            count = min(step, -(-stop // block) - first)
            place = self._offsets[spec.name] + first * width
            # as one long row: the package decodes 16 rows at a time, and blocks know nothing of rows
            raw = self._file.elements(place, count * width, STORAGE["U8"]).reshape(1, count * width)
            try:
                with np.errstate(all="ignore"):
                    decoded = dequantize(raw, kind).reshape(-1)
            except NotImplementedError as exc:
                cause = f"{_quoted(spec.name)} is stored as {spec.dtype}, which the gguf package does not decode"
                raise InputError(self.path, cause) from exc
            low, high = max(start, first * block), min(stop, (first + count) * block)
            values[low - start : high - start] = decoded[low - first * block : high - first * block]
        return values

    def close(self) -> None:
        self._file.close()


_BY_WORD = {entry[0]: entry for entry in _TYPES.values()}


class _Cursor:
    """Reads a header front to back through a small buffer; never past the end of the file."""

    def __init__(self, file: File) -> None:
        self.file, self.at = file, 0
        self._buffer, self._base = b"", 0
        self._entries = _MAX_ENTRIES

    @property
    def left(self) -> int:
        return self.file.size - self.at

    def skip(self, count: int) -> None:
        """Moves on by `count` bytes."""
        if count > self.left:
            raise self.file.short(self.at + count)
        self.at += count

    def announce(self, count: int, smallest: int, what: str) -> None:
        """Holds an announced number of entries, of `smallest` bytes each, against what is left of the file."""
        path, size = self.file.path, size_words(self.file.size)
        if count * smallest > self.left:
            cause = f"the header announces {count:,} {what}, the file holds {size}"
            raise InputError(path, cause, "fetch it again, it was cut short or is broken")
        self._entries -= count
        if self._entries < 0:
            raise InputError(path, f"the header announces {count:,} {what}, more than any model has")

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self.at - self._base
        self.skip(count)
        if start + count > len(self._buffer):
            self._base = self.at - count
            size = min(max(count, _CHUNK_BYTES), self.file.size - self._base)
            self._buffer, start = self.file.read(self._base, size), 0
        return self._buffer[start : start + count]

    def number(self, code: str) -> Any:
        """One number of a struct code."""
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str | None:
        """A string, or None (skipped) where it is longer than any that is used."""
        length = self.number("Q")
        if length > _LONGEST_KEPT:
            self.skip(length)
            return None
        return self.take(length).decode("utf-8", "replace")


def open_file(file: File) -> GgufFile:
    """The checkpoint in an open GGUF file.

    Raises
    ------
    InputError : not GGUF, cut off, or its header lies
    """
    return GgufFile(file)


def _preamble(head: _Cursor) -> tuple[int, int]:
    """Counts of tensors and of keys."""
    path = head.file.path
    if head.file.size < 24:
        raise InputError(path, f"only {head.file.size} bytes, not a GGUF file", "fetch it again")
    magic, version, tensors, keys = struct.unpack("<4sIQQ", head.take(24))
    if magic != b"GGUF":
        raise InputError(path, f"begins with {magic!r}, a GGUF file with b'GGUF'", "fetch it again or mend its name")
    if version not in (2, 3):
        swapped = version & 0xFFFF == 0
        what = "big-endian" if swapped else f"version {version}"
        raise InputError(path, f"GGUF of {what}; little-endian versions 2 and 3 are read", "convert it again")
    # The shortest key takes 13 bytes, the shortest tensor description 24.
    head.announce(keys, 13, "keys")
    head.announce(tensors, 24, "tensors")
    return tensors, keys


def _metadata(head: _Cursor, keys: int) -> dict[str, str]:
    """All scalar values of the key table as text; lists are skipped."""
    found: dict[str, str] = {}
    for _ in range(keys):
        key = head.string()
        value = _value(head, head.number("I"), 0)
        if key is not None and value is not None:
            found[key] = str(value)
    return found


def _value(head: _Cursor, kind: int, depth: int) -> Any:
    """One value of the key table, None for what is skipped."""
    if kind in _SCALARS:
        return head.number(_SCALARS[kind])
    if kind == _STRING:
        return head.string()
    if kind != _ARRAY or depth > 4:
        raise InputError(head.file.path, f"value of unknown type {kind} in the key table", "fetch it again")
    inner, count = head.number("I"), head.number("Q")
    if inner in _SCALARS:
        head.skip(count * struct.calcsize("<" + _SCALARS[inner]))
        return None
    head.announce(count, 8, "list entries")
    if inner == _STRING:
        for _ in range(count):
            head.skip(head.number("Q"))
    else:
        for _ in range(count):
            _value(head, inner, depth + 1)
    return None


def _infos(head: _Cursor, tensors: int) -> list[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape (outermost first), type number and offset of every tensor."""
    infos = []
    for _ in range(tensors):
        name = head.string()
        axes = head.number("I")
        if name is None or axes > _MAX_AXES:
            cause = f"a tensor with {axes} axes" if name is not None else "a tensor name of more than 64 KiB"
            raise InputError(head.file.path, f"{cause} in the header", "fetch it again, the file is broken")
        lengths = struct.unpack(f"<{axes}Q", head.take(8 * axes))
        kind, offset = struct.unpack("<IQ", head.take(12))
        infos.append((name, tuple(reversed(lengths)), kind, offset))
    return infos


def _alignment(path: str, metadata: dict[str, str]) -> int:
    """Bytes to which the data begin aligned."""
    text = metadata.get("general.alignment", "32")
    if not text.isdigit() or not 0 < int(text) <= 2**20:
        raise InputError(path, f"general.alignment is {_quoted(text)}", "fetch it again, the file is broken")
    return int(text)


def _measure(path: str, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
    """Dtype word and bytes of a tensor."""
    if kind not in _TYPES:
        raise InputError(path, f"{_quoted(name)} is of unknown type {kind}", "a newer lineage may read it")
    word, block, width = _TYPES[kind]
    size = math.prod(shape)
    if math.prod(max(n, 1) for n in shape) > 2**62:
        raise InputError(path, f"{_quoted(name)}: shape {shape} is larger than any file")
    if size % block or (shape and shape[-1] % block):
        raise InputError(path, f"{_quoted(name)}: shape {shape} does not fill blocks of {block} {word} elements")
    return word, size // block * width


def _check_places(file: File, specs: dict[str, TensorSpec], offsets: dict[str, int]) -> None:
    """Every tensor lies inside the file and apart from all others."""
    end, before = 0, ""
    for name, offset in sorted(offsets.items(), key=lambda item: (item[1], specs[item[0]].nbytes)):
        if offset < end:
            raise InputError(file.path, f"{_quoted(before)} and {_quoted(name)} overlap", "the file is broken")
        end, before = offset + specs[name].nbytes, name
    if end > file.size:
        cause = f"header lists tensors up to {size_words(end)}, the file holds {size_words(file.size)}"
        raise InputError(file.path, cause, "fetch it again, it was cut short")


def _quoted(name: str) -> str:
    return f'"{printable(name, 80)}"'
