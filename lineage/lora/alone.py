"""An adapter read without its base: its keys stand for the modules, so that it can be written with the same keys."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from lineage.errors import InputError
from lineage.lora.grammar import Grammar, grammar, grammars
from lineage.lora.peft import plain_path
from lineage.lora.reading import Adapter, read_with
from lineage.lora.source import Base, Source

__all__ = ["read_alone"]


def read_alone(source: Source, *, format: str | None = None, scale: float | None = None) -> tuple[Adapter, Grammar]:
    """The adapter's deltas by names made of its keys, and the grammar that writes those keys again.

    Raises
    ------
    InputError : no format fits, several do, or its keys mean nothing without the base
    """
    g = grammar(format) if format else _likely(source)
    base, own = _self_named(source, g)
    return read_with(source, base, [own], scale=scale, format=g.format), own


def _likely(source: Source) -> Grammar:
    """The grammar that most keys follow; the more telling beginning decides between equals."""
    best, most = None, (0, 0)
    for g in grammars().values():
        if (g.container == "gguf") != (source.arrays.format == "gguf"):
            continue
        if g.format == "peft" and not (source.config and "peft_type" in source.config):
            continue
        if g.format == "mlx" and (source.config and "peft_type" in source.config):
            continue
        fits = [k for k in source.keys if any(_plausible(g, stem) for stem, _, _ in g.taken_apart(k))]
        named = sum(1 for k in fits if any(k.startswith(p) for p, _ in g.beginnings if p))
        score = (len(fits), named + len(source.keys) * (g.format == "peft"))
        if score > most:
            best, most = g, score
    if best is None:
        raise InputError(source.path, f'no adapter format writes a key such as "{source.keys[0]}"')
    return best


def _plausible(g: Grammar, stem: str) -> bool:
    """Whether a format could begin a key like this."""
    if g.separator == "_":
        return "." not in stem and any(stem.startswith(p) for p, _ in g.beginnings)
    if g.only_aliases:
        return g.module_of(stem) is not None
    if g.format == "openpi":
        return "/" in stem
    return any(stem.startswith(p) for p, _ in g.beginnings)


def _self_named(source: Source, g: Grammar) -> tuple[Base, Grammar]:
    """A base whose modules are the stems of the keys, and the grammar without beginnings of its own."""
    names: dict[str, None] = {}
    own = g
    if g.format not in ("peft", "longcat"):
        own = msgspec.structs.replace(g, prefixes={"default": ""}, also={})
    for key in source.keys:
        for stem, role, _ in g.taken_apart(key):
            if g.format == "peft":
                path, depth, _ = plain_path(stem.removeprefix(g.prefixes["default"]))
                if depth and role != "set_bias":
                    raise InputError(source.path, f'"{key}" belongs to a wrapper of PEFT', "give the base with --base")
                names.update(dict.fromkeys(_parts(path)))
            elif g.named_tensors:
                names[stem] = None
            elif g.format == "openpi":
                names[stem + "/w" if key[len(stem)] == "/" else stem] = None
            else:
                names.update(dict.fromkeys(_parts(_path(g, stem.removeprefix(own.prefixes["default"])))))
            break
    return Base(dict.fromkeys(names)), own


def _path(g: Grammar, stem: str) -> str:
    """The module's path in a base of its own."""
    if g.only_aliases:
        return g.module_of(stem) or stem
    return stem.replace(g.separator, ".") if len(g.separator) > 1 else stem


def _parts(path: str) -> Iterable[str]:
    return (f"{path}.weight", f"{path}.bias")
