"""Adapters: read and written in every format, carried through mappings, extracted, merged, resized, added, checked."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lineage.lora.checking import check
    from lineage.lora.converting import convert
    from lineage.lora.extraction import extract
    from lineage.lora.inspection import inspect
    from lineage.lora.keymap import key_map
    from lineage.lora.merging import merge
    from lineage.lora.sums import add, resize

__all__ = ["add", "check", "convert", "extract", "inspect", "key_map", "merge", "resize"]

_HOMES = {
    "add": "sums",
    "check": "checking",
    "convert": "converting",
    "extract": "extraction",
    "inspect": "inspection",
    "key_map": "keymap",
    "merge": "merging",
    "resize": "sums",
}


def __getattr__(name: str) -> Any:
    """Public names, loaded with NumPy when they are first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
