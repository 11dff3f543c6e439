"""Stored layouts of public models: which of the files in `mappings/pairs` may speak of two checkpoints.

A file is a mapping without the sizes of any one model. Its first rule is its lead: one name to one name, on one line.
Only files whose lead stands in both checkpoints are read, so that dozens of them cost next to nothing. What a file
says of two given headers is for `resolve`, whether values agree for `stored`.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from lineage.data import mapping_files
from lineage.errors import InputError
from lineage.layout.document import read_mapping
from lineage.layout.mapping import Mapping
from lineage.layout.templates import parse_template

__all__ = ["Fit", "Pair", "fitting", "pairs", "prefixes"]

_LEAD = re.compile(r'^rules:\n  - \{to: "([^"\n]+)", from: "([^"\n]+)"', re.MULTILINE)


class Pair(NamedTuple):
    """A stored layout.

    Attributes
    ----------
    name : the file's, without its suffix
    file : where it is
    to, source : names of the lead, every placeholder at 0
    """

    name: str
    file: Path
    to: str
    source: str

    def mapping(self) -> Mapping:
        """The rules; sizes that differ between models of the family are open.

        Raises
        ------
        InputError : the file is broken
        """
        return _read(self.file)


class Fit(NamedTuple):
    """A pair whose lead stands in both checkpoints.

    Attributes
    ----------
    pair : the stored layout
    inverse : A has the target's layout, B the source's
    prefixes : what stands before the stored names in A and in B
    """

    pair: Pair
    inverse: bool
    prefixes: tuple[str, str]


@lru_cache(maxsize=1 << 8)
def _read(file: Path) -> Mapping:
    return read_mapping(file)


def pairs(files: Sequence[Path] | None = None) -> tuple[Pair, ...]:
    """All stored layouts, by name.

    Parameters
    ----------
    files : the files to take; those of this installation where None

    Raises
    ------
    InputError : a file does not begin as it should
    """
    return _listed(tuple(mapping_files("pairs") if files is None else files))


@lru_cache(maxsize=1 << 3)
def _listed(files: tuple[Path, ...]) -> tuple[Pair, ...]:
    found = []
    for file in files:
        lead = _LEAD.search(file.read_text("utf-8"))
        if lead is None:
            raise InputError(file, "the first rule is not one name to one name on a line", "install lineage again")
        templates = [parse_template(text) for text in lead.groups()]
        names = [t.name(dict.fromkeys(t.placeholders, 0)) for t in templates]
        found.append(Pair(file.stem, file, *names))
    return tuple(found)


def prefixes(names: Iterable[str]) -> tuple[str, ...]:
    """What may stand before the stored names: nothing, or the words that all names begin with.

    Examples
    --------
    >>> prefixes(["model.net.a.weight", "model.net.b.weight"])
    ('', 'model.net.')
    """
    names = list(names)
    common = os.path.commonprefix([min(names), max(names)]) if names else ""
    common = common[: common.rfind(".") + 1]
    return ("", common) if common else ("",)


def fitting(
    a: Container[str], b: Container[str], fronts: Sequence[Sequence[str]], known: Iterable[Pair]
) -> Iterator[Fit]:
    """The pairs whose lead stands in both, in the one direction or the other.

    Parameters
    ----------
    a, b : names of both checkpoints
    fronts : prefixes to try for each
    known : the stored layouts
    """
    for pair in known:
        for inverse in (False, True):
            leads = (pair.to, pair.source) if inverse else (pair.source, pair.to)
            found = [
                next((front for front in some if front + lead in side), None)
                for side, some, lead in zip((a, b), fronts, leads, strict=True)
            ]
            if found[0] is not None and found[1] is not None:
                yield Fit(pair, inverse, (found[0], found[1]))
                break
