"""Files of weights, opened once and read by position; nothing that they say of themselves is believed.

A `File` reads with `preadv` into buffers that the caller bounds, from any thread; nothing is mapped, so resident
memory stays flat. Pipes and devices are refused before they are opened, and what people often hold instead of
weights (Git LFS pointers, web pages, empty files) is named. Shard indexes are read here: `read_index`.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError

__all__ = ["File", "json_fault", "read_index", "read_json", "reason", "size_words"]

#: largest JSON beside the weights that is read: an index of 10^5 tensors takes about 10 MB
MAX_JSON_BYTES = 32 * 2**20

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
#: first bytes of things that are not weights: (bytes, what it is, remedy)
_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in its folder"),
    (b"<!doctype", "a web page, not weights", "check the address and your access, then fetch it again"),
    (b"<html", "a web page, not weights", "check the address and your access, then fetch it again"),
    (b"<?xml", "an XML answer of a server, not weights", "check the address and your access, then fetch it again"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first"),
    (b"\xfd7zxz\x00", "an xz archive", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"rar!", "a RAR archive", "unpack it first"),
)


class File:
    """A regular file, open for reading at positions.

    Attributes
    ----------
    path : as it was given
    size : bytes when it was opened

    Raises
    ------
    InputError : missing, not a regular file, not readable, empty, or plainly something else than weights
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        try:
            _refuse_special(self.path, os.stat(self.path).st_mode)
            # Non-blocking: a pipe put in the file's place between the two calls must not hang us.
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as exc:
            raise InputError(self.path, *reason(exc)) from exc
        self._fd = fd
        self.close = weakref.finalize(self, os.close, fd)
        found = os.fstat(fd)
        _refuse_special(self.path, found.st_mode)
        self.size = found.st_size
        if self.size == 0:
            raise InputError(self.path, "the file is empty", "fetch it again")
        head = self.read(0, min(self.size, 64)).lstrip().lower()
        for magic, what, remedy in _LOOKALIKES:
            if head.startswith(magic):
                raise InputError(self.path, f"this is {what}", remedy)

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes at `offset`; for headers, not for data.

        Raises
        ------
        InputError : the file ends before
        """
        if count > self.size - offset:
            raise self.short(offset + count)
        buffer = bytearray(count)
        self.read_into(buffer, offset)
        return bytes(buffer)

    def read_into(self, buffer: Any, offset: int) -> None:
        """Fills the writable contiguous `buffer` with the bytes at `offset`.

        Raises
        ------
        InputError : the file ends before, or the disk fails
        """
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as exc:
                raise InputError(self.path, *reason(exc)) from exc
            if got == 0:
                raise self.short(offset + len(view))
            done += got

    def elements(self, offset: int, count: int, dtype: np.dtype[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """`count` elements of `dtype` at byte `offset`, into `out` where given; the result is 1-D."""
        result = np.empty(count, dtype) if out is None else out[:count]
        if count:
            raw = result.view(np.uint8)
            self.read_into(raw, offset)
            if dtype == np.bool_:
                # Any byte but 0 means true; NumPy computes nonsense with a bool of 2.
                np.not_equal(raw, 0, out=result)
        return result

    def short(self, wanted: int) -> InputError:
        """The error to raise where the file ends before byte `wanted`."""
        try:
            now = os.fstat(self._fd).st_size
        except OSError:
            now = self.size
        if now < self.size:
            cause = f"the file shrank from {size_words(self.size)} to {size_words(now)} while it was read"
            return InputError(self.path, cause, "try again when nothing writes it")
        cause = f"data up to byte {wanted:,} expected, the file holds {size_words(self.size)}"
        return InputError(self.path, cause, "fetch it again, it was cut short")


def _refuse_special(path: str, mode: int) -> None:
    """Only regular files are read."""
    if not stat.S_ISREG(mode):
        kind = next((word for test, word in _KINDS if test(mode)), "something special")
        raise InputError(path, f"this is {kind}, not a file")


def reason(exc: Exception) -> tuple[str, str | None]:
    """Cause and remedy of a failed file operation, in words."""
    code = exc.errno if isinstance(exc, OSError) else None
    table: dict[int | None, tuple[str, str | None]] = {
        errno.ENOENT: ("no such file or folder", None),
        errno.ENOTDIR: ("a part of this path is a file, not a folder", None),
        errno.ELOOP: ("a symbolic link that leads to itself", None),
        errno.EACCES: ("no permission", "check its access rights"),
        errno.EPERM: ("no permission", "check its access rights"),
        errno.EMFILE: ("too many open files", "raise the limit with `ulimit -n 4096`"),
        errno.ENAMETOOLONG: ("the name is too long", None),
        errno.EIO: ("the disk reports an error", None),
        errno.ENOSPC: ("no space left on the disk", "free some space or name another place"),
        errno.EDQUOT: ("the disk quota is used up", "free some space or name another place"),
        errno.EFBIG: ("the file would become larger than this system allows", "free some space or name another place"),
        errno.EROFS: ("the disk is read-only", "name another place"),
        errno.EISDIR: ("this is a folder, not a file", None),
    }
    if code in table:
        return table[code]
    return (exc.strerror or str(exc)) if isinstance(exc, OSError) else f"not a path ({exc})", None


def size_words(count: int) -> str:
    """Bytes in words, three digits at most.

    Examples
    --------
    >>> size_words(812_000_000)
    '812 MB'
    >>> size_words(1536)
    '1.54 kB'
    """
    if count < 1000:
        return f"{count} bytes"
    power = 1
    while count >= 999.5 * 1000**power and power < 6:
        power += 1
    return f"{count / 1000**power:.3g} {('kB', 'MB', 'GB', 'TB', 'PB', 'EB')[power - 1]}"


def read_json(path: str | Path) -> Any:
    """The document in a JSON file beside the weights.

    Raises
    ------
    InputError : it cannot be read or is not JSON (also: nested too deep, numbers too long, over 32 MiB)
    """
    file = File(path)
    if file.size > MAX_JSON_BYTES:
        raise InputError(path, f"{size_words(file.size)} of JSON are more than any index or configuration needs")
    try:
        return json.loads(file.read(0, file.size))
    except RecursionError as exc:
        raise InputError(path, "the JSON is nested too deep") from exc
    except ValueError as exc:
        raise InputError(path, f"not valid JSON ({json_fault(exc)})") from exc
    finally:
        file.close()


def json_fault(exc: ValueError) -> str:
    """What `json` found wrong, in words for a user."""
    if isinstance(exc, json.JSONDecodeError):
        return str(exc)
    return "it is not UTF-8 text" if isinstance(exc, UnicodeDecodeError) else "a number has thousands of digits"


def read_index(path: Path) -> dict[str, str]:
    """The shard (a file name in the index's folder) of every tensor that an index lists.

    Raises
    ------
    InputError : not an index, or it points out of its folder
    """
    document = read_json(path)
    table = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise InputError(path, 'an index needs a "weight_map" from tensor names to file names')
    if not table:
        raise InputError(path, "the index lists no tensor")
    for shard in set(table.values()):
        parts = Path(shard).parts
        if not parts or Path(shard).is_absolute() or ".." in parts or "\0" in shard or "\\" in shard:
            raise InputError(path, f'the index points out of its folder, to "{shard}"', "fetch it again")
    return table
