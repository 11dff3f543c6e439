"""Adapters stored: safetensors, PEFT's and MLX's folders, GGUF; nothing is half there, and all is checked first."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lineage.checkpoint.write import atomic, check_output, write_safetensors
from lineage.errors import InputError
from lineage.lora.grammar import grammar
from lineage.lora.source import CONFIG
from lineage.lora.writing import Written

__all__ = ["store"]

#: file of the factors in a folder
_FACTORS = {"peft": "adapter_model.safetensors", "mlx": "adapters.safetensors"}
#: GGUF: type numbers of tensors and of values, bytes that data are aligned to (ggml.h, gguf.md of the ggml project)
_GGML = {"F32": 0, "F16": 1, "F64": 28, "BF16": 30}
_TEXT, _FLOAT32, _ALIGNMENT = 8, 6, 32


def store(
    written: Written, out: str | os.PathLike[str], check: Callable[[Path], None], *, inputs: Sequence[str | Path] = ()
) -> None:
    """Writes the adapter beside its place, has it checked there, and moves it.

    Parameters
    ----------
    check : given the temporary path, raises where the adapter is not what it should be
    inputs : paths that are being read and must stay as they are

    Raises
    ------
    InputError : the output is an input, or cannot be written
    """
    place = Path(out)
    container = grammar(written.format).container
    if container == "folder" or (written.format == "mlx" and place.suffix == ""):
        _store_folder(written, place, check, inputs)
        return
    with atomic(place, inputs=inputs) as part:
        if container == "gguf":
            _write_gguf(part, written)
        else:
            _write_safetensors(part, written)
        check(part)


def _store_folder(written: Written, place: Path, check: Callable[[Path], None], inputs: Sequence[str | Path]) -> None:
    check_output(place, inputs=inputs)
    if place.exists() and not place.is_dir():
        raise InputError(place, f"{written.format} writes a folder, this is a file", "name a folder")
    if place.is_dir() and (
        other := [n for n in os.listdir(place) if n not in (CONFIG, _FACTORS[written.format], "README.md")]
    ):
        raise InputError(place, f"this folder holds other files ({other[0]})", "name a new folder")
    part = place.parent / f".{place.name[:100]}.{secrets.token_hex(4)}.part"
    made = [p for p in (place.parent, *place.parent.parents) if not p.exists()]
    try:
        part.mkdir(parents=True)
        _write_safetensors(part / _FACTORS[written.format], written)
        (part / CONFIG).write_text(json.dumps(written.config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        check(part)
        if place.is_dir():
            for name in (_FACTORS[written.format], CONFIG):
                os.replace(part / name, place / name)
        else:
            os.rename(part, place)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    shutil.rmtree(part, ignore_errors=True)


def _write_safetensors(path: Path, written: Written) -> None:
    entries = [(key, e.dtype, e.codes.shape) for key, e in written.entries.items()]
    write_safetensors(path, entries, lambda key: written.entries[key].codes, metadata=written.header, shard_bytes=1e18)


def _write_gguf(path: Path, written: Written) -> None:
    """A GGUF file of version 3: key table, descriptions of the tensors, aligned data."""
    pairs = {"general.type": "adapter", "adapter.type": "lora", **written.header}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(written.entries), len(pairs) + len(written.numbers))]
    for key, text in pairs.items():
        head += [_gguf_text(key), struct.pack("<I", _TEXT), _gguf_text(text)]
    for key, number in written.numbers.items():
        head += [_gguf_text(key), struct.pack("<If", _FLOAT32, number)]
    at, blobs = 0, []
    for key, entry in written.entries.items():
        raw = np.ascontiguousarray(entry.codes).tobytes()
        shape = entry.codes.shape[::-1]
        head += [_gguf_text(key), struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, _GGML[entry.dtype], at)]
        blobs.append(raw + b"\0" * (-len(raw) % _ALIGNMENT))
        at += len(blobs[-1])
    start = b"".join(head)
    with open(path, "wb") as file:
        file.write(start + b"\0" * (-len(start) % _ALIGNMENT))
        file.writelines(blobs)


def _gguf_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
