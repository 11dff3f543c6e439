"""`open_checkpoint`: one answer for a file, a folder of shards, a Hugging Face folder, a pipeline folder.

Which of a folder's files are the weights is decided here; how a file is read is its format's business. Where a
folder holds several formats the first of `FORMATS` wins and the others are not even opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from lineage.checkpoint.base import Checkpoint, Joined
from lineage.checkpoint.catalog import read_data
from lineage.checkpoint.files import read_index, read_json, reason
from lineage.checkpoint.formats import FORMATS, Format, by_suffix, open_file
from lineage.checkpoint.scaled import decode_scales
from lineage.errors import InputError, printable

__all__ = ["components", "open_checkpoint"]

#: file that lists the components of a diffusers pipeline
PIPELINE_INDEX = "model_index.json"
#: `model-00001-of-00003.safetensors`, `shard_0001_of_3.bin`
_NUMBERED = re.compile(r"(?P<stem>.*?)[-_.]?(?P<number>\d{1,6})[-_]of[-_](?P<total>\d{1,6})(?P<rest>\.[^/]*)$")
#: pickles that trainers leave beside the weights; they hold no model
_NOT_WEIGHTS = re.compile(
    r"(training_args|optimizer|scheduler|rng_state|scaler|trainer_state|random_states)[^/]*\.(bin|pt|pth|pkl)$"
)
#: precision or training variants that some folders hold besides the main file
_VARIANT = re.compile(r"[._-](fp16|fp32|bf16|fp8|non_ema|ema|int8)(?=[._-])", re.IGNORECASE)
#: file stems that libraries load by default, best first
_MAIN = ("model", "diffusion_pytorch_model", "pytorch_model", "adapter_model", "weights")
#: what a folder of a format that is not read here contains
_UNREAD = {
    "_METADATA": "an Orbax checkpoint",
    "manifest.ocdbt": "an Orbax checkpoint",
    "_CHECKPOINT_METADATA": "an Orbax checkpoint",
    ".metadata": "a distributed torch checkpoint",
    "saved_model.pb": "a TensorFlow SavedModel",
}


def open_checkpoint(path: str | os.PathLike[str], *, headers: bool = False) -> Checkpoint:
    """The checkpoint at `path`: a file or a folder. Reads headers only.

    Parameters
    ----------
    path : weights file, folder of shards with or without index, Hugging Face folder, or pipeline folder, whose
        tensors are then named `component/name`
    headers : nothing but headers will be read, so files that hold no more are welcome

    Raises
    ------
    InputError : there is nothing that can be read; the message names the file and the cause
    """
    text = os.fspath(path)
    if re.match(r"(hf|https?|s3|gs)://", text):
        raise InputError(text, "addresses are not read", "download it and name the file or folder")
    try:
        folder = os.path.isdir(text)
    except ValueError as exc:
        raise InputError(text, *reason(exc)) from exc
    opened = _open_folder(Path(text)) if folder else _open_named(Path(text))
    if opened.cut is not None and not headers:
        opened.close()
        raise opened.cut
    return _bundled(decode_scales(opened, block=_block_size(Path(text)) if folder else None))


def components(path: str | os.PathLike[str]) -> dict[str, Checkpoint]:
    """The parts of the checkpoint at `path` by name, each with names of its own; {"": …} where it is one network."""
    whole = open_checkpoint(path)
    names = whole.components
    return {"": whole} if names == ("",) else {name: whole.component(name) for name in names}


def _open_folder(folder: Path) -> Checkpoint:
    """A pipeline's components, or the weights that stand directly in the folder."""
    names = _listing(folder)
    weights = {f.name: found for f in FORMATS if (found := _weights(folder, names, f))}
    parts = [] if weights and PIPELINE_INDEX not in names else _component_folders(folder, names)
    if parts:
        notes = [f"{folder}: the components are read, {_listed(sum(weights.values(), []))} is not"] if weights else []
        opened = [(part.name, _open_weights(part, _listing(part))) for part in parts]
        return _join(folder, opened, notes)
    return _open_weights(folder, names)


def _open_weights(folder: Path, names: list[str]) -> Checkpoint:
    """The weights that stand directly in `folder`."""
    found = [(f, weights) for f in FORMATS if (weights := _weights(folder, names, f))]
    if not found:
        what = next((what for name, what in _UNREAD.items() if name in names), None)
        if what:
            raise InputError(folder, f"this is {what}, which is not read", "convert it to safetensors")
        raise InputError(folder, "no weights in this folder", "name a folder or a file that holds some")
    (first, chosen), others = found[0], sum((weights for _, weights in found[1:]), [])
    notes = [f"{_listed(others)} in the same folder is not read: {first.name} goes before"] if others else []
    return _open_format(folder, chosen, notes)


def _weights(folder: Path, names: list[str], wanted: Format) -> list[str]:
    """Indexes and weight files of one format in the folder."""
    found = []
    for name in names:
        plain = name.removesuffix(".index.json")
        if by_suffix(plain) is wanted and not _NOT_WEIGHTS.search(name) and not os.path.isdir(folder / name):
            found.append(name)
    return found


def _open_format(folder: Path, names: list[str], notes: list[str]) -> Checkpoint:
    """One model from the files of one format: by index, by number, by usual name, or all that there are."""
    main = [n for n in names if not _VARIANT.search(n)] or names
    indexes = sorted((n for n in main if n.endswith(".index.json")), key=lambda n: (_rank(n), len(n), n))
    files = [n for n in main if not n.endswith(".index.json")]
    if indexes:
        index, used = indexes[0], read_index(folder / indexes[0])
        chosen = sorted(set(used.values()))
        _complete(folder / index, [folder / shard for shard in chosen])
        opened = _join(folder, [("", open_file(str(folder / shard))) for shard in chosen], notes)
        _check_index(folder / index, used, opened)
        return _told(opened, notes, names, [index, *chosen])
    numbered = _numbered(folder, files)
    usual = sorted((n for n in files if _rank(n) < len(_MAIN)), key=lambda n: (_rank(n), n))
    chosen = numbered or (usual[:1] if usual else sorted(files))
    if len(chosen) == 1:
        single = open_file(str(folder / chosen[0]))
        return _told(Joined(str(folder), [("", single)], notes=notes), notes, names, chosen)
    return _told(_join(folder, [("", open_file(str(folder / name))) for name in chosen], notes), notes, names, chosen)


def _numbered(folder: Path, files: Iterable[str]) -> list[str]:
    """The files of the best complete series `…-00001-of-0000N…`, [] where none is numbered."""
    series: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in files:
        if match := _NUMBERED.fullmatch(name):
            key = (match["stem"], match["rest"], int(match["total"]))
            series.setdefault(key, {})[int(match["number"])] = name
    if not series:
        return []
    (stem, rest, total), found = min(series.items(), key=lambda item: (_rank(item[0][0] + item[0][1]), item[0]))
    first = 0 if 0 in found else 1
    missing = [n for n in range(first, min(first + total, 10**4)) if n not in found]
    if missing:
        name = f"{stem}-{missing[0]:05}-of-{total:05}{rest}"
        cause = f"{len(missing)} of {total} shards are missing, the first is {name}"
        raise InputError(folder, cause, "fetch the folder again")
    return [found[n] for n in sorted(found)]


def _rank(name: str) -> int:
    """Place of the file's stem among the names that libraries load by default."""
    stem = name.split(".")[0]
    return _MAIN.index(stem) if stem in _MAIN else len(_MAIN)


def _complete(index: Path, shards: list[Path]) -> None:
    """Every shard of the index is there."""
    missing = [shard.name for shard in shards if not os.path.lexists(shard)]
    if missing:
        cause = f"the index names {missing[0]}, which is not in the folder"
        if len(missing) > 1:
            cause += f" (nor {len(missing) - 1} others)"
        raise InputError(index, cause, "fetch the missing shards")


def _check_index(index: Path, used: dict[str, str], opened: Checkpoint) -> None:
    """Every tensor of the index is where it says."""
    for name, shard in used.items():
        spec = opened.specs.get(name)
        if spec is None:
            cause = f'the index promises "{printable(name, 80)}" in {shard}, which does not hold it'
            raise InputError(index, cause, "fetch the folder again")


def _component_folders(folder: Path, names: list[str]) -> list[Path]:
    """Sub-folders that hold weights."""
    parts = []
    for name in names:
        part = folder / name
        if os.path.isdir(part):
            inside = _listing(part)
            if any(_weights(part, inside, wanted) for wanted in FORMATS):
                parts.append(part)
    return parts


def _open_named(path: Path) -> Checkpoint:
    """The file that the user named: all parts of a split GGUF, or one shard with a note."""
    match = _NUMBERED.fullmatch(path.name)
    wanted = by_suffix(path.name)
    if match is None or wanted is None or int(match["total"]) < 2 or not path.exists():
        return open_file(str(path))
    if wanted.name == "gguf":
        beside = [(n, _NUMBERED.fullmatch(n)) for n in _listing(path.parent)]
        series = [n for n, m in beside if m and all(m[k] == match[k] for k in ("stem", "total", "rest"))]
        parts = [("", open_file(str(path.parent / name))) for name in _numbered(path, series)]
        return _join(path, parts, [f"all {len(parts)} parts of the split file are read"])
    opened = open_file(str(path))
    note = f"this is shard {int(match['number'])} of {int(match['total'])}; name the folder to read all"
    opened.notes = (*opened.notes, note)
    return opened


def _bundled(opened: Checkpoint) -> Checkpoint:
    """The checkpoint, its tensors marked by component where one file holds several networks."""
    prefixes = read_data("bundles.yaml", dict[str, str])
    fitting = [p for p in prefixes if any(name.startswith(p) for name in opened.specs)]
    if opened.components != ("",) or len({prefixes[p] for p in fitting}) < 2:
        return opened
    specs = {}
    for name, spec in opened.specs.items():
        component = next((prefixes[p] for p in fitting if name.startswith(p)), "other")
        specs[name] = msgspec.structs.replace(spec, component=component)
    opened.specs = specs
    return opened


def _join(folder: Path, parts: list[tuple[str, Checkpoint]], notes: list[str]) -> Checkpoint:
    """The parts as one checkpoint."""
    try:
        return Joined(str(folder), parts, notes=notes)
    except ValueError as exc:
        raise InputError(folder, f"two files hold the same tensor: {exc}", "name the file that you mean") from exc


def _told(opened: Checkpoint, notes: list[str], names: list[str], read: list[str]) -> Checkpoint:
    """The checkpoint with a note on files of its format that were left aside."""
    aside = [name for name in names if name not in read and not name.endswith(".index.json")]
    if aside:
        opened.notes = (*opened.notes, f"{_listed(aside)} in the same folder is not read")
    return opened


def _listing(folder: Path) -> list[str]:
    """Names in the folder in order, hidden ones only where they say what the folder is."""
    try:
        return sorted(n for n in os.listdir(folder) if not n.startswith(".") or n in _UNREAD)
    except OSError as exc:
        raise InputError(folder, *reason(exc)) from exc


def _listed(names: list[str]) -> str:
    """A few names and how many more."""
    return printable(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


class _Quantization(msgspec.Struct):
    """The one thing of config.json that reading needs."""

    weight_block_size: tuple[int, int] | None = None


class _Config(msgspec.Struct):
    quantization_config: _Quantization | None = None


def _block_size(folder: Path) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where config.json says so."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        document: Any = read_json(path)
        config = msgspec.convert(document, _Config)
    except (InputError, msgspec.ValidationError, RecursionError):
        return None  # a broken configuration is no obstacle to reading weights; claims.py reports it
    return config.quantization_config.weight_block_size if config.quantization_config else None
