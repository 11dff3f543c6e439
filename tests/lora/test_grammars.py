"""Every format: what is written is read again with the same difference, under the keys that its tools expect."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineage.data import mapping_file
from lineage.errors import InputError
from lineage.layout.axes import Shape
from lineage.lora.converting import written_for
from lineage.lora.delta import Delta
from lineage.lora.grammar import GRAMMARS, grammar
from lineage.lora.held import Target
from lineage.lora.network import Term
from lineage.lora.source import Base
from lineage.lora.storing import store
from lineage.lora.verify import VerificationError, verify
from lineage.lora.wanted import Known
from tests.lora.builders import KINDS, delta_of, random

#: a module that each format can name, the shape of its weight, and the keys of a plain pair of it
KEYS: dict[str, tuple[str, Shape, list[str]]] = {
    "peft": (
        "blocks.0.cross_attn.k_img.weight",
        (6, 4),
        [f"base_model.model.blocks.0.cross_attn.k_img.lora_{x}.weight" for x in "AB"],
    ),
    "diffusers": (
        "down_blocks.0.attn1.to_out.0.weight",
        (6, 4),
        [f"unet.down_blocks.0.attn1.to_out.0.lora_{x}.weight" for x in "AB"],
    ),
    "kohya": (
        "model.diffusion_model.blocks.0.cross_attn.k_img.weight",
        (6, 4),
        [f"lora_unet_blocks_0_cross_attn_k_img.{x}" for x in ("alpha", "lora_down.weight", "lora_up.weight")],
    ),
    "onetrainer": (
        "transformer_blocks.0.ff.net.2.weight",
        (6, 4),
        [
            f"lora_transformer_transformer_blocks_0_ff_net_2.{x}"
            for x in ("alpha", "lora_down.weight", "lora_up.weight")
        ],
    ),
    "comfy": (
        "transformer_blocks.0.ff.net.2.weight",
        (6, 4),
        [f"transformer.transformer_blocks.0.ff.net.2.{x}" for x in ("alpha", "lora_down.weight", "lora_up.weight")],
    ),
    "ai-toolkit": ("blocks.0.ffn.0.weight", (6, 4), [f"diffusion_model.blocks.0.ffn.0.lora_{x}.weight" for x in "AB"]),
    "xlabs": (
        "double_blocks.7.txt_attn.qkv.weight",
        (6, 4),
        [f"double_blocks.7.processor.qkv_lora2.{x}.weight" for x in ("down", "up")],
    ),
    "longcat": (
        "blocks.0.attn.proj.weight",
        (6, 4),
        [
            f"lora___lorahyphen___blocks___lorahyphen___0___lorahyphen___attn___lorahyphen___proj.{x}"
            for x in ("alpha_scale", "lora_down.weight", "lora_up.weight")
        ],
    ),
    "mlx": ("model.layers.0.mlp.up_proj.weight", (6, 4), [f"model.layers.0.mlp.up_proj.lora_{x}" for x in "ab"]),
    "gguf": ("blk.0.attn_q.weight", (6, 4), [f"blk.0.attn_q.weight.lora_{x}" for x in "ab"]),
    "openpi": ("llm/layers/attn/q_einsum/w", (3, 2, 4, 5), [f"llm/layers/attn/q_einsum/lora_{x}" for x in "ab"]),
}


def _stored(tmp_path: Path, format: str, deltas: dict[str, Delta], target: Target) -> list[str]:
    """The keys of an adapter that was written, read again and compared."""
    g = grammar(format)
    written = written_for(g, deltas, target, dict.fromkeys(deltas, "F32"))
    assert not written.refused, written.refused
    out = tmp_path / ("out.gguf" if format == "gguf" else "out" if format == "peft" else "out.safetensors")
    again = Base(target.shapes)
    compared: list[int] = []

    def check(path: Path) -> None:
        compared.append(verify(path, g, again, deltas, Known(deltas))[0])

    store(written, out, check)
    assert compared == [len(deltas)]
    return sorted(written.entries)


def test_every_format_has_a_row_here() -> None:
    assert set(KEYS) == set(GRAMMARS)


@pytest.mark.parametrize("format", GRAMMARS)
def test_a_grammar_names_itself_and_its_sources(format: str) -> None:
    text = mapping_file(f"lora/{format}.yaml").read_text()
    assert grammar(format).format == format
    assert text.startswith("#")
    assert "Read in:" in text


@pytest.mark.parametrize("format", GRAMMARS)
def test_keys_are_written_as_the_formats_tools_write_them(format: str, tmp_path: Path) -> None:
    name, shape, keys = KEYS[format]
    pair = delta_of("lora", shape, scale=0.75) if format != "openpi" else _einsum(shape)
    assert _stored(tmp_path, format, {name: pair}, Target({name: shape})) == keys


def _einsum(shape: Shape) -> Delta:
    a, b = random(0, *shape[:-1], 2), random(1, *shape[:-2], 2, shape[-1])
    return Delta(shape=shape, terms=(Term.of([(a, "lhik"), (b, "lhko")], ["l", "h", "i", "o"]),))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", [f for f in GRAMMARS if f not in ("openpi", "xlabs")])
def test_each_kind_is_kept_or_refused_with_a_reason(format: str, kind: str, tmp_path: Path) -> None:
    name, shape, _ = KEYS[format]
    deltas = {name: delta_of(kind, shape)}
    written = written_for(grammar(format), deltas, Target({name: shape}), {})
    if written.refused:
        assert kind == "dora"
        assert "DoRA" in written.refused[name]
        return
    keys = _stored(tmp_path, format, deltas, Target({name: shape}))
    product = {"loha": "hada_w1_a", "lokr": "lokr_w1"}.get(kind)
    if product is not None and format in ("kohya", "onetrainer", "comfy"):
        assert any(k.endswith(product) for k in keys)


@pytest.mark.parametrize("format", ["kohya", "comfy", "onetrainer", "peft", "diffusers"])
def test_convolutions_keep_their_kernels(format: str, tmp_path: Path) -> None:
    shape = (6, 4, 3, 3)
    deltas = {"down_blocks.0.conv.weight": delta_of("lora", shape)}
    _stored(tmp_path, format, deltas, Target({"down_blocks.0.conv.weight": shape}))


@pytest.mark.parametrize("format", ["kohya", "comfy", "ai-toolkit", "onetrainer"])
def test_norms_and_biases_are_stored_whole(format: str, tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"norm.weight": (4,), "norm.bias": (4,), "q.bias": (6,), "q.weight": (6, 4)}
    deltas = {n: delta_of("lora", s, k) for k, (n, s) in enumerate(shapes.items())}
    keys = _stored(tmp_path, format, deltas, Target(shapes))
    assert sum(k.endswith(".diff_b") for k in keys) == 2


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_biases_beside_a_pair_are_biases_of_its_up_factor(format: str, tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"unet.q.weight": (6, 4), "unet.q.bias": (6,), "unet.k.weight": (6, 4)}
    deltas = {n: delta_of("lora", s, k) for k, (n, s) in enumerate(shapes.items())}
    assert any(k.endswith("q.lora_B.bias") for k in _stored(tmp_path, format, deltas, Target(shapes)))


def test_a_stack_of_experts_is_stored_by_the_formats_that_have_stacks(tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"mlp.experts.gate_up_proj": (3, 8, 4), "mlp.experts.down_proj": (3, 4, 6)}
    deltas = {n: _experts(s) for n, s in shapes.items()}
    keys = _stored(tmp_path, "peft", deltas, Target(shapes))
    assert keys[0] == "base_model.model.mlp.experts.base_layer.lora_A.weight"
    assert "no stacked parameters" in next(
        iter(written_for(grammar("kohya"), deltas, Target(shapes), {}).refused.values())
    )


def _experts(shape: Shape) -> Delta:
    up, down = random(0, *shape[:2], 2), random(1, shape[0], 2, shape[2])
    return Delta(shape=shape, terms=(Term.of([(up, "eok"), (down, "eki")], ["e", "o", "i"]),))


def test_attention_of_torch_takes_both_pairs_with_one_rank(tmp_path: Path) -> None:
    shapes: dict[str, Shape] = {"attn.in_proj_weight": (12, 4), "attn.out_proj.weight": (4, 4)}
    deltas = {"attn.in_proj_weight": delta_of("lora", (12, 4), rank=3)}
    keys = _stored(tmp_path, "peft", deltas, Target(shapes))
    assert "base_model.model.attn.base_layer.out_proj.lora_A.weight" in keys


def test_longcat_modules_in_pieces_are_written_in_pieces(tmp_path: Path) -> None:
    name = "blocks.0.attn.qkv.weight"
    keys = _stored(tmp_path, "longcat", {name: delta_of("lora", (12, 4))}, Target({name: (12, 4)}))
    assert sum(".lora_up.blocks." in k for k in keys) == 3


def test_xlabs_keeps_the_first_rows_of_a_fused_layer_and_refuses_the_others(tmp_path: Path) -> None:
    name, shape = "single_blocks.0.linear1.weight", (28, 4)
    inside = delta_of("lora", (12, 4)).terms[0].padded(0, 0, 16)
    keys = _stored(tmp_path, "xlabs", {name: Delta(shape=shape, terms=(inside,))}, Target({name: shape}))
    assert keys == [f"single_blocks.0.processor.qkv_lora.{x}.weight" for x in ("down", "up")]
    refused = written_for(grammar("xlabs"), {name: delta_of("lora", shape)}, Target({name: shape}), {}).refused
    assert "first rows" in refused[name]


def test_an_unknown_format_gets_the_nearest_one() -> None:
    with pytest.raises(InputError, match='did you mean "kohya"'):
        grammar("kohyas")


def test_a_file_that_says_something_else_is_not_kept(tmp_path: Path) -> None:
    deltas = {"q.weight": delta_of("lora", (6, 4))}
    written = written_for(grammar("kohya"), deltas, Target({"q.weight": (6, 4)}), {})

    def check(path: Path) -> None:
        verify(
            path, grammar("kohya"), Base({"q.weight": (6, 4)}), deltas, Known({"q.weight": delta_of("lora", (6, 4), 1)})
        )

    with pytest.raises(VerificationError, match="q.weight: the difference written is"):
        store(written, tmp_path / "out.safetensors", check)
    assert not list(tmp_path.iterdir())


def test_sixteen_bits_stay_sixteen_bits_unless_a_scale_has_to_be_folded(tmp_path: Path) -> None:
    delta = delta_of("lora", (6, 4), scale=0.5)
    odd = delta_of("lora", (6, 4), scale=0.3)
    words = {"q.weight": "BF16"}
    for one, format, dtype in ((delta, "ai-toolkit", "BF16"), (odd, "ai-toolkit", "F32"), (odd, "kohya", "BF16")):
        written = written_for(grammar(format), {"q.weight": one}, Target({"q.weight": (6, 4)}), words)
        ups = [e.dtype for k, e in written.entries.items() if "lora_B" in k or "lora_up" in k]
        assert ups == [dtype]
