"""`lineage investigate --parent` and `check --parent` as users run them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from lineage import api
from lineage.report.document import schema
from tests.conftest import Lineage
from tests.judge.networks import decoder, tuned


@pytest.fixture(scope="module")
def merged(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """0.7 of the example's base and 0.3 of its suspect, which has other names and fused tensors."""
    folder = tmp_path_factory.mktemp("merged")
    found = api.map(models / "base", models / "suspect")
    api.apply(found, models / "suspect", folder / "laid-out.safetensors", inverse=True)
    base, other = load_file(models / "base" / "model.safetensors"), load_file(folder / "laid-out.safetensors")
    assert base.keys() == other.keys()
    save_file({n: (0.7 * x.float() + 0.3 * other[n].float()).to(x.dtype) for n, x in base.items()},
              folder / "merged.safetensors")  # fmt: skip
    return folder / "merged.safetensors"


def test_a_person_reads_the_weights(models: Path, merged: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", merged, "--parent", models / "suspect")
    assert done.code == 0
    assert "B = A + 0.30·(suspect − A), residual" in " ".join(done.out.split())
    assert "Relations  merged" in done.out


def test_scripts_read_the_weights(models: Path, merged: Path, lineage: Lineage) -> None:
    words = ("--parent", models / "suspect", "--parent", models / "stranger", "--json")
    found = json.loads(lineage("investigate", models / "base", merged, *words).out)
    jsonschema.validate(found, schema())
    (component,) = found["components"]
    assert found["verdict"]["relations"] == component["verdict"]["relations"] == ["merged"]
    assert component["merge"]["weights"]["suspect"] == pytest.approx(0.3, abs=0.005)
    assert component["merge"]["weights"]["stranger"] == pytest.approx(0.0, abs=0.005)
    assert component["merge"]["merged"] is True


def test_without_parents_nothing_is_said_of_merging(models: Path, merged: Path, lineage: Lineage) -> None:
    found = json.loads(lineage("investigate", models / "base", merged, "--json").out)
    assert "merged" not in found["verdict"]["relations"]
    assert "merge" not in found["components"][0]


@pytest.mark.parametrize(("parent", "code"), [("suspect", 0), ("stranger", 1)])
def test_check_holds_a_merge_to_its_parents(
    parent: str, code: int, models: Path, merged: Path, lineage: Lineage
) -> None:
    words = ("--expect", "related", "--claim", "merged", "--parent", models / parent)
    assert lineage("check", models / "base", merged, *words).code == code


def test_a_fine_tune_is_no_merge_with_a_stranger(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--parent", models / "stranger")
    assert "B is no merge of these candidates alone" in " ".join(done.out.split())
    assert "merged" not in done.out.split("Relations")[1].splitlines()[0]


def test_components_are_weighed_apart_and_together(tmp_path: Path, lineage: Lineage) -> None:

    def pipeline(name: str, x: float, y: float) -> Path:
        for part, seed in (("transformer", 1), ("vae", 2)):
            base = decoder(seed)
            one, two = tuned(base, seed + 10), tuned(base, seed + 20)
            found = {n: torch.from_numpy((1 - x - y) * v + x * one[n] + y * two[n]).float() for n, v in base.items()}
            (tmp_path / name / part).mkdir(parents=True)
            save_file(found, tmp_path / name / part / "diffusion_pytorch_model.safetensors")
        (tmp_path / name / "model_index.json").write_text("{}")
        return tmp_path / name

    a, x, y, b = pipeline("a", 0, 0), pipeline("x", 1, 0), pipeline("y", 0, 1), pipeline("b", 0.6, 0.4)
    found = json.loads(lineage("investigate", a, b, "--parent", x, "--parent", y, "--json").out)
    weights = [part["merge"]["weights"] for part in found["components"]]
    assert [(w["x"], w["y"]) for w in weights] == [(0.6, 0.4), (0.6, 0.4)]
    assert any(r.startswith("All parts together: B = A + 0.60·(x − A) + 0.40·(y") for r in found["verdict"]["reasons"])


def test_parents_and_a_budget_do_not_go_together(models: Path, lineage: Lineage) -> None:
    words = ("--parent", models / "stranger", "--budget", "1MB")
    done = lineage("investigate", models / "base", models / "suspect", *words)
    assert (done.code, done.out) == (2, "")
    assert done.err == "lineage: --parent: parents cannot be weighed within a budget; leave out --budget\n"


def test_a_parent_that_is_not_there_is_named(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--parent", "/nowhere/x")
    assert done.code == 2
    assert done.err == "lineage: /nowhere/x: no such file or folder\n"
