"""How one format spells the keys of a model's modules: beginnings, short names, words that name one module only."""

from __future__ import annotations

from collections.abc import Iterable

from lineage.lora.delta import Refused
from lineage.lora.grammar import Grammar
from lineage.lora.modules import Modules, components, flattened, split_name

__all__ = ["Namer"]


class Namer:
    """Keys of one format for one model.

    Parameters
    ----------
    g : the format's grammar
    names : the model's tensors
    verbatim : module names are pieces of keys and are written as they are
    """

    def __init__(self, g: Grammar, names: Iterable[str], *, verbatim: bool = False) -> None:
        self.g, self.verbatim = g, verbatim
        self.modules = Modules(names)
        self.table = components()
        self.usual = self.table.usual(split_name(n)[0] for n in self.modules.names)

    def key(self, path: str, tensor: str, role: str) -> str:
        """The key of one array of a module.

        Parameters
        ----------
        path, tensor : the module's full name and that of its tensor
        role : as in the grammar

        Raises
        ------
        Refused : the format has no place for the role, or no unambiguous name for the module
        """
        g = self.g
        if role not in g.roles:
            raise Refused(f"this format has no place for {role}")
        short = self.short(tensor if g.named_tensors else path)
        if g.only_aliases and g.spelt(short) == short:
            raise Refused("this format has no name for the module")
        joiner = g.joiners[-1] if path == tensor else g.joiners[0]
        return g.key(short, role, self.component(path), joiner=joiner)

    def stem(self, path: str, tensor: str) -> str:
        """What the keys of a module have in common."""
        key = self.key(path, tensor, "down")
        return key[: -len(self.g.roles["down"][0]) - 1]

    def short(self, path: str) -> str:
        """The path as the format's keys have it: without its root, unless its word would then name two modules.

        Raises
        ------
        Refused : there is no such word
        """
        if self.g.full_names or self.verbatim:
            return path
        short = self.table.stripped(path)
        if self.g.separator != "_":
            return short
        for candidate in (short, path):
            try:
                if self.modules.find_word(flattened(candidate)) is not None:
                    return candidate
            except ValueError:
                continue
        raise Refused(f"{flattened(short)} would name two modules of the target")

    def component(self, path: str) -> str:
        """The part of a pipeline that a module belongs to."""
        own = path.partition("/")[0]
        if "/" in path and own in self.g.prefixes:
            return own
        return self.table.of(path) or self.usual
