"""Groups and layers by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineage.errors import InputError
from lineage.measure.groups import GROUPS, Place, read_groups

PLACES = {
    "model.layers.3.self_attn.q_proj.weight": ("attention", "model.layers", 3),
    "model.layers.3.self_attn.q_norm.weight": ("norm", "model.layers", 3),
    "model.layers.12.mlp.experts.7.gate_proj.weight": ("mlp", "model.layers", 12),
    "model.layers.12.block_sparse_moe.experts.7.w1.weight": ("mlp", "model.layers", 12),
    "model.layers.12.block_sparse_moe.gate.weight": ("mlp", "model.layers", 12),
    "model.layers.3.post_attention_layernorm.weight": ("norm", "model.layers", 3),
    "model.embed_tokens.weight": ("embedding", "", None),
    "model.norm.weight": ("norm", "", None),
    "lm_head.weight": ("head", "", None),
    "output.weight": ("head", "", None),
    "output_norm.weight": ("norm", "", None),
    "blk.30.attn_q.weight": ("attention", "blk", 30),
    "blk.30.ffn_down.weight": ("mlp", "blk", 30),
    "token_embd.weight": ("embedding", "", None),
    "transformer.h.3.attn.c_proj.weight": ("attention", "transformer.h", 3),
    "transformer.h.3.mlp.c_proj.weight": ("mlp", "transformer.h", 3),
    "transformer.h.3.ln_1.weight": ("norm", "transformer.h", 3),
    "transformer.wte.weight": ("embedding", "", None),
    "params/layers_3/attention/query/kernel": ("attention", "params/layers", 3),
    "encoder.block.3.layer.1.DenseReluDense.wi_0.weight": ("mlp", "encoder.block", 3),
    "encoder.block.3.layer.0.SelfAttention.q.weight": ("attention", "encoder.block", 3),
    "bert.encoder.layer.2.attention.self.query.weight": ("attention", "bert.encoder.layer", 2),
    "bert.encoder.layer.2.output.LayerNorm.weight": ("norm", "bert.encoder.layer", 2),
    "double_blocks.3.img_attn.qkv.weight": ("attention", "double_blocks", 3),
    "double_blocks.3.img_mlp.0.weight": ("mlp", "double_blocks", 3),
    "single_blocks.3.linear1.weight": ("projection", "single_blocks", 3),
    "transformer/transformer_blocks.3.attn.to_q.weight": ("attention", "transformer/transformer_blocks", 3),
    "down_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj.weight": ("mlp", "down_blocks", 0),
    "down_blocks.0.resnets.1.conv1.weight": ("projection", "down_blocks", 0),
    "multi_modal_projector.linear_1.weight": ("projection", "", None),
    "features.0.weight": ("other", "", None),
    "": ("other", "", None),
}


@pytest.mark.parametrize("name", PLACES)
def test_names_are_placed_by_group_and_layer(name: str) -> None:
    assert read_groups().place(name) == Place(*PLACES[name])


def test_an_expert_is_no_layer() -> None:
    assert read_groups().place("experts.5.w1.weight").layer is None


def test_every_group_of_the_package_is_one_of_the_contract() -> None:
    assert set(read_groups().groups) < set(GROUPS)


def test_vectors_and_norms_stand_apart_from_content_weights() -> None:
    groups = read_groups()
    assert groups.apart("attention", (64,))
    assert groups.apart("norm", (4, 4))
    assert groups.apart("other", ())
    assert not groups.apart("attention", (64, 64))


def test_a_file_replaces_the_patterns(tmp_path: Path) -> None:
    file = tmp_path / "groups.yaml"
    file.write_text("groups: {mixer: [mix]}\nlayers: [step]\n")
    assert read_groups(file).place("step.4.mix.weight") == Place("mixer", "step", 4)
    assert read_groups(file).place("step.4.attn.weight").group == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("groups: {a: ['(']}", r"groups\.a\[0\]: no regular expression"),
        ("groups: 3", "no list of groups"),
        ("group: {}", "no list of groups"),
        ("[", "no list of groups"),
    ],
)
def test_a_broken_file_is_named_with_its_fault(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_groups(file)
    assert "mine.yaml" in str(caught.value)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_groups(tmp_path / "none.yaml")
