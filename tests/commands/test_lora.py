"""`lineage lora`: exit codes, what is printed, what is written; on the example models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from lineage.checkpoint import open_checkpoint
from tests.conftest import Lineage


@pytest.fixture(scope="module")
def rules(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mapping from the example's base to its suspect."""
    from lineage import api
    from lineage.layout.document import write_mapping

    path = tmp_path_factory.mktemp("rules") / "m.yaml"
    write_mapping(api.map(models / "base", models / "suspect"), path)
    return path


def test_convert_writes_every_key_and_exits_0(models: Path, rules: Path, tmp_path: Path, lineage: Lineage) -> None:
    done = lineage(
        "lora", "convert", models / "lora", "--map", rules, "--to", "kohya", "-o", tmp_path / "o.safetensors",
        "--base", models / "base", "--json",
    )  # fmt: skip
    told = json.loads(done.out)
    assert done.code == 0
    assert told["verified"] == told["tensors"] == 9
    assert all(key["to"] for key in told["keys"])
    assert all(k.startswith("lora_unet_") for k in load_file(tmp_path / "o.safetensors"))


@pytest.mark.parametrize(("more", "code"), [([], 1), (["--allow-partial"], 0)])
def test_convert_with_keys_left_over_exits_1_unless_told(
    models: Path, rules: Path, tmp_path: Path, lineage: Lineage, more: list[str], code: int
) -> None:
    out = tmp_path / "o.safetensors"
    shape = open_checkpoint(models / "base").specs["model.layers.0.mlp.up_proj.weight"].shape
    arrays = {"lora_unet_layers_0_mlp_up_proj.lora_down.weight": np.ones((2, shape[1]), np.float32)}
    arrays["lora_unet_layers_0_mlp_up_proj.lora_up.weight"] = np.ones((shape[0], 2), np.float32)
    save_file(arrays | {"foo.bar": np.ones(3, np.float32)}, tmp_path / "l.safetensors")
    done = lineage(
        "lora", "convert", tmp_path / "l.safetensors", "--map", rules, "--to", "comfy", "-o", out,
        "--base", models / "base", *more,
    )  # fmt: skip
    assert done.code == code
    assert "foo.bar: no adapter format writes such a key" in done.err


def test_convert_of_nothing_is_one_line_and_exit_2(models: Path, rules: Path, tmp_path: Path, lineage: Lineage) -> None:
    save_file({"foo.bar": np.ones(3, np.float32)}, tmp_path / "l.safetensors")
    out = tmp_path / "o.safetensors"
    done = lineage("lora", "convert", tmp_path / "l.safetensors", "--map", rules, "--to", "comfy", "-o", out)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"lineage: {tmp_path}/l.safetensors: none of its 1 keys could be read" in done.err
    assert not out.exists()


def test_convert_never_writes_over_its_inputs(models: Path, rules: Path, lineage: Lineage) -> None:
    words = ["lora", "convert", models / "lora", "--map", rules, "--to", "kohya", "--base", models / "base"]
    done = lineage(*words, "-o", rules)
    assert done.code == 2
    assert "the output is an input" in done.err


def test_the_way_back_restores_the_adapter(models: Path, rules: Path, tmp_path: Path, lineage: Lineage) -> None:
    words = ["--map", rules, "--base", models / "suspect", "--to", "peft", "--inverse"]
    lineage(
        "lora",
        "convert",
        models / "lora",
        "--map",
        rules,
        "--to",
        "peft",
        "-o",
        tmp_path / "there",
        "--base",
        models / "base",
    )
    assert lineage("lora", "convert", tmp_path / "there", *words, "-o", tmp_path / "back").code == 0
    first, last = (load_file(p / "adapter_model.safetensors") for p in (models / "lora", tmp_path / "back"))
    assert {k: v.tobytes() for k, v in first.items()} == {k: v.tobytes() for k, v in last.items()}


def test_inspect_prints_one_document(models: Path, lineage: Lineage) -> None:
    done = lineage("lora", "inspect", models / "lora", "--base", models / "base", "--json")
    told = json.loads(done.out)
    assert told["formats"] == ["peft"]
    assert told["ranks"] == {"4": 12}
    assert told["fits"][0]["fitting"] == 24
    assert "ranks: 12 x 4" in lineage("lora", "inspect", models / "lora").out


@pytest.mark.parametrize("emit", ["yaml", "json", "table", "python"])
def test_map_prints_the_key_map(models: Path, rules: Path, tmp_path: Path, lineage: Lineage, emit: str) -> None:
    out = tmp_path / "out"
    done = lineage(
        "lora", "map", models / "base", models / "suspect", "--map", rules, "--from", "kohya", "--emit", emit, "-o", out
    )
    assert done.code == 0
    text = out.read_text()
    if emit == "python":
        compile(text, "script", "exec")
    elif emit != "table":
        assert yaml.safe_load(text)["grade"] == "reshape"
    assert "qkv_proj" in text


def test_check_says_that_the_adapter_should_work(models: Path, rules: Path, lineage: Lineage) -> None:
    done = lineage("lora", "check", models / "lora", models / "base", models / "suspect", "--map", rules)
    assert done.code == 0
    assert done.out.startswith("should work: related (verdict transformed")
    assert "does not" not in done.out


def test_extract_merge_resize_and_add_work_together(models: Path, tmp_path: Path, lineage: Lineage) -> None:
    merged, one, two = tmp_path / "merged.safetensors", tmp_path / "one", tmp_path / "two"
    assert lineage("lora", "merge", models / "base", models / "lora", "-o", merged).code == 0
    assert lineage("lora", "extract", models / "base", merged, "--rank", 4, "-o", one).code == 0
    assert lineage("lora", "resize", one, "--rank", 2, "-o", two).code == 0
    assert lineage("lora", "add", one, two, "--weight", 0.5, "--weight", 0.5, "-o", tmp_path / "sum").code == 0
    arrays = load_file(tmp_path / "sum" / "adapter_model.safetensors")
    assert {v.shape[0] for k, v in arrays.items() if "lora_A" in k} == {6}


@pytest.mark.parametrize("command", ["extract", "resize"])
def test_a_size_has_to_be_given(models: Path, tmp_path: Path, lineage: Lineage, command: str) -> None:
    paths = [models / "base", models / "suspect"] if command == "extract" else [models / "lora"]
    done = lineage("lora", command, *paths, "-o", tmp_path / "o")
    assert done.code == 2
    assert "give --rank or --energy" in done.err
