"""Checkpoints: what a path holds, read lazily (`open_checkpoint`), and files written safely (`write`)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineage.checkpoint.base import Checkpoint, TensorSpec
    from lineage.checkpoint.claims import Claim, read_claims
    from lineage.checkpoint.opening import components, open_checkpoint

__all__ = ["Checkpoint", "Claim", "TensorSpec", "components", "open_checkpoint", "read_claims"]

_HOMES = {
    "Checkpoint": "base",
    "Claim": "claims",
    "TensorSpec": "base",
    "components": "opening",
    "open_checkpoint": "opening",
    "read_claims": "claims",
}


def __getattr__(name: str) -> Any:
    """Public names, loaded with NumPy when they are first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
