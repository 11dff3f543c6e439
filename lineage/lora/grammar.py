"""Key grammars of adapter formats, read from `mappings/lora/*.yaml`: how a key names a module and a role.

A grammar is data. What a table cannot say (PEFT's nested wrappers and its configuration, per-file scales) is code of
the modules `reading` and `writing`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Literal

import msgspec
import yaml

from lineage.data import mapping_file
from lineage.errors import InputError, nearest
from lineage.layout.templates import parse_template
from lineage.lora.modules import Module, Modules

__all__ = ["GRAMMARS", "Alias", "Found", "Grammar", "grammar", "grammars"]

#: format names, in the order in which a file without a stated format is tried where several fit equally well
GRAMMARS = (
    "peft", "longcat", "xlabs", "openpi", "gguf", "mlx", "kohya", "onetrainer", "diffusers", "ai-toolkit", "comfy",
)  # fmt: skip

#: what a format can say besides plain pairs: Tucker cores, products, full differences of matrices or of norms and
#: biases, biases of the up factor, DoRA by outputs or inputs, stacks of matrices, einsum kernels, modules stored whole
Holds = Literal["mid", "loha", "lokr", "diff", "vectors", "up_bias", "rows", "columns", "stacked", "einsum", "whole"]


class Alias(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module that the format calls otherwise.

    Attributes
    ----------
    key : template of what stands in the key
    module : template of the module's path
    rows : `first` where the key means only the first rows of the tensor
    """

    key: str
    module: str
    rows: Literal["all", "first"] = "all"


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How one format writes its keys.

    Attributes
    ----------
    format : its name in commands
    says : one line for people
    container : file that holds the arrays
    separator : what stands between the parts of a module's path: ".", "_" or a word
    joiners : what may stand between module and ending, the first is written
    prefixes : beginning of a key by component; `default` for any other
    also : further beginnings that are read
    roles : endings by what the array is, the first one is written
    scale : where the scale stands
    transposed : factors are (in, rank) and (rank, out)
    holds : what besides plain pairs the format can say
    aliases : modules under other names
    only_aliases : the format knows no other modules
    blocks : module endings whose up factor is stored in so many pieces
    shared_up : module endings whose second factor counts summed over the axis before its last two
    unscaled : module endings that take no scale
    pad_ranks : all modules of a file have one rank
    inner_first : stacked parameters of one module, the innermost wrapper first
    named_tensors : keys name tensors, not modules
    full_names : names stand in keys whole, with whatever root they have
    stacks : words in names of weights that are stacks of matrices
    """

    format: str
    says: str
    container: Literal["safetensors", "folder", "gguf"] = "safetensors"
    separator: str = "."
    joiners: tuple[str, ...] = (".",)
    prefixes: dict[str, str] = msgspec.field(default_factory=lambda: {"default": ""})
    also: dict[str, str] = {}
    roles: dict[str, tuple[str, ...]]
    scale: Literal["alpha", "alpha_scale", "config", "header", "number", "file", "none"] = "none"
    transposed: bool = False
    holds: tuple[Holds, ...] = ()
    aliases: tuple[Alias, ...] = ()
    only_aliases: bool = False
    blocks: dict[str, int] = {}
    shared_up: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    pad_ranks: bool = False
    inner_first: tuple[str, ...] = ()
    named_tensors: bool = False
    full_names: bool = False
    stacks: tuple[str, ...] = ()

    @property
    def endings(self) -> list[tuple[str, str]]:
        """(ending, role), longest first."""
        found = [(end, role) for role, ends in self.roles.items() for end in ends]
        return sorted(found, key=lambda e: -len(e[0]))

    def key(self, path: str, role: str, component: str = "", *, joiner: str | None = None) -> str:
        """The key of a module's array; `path` is as the format's keys have it.

        Raises
        ------
        KeyError : the format has no such role
        """
        prefix = self.prefixes.get(component, self.prefixes["default"])
        return prefix + self.spelt(path) + (joiner or self.joiners[0]) + self.roles[role][0]

    def spelt(self, path: str) -> str:
        """A module's path as this format writes it; aliases are written where there are no other names."""
        for alias in self.aliases if self.only_aliases else ():
            if (found := _through(alias.module, alias.key, path)) is not None:
                return found
        return re.sub(r"[./]", "_", path) if self.separator == "_" else path.replace(".", self.separator)

    def parse(self, key: str, modules: Modules) -> Found | None:
        """What a key means on a base; None where this grammar does not know it or the base has no such module.

        Raises
        ------
        ValueError : the key may mean several modules
        """
        for stem, role, number in self.taken_apart(key):
            for prefix, component in self.beginnings:
                if not stem.startswith(prefix):
                    continue
                if (found := self._module(stem[len(prefix) :], component, modules)) is not None:
                    module, rows = found
                    return Found(key, module, role, number, rows)
        return None

    def taken_apart(self, key: str) -> Iterable[tuple[str, str, int]]:
        """(stem, role, number) of every ending that the key may have; the number of an up factor in pieces."""
        for end, role in self.endings:
            for joiner in self.joiners:
                if "{j}" in end:
                    match = re.fullmatch(r"(.+?)" + re.escape(joiner + end).replace(r"\{j\}", r"(\d+)"), key)
                    if match:
                        yield match[1], role, int(match[2])
                elif key.endswith(joiner + end):
                    yield key[: -len(joiner + end)], role, 0

    def ends(self, key: str) -> bool:
        """Whether the key ends as keys of this format do."""
        return any(True for _ in self.taken_apart(key))

    def component(self, key: str) -> str:
        """The part of a pipeline that a key's beginning names, "" where it names none."""
        return next((c for p, c in self.beginnings if p and key.startswith(p)), "")

    @property
    def beginnings(self) -> list[tuple[str, str]]:
        """(prefix, component), longest first."""
        found = {**self.also, **{p: c for c, p in reversed(self.prefixes.items())}}
        return [(p, "" if c == "default" else c) for p, c in sorted(found.items(), key=lambda x: -len(x[0]))]

    def alias_of(self, path: str) -> Alias | None:
        """The alias that a module's path is written by, None where it has none."""
        return next((a for a in self.aliases if _through(a.module, a.key, path) is not None), None)

    def module_of(self, stem: str) -> str | None:
        """The module that an alias stands for, None where `stem` is none."""
        return next((m for a in self.aliases if (m := _through(a.key, a.module, stem)) is not None), None)

    def _module(self, stem: str, component: str, modules: Modules) -> tuple[Module, str] | None:
        for alias in self.aliases:
            if (path := _through(alias.key, alias.module, stem)) is not None and (m := modules.find(path, component)):
                return m, alias.rows
        if self.only_aliases:
            return None
        if self.separator == "_":
            found = modules.find_word(stem, component) if "." not in stem else None
        else:
            found = modules.find(stem.replace(self.separator, "."), component)
        if found is None or (self.named_tensors and found.path != stem):
            return None
        return found, "all"


class Found(msgspec.Struct, frozen=True):
    """What one key of an adapter is."""

    key: str
    module: Module
    role: str
    number: int = 0
    rows: str = "all"


def _through(template: str, other: str, text: str) -> str | None:
    """`text` read by one template and spelt by the other; None where it does not fit."""
    names: list[str] = []
    pattern = ""
    parsed = parse_template(template)
    for k, piece in enumerate(parsed.texts):
        if k:
            number = parsed.numbers[k - 1]
            names += [name for name, _ in number.terms]
            pattern += r"(\d+)" if number.terms else str(number.constant)
        pattern += re.escape(piece).replace(r"\*", r"(.+)")
    match = re.fullmatch(pattern, text)
    if match is None:
        return None
    # a star stands for any beginning; numbers keep their names
    values = dict(zip(names, (int(g) for g in match.groups() if g.isdecimal()), strict=False))
    star = next((g for g in match.groups() if not g.isdecimal()), "")
    return parse_template(other).name(values).replace("*", star)


@cache
def grammar(name: str) -> Grammar:
    """The grammar of a format.

    Raises
    ------
    InputError : there is no such format
    """
    if name not in GRAMMARS:
        hint = nearest(name, GRAMMARS)
        raise InputError(name, "no such adapter format", f'did you mean "{hint}"?' if hint else "see --help")
    path = mapping_file(f"lora/{name}.yaml")
    try:
        return msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Grammar)
    except (msgspec.ValidationError, yaml.YAMLError) as exc:
        raise InputError(path, str(exc)) from exc


def grammars() -> Mapping[str, Grammar]:
    """All grammars, in the order in which they are tried."""
    return {name: grammar(name) for name in GRAMMARS}
