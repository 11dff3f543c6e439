"""The record of `lineage inspect`: counts, templates, a guess at the network, figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.inspection import Tensor, guess_network, inspect, name_groups


def test_figures_agree_with_numpy_over_finite_elements(tmp_path: Path) -> None:
    values = np.random.default_rng(1).normal(1e3, 1e-2, (600, 500))
    values[0, :3] = [np.nan, np.inf, 0]
    save_file({"w": values, "nothing": np.zeros((0, 2)), "lost": np.full(3, np.nan)}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        found = {t.name: t.statistics for t in inspect(checkpoint, statistics=True).tensors}
    finite = values[np.isfinite(values)]
    w = found["w"]
    assert w is not None
    assert w.mean == pytest.approx(finite.mean(), rel=1e-12)
    assert w.std == pytest.approx(finite.std(), rel=1e-9)
    assert (w.min, w.max, w.zero, w.nan) == (finite.min(), finite.max(), 1 / finite.size, 2)
    for name, bad in (("nothing", 0), ("lost", 3)):
        figures = found[name]
        assert figures is not None
        assert (figures.mean, figures.std, figures.min, figures.max, figures.zero, figures.nan) == (None,) * 5 + (bad,)


def test_figures_that_leave_the_range_of_numbers_are_none(tmp_path: Path) -> None:
    save_file({"w": np.array([-1e308, 1e308, 1e308])}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        figures = inspect(checkpoint, statistics=True).tensors[0].statistics
    assert figures is not None
    assert figures.std is None


def test_counts_add_up_over_components(tmp_path: Path) -> None:
    for part, size in (("unet", 6), ("vae", 4)):
        (tmp_path / part).mkdir()
        save_file({"conv_in.weight": np.ones(size, np.float16)}, tmp_path / part / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        found = inspect(checkpoint)
    assert (found.count, found.parameters, found.bytes, found.dtypes) == (2, 10, 20, {"F16": 2})
    assert [(p.name, p.parameters) for p in found.components] == [("unet", 6), ("vae", 4)]
    assert found.tensors[0].statistics is None


def test_a_checkpoint_without_tensors_can_be_inspected(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert inspect(checkpoint, statistics=True).count == 0


def _rows(*names: str) -> list[Tensor]:
    return [Tensor(name, (2,), "F32", 2, 8) for name in names]


def test_layers_share_a_line_where_shape_and_dtype_agree() -> None:
    rows = [*_rows("a.0.w", "a.1.w", "a.11.w", "b.7"), Tensor("a.2.w", (3,), "F32", 3, 12)]
    assert [(g.template, g.tensors) for g in name_groups(rows)] == [("a.{0–11}.w", 3), ("b.7", 1), ("a.2.w", 1)]


def test_numbers_inside_words_tell_tensors_apart() -> None:
    assert [g.template for g in name_groups(_rows("fc1.w", "fc2.w"))] == ["fc1.w", "fc2.w"]


def test_odd_names_keep_their_letters() -> None:
    names = ["{i}.w", "\0.1", "1" * 5000, "", "²"]
    assert [g.template for g in name_groups(_rows(*names))] == names


@pytest.mark.parametrize(
    ("names", "network"),
    [
        (["model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.gate_proj.weight"], "decoder with gated MLP"),
        (["blk.0.attn_q.weight", "blk.0.ffn_gate.weight"], "GGUF names"),
        (["layer1.0.conv1.weight", "layer1.0.bn1.weight"], "residual convolutional network"),
        (["x.0.attn.lora_A.weight", "x.0.attn.lora_B.weight"], "LoRA adapter"),
    ],
)
def test_the_network_is_guessed_from_names(names: list[str], network: str) -> None:
    assert network in (guess_network(names) or "")


def test_unknown_names_are_not_guessed() -> None:
    assert guess_network(["a", "b.c", "1" * 10_000, "." * 300]) is None
