"""A mapping is held against the weights again: what is true passes, what was changed does not."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from lineage.checkpoint import open_checkpoint
from lineage.layout.mapping import Evidence, Mapping, Rule
from lineage.layout.operations import Add
from lineage.match.certify import check
from tests.match import models
from tests.match.models import save
from tests.match.test_layouts import mapped


def test_a_found_mapping_holds_when_it_is_checked(tmp_path: Path) -> None:
    a = models.language_model(experts=True)
    mapping = mapped(tmp_path, a, models.stacked_experts(a))
    found = check(mapping, open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "b.safetensors"))
    assert found
    assert all(f.holds and f.exact for f in found)


def test_one_changed_tensor_is_named(tmp_path: Path) -> None:
    a = models.language_model()
    b = models.fused(a)
    mapping = mapped(tmp_path, a, b)
    b["blocks.1.ffn.w2.weight"] = np.random.default_rng(9).standard_normal(b["blocks.1.ffn.w2.weight"].shape)
    other = open_checkpoint(save(tmp_path / "c.safetensors", b))
    failed = [f for f in check(mapping, open_checkpoint(tmp_path / "a.safetensors"), other) if not f.holds]
    assert [f.targets for f in failed] == [("blocks.1.ffn.w2.weight",)]
    assert "blocks.1.ffn.w2.weight" in failed[0].why


def test_two_rules_that_trade_their_sources_do_not_hold(tmp_path: Path) -> None:
    a = models.language_model()
    mapping = mapped(tmp_path, a, models.fused(a))
    one, two = (next(r for r in mapping.rules if t in r.to[0]) for t in ("norm_a", "norm_b"))
    rules = [msgspec.structs.replace(one, source=two.source), msgspec.structs.replace(two, source=one.source)]
    swapped = msgspec.structs.replace(mapping, rules=tuple(rules))
    found = check(swapped, open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "b.safetensors"))
    assert len(found) == 2 * models.LAYERS
    assert not any(f.holds for f in found)


@pytest.mark.parametrize("target", ["nowhere.weight", "output.weight"])
def test_a_rule_for_a_tensor_that_is_missing_or_of_another_shape_does_not_hold(tmp_path: Path, target: str) -> None:
    a = models.language_model()
    mapped(tmp_path, a, models.fused(a))
    rule = Rule(to=(target,), source=("model.norm.weight",), how="given", evidence=Evidence(tensors=1))
    a_file, b_file = (open_checkpoint(tmp_path / f"{n}.safetensors") for n in "ab")
    (found,) = check(Mapping(rules=(rule,)), a_file, b_file)
    assert not found.holds
    assert target in found.why


def test_a_gain_stored_minus_one_needs_its_constant(tmp_path: Path) -> None:
    a = {n: np.round(x * 256) / 256 for n, x in models.language_model().items()}
    mapping = mapped(tmp_path, a, models.shifted(a))
    norms = [r for r in mapping.rules if "norm" in r.to[0]]
    assert norms
    assert all(r.ops == (Add(-1.0),) and r.evidence is not None and r.evidence.certified for r in norms)
