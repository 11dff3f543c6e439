"""One relation that was found."""

from __future__ import annotations

import msgspec

__all__ = ["Finding"]


class Finding(msgspec.Struct, frozen=True):
    """A relation between two related checkpoints.

    Attributes
    ----------
    tag : word of the contract
    strength : share of what was looked at that shows it, 0 to 1
    sentence : for people, with the figures it rests on
    """

    tag: str
    strength: float
    sentence: str
