"""An adapter file read into deltas of its base's tensors, with the fate of every key.

Which grammar a key is written in is decided key by key, so that mixed files are read right; nothing is told from a
piece of a name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError, printable
from lineage.lora import assemble
from lineage.lora.delta import Delta, Magnitude, Refused
from lineage.lora.grammar import Found, Grammar, grammar, grammars
from lineage.lora.network import Term
from lineage.lora.peft import Config, plain_path
from lineage.lora.modules import Module
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


class _Group(msgspec.Struct):
    """The keys of one module."""

    grammar: Grammar
    module: Module
    roles: dict[str, Found]
    #: PEFT: tensor meant where it is not the module's weight, and the path that patterns see
    tensor: str | None = None
    seen: str = ""
    stacked: bool = False


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
        self.groups: list[_Group] = []
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
        groups: dict[tuple[str, str], _Group] = {}
        for key, one in found.items():
            seen = one.module.path
            place = seen
            if g.format == "peft":
                stem = next(s for s, r, _ in g.taken_apart(key) if r == one.role)[len(g.prefixes["default"]) :]
                _, depth, seen = plain_path(stem)
                place = f"{one.module.path}|{depth}" if one.module.weight is None else one.module.path
            group = groups.setdefault((g.format, place), _Group(g, one.module, {}, None, seen))
            role = f"{one.role}.{one.number}" if one.role == "up_piece" else one.role
            if role in group.roles:
                self.reasons[key] = f"a second {role} of {one.module.path}"
                continue
            group.roles[role] = one
        self.groups += self._stacked(list(groups.values()))

    def _stacked(self, groups: list[_Group]) -> list[_Group]:
        """PEFT's wrappers of stacked parameters: the innermost pair belongs to the earliest parameter.

        Orientation and order come from shapes where they tell: (experts, out, in), or (experts, in, out).
        """
        result = [g for g in groups if g.module.weight is not None or g.module.bias is not None]
        nested: dict[str, list[_Group]] = defaultdict(list)
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
                result.append(_Group(g.grammar, Module(path, exact[0]), g.roles, exact[0], exact[0], True))
        return result

    def _fits_stack(self, g: _Group, name: str, *, exact: bool = False) -> bool:
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
            if any(True for _ in g.taken_apart(key)) and (component or len(candidates) == 1):
                if component and component != "default":
                    return f"the base has no such module ({component} belongs to another model?)"
                return "the base has no such module"
        if any(any(True for _ in g.taken_apart(key)) for g in candidates):
            return "the base has no such module"
        return "no adapter format writes such a key"

    # -- arrays

    def assemble(self) -> None:
        """Deltas of all groups; what does not fit is left over with its reason."""
        for group in self.groups:
            try:
                made = _Assembled(self, group).run()
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


class _Assembled:
    """One module's keys on their way to deltas."""

    def __init__(self, reader: _Reader, group: _Group) -> None:
        self.reader, self.group = reader, group
        self.g, self.module = group.grammar, group.module
        self.roles = {role: reader.source.array(f.key) for role, f in group.roles.items()}
        self.shape = reader.base.shape(self.module.weight)
        self.assumed = False

    def run(self) -> dict[str, tuple[Delta, list[str]]]:
        """Tensor names with their deltas and the keys that made them."""
        for role, array in self.roles.items():
            if not np.isfinite(array).all():
                raise Refused(f"{role} holds NaN or infinity")
        made: dict[str, tuple[Delta, list[str]]] = {}
        used: set[str] = set()
        scale = 1.0
        if assemble.has_pair(self._torch()):
            delta, scale = self._pair()
            parts = set(self.roles) - {"diff", "diff_bias", "set", "set_bias", "up_bias", "norm_weight", "norm_bias"}
            made[self._weight()] = (delta, self._keys(parts))
            used |= parts
        elif {"magnitude", "alpha", "alpha_scale"} & set(self.roles) and not self._full_roles():
            raise Refused("a scale or a magnitude without factors")
        for role, array in self.roles.items():
            if role not in used:
                name, delta = self._full(role, array, scale)
                if name in made:
                    delta = _plus(made[name][0], delta)
                    made[name] = (delta, made[name][1] + self._keys({role}))
                elif role not in ("alpha", "magnitude"):
                    made[name] = (delta, self._keys({role}))
        return made

    def _full_roles(self) -> set[str]:
        return set(self.roles) & {"diff", "diff_bias", "set", "set_bias", "norm_weight", "norm_bias"}

    def _keys(self, roles: set[str]) -> list[str]:
        return [f.key for role, f in self.group.roles.items() if role in roles]

    def _weight(self) -> str:
        if self.module.weight is None:
            raise Refused(f"the base has no weight under {self.module.path}")
        return self.module.weight

    def _bias(self) -> str:
        if self.module.bias is None:
            raise Refused(f"the base has no bias under {self.module.path}")
        return self.module.bias

    def _torch(self) -> dict[str, NDArray[Any]]:
        """Factors in torch's order; pieces of an up factor count as one."""
        roles = dict(self.roles)
        if "table_down" in roles or "table_up" in roles:
            roles["down"], roles["up"] = (roles.get(r) for r in ("table_down", "table_up"))  # type: ignore[assignment]
            roles = {k: v for k, v in roles.items() if v is not None}
        return roles

    def _pair(self) -> tuple[Delta, float]:
        """The weight's delta and the scale of its factors."""
        roles = self._torch()
        if self.g.transposed:
            term, rank = self._transposed(roles), _last(roles)
        elif any(r.startswith("up_piece") for r in roles):
            term, rank = self._pieces(roles)
        elif self.group.stacked:
            term, rank = self._experts(roles)
        else:
            rank = assemble.rank_of(roles)
            term = self._plain(roles)
        scale = self._scale(rank)
        delta = Delta(
            shape=term.shape,
            terms=(Term(term.parts, term.layout, term.sizes, scale),),
            embedding="table_down" in self.roles,
            assumed=self.assumed,
        )
        if "magnitude" in self.roles:
            delta = msgspec.structs.replace(delta, magnitudes=(self._magnitude(delta),))
        return delta, scale

    def _plain(self, roles: Mapping[str, NDArray[Any]]) -> Term:
        """A pair, LoHa or LoKr as torch holds it; the base may hold the weight the other way round."""
        shape, config = self.shape, self.reader.config
        swapped = self.g.format == "peft" and config is not None and bool(config.document.get("fan_in_fan_out"))
        table = "table_down" in self.roles
        if self.g.format == "gguf" and shape is not None and len(shape) == 2 and "down" in roles and "up" in roles:
            a, b = roles["down"], roles["up"]
            if a.ndim == b.ndim == 2 and (a.shape[0], b.shape[0]) == shape and a.shape[1] == b.shape[1] != b.shape[0]:
                return Term.of([(a, "vk"), (b, "dk")], ["v", "d"])
        if swapped or table:
            turned = assemble.term_of(roles, None if shape is None else shape[::-1])
            return turned.with_layout(turned.layout[::-1])
        return assemble.term_of(roles, shape, first_rows=any(f.rows == "first" for f in self.group.roles.values()))

    def _transposed(self, roles: Mapping[str, NDArray[Any]]) -> Term:
        """MLX and JAX: (in, rank) and (rank, out)."""
        if not {"down", "up"} <= set(roles):
            raise Refused("the other half of the pair is missing")
        a, b = roles["down"], roles["up"]
        if self.g.format == "openpi":
            return assemble.einsum_pair(a, b, self.shape, shared=self.module.path.endswith(self.g.shared_up))
        if a.ndim == 3 and b.ndim == 3:
            if a.shape[0] != b.shape[0] or a.shape[1] != b.shape[2]:
                raise Refused(f"factors of {list(a.shape)} and {list(b.shape)} do not fit each other")
            term = Term.of([(b, "eok"), (a, "eki")], ["e", "o", "i"])
            if self.shape not in (None, term.shape):
                raise Refused(f"factors for {list(term.shape)} do not fit a tensor of {list(self.shape or ())}")
            return term
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise Refused(f"factors of {list(a.shape)} and {list(b.shape)} do not fit each other")
        return assemble.pair(a.T, b.T, None, self.shape)

    def _pieces(self, roles: Mapping[str, NDArray[Any]]) -> tuple[Term, int]:
        """A down factor of n ranks for an up factor in n pieces: block-diagonal, its blocks stored alone."""
        pieces = [roles[f"up_piece.{j}"] for j in range(sum(r.startswith("up_piece") for r in roles))
                  if f"up_piece.{j}" in roles]  # fmt: skip
        count = sum(r.startswith("up_piece") for r in roles)
        if "down" not in roles or len(pieces) < count or len({p.shape[1] for p in pieces}) > 1:
            raise Refused("pieces of the up factor are missing or of different ranks")
        rank = pieces[0].shape[1]
        if rank * count != len(roles["down"]):
            raise Refused(f"{count} pieces of rank {rank} do not fit a down factor of {len(roles['down'])} ranks")
        height = sum(len(p) for p in pieces)
        up = np.zeros((height, rank * count), pieces[0].dtype)
        start = 0
        for j, piece in enumerate(pieces):
            up[start : start + len(piece), j * rank : (j + 1) * rank] = piece
            start += len(piece)
        return assemble.pair(roles["down"], up, None, self.shape), rank

    def _experts(self, roles: Mapping[str, NDArray[Any]]) -> tuple[Term, int]:
        """PEFT's pair of a stacked parameter: the expert index is slowest in A and fastest in B."""
        assert self.shape is not None
        count = self.shape[0]
        rank = len(roles["down"]) // count
        a = roles["down"].reshape(count, rank, -1)
        b = roles["up"].reshape(-1, rank, count)
        layout = ["e", "o", "i"] if (b.shape[0], a.shape[2]) == self.shape[1:] else ["e", "i", "o"]
        return Term.of([(b, "oke"), (a, "eki")], layout), rank

    def _magnitude(self, delta: Delta) -> Magnitude:
        rows_only = self.g.format in ("peft", "diffusers", "mlx", "ai-toolkit")
        config = self.reader.config
        swapped = self.g.format == "peft" and config is not None and bool(config.document.get("fan_in_fan_out"))
        return assemble.magnitude(self.roles["magnitude"], delta, rows_only=rows_only, transposed=swapped)

    # -- scales

    def _scale(self, rank: int) -> float:
        """The number on the factors, by the format's rule."""
        reader, kind = self.reader, self.g.scale
        alpha = self._number("alpha")
        if kind == "config":
            assert reader.config is not None
            return reader.config.scale(self.group.seen, rank)
        if alpha is not None:
            return alpha / rank if alpha and rank else 1.0
        if kind == "alpha_scale":
            return self._assume(self._number("alpha_scale"), "alpha_scale")
        if kind == "header":
            return self._header_scale(rank)
        if kind == "file":
            value = float(reader.source.metadata.get("adapter.lora.alpha", 0) or 0)
            return value / rank if value else 1.0
        if kind == "number":
            return self._given(rank)
        if kind == "alpha":
            return self._assume(None, "alpha")
        return 1.0

    def _assume(self, value: float | None, what: str) -> float:
        if value is not None:
            return value
        self.assumed = True
        self.reader.notes.append(f"some modules have no {what}: 1 is taken for their scale, as {self.g.format} does")
        return 1.0

    def _number(self, role: str) -> float | None:
        """A scalar that is stored beside the factors."""
        if role not in self.roles:
            return None
        if self.roles[role].size != 1:
            raise Refused(f"{role} is no single number")
        return float(self.roles[role].reshape(-1)[0])

    def _header_scale(self, rank: int) -> float:
        """diffusers: the configuration of the key's component, else 1."""
        table = self.reader.source.header_config
        key = self.group.roles["down"].key
        component = key.partition(".")[0]
        words = {k.partition(".")[2]: v for k, v in table.items() if k.partition(".")[0] == component}
        if not words:
            return self._assume(None, "alpha and the header no configuration")
        path = next(stem for stem, _, _ in self.g.taken_apart(key)).removeprefix(component + ".")
        return Config(words, self.reader.source.path).scale(path, rank)

    def _given(self, rank: int) -> float:
        """MLX and openpi: one number outside the factors."""
        reader = self.reader
        if self.module.path.endswith(self.g.unscaled) and self.g.unscaled:
            return 1.0
        if reader.scale is not None:
            return reader.scale
        for word in ("scale", "alpha"):
            if (text := reader.source.metadata.get(word)) is not None:
                try:
                    value = float(text)
                except ValueError as exc:
                    raise InputError(reader.source.path, f"{word} in the header is {text!r}, not a number") from exc
                return value if word == "scale" else value / rank
        if reader.config is not None:
            inner = reader.config.document.get("lora_parameters")
            found = inner.get("scale") if isinstance(inner, Mapping) else None
            if isinstance(found, int | float):
                return float(found)
        return self._assume(None, "scale")

    # -- full differences

    def _full(self, role: str, array: NDArray[Any], scale: float) -> tuple[str, Delta]:
        """A delta that is stored whole, and the tensor that it is of."""
        base = self.reader.base
        bias = role in ("diff_bias", "set_bias", "up_bias", "norm_bias")
        name = self._bias() if bias else self._weight()
        if role in ("alpha", "magnitude", "alpha_scale"):
            return name, Delta(shape=base.shape(name) or array.shape)
        if role in ("set", "set_bias"):
            array = array.reshape(base.shape(name) or array.shape) - base.values(name, "a tensor that is stored whole")
        term = assemble.full(array, base.shape(name))
        if role == "up_bias":
            term = Term(term.parts, term.layout, term.sizes, scale)
        return name, Delta(shape=term.shape, terms=(term,), whole=role in ("set", "set_bias"))


def _plus(first: Delta, second: Delta) -> Delta:
    """The sum of two deltas of one tensor."""
    return msgspec.structs.replace(first, terms=first.terms + second.terms)


def _last(roles: Mapping[str, NDArray[Any]]) -> int:
    return int(roles["down"].shape[-1] if roles["down"].ndim == 2 or "up" not in roles else roles["up"].shape[-2])
