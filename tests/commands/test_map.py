"""`lineage map --emit`: code and JSON from two checkpoints, or from a mapping that exists already."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lineage.commands.map import FORMS
from lineage.emit import EMITTERS
from tests.conftest import Lineage
from tests.emit.running import loaded, of_tensors


def test_every_form_can_be_asked_for() -> None:
    assert set(FORMS) == EMITTERS.keys()


def test_emitted_python_makes_the_file_that_apply_makes(models: Path, lineage: Lineage, tmp_path: Path) -> None:
    a, b, code = models / "base", models / "suspect", tmp_path / "convert.py"
    assert lineage("map", a, b, "--emit", "python", "-o", code).code == 0
    assert lineage("map", a, b, "-o", tmp_path / "mapping.yaml", "-q").code == 0
    for inverse, function, given in (([], "convert", a), (["--inverse"], "revert", b)):
        out = tmp_path / f"{function}.safetensors"
        assert lineage("apply", tmp_path / "mapping.yaml", given, "-o", out, "-q", *inverse).code == 0
        made = loaded(code.read_text(), code)[function](load_file(given / "model.safetensors"))
        save_file(made, tmp_path / "made.safetensors")
        assert of_tensors(load_file(tmp_path / "made.safetensors")) == of_tensors(load_file(out))


@pytest.mark.parametrize("form", FORMS)
def test_a_mapping_file_alone_gives_what_the_checkpoints_give(
    form: str, models: Path, lineage: Lineage, tmp_path: Path
) -> None:
    found = lineage("map", models / "base", models / "suspect", "--emit", form)
    lineage("map", models / "base", models / "suspect", "-o", tmp_path / "mapping.yaml")
    again = lineage("map", "--emit", form, tmp_path / "mapping.yaml")
    lines = [[line for line in done.out.splitlines() if "mapping" not in line] for done in (found, again)]
    assert (again.code, lines[0]) == (0, lines[1])


def test_a_mapping_in_json_works_like_one_in_yaml(models: Path, lineage: Lineage, tmp_path: Path) -> None:
    a, b, out = models / "base", models / "suspect", tmp_path / "mapping.json"
    assert lineage("map", a, b, "--emit", "json", "-o", out).code == 0
    assert json.loads(out.read_text())["lineage-mapping"] == 1
    assert lineage("map", "--check", out, a, b).code == 0
    assert lineage("apply", out, a, "-o", tmp_path / "b.safetensors", "--strict").code == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["a"], "give A and B; a mapping file alone needs --emit"),
        (["a", "b", "--check", "m", "--emit", "json"], "--check writes nothing: leave out --emit"),
        (["a", "--check", "m"], "--check needs A and B beside the mapping"),
        (["a", "--emit", "yml"], "'yml' is not one of"),
    ],
)
def test_what_does_not_go_together_is_said(words: list[str], reason: str, lineage: Lineage) -> None:
    done = lineage("map", *words)
    assert done.code == 2
    assert reason in done.err


def test_a_mapping_that_cannot_be_written_names_the_place(lineage: Lineage, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text('lineage-mapping: 1\nrules: [{to: b, from: a, ops: ["(x y) -> y x"]}]\n')
    done = lineage("map", "--emit", "python", path, "-o", tmp_path / "out.py")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert 'm.yaml: rules[0]: "(x y) -> y x": give a size for x or y' in done.err
    assert not (tmp_path / "out.py").exists()


def test_the_mapping_is_not_overwritten(lineage: Lineage, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("lineage-mapping: 1\nrules: [{to: b, from: a}]\n")
    done = lineage("map", "--emit", "json", path, "-o", path)
    assert done.code == 2
    assert "the output is an input" in done.err


def test_what_a_form_cannot_say_is_told(lineage: Lineage, tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text("lineage-mapping: 1\nrules: [{to: b, from: a, ops: [{scale: 0}]}]\n")
    done = lineage("map", "--emit", "python", path)
    assert done.code == 0
    assert "python: revert leaves out rules[0]: scale: by 0 cannot be undone" in done.err
