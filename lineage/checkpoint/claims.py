"""What a checkpoint says of its own origin: model card, configuration, metadata. Repeated, never believed.

Which keys count is data (`mappings/claims.yaml`). Broken or hostile documents cost a note, not the answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lineage.checkpoint.base import Checkpoint
from lineage.checkpoint.catalog import plain_yaml, read_data
from lineage.checkpoint.files import File, read_json
from lineage.errors import InputError, printable

__all__ = ["Claim", "read_claims"]

#: front matter of a model card is a few lines at its top
_MAX_CARD_BYTES = 2**16
_LONGEST = 300
_MOST = 100


class Claim(msgspec.Struct, frozen=True):
    """One statement: where it stands, and what it says."""

    source: str
    says: str


class _Places(msgspec.Struct, frozen=True, rename={"adapter": "adapter_config.json", "config": "config.json"}):
    """`mappings/claims.yaml`."""

    card: tuple[str, ...]
    metadata: tuple[str, ...]
    adapter: tuple[str, ...]
    config: tuple[str, ...]


def read_claims(checkpoint: Checkpoint) -> tuple[tuple[Claim, ...], tuple[str, ...]]:
    """What the files of a checkpoint say of its origin, and notes on documents that could not be read.

    Documents are looked for in the checkpoint's folder and its components' folders; a file that is named alone
    speaks only through its own metadata.
    """
    places = read_data("claims.yaml", _Places)
    claims: dict[Claim, None] = {}
    notes: list[str] = []
    for source, says in _metadata(checkpoint, places.metadata):
        claims.setdefault(Claim(source, says))
    folder = Path(checkpoint.path)
    if folder.is_dir():
        parts = [name for name in checkpoint.components if name and (folder / name).is_dir()]
        for place in ("", *parts):
            for claim in _documents(folder / place, f"{place}/" if place else "", places, notes):
                claims.setdefault(claim)
    return tuple(claims)[:_MOST], tuple(notes)


def _metadata(checkpoint: Checkpoint, patterns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Statements in the weights files' own text pairs."""
    known = re.compile("|".join(patterns))
    for key, value in checkpoint.metadata.items():
        if known.fullmatch(key.rpartition("/")[2]):
            for says in _texts(value):
                yield f"{checkpoint.format} metadata {printable(key, 100)}", says


def _documents(folder: Path, shown: str, places: _Places, notes: list[str]) -> Iterator[Claim]:
    """Statements of the documents in one folder."""
    for name, keys in (("config.json", places.config), ("adapter_config.json", places.adapter)):
        if os.path.lexists(folder / name):
            try:
                document = read_json(folder / name)
            except InputError as exc:
                notes.append(f"{shown}{name} is left out: {exc.cause}")
                continue
            yield from _stated(document, keys, shown + name)
    if os.path.lexists(folder / "README.md"):
        try:
            document = _front_matter(folder / "README.md")
        except (InputError, ValueError) as exc:
            cause = exc.cause if isinstance(exc, InputError) else printable(str(exc), 100)
            notes.append(f"the front matter of {shown}README.md is left out: {cause}")
            return
        yield from _stated(document, places.card, f"{shown}README.md")


def _stated(document: Any, keys: tuple[str, ...], source: str) -> Iterator[Claim]:
    """The statements under `keys` of a document of whatever type."""
    if isinstance(document, dict):
        for key in keys:
            for says in _texts(document.get(key)):
                yield Claim(f"{source} {key}", says)


def _texts(value: Any) -> list[str]:
    """The texts that a value holds: itself, or the entries of a list."""
    entries = value if isinstance(value, list) else [value]
    found = [printable(entry.strip(), _LONGEST) for entry in entries[:_MOST] if isinstance(entry, str)]
    return [text for text in found if text and text.lower() not in ("none", "null")]


def _front_matter(path: Path) -> Any:
    """The YAML between the first two `---` lines of a model card, None where there is none."""
    if path.is_file() and path.stat().st_size == 0:
        return None
    file = File(path)
    try:
        text = file.read(0, min(file.size, _MAX_CARD_BYTES)).decode("utf-8", "replace")
    finally:
        file.close()
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", text, re.DOTALL | re.MULTILINE)
    return plain_yaml(match[1]) if match else None
