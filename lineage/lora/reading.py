"""An adapter file read into deltas of its base's tensors, with the fate of every key.

Which grammar a key is written in is decided key by key, so that mixed files are read right; nothing is told from a
piece of a name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from lineage.errors import InputError, printable
from lineage.lora.delta import Delta, Refused
from lineage.lora.grammar import Found, Grammar, grammar, grammars
from lineage.lora.group import Context, Group, assembled
from lineage.lora.modules import Module
from lineage.lora.peft import Config, plain_path
from lineage.lora.source import Base, Source

__all__ = ["Adapter", "Fate", "read_adapter", "read_with"]


class Fate(msgspec.Struct, frozen=True):
    """What became of one key of the adapter.

    Attributes
    ----------
    key : its name
    status : `read` (it is part of a delta), `left` (it is not)
    tensor : the base's tensor, "" where there is none
    reason : why it was left
    """

    key: str
    status: str
    tensor: str = ""
    reason: str = ""


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter as deltas.

    Attributes
    ----------
    path : its file or folder
    formats : grammars that its keys follow, most keys first
    deltas : by tensor of the base
    fates : of every key
    dtypes : stored dtype of each delta's factors, the widest of them
    metadata : text pairs of its header
    config : its adapter_config.json, None where there is none
    notes : what a user should know
    """

    path: str
    formats: tuple[str, ...]
    deltas: dict[str, Delta]
    fates: tuple[Fate, ...]
    dtypes: dict[str, str]
    metadata: dict[str, str] = {}
    config: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[Fate, ...]:
        """Keys that are part of no delta."""
        return tuple(f for f in self.fates if f.status == "left")

    def keys(self, tensor: str) -> tuple[str, ...]:
        """Keys that a tensor's delta was made of."""
        return tuple(f.key for f in self.fates if f.tensor == tensor and f.status == "read")


def read_adapter(source: Source, base: Base, *, format: str | None = None, scale: float | None = None) -> Adapter:
    """The adapter's deltas.

    Parameters
    ----------
    source : opened adapter
    base : the model that it was trained on
    format : the grammar of its keys; None: found out key by key
    scale : used where the format keeps its scale outside the file

    Raises
    ------
    InputError : no key could be read
    """
    candidates = [grammar(format)] if format else list(grammars().values())
    return read_with(source, base, candidates, scale=scale, format=format)


def read_with(
    source: Source, base: Base, candidates: Sequence[Grammar], *, scale: float | None = None, format: str | None = None
) -> Adapter:
    """`read_adapter` with given grammars."""
    reader = _Reader(source, base, scale)
    reader.take_apart(candidates)
    reader.assemble()
    if not reader.deltas:
        raise InputError(source.path, *_nothing(source, reader.reasons, format))
    fates = tuple(
        Fate(key, "read", reader.tensors[key]) if key in reader.tensors else Fate(key, "left", "", reader.reasons[key])
        for key in source.keys
    )
    return Adapter(
        path=source.path,
        formats=tuple(reader.formats),
        deltas=reader.deltas,
        fates=fates,
        dtypes=reader.dtypes,
        metadata=source.metadata,
        config=source.config,
        notes=tuple(dict.fromkeys(reader.notes)),
    )


def _nothing(source: Source, reasons: Mapping[str, str], format: str | None) -> tuple[str, str | None]:
    """Cause and remedy where nothing could be read."""
    key, why = next(iter(reasons.items()))
    known = [
        g.format for g in grammars().values() if any(True for _ in g.taken_apart(key) if _fits_container(g, source))
    ]
    cause = f'none of its {len(reasons)} keys could be read; "{printable(key, 80)}": {why}'
    if format and known and format not in known:
        return cause, f"it looks like {known[0]}; try --from {known[0]}"
    return cause, None if known else "lineage lora convert --help lists the formats"


def _fits_container(g: Grammar, source: Source) -> bool:
    """Whether a format's container is what the file is."""
    return (g.container == "gguf") == (source.arrays.format == "gguf")


class _Reader:
    """The state of one reading: what each key became."""

    def __init__(self, source: Source, base: Base, scale: float | None) -> None:
        self.source, self.base, self.scale = source, base, scale
        self.config = Config(source.config, source.path) if source.config is not None else None
        self.groups: list[Group] = []
        self.formats: list[str] = []
        self.deltas: dict[str, Delta] = {}
        self.dtypes: dict[str, str] = {}
        self.tensors: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.notes: list[str] = []

    # -- keys

    def take_apart(self, candidates: Sequence[Grammar]) -> None:
        """Every key under the grammar that reads it; the one that reads most goes first."""
        left = list(self.source.keys)
        tried = [g for g in candidates if _fits_container(g, self.source) or len(candidates) == 1]
        tried = self._by_config(tried)
        while left and tried:
            found = {g.format: self._parsed(g, left) for g in tried}
            best = max(tried, key=lambda g: len(found[g.format]))
            if not found[best.format]:
                break
            self.formats.append(best.format)
            self._group(best, found[best.format])
            left = [k for k in left if k not in found[best.format]]
            tried.remove(best)
        for key in left:
            self.reasons[key] = self._unread(key, candidates)

    def _by_config(self, tried: list[Grammar]) -> list[Grammar]:
        """Formats that a configuration beside the file speaks for or against."""
        if len(tried) == 1 or self.config is None:
            return tried
        document = self.config.document
        if "peft_type" in document or "lora_alpha" in document:
            return [g for g in tried if g.format == "peft"] + [g for g in tried if g.format not in ("peft", "mlx")]
        return [g for g in tried if g.format == "mlx"] + [g for g in tried if g.format not in ("peft", "mlx")]

    def _parsed(self, g: Grammar, keys: Sequence[str]) -> dict[str, Found]:
        if g.format == "peft":
            if self.config is None:
                return {}
            return {k: f for k in keys if (f := self._peft(g, k)) is not None}
        if g.format == "mlx" and self.config is not None and "peft_type" in self.config.document:
            return {}
        found = {}
        for key in keys:
            try:
                if (one := g.parse(key, self.base.modules)) is not None:
                    found[key] = one
            except ValueError as exc:
                self.reasons[key] = str(exc)
        return found

    def _peft(self, g: Grammar, key: str) -> Found | None:
        """A key of PEFT, its wrappers taken off; stacked parameters are told apart later."""
        prefix = g.prefixes["default"]
        if not key.startswith(prefix):
            return None
        for stem, role, number in g.taken_apart(key):
            path, _, _ = plain_path(stem[len(prefix) :])
            module = self.base.modules.find(path)
            whole = role in ("set", "set_bias")
            if module is not None and (whole or self._matrix(module)):
                return Found(key, module, role, number)
            if not whole and (inner := self.base.modules.find(f"{path}.in_proj_weight")):
                bias = self.base.modules.find(f"{path}.in_proj_bias")
                weight = inner.weight
                return Found(key, Module(path, weight, bias.weight if bias else None), role, number)
            if not whole and self.base.modules.inside(path):
                return Found(key, Module(path), role, number)
        return None

    def _matrix(self, module: Module) -> bool:
        shape = self.base.shape(module.weight)
        return shape is None or len(shape) > 1

    def _group(self, g: Grammar, found: Mapping[str, Found]) -> None:
        """Keys by module; a second key of one role is left over."""
        groups: dict[tuple[str, str], Group] = {}
        for key, one in found.items():
            seen = one.module.path
            place = seen
            if g.format == "peft":
                stem = next(s for s, r, _ in g.taken_apart(key) if r == one.role)[len(g.prefixes["default"]) :]
                _, depth, seen = plain_path(stem)
                place = f"{one.module.path}|{depth}" if one.module.weight is None else one.module.path
            group = groups.setdefault((g.format, place), Group(g, one.module, {}, seen))
            role = f"{one.role}.{one.number}" if one.role == "up_piece" else one.role
            if role in group.roles:
                self.reasons[key] = f"a second {role} of {one.module.path}"
                continue
            group.roles[role] = one
        self.groups += self._stacked(list(groups.values()))

    def _stacked(self, groups: list[Group]) -> list[Group]:
        """PEFT's wrappers of stacked parameters: the innermost pair belongs to the earliest parameter.

        Orientation and order come from shapes where they tell: (experts, out, in), or (experts, in, out).
        """
        result = [g for g in groups if g.module.weight is not None or g.module.bias is not None]
        nested: dict[str, list[Group]] = defaultdict(list)
        for g in groups:
            if g not in result:
                nested[g.module.path].append(g)
        for path, some in nested.items():
            names = [n for n in self.base.modules.inside(path) if len(self.base.shape(n) or (0, 0, 0)) == 3]
            order = grammar("peft").inner_first
            names.sort(key=lambda n: order.index(w) if (w := n.rpartition(".")[2]) in order else len(order))
            some.sort(key=lambda g: -max(plain_path(f.key)[1] for f in g.roles.values()))
            for g in some:
                fits = [n for n in names if self._fits_stack(g, n)]
                if not fits:
                    for f in g.roles.values():
                        self.reasons[f.key] = f"no stacked parameter of {path} has its shape"
                    continue
                exact = [n for n in fits if self._fits_stack(g, n, exact=True)] or fits
                names.remove(exact[0])
                result.append(Group(g.grammar, Module(path, exact[0]), g.roles, exact[0], stacked=True))
        return result

    def _fits_stack(self, g: Group, name: str, *, exact: bool = False) -> bool:
        shape = self.base.shape(name)
        if shape is None or not {"down", "up"} <= set(g.roles):
            return False
        down, up = (self.source.arrays.specs[g.roles[r].key].shape for r in ("down", "up"))
        if down[0] % shape[0] or down[0] != up[-1]:
            return False
        ends = (up[0], down[-1])
        return ends == shape[1:] if exact else ends in (shape[1:], shape[:0:-1])

    def _unread(self, key: str, candidates: Sequence[Grammar]) -> str:
        """Why no grammar reads a key."""
        if key in self.reasons:
            return self.reasons[key]
        for g in candidates:
            if not _fits_container(g, self.source) or (g.format == "peft" and self.config is None):
                continue
            component = g.component(key)
            if g.ends(key) and (component or len(candidates) == 1):
                if component and component != "default":
                    return f"the base has no such module ({component} belongs to another model?)"
                return "the base has no such module"
        if any(g.ends(key) for g in candidates):
            return "the base has no such module"
        return "no adapter format writes such a key"

    # -- arrays

    def assemble(self) -> None:
        """Deltas of all groups; what does not fit is left over with its reason."""
        context = Context(self.source, self.base, self.config, self.scale, self.notes)
        for group in self.groups:
            try:
                made = assembled(context, group)
            except Refused as exc:
                for f in group.roles.values():
                    self.reasons[f.key] = str(exc)
                continue
            for name, (delta, keys) in made.items():
                if name in self.deltas:
                    for key in keys:
                        self.reasons[key] = f"{name} has a difference already"
                    continue
                self.deltas[name] = delta
                self.dtypes[name] = _widest([self.source.dtype(k) for k in keys if not k.endswith((".alpha", "scale"))])
                self.tensors.update((key, name) for key in keys)


def _widest(words: Sequence[str]) -> str:
    """The dtype that holds all of them."""
    kinds = set(words)
    return next(iter(kinds)) if len(kinds) == 1 and kinds <= {"F16", "BF16", "F32"} else "F32"
