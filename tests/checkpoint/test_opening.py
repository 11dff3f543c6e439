"""Which files of a folder are the weights, and what is said of those that are left aside."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lineage.checkpoint import components, open_checkpoint
from lineage.errors import InputError


def _save(path: Path, **values: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.full((2, 2), value, np.float32) for name, value in values.items()}, path)


def _index(folder: Path, table: Any, name: str = "model.safetensors.index.json") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": table}))


def _refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    return str(caught.value)


def test_shards_with_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path / "one.safetensors", a=1)
    _save(tmp_path / "two.safetensors", b=2)
    _save(tmp_path / "stray.safetensors", c=3)
    _index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.tensor("b").tolist() == [[2, 2], [2, 2]]
        assert list(checkpoint.specs) == ["a", "b"]
        assert checkpoint.notes == ("stray.safetensors in the same folder is not read",)


def test_numbered_shards_without_an_index_are_one_checkpoint(tmp_path: Path) -> None:
    for number, name in enumerate("abc", 1):
        _save(tmp_path / f"model-{number:05}-of-00003.safetensors", **{name: number})
    assert [s.name for s in open_checkpoint(tmp_path)] == ["a", "b", "c"]


def test_a_missing_numbered_shard_is_named(tmp_path: Path) -> None:
    _save(tmp_path / "model-00001-of-00003.safetensors", a=1)
    assert "2 of 3 shards are missing, the first is model-00002-of-00003.safetensors" in _refusal(tmp_path)


def test_files_without_order_are_joined_where_their_names_differ(tmp_path: Path) -> None:
    _save(tmp_path / "left.safetensors", a=1)
    _save(tmp_path / "right.safetensors", b=2)
    assert len(open_checkpoint(tmp_path)) == 2


def test_one_name_in_two_shards_is_refused(tmp_path: Path) -> None:
    _save(tmp_path / "left.safetensors", a=1)
    _save(tmp_path / "right.safetensors", a=2)
    assert "two files hold the same tensor: a stands in" in _refusal(tmp_path)


def test_the_file_that_libraries_load_goes_before_variants(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", a=1)
    _save(tmp_path / "model.fp16.safetensors", a=2)
    _save(tmp_path / "consolidated.safetensors", a=3)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensor("a")[0, 0] == 1
    assert "consolidated.safetensors, model.fp16.safetensors" in checkpoint.notes[0]


def test_safetensors_go_before_a_pickle_which_is_not_opened(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", a=1)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": print}, 2))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.specs) == ["a"]
    assert "pytorch_model.bin in the same folder is not read" in checkpoint.notes[0]


def test_pickles_of_trainers_are_no_weights(tmp_path: Path) -> None:
    import torch

    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"anything")
    assert list(open_checkpoint(tmp_path).specs) == ["w"]


def test_sharded_pickles_with_an_index_are_read(tmp_path: Path) -> None:
    import torch

    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    shards = {name: f"pytorch_model-0000{n}-of-00002.bin" for n, name in enumerate("ab", 1)}
    _index(tmp_path, shards, "pytorch_model.bin.index.json")
    assert [s.name for s in open_checkpoint(tmp_path)] == ["a", "b"]


def test_a_shard_that_is_named_alone_says_that_it_is_one(tmp_path: Path) -> None:
    _save(tmp_path / "model-00001-of-00003.safetensors", a=1)
    notes = open_checkpoint(tmp_path / "model-00001-of-00003.safetensors").notes
    assert notes == ("this is shard 1 of 3; name the folder to read all",)


def test_a_split_gguf_is_read_whole(tmp_path: Path) -> None:
    import gguf

    for number, name in enumerate("ab", 1):
        writer = gguf.GGUFWriter(tmp_path / f"m-0000{number}-of-00002.gguf", "llama")
        writer.add_tensor(name, np.ones((2, 2), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        assert [s.name for s in open_checkpoint(path)] == ["a", "b"]
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    assert "m-00002-of-00002.gguf" in _refusal(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        ([1, 2], 'an index needs a "weight_map"'),
        ({"a": 7}, 'an index needs a "weight_map"'),
        ({}, "lists no tensor"),
        ({"a": "../x.safetensors"}, 'out of its folder, to "../x.safetensors"'),
        ({"a": "/etc/passwd"}, 'out of its folder, to "/etc/passwd"'),
        ({"a": ""}, "out of its folder"),
        ({"a": "."}, "out of its folder"),
        ({"a": "gone.safetensors"}, "the index names gone.safetensors, which is not in the folder"),
        ({"b": "here.safetensors"}, 'promises "b" in here.safetensors, which does not hold it'),
    ],
)
def test_a_broken_index_is_refused_with_its_cause(tmp_path: Path, table: Any, cause: str) -> None:
    _save(tmp_path / "x.safetensors", a=1)
    _save(tmp_path / "m" / "here.safetensors", a=1)
    _index(tmp_path / "m", table)
    text = _refusal(tmp_path / "m")
    assert cause in text
    assert "index.json" in text


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"weight_map": 1' + "0" * 5000 + "}", "7"])
def test_an_index_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "index.json" in _refusal(tmp_path)


def test_a_folder_without_weights_says_what_to_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "again").symlink_to(tmp_path)
    assert "no weights in this folder; name a folder or a file" in _refusal(tmp_path)


@pytest.mark.parametrize(("name", "what"), [("_METADATA", "an Orbax checkpoint"), (".metadata", "a distributed torch")])
def test_a_folder_of_a_format_that_is_not_read_is_named(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).write_text("{}")
    assert what in _refusal(tmp_path)


@pytest.mark.parametrize("listed", [True, False])
def test_a_pipeline_folder_is_one_checkpoint_of_components(tmp_path: Path, listed: bool) -> None:
    _save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", w=1)
    _save(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", w=2)
    (tmp_path / "scheduler").mkdir()
    if listed:
        (tmp_path / "model_index.json").write_text("{}")
        _save(tmp_path / "pruned.safetensors", all=3)
    with open_checkpoint(tmp_path) as checkpoint:
        assert {s.name: s.component for s in checkpoint} == {"unet/w": "unet", "vae/w": "vae"}
        assert checkpoint.component("vae").tensor("w")[0, 0] == 1
        assert checkpoint.component("vae").read_codes("w", 1, 3).tolist() == [1, 1]
        assert bool(checkpoint.notes) == listed
        with pytest.raises(KeyError):
            checkpoint.component("text_encoder")
    assert list(components(tmp_path)) == ["unet", "vae"]


def test_weights_at_the_top_go_before_those_of_sub_folders(tmp_path: Path) -> None:
    _save(tmp_path / "model.safetensors", w=1)
    _save(tmp_path / "original" / "consolidated.safetensors", w=2)
    assert list(open_checkpoint(tmp_path).specs) == ["w"]
    assert list(components(tmp_path)) == [""]


def test_a_file_of_several_networks_has_components(tmp_path: Path) -> None:
    names = {"model.diffusion_model.w": 1.0, "first_stage_model.w": 2.0, "alphas": 3.0}
    _save(tmp_path / "bundle.safetensors", **names)
    with open_checkpoint(tmp_path / "bundle.safetensors") as checkpoint:
        assert {s.name: s.component for s in checkpoint} == {
            "model.diffusion_model.w": "unet",
            "first_stage_model.w": "vae",
            "alphas": "other",
        }
        assert checkpoint.component("vae").tensor("first_stage_model.w")[0, 0] == 2


def test_order_of_shards_changes_nothing(tmp_path: Path) -> None:
    _save(tmp_path / "a" / "one.safetensors", a=1)
    _save(tmp_path / "a" / "two.safetensors", b=2)
    _save(tmp_path / "b" / "one.safetensors", b=2)
    _save(tmp_path / "b" / "two.safetensors", a=1)
    first, second = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    assert {n: first.tensor(n).tolist() for n in first.specs} == {n: second.tensor(n).tolist() for n in second.specs}
