"""`lineage diff` as users run it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import encode
from lineage.checkpoint.write import write_safetensors
from lineage.commands.diff import diff_command
from lineage.errors import InputError
from tests.measure.memory import numbers, tuned

Save = Callable[[str, dict[str, NDArray[Any]]], str]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(name: str, tensors: dict[str, NDArray[Any]]) -> str:
        path = tmp_path / f"{name}.safetensors"
        codes = {key: encode(values, "BF16") for key, values in tensors.items()}
        write_safetensors(path, [(key, "BF16", x.shape) for key, x in codes.items()], codes.__getitem__)
        return str(path)

    return write


def _model(prefix: str = "model.layers", *, moved: float = 0.0) -> dict[str, NDArray[Any]]:
    out = {}
    for i in range(3):
        for at, part in enumerate(("attn.q", "mlp.experts.0.up", "mlp.experts.1.up")):
            x = numbers(10 * i + at, 20, 24)
            out[f"{prefix}.{i}.{part}.weight"] = tuned(x, 99, moved) if moved else x
        out[f"{prefix}.{i}.norm.weight"] = np.ones(24, np.float32)
    return out


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(diff_command, list(arguments), standalone_mode=False, catch_exceptions=False)


def test_a_person_sees_what_changed(save: Save) -> None:
    done = _run(save("a", _model()), save("b", _model(moved=0.02)))
    assert "3 unchanged, 9 changed (paired by name)" in done.stdout
    assert "Most changed by rel_l2: 9 of 9 tensors" in done.stdout
    assert done.return_value == 0


def test_json_is_one_document_on_stdout_and_nothing_else(save: Save) -> None:
    done = _run(save("a", _model()), save("b", _model(moved=0.02)), "--json")
    document = json.loads(done.stdout)
    assert list(document) == ["a", "b", "summary", "tensors"]
    assert document["summary"]["status"]["changed"] == 9
    assert done.stderr == ""


def test_renamed_checkpoints_are_matched_first_and_both_channels_say_so(save: Save) -> None:
    done = _run(save("a", _model()), save("b", _model("blocks")), "--json")
    document = json.loads(done.stdout)
    assert document["summary"]["matched_by"] == "values"
    assert "no tensor name occurs in both" in done.stderr
    assert {row["b_name"] for row in document["tensors"] if row["metrics"]} == set(_model("blocks"))


@pytest.mark.parametrize(("moved", "code"), [(0.0, 0), (0.02, 1)])
def test_exit_code_tells_a_script_whether_anything_differs(save: Save, moved: float, code: int) -> None:
    paths = save("a", _model()), save("b", _model(moved=moved))
    assert _run(*paths, "--exit-code").return_value == code
    assert _run(*paths).return_value == 0


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--filter", "*mlp*"], 6), (["--filter", "re:\\.1\\.attn"], 1), (["--exclude", "*.norm.*"], 9),
        (["--filter", "*experts.0*", "--filter", "*attn*", "--exclude", "re:layers\\.2"], 4),
    ],
)  # fmt: skip
def test_names_are_filtered_by_glob_and_regex(save: Save, options: list[str], left: int) -> None:
    done = _run(save("a", _model()), save("b", _model()), "--names", *options)
    assert len(done.stdout.splitlines()) == left


def test_a_filter_that_leaves_nothing_is_an_error(save: Save) -> None:
    with pytest.raises(InputError, match="--filter: leaves no tensor to compare"):
        _run(save("a", _model()), save("b", _model()), "--filter", "nothing*")


def test_a_broken_regex_is_named(save: Save) -> None:
    with pytest.raises(InputError, match=r'--exclude: "re:\(" is no regular expression'):
        _run(save("a", _model()), save("b", _model()), "--exclude", "re:(")


def test_an_unknown_figure_names_the_nearest(save: Save) -> None:
    with pytest.raises(InputError, match='did you mean "cosine"'):
        _run(save("a", _model()), save("b", _model()), "--by", "cosinus")


def test_threshold_and_samples_reach_the_document(save: Save) -> None:
    paths = save("a", _model()), save("b", _model(moved=0.02))
    document = json.loads(_run(*paths, "--json", "--threshold", "10", "--samples", "100", "--seed", "3").stdout)
    assert document["summary"]["status"]["changed"] == 0
    assert (document["summary"]["sample"], document["summary"]["seed"]) == (100, 3)
    assert document["tensors"][0]["sampled"]["size"] == 100


def test_groups_of_a_file_are_used(save: Save, tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text("groups: {expert: ['experts']}\n")
    done = _run(save("a", _model()), save("b", _model()), "--json", "--groups", str(tmp_path / "g.yaml"))
    assert set(json.loads(done.stdout)["summary"]["groups"]) == {"expert", "other"}


def test_files_are_written_beside_the_answer(save: Save, tmp_path: Path) -> None:
    paths = save("a", _model()), save("b", _model(moved=0.02))
    outputs = {kind: str(tmp_path / f"out.{kind}") for kind in ("csv", "html", "markdown")}
    done = _run(*paths, *(word for kind, path in outputs.items() for word in (f"--{kind}", path)))
    assert "9 changed" in done.stdout
    assert Path(outputs["csv"]).read_text().startswith("name,b_name,status")
    assert Path(outputs["html"]).read_text().startswith("<!doctype html>")
    assert Path(outputs["markdown"]).read_text().startswith("## Comparison")


def test_no_output_overwrites_an_input(save: Save) -> None:
    a, b = save("a", _model()), save("b", _model())
    before = Path(a).read_bytes()
    with pytest.raises(InputError, match="a.safetensors"):
        _run(a, b, "--csv", a)
    assert Path(a).read_bytes() == before


def test_a_missing_file_is_named(save: Save, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.safetensors"):
        _run(save("a", _model()), str(tmp_path / "none.safetensors"))


def test_spectra_reach_every_output(save: Save, tmp_path: Path) -> None:
    model = _model()
    low = {name: x + numbers(7, 20, 2) @ numbers(8, 2, 24) if x.ndim > 1 else x for name, x in model.items()}
    paths = save("a", model), save("b", low)
    outputs = {kind: str(tmp_path / f"out.{kind}") for kind in ("csv", "html", "markdown")}
    done = _run(*paths, "--spectrum", *(word for kind, path in outputs.items() for word in (f"--{kind}", path)))
    for text in (done.stdout, Path(outputs["markdown"]).read_text()):
        assert "Directions of B - A" in text
    assert "rank_above_rounding" in Path(outputs["html"]).read_text()
    rows = list(csv.DictReader(Path(outputs["csv"]).read_text().splitlines()))
    assert {row["rank_above_rounding"] for row in rows} == {"2", ""}
    tensors = json.loads(_run(*paths, "--spectrum", "--json").stdout)["tensors"]
    assert {row["spectrum"] and row["spectrum"]["rank_above_rounding"] for row in tensors} == {2, None}
