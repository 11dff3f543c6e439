"""A checkpoint that counts the bytes read from it and stops at a limit: `Metered`, `Meter`, `Spent`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.errors import LineageError

__all__ = ["Meter", "Metered", "Spent"]


class Spent(LineageError):
    """A read would have passed the limit; nothing was read."""


class Meter:
    """Bytes read so far, and how many there may be.

    Parameters
    ----------
    limit : bytes in all

    Attributes
    ----------
    read : bytes of the ranges read so far
    stopped : reads that were refused
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.read, self.stopped = limit, 0, 0
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return max(0, self.limit - self.read)

    def charge(self, count: int) -> None:
        """Counts bytes about to be read.

        Raises
        ------
        Spent : they are more than are left
        """
        with self._lock:
            if self.read + count > self.limit:
                self.stopped += 1
                raise Spent(f"{count} bytes wanted, {self.left} left to read")
            self.read += count

    @contextmanager
    def at_most(self, count: int) -> Iterator[None]:
        """A tighter limit for what happens inside: `count` bytes from here."""
        whole = self.limit
        self.limit = min(whole, self.read + count)
        try:
            yield
        finally:
            self.limit = whole


class Metered(Checkpoint):
    """A checkpoint whose reads are counted before they happen.

    Parameters
    ----------
    whole : what is read from; it stays open as long as this is used
    meter : may be shared between checkpoints

    Notes
    -----
    Counted are the stored bytes of the ranges asked for, not headers. Formats that store blocks, or compress, touch a
    little more than is counted.
    """

    def __init__(self, whole: Checkpoint, meter: Meter) -> None:
        self._whole, self.meter = whole, meter
        self.path, self.format, self.specs = whole.path, whole.format, whole.specs
        self.metadata, self.notes = whole.metadata, whole.notes

    def _charge(self, spec: TensorSpec, start: int, stop: int) -> None:
        self.meter.charge(-(-spec.nbytes * (stop - start) // max(1, spec.size)))

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        self._charge(spec, start, stop)
        return self._whole._codes(spec, start, stop, out)

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        self._charge(spec, start, stop)
        return self._whole._values(spec, start, stop)
