"""Which group and which layer a tensor belongs to, by its name; the patterns are data (`mappings/groups.yaml`)."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec

from lineage.data import mapping_file
from lineage.errors import InputError

__all__ = ["GROUPS", "Groups", "Place", "read_groups"]

GROUPS = ("attention", "mlp", "embedding", "norm", "projection", "head", "other")
_INTEGER = re.compile(r"\d{1,6}")


class Place(NamedTuple):
    """Where a tensor sits.

    Attributes
    ----------
    group : one of the groups of the patterns, or `other`
    stack : name up to the layer number (`model.layers`), "" where there is none
    layer : number of the layer, None for tensors outside layers
    """

    group: str
    stack: str
    layer: int | None


class Groups(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, dict=True):
    """The patterns, as their file holds them; see the comment at its top."""

    groups: dict[str, list[str]]
    layers: list[str] = []
    experts: list[str] = []
    vectors: list[str] = []

    def place(self, name: str) -> Place:
        """Group and layer of the tensor `name`.

        Examples
        --------
        >>> read_groups().place("model.layers.12.mlp.experts.3.up_proj.weight")
        Place(group='mlp', stack='model.layers', layer=12)
        """
        stack, layer = self._layer(name)
        return Place(self.group(name), stack, layer)

    def group(self, name: str) -> str:
        """Group of the tensor `name`, `other` where no pattern matches."""
        # names of one template differ in their numbers only: 90,000 names make a few hundred keys
        key = re.sub(r"\d+", lambda m: m[0] if len(m[0]) == 1 else "9", name.lower())
        found = self._known.get(key)
        if found is None:
            found = next((g for g, pattern in self._compiled if pattern.search(key)), "other")
            self._known[key] = found
        return found

    def apart(self, group: str, shape: tuple[int, ...]) -> bool:
        """True for norms, biases and other vectors, which are summed up apart from content weights."""
        return group in self.vectors or sum(n != 1 for n in shape) <= 1

    def _layer(self, name: str) -> tuple[str, int | None]:
        parts = re.split(r"([./])", name)
        for at in range(0, len(parts), 2):
            word, _, tail = parts[at].lower().rpartition("_")
            if tail.isdecimal() and word in self._layer_words and _INTEGER.fullmatch(tail):
                return "".join(parts[:at]) + parts[at][: len(word)], int(tail)
            if at and _INTEGER.fullmatch(parts[at]) and parts[at - 2].lower() in self._layer_words:
                return "".join(parts[: at - 1]), int(parts[at])
        return "", None

    @cached_property
    def _layer_words(self) -> frozenset[str]:
        return frozenset(self.layers) - frozenset(self.experts)

    @cached_property
    def _known(self) -> dict[str, str]:
        return {}

    @cached_property
    def _compiled(self) -> list[tuple[str, re.Pattern[str]]]:
        edge = r"(?:^|(?<=[._/\d])){}(?=$|[._/\d])"
        return [(g, re.compile("|".join(edge.format(f"(?:{p})") for p in some))) for g, some in self.groups.items()]


def read_groups(path: str | Path | None = None) -> Groups:
    """The patterns in a file, or those of the package.

    Raises
    ------
    InputError : the file is missing, no YAML of this form, or holds a broken pattern
    """
    where = mapping_file("groups.yaml") if path is None else Path(path)
    try:
        found = msgspec.yaml.decode(where.read_bytes(), type=Groups)
    except OSError as exc:
        raise InputError(where, exc.strerror or "cannot be read", "give a YAML file of name patterns") from exc
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise InputError(
            where, f"no list of groups: {exc}", "mappings/groups.yaml of the package shows the form"
        ) from exc
    for group, patterns in found.groups.items():
        for at, pattern in enumerate(patterns):
            try:
                re.compile(pattern)
            except re.error as exc:
                raise InputError(f"{where}: groups.{group}[{at}]", f"no regular expression: {exc}") from exc
    return found
