"""8-bit weights with scales in tensors of their own are read as the values that they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lineage.checkpoint import open_checkpoint
from lineage.errors import InputError

F8 = torch.float8_e4m3fn


def _blocks(weight: torch.Tensor, scales: torch.Tensor, tall: int, wide: int) -> torch.Tensor:
    """The plain formula: every scale spread over its block."""
    spread = scales.float().repeat_interleave(tall, -2)[..., : weight.shape[-2], :]
    return weight.float() * spread.repeat_interleave(wide, -1)[..., : weight.shape[-1]]


def _case(kind: str) -> tuple[dict[str, torch.Tensor], str, torch.Tensor]:
    """Tensors of a file, the weight's name, and its values."""
    torch.manual_seed(3)
    weight = torch.randn(300, 260).to(F8)
    if kind == "block":
        scales = torch.rand(3, 3)
        return {"x.weight": weight, "x.weight_scale_inv": scales}, "x.weight", _blocks(weight, scales, 128, 128)
    if kind == "experts":
        weight, scales = torch.randn(3, 256, 130).to(F8), torch.rand(3, 2, 2)
        return {"x": weight, "x_scale_inv": scales}, "x", _blocks(weight, scales, 128, 128)
    if kind == "row":
        scales = torch.rand(300, 1).bfloat16()
        return {"x.weight": weight, "x.weight_scale": scales}, "x.weight", weight.float() * scales.float()
    if kind == "int8 row":
        codes, scales = torch.randint(-127, 127, (40, 26), dtype=torch.int8), torch.rand(40)
        return {"x.weight": codes, "x.weight_scale": scales}, "x.weight", codes.float() * scales[:, None]
    if kind == "column":
        scales = torch.rand(1, 260)
        return {"x.weight": weight, "x.weight_scale": scales}, "x.weight", weight.float() * scales
    if kind == "one an expert":
        weight, scales = torch.randn(3, 5, 7).to(F8), torch.rand(3, 1, 1)
        return {"x": weight, "x_scale": scales}, "x", weight.float() * scales
    scale = torch.tensor(0.37)
    return {"x.weight": weight, "x.scale_weight": scale}, "x.weight", weight.float() * scale


@pytest.mark.parametrize("kind", ["block", "experts", "row", "int8 row", "column", "one an expert", "one"])
def test_values_are_codes_times_scales(tmp_path: Path, kind: str) -> None:
    tensors, name, values = _case(kind)
    save_file({**tensors, "other": torch.ones(2)}, tmp_path / "m.safetensors")
    draw = np.random.default_rng(1)
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert set(checkpoint.specs) == {name, "other"}
        spec = checkpoint.specs[name]
        assert spec.dtype.endswith("+scale")
        assert not spec.plain
        assert "decoded with their scales" in checkpoint.notes[0]
        np.testing.assert_array_equal(checkpoint.tensor(name), values.numpy())
        flat = values.numpy().reshape(-1)
        for _ in range(40):
            start, stop = sorted(draw.integers(0, flat.size + 1, 2))
            np.testing.assert_array_equal(checkpoint.read(name, start, stop), flat[start:stop])
        assert checkpoint.read_codes("other").tolist() == [1, 1]
        with pytest.raises(ValueError, match="read its values"):
            checkpoint.read_codes(name)


def test_the_block_size_of_the_configuration_is_used(tmp_path: Path) -> None:
    weight, scales = torch.randn(100, 100).to(F8), torch.rand(3, 3)
    save_file({"x.weight": weight, "x.weight_scale_inv": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [48, 48]}}')
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("x.weight"), _blocks(weight, scales, 48, 48).numpy())


@pytest.mark.parametrize(
    "text", ["{", '{"quantization_config": 7}', '{"quantization_config": {"weight_block_size": 5}}']
)
def test_a_broken_configuration_is_no_obstacle(tmp_path: Path, text: str) -> None:
    tensors, name, values = _case("block")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor(name), values.numpy())


def test_scales_in_another_shard_are_found(tmp_path: Path) -> None:
    tensors, name, values = _case("block")
    for number, (key, tensor) in enumerate(tensors.items()):
        save_file({key: tensor}, tmp_path / f"part{number}.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor(name), values.numpy())


@pytest.mark.parametrize("shape", [(2, 7), (5,), (2, 2, 2), (0,)])
def test_scales_that_do_not_fit_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors: dict[str, Any] = {"x.weight": torch.ones(4, 6).to(F8), "x.weight_scale": torch.ones(shape)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="does not fit"):
        open_checkpoint(tmp_path / "m.safetensors")


def test_a_tensor_that_is_only_named_like_a_scale_stays(tmp_path: Path) -> None:
    tensors = {"x.weight": torch.ones(4, 6), "x.weight_scale": torch.ones(4)}
    save_file(tensors, tmp_path / "m.safetensors")
    assert set(open_checkpoint(tmp_path / "m.safetensors").specs) == set(tensors)
