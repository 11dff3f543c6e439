"""Names are a tie-breaker: stems, roles and numbers."""

from __future__ import annotations

import pytest

from lineage.match.structure import Links
from lineage.match.words import load_order, load_roles


@pytest.mark.parametrize(
    ("mine", "theirs", "other"),
    [
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"),
        ("h.0.attn.c_attn.weight", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"),
        ("layers.0.ffn_norm.weight", "h.0.post_attention_layernorm.weight", "h.0.input_layernorm.weight"),
    ],
)
def test_names_of_one_role_are_more_alike(mine: str, theirs: str, other: str) -> None:
    roles = load_roles()
    assert roles.likeness(mine, theirs) > roles.likeness(mine, other)


def test_tensors_that_say_different_things_clash() -> None:
    roles = load_roles()
    assert roles.clash("attn.wq.weight", "mlp.up_proj.weight")
    assert not roles.clash("attn.qkv.weight", "self_attn.q_proj.weight")


def test_the_order_of_fused_parts_names_known_roles() -> None:
    roles = load_roles()
    known = {role for found in roles.by_word.values() for role in found}
    assert set(load_order()) <= known


def test_a_neighbour_that_is_matched_makes_its_siblings_close() -> None:
    links = Links([("a.0.q.weight", "b.1.wq.weight"), ("a.1.q.weight", "b.0.wq.weight")])
    assert links.closeness("a.0.q.bias", "b.1.wq.bias") > links.closeness("a.0.q.bias", "b.0.wq.bias")
    assert links.closeness("a.0.norm", "b.1.ln") > links.closeness("a.0.norm", "b.0.ln")
