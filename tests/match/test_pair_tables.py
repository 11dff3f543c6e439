"""Stored layouts whose converter no installable package runs: against tables of what the converter does.

Each table is written from the converter that the layout's file names, not from the layout. Two sizes each.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
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


def decoder(layers: int, heads: int, kv: int, head: int, ffn: int, *more: str) -> Shapes:
    """A language model of transformers without an MLP; `more` are tensors of the attention as wide as queries, keys and
    values (`bias`), also as outputs (`o_proj.bias`), or as a head (`norm`)."""
    width = heads * head
    shapes: Shapes = {"model.embed_tokens.weight": (64, width), "lm_head.weight": (64, width)}
    shapes["model.norm.weight"] = (width,)
    for i in range(layers):
        at = f"model.layers.{i}."
        rows = {"q": width, "k": kv * head, "v": kv * head, "o": width}
        shapes |= {f"{at}self_attn.{n}_proj.weight": (rows[n], width) for n in rows}
        shapes |= {f"{at}self_attn.{n}_proj.bias": (rows[n],) for n in "qkv" if "bias" in more}
        shapes |= {f"{at}self_attn.o_proj.bias": (width,) for _ in [0] if "o_proj.bias" in more}
        shapes |= {f"{at}self_attn.{n}_norm.weight": (head,) for n in "qk" if "norm" in more}
        shapes |= {f"{at}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    return shapes


def gated(at: str, width: int, ffn: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Shapes:
    """An MLP with a gate."""
    gate, up, down = (f"{at}.{name}.weight" for name in names)
    return {gate: (ffn, width), up: (ffn, width), down: (width, ffn)}


def as_gguf(a: Tensors, arch: gguf.MODEL_ARCH, layers: int) -> Tensors:
    """Names that the GGUF library gives, experts stacked as its converter does it."""
    names = gguf.get_tensor_name_map(arch, layers)
    experts: dict[str, list[NDArray[Any]]] = {}
    for name in sorted(a, key=lambda n: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", n)]):
        whole = re.sub(r"\.experts\.\d+\.", ".experts.", name)
        made = names.get_name(whole, try_suffixes=(".weight", ".bias"))
        assert made is not None, whole
        experts.setdefault(made, []).append(a[name])
    return {n: np.stack(parts) if "_exps." in n else parts[0] for n, parts in experts.items()}


@pytest.mark.parametrize(
    ("layers", "heads", "kv", "head", "experts", "more"),
    [(2, 4, 4, 8, 0, ()), (3, 6, 2, 16, 0, ("bias", "o_proj.bias")), (2, 4, 2, 16, 4, ())],
    ids=["full", "grouped", "experts"],
)
def test_rows_of_queries_and_keys_go_back_to_pairs(
    tmp_path: Path, layers: int, heads: int, kv: int, head: int, experts: int, more: tuple[str, ...]
) -> None:
    shapes = decoder(layers, heads, kv, head, 80, *more)
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {} if experts else gated(at + "mlp", heads * head, 80)
        shapes |= {at + "block_sparse_moe.gate.weight": (experts, heads * head)} if experts else {}
        for e in range(experts):
            shapes |= gated(f"{at}block_sparse_moe.experts.{e}", heads * head, 80, ("w1", "w3", "w2"))
    a = filled(shapes)

    def permuted(x: NDArray[Any], heads: int) -> NDArray[Any]:
        return x.reshape(heads, 2, len(x) // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)

    changed = {n: permuted(x, heads if ".q_" in n else kv) if ".q_" in n or ".k_" in n else x for n, x in a.items()}
    b = as_gguf(changed, gguf.MODEL_ARCH.LLAMA, layers)
    prove(tmp_path, "llama-transformers-gguf", a, b, sizes={"d": head // 2})


@pytest.mark.parametrize(
    ("layers", "heads", "kv", "head", "experts", "more", "arch"),
    [
        (2, 4, 4, 8, 0, ("bias",), "QWEN2"),
        (3, 6, 2, 16, 0, ("norm",), "QWEN3"),
        (2, 4, 2, 8, 6, ("bias",), "QWEN2MOE"),
        (3, 4, 2, 16, 4, ("norm",), "QWEN3MOE"),
    ],
)
def test_rows_of_queries_and_keys_stay_where_the_program_pairs_halves(
    tmp_path: Path, layers: int, heads: int, kv: int, head: int, experts: int, more: tuple[str, ...], arch: str
) -> None:
    width = heads * head
    shapes = decoder(layers, heads, kv, head, 80, *more)
    for i in range(layers):
        at = f"model.layers.{i}.mlp"
        shapes |= {f"{at}.gate.weight": (experts, width)} if experts else gated(at, width, 80)
        for e in range(experts):
            shapes |= gated(f"{at}.experts.{e}", width, 48)
        if arch == "QWEN2MOE":
            shapes |= {f"{at}.shared_expert_gate.weight": (1, width)} | gated(f"{at}.shared_expert", width, 72)
    a = filled(shapes)
    prove(tmp_path, "qwen-transformers-gguf", a, as_gguf(a, gguf.MODEL_ARCH[arch], layers))


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


@pytest.mark.parametrize(("layers", "text", "vision"), [(2, 32, 48), (3, 48, 32)])
def test_projections_of_two_towers_are_split_and_transposed(
    tmp_path: Path, layers: int, text: int, vision: int
) -> None:
    shapes: Shapes = {
        "token_embedding.weight": (64, text), "positional_embedding": (20, text), "text_projection": (text, 40),
        "logit_scale": (), "visual.class_embedding": (vision,), "visual.positional_embedding": (17, vision),
        "visual.conv1.weight": (vision, 3, 4, 4), "visual.proj": (vision, 40),
    }  # fmt: skip
    shapes |= norm("ln_final", text) | norm("visual.ln_pre", vision) | norm("visual.ln_post", vision)
    towers = (("transformer", "text_model", text), ("visual.transformer", "vision_model", vision))
    for tower, _, width in towers:
        for i in range(layers):
            at = f"{tower}.resblocks.{i}."
            shapes |= norm(at + "ln_1", width) | norm(at + "ln_2", width) | linear(at + "attn.out_proj", width, width)
            shapes |= {at + "attn.in_proj_weight": (3 * width, width), at + "attn.in_proj_bias": (3 * width,)}
            shapes |= linear(at + "mlp.c_fc", 4 * width, width) | linear(at + "mlp.c_proj", width, 4 * width)
    a = {n: np.asarray(x, np.float32) for n, x in filled(shapes).items()}
    b = renamed(
        {n: x for n, x in a.items() if "in_proj" not in n},
        *((f"{old}.resblocks", f"{new}.encoder.layers") for old, new, _ in reversed(towers)),
        ("token_embedding", "text_model.embeddings.token_embedding"), (".ln_1", ".layer_norm1"),
        (".ln_2", ".layer_norm2"), ("attn.out_proj", "self_attn.out_proj"), ("mlp.c_fc", "mlp.fc1"),
        ("mlp.c_proj", "mlp.fc2"), ("visual.ln_pre", "vision_model.pre_layrnorm"),
        ("visual.ln_post", "vision_model.post_layernorm"), ("ln_final", "text_model.final_layer_norm"),
        ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
        ("visual.conv1", "vision_model.embeddings.patch_embedding"),
        ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    )  # fmt: skip
    b["text_model.embeddings.position_embedding.weight"] = b.pop("positional_embedding")
    b["text_projection.weight"], b["visual_projection.weight"] = b.pop("text_projection").T, b.pop("visual.proj").T
    for old, new, _ in towers:
        for i in range(layers):
            for kind in ("weight", "bias"):
                parts = np.split(a[f"{old}.resblocks.{i}.attn.in_proj_{kind}"], 3)
                b |= {
                    f"{new}.encoder.layers.{i}.self_attn.{n}_proj.{kind}": x for n, x in zip("qkv", parts, strict=True)
                }
    prove(tmp_path, "clip-openai-transformers", a, b, silent={"logit_scale"})


@pytest.mark.parametrize(("layers", "width", "mels"), [(2, 32, 16), (3, 48, 20)])
def test_layers_of_a_speech_model_are_renamed(tmp_path: Path, layers: int, width: int, mels: int) -> None:
    shapes: Shapes = {
        "model.decoder.embed_tokens.weight": (64, width), "model.decoder.embed_positions.weight": (20, width),
        "model.encoder.embed_positions.weight": (24, width),
    }  # fmt: skip
    shapes |= linear("model.encoder.conv1", width, mels, 3) | linear("model.encoder.conv2", width, width, 3)
    for tower in ("encoder", "decoder"):
        shapes |= norm(f"model.{tower}.layer_norm", width)
        for at in (f"model.{tower}.layers.{i}." for i in range(layers)):
            for name in ("self_attn", "encoder_attn") if tower == "decoder" else ("self_attn",):
                shapes |= norm(f"{at}{name}_layer_norm", width) | {f"{at}{name}.k_proj.weight": (width, width)}
                for n in ("q_proj", "v_proj", "out_proj"):
                    shapes |= linear(f"{at}{name}.{n}", width, width)
            shapes |= linear(at + "fc1", 4 * width, width) | linear(at + "fc2", width, 4 * width)
            shapes |= norm(at + "final_layer_norm", width)
    a = filled(shapes)
    b = renamed(
        a, ("model.", ""), ("layers", "blocks"), ("fc1", "mlp.0"), ("fc2", "mlp.2"), ("final_layer_norm", "mlp_ln"),
        (".self_attn.q_proj", ".attn.query"), (".self_attn.k_proj", ".attn.key"), (".self_attn.v_proj", ".attn.value"),
        (".self_attn_layer_norm", ".attn_ln"), (".self_attn.out_proj", ".attn.out"),
        (".encoder_attn.q_proj", ".cross_attn.query"), (".encoder_attn.k_proj", ".cross_attn.key"),
        (".encoder_attn.v_proj", ".cross_attn.value"), (".encoder_attn_layer_norm", ".cross_attn_ln"),
        (".encoder_attn.out_proj", ".cross_attn.out"), ("decoder.layer_norm.", "decoder.ln."),
        ("encoder.layer_norm.", "encoder.ln_post."), ("embed_tokens", "token_embedding"),
        ("embed_positions.weight", "positional_embedding"),
    )  # fmt: skip
    prove(tmp_path, "whisper-transformers-openai", a, b)
