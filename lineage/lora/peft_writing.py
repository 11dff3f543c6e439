"""A PEFT folder from deltas: factors, configuration, patterns; one kind of adapter for the whole folder.

Source: peft 0.21.2 `tuners/lora/layer.py` (ParamWrapper, MultiheadAttention), `tuners/lokr/layer.py` factorization,
`utils/other.py` get_pattern_key.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from lineage.lora.delta import Delta, Refused
from lineage.lora.forms import LoHa, LoKr, LowRank
from lineage.lora.grammar import grammar
from lineage.lora.held import Full, Held, Stacked, Target, row_norms
from lineage.lora.modules import split_name
from lineage.lora.peft import escaped
from lineage.lora.writing import Written, module_held

__all__ = ["factorized", "write_peft"]

_PREFIX = "base_model.model."


def write_peft(
    deltas: Mapping[str, Delta], target: Target, dtypes: Mapping[str, str], *, origin: Mapping[str, Any] | None = None
) -> Written:
    """Keys, arrays and configuration.

    Parameters
    ----------
    deltas : by tensor of the target
    dtypes : stored dtype of the source's factors by tensor of the target
    origin : configuration of the adapter that this one was made of
    """
    g = grammar("peft")
    for kind in ("LOHA", "LOKR", "LORA"):
        holds = frozenset(g.holds) & {"rows", "stacked", "up_bias", "whole"}
        if kind != "LORA":
            holds = frozenset({"loha"} if kind == "LOHA" else {"lokr"})
        written = Written(format="peft")
        some = module_held(deltas, holds, target, dtypes, written.refused)
        factor = _fitting(kind, some, written, origin or {}, _attentions(target))
        if factor is not None:
            break
    writer = _Folder(written, target, some, kind, origin or {})
    writer.run()
    if kind == "LOKR":
        writer.config["decompose_factor"] = factor
        writer.config["decompose_both"] = any(isinstance(h.form, LoKr) and len(h.form.w1) == 2 for h in some)
    return written


def _attentions(target: Target) -> set[str]:
    """Modules that are torch's nn.MultiheadAttention."""
    return {n.removesuffix(".in_proj_weight") for n in target.shapes if n.endswith(".in_proj_weight")}


def _fitting(
    kind: str, some: Sequence[Held], written: Written, origin: Mapping[str, Any], attentions: set[str]
) -> int | None:
    """Whether the folder can be of this kind: LoKr's decompose_factor, any number for the others; None where not."""
    if kind == "LORA":
        return 0
    if written.refused or any(h.bias is not None or h.magnitude is not None for h in some):
        return None
    if any(h.path.rpartition(".")[0] in attentions for h in some):
        return None
    if kind == "LOHA":
        return 0 if some and all(isinstance(h.form, LoHa) for h in some) else None
    forms = [h.form for h in some]
    if not forms or not all(isinstance(f, LoKr) for f in forms) or any(len(h.shape) > 2 for h in some):
        return None
    given = origin.get("decompose_factor")
    tried = ([given] if isinstance(given, int) else []) + [-1, *range(2, 65)]
    return next((f for f in tried if all(_loadable(h, f) for h in some)), None)


def _loadable(h: Held, factor: int) -> bool:
    """Whether PEFT would make factors of these shapes for a linear layer."""
    assert isinstance(h.form, LoKr)
    (a, c), (b, d) = (factorized(n, factor) for n in h.shape)
    w1, w2 = h.form.w1, h.form.w2
    ends = (w1[0].shape[0], w1[-1].shape[-1], w2[0].shape[0], w2[-1].shape[-1])
    rank = len(w2[1]) if len(w2) == 2 else len(w1[1]) if len(w1) == 2 else max(c, d)
    whole = rank >= max(c, d) / 2
    if len(w1) == 2 and (rank >= max(a, b) / 2 or len(w1[1]) != rank):
        return False
    return ends == (a, b, c, d) and whole == (len(w2) == 1)


def factorized(dimension: int, factor: int) -> tuple[int, int]:
    """PEFT's two factors of a dimension.

    Examples
    --------
    >>> factorized(128, 4), factorized(128, -1), factorized(127, -1)
    ((4, 32), (8, 16), (1, 127))
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small = max(m for m in range(1, int(dimension**0.5) + 1) if dimension % m == 0 and (m <= limit or m == 1))
    return small, dimension // small


class _Folder:
    """One folder being put together."""

    def __init__(
        self, written: Written, target: Target, some: Sequence[Held], kind: str, origin: Mapping[str, Any]
    ) -> None:
        self.out, self.target, self.some, self.kind = written, target, list(some), kind
        self.ranks: dict[str, int] = {}
        self.alphas: dict[str, float] = {}
        self.modules: list[str] = []
        self.parameters: list[str] = []
        self.saved: list[str] = []
        self.biases = self.up_biases = False
        self.dora = any(h.magnitude is not None for h in self.some)
        self.config: dict[str, Any] = {
            "peft_type": kind,
            "base_model_name_or_path": None,
            "task_type": origin.get("task_type"),
            "inference_mode": True,
        }
        written.config = self.config

    def run(self) -> None:
        """All modules, then the configuration that says how to load them."""
        attention, stacked, rest = self._sorted()
        for path, parts in attention.items():
            self._try(parts, lambda path=path, parts=parts: self._attention(path, parts))
        for module, parts in stacked.items():
            self._try(parts, lambda module=module, parts=parts: self._experts(module, parts))
        rest = self._biases_settled(rest)
        for h in rest:
            self._try([h], lambda h=h: self._module(h))
        self._configure()

    def _biases_settled(self, rest: list[Held]) -> list[Held]:
        """Biases as those of the up factors, which all modules then have, or whole where some modules have none."""
        pairs = [h for h in rest if isinstance(h.form, LowRank)]
        own = {split_name(name)[0] for name in self.target.shapes if split_name(name)[1] == "bias"}
        changed = {h.path: h.bias_tensor for h in pairs if h.bias is not None and not h.bias_whole}
        lacking = any(h.path not in own for h in pairs)
        if lacking and all(self.target.values(name) is not None for name in changed.values()):
            return [msgspec.structs.replace(h, bias_whole=True) if h.path in changed else h for h in rest]
        self.up_biases = bool(changed)
        return rest

    def _try(self, parts: Sequence[Held], write: Any) -> None:
        before = set(self.out.entries)
        try:
            write()
        except Refused as exc:
            self.out.forget(before)
            for h in parts:
                for name in filter(None, (h.tensor, h.bias_tensor)):
                    self.out.refused[name] = str(exc)

    def _sorted(self) -> tuple[dict[str, list[Held]], dict[str, list[Held]], list[Held]]:
        """Modules inside nn.MultiheadAttention, stacked parameters by their module, and all others."""
        inside = _attentions(self.target)
        attention: dict[str, list[Held]] = defaultdict(list)
        stacked: dict[str, list[Held]] = defaultdict(list)
        rest = []
        for h in self.some:
            parent, _, last = h.path.rpartition(".")
            if parent in inside and last in ("in_proj_weight", "out_proj") and h.form is not None:
                attention[parent].append(h)
            elif isinstance(h.form, Stacked):
                stacked[parent].append(h)
            else:
                rest.append(h)
        return attention, stacked, rest

    # -- kinds of modules

    def _pair(self, key: str, form: LowRank, h: Held) -> None:
        kernel = h.shape[2:] if len(h.shape) > 2 else ()
        down = form.down.reshape(-1, *h.shape[1:]) if kernel else form.down
        up = form.up.reshape(*form.up.shape, *(1,) * len(kernel))
        self.out.put(f"{_PREFIX}{key}.lora_A.weight", down, h.tensor, h.dtype)
        self.out.put(f"{_PREFIX}{key}.lora_B.weight", up, h.tensor, h.dtype)
        self.out.ranks[h.tensor] = form.rank

    def _module(self, h: Held) -> None:
        """A module of its own: factors, DoRA, bias; or saved whole."""
        if h.form is None or isinstance(h.form, Full):
            self._whole(h)
            return
        if isinstance(h.form, LoHa | LoKr):
            self._product(h, h.form)
            return
        assert isinstance(h.form, LowRank)
        if h.delta is not None and h.delta.embedding:
            self.out.put(f"{_PREFIX}{h.path}.lora_embedding_A", h.form.up.T, h.tensor, h.dtype)
            self.out.put(f"{_PREFIX}{h.path}.lora_embedding_B", h.form.down.T, h.tensor, h.dtype)
            self.out.ranks[h.tensor] = h.form.rank
        else:
            self._pair(h.path, h.form, h)
        self.modules.append(h.path)
        self._scaled(h.path, h.form.rank, h.form.scale)
        if self.dora:
            self._magnitude(h)
        if h.bias is not None and h.bias_whole:
            base = self.target.need(h.bias_tensor, "a bias that is stored whole")
            self.out.put(f"{_PREFIX}{h.path}.base_layer.bias", base + h.bias, h.bias_tensor, h.dtype)
            self.biases = True
        if self.up_biases:
            bias = np.zeros(h.shape[0]) if h.bias is None or h.bias_whole else h.bias / h.form.scale
            self.out.put(f"{_PREFIX}{h.path}.lora_B.bias", bias, h.bias_tensor or h.tensor, h.dtype)

    def _magnitude(self, h: Held) -> None:
        """The vector of a module; where it has none, the norms that change nothing."""
        assert h.delta is not None
        vector = h.magnitude[1] if h.magnitude is not None else row_norms(h.tensor, h.delta, self.target)
        shape = (1, -1, *(1,) * (len(h.shape) - 2)) if len(h.shape) > 2 else (-1,)
        self.out.put(f"{_PREFIX}{h.path}.lora_magnitude_vector", vector.reshape(shape), h.tensor, h.dtype)

    def _product(self, h: Held, form: LoHa | LoKr) -> None:
        """LoHa's four factors, or LoKr's."""
        if isinstance(form, LoHa):
            arrays = {f"hada_{n}": getattr(form, n) for n in ("w1_a", "w1_b", "w2_a", "w2_b")}
            rank = len(form.w1_b)
        else:
            arrays = {}
            for name, factor in (("lokr_w1", form.w1), ("lokr_w2", form.w2)):
                ends = ("",) if len(factor) == 1 else ("_a", "_b")
                arrays.update({name + end: array for array, end in zip(factor, ends, strict=True)})
            products = [f for f in (form.w2, form.w1) if len(f) == 2]
            rank = len(products[0][1]) if products else max(form.w2[0].shape)
        for name, array in arrays.items():
            self.out.put(f"{_PREFIX}{h.path}.{name}", array, h.tensor, h.dtype)
        self.modules.append(h.path)
        self._scaled(h.path, rank, form.scale)
        self.out.ranks[h.tensor] = rank

    def _whole(self, h: Held) -> None:
        """A module whose weight or bias is replaced: both are stored."""
        if self.kind != "LORA":
            raise Refused("this kind of PEFT adapter holds no full differences")
        path, found = h.path, {}
        if h.form is not None:
            assert isinstance(h.form, Full)
            found["weight"] = (h.tensor, h.form.array)
        if h.bias is not None:
            found["bias"] = (h.bias_tensor, h.bias)
        for name in self.target.shapes:
            module, part = split_name(name)
            if module == path and part not in found and name != path:
                found[part] = (name, np.zeros(self.target.shapes[name]))
        for part, (name, change) in found.items():
            value = self.target.need(name, "a module that PEFT stores whole") + change
            self.out.put(f"{_PREFIX}{path}.{part}", value, name, h.dtype)
        self.saved.append(path)

    def _attention(self, path: str, parts: Sequence[Held]) -> None:
        """nn.MultiheadAttention: PEFT adapts in_proj and out_proj together, with one rank and one scale."""
        if self.dora or any(h.bias is not None for h in parts):
            raise Refused("PEFT's attention takes no biases and no DoRA")
        forms = {h.path.rpartition(".")[2]: h for h in parts}
        pairs = {k: h.form for k, h in forms.items() if isinstance(h.form, LowRank)}
        scale = next(iter(pairs.values())).scale
        rank = max(p.rank for p in pairs.values())
        for last, key in (("in_proj_weight", path), ("out_proj", f"{path}.base_layer.out_proj")):
            name = f"{path}.{last}" if last == "in_proj_weight" else f"{path}.{last}.weight"
            shape = self.target.shapes.get(name)
            if shape is None:
                raise Refused(f"the target has no {name}")
            h = forms.get(last, Held(path=path, tensor=name, shape=shape))
            p = pairs.get(last) or LowRank(
                np.zeros((shape[0], rank), np.float32), np.zeros((rank, shape[1]), np.float32), scale
            )
            up = p.up if p.scale == scale else p.up.astype(np.float64) * (p.scale / scale)
            grown = LowRank(
                np.pad(up, ((0, 0), (0, rank - p.rank))), np.pad(p.down, ((0, rank - p.rank), (0, 0))), scale
            )
            self._pair(key, grown, h)
        self.modules.append(path)
        self._scaled(path, rank, scale)

    def _experts(self, module: str, parts: Sequence[Held]) -> None:
        """Stacked parameters of one module: nested wrappers, the last one outermost."""
        order = grammar("peft").inner_first
        parts = sorted(
            parts, key=lambda h: order.index(w) if (w := h.tensor.rpartition(".")[2]) in order else len(order)
        )
        for k, h in enumerate(parts):
            assert isinstance(h.form, Stacked)
            key = module + ".base_layer" * (len(parts) - 1 - k)
            count, rank, _ = h.form.downs.shape
            down = h.form.downs.reshape(count * rank, -1)
            up = np.transpose(h.form.ups, (1, 2, 0)).reshape(h.shape[1], rank * count)
            self.out.put(f"{_PREFIX}{key}.lora_A.weight", down, h.tensor, h.dtype)
            self.out.put(f"{_PREFIX}{key}.lora_B.weight", up, h.tensor, h.dtype)
            self.parameters.append(h.tensor)
            self._scaled(h.tensor, rank, 1.0)
            self.out.ranks[h.tensor] = rank

    # -- configuration

    def _scaled(self, path: str, rank: int, scale: float) -> None:
        self.ranks[path], self.alphas[path] = rank, scale * rank

    def _configure(self) -> None:
        config, lora = self.config, self.kind == "LORA"
        rank = Counter(self.ranks.values()).most_common(1)[0][0] if self.ranks else 8
        alpha = Counter(self.alphas.values()).most_common(1)[0][0] if self.alphas else 8
        paths = list(self.ranks)
        every = {split_name(n)[0] for n in self.target.shapes}
        config["r"] = rank
        config["lora_alpha" if lora else "alpha"] = _plain(alpha)
        config["rank_pattern"] = {escaped(p, paths): r for p, r in self.ranks.items() if r != rank}
        config["alpha_pattern"] = {escaped(p, paths): _plain(a) for p, a in self.alphas.items() if a != alpha}
        unclear = any(o != p and o.endswith("." + p) and o not in self.modules for p in self.modules for o in every)
        config["target_modules"] = "|".join(re.escape(p) for p in self.modules) if unclear else sorted(self.modules)
        config["modules_to_save"] = sorted(self.saved) or None
        if not lora:
            return
        config.update(
            bias="lora_only" if self.biases else "none",
            fan_in_fan_out=False,
            init_lora_weights=True,
            lora_bias=self.up_biases,
            lora_dropout=0.0,
            use_dora=self.dora,
            use_rslora=False,
        )
        if self.parameters:
            config["target_parameters"] = self.parameters


def _plain(number: float) -> float | int:
    """Whole numbers without a fraction, as PEFT writes them."""
    return int(number) if float(number).is_integer() else number
