"""What a long job tells whoever watches it; `Progress` itself shows nothing."""

from __future__ import annotations

__all__ = ["Progress"]


class Progress:
    """Told where a job stands: `step` names what is done now, `count` says how much of it."""

    def step(self, name: str) -> None:
        """Another step begins."""

    def count(self, done: int, total: int) -> None:
        """`done` of `total` of the present step."""
