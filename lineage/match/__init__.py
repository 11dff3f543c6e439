"""Finds the mapping between two layouts of one model: `find_mapping`."""

from __future__ import annotations

from typing import Any

__all__ = ["check", "find_mapping"]


def __getattr__(name: str) -> Any:
    if name == "find_mapping":
        from lineage.match.finder import find_mapping

        return find_mapping
    if name == "check":
        from lineage.match.certify import check

        return check
    raise AttributeError(name)
