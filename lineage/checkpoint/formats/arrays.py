"""NumPy files: `.npy` (one array) and `.npz` (a zip of them); objects are never unpickled.

Stored members are read by position; compressed ones stream, so that reading front to back costs one pass and no
more memory than a piece. Format: numpy/lib/format.py.
"""

from __future__ import annotations

import ast
import math
import threading
import warnings
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import STORAGE
from lineage.checkpoint.files import File, size_words
from lineage.checkpoint.strided import contiguous, gather
from lineage.checkpoint.zips import Member, Unpacked, Zip
from lineage.errors import InputError, printable

__all__ = ["ArraysFile", "open_file"]

_MAGIC = b"\x93NUMPY"
#: numpy/lib/format.py, _MAX_HEADER_SIZE
_MAX_HEADER_BYTES = 10_000
_MAX_AXES = 64
#: NumPy kind and size -> dtype word; V2 is how NumPy writes the bf16 of ml_dtypes
_WORDS = {
    "f8": "F64", "f4": "F32", "f2": "F16", "V2": "BF16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8",
    "u8": "U64", "u4": "U32", "u2": "U16", "u1": "U8", "b1": "BOOL", "c8": "F32", "c16": "F64",
}  # fmt: skip


class _Array(msgspec.Struct, frozen=True, kw_only=True):
    """Where an array's elements are and how they lie.

    Attributes
    ----------
    begin : bytes before the first element: of the file, or of the member's content
    member : the zip member, None for a `.npy` file
    stored : NumPy dtype in the file
    strides : in elements
    """

    begin: int
    member: Member | None
    stored: np.dtype[Any]
    strides: tuple[int, ...]


class ArraysFile(Checkpoint):
    """One `.npy` or `.npz` file."""

    format = "numpy"

    def __init__(self, file: File) -> None:
        self.path, self._file, self.metadata = file.path, file, {}
        self._arrays: dict[str, _Array] = {}
        self.specs: dict[str, TensorSpec] = {}
        self._streams: dict[str, Unpacked] = {}
        self._lock = threading.Lock()
        skipped: list[str] = []
        if file.read(0, min(file.size, 6)) == _MAGIC:
            header = _read_header(file.path, "array", lambda count: file.read(0, min(count, file.size)))
            self._add("array", header, None)
        else:
            self._zip = Zip(file)
            for member in self._zip.members.values():
                name = member.name.removesuffix(".npy")
                if name == member.name:
                    skipped.append(name)
                    continue
                header = _read_header(file.path, name, lambda count, m=member: self._zip.head(m, count))
                self._add(name, header, member)
        if skipped:
            self.notes = (f"{len(skipped)} members that are no arrays are not read ({printable(skipped[0], 60)})",)

    def _add(self, name: str, header: tuple[int, np.dtype[Any], tuple[int, ...], bool], member: Member | None) -> None:
        """Checks one array's header against the bytes there are, and keeps its spec."""
        begin, stored, shape, fortran = header
        word = _WORDS.get(stored.str[1:]) if stored.names is None and stored.subdtype is None else None
        if word is None:
            what = "pickled Python objects" if stored.hasobject else f"elements of type {stored}"
            cause = f'"{printable(name, 80)}" holds {what}, which are not read'
            raise InputError(self.path, cause, "save plain arrays")
        nbytes = math.prod(shape) * stored.itemsize
        held = (self._file.size if member is None else member.size) - begin
        if nbytes != held:
            cause = f'"{printable(name, 80)}" declares {size_words(nbytes)} of data, the file holds {size_words(held)}'
            raise InputError(self.path, cause, "fetch it again, it is cut short or broken")
        strides = _strides(shape, fortran)
        if stored.kind == "c":  # complex numbers are read as pairs of reals on one more axis
            stored, shape = np.dtype(f"{stored.str[0]}f{stored.itemsize // 2}"), (*shape, 2)
            strides = (*(2 * s for s in strides), 1)
        self._arrays[name] = _Array(begin=begin, member=member, stored=stored, strides=strides)
        self.specs[name] = TensorSpec(name=name, shape=shape, dtype=word, nbytes=nbytes, file=self.path)

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        array = self._arrays[spec.name]
        storage = STORAGE[spec.dtype]
        if contiguous(spec.shape, array.strides):
            codes = self._stored(spec.name, array, start, stop, out if array.stored.str[0] != ">" else None)
        else:
            native = storage.newbyteorder(">") if array.stored.str[0] == ">" else storage
            codes = gather(
                lambda low, high: self._stored(spec.name, array, low, high, None),
                native,
                spec.shape,
                array.strides,
                start,
                stop,
            )
        codes = codes.astype(storage, copy=False)
        if out is None or codes.base is out or np.shares_memory(codes, out):
            return codes
        out[: len(codes)] = codes
        return out[: len(codes)]

    def _stored(self, name: str, array: _Array, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        """Elements [start, stop) as they lie in the file."""
        width = array.stored.itemsize
        dtype = STORAGE["BF16"] if array.stored.kind == "V" else array.stored
        place = array.begin + start * width
        if array.member is None:
            return self._file.elements(place, stop - start, dtype, out)
        if array.member.stored:
            return self._file.elements(self._zip.offset(array.member) + place, stop - start, dtype, out)
        result = np.empty(stop - start, dtype) if out is None else out[: stop - start]
        if len(result):
            with self._lock:
                stream = self._streams.get(name)
                if stream is None:
                    stream = self._streams[name] = Unpacked(self._zip, array.member)
                raw = result.view(np.uint8)
                stream.read_into(raw, place)
            if dtype == np.bool_:
                np.not_equal(raw, 0, out=result)
        return result

    def close(self) -> None:
        self._file.close()


def open_file(file: File) -> ArraysFile:
    """The checkpoint in an open NumPy file; a `.npy` file holds one tensor named `array`.

    Raises
    ------
    InputError : broken, cut off, or it holds objects
    """
    return ArraysFile(file)


def _strides(shape: tuple[int, ...], fortran: bool) -> tuple[int, ...]:
    """Strides in elements."""
    lengths = shape if fortran else tuple(reversed(shape))
    strides, step = [], 1
    for length in lengths:
        strides.append(step)
        step *= length
    return tuple(strides if fortran else reversed(strides))


def _read_header(path: str, name: str, head: Any) -> tuple[int, np.dtype[Any], tuple[int, ...], bool]:
    """Bytes before the data, dtype, shape and order, from a function that gives the first bytes."""
    start = head(12)
    broken = InputError(path, f'"{printable(name, 80)}" has no valid array header', "fetch it again, it is broken")
    if start[:6] != _MAGIC or len(start) < 10 or start[6] not in (1, 2, 3):
        raise broken
    wide = start[6] > 1
    if wide and len(start) < 12:
        raise broken
    length = int.from_bytes(start[8:12] if wide else start[8:10], "little")
    begin = (12 if wide else 10) + length
    if length > _MAX_HEADER_BYTES:
        raise broken
    raw = head(begin)[12 if wide else 10 :]
    if len(raw) < length:
        raise broken
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd literals, on stderr
            found = ast.literal_eval(raw.decode("utf-8" if start[6] == 3 else "latin1"))
        stored = np.dtype(found["descr"]) if isinstance(found["descr"], str) else np.dtype(object)
        shape, fortran = tuple(found["shape"]), bool(found["fortran_order"])
    except (ValueError, SyntaxError, TypeError, KeyError, RecursionError, MemoryError) as exc:
        raise broken from exc
    if len(shape) > _MAX_AXES or not all(type(n) is int and 0 <= n < 2**62 for n in shape):
        raise broken
    if math.prod(max(n, 1) for n in shape) * max(stored.itemsize, 1) > 2**62:
        cause = f'"{printable(name, 80)}" declares an array larger than any file'
        raise InputError(path, cause, "fetch it again, it is broken")
    return begin, stored, shape, fortran
