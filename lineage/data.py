"""Where the tables of names stand: `mappings/` beside the package in a checkout, inside it once installed."""

from __future__ import annotations

from pathlib import Path

from lineage.errors import InputError

__all__ = ["mapping_file"]

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
