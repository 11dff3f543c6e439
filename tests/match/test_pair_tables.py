"""Stored layouts whose converter no installable package runs: against tables of what the converter does.

Each table is written from the converter that the layout's file names, not from the layout. Two sizes each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.match.models import Tensors
from tests.match.originals import Shapes, filled, linear, norm
from tests.match.proofs import prove


def renamed(a: Tensors, *parts: tuple[str, str]) -> Tensors:
    """The tensors under names with parts replaced, as the converters do it."""
    out = {}
    for name, x in a.items():
        for old, new in parts:
            name = name.replace(old, new)
        out[name] = x
    return out


@pytest.mark.parametrize(
    ("layers", "heads", "kv", "head", "ffn"), [(2, 4, 4, 8, 80), (3, 6, 2, 16, 144)], ids=["full", "grouped"]
)
def test_rows_of_queries_and_keys_are_reordered_head_by_head(
    tmp_path: Path, layers: int, heads: int, kv: int, head: int, ffn: int
) -> None:
    width = heads * head
    shapes: Shapes = {"tok_embeddings.weight": (64, width), "output.weight": (64, width), "norm.weight": (width,)}
    for i in range(layers):
        at = f"layers.{i}."
        shapes |= {f"{at}attention.w{n}.weight": (width, width) for n in "qo"}
        shapes |= {f"{at}attention.w{n}.weight": (kv * head, width) for n in "kv"}
        shapes |= {f"{at}feed_forward.w{n}.weight": (width, ffn) if n == 2 else (ffn, width) for n in (1, 2, 3)}
        shapes |= {f"{at}{n}_norm.weight": (width,) for n in ("attention", "ffn")}
    meta = filled(shapes)

    def permuted(x: NDArray[Any], heads: int) -> NDArray[Any]:
        rows, columns = x.shape
        return x.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)

    changed = {n: permuted(x, heads) if ".wq." in n else permuted(x, kv) if ".wk." in n else x for n, x in meta.items()}
    other = renamed(
        changed, ("layers.", "model.layers."), ("tok_embeddings", "model.embed_tokens"), ("output", "lm_head"),
        ("attention_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"),
        ("feed_forward.w1", "mlp.gate_proj"), ("feed_forward.w2", "mlp.down_proj"), ("feed_forward.w3", "mlp.up_proj"),
        *((f"attention.w{n}", f"self_attn.{n}_proj") for n in "qkvo"),
    )  # fmt: skip
    other["model.norm.weight"] = other.pop("norm.weight")
    prove(tmp_path, "llama-meta-transformers", meta, other, sizes={"d": head // 2})


@pytest.mark.parametrize(("layers", "heads", "head"), [(2, 4, 8), (3, 6, 16)])
def test_rows_fused_by_head_become_rows_fused_by_kind(tmp_path: Path, layers: int, heads: int, head: int) -> None:
    width = heads * head
    shapes: Shapes = {"gpt_neox.embed_in.weight": (64, width), "embed_out.weight": (64, width)}
    shapes |= norm("gpt_neox.final_layer_norm", width)
    for i in range(layers):
        at = f"gpt_neox.layers.{i}."
        shapes |= norm(at + "input_layernorm", width) | norm(at + "post_attention_layernorm", width)
        shapes |= linear(at + "attention.query_key_value", 3 * width, width)
        shapes |= linear(at + "attention.dense", width, width)
        shapes |= linear(at + "mlp.dense_h_to_4h", 4 * width, width)
        shapes |= linear(at + "mlp.dense_4h_to_h", width, 4 * width)
    a = filled(shapes)

    def by_kind(x: NDArray[Any]) -> NDArray[Any]:
        blocks = np.split(x, 3 * heads)
        return np.concatenate([*blocks[0::3], *blocks[1::3], *blocks[2::3]])

    b = renamed(
        {n: by_kind(x) if "query_key_value" in n else x for n, x in a.items()},
        ("gpt_neox.layers.", "transformer.h."), ("gpt_neox.embed_in", "transformer.wte"), ("embed_out", "lm_head"),
        ("gpt_neox.final_layer_norm", "transformer.ln_f"), ("input_layernorm", "norm_1"),
        ("post_attention_layernorm", "norm_2"), ("attention.query_key_value", "attn.qkv"),
        ("attention.dense", "attn.proj"), ("dense_h_to_4h", "fc"), ("dense_4h_to_h", "proj"),
    )  # fmt: skip
    prove(tmp_path, "gpt-neox-transformers-litgpt", a, b, sizes={"h": heads})


@pytest.mark.parametrize(("layers", "width"), [(2, 32), (3, 48)])
def test_queries_keys_and_values_of_a_vision_transformer_are_fused(tmp_path: Path, layers: int, width: int) -> None:
    shapes: Shapes = {"vit.embeddings.cls_token": (1, 1, width), "vit.embeddings.position_embeddings": (1, 17, width)}
    shapes |= linear("vit.embeddings.patch_embeddings.projection", width, 3, 4, 4) | norm("vit.layernorm", width)
    shapes |= linear("classifier", 10, width)
    for i in range(layers):
        at = f"vit.encoder.layer.{i}."
        shapes |= norm(at + "layernorm_before", width) | norm(at + "layernorm_after", width)
        for n in ("query", "key", "value"):
            shapes |= linear(f"{at}attention.attention.{n}", width, width)
        shapes |= linear(at + "attention.output.dense", width, width)
        shapes |= linear(at + "intermediate.dense", 4 * width, width) | linear(at + "output.dense", width, 4 * width)
    a = filled(shapes)
    rest = {n: x for n, x in a.items() if ".attention.attention." not in n}
    b = renamed(
        rest, ("vit.encoder.layer.", "blocks."), ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"), ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"), ("vit.layernorm", "norm"), ("classifier", "head"),
        ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"), ("vit.embeddings.cls_token", "cls_token"),
        ("vit.embeddings.position_embeddings", "pos_embed"),
    )  # fmt: skip
    for i in range(layers):
        for kind in ("weight", "bias"):
            parts = [a[f"vit.encoder.layer.{i}.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
            b[f"blocks.{i}.attn.qkv.{kind}"] = np.concatenate(parts)
    prove(tmp_path, "vit-transformers-timm", a, b)


@pytest.mark.parametrize(
    ("text", "vision", "layers"),
    [({"n": 4, "d": 16, "kv": 1, "ffn": 72}, {"n": 2, "d": 16, "ffn": 56}, (2, 3)),
     ({"n": 6, "d": 8, "kv": 2, "ffn": 80}, {"n": 3, "d": 8, "ffn": 40}, (3, 2))],
)  # fmt: skip
def test_layers_stacked_with_heads_as_axes_become_matrices(
    tmp_path: Path, text: dict[str, int], vision: dict[str, int], layers: tuple[int, int]
) -> None:
    heads, head, kv, ffn = (text[n] for n in ("n", "d", "kv", "ffn"))
    width, (deep, shallow) = 40, layers
    wide = vision["n"] * vision["d"]
    at, seen = "llm/layers/", "img/Transformer/encoderblock/"
    shapes: Shapes = {
        "llm/embedder/input_embedding": (96, width), "llm/final_norm/scale": (width,),
        at + "pre_attention_norm/scale": (deep, width), at + "pre_ffw_norm/scale": (deep, width),
        at + "attn/q_einsum/w": (deep, heads, width, head), at + "attn/kv_einsum/w": (deep, 2, kv, width, head),
        at + "attn/attn_vec_einsum/w": (deep, heads, head, width),
        at + "mlp/gating_einsum": (deep, 2, width, ffn), at + "mlp/linear": (deep, ffn, width),
        "img/embedding/kernel": (4, 4, 3, wide), "img/embedding/bias": (wide,), "img/pos_embedding": (1, 16, wide),
        "img/head/kernel": (wide, width), "img/head/bias": (width,),
        "img/Transformer/encoder_norm/scale": (wide,), "img/Transformer/encoder_norm/bias": (wide,),
    }  # fmt: skip
    for k, (given, made) in enumerate([(wide, vision["ffn"]), (vision["ffn"], wide)]):
        shapes |= {f"{seen}LayerNorm_{k}/{n}": (shallow, wide) for n in ("scale", "bias")}
        shapes |= {f"{seen}MlpBlock_0/Dense_{k}/kernel": (shallow, given, made)}
        shapes |= {f"{seen}MlpBlock_0/Dense_{k}/bias": (shallow, made)}
    split = (vision["n"], vision["d"])
    for n in ("query", "key", "value"):
        shapes |= {f"{seen}MultiHeadDotProductAttention_0/{n}/kernel": (shallow, wide, *split)}
        shapes |= {f"{seen}MultiHeadDotProductAttention_0/{n}/bias": (shallow, *split)}
    shapes |= {f"{seen}MultiHeadDotProductAttention_0/out/kernel": (shallow, *split, wide)}
    shapes |= {f"{seen}MultiHeadDotProductAttention_0/out/bias": (shallow, wide)}
    a = filled(shapes)

    b: Tensors = {
        "language_model.model.embed_tokens.weight": a["llm/embedder/input_embedding"],
        "language_model.lm_head.weight": a["llm/embedder/input_embedding"],
        "language_model.model.norm.weight": a["llm/final_norm/scale"],
        "multi_modal_projector.linear.weight": a["img/head/kernel"].T,
        "multi_modal_projector.linear.bias": a["img/head/bias"],
    }
    for i in range(deep):
        to = f"language_model.model.layers.{i}."
        b[to + "input_layernorm.weight"] = a[at + "pre_attention_norm/scale"][i]
        b[to + "post_attention_layernorm.weight"] = a[at + "pre_ffw_norm/scale"][i]
        b[to + "self_attn.q_proj.weight"] = a[at + "attn/q_einsum/w"][i].transpose(0, 2, 1).reshape(heads * head, width)
        for k, n in enumerate("kv"):
            made = a[at + "attn/kv_einsum/w"][i, k].transpose(0, 2, 1).reshape(kv * head, width)
            b[f"{to}self_attn.{n}_proj.weight"] = made
        b[to + "self_attn.o_proj.weight"] = a[at + "attn/attn_vec_einsum/w"][i].transpose(2, 0, 1).reshape(width, -1)
        for k, n in enumerate(("gate", "up")):
            b[f"{to}mlp.{n}_proj.weight"] = a[at + "mlp/gating_einsum"][i, k].T
        b[to + "mlp.down_proj.weight"] = a[at + "mlp/linear"][i].T
    tower = "vision_tower.vision_model."
    b[tower + "embeddings.patch_embedding.weight"] = a["img/embedding/kernel"].transpose(3, 2, 0, 1)
    b[tower + "embeddings.patch_embedding.bias"] = a["img/embedding/bias"]
    b[tower + "embeddings.position_embedding.weight"] = a["img/pos_embedding"].reshape(-1, wide)
    b[tower + "post_layernorm.weight"] = a["img/Transformer/encoder_norm/scale"]
    b[tower + "post_layernorm.bias"] = a["img/Transformer/encoder_norm/bias"]
    for i in range(shallow):
        to = f"{tower}encoder.layers.{i}."
        for k in (0, 1):
            b[f"{to}layer_norm{k + 1}.weight"] = a[f"{seen}LayerNorm_{k}/scale"][i]
            b[f"{to}layer_norm{k + 1}.bias"] = a[f"{seen}LayerNorm_{k}/bias"][i]
            b[f"{to}mlp.fc{k + 1}.weight"] = a[f"{seen}MlpBlock_0/Dense_{k}/kernel"][i].T
            b[f"{to}mlp.fc{k + 1}.bias"] = a[f"{seen}MlpBlock_0/Dense_{k}/bias"][i]
        for n in ("query", "key", "value"):
            one = f"{seen}MultiHeadDotProductAttention_0/{n}/"
            b[f"{to}self_attn.{n[0]}_proj.weight"] = a[one + "kernel"][i].reshape(wide, wide).T
            b[f"{to}self_attn.{n[0]}_proj.bias"] = a[one + "bias"][i].reshape(wide)
        out = f"{seen}MultiHeadDotProductAttention_0/out/"
        b[to + "self_attn.out_proj.weight"] = a[out + "kernel"][i].reshape(wide, wide).T
        b[to + "self_attn.out_proj.bias"] = a[out + "bias"][i]
    prove(tmp_path, "paligemma-bigvision-transformers", a, b)
