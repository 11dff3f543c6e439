"""`lineage inspect` on a terminal and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file


def _lineage(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lineage", *map(str, words)]
    root = Path(__file__).parents[2]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    weights = {f"model.layers.{i}.mlp.up_proj.weight": np.full((2, 3), i, np.float32) for i in range(4)}
    save_file({**weights, "\x1b[2Jodd\u202e\n": np.ones(2, np.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "README.md").write_text("---\nbase_model: org/base\n---\n")
    return tmp_path


def test_people_see_layers_on_one_line_and_the_claims(model: Path) -> None:
    done = _lineage("inspect", model)
    assert done.returncode == 0
    assert "safetensors, 5 tensors, 26 parameters, 100 B (4 F32, 1 F16)" in done.stdout
    assert "model.layers.{0–3}.mlp.up_proj.weight" in done.stdout
    assert "README.md base_model: org/base" in done.stdout
    assert "\x1b" not in done.stdout
    assert "\u202e" not in done.stdout


def test_figures_are_printed_where_they_are_asked_for(model: Path) -> None:
    done = _lineage("inspect", model, "--stats")
    line = next(line for line in done.stdout.splitlines() if "layers.3." in line)
    assert line.split()[-6:] == ["3", "0", "3", "3", "0", "0"]


def test_json_holds_every_tensor_under_its_own_name(model: Path) -> None:
    done = _lineage("inspect", model, "--json", "--stats")
    document = json.loads(done.stdout)
    assert done.stderr == ""
    assert document["format"] == "safetensors"
    assert document["claims"] == [{"source": "README.md base_model", "says": "org/base"}]
    names = {tensor["name"]: tensor for tensor in document["tensors"]}
    assert names["\x1b[2Jodd\u202e\n"]["shape"] == [2]
    assert names["model.layers.2.mlp.up_proj.weight"]["statistics"]["mean"] == 2


def test_a_broken_file_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(b"1234567")
    done = _lineage("inspect", tmp_path / "m.safetensors", "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"lineage: {tmp_path}/m.safetensors: only 7 bytes, not a safetensors file; fetch it again\n"
