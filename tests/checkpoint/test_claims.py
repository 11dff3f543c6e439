"""What files say of their origin is repeated; broken documents cost a note and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lineage.checkpoint import Claim, open_checkpoint, read_claims


def _folder(folder: Path, metadata: dict[str, str] | None = None, **documents: str) -> Path:
    save_file({"w": np.ones(2, np.float32)}, folder / "model.safetensors", metadata)
    for name, text in documents.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def _read(path: Path) -> tuple[dict[str, str], tuple[str, ...]]:
    with open_checkpoint(path) as checkpoint:
        claims, notes = read_claims(checkpoint)
    return {claim.source: claim.says for claim in claims}, notes


def test_model_card_configuration_and_metadata_are_repeated(tmp_path: Path) -> None:
    card = "---\nbase_model: org/base\nbase_model_relation: finetune\nlicense: mit\n---\n# Hello\n"
    folder = _folder(
        tmp_path,
        {"ss_sd_model_name": "base.ckpt", "modelspec.title": "Mine", "other": "x"},
        README__md=card,
        config__json=json.dumps({"_name_or_path": "org/other", "model_type": "x"}),
        adapter_config__json=json.dumps({"base_model_name_or_path": "org/third"}),
    )
    claims, notes = _read(folder)
    assert claims == {
        "safetensors metadata ss_sd_model_name": "base.ckpt",
        "safetensors metadata modelspec.title": "Mine",
        "config.json _name_or_path": "org/other",
        "adapter_config.json base_model_name_or_path": "org/third",
        "README.md base_model": "org/base",
        "README.md base_model_relation": "finetune",
    }
    assert notes == ()


def test_a_list_of_bases_is_several_claims(tmp_path: Path) -> None:
    folder = _folder(tmp_path, README__md="---\nbase_model:\n- org/a\n- org/b\n---\n")
    with open_checkpoint(folder) as checkpoint:
        claims, _ = read_claims(checkpoint)
    assert claims == (Claim("README.md base_model", "org/a"), Claim("README.md base_model", "org/b"))


def test_components_speak_for_themselves(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    _folder(tmp_path / "vae", config__json='{"_name_or_path": "org/vae"}')
    assert _read(tmp_path)[0] == {"vae/config.json _name_or_path": "org/vae"}


def test_a_gguf_file_names_its_base(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_string("general.base_model.0.repo_url", "https://example.org/base")
    writer.add_tensor("w", np.ones(2, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert _read(tmp_path / "m.gguf")[0] == {"gguf metadata general.base_model.0.repo_url": "https://example.org/base"}


def test_a_file_that_is_named_alone_does_not_speak_for_its_neighbours(tmp_path: Path) -> None:
    folder = _folder(tmp_path, README__md="---\nbase_model: org/base\n---\n")
    assert _read(folder / "model.safetensors") == ({}, ())


@pytest.mark.parametrize(
    "text",
    [
        "---\nbase_model: {a: [}\n---\n",
        "---\n" + "[" * 50_000 + "\n---\n",
        "---\na: &a [x, x]\nb: [*a, *a]\n---\n",
        "---\nbase_model: !!python/object/apply:os.system [true]\n---\n",
        "---\nn: 1" + "0" * 5000 + "\n---\n",
        "---\n? [a]\n: b\n---\n",
    ],
)
def test_a_hostile_model_card_costs_a_note(tmp_path: Path, text: str) -> None:
    claims, notes = _read(_folder(tmp_path, README__md=text))
    assert claims == {}
    assert len(notes) == 1
    assert "README.md is left out" in notes[0]


@pytest.mark.parametrize(
    "text", ["", "# no front matter", "---\nbase_model: 7\n---\n", "---\n- a\n---\n", "---\n---\n"]
)
def test_a_model_card_that_claims_nothing_is_silent(tmp_path: Path, text: str) -> None:
    assert _read(_folder(tmp_path, README__md=text)) == ({}, ())


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ('{"hidden_size": 1' + "0" * 5000 + "}", "a number has thousands of digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ("{", "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("<html>", "a web page"),
    ],
)
def test_a_broken_configuration_costs_a_note(tmp_path: Path, text: str, cause: str) -> None:
    claims, notes = _read(_folder(tmp_path, config__json=text))
    assert claims == {}
    assert "config.json is left out" in notes[0]
    assert cause in notes[0]


@pytest.mark.parametrize("text", ["7", "[]", "null", '{"_name_or_path": 7}', '{"_name_or_path": ["", null]}', "NaN"])
def test_a_configuration_of_the_wrong_types_is_silent(tmp_path: Path, text: str) -> None:
    assert _read(_folder(tmp_path, config__json=text)) == ({}, ())


def test_claims_cannot_reach_the_terminal_with_escapes(tmp_path: Path) -> None:
    folder = _folder(tmp_path, config__json=json.dumps({"_name_or_path": "a\x1b[2Jb" + "c" * 1000}))
    says = _read(folder)[0]["config.json _name_or_path"]
    assert "\x1b" not in says
    assert len(says) == 300


def test_documents_that_are_no_files_cost_a_note(tmp_path: Path) -> None:
    _folder(tmp_path)
    (tmp_path / "config.json").mkdir()
    (tmp_path / "README.md").symlink_to("README.md")
    assert len(_read(tmp_path)[1]) == 2
