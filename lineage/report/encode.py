"""Records as JSON text that every parser takes: no NaN, no lone surrogates."""

from __future__ import annotations

import json
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
        text = msgspec.json.encode(document)
    except UnicodeEncodeError:  # a lone surrogate in a name: JSON can hold it as an escape only
        text = json.dumps(msgspec.to_builtins(document)).encode("ascii")
    return msgspec.json.format(text, indent=2) + b"\n"
