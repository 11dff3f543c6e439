"""Small networks of random weights in one layout, and the same weights in others: what converters do, on the spot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import encode

Tensors = dict[str, NDArray[Any]]

HEADS, KV, HEAD, WIDTH, FFN, VOCAB, LAYERS, EXPERTS = 6, 2, 8, 48, 80, 96, 3, 4


def save(path: Path, tensors: Tensors, dtype: str = "F32") -> Path:
    """Writes a safetensors file by hand: header, then data."""
    import json

    head: dict[str, Any] = {}
    blobs, at = [], 0
    for name, array in tensors.items():
        raw = encode(np.ascontiguousarray(array), dtype).tobytes()
        head[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + len(raw)]}
        blobs.append(raw)
        at += len(raw)
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return path


def noisy(tensors: Tensors, share: float, seed: int) -> Tensors:
    """Normal noise of `share` standard deviations on every tensor."""
    rng = np.random.default_rng(seed)
    return {n: (x + share * x.std() * rng.standard_normal(x.shape)).astype(np.float32) for n, x in tensors.items()}


def language_model(seed: int = 0, *, experts: bool = False, width: int = WIDTH) -> Tensors:
    """Grouped queries, gated MLP, gains around one; separate projections, output by input."""
    rng = np.random.default_rng(seed)

    def matrix(*shape: int) -> NDArray[Any]:
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    def gain() -> NDArray[Any]:
        return (1 + 0.2 * rng.standard_normal(width)).astype(np.float32)

    out: Tensors = {"model.embed_tokens.weight": matrix(VOCAB, width)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name, rows in (("q", HEADS), ("k", KV), ("v", KV)):
            out[at + f"self_attn.{name}_proj.weight"] = matrix(rows * HEAD, width)
            out[at + f"self_attn.{name}_proj.bias"] = matrix(rows * HEAD)
        out[at + "self_attn.o_proj.weight"] = matrix(width, HEADS * HEAD)
        for e in range(EXPERTS) if experts else [None]:
            mlp = at + ("mlp." if e is None else f"mlp.experts.{e}.")
            out[mlp + "gate_proj.weight"] = matrix(FFN, width)
            out[mlp + "up_proj.weight"] = matrix(FFN, width)
            out[mlp + "down_proj.weight"] = matrix(width, FFN)
        out[at + "input_layernorm.weight"] = gain()
        out[at + "post_attention_layernorm.weight"] = gain()
    out["model.norm.weight"] = gain()
    out["lm_head.weight"] = matrix(VOCAB, width)
    return out


def each_layer(a: Tensors, layer: Callable[[Tensors, int], Tensors]) -> Tensors:
    """What `layer` makes of every layer (names without their prefix), and the rest renamed."""
    out: Tensors = {
        "wte.weight": a["model.embed_tokens.weight"],
        "ln_f.weight": a["model.norm.weight"],
        "output.weight": a["lm_head.weight"],
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        made = layer({n[len(at) :]: x for n, x in a.items() if n.startswith(at)}, i)
        out |= {f"blocks.{i}.{n}": x for n, x in made.items()}
    return out


_PLAIN = {
    "self_attn.o_proj.weight": "attn.out.weight",
    "mlp.down_proj.weight": "ffn.w2.weight",
    "input_layernorm.weight": "norm_a.weight",
    "post_attention_layernorm.weight": "norm_b.weight",
}


def _rest(t: Tensors) -> Tensors:
    return {new: t[old] for old, new in _PLAIN.items()}


def _qkv(t: Tensors, kind: str) -> list[NDArray[Any]]:
    return [t[f"self_attn.{n}_proj.{kind}"] for n in "qkv"]


def renamed(a: Tensors) -> Tensors:
    """Other names; the two gains of a layer trade theirs."""
    out = {n.replace("model.layers.", "h.").replace("self_attn", "attention"): x for n, x in a.items()}
    for i in range(LAYERS):
        one, two = f"h.{i}.input_layernorm.weight", f"h.{i}.post_attention_layernorm.weight"
        out[one], out[two] = out[two], out[one]
    return out


def fused(a: Tensors) -> Tensors:
    """q, k and v of unequal size in one tensor, gate and up in one; biases too."""

    def layer(t: Tensors, _: int) -> Tensors:
        return _rest(t) | {
            "attn.qkv.weight": np.concatenate(_qkv(t, "weight")),
            "attn.qkv.bias": np.concatenate(_qkv(t, "bias")),
            "ffn.w13.weight": np.concatenate([t["mlp.gate_proj.weight"], t["mlp.up_proj.weight"]]),
        }

    return each_layer(a, layer)


def grouped(a: Tensors) -> Tensors:
    """Each key/value group holds its queries, its key and its value; gate and up rows alternate."""

    def group(parts: list[NDArray[Any]]) -> NDArray[Any]:
        split = [x.reshape(KV, x.shape[0] // KV, *x.shape[1:]) for x in parts]
        joined = np.concatenate(split, axis=1)
        return joined.reshape(-1, *parts[0].shape[1:])

    def layer(t: Tensors, _: int) -> Tensors:
        pair = np.stack([t["mlp.gate_proj.weight"], t["mlp.up_proj.weight"]], axis=1)
        return _rest(t) | {
            "attn.qkv.weight": group(_qkv(t, "weight")),
            "attn.qkv.bias": group(_qkv(t, "bias")),
            "ffn.w13.weight": rearrange(pair, "f two k -> (f two) k"),
        }

    return each_layer(a, layer)


def rotary(a: Tensors) -> Tensors:
    """Rows of q and k in pairs instead of halves, biases along; kernels input by output."""

    def turn(x: NDArray[Any]) -> NDArray[Any]:
        return rearrange(x, "(h two d) ... -> (h d two) ...", two=2, d=HEAD // 2)

    def layer(t: Tensors, _: int) -> Tensors:
        q, k, v = _qkv(t, "weight")
        bq, bk, bv = _qkv(t, "bias")
        return _rest(t) | {
            "attn.wq.weight": turn(q),
            "attn.wk.weight": turn(k),
            "attn.wv.weight": v,
            "attn.wq.bias": turn(bq),
            "attn.wk.bias": turn(bk),
            "attn.wv.bias": bv,
            "ffn.w1.kernel": t["mlp.gate_proj.weight"].T,
            "ffn.w3.kernel": t["mlp.up_proj.weight"].T,
        }

    return each_layer(a, layer)


def scanned(a: Tensors) -> Tensors:
    """All layers stacked on axis 0, heads as axes of their own, kernels input by output."""
    layers = [{n: a[f"model.layers.{i}.{n}"] for n in _layer_names(a)} for i in range(LAYERS)]

    def stack(name: str, pattern: str | None = None, **sizes: int) -> NDArray[Any]:
        rows = [t[name] for t in layers]
        return np.stack([rearrange(x, pattern, **sizes) for x in rows] if pattern else rows)

    out = {
        "embedder": a["model.embed_tokens.weight"],
        "final/scale": a["model.norm.weight"],
        "head": a["lm_head.weight"],
    }
    for n in "qkv":
        out[f"layers/attn/{n}/kernel"] = stack(f"self_attn.{n}_proj.weight", "(h d) k -> k h d", d=HEAD)
        out[f"layers/attn/{n}/bias"] = stack(f"self_attn.{n}_proj.bias", "(h d) -> h d", d=HEAD)
    out["layers/attn/out/kernel"] = stack("self_attn.o_proj.weight", "k (h d) -> h d k", d=HEAD)
    gate, up = stack("mlp.gate_proj.weight", "f k -> k f"), stack("mlp.up_proj.weight", "f k -> k f")
    out["layers/mlp/gating"] = np.stack([gate, up], axis=1)
    out["layers/mlp/linear"] = stack("mlp.down_proj.weight", "k f -> f k")
    out["layers/pre_attention_norm/scale"] = stack("input_layernorm.weight")
    out["layers/pre_ffw_norm/scale"] = stack("post_attention_layernorm.weight")
    return out


def _layer_names(a: Tensors) -> list[str]:
    at = "model.layers.0."
    return [n[len(at) :] for n in a if n.startswith(at)]


def stacked_experts(a: Tensors) -> Tensors:
    """Experts of a layer in two tensors, gate above up inside."""

    def layer(t: Tensors, _: int) -> Tensors:
        keep = {new: t[old] for old, new in _PLAIN.items() if old in t}
        pairs = [
            np.concatenate([t[f"mlp.experts.{e}.gate_proj.weight"], t[f"mlp.experts.{e}.up_proj.weight"]])
            for e in range(EXPERTS)
        ]
        same = {
            n.replace("self_attn", "attn"): x for n, x in t.items() if n.startswith("self_attn.") and "o_proj" not in n
        }
        return (
            keep
            | same
            | {
                "moe.gate_up": np.stack(pairs),
                "moe.down": np.stack([t[f"mlp.experts.{e}.down_proj.weight"] for e in range(EXPERTS)]),
            }
        )

    return each_layer(a, layer)


def shifted(a: Tensors) -> Tensors:
    """Gains stored as the difference from one."""
    return {n.replace("model.", "m/"): x - 1 if "norm" in n else x for n, x in a.items()}


def convolutional(seed: int = 0) -> Tensors:
    """An autoencoder's block: convolutions, 1x1 attention projections, modulation in two halves, gains."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[Any]:
        return (rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]) or 1)).astype(np.float32)

    out: Tensors = {"patch.weight": draw(40, 4, 2, 2), "patch.bias": draw(40)}
    for i in range(4):
        out[f"down.{i}.conv.weight"] = draw(40, 40, 3, 3)
        out[f"down.{i}.conv.bias"] = draw(40)
        out[f"down.{i}.norm.weight"] = 1 + 0.3 * draw(40)
        for n in "qkv":
            out[f"down.{i}.attn.{n}.weight"] = draw(40, 40, 1, 1)
            out[f"down.{i}.attn.{n}.bias"] = draw(40)
    out["final.mod.weight"], out["final.mod.bias"] = draw(80, 24), draw(80)
    return out


def unrolled(a: Tensors) -> Tensors:
    """Channels last, 1x1 convolutions as linear, the patch convolution flat, halves swapped, blocks reversed."""
    out: Tensors = {"embed.weight": rearrange(a["patch.weight"], "o c h w -> o (h w c)"), "embed.bias": a["patch.bias"]}
    for i in range(4):
        old, new = f"down.{i}.", f"levels.{3 - i}."
        out[new + "conv.kernel"] = rearrange(a[old + "conv.weight"], "o c h w -> h w c o")
        out[new + "conv.bias"] = a[old + "conv.bias"]
        out[new + "gain"] = a[old + "norm.weight"]
        for n in "qkv":
            out[new + f"to_{n}.weight"] = a[old + f"attn.{n}.weight"][:, :, 0, 0]
            out[new + f"to_{n}.bias"] = a[old + f"attn.{n}.bias"]
    for kind in ("weight", "bias"):
        out[f"out.mod.{kind}"] = np.concatenate([a[f"final.mod.{kind}"][40:], a[f"final.mod.{kind}"][:40]])
    return out


def blocked(tensors: Tensors) -> Tensors:
    """Fused rows of key-value groups, put in blocks of queries, keys and values: an order that no pattern says."""
    out: Tensors = {}
    for name, array in grouped(tensors).items():
        if "qkv" in name:
            rows = array.reshape(KV, HEADS // KV + 2, HEAD, *array.shape[1:])
            parts = (rows[:, : HEADS // KV], rows[:, -2], rows[:, -1])
            array = np.concatenate([p.reshape(-1, *array.shape[1:]) for p in parts])
        out["b." + name] = array
    return out


def short_convolutions(tensors: Tensors) -> Tensors:
    """Three short convolutions joined to one, in every layer."""
    out = {n: x for n, x in tensors.items() if "conv" not in n}
    for i in range(LAYERS):
        at = f"model.layers.{i}.mixer."
        out[at + "conv1d.weight"] = np.concatenate([tensors[f"{at}{k}_conv1d.weight"] for k in "qkv"])
    return out


def with_convolutions(seed: int = 0) -> Tensors:
    """The language model with a short convolution for queries, keys and values."""
    rng = np.random.default_rng(seed + 1)
    out = language_model(seed)
    for i in range(LAYERS):
        for k, width in (("q", 24), ("k", 24), ("v", 48)):
            taps = rng.standard_normal((width, 1, 4)).astype(np.float32)
            out[f"model.layers.{i}.mixer.{k}_conv1d.weight"] = taps
    return out


def stacked_head_gains(tensors: Tensors) -> Tensors:
    """Gains of single heads stacked: rows of a few elements."""
    out = {n: x for n, x in tensors.items() if "head_norms" not in n}
    for i in range(LAYERS):
        at = f"model.layers.{i}.self_attn."
        out[at + "q_norm.weight"] = np.stack([tensors[f"{at}head_norms.{h}.weight"] for h in range(HEADS)])
    return out


def with_head_gains(seed: int = 0) -> Tensors:
    """The language model with a gain for every head."""
    rng = np.random.default_rng(seed + 2)
    out = language_model(seed)
    for i in range(LAYERS):
        for h in range(HEADS):
            gain = (1 + 0.2 * rng.standard_normal(HEAD)).astype(np.float32)
            out[f"model.layers.{i}.self_attn.head_norms.{h}.weight"] = gain
    return out


def bare_experts(seed: int = 0) -> Tensors:
    """Stacked experts held by bare names, biases beside them, gate and up alternating on the last axis."""
    rng = np.random.default_rng(seed + 3)
    out = language_model(seed)
    for i in range(LAYERS):
        at = f"model.layers.{i}.mlp.experts."
        out[at + "gate_up_proj"] = rng.standard_normal((EXPERTS, WIDTH, 2 * FFN)).astype(np.float32)
        out[at + "gate_up_proj_bias"] = rng.standard_normal((EXPERTS, 2 * FFN)).astype(np.float32)
    return out


def parted_experts(tensors: Tensors) -> Tensors:
    """Gate and up apart, output by input, with their biases."""
    out = {n: x for n, x in tensors.items() if "experts" not in n}
    for i in range(LAYERS):
        at = f"model.layers.{i}.mlp.experts."
        for k, word in enumerate(("gate_proj", "up_proj")):
            out[f"{at}{word}.weight"] = np.ascontiguousarray(tensors[at + "gate_up_proj"].swapaxes(1, 2)[:, k::2])
            out[f"{at}{word}.bias"] = np.ascontiguousarray(tensors[at + "gate_up_proj_bias"][:, k::2])
    return out


def encoder(seed: int = 0, *, width: int = 32) -> Tensors:
    """Square projections beside an MLP of four widths, gains and biases; output by input."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> NDArray[Any]:
        return (rng.standard_normal(shape) / math.sqrt(shape[-1])).astype(np.float32)

    out: Tensors = {"embeddings.word_embeddings.weight": draw(VOCAB, width), "pooler.dense.weight": draw(width, width)}
    for i in range(LAYERS):
        at = f"encoder.layer.{i}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            out[f"{at}attention.{part}.weight"] = draw(width, width)
            out[f"{at}attention.{part}.bias"] = draw(width)
        out[at + "intermediate.dense.weight"] = draw(4 * width, width)
        out[at + "output.dense.weight"] = draw(width, 4 * width)
        out[at + "attention.output.LayerNorm.weight"] = 1 + 0.1 * draw(width)
    return out


def kernels(a: Tensors) -> Tensors:
    """Every matrix but the embedding input by output, under the word kernel."""
    out: Tensors = {}
    for name, x in a.items():
        new = name.replace(".", "/")
        if x.ndim == 1 or "embeddings" in name:
            out[new] = x
        else:
            out[new.replace("weight", "kernel")] = np.ascontiguousarray(x.T)
    return out


def stacked_kernels(a: Tensors) -> Tensors:
    """The same with all layers of a kind stacked on axis 0."""
    out: Tensors = {}
    layers: dict[str, list[NDArray[Any]]] = {}
    for name, x in kernels(a).items():
        head, _, rest = name.partition("encoder/layer/")
        if head:
            out[name] = x
        else:
            layers.setdefault("encoder/layers/" + rest.split("/", 1)[1], []).append(x)
    return out | {n: np.stack(xs) for n, xs in layers.items()}


def state_space(seed: int = 0, *, width: int = 32) -> Tensors:
    """Another architecture of the encoder's width: one of its matrices has the shape of one of the encoder's."""
    rng = np.random.default_rng(seed)
    out: Tensors = {"backbone.embedding.weight": rng.standard_normal((VOCAB + 8, width)).astype(np.float32)}
    for i in range(LAYERS):
        at = f"backbone.layers.{i}."
        shapes = {"in_proj": (4 * width, width), "x_proj": (20, 2 * width), "A_log": (2 * width, 8), "D": (2 * width,)}
        out |= {f"{at}mixer.{n}": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
        out[at + "norm.weight"] = (1 + 0.1 * rng.standard_normal(width)).astype(np.float32)
    return out
