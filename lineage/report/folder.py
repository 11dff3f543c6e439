"""The folder of a report: `report.json report.md report.html tensors.csv mapping.yaml lora_keys.yaml`, all or none."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lineage.checkpoint.files import reason
from lineage.checkpoint.write import check_output
from lineage.errors import InputError
from lineage.layout.document import write_mapping
from lineage.report.diff import csv_text
from lineage.report.document import Report
from lineage.report.encode import as_json
from lineage.report.html import page
from lineage.report.markdown import markdown

__all__ = ["FILES", "KEYS", "check_folder", "write_folder"]

StrPath = str | os.PathLike[str]
#: the key map for adapters
KEYS = "lora_keys.yaml"
#: what is written; `mapping.safetensors` holds arrays too long for the YAML, where there are any
FILES = (
    "report.json", "report.md", "report.html", "tensors.csv", "mapping.yaml", "mapping.safetensors", KEYS,
)  # fmt: skip


def check_folder(folder: StrPath, *, inputs: Iterable[StrPath] = ()) -> None:
    """Proves early that a report can be written to `folder`.

    A folder may be there already; files with the names of a report's are replaced only where an earlier report left
    them.

    Raises
    ------
    InputError : it is a file or below one, an input, closed to us, or holds files that are not a report's
    """
    out, inputs = Path(folder), list(inputs)
    check_output(out / FILES[0], inputs=inputs)
    if out.exists() and not out.is_dir():
        raise InputError(out, "this is a file", "name a folder")
    held = [name for name in FILES if os.path.lexists(out / name)]
    for name in held:
        check_output(out / name, inputs=inputs)
    if held and not _reported(out / FILES[0]):
        raise InputError(out / held[0], "is there already and belongs to no report", "name another folder")


def _reported(path: Path) -> bool:
    """Whether the file is a report that this program wrote."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "lineage" in document and "verdict" in document


def write_folder(report: Report, folder: StrPath, *, keys: str | None = None, inputs: Iterable[StrPath] = ()) -> None:
    """Writes the report's files to `folder`, which is made where it is missing.

    Parameters
    ----------
    keys : text of `lora_keys.yaml`, None where there is no map

    Raises
    ------
    InputError : as `check_folder`, or the disk is full; nothing is left of it then
    """
    out, inputs = Path(folder), list(inputs)
    check_folder(out, inputs=inputs)
    made = [path for path in (out, *out.parents) if not path.exists()]
    part = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".report-", dir=out))
        write_mapping(report.mapping, part / "mapping.yaml")
        (part / "report.json").write_bytes(as_json(report.document))
        if keys is not None:
            (part / KEYS).write_text(keys, encoding="utf-8")
        for name, text in (
            ("report.md", markdown(report)),
            ("report.html", page(report)),
            ("tensors.csv", csv_text(report.diff)),
        ):
            (part / name).write_bytes(text.encode("utf-8", "backslashreplace"))
        for name in ("mapping.safetensors", KEYS):
            (out / name).unlink(missing_ok=True)
        for name in FILES:
            if (part / name).exists():
                os.replace(part / name, out / name)
    except OSError as exc:
        raise InputError(out, *reason(exc)) from exc
    finally:
        _clear(part, made)


def _clear(part: Path | None, made: list[Path]) -> None:
    """Removes the temporary folder, and the folders made for it where they stayed empty."""
    if part is not None:
        shutil.rmtree(part, ignore_errors=True)
    for path in made:
        try:
            path.rmdir()
        except OSError:  # not empty: the report is in it
            break
