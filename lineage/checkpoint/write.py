"""Files written so that nothing is ever half there: a temporary name in the same folder, then a rename.

`atomic` serves every kind of output, `write_safetensors` streams tensors, in shards with an index where one file
would grow too large. Both refuse to replace an input, whatever link leads to it, and leave nothing behind when the
disk is full or the user interrupts.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE
from lineage.checkpoint.files import reason, size_words
from lineage.checkpoint.formats import by_suffix
from lineage.errors import InputError

__all__ = ["Entry", "atomic", "check_output", "write_safetensors"]

#: what a writer is told of a tensor: name, dtype word, shape
Entry = tuple[str, str, tuple[int, ...]]
#: a tensor's stored codes: an array, or pieces in order
Data = NDArray[Any] | Iterable[bytes | NDArray[Any]]
StrPath = str | os.PathLike[str]


def check_output(path: StrPath, *, inputs: Iterable[StrPath] = ()) -> None:
    """Proves early that `path` can be written and is none of the inputs, nor a file in an input folder.

    Raises
    ------
    InputError : it is an input, a part of it is a file, or its folder is missing or closed to us
    """
    out = Path(path)
    for source in inputs:
        if _same(out, Path(source)):
            raise InputError(out, "the output is an input, which would be lost", "name another file")
    folder = out.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(out, f"{folder} is a file, not a folder", "name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(out, f"no permission to write in {folder}", "name another place")


@contextmanager
def atomic(path: StrPath, *, inputs: Iterable[StrPath] = ()) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    Missing folders above `path` are made, and removed again on failure. Devices and pipes (`/dev/stdout`) are
    handed out as they are.

    Raises
    ------
    InputError : `path` is an input, a folder, below a file, or cannot be written (disk full, no permission)

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(folder + "/note.txt") as part:
    ...         _ = part.write_text("done")
    ...     print((part.parent / "note.txt").read_text())
    done
    """
    out = Path(path)
    check_output(out, inputs=inputs)
    if out.is_dir():
        raise InputError(out, "this is a folder", "name a file in it")
    with _failures(out):
        if out.exists() and not stat.S_ISREG(out.stat().st_mode):
            yield out
            return
        with _temporary(out) as part:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield part
            os.replace(part, out)


def write_safetensors(
    path: StrPath,
    specs: Iterable[Entry],
    data: Callable[[str], Data],
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: float = 5e9,
    inputs: Iterable[StrPath] = (),
) -> None:
    """Writes a safetensors file, or a folder of shards with an index, tensor by tensor.

    Parameters
    ----------
    path : a file; a folder (an existing one, or a name without `.safetensors`) gets `model.safetensors` or shards
    specs : (name, dtype word, shape) of every tensor
    data : for a name its stored codes in C order, whole or in pieces; asked once, in the order of the file
    shard_bytes : a model above this size becomes a folder of shards no larger than it (a tensor is never split)
    inputs : paths that are being read and must stay as they are

    Raises
    ------
    InputError : the output is an input, of another format or cannot be written; nothing is left of it
    ValueError : `data` gave other codes than the spec promises, or a name comes twice
    """
    out = Path(path)
    entries = list(specs)
    if len({name for name, _, _ in entries}) < len(entries):
        raise ValueError("a tensor name comes twice")
    shards = _shards(entries, shard_bytes)
    text = {str(k): str(v) for k, v in (metadata or {}).items()}
    named = by_suffix(out.name)
    if named is not None and named.name != "safetensors" and not out.is_dir():
        raise InputError(out, f"{named.name} files are read, not written", "name a .safetensors file or a folder")
    if len(shards) == 1 and not out.is_dir() and (named or out.exists()):
        with atomic(out, inputs=inputs) as part:
            _write_file(part, entries, data, text)
        return
    check_output(out, inputs=inputs)
    if out.is_dir() and any(by_suffix(name) for name in os.listdir(out)):
        raise InputError(out, "this folder holds weights already", "name a new folder")
    if out.exists() and not out.is_dir():
        raise InputError(out, f"{len(shards)} shards need a folder, this is a file", "name a folder")
    with _failures(out), _temporary(out) as part:
        part.mkdir()
        _write_folder(part, shards, data, text)
        if out.is_dir():
            # The index goes last: without it nobody takes the shards for a whole model.
            for name in sorted(os.listdir(part), key=lambda n: (n.endswith(".json"), n)):
                os.replace(part / name, out / name)
        else:
            os.rename(part, out)


def _same(out: Path, source: Path) -> bool:
    """True where writing `out` would change the input `source` (a file, or a folder with files)."""
    if os.path.realpath(out) == os.path.realpath(source):
        return True
    if not out.exists() or not source.exists():
        return False
    if os.path.samefile(out, source):
        return True
    if not source.is_dir() or not out.is_file():
        return False
    own = out.stat()
    for at, _, files in os.walk(source):
        for name in files:
            with suppress(OSError):
                other = os.stat(os.path.join(at, name))
                if (other.st_dev, other.st_ino) == (own.st_dev, own.st_ino):
                    return True
    return False


@contextmanager
def _failures(out: Path) -> Iterator[None]:
    """Turns failed writes into an `InputError` that names the output."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise InputError(out, *reason(exc)) from exc


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A free name beside `out`; whatever stands there when the block fails is removed, with folders made for it."""
    made = []
    folder = out.parent
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    part = out.parent / f".{out.name[:100]}.{secrets.token_hex(4)}.part"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
    except BaseException:
        _remove(part)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    else:
        _remove(part)


def _remove(part: Path) -> None:
    """Removes a file or a folder of files, whether or not it is there."""
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()


def _shards(entries: Sequence[Entry], limit: float) -> list[list[Entry]]:
    """The entries in order, cut so that no shard exceeds `limit` bytes unless one tensor does."""
    shards: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        size = _bytes(entry)
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(entry)
        held += size
    return shards


def _bytes(entry: Entry) -> int:
    _, dtype, shape = entry
    size = 1
    for length in shape:
        size *= length
    return size * STORAGE[dtype].itemsize


def _write_folder(
    folder: Path, shards: list[list[Entry]], data: Callable[[str], Data], metadata: dict[str, str]
) -> None:
    """`model.safetensors`, or numbered shards and their index as transformers names them."""
    if len(shards) == 1:
        _write_file(folder / "model.safetensors", shards[0], data, metadata)
        return
    table = {}
    for number, entries in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(folder / name, entries, data, metadata)
        table.update({entry[0]: name for entry in entries})
    total = sum(_bytes(entry) for entries in shards for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(path: Path, entries: Sequence[Entry], data: Callable[[str], Data], metadata: dict[str, str]) -> None:
    """One file: header, then every tensor's codes; wide elements first, so that all of them lie aligned."""
    ordered = sorted(entries, key=lambda entry: -STORAGE[entry[1]].itemsize)
    head: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in ordered:
        name, dtype, shape = entry
        head[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + _bytes(entry)]}
        at += _bytes(entry)
    text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb", buffering=0) as file:
        _write_all(file.fileno(), struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            _write_tensor(file.fileno(), entry, data(entry[0]))


def _write_tensor(fd: int, entry: Entry, data: Data) -> None:
    """One tensor's codes, counted."""
    name, dtype, _ = entry
    written = 0
    for piece in [data] if isinstance(data, np.ndarray) else data:
        if isinstance(piece, np.ndarray):
            if piece.dtype != STORAGE[dtype]:
                raise ValueError(f"{name}: {piece.dtype} codes for {dtype}")
            piece = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        written += _write_all(fd, piece)
    if written != _bytes(entry):
        raise ValueError(f"{name}: {size_words(written)} given, {size_words(_bytes(entry))} promised")


def _write_all(fd: int, data: Any) -> int:
    """Writes all bytes; returns how many."""
    view = memoryview(data)
    if view.nbytes == 0:
        return 0
    view = view.cast("B")
    done = 0
    while done < len(view):
        done += os.write(fd, view[done:])
    return done
