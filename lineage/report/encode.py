"""Records as JSON text that every parser takes: no NaN, no lone surrogates."""

from __future__ import annotations

import json
import math
from typing import Any

import msgspec

__all__ = ["as_json"]


def as_json(document: Any) -> bytes:
    """The record as one indented JSON document; what is not a finite number is null.

    Examples
    --------
    >>> as_json({"p": float("nan")})
    b'{\\n  "p": null\\n}\\n'
    """
    try:
        return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"
    except UnicodeEncodeError:  # a lone surrogate in a name: JSON can hold it as an escape only
        return json.dumps(_finite(msgspec.to_builtins(document)), indent=2).encode("ascii") + b"\n"


def _finite(value: Any) -> Any:
    """The value with None for what is not a finite number."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
