"""What keeps a decoder's function and changes its weights, and small networks of other kinds to disguise."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.layout.mapping import Mapping as Layout
from lineage.layout.mapping import Rule
from lineage.layout.operations import Concat
from tests.match.models import HEAD, HEADS, KV, LAYERS, Tensors

Array = NDArray[Any]
Disguise = Callable[[Tensors, int], Tensors]
READERS = re.compile(r"(q_proj|k_proj|v_proj|gate_proj|up_proj|lm_head)\.weight")
WRITERS = re.compile(r"(o_proj|down_proj)\.weight")


def turned(tensors: Tensors, turn: Array) -> Tensors:
    """The residual stream under an orthogonal matrix; gains are left alone."""
    out = dict(tensors)
    for name, x in tensors.items():
        if READERS.search(name) or "embed" in name:
            out[name] = (x @ turn.T).astype(np.float32)
        elif WRITERS.search(name):
            out[name] = (turn @ x).astype(np.float32)
    return out


def signed_channels(tensors: Tensors, seed: int) -> Tensors:
    """Residual channels in another order, half of them flipped."""
    rng = np.random.default_rng(seed)
    width = tensors["model.norm.weight"].shape[0]
    order, signs = rng.permutation(width), rng.choice([-1.0, 1.0], width)
    out = turned(tensors, signs[:, None] * np.eye(width)[order])
    return out | {name: x[order] for name, x in tensors.items() if "norm" in name}


def folded(tensors: Tensors) -> Tensors:
    """Gains multiplied into what reads through them."""
    out = dict(tensors)
    for name, x in tensors.items():
        at = name.split("self_attn")[0].split("mlp")[0]
        if READERS.search(name):
            norm = "post_attention_layernorm" if "mlp" in name else "input_layernorm"
            gain = tensors["model.norm.weight" if "lm_head" in name else at + norm + ".weight"]
            out[name] = x * gain
        elif "norm" in name:
            out[name] = np.ones_like(x)
    return out


def rotated(tensors: Tensors, seed: int) -> Tensors:
    """Norms folded, the residual stream turned."""
    width = tensors["model.norm.weight"].shape[0]
    return turned(folded(tensors), np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0])


def neurons(tensors: Tensors, seed: int) -> Tensors:
    """MLP neurons in another order, flipped and scaled between reading and writing."""
    rng, out = np.random.default_rng(seed), dict(tensors)
    for name in tensors:
        if "down_proj" in name:
            at, units = name.split("down_proj")[0], tensors[name].shape[1]
            order, scale = rng.permutation(units), rng.choice([-1, 1], units) * np.exp(0.5 * rng.standard_normal(units))
            out[at + "gate_proj.weight"] = tensors[at + "gate_proj.weight"][order]
            out[at + "up_proj.weight"] = (tensors[at + "up_proj.weight"][order] * scale[:, None]).astype(np.float32)
            out[name] = (tensors[name][:, order] / scale).astype(np.float32)
    return out


def heads(tensors: Tensors, seed: int) -> Tensors:
    """Key/value groups in another order, and query heads inside them."""
    rng, out = np.random.default_rng(seed), dict(tensors)
    for i in range(LAYERS):
        at, each = f"model.layers.{i}.self_attn.", HEADS // KV
        groups = np.roll(np.arange(KV), 1)
        order = np.concatenate([g * each + rng.permutation(each) for g in groups])
        for part, chosen in (("q", order), ("k", groups), ("v", groups)):
            rows = (chosen[:, None] * HEAD + np.arange(HEAD)).ravel()
            for leaf in (f"{part}_proj.weight", f"{part}_proj.bias"):
                out[at + leaf] = tensors[at + leaf][rows]
        columns = (order[:, None] * HEAD + np.arange(HEAD)).ravel()
        out[at + "o_proj.weight"] = tensors[at + "o_proj.weight"][:, columns]
    return out


def bases(tensors: Tensors, seed: int) -> Tensors:
    """Values and outputs in new bases, rotary planes of queries and keys turned and scaled."""
    rng, out = np.random.default_rng(seed), {name: np.array(x, np.float64) for name, x in tensors.items()}
    half, each = HEAD // 2, HEADS // KV
    for i in range(LAYERS):
        at = f"model.layers.{i}.self_attn."
        for g in range(KV):
            basis = rng.standard_normal((HEAD, HEAD)) + np.eye(HEAD)
            angle, size = rng.uniform(0, 6, half), np.exp(0.3 * rng.standard_normal(half))
            c, s = np.diag(size * np.cos(angle)), np.diag(size * np.sin(angle))
            planes = np.block([[c, -s], [s, c]])
            rows = slice(g * HEAD, (g + 1) * HEAD)
            for leaf in ("weight", "bias"):
                out[at + f"v_proj.{leaf}"][rows] = basis @ out[at + f"v_proj.{leaf}"][rows]
                out[at + f"k_proj.{leaf}"][rows] = planes @ out[at + f"k_proj.{leaf}"][rows]
            for h in range(g * each, (g + 1) * each):
                here = slice(h * HEAD, (h + 1) * HEAD)
                out[at + "o_proj.weight"][:, here] = out[at + "o_proj.weight"][:, here] @ np.linalg.inv(basis)
                for leaf in ("weight", "bias"):
                    out[at + f"q_proj.{leaf}"][here] = np.linalg.inv(planes).T @ out[at + f"q_proj.{leaf}"][here]
    return {name: x.astype(np.float32) for name, x in out.items()}


def scaled_norms(tensors: Tensors, seed: int) -> Tensors:
    """Gains and what reads through them scaled against each other, channel by channel."""
    rng, out = np.random.default_rng(seed), dict(tensors)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for norm, names in (("input", "self_attn.{}_proj qkv"), ("post_attention", "mlp.{}_proj gate up")):
            by = np.exp(0.5 * rng.standard_normal(len(tensors[at + f"{norm}_layernorm.weight"]))).astype(np.float32)
            out[at + f"{norm}_layernorm.weight"] = tensors[at + f"{norm}_layernorm.weight"] * by
            for word in ("q", "k", "v") if norm == "input" else ("gate", "up"):
                name = at + names.split()[0].format(word) + ".weight"
                out[name] = tensors[name] / by
    return out


def everything(tensors: Tensors, seed: int) -> Tensors:
    """All of it, one after the other."""
    for disguise in (heads, bases, neurons, rotated, scaled_norms):
        tensors = disguise(tensors, seed)
    return tensors


def narrowed(tensors: Tensors, kept: Array) -> Tensors:
    """Only these residual channels."""
    out = {}
    for name, x in tensors.items():
        if READERS.search(name) or "embed" in name:
            out[name] = x[:, kept]
        elif WRITERS.search(name) or "norm" in name:
            out[name] = x[kept]
        else:
            out[name] = x
    return out


def fused(tensors: Tensors) -> tuple[Tensors, Layout]:
    """Query, key and value, and gate and up, in one tensor each, under other names; and the mapping to it."""
    out: Tensors = {}
    rules = []
    for i in range(LAYERS):
        old, new = f"model.layers.{i}.", f"blocks.{i}."
        groups = {
            f"{new}attn.qkv.weight": [f"{old}self_attn.{x}_proj.weight" for x in "qkv"],
            f"{new}attn.qkv.bias": [f"{old}self_attn.{x}_proj.bias" for x in "qkv"],
            f"{new}mlp.gate_up.weight": [f"{old}mlp.{x}_proj.weight" for x in ("gate", "up")],
            f"{new}attn.out.weight": [f"{old}self_attn.o_proj.weight"],
            f"{new}mlp.down.weight": [f"{old}mlp.down_proj.weight"],
            f"{new}norm1.weight": [f"{old}input_layernorm.weight"],
            f"{new}norm2.weight": [f"{old}post_attention_layernorm.weight"],
        }
        for name, parts in groups.items():
            out[name] = np.concatenate([tensors[p] for p in parts])
            sizes = tuple(len(tensors[p]) for p in parts)
            rules.append(Rule(to=(name,), source=tuple(parts), ops=(Concat(0, sizes),) if len(parts) > 1 else ()))
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        out[name.replace("model.", "")] = tensors[name]
        rules.append(Rule(to=(name.replace("model.", ""),), source=(name,)))
    return out, Layout(rules=tuple(rules))


# -- other kinds of networks


def transposed_model(seed: int) -> Tensors:
    """A decoder with learned positions, layer norms, biases, one reader an MLP and matrices input by output."""
    rng, width, hidden = np.random.default_rng(seed), 40, 96

    def matrix(*shape: int) -> Array:
        return (rng.standard_normal(shape) / 6).astype(np.float32)

    out = {"wte.weight": matrix(80, width), "wpe.weight": matrix(30, width)}
    for i in range(3):
        at = f"h.{i}."
        for name, shape in (
            ("attn.c_attn", (width, 3 * width)), ("attn.c_proj", (width, width)),
            ("mlp.c_fc", (width, hidden)), ("mlp.c_proj", (hidden, width)),
        ):  # fmt: skip
            out |= {at + name + ".weight": matrix(*shape), at + name + ".bias": matrix(shape[1])}
        for norm in ("ln_1", "ln_2"):
            out |= {at + norm + ".weight": 1 + matrix(width), at + norm + ".bias": matrix(width)}
    return out | {"ln_f.weight": 1 + matrix(width), "ln_f.bias": matrix(width)}


def permuted_transposed(tensors: Tensors, seed: int) -> Tensors:
    """Channels and neurons of such a decoder in another order."""
    rng = np.random.default_rng(seed)
    order, out = rng.permutation(40), dict(tensors)
    for name, x in tensors.items():
        if re.search(r"(c_attn|c_fc)\.weight", name):
            out[name] = x[order]
        elif not re.search(r"(c_attn|c_fc)\.bias", name):
            out[name] = x[..., order]
    for i in range(3):
        at, units = f"h.{i}.mlp.", rng.permutation(96)
        out[at + "c_fc.weight"] = out[at + "c_fc.weight"][:, units]
        out[at + "c_fc.bias"] = out[at + "c_fc.bias"][units]
        out[at + "c_proj.weight"] = out[at + "c_proj.weight"][units]
    return out


def convolutions(seed: int) -> Tensors:
    """Residual blocks of convolutions with normalisation, and a head."""
    rng = np.random.default_rng(seed)

    def kernel(*shape: int) -> Array:
        return (rng.standard_normal(shape) / 8).astype(np.float32)

    out = {"stem.weight": kernel(24, 3, 3, 3), "stem_bn.weight": 1 + kernel(24), "stem_bn.bias": kernel(24)}
    for i, (wide, to) in enumerate(((24, 24), (24, 40))):
        at = f"blocks.{i}."
        out |= {at + "conv1.weight": kernel(to, wide, 3, 3), at + "conv2.weight": kernel(to, to, 3, 3)}
        out |= {at + f"bn{k}.{leaf}": 1 + kernel(to) for k in (1, 2) for leaf in ("weight", "bias")}
        if wide != to:
            out[at + "short.weight"] = kernel(to, wide, 1, 1)
    return out | {"head.weight": kernel(10, 40), "head.bias": kernel(10)}


def permuted_convolutions(tensors: Tensors, seed: int) -> Tensors:
    """Every space of channels in another order."""
    rng, out = np.random.default_rng(seed), dict(tensors)
    trunk, last, inner = rng.permutation(24), rng.permutation(40), (rng.permutation(24), rng.permutation(40))
    orders: dict[str, tuple[Array | None, Array | None]] = {
        "stem": (trunk, None),
        "stem_bn": (trunk, None),
        "head": (None, last),
    }
    for i, (reads, writes) in enumerate(((trunk, trunk), (trunk, last))):
        at = f"blocks.{i}."
        orders |= {at + "conv1": (inner[i], reads), at + "conv2": (writes, inner[i]), at + "short": (writes, reads)}
        orders |= {at + "bn1": (inner[i], None), at + "bn2": (writes, None)}
    for name, x in tensors.items():
        rows, columns = orders[name.rpartition(".")[0]]
        moved = x if rows is None else x[rows]
        out[name] = moved if columns is None or x.ndim < 2 else moved[:, columns]
    return out
