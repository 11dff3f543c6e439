"""Which tensors of a base the modules of an adapter mean: names with dots, or flattened with underscores.

Flattened names are never guessed back: every name of the base is flattened and looked up, and a word that two modules
share is an error (`cross_attn`, `k_img` and `feed_forward` hold underscores of their own).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cache

import msgspec
import yaml

from lineage.data import mapping_file

__all__ = ["Components", "Module", "Modules", "components", "flattened", "split_name"]

#: how a tensor's name ends, and which part of its module it then is
_ENDS = (
    (".weight", "weight"), (".bias", "bias"), ("/kernel", "weight"), ("/w", "weight"), (".kernel", "weight"),
    ("/bias", "bias"), (".scale", "weight"),
)  # fmt: skip


class Module(msgspec.Struct, frozen=True):
    """A module of the base and its tensors.

    Attributes
    ----------
    path : its full name; a parameter that stands alone is a module of its own
    weight, bias : names of tensors, or None
    """

    path: str
    weight: str | None = None
    bias: str | None = None


class _Component(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    begins: tuple[str, ...]


class Components(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `mappings/lora/components.yaml` says.

    Attributes
    ----------
    roots : beginnings of names that adapters leave out
    components : parts of a pipeline by how the names of their modules begin
    """

    roots: tuple[str, ...]
    components: tuple[_Component, ...]

    def stripped(self, name: str) -> str:
        """The name without a root."""
        return next((name[len(r) :] for r in self.roots if name.startswith(r)), name)

    def of(self, name: str) -> str | None:
        """The component that a module's name tells, None where it tells none."""
        short = self.stripped(name)
        return next((c.name for c in self.components if short.startswith(c.begins)), None)

    def usual(self, names: Iterable[str]) -> str:
        """The component that most of the names tell; "" where none does."""
        told = Counter(found for n in names if (found := self.of(n)) is not None)
        return told.most_common(1)[0][0] if told else ""


@cache
def components() -> Components:
    """The table of components."""
    text = mapping_file("lora/components.yaml").read_text(encoding="utf-8")
    return msgspec.convert(yaml.safe_load(text), Components)


def split_name(name: str) -> tuple[str, str]:
    """The module of a tensor and which part of it the tensor is (`weight` or `bias`).

    Examples
    --------
    >>> split_name("blocks.0.proj.bias"), split_name("text_projection")
    (('blocks.0.proj', 'bias'), ('text_projection', 'weight'))
    """
    for end, part in _ENDS:
        if name.endswith(end) and len(name) > len(end):
            return name[: -len(end)], part
    return name, "weight"


def flattened(path: str) -> str:
    """A module's path as one word.

    Examples
    --------
    >>> flattened("blocks.0.cross_attn.k_img")
    'blocks_0_cross_attn_k_img'
    """
    return re.sub(r"[./]", "_", path)


class Modules:
    """The modules of a base, by dotted and by flattened name.

    Parameters
    ----------
    names : the base's tensors
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.names:
            path, part = split_name(name)
            found[path].setdefault(part, name)
            if path != name:
                found[name].setdefault("weight", name)
        self._by_path = {path: Module(path, **parts) for path, parts in found.items()}
        # a short name stands for the full one unless it is the full name of another module
        self._short: dict[str, Module] = {}
        words: dict[str, set[str]] = defaultdict(set)
        table = components()
        real = {split_name(name)[0] for name in self.names}
        for path, module in self._by_path.items():
            shorts = [path, *(path[len(r) :] for r in table.roots if path.startswith(r) and len(path) > len(r))]
            for short in shorts:
                self._short.setdefault(short, module)
                if path in real:
                    words[flattened(short)].add(path)
        for path, module in self._by_path.items():
            self._short[path] = module
        self._by_word = words

    def find(self, path: str, component: str = "") -> Module | None:
        """The module of this dotted name, looked for in the component first."""
        if component and (found := self._by_path.get(f"{component}/{path}")):
            return found
        return self._short.get(path)

    def find_word(self, word: str, component: str = "") -> Module | None:
        """The module whose name flattens to `word`.

        Raises
        ------
        ValueError : two modules flatten to it
        """
        paths = self._by_word.get(flattened(f"{component}/{word}") if component else word) or self._by_word.get(word)
        if not paths:
            return None
        if len(paths) > 1:
            raise ValueError(f"{word} may be " + " or ".join(sorted(paths)))
        return self._by_path[next(iter(paths))]

    def inside(self, path: str) -> Sequence[str]:
        """Parameters that stand directly in a module, under names of their own, in order."""
        full = self._short[path].path if path in self._short else path
        return [n for n in self.names if n.rpartition(".")[0] == full and split_name(n)[0] == n]
