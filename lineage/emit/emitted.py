"""What an emitter gives back."""

from __future__ import annotations

from typing import Any

import msgspec
from numpy.typing import NDArray

__all__ = ["Emitted"]


class Emitted(msgspec.Struct, frozen=True, kw_only=True):
    """A mapping in another form.

    Attributes
    ----------
    text : the file
    arrays : arrays too long for it, by the keys that it reads them by
    unsaid : one line for everything that the form cannot say
    """

    text: str
    arrays: dict[str, NDArray[Any]] = {}
    unsaid: tuple[str, ...] = ()
