"""Zip archives as containers of weights: members found once, stored ones read by position in the file.

`zipfile` reads the directory only; that members lie inside the file and hold what they say is checked here.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

import msgspec

from lineage.checkpoint.files import File, size_words
from lineage.errors import InputError, printable

__all__ = ["Member", "Unpacked", "Zip"]

#: a directory longer than this describes no model (10^5 members take some 10 MB)
_MAX_MEMBERS = 2**19
_MAX_DIRECTORY_BYTES = 24 * 2**20
_LOCAL_HEADER = 30
_PIECE = 2**18


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One file in the archive: its content's size in bytes, and whether it is stored without compression."""

    name: str
    size: int
    stored: bool
    header: int
    packed: int


class Zip:
    """The directory of an archive in an open file.

    Raises
    ------
    InputError : not a zip, cut off, encrypted, or its directory lies
    """

    def __init__(self, file: File) -> None:
        self.file = file
        try:
            infos = zipfile.ZipFile(_Reader(file)).infolist()
        except (zipfile.BadZipFile, struct.error, OSError, ValueError, NotImplementedError, OverflowError) as exc:
            raise InputError(file.path, f"not a whole zip archive ({exc})", "fetch it again, it was cut short") from exc
        if len(infos) > _MAX_MEMBERS:
            raise InputError(file.path, f"{len(infos):,} members in the archive, more than any model has")
        self.members: dict[str, Member] = {}
        for info in infos:
            if info.filename.endswith("/") or not info.filename:
                continue
            self._check(info)
            self.members[info.filename] = Member(
                name=info.filename,
                size=info.file_size,
                stored=info.compress_type == zipfile.ZIP_STORED,
                header=info.header_offset,
                packed=info.compress_size,
            )

    def _check(self, info: zipfile.ZipInfo) -> None:
        """One member against the file and against the members before it."""
        path, name = self.file.path, f'"{printable(info.filename, 80)}"'
        if info.filename in self.members:
            raise InputError(path, f"the archive lists {name} twice")
        if info.flag_bits & 1:
            raise InputError(path, f"{name} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(path, f"{name} is packed by a method that is not read", "pack it again without")
        end = info.header_offset + _LOCAL_HEADER + info.compress_size
        if info.header_offset < 0 or end > self.file.size:
            cause = f"{name} should end at byte {end:,}, the file holds {size_words(self.file.size)}"
            raise InputError(path, cause, "fetch it again, it was cut short")
        if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
            raise InputError(path, f"{name} says two sizes", "fetch it again, it is broken")

    def offset(self, member: Member) -> int:
        """Byte of the file at which a stored member's content begins."""
        head = self.file.read(member.header, _LOCAL_HEADER)
        if head[:4] != b"PK\x03\x04":
            raise InputError(self.file.path, f'no member "{printable(member.name, 80)}" where the directory says')
        name, extra = struct.unpack("<HH", head[26:30])
        begin: int = member.header + _LOCAL_HEADER + name + extra
        if begin + member.packed > self.file.size:
            raise self.file.short(begin + member.packed)
        return begin

    def head(self, member: Member, count: int) -> bytes:
        """The first `count` bytes of the content, fewer where it is shorter."""
        raw = bytearray(min(count, member.size))
        if member.stored:
            self.file.read_into(raw, self.offset(member))
        else:
            Unpacked(self, member).read_into(raw, 0)
        return bytes(raw)


class Unpacked:
    """A compressed member read at positions: forwards it goes on, backwards it starts again."""

    def __init__(self, archive: Zip, member: Member) -> None:
        self._file, self._member = archive.file, member
        self._begin = archive.offset(member)
        self._restart()

    def _restart(self) -> None:
        self._machine = zlib.decompressobj(-zlib.MAX_WBITS)
        self._packed = 0
        self._at = 0

    def read_into(self, raw: Any, place: int) -> None:
        """Fills the writable bytes `raw` with the content at `place`.

        Raises
        ------
        InputError : the content is broken or ends early
        """
        view = memoryview(raw).cast("B")
        if place < self._at:
            self._restart()
        done = 0
        try:
            while self._at < place + len(view):
                # What lies before the range is unpacked and dropped, a piece at a time.
                piece = self._pull(min(place + len(view) - self._at, _PIECE))
                skipped = max(place - self._at, 0)
                kept = piece[skipped:]
                view[done : done + len(kept)] = kept
                done += len(kept)
                self._at += len(piece)
        except (zlib.error, EOFError) as exc:
            self._restart()
            cause = f'"{printable(self._member.name, 80)}" cannot be unpacked ({exc})'
            raise InputError(self._file.path, cause, "fetch it again, it is broken") from exc

    def _pull(self, count: int) -> bytes:
        """At least one and at most `count` more bytes of the content."""
        while True:
            packed = self._machine.unconsumed_tail
            if not packed:
                left = self._member.packed - self._packed
                packed = self._file.read(self._begin + self._packed, min(left, _PIECE))
                self._packed += len(packed)
            piece = self._machine.decompress(packed, count)
            if piece:
                return piece
            if self._machine.eof or (not packed and not self._machine.unconsumed_tail):
                raise EOFError("its data end early")


class _Reader(io.RawIOBase):
    """A `File` as the seekable stream that `zipfile` wants."""

    def __init__(self, file: File) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the file")
        self._at = base + offset
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(self._file.size - self._at, 0)
        count = left if size is None or size < 0 else min(size, left)
        if count > _MAX_DIRECTORY_BYTES:
            raise ValueError("its directory is longer than any model's")
        data = self._file.read(self._at, count) if count else b""
        self._at += count
        return data
