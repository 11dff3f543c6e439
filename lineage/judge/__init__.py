"""Decides whether B's weights come from A's, and says why: `judge`."""

from __future__ import annotations

from typing import Any

__all__ = ["Verdict", "judge"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lineage.judge import verdict

        return getattr(verdict, name)
    raise AttributeError(name)
