"""The example's models: really trained, laid out as promised, the same each time."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lineage
from lineage import example
from lineage.errors import InputError
from lineage.example.network import Sizes, new_adapter, new_network, train

TEXT = b"the quick brown fox jumps over the lazy dog. " * 40


def test_the_folders_hold_what_is_promised(models: Path) -> None:
    assert {path.name for path in models.iterdir()} == set(example.WRITTEN)


def test_the_base_has_learnt_more_than_letter_frequencies(models: Path) -> None:
    text = Path(argparse.__file__).read_bytes()
    network = new_network(Sizes(), seed=0)
    values = load_file(models / "base/model.safetensors")
    with torch.no_grad():
        network.flat.copy_(torch.cat([values[name].float().reshape(-1) for name in network.shapes]))
    frequencies = torch.bincount(torch.tensor(list(text)), minlength=256) / len(text)
    by_frequency = -float((frequencies * frequencies.clamp(min=1e-9).log()).sum())
    assert train(Sizes(), network, text, steps=20, rate=0.0, seed=0) < by_frequency - 0.5


def test_the_suspect_has_other_names_and_fewer_tensors(models: Path) -> None:
    with lineage.open(models / "base") as a, lineage.open(models / "suspect") as b:
        assert not set(a.specs) & set(b.specs)
        assert (len(a), len(b), a.parameters) == (30, 21, b.parameters)


def test_the_stranger_has_the_same_layout_and_other_values(models: Path) -> None:
    with lineage.open(models / "base") as a, lineage.open(models / "stranger") as b:
        assert {s.name: s.shape for s in a} == {s.name: s.shape for s in b}
        assert abs(float((a.tensor("lm_head.weight") * b.tensor("lm_head.weight")).mean())) < 0.01


def test_the_lora_names_its_base_and_fits_it(models: Path) -> None:
    config = json.loads((models / "lora/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "example/base"
    factors = load_file(models / "lora/adapter_model.safetensors")
    base = load_file(models / "base/model.safetensors")
    for key, down in factors.items():
        if key.endswith("lora_A.weight"):
            up = factors[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            assert (up @ down).shape == base[name].shape
            assert up.abs().max() > 0


def test_a_seed_gives_the_same_network_again() -> None:
    one, two = (new_network(Sizes(layers=1), seed=3) for _ in range(2))
    losses = [train(Sizes(layers=1), n, TEXT, steps=4, rate=1e-2, seed=5) for n in (one, two)]
    assert losses[0] == losses[1]
    assert torch.equal(one.flat, two.flat)


def test_training_lowers_the_loss() -> None:
    network = new_network(Sizes(layers=1), seed=3)
    told: list[tuple[int, int]] = []
    before = train(Sizes(layers=1), network, TEXT, steps=1, rate=0.0, seed=5)
    after = train(Sizes(layers=1), network, TEXT, steps=30, rate=1e-2, seed=5, progress=lambda *at: told.append(at))
    assert after < before - 0.5
    assert told[-1] == (30, 30)


def test_training_an_adapter_leaves_the_network_alone() -> None:
    network = new_network(Sizes(layers=1), seed=3)
    kept = network.flat.detach().clone()
    adapter = new_adapter(network, ("q_proj.weight",), rank=2, alpha=4, seed=1)
    train(Sizes(layers=1), network, TEXT, steps=3, rate=1e-2, seed=5, adapter=adapter)
    assert torch.equal(network.flat, kept)
    ((down, up),) = adapter.factors().values()
    assert down.shape == (2, 64)
    assert bool(up.any())


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(InputError, match="is there already and not empty"):
        example.write_example(tmp_path)


def test_python_without_its_source_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "lib"))
    with pytest.raises(InputError, match="without its source"):
        example.write_example(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(example, "_trained", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        example.write_example(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
