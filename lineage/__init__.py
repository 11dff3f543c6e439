"""Does model B come from model A, how, and can what was made for A be used with B?

`open`, `map`, `apply`, `diff`, `investigate` and `check` are the steps of the command line, as functions that return
typed records. They are loaded when they are first used: `import lineage` loads neither NumPy nor torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lineage.version import __version__

if TYPE_CHECKING:
    from lineage.api import apply, check, diff, investigate, map, open
    from lineage.errors import InputError, LineageError

__all__ = ["InputError", "LineageError", "__version__", "apply", "check", "diff", "investigate", "map", "open"]


def __getattr__(name: str) -> Any:
    """Public names, each with the modules that it needs."""
    if name in ("InputError", "LineageError"):
        from lineage import errors

        return getattr(errors, name)
    if name in __all__:
        from lineage import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
