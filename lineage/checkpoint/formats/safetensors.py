"""safetensors files: 8 bytes of header length, a JSON header, then the tensors' bytes.

The header is parsed here, not by the safetensors package, so that each fault is named and 90,000 tensors take
tenths of a second. Format: safetensors README, "Format" (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import msgspec
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import STORAGE, UNPACKED, decode_packed
from lineage.checkpoint.files import File, json_fault, size_words
from lineage.errors import InputError, nearest, printable

__all__ = ["SafetensorsFile", "open_file"]

#: the reference implementation reads no longer header (safetensors/src/tensor.rs, MAX_HEADER_SIZE)
MAX_HEADER_BYTES = 100_000_000
#: a model of 10^5 tensors has 12 MB; beyond this size a header must be the usual kind to be read
_MAX_ODD_BYTES = 32 * 2**20
_MAX_TENSORS = 2**20
#: NumPy's limit of axes (NPY_MAXDIMS)
MAX_AXES = 64
#: words that some writers use for the same number format
_SPELLINGS = {"F8_E4M3FN": "F8_E4M3", "FLOAT8_E4M3FN": "F8_E4M3", "FLOAT8_E5M2": "F8_E5M2", "F8_E8M0FNU": "F8_E8M0"}
#: complex numbers are read as pairs of reals on one more axis
_COMPLEX = {"C64": "F32", "C128": "F64"}


class _Entry(msgspec.Struct):
    """One tensor of the header; `__metadata__` decodes to one with nothing in it."""

    dtype: str = ""
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] | None = None


class _Metadata(msgspec.Struct):
    """The header's own text pairs."""

    pairs: dict[str, Any] | None = msgspec.field(name="__metadata__", default=None)


class _Twice(ValueError):
    """A JSON object holds one key twice."""


class SafetensorsFile(Checkpoint):
    """One safetensors file."""

    format = "safetensors"

    def __init__(self, file: File) -> None:
        self.path, self._file = file.path, file
        entries, metadata, begin = _header(file)
        self.metadata = metadata
        self._offsets: dict[str, int] = {}
        self.specs = self._check(entries, begin)

    def _check(self, entries: dict[str, _Entry], begin: int) -> dict[str, TensorSpec]:
        """Specs of the header's entries, each proved to lie inside the file and apart from all others."""
        specs: dict[str, TensorSpec] = {}
        spans: list[tuple[int, int, str]] = []
        path, offsets = self.path, self._offsets
        for name, entry in entries.items():
            shape, span = entry.shape, entry.data_offsets
            if shape is None or span is None:
                raise InputError(path, f"{_quoted(name)} has no dtype, shape or data_offsets", "fetch it again")
            start, stop = span
            dtype = _SPELLINGS.get(entry.dtype, entry.dtype)
            bits = _BITS.get(dtype)
            if bits is None:
                raise _unknown(path, name, dtype)
            size = math.prod(shape)
            if 8 * (stop - start) != size * bits or start < 0 or size < 0 or size > 2**62 or min(shape, default=0) < 0:
                raise _misfit(path, name, entry, bits)
            if not size or len(shape) > 16:
                _check_odd(path, name, shape)
            if dtype in _COMPLEX:
                dtype, shape = _COMPLEX[dtype], (*shape, 2)
            specs[name] = TensorSpec(name=name, shape=shape, dtype=dtype, nbytes=stop - start, file=path)
            offsets[name] = begin + start
            spans.append((start, stop, name))
        spans.sort()
        self.cut = _check_spans(self._file, spans, self._file.size - begin)
        return specs

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        storage = STORAGE[spec.dtype]
        return self._file.elements(self._offsets[spec.name] + start * storage.itemsize, stop - start, storage, out)

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        if spec.plain:
            return super()._values(spec, start, stop)
        # Two elements a byte: the whole bytes around the range are read.
        if spec.dtype != "F4":
            raise InputError(self.path, f"{_quoted(spec.name)}: {spec.dtype} is not decoded", "convert it to BF16")
        group, width = UNPACKED[spec.dtype]
        first, last = start // group, -(-stop // group)
        offset, count = self._offsets[spec.name] + first * width, (last - first) * width
        count = min(count, spec.nbytes - first * width)
        raw = self._file.elements(offset, count, STORAGE["U8"])
        return decode_packed(raw, spec.dtype)[start - first * group : stop - first * group]

    def close(self) -> None:
        self._file.close()


_BITS = {word: 8 * storage.itemsize for word, storage in STORAGE.items()}
_BITS |= {word: 8 * width // group for word, (group, width) in UNPACKED.items()} | {"C64": 64, "C128": 128}


def open_file(file: File) -> SafetensorsFile:
    """The checkpoint in an open safetensors file.

    Raises
    ------
    InputError : the header lies, is broken or is not there
    """
    return SafetensorsFile(file)


def _header(file: File) -> tuple[dict[str, _Entry], Mapping[str, str], int]:
    """Entries, text pairs, and the byte at which data begin."""
    if file.size < 8:
        raise InputError(file.path, f"only {file.size} bytes, not a safetensors file", "fetch it again")
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > file.size - 8:
        cause = f"the header should take {size_words(length)}, the file holds {size_words(file.size)}"
        raise InputError(file.path, cause, "fetch it again, it was cut short or is not safetensors")
    if length > MAX_HEADER_BYTES:
        raise InputError(file.path, f"a header of {size_words(length)}; the format allows 100 MB")
    raw = file.read(8, length)
    found = _decode_fast(raw)
    if found is None and length > _MAX_ODD_BYTES:
        raise InputError(file.path, f"a header of {size_words(length)} that is no plain table of tensors")
    entries, pairs = found or _decode_checked(file.path, raw)
    if len(entries) > _MAX_TENSORS:
        raise InputError(file.path, f"the header lists {len(entries):,} tensors, more than any model has")
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (pairs or {}).items()}
    return entries, metadata, 8 + length


def _decode_fast(raw: bytes) -> tuple[dict[str, _Entry], dict[str, Any] | None] | None:
    """The header by msgspec, or None where anything about it is unusual.

    A dictionary forgets that a key came twice, but then the counts differ; escapes could hide a key from the count.
    """
    if b"\\" in raw:
        return None
    try:
        entries = _ENTRIES.decode(raw)
        pairs = _METADATA.decode(raw).pairs
    except (ValueError, RecursionError):
        return None
    entries.pop("__metadata__", None)
    if raw.count(b'"__metadata__"') != (pairs is not None):
        return None
    counts = {raw.count(b'"dtype"'), raw.count(b'"shape"'), raw.count(b'"data_offsets"'), len(entries)}
    return (entries, pairs) if len(counts) == 1 else None


_ENTRIES = msgspec.json.Decoder(dict[str, _Entry])
_METADATA = msgspec.json.Decoder(_Metadata)


def _decode_checked(path: str, raw: bytes) -> tuple[dict[str, _Entry], dict[str, Any] | None]:
    """The header by the standard library, every fault named."""
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as exc:
        raise InputError(path, "the header is not UTF-8 text", "fetch it again") from exc
    except RecursionError as exc:
        raise InputError(path, "the header is nested too deep for a list of tensors") from exc
    except _Twice as exc:
        raise InputError(path, f"the header lists {exc} twice") from exc
    except ValueError as exc:
        raise InputError(
            path, f"the header is not JSON ({json_fault(exc)})", "fetch it again, or it is not safetensors"
        ) from exc
    if not isinstance(document, dict):
        raise InputError(path, f"the header is a JSON {type(document).__name__}, a table of tensors is expected")
    pairs = document.pop("__metadata__", None)
    if pairs is not None and not isinstance(pairs, dict):
        raise InputError(path, "the header's __metadata__ is not a table")
    entries = {}
    for name, entry in document.items():
        try:
            name.encode()
            entries[name] = msgspec.convert(entry, _Entry)
        except (ValueError, RecursionError, OverflowError) as exc:
            raise InputError(path, f"the header's entry {_quoted(name)} is broken ({exc})") from exc
    return entries, pairs


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's table; a key that comes twice is an error."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise _Twice(next(_quoted(key) for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return table


def _check_spans(file: File, spans: list[tuple[int, int, str]], held: int) -> InputError | None:
    """Tensors follow each other without gap or overlap and fill the file, as the reference demands.

    Returns
    -------
    the error of a file that ends before its tensors do: only a caller that reads no data may go on
    """
    end, before = 0, ""
    for start, stop, name in spans:
        if start < end:
            raise InputError(file.path, f"{_quoted(before)} and {_quoted(name)} overlap")
        if start > end:
            raise InputError(file.path, f"{size_words(start - end)} before {_quoted(name)} belong to no tensor")
        end, before = stop, name
    if end > held:
        cause = f"header lists {size_words(end)} of tensors, the file holds {size_words(held)}"
        remedy = "fetch it again, it was cut short (lineage map --headers needs no more than the header)"
        return InputError(file.path, cause, remedy)
    if end < held:
        cause = f"header lists {size_words(end)} of tensors, the file holds {size_words(held)}"
        raise InputError(file.path, cause, "fetch it again, something was appended")
    return None


def _check_odd(path: str, name: str, shape: tuple[int, ...]) -> None:
    """Shapes that fit their bytes but not NumPy."""
    if len(shape) > MAX_AXES or math.prod(max(n, 1) for n in shape) > 2**62:
        raise InputError(path, f"{_quoted(name)}: no array can have {len(shape)} axes of lengths {_short(shape)}")


def _misfit(path: str, name: str, entry: _Entry, bits: int) -> InputError:
    """The error for a shape that does not fit its bytes."""
    assert entry.shape is not None
    start, stop = entry.data_offsets or (0, 0)
    if start < 0 or stop < start:
        return InputError(path, f"{_quoted(name)}: data from byte {start} to {stop}")
    if min(entry.shape, default=0) < 0:
        return InputError(path, f"{_quoted(name)}: shape {_short(entry.shape)} has a negative length")
    wanted = math.prod(entry.shape) * bits // 8
    cause = f"{_quoted(name)}: {entry.dtype} of shape {_short(entry.shape)} takes {size_words(wanted)}"
    return InputError(path, f"{cause}, the header gives it {size_words(stop - start)}")


def _unknown(path: str, name: str, dtype: str) -> InputError:
    """The error for a number format that nobody knows."""
    near = nearest(dtype, _BITS)
    hint = f'did you mean "{near}"?' if near else "a newer lineage may read it"
    return InputError(path, f"{_quoted(name)}: unknown dtype {_quoted(dtype)}", hint)


def _quoted(name: str) -> str:
    return f'"{printable(name, 80)}"'


def _short(shape: tuple[int, ...]) -> str:
    text = ", ".join(map(str, shape[:8])) + (", …" if len(shape) > 8 else "")
    return f"({printable(text, 120)})"
