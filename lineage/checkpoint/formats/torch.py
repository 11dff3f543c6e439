"""PyTorch files (`.pt .pth .bin .ckpt`): zip archives and the older stream format, read without torch.

The pickle inside only describes tensors; `lineage.checkpoint.pickles` reads it without running anything, and the
storages are read by position. Which of the nested dictionaries is the model is decided in `unwrap`.
Formats: torch/serialization.py (_save, _legacy_save) and torch/_utils.py (_rebuild_*) of PyTorch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import msgspec
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import STORAGE
from lineage.checkpoint.files import File, size_words
from lineage.checkpoint.nested import unwrap
from lineage.checkpoint.pickles import MAX_BYTES, Cursor, Global, Thing, load
from lineage.checkpoint.strided import contiguous, gather, span
from lineage.checkpoint.zips import Member, Zip
from lineage.errors import InputError, printable

__all__ = ["TorchFile", "open_file"]

#: first pickle of the stream format (torch/serialization.py MAGIC_NUMBER)
_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_AXES = 64
#: larger views of a smaller storage (expanded tensors) are not believed
_MAX_EXPANDED = 2**24

#: torch's dtype words
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0", "complex64": "C64", "complex128": "C128",
}  # fmt: skip
#: storage classes' words
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64", "ComplexDouble": "C128", "Untyped": "U8",
    "QInt8": "I8", "QUInt8": "U8", "QInt32": "I32", "QUInt4x2": "U8", "QUInt2x4": "U8",
}  # fmt: skip
#: complex numbers are read as pairs of reals on one more axis
_COMPLEX = {"C64": "F32", "C128": "F64"}


class _Storage(msgspec.Struct, frozen=True):
    """A stretch of numbers that tensors are views of."""

    key: str
    word: str
    nbytes: int


class _Tensor(msgspec.Struct, frozen=True):
    """A view: first element, shape and strides in elements of `word`; `why` says what cannot be read."""

    storage: _Storage
    word: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    why: str = ""


class TorchFile(Checkpoint):
    """One PyTorch file."""

    format = "torch"

    def __init__(self, file: File, root: Any, places: Callable[[_Storage], int], metadata: dict[str, str]) -> None:
        self.path, self._file, self._places, self.metadata = file.path, file, places, metadata
        tensors, self.notes = unwrap(file.path, root, lambda value: isinstance(value, _Tensor))
        if not tensors:
            raise InputError(file.path, "this pickle holds no tensors", "name the file with the weights")
        self._begin: dict[str, int] = {}
        self._views: dict[str, _Tensor] = {}
        self.specs = {name: self._spec(name, view) for name, view in tensors.items()}

    def _spec(self, name: str, view: _Tensor) -> TensorSpec:
        """The spec of a view, proved to lie inside its storage and the storage inside the file."""
        path, quoted = self.path, f'"{printable(name, 80)}"'
        if view.why:
            raise InputError(path, f"{quoted} is {view.why}, which is not read", "save it as plain tensors")
        word, shape, strides, offset = view.word, view.shape, view.strides, view.offset
        if word in _COMPLEX:
            word, shape, offset = _COMPLEX[word], (*shape, 2), 2 * offset
            strides = (*(2 * stride for stride in strides), 1)
        width, size = STORAGE[word].itemsize, math.prod(shape)
        held = view.storage.nbytes // width
        whole = math.prod(max(n, 1) for n in shape)
        if whole > 2**62 or size > max(held, _MAX_EXPANDED):
            raise InputError(path, f"{quoted}: shape {_short(shape)} is larger than its storage of {held:,} elements")
        if size and offset + span(shape, strides) > held:
            cause = f"{quoted} reaches beyond its storage of {held:,} elements"
            raise InputError(path, cause, "fetch it again, it is broken")
        self._begin[name] = self._places(view.storage) + offset * width
        self._views[name] = view
        if word in STORAGE and view.word in _COMPLEX:
            self._views[name] = _Tensor(view.storage, word, offset, shape, strides)
        return TensorSpec(name=name, shape=shape, dtype=word, nbytes=size * width, file=path)

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        storage, begin, strides = STORAGE[spec.dtype], self._begin[spec.name], self._views[spec.name].strides
        width = storage.itemsize
        if contiguous(spec.shape, strides):
            return self._file.elements(begin + start * width, stop - start, storage, out)

        def read(low: int, high: int) -> NDArray[Any]:
            return self._file.elements(begin + low * width, high - low, storage)

        codes = gather(read, storage, spec.shape, strides, start, stop)
        if out is None:
            return codes
        out[: len(codes)] = codes
        return out[: len(codes)]

    def close(self) -> None:
        self._file.close()


def open_file(file: File) -> TorchFile:
    """The checkpoint in an open PyTorch file.

    Raises
    ------
    InputError : broken, cut off, wants to run code, or holds tensors that are not plain
    """
    head = file.read(0, min(file.size, 512))
    if head[:4] == b"PK\x03\x04":
        return _open_zip(file)
    if head[257:262] == b"ustar":
        raise InputError(file.path, "a tar archive of torch before 0.2", "load and save it with a newer torch")
    return _open_stream(file)


def _open_zip(file: File) -> TorchFile:
    """The archive format: `NAME/data.pkl` and one member for every storage."""
    archive = Zip(file)
    found = [name for name in archive.members if name == "data.pkl" or name.endswith("/data.pkl")]
    if not found:
        raise InputError(file.path, "a zip archive without data.pkl, not of torch", "unpack it or name another file")
    prefix = min(found, key=len).removesuffix("data.pkl")
    pickle = archive.members[prefix + "data.pkl"]
    if pickle.size > MAX_BYTES:
        raise InputError(file.path, f"a description of {size_words(pickle.size)}, more than any model needs")
    order = archive.members.get(prefix + "byteorder")
    if order and archive.head(order, 16).strip() == b"big":
        raise InputError(file.path, "numbers in big-endian order", "load and save it with torch on a common computer")

    def member(storage: _Storage) -> Member:
        entry = archive.members.get(f"{prefix}data/{storage.key}")
        if entry is None:
            raise InputError(file.path, f'storage "{printable(storage.key, 40)}" is missing', "fetch it again")
        return entry

    def place(storage: _Storage) -> int:
        entry = member(storage)
        if not entry.stored:
            raise InputError(file.path, "its storages are compressed", "load and save it with torch")
        if entry.size < storage.nbytes:
            cause = f'storage "{printable(storage.key, 40)}" should hold {size_words(storage.nbytes)}'
            raise InputError(file.path, f"{cause}, it holds {size_words(entry.size)}", "fetch it again, it is broken")
        return archive.offset(entry) if entry.size else 0

    if pickle.stored:
        begin = archive.offset(pickle)
        cursor = Cursor(file.read, begin, begin + pickle.size)
    else:
        content = archive.head(pickle, pickle.size)
        cursor = Cursor(lambda at, count: content[at : at + count], 0, len(content))
    root = load(file.path, cursor, _CALLS, _persistent)
    return TorchFile(file, root, _cached(place), {})


def _open_stream(file: File) -> TorchFile:
    """The format before 1.6: five pickles, then every storage as a count and its bytes."""
    cursor = Cursor(file.read, 0, file.size)
    storages: dict[str, _Storage] = {}

    def persistent(token: Any) -> Any:
        if isinstance(token, tuple) and len(token) > 1 and token[0] == "module":
            return token[1]  # a module's class, with its source code, which nobody needs
        storage = _persistent(token)
        known = storages.setdefault(storage.key, storage)
        if known.word != storage.word or known.nbytes != storage.nbytes:
            raise ValueError("one storage described twice")
        return known

    first = load(file.path, cursor, _CALLS, persistent)
    if not isinstance(first, int) or first != _MAGIC:
        cause = "a pickle, but not one that torch wrote"
        raise InputError(file.path, cause, "save the tensors with torch.save or as safetensors")
    load(file.path, cursor, _CALLS, persistent)
    system = load(file.path, cursor, _CALLS, persistent)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise InputError(file.path, "numbers in big-endian order", "load and save it with torch on a common computer")
    root = load(file.path, cursor, _CALLS, persistent)
    keys = load(file.path, cursor, _CALLS, persistent)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise InputError(file.path, "the list of storages is broken", "fetch it again")
    places: dict[str, int] = {}
    at = cursor.tell()
    for key in keys:
        if key not in storages:
            raise InputError(file.path, f'storage "{printable(key, 40)}" belongs to no tensor', "fetch it again")
        nbytes = storages[key].nbytes
        if at + 8 + nbytes > file.size:
            cause = f"storages up to byte {at + 8 + nbytes:,}, the file holds {size_words(file.size)}"
            raise InputError(file.path, cause, "fetch it again, it was cut short")
        places[key] = at + 8
        at += 8 + nbytes

    def place(storage: _Storage) -> int:
        if storage.key not in places:
            raise InputError(file.path, f'storage "{printable(storage.key, 40)}" is missing', "fetch it again")
        return places[storage.key]

    return TorchFile(file, root, place, {})


def _cached(place: Callable[[_Storage], int]) -> Callable[[_Storage], int]:
    """`place` asked once for a storage, however many tensors share it."""
    known: dict[str, int] = {}

    def ask(storage: _Storage) -> int:
        if storage.key not in known:
            known[storage.key] = place(storage)
        return known[storage.key]

    return ask


def _persistent(token: Any) -> _Storage:
    """The storage of a persistent id: ("storage", class, key, location, elements, …)."""
    if not isinstance(token, tuple) or len(token) < 5 or token[0] != "storage":
        raise ValueError("a persistent id that is no storage")
    _, kind, key, _, count = token[:5]
    if len(token) > 5 and token[5] is not None:
        raise ValueError("a storage that is a view of another")
    match = re.fullmatch(r"(\w+?)Storage", kind.name) if isinstance(kind, Global) else None
    word = _STORAGES.get(match[1]) if match else None
    if word is None or not isinstance(key, (str, int)) or type(count) is not int or not 0 <= count < 2**62:
        raise ValueError(f"a storage of class {kind}")
    return _Storage(str(key), word, count * _width(word))


def _width(word: str) -> int:
    return 2 * STORAGE[_COMPLEX[word]].itemsize if word in _COMPLEX else STORAGE[word].itemsize


def _rebuild(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> _Tensor:
    """torch._utils._rebuild_tensor and _v2: a view of a typed storage."""
    del rest
    return _view(storage, storage.word, offset, shape, strides)


def _rebuild_typed(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> _Tensor:
    """torch._utils._rebuild_tensor_v3: the dtype stands apart, the storage is bytes."""
    del grad, hooks, rest
    word = _DTYPES.get(dtype.name)
    if word is None:
        return _odd(f"of type {dtype}")
    return _view(storage, word, offset, shape, strides)


def _view(storage: Any, word: str, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """A view of a storage with plausible numbers."""
    if not isinstance(storage, _Storage) or len(shape) > _MAX_AXES or len(shape) != len(strides):
        raise ValueError("a tensor with impossible axes")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *strides)):
        raise ValueError("a tensor with impossible numbers")
    return _Tensor(storage, word, offset, tuple(shape), tuple(strides))


def _odd(why: str) -> _Tensor:
    """A tensor that is more than numbers in a row; refused where the model needs it."""
    return _Tensor(_Storage("", "U8", 0), "U8", 0, (), (), why)


def _parameter(value: Any, *rest: Any) -> Any:
    """torch._utils._rebuild_parameter: the tensor itself."""
    del rest
    return value


def _from_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor of a subclass."""
    del kind, state
    handler = _CALLS.get((function.module, function.name))
    if handler is None:
        raise ValueError(f"a tensor made by {function}")
    return handler(*args)


def _numpy_tensor(*args: Any) -> _Tensor:
    del args
    return _odd("a tensor kept as a NumPy array")


def _latin(text: Any, encoding: Any = "latin1") -> Any:
    """_codecs.encode, which protocol 2 uses for bytes; nobody asks for them, so they stay text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in another encoding")
    return text


def _table(*args: Any) -> Any:
    """A dictionary of any kind from its first items: another one, or Python 2's list of pairs."""
    pairs = args[-1] if args else ()
    if isinstance(pairs, dict):
        return pairs
    table: dict[str, Any] = {}
    if isinstance(pairs, list):
        for pair in pairs:
            if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not isinstance(pair[0], str):
                raise ValueError("a dictionary of other things than pairs")
            table[pair[0]] = pair[1]
        # Used up: a pickle could ask for the same long list a million times.
        pairs.clear()
    return table


def _first(*args: Any) -> Any:
    """A sequence from its only argument, which it is already."""
    return args[0] if args and isinstance(args[0], (list, tuple)) else ()


_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch.nn.parameter", "Parameter"): _parameter,
    ("torch.nn.parameter", "Buffer"): _parameter,
    ("torch._utils", "_rebuild_qtensor"): lambda *args: _odd("a quantised tensor of torch"),
    ("torch._utils", "_rebuild_sparse_tensor"): lambda *args: _odd("a sparse tensor"),
    ("torch._utils", "_rebuild_sparse_csr_tensor"): lambda *args: _odd("a sparse tensor"),
    ("torch._utils", "_rebuild_nested_tensor"): lambda *args: _odd("a nested tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"): lambda *args: _odd("a tensor without data"),
    ("torch._utils", "_rebuild_wrapper_subclass"): lambda *args: _odd("a tensor of a special class"),
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): _numpy_tensor,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    ("torch", "Size"): _first,
    ("torch", "device"): lambda *args: Thing(Global("torch", "device"), args),
    ("torch", "Generator"): lambda *args: Thing(Global("torch", "Generator"), args),
    ("torch.serialization", "_get_layout"): lambda *args: Thing(Global("torch", "layout"), args),
    ("collections", "OrderedDict"): _table,
    ("collections", "defaultdict"): _table,
    ("collections", "Counter"): _table,
    ("collections", "deque"): lambda *args: args[0] if args and isinstance(args[0], list) else [],
    ("_codecs", "encode"): _latin,
}


def _short(shape: tuple[int, ...]) -> str:
    return f"({', '.join(map(str, shape[:8]))}{', …' if len(shape) > 8 else ''})"
