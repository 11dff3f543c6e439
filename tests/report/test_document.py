"""`report.json`: its fields, its schema, components, claims."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest

from lineage.checkpoint.claims import Claim
from lineage.errors import InputError
from lineage.report import document
from lineage.report.document import RELATIONS, Report, schema
from lineage.report.encode import as_json
from tests.report.pairs import network, report, verdict

SCHEMA = Path(document.__file__).with_name("report.schema.json")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("plain")
    names = ("attn.q", "mlp.up")
    return report(network(folder / "base", names), network(folder / "child", names, moved=0.01))


def test_the_document_has_the_fields_of_the_contract_in_order(plain: Report) -> None:
    found = json.loads(as_json(plain.document))
    assert list(found) == [
        "lineage", "schema", "a", "b", "mapping", "verdict", "components", "claims", "metrics", "lora", "warnings",
    ]  # fmt: skip
    assert list(found["a"]) == ["path", "format", "tensors", "parameters", "bytes", "dtypes"]
    assert list(found["mapping"]) == [
        "rules", "matched_a", "matched_b", "certified_b", "by_structure_b", "unmatched_a", "unmatched_b",
    ]  # fmt: skip
    assert list(found["verdict"]) == [
        "class", "related", "log10_p", "coverage", "relations", "direction", "reasons",
    ]  # fmt: skip
    assert list(found["components"][0]) == ["name", "a", "b", "verdict"]
    assert list(found["metrics"]) == ["overall", "groups", "layers"]
    assert list(found["lora"]) == ["grade", "keys"]


def test_the_schema_that_ships_is_the_one_of_the_types(request: pytest.FixtureRequest) -> None:
    text = as_json(schema())
    if request.config.getoption("--update-golden"):
        SCHEMA.write_bytes(text)
    assert SCHEMA.read_bytes() == text


def test_a_real_report_is_valid_by_the_schema(plain: Report) -> None:
    jsonschema.validate(json.loads(as_json(plain.document)), json.loads(SCHEMA.read_bytes()))


def test_the_schema_refuses_a_relation_that_does_not_exist(plain: Report) -> None:
    found = plain.to_dict()
    found["verdict"]["relations"] = ["cousin"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema())


def test_relations_are_those_of_the_contract() -> None:
    assert len(RELATIONS) == 26
    assert {"identical", "shared-initialisation", "vocabulary-extended"} <= set(RELATIONS)


def test_the_mapping_is_counted(plain: Report) -> None:
    counted = plain.document.mapping
    assert (counted.matched_a, counted.matched_b, counted.certified_b, counted.unmatched_b) == (4, 4, 4, ())


def test_what_is_left_over_is_listed(tmp_path: Path) -> None:
    found = report(network(tmp_path / "a", ["up"]), network(tmp_path / "b", ["up"], layers=1, seed=0))
    assert found.document.mapping.unmatched_a == ("layers.1.up",)


@pytest.mark.parametrize(
    ("says", "class_", "word"),
    [
        ("org/Base", "transformed", "supported"),
        ("org/base@v2", "copied", "supported"),
        ("base", "retrained", "contradicted"),
        ("base", "undetermined", "not tested"),
        ("org/else", "transformed", "not tested"),
    ],
)
def test_a_claim_that_names_a_is_as_true_as_the_verdict(says: str, class_: str, word: str, tmp_path: Path) -> None:
    a, b = network(tmp_path / "base", ["up"]), network(tmp_path / "child", ["up"])
    found = report(a, b, verdict(class_), claims=[Claim("README.md base_model", says)])
    assert [c.verdict for c in found.document.claims] == [word]


def test_a_file_is_claimed_by_its_folder_too(tmp_path: Path) -> None:
    a, b = network(tmp_path / "base", ["up"]), network(tmp_path / "child", ["up"])
    found = report(f"{a}/model.safetensors", b, claims=[Claim("README.md base_model", "org/base")])
    assert found.document.claims[0].verdict == "supported"


@pytest.mark.parametrize(("class_", "grade"), [("transformed", "remap"), ("retrained", "retrain")])
def test_the_grade_of_a_lora_follows_from_mapping_and_verdict(class_: str, grade: str, tmp_path: Path) -> None:
    found = report(network(tmp_path / "a", ["up"]), network(tmp_path / "b", ["up"]), verdict(class_))
    assert found.document.lora.grade == grade


def _pipeline(folder: Path, *, moved: float) -> str:
    for part, layers, seed in (("transformer", 3, 1), ("vae", 1, 2)):
        network(folder / part, ["mlp.up"], layers=layers, seed=seed, moved=moved if part == "transformer" else 0.0)
    (folder / "model_index.json").write_text("{}")
    return str(folder)


def test_the_verdict_of_a_pipeline_is_that_of_its_largest_part_and_names_the_others(tmp_path: Path) -> None:
    a, b = _pipeline(tmp_path / "a", moved=0.0), _pipeline(tmp_path / "b", moved=0.01)
    found = report(a, b, parts=[("transformer", "transformed"), ("vae", "copied")])
    assert found.verdict.class_ == "transformed"
    assert found.verdict.reasons[-1] == "This is the verdict on transformer; vae is copied."
    assert [(c.name, c.verdict.class_) for c in found.document.components] == [
        ("transformer", "transformed"), ("vae", "copied"),
    ]  # fmt: skip


def test_tensors_of_a_pipeline_carry_their_parts_name(tmp_path: Path) -> None:
    a, b = _pipeline(tmp_path / "a", moved=0.0), _pipeline(tmp_path / "b", moved=0.01)
    found = report(a, b, parts=[("transformer", "transformed"), ("vae", "copied")])
    assert {row.b_name for row in found.diff.comparison.rows} == {
        "vae/layers.0.mlp.up", *(f"transformer/layers.{i}.mlp.up" for i in range(3)),
    }  # fmt: skip
    assert set(found.document.metrics.groups) == {"transformer/mlp", "vae/mlp"}


def test_a_report_is_plain_python_on_request(plain: Report) -> None:
    assert plain.to_dict() == msgspec.to_builtins(plain.document)


def test_a_report_is_a_data_frame_on_request(plain: Report) -> None:
    frame = plain.to_pandas()
    assert list(frame["b_name"]) == [f"layers.{i}.{n}" for i in range(2) for n in ("attn.q", "mlp.up")]


def test_a_data_frame_without_pandas_is_an_install_hint(plain: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"pandas is missing; install weight-lineage\[pandas\]"):
        plain.to_pandas()


def test_a_notebook_shows_the_verdict(plain: Report) -> None:
    assert "<b>transformed</b>" in plain._repr_html_()
    assert "First." in plain._repr_html_()


def test_a_report_shows_itself_on_one_line(plain: Report) -> None:
    assert "transformed, log10 p -300.5" in repr(plain)


def test_json_holds_names_that_utf8_cannot() -> None:
    assert json.loads(as_json({"name": "\ud800", "p": float("inf")})) == {"name": "\ud800", "p": None}
