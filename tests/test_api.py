"""The steps as functions: what goes in, what comes out, how components find each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lineage
from lineage.errors import InputError
from lineage.layout.document import write_mapping
from lineage.measure.diff import Diff
from lineage.progress import Progress
from lineage.report.document import Report
from tests.report.pairs import network


@pytest.fixture(scope="module")
def report(models: Path) -> Report:
    return lineage.investigate(models / "base", models / "suspect")


def test_a_suspect_is_found_out(report: Report) -> None:
    verdict = report.verdict
    assert (verdict.class_, verdict.related) == ("transformed", True)
    assert verdict.log10_p is not None
    assert verdict.log10_p < -100
    assert {"renamed", "fused"} <= set(verdict.relations)
    assert verdict.coverage == 1.0


def test_every_tensor_of_the_suspect_is_certified(report: Report) -> None:
    mapping = report.document.mapping
    assert (mapping.matched_b, mapping.certified_b, mapping.unmatched_a) == (21, 21, ())


def test_a_stranger_is_not_accused(models: Path) -> None:
    verdict = lineage.investigate(models / "base", models / "stranger").verdict
    assert (verdict.class_, verdict.related) == ("retrained", False)
    assert verdict.log10_p is None or verdict.log10_p > -2


def test_the_base_is_a_copy_of_itself(models: Path) -> None:
    assert lineage.investigate(models / "base", models / "base").verdict.class_ == "copied"


def test_a_report_does_not_depend_on_threads(models: Path, report: Report) -> None:
    assert lineage.investigate(models / "base", models / "suspect", threads=1).to_dict() == report.to_dict()


def test_open_checkpoints_go_in_as_well_as_paths_and_stay_open(models: Path, report: Report) -> None:
    with lineage.open(models / "base") as a, lineage.open(models / "suspect") as b:
        found = lineage.investigate(a, b)
        assert found.to_dict() == report.to_dict()
        assert len(a.tensor("model.norm.weight")) == 64


def test_progress_is_told_each_step(models: Path) -> None:
    steps: list[str] = []
    counts: list[tuple[int, int]] = []

    class Watch(Progress):
        def step(self, name: str) -> None:
            steps.append(name)

        def count(self, done: int, total: int) -> None:
            counts.append((done, total))

    lineage.investigate(models / "base", models / "suspect", progress=Watch())
    assert steps[-2:] == ["measuring", "judging"]
    assert counts[-1][0] == counts[-1][1]


def test_a_mapping_is_found_applied_and_undone(models: Path, tmp_path: Path) -> None:
    mapping = lineage.map(models / "base", models / "suspect")
    write_mapping(mapping, tmp_path / "m.yaml")
    lineage.apply(mapping, models / "base", tmp_path / "b.safetensors")
    lineage.apply(tmp_path / "m.yaml", tmp_path / "b.safetensors", tmp_path / "a.safetensors", inverse=True)
    base, again = load_file(models / "base/model.safetensors"), load_file(tmp_path / "a.safetensors")
    assert base.keys() == again.keys()
    assert all(torch.equal(base[name], again[name]) for name in base)


def test_diff_pairs_by_values_where_no_name_agrees(models: Path) -> None:
    found = lineage.diff(models / "base", models / "suspect")
    assert isinstance(found, Diff)
    assert found.matched_by == "values"


@pytest.mark.parametrize(
    ("b", "expect", "holds"),
    [
        ("suspect", "related", True), ("suspect", "transformed", True), ("suspect", "copied", False),
        ("suspect", "unrelated", False), ("stranger", "related", False), ("stranger", "unrelated", True),
        ("stranger", "retrained", True), ("base", "copied", True),
    ],
)  # fmt: skip
def test_check_answers_what_is_expected(models: Path, b: str, expect: str, holds: bool) -> None:
    assert lineage.check(models / "base", models / b, expect=expect).holds is holds


def test_check_takes_a_relation_as_well(models: Path) -> None:
    a, b = models / "base", models / "suspect"
    assert lineage.check(a, b, expect="related", claim="fused").holds is True
    answer = lineage.check(a, b, expect="related", claim="quantized")
    assert answer.holds is False
    assert "quantized was expected" in answer.why


def test_check_does_not_tell_where_there_is_too_little(tmp_path: Path) -> None:
    a, b = network(tmp_path / "a", ["up"], layers=1), network(tmp_path / "b", ["down"], layers=1, seed=5)
    answer = lineage.check(a, b, expect="related")
    if answer.report.verdict.class_ == "undetermined":
        assert answer.holds is None
        assert answer.why.startswith("It cannot be told")
    else:
        assert answer.holds is False


def test_check_refuses_a_word_it_does_not_know(models: Path) -> None:
    with pytest.raises(ValueError, match="expect 'cousins' is none of related, unrelated"):
        lineage.check(models / "base", models / "base", expect="cousins")


def test_a_mapping_that_does_not_fit_says_so(models: Path, tmp_path: Path) -> None:
    from lineage import api

    text = (
        "lineage-mapping: 1\nsource: {name: a, tensors: 1}\ntarget: {name: b, tensors: 1}\nsizes: {}\nrules:\n"
        '  - to: "x.{j}"\n    from: lm_head.weight\n    ops: []\n    how: given\n'
        "unmatched: {source: [], target: []}\n"
    )
    (tmp_path / "m.yaml").write_text(text)
    with pytest.raises(InputError, match=r"m\.yaml: .*rules\[0\]"):
        api.check_mapping(tmp_path / "m.yaml", models / "base", models / "suspect")


# -- components


def _pipeline(folder: Path, parts: dict[str, tuple[str, int, int]], *, moved: float = 0.0) -> str:
    """A pipeline folder: component -> (name of its tensors, layers, seed)."""
    for part, (name, layers, seed) in parts.items():
        network(folder / part, [f"{name}.up", f"{name}.down"], layers=layers, seed=seed, moved=moved, width=48)
    (folder / "model_index.json").write_text("{}")
    return str(folder)


def test_components_are_paired_by_name(tmp_path: Path) -> None:
    parts = {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)}
    a, b = _pipeline(tmp_path / "a", parts), _pipeline(tmp_path / "b", parts, moved=0.01)
    found = lineage.investigate(a, b).document
    assert [(c.name, c.a, c.b) for c in found.components] == [
        ("transformer", "transformer", "transformer"), ("vae", "vae", "vae"),
    ]  # fmt: skip
    assert found.mapping.certified_b == 8


def test_a_copied_part_is_found_beside_a_stranger(tmp_path: Path) -> None:
    a = _pipeline(tmp_path / "a", {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)})
    b = _pipeline(tmp_path / "b", {"transformer": ("mlp", 3, 7), "vae": ("conv", 1, 2)})
    verdicts = {c.name: c.verdict for c in lineage.investigate(a, b).document.components}
    assert verdicts["vae"].class_ == "copied"
    assert verdicts["transformer"].related is not True


def test_components_of_other_names_are_paired_by_what_they_hold(tmp_path: Path) -> None:
    a = _pipeline(tmp_path / "a", {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)})
    b = _pipeline(tmp_path / "b", {"dit": ("mlp", 3, 1), "autoencoder": ("conv", 1, 2)})
    found = lineage.investigate(a, b)
    assert [(c.a, c.b) for c in found.document.components] == [("transformer", "dit"), ("vae", "autoencoder")]
    assert {rule.to[0].split("/")[0] for rule in found.mapping.rules} == {"dit", "autoencoder"}


def test_components_that_changed_their_names_with_each_other_are_found(tmp_path: Path) -> None:
    a = _pipeline(tmp_path / "a", {"text_encoder": ("mlp", 3, 1), "text_encoder_2": ("mlp", 3, 2)})
    b = _pipeline(tmp_path / "b", {"text_encoder": ("mlp", 3, 2), "text_encoder_2": ("mlp", 3, 1)}, moved=0.01)
    found = lineage.investigate(a, b)
    assert {(c.a, c.b) for c in found.document.components} == {
        ("text_encoder", "text_encoder_2"),
        ("text_encoder_2", "text_encoder"),
    }
    assert found.document.mapping.certified_b == found.document.b.tensors


def test_a_component_that_is_there_twice_is_found_twice(tmp_path: Path) -> None:
    a = _pipeline(tmp_path / "a", {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)})
    b = _pipeline(tmp_path / "b", {"transformer": ("mlp", 3, 1), "transformer_2": ("mlp", 3, 1)})
    found = lineage.investigate(a, b)
    assert [(c.a, c.verdict.class_) for c in found.document.components] == [("transformer", "copied")] * 2


def test_strangers_of_one_name_stay_together(tmp_path: Path) -> None:
    a = _pipeline(tmp_path / "a", {"text_encoder": ("mlp", 3, 1), "vae": ("conv", 1, 2)})
    b = _pipeline(tmp_path / "b", {"text_encoder": ("mlp", 3, 7), "vae": ("conv", 1, 8)})
    found = lineage.investigate(a, b)
    assert all(c.a == c.b and c.verdict.related is not True for c in found.document.components)


def test_a_component_that_a_lacks_is_said_to_be_new(tmp_path: Path) -> None:
    a = _pipeline(tmp_path / "a", {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)})
    b = _pipeline(tmp_path / "b", {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2), "extra": ("other", 1, 9)})
    found = {c.name: c for c in lineage.investigate(a, b).document.components}
    assert found["extra"].a is None
    assert found["extra"].verdict.related is not True


def test_a_single_file_finds_its_place_in_a_pipeline(tmp_path: Path) -> None:
    a = network(tmp_path / "a", ["mlp.up", "mlp.down"], layers=3, seed=1, width=48)
    b = _pipeline(tmp_path / "b", {"vae": ("conv", 1, 2), "transformer": ("mlp", 3, 1)})
    found = lineage.investigate(a, b).document
    assert (found.components[0].a, found.components[0].b) == ("", "transformer")
    assert found.mapping.certified_b == 6


def test_a_mapping_of_a_pipeline_can_be_applied(tmp_path: Path) -> None:
    parts = {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)}
    a, b = _pipeline(tmp_path / "a", parts), _pipeline(tmp_path / "b", parts)
    lineage.apply(lineage.map(a, b), a, tmp_path / "out.safetensors", strict=True)
    assert "vae/layers.0.conv.up" in load_file(tmp_path / "out.safetensors")


def test_the_functions_stay_functions_whatever_is_imported() -> None:
    import lineage.api
    import lineage.filling
    import lineage.judge.verdict

    assert all(callable(getattr(lineage, name)) for name in ("open", "map", "apply", "diff", "investigate", "check"))


def test_one_component_can_be_mapped_alone(tmp_path: Path) -> None:
    parts = {"transformer": ("mlp", 3, 1), "vae": ("conv", 1, 2)}
    with lineage.open(_pipeline(tmp_path / "a", parts)) as pipeline:
        vae = pipeline.component("vae")
        assert lineage.map(vae, vae).rules[0].to[0].startswith("layers.0.conv.")
