"""Deltas of a target's tensors written as keys and arrays of one format.

Every scale is kept where the format keeps one. Where it has no place the scale is folded into the up factor; factors
of 16 bits stay so only where that is exact.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import decode, encode
from lineage.lora.delta import Delta, Refused
from lineage.lora.forms import LoHa, LoKr, LowRank
from lineage.lora.grammar import Grammar
from lineage.lora.held import Full, Held, Stacked, Target, held
from lineage.lora.modules import split_name
from lineage.lora.naming import Namer
from lineage.lora.source import HEADER

__all__ = ["Entry", "Written", "factor_dtype", "module_held", "write_keys"]


class Entry(msgspec.Struct, frozen=True):
    """One array of the output: stored codes and their dtype."""

    codes: NDArray[Any]
    dtype: str
    tensor: str


class Written(msgspec.Struct, kw_only=True):
    """An adapter ready to be stored.

    Attributes
    ----------
    format : its grammar
    entries : by key
    header : text pairs of the file's header
    config : adapter_config.json, None where the format has none
    numbers : GGUF's key table besides text
    refused : target tensors that the format cannot hold, with the reason
    ranks : rank of each tensor's pair
    notes : what a user should know
    """

    format: str
    entries: dict[str, Entry] = {}
    header: dict[str, str] = {}
    config: dict[str, Any] | None = None
    numbers: dict[str, float] = {}
    refused: dict[str, str] = {}
    ranks: dict[str, int] = {}
    notes: list[str] = []

    def put(self, key: str, array: NDArray[Any], tensor: str, dtype: str = "F32") -> None:
        """Adds an array in the narrowest of `dtype` and F32 that holds it exactly."""
        if key in self.entries:
            raise Refused(f"two modules have the key {key}")
        word = factor_dtype(array, dtype)
        self.entries[key] = Entry(encode(np.asarray(array, order="C"), word), word, tensor)

    def forget(self, kept: set[str]) -> None:
        """Drops what was added since the keys were `kept`."""
        for key in [k for k in self.entries if k not in kept]:
            del self.entries[key]


def factor_dtype(array: NDArray[Any], dtype: str) -> str:
    """`dtype` where every value survives it, else F32.

    Examples
    --------
    >>> import numpy as np
    >>> factor_dtype(np.array([0.5]), "BF16"), factor_dtype(np.array([0.1]), "BF16")
    ('BF16', 'F32')
    """
    if dtype in ("BF16", "F16") and np.array_equal(decode(encode(array, dtype), dtype), array):
        return dtype
    return "F32"


def module_held(
    deltas: Mapping[str, Delta],
    holds: frozenset[str],
    target: Target,
    dtypes: Mapping[str, str],
    refused: dict[str, str],
    *,
    stacks: tuple[str, ...] = (),
) -> list[Held]:
    """The modules of the target, weight and bias together; what cannot be held goes into `refused`."""
    found: dict[str, Held] = {}
    biases: dict[str, str] = {}
    for name, delta in deltas.items():
        path, part = split_name(name)
        if part == "bias":
            biases[path] = name
            continue
        try:
            found[path] = held(name, delta, holds, target, dtypes.get(name, "F32"), stacks=stacks)
        except Refused as exc:
            refused[name] = str(exc)
    for path, name in biases.items():
        delta = deltas[name]
        pair = found.get(path)
        if not ({"vectors", "whole"} & holds or ("up_bias" in holds and pair is not None and pair.form is not None)):
            refused[name] = "this format holds no differences of biases"
            continue
        if pair is None:
            pair = Held(path=path, tensor=name, shape=delta.shape, dtype=dtypes.get(name, "F32"))
        found[path] = msgspec.structs.replace(
            pair, bias=delta.dense(), bias_tensor=name, bias_whole=delta.whole or pair.form is None
        )
    return list(found.values())


def write_keys(g: Grammar, deltas: Mapping[str, Delta], target: Target, dtypes: Mapping[str, str]) -> Written:
    """Keys and arrays of every format but PEFT.

    Parameters
    ----------
    deltas : by tensor of the target
    dtypes : stored dtype of the source's factors by tensor of the target
    """
    written = Written(format=g.format)
    some = module_held(deltas, frozenset(g.holds), target, dtypes, written.refused, stacks=g.stacks)
    writer = _Writer(g, written, target)
    some = writer.named(some)
    pairs = [h.form for h in some if isinstance(h.form, LowRank)]
    writer.rank = max((p.rank for p in pairs), default=0) if g.pad_ranks else 0
    writer.settle_scale(some)
    for h in some:
        before = set(written.entries)
        try:
            writer.module(h)
        except Refused as exc:
            written.forget(before)
            for name in filter(None, (h.tensor, h.bias_tensor)):
                written.refused[name] = str(exc)
    return written


class _Writer:
    """One file being put together."""

    def __init__(self, g: Grammar, written: Written, target: Target) -> None:
        self.g, self.out, self.target = g, written, target
        self.namer = Namer(g, target.shapes, verbatim=target.verbatim)
        self.rank = 0
        self.scale: float | None = None
        self.header_configs: dict[str, bool] = {}

    def named(self, some: Sequence[Held]) -> list[Held]:
        """Modules that the format can name; others are refused."""
        kept = []
        for h in some:
            try:
                self.key(h, "down" if "down" in self.g.roles else "up")
                kept.append(h)
            except Refused as exc:
                for name in filter(None, (h.tensor, h.bias_tensor)):
                    self.out.refused[name] = str(exc)
        return kept

    def key(self, h: Held, role: str) -> str:
        """The key of one array."""
        return self.namer.key(h.path, h.tensor, role)

    # -- scales that belong to the file

    def settle_scale(self, some: Sequence[Held]) -> None:
        """One scale for the file where the format has one place for it."""
        pairs = [h.form for h in some if isinstance(h.form, LowRank)]
        scales = {p.scale for p in pairs}
        others = any(isinstance(h.form, Stacked) for h in some)
        if self.g.format == "mlx":
            self.scale = scales.pop() if len(scales) == 1 and not others else 1.0
            self.out.header = {"format": "mlx", "scale": repr(self.scale), "rank": str(self.rank)}
            self.out.config = {
                "fine_tune_type": "dora" if any(h.magnitude for h in some) else "lora",
                "num_layers": -1,
                "lora_parameters": {
                    "rank": self.rank, "dropout": 0.0, "scale": self.scale,
                    "keys": sorted({re.sub(r"^.*?\.\d+\.", "", h.path) for h in some if h.form is not None}),
                },
            }  # fmt: skip
        elif self.g.format == "gguf":
            ranks = {p.rank for p in pairs}
            common = len(scales) == len(ranks) == 1 and not others
            scale, rank = (next(iter(scales)), next(iter(ranks))) if common else (1.0, 0)
            alpha = float(np.float32(scale * rank))
            exact = bool(rank) and alpha / rank == scale
            self.scale = scale if exact else 1.0
            self.out.numbers = {"adapter.lora.alpha": alpha if exact else 0.0}
        elif self.g.format == "diffusers":
            for h in some:
                component = self._diffusers_component(h)
                if isinstance(h.form, LowRank) and component in ("unet", "transformer"):
                    inexact = math.frexp(h.form.scale)[0] != 0.5
                    self.header_configs[component] = self.header_configs.get(component, False) or inexact

    def _diffusers_component(self, h: Held) -> str:
        return self.key(h, "down").partition(".")[0]

    # -- modules

    def module(self, h: Held) -> None:
        """All keys of one module."""
        form, g = h.form, self.g
        scale = 1.0
        if isinstance(form, Stacked):
            self._stacked(h, form)
        elif isinstance(form, LowRank):
            scale = self._pair(h, form)
        elif isinstance(form, LoHa):
            self._loha(h, form)
        elif isinstance(form, LoKr):
            self._lokr(h, form)
        elif isinstance(form, Full):
            self.out.put(self.key(h, "diff"), form.array, h.tensor, h.dtype)
        if h.magnitude is not None:
            self._magnitude(h)
        if h.bias is None:
            return
        if "up_bias" in g.roles:
            self.out.put(self.key(h, "up_bias"), h.bias / scale, h.bias_tensor, h.dtype)
        else:
            self.out.put(self.key(h, "diff_bias"), h.bias, h.bias_tensor, h.dtype)

    def _pair(self, h: Held, form: LowRank) -> float:
        """An up and a down factor; the scale that stays outside of them."""
        g, up, down = self.g, form.up, form.down
        scale = self._kept_scale(h, form)
        if scale != form.scale:
            up = up.astype(np.float64) * (form.scale / scale)
        if self.rank > form.rank and not g.blocks:
            up = np.pad(up, ((0, 0), (0, self.rank - form.rank)))
            down = np.pad(down, ((0, self.rank - form.rank), (0, 0)))
        self.out.ranks[h.tensor] = form.rank
        if g.only_aliases:
            up = self._window(h, up)
        if g.format == "longcat":
            self._pieces(h, up, down, form.scale)
            return scale
        table = h.delta is not None and h.delta.embedding
        if g.transposed:
            self.out.put(self.key(h, "down"), down.T if not table else up, h.tensor, h.dtype)
            self.out.put(self.key(h, "up"), up.T if not table else down, h.tensor, h.dtype)
            return scale
        if table and g.format == "gguf":
            self.out.put(self.key(h, "down"), up, h.tensor, h.dtype)
            self.out.put(self.key(h, "up"), down.T, h.tensor, h.dtype)
            return scale
        kernel = h.shape[2:]
        ones = (1,) * len(kernel)
        if form.mid is not None:
            self.out.put(self.key(h, "mid"), form.mid, h.tensor, h.dtype)
            down = down.reshape(*down.shape, *ones)
        elif kernel:
            down = down.reshape(-1, *h.shape[1:])
        self.out.put(self.key(h, "down"), down, h.tensor, h.dtype)
        self.out.put(self.key(h, "up"), up.reshape(*up.shape, *ones), h.tensor, h.dtype)
        if g.scale == "alpha":
            self._alpha(h, scale * len(form.down))
        return scale

    def _window(self, h: Held, up: NDArray[Any]) -> NDArray[Any]:
        """The rows that the format's key means: all, or as many first ones as three times the columns."""
        alias = self.g.alias_of(self.namer.short(h.path))
        count = 3 * h.shape[1]
        if alias is None or alias.rows == "all" or len(up) <= count:
            return up
        if up[count:].any():
            raise Refused("this format holds the first rows of the layer only (query, key and value)")
        return up[:count]

    def _kept_scale(self, h: Held, form: LowRank) -> float:
        """The part of the scale that the format keeps outside the factors."""
        if self.scale is not None:
            return self.scale
        if self.g.scale in ("alpha", "alpha_scale"):
            return form.scale
        if self.g.scale == "header" and self.header_configs.get(component := self._diffusers_component(h)):
            self._header(component, h, form)
            return form.scale
        return 1.0

    def _alpha(self, h: Held, alpha: float) -> None:
        """Alpha in float32, or in float64 where that is needed to give the scale back."""
        word = "F32" if float(np.float32(alpha)) == alpha else "F64"
        self.out.entries[self.key(h, "alpha")] = Entry(encode(np.array(alpha), word), word, h.tensor)

    def _header(self, component: str, h: Held, form: LowRank) -> None:
        """One module's rank and alpha in diffusers' header."""
        table = json.loads(self.out.header.get(HEADER, "{}"))
        path = self.key(h, "down").removeprefix(component + ".").removesuffix(".lora_A.weight")
        table.setdefault(f"{component}.r", form.rank)
        table.setdefault(f"{component}.lora_alpha", form.scale * form.rank)
        table.setdefault(f"{component}.target_modules", []).append(path)
        table.setdefault(f"{component}.rank_pattern", {})
        table.setdefault(f"{component}.alpha_pattern", {})
        if form.rank != table[f"{component}.r"]:
            table[f"{component}.rank_pattern"]["^" + re.escape(path)] = form.rank
        if form.scale * form.rank != table[f"{component}.lora_alpha"]:
            table[f"{component}.alpha_pattern"]["^" + re.escape(path)] = form.scale * form.rank
        table[f"{component}.use_dora"] = table.get(f"{component}.use_dora", False) or h.magnitude is not None
        table[f"{component}.lora_bias"] = table.get(f"{component}.lora_bias", False) or h.bias is not None
        self.out.header[HEADER] = json.dumps(table, sort_keys=True)

    def _pieces(self, h: Held, up: NDArray[Any], down: NDArray[Any], scale: float) -> None:
        """LongCat: as many pieces of the up factor as the module has, each with its own ranks."""
        ends = [e for e in self.g.blocks if h.path.endswith(e)]
        count = self.g.blocks[max(ends, key=len)] if ends else 1
        count = count if len(up) % count == 0 else 1
        self.out.put(self.key(h, "alpha_scale"), np.array(scale), h.tensor)
        height = len(up) // count
        some = []
        for j in range(count):
            piece = up[j * height : (j + 1) * height]
            alive = np.flatnonzero(piece.any(axis=0)) if count > 1 else np.arange(piece.shape[1])
            some.append((piece[:, alive], down[alive]))
        rank = max(self.rank, *(len(d) for _, d in some))
        padded = [
            (np.pad(u, ((0, 0), (0, rank - u.shape[1]))), np.pad(d, ((0, rank - len(d)), (0, 0)))) for u, d in some
        ]
        self.out.put(self.key(h, "down"), np.concatenate([d for _, d in padded]), h.tensor, h.dtype)
        if count == 1:
            self.out.put(self.key(h, "up"), padded[0][0], h.tensor, h.dtype)
            return
        for j, (piece, _) in enumerate(padded):
            self.out.put(self.key(h, "up_piece").replace("{j}", str(j)), piece, h.tensor, h.dtype)

    def _loha(self, h: Held, form: LoHa) -> None:
        for role in ("w1_a", "w1_b", "w2_a", "w2_b"):
            self.out.put(self.key(h, f"hada_{role}"), getattr(form, role), h.tensor, h.dtype)
        rank = len(form.w1_b)
        self.out.ranks[h.tensor] = rank
        self._alpha(h, form.scale * rank)

    def _lokr(self, h: Held, form: LoKr) -> None:
        """Factors whole or as products; the scale counts only where a factor is a product."""
        product = form.w2 if len(form.w2) == 2 else form.w1 if len(form.w1) == 2 else None
        w1 = list(form.w1)
        if product is None and form.scale != 1.0:
            w1[0] = w1[0].astype(np.float64) * form.scale
        for name, factor in (("lokr_w1", w1), ("lokr_w2", list(form.w2))):
            for array, end in zip(factor, ("",) if len(factor) == 1 else ("_a", "_b"), strict=True):
                self.out.put(self.key(h, name + end), array, h.tensor, h.dtype)
        if product is not None:
            self.out.ranks[h.tensor] = len(product[1])
            self._alpha(h, form.scale * len(product[1]))

    def _stacked(self, h: Held, form: Stacked) -> None:
        """Pairs beside an einsum kernel, or of a stack of experts."""
        lead = h.shape[:-2]
        rank = form.ups.shape[2]
        self.out.ranks[h.tensor] = rank
        ups = form.ups.reshape(*lead, *form.ups.shape[1:])
        downs = form.downs.reshape(*lead, *form.downs.shape[1:])
        if self.g.format == "openpi":
            if h.path.endswith(self.g.shared_up) and len(lead) > 0:
                ups, downs = self._shared(h)
            self.out.put(self.key(h, "down"), ups, h.tensor, h.dtype)
            self.out.put(self.key(h, "up"), downs, h.tensor, h.dtype)
            return
        scale = self.scale or 1.0
        self.out.put(self.key(h, "down"), downs, h.tensor, h.dtype)
        self.out.put(self.key(h, "up"), ups / scale, h.tensor, h.dtype)

    def _shared(self, h: Held) -> tuple[NDArray[Any], NDArray[Any]]:
        """Factors whose second one counts summed over the heads: it stands at the first head alone."""
        from lineage.lora.forms import low_rank, slices

        assert h.delta is not None
        heads, rows, columns = h.shape[-3:]
        pairs = [low_rank(d, rows=(0, 1)) for d in slices(h.delta, len(h.shape) - 3)]
        rank = max(p.rank for p in pairs)
        first = np.zeros((len(pairs), heads, rows, rank))
        second = np.zeros((len(pairs), heads, rank, columns))
        for k, p in enumerate(pairs):
            first[k, ..., : p.rank] = p.up.reshape(heads, rows, -1).astype(np.float64) * p.scale
            second[k, 0, : p.rank] = p.down
        lead = h.shape[:-3]
        return first.reshape(*lead, heads, rows, rank), second.reshape(*lead, heads, rank, columns)

    def _magnitude(self, h: Held) -> None:
        """DoRA's vector in the shape that the format gives it."""
        assert h.magnitude is not None
        axis, vector = h.magnitude
        if self.g.roles["magnitude"][0] == "dora_scale":
            vector = vector.reshape([-1 if k == axis else 1 for k in range(len(h.shape))])
        elif self.g.format == "diffusers" and len(h.shape) > 2:
            vector = vector.reshape(1, -1, *(1,) * (len(h.shape) - 2))
        self.out.put(self.key(h, "magnitude"), vector, h.tensor, h.dtype)
