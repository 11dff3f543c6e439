"""Where the tables of names stand: `mappings/` beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from lineage.errors import InputError

__all__ = ["mapping_file", "mapping_files"]

_HERE = Path(__file__).parent


def mapping_file(name: str) -> Path:
    """The table `name`, such as `groups.yaml` or `names/roles.yaml`.

    Raises
    ------
    InputError : this installation lacks it

    Examples
    --------
    >>> mapping_file("groups.yaml").name
    'groups.yaml'
    """
    for folder in (_HERE / "mappings", _HERE.parent / "mappings"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(_HERE / "mappings" / name, "the table is missing", "install weight-lineage again")


def mapping_files(folder: str) -> list[Path]:
    """All tables in a folder, such as `pairs`, in the order of their names; [] where there is none.

    Examples
    --------
    >>> [file.name for file in mapping_files("names")]
    ['order.yaml', 'roles.yaml']
    """
    for root in (_HERE / "mappings", _HERE.parent / "mappings"):
        if (root / folder).is_dir():
            return sorted((root / folder).glob("*.yaml"))
    return []
