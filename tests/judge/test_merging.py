"""Weights of a merge: what is found, what is left over, and what is no merge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.judge.candidates import EACH, Candidate, gather, labels
from lineage.judge.merging import Merge, weigh, with_merge
from lineage.judge.verdict import Verdict
from lineage.layout.mapping import Mapping as Layout
from lineage.layout.mapping import Rule
from lineage.layout.operations import Rearrange
from tests.judge.networks import Arrays, by_name, decoder, memory, tuned


@pytest.fixture(scope="module")
def family() -> dict[str, Arrays]:
    """A base, three models tuned from it, and a stranger."""
    base = decoder(0)
    return {"A": base, "x": tuned(base, 1), "y": tuned(base, 2), "z": tuned(base, 3), "stranger": decoder(9)}


def _sum(family: Mapping[str, Arrays], weights: Mapping[str, float]) -> Arrays:
    """A + Σ weight · (model - A)."""
    base = family["A"]
    return {n: base[n] + sum(w * (family[m][n] - base[n]) for m, w in weights.items()) for n in base}


def _sources(family: Mapping[str, Arrays], names: str, b: Checkpoint, word: str) -> list[Candidate]:
    return [Candidate(n, c, by_name(c, b)) for n in names.split() for c in [memory(family[n], word)]]


def _weighed(
    family: Mapping[str, Arrays], b: Arrays, parents: str, *, word: str = "BF16", related: bool = True, a: str = "A"
) -> Merge:
    one, two = memory(family[a], word), memory(b, word)
    found = gather(one, two, by_name(one, two), _sources(family, parents, two, word), related=related)
    assert found is not None
    merge = weigh(found)
    assert merge is not None
    return merge


@pytest.mark.parametrize("word", ["BF16", "F16", "F32"])
def test_weights_of_a_linear_merge_come_out_to_a_hundredth(family: dict[str, Arrays], word: str) -> None:
    found = _weighed(family, _sum(family, {"x": 0.6, "y": 0.4}), "x y", word=word)
    assert found.merged
    assert found.complete
    assert [share.weight for share in found.shares] == pytest.approx([0.6, 0.4], abs=0.005)
    assert "B = A + 0.60·(x − A) + 0.40·(y − A), residual" in found.sentence
    assert "A itself takes no part" in found.sentence


def test_weights_of_task_arithmetic_need_not_come_to_1(family: dict[str, Arrays]) -> None:
    found = _weighed(family, _sum(family, {"x": 0.5, "y": 0.5, "z": 0.5}), "x y z stranger")
    assert found.merged
    assert [share.weight for share in found.shares] == pytest.approx([0.5, 0.5, 0.5, 0], abs=0.005)
    assert "stranger" not in found.sentence


def test_a_missing_parent_is_noticed(family: dict[str, Arrays]) -> None:
    found = _weighed(family, _sum(family, {"x": 0.8, "y": 0.8, "z": 0.2}), "x y")
    assert found.merged
    assert not found.complete
    assert "another parent, or training, has a part" in found.sentence


def test_a_may_be_a_parent_itself(family: dict[str, Arrays]) -> None:
    found = _weighed(family, _sum(family, {"x": 0.6, "y": 0.4}), "y", a="x")
    assert found.merged
    assert found.rest == pytest.approx(0.6, abs=0.005)
    assert "that is 0.60 of A itself" in found.sentence


def test_without_a_the_nearest_parent_stands_in(family: dict[str, Arrays]) -> None:
    found = _weighed(family, _sum(family, {"x": 0.7, "y": 0.3}), "x y", a="stranger", related=False)
    assert found.merged
    assert found.sentence.startswith("B = 0.70·x + 0.30·y, residual")


def test_a_spherical_interpolation_is_told_from_a_linear_one(family: dict[str, Arrays]) -> None:
    def between(x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
        angle = np.arccos(np.vdot(x, y) / np.linalg.norm(x) / np.linalg.norm(y))
        return np.asarray((np.sin(0.5 * angle) * x + np.sin(0.5 * angle) * y) / np.sin(angle))

    sphere = {name: between(family["x"][name], family["y"][name]) for name in family["A"]}
    found = _weighed(family, sphere, "x y")
    assert found.merged
    assert found.spherical
    assert found.scale > 1.001
    assert "(slerp)" in found.sentence
    assert not _weighed(family, _sum(family, {"x": 0.5, "y": 0.5}), "x y").spherical


def test_weights_may_differ_from_tensor_to_tensor(family: dict[str, Arrays]) -> None:
    x, y = family["x"], family["y"]
    share = {name: 0.2 + 0.6 * k / len(x) for k, name in enumerate(x)}
    found = _weighed(family, {n: share[n] * x[n] + (1 - share[n]) * y[n] for n in x}, "x y")
    assert found.merged
    assert found.by_tensor
    assert "weights of its own for every tensor" in found.sentence


@pytest.mark.parametrize(
    ("b", "parents", "said"),
    [
        ("x", "x y", "B is x but for rounding: no merge"),
        ("z", "x y", "no merge of these candidates alone"),
        ("x", "y stranger", "no merge of these candidates alone"),
    ],
)
def test_what_is_no_merge_is_not_called_one(family: dict[str, Arrays], b: str, parents: str, said: str) -> None:
    found = _weighed(family, family[b], parents)
    assert not found.merged
    assert said in found.sentence


def test_further_training_of_one_parent_is_no_merge(family: dict[str, Arrays]) -> None:
    assert not _weighed(family, tuned(family["x"], 7), "x y").merged


def test_a_candidate_that_was_merged_from_a_and_b_makes_no_merge_of_b(family: dict[str, Arrays]) -> None:
    merged = {**family, "between": _sum(family, {"x": 0.4})}
    found = _weighed(merged, family["x"], "between", word="F32")
    assert not found.merged
    assert "may hold 0.40 of B; B is no merge" in found.sentence


def test_what_two_tuned_models_come_from_is_not_called_put_together(family: dict[str, Arrays]) -> None:
    base = family["A"]
    parts = {word: {n: v + 0.1 * np.sign(v) if word in n else v for n, v in base.items()} for word in ("mlp", "attn")}
    found = _weighed({**family, **parts}, base, "mlp attn", a="x")
    assert not found.merged
    assert "or what they come from" in found.sentence


def test_candidates_that_are_one_model_share_its_weight(family: dict[str, Arrays]) -> None:
    again = {**family, "copy": family["x"]}
    found = _weighed(again, _sum(family, {"x": 0.6, "y": 0.4}), "x copy y")
    assert [share.name for share in found.shares] == ["x", "y"]
    assert found.twins == (("copy", "x"),)


def test_parents_in_another_layout_are_laid_out_first(family: dict[str, Arrays]) -> None:
    a, b = memory(family["A"], "BF16"), memory(_sum(family, {"x": 0.6, "y": 0.4}), "BF16")
    turned = {f"other.{n}": v.T if v.ndim > 1 else v for n, v in family["x"].items()}
    rules = [
        Rule(to=(n,), source=(f"other.{n}",), ops=(Rearrange("i o -> o i"),) if v.ndim > 1 else ())
        for n, v in family["x"].items()
    ]
    x = Candidate("x", memory(turned, "BF16"), Layout(rules=tuple(rules)))
    found = gather(a, b, by_name(a, b), [x, *_sources(family, "y", b, "BF16")], related=True)
    assert found is not None
    merge = weigh(found)
    assert merge is not None
    assert [share.weight for share in merge.shares] == pytest.approx([0.6, 0.4], abs=0.005)


def test_a_candidate_without_counterparts_is_left_out_and_named(family: dict[str, Arrays]) -> None:
    b = memory(_sum(family, {"x": 0.6, "y": 0.4}), "BF16")
    small = memory(decoder(4, width=16), "BF16")
    a = memory(family["A"], "BF16")
    candidates = [*_sources(family, "x y", b, "BF16"), Candidate("small", small, by_name(small, b))]
    found = gather(a, b, by_name(a, b), candidates, related=True)
    assert found is not None
    assert found.left_out == ("small",)
    assert len(found.labels) == 3


def test_nothing_to_weigh_is_said_by_none(family: dict[str, Arrays]) -> None:
    a = memory(family["A"], "BF16")
    assert gather(a, a, by_name(a, a), [], related=True) is None
    found = gather(a, a, by_name(a, a), _sources(family, "x", a, "BF16"), related=True)
    assert found is not None
    assert weigh(found) is None


def test_parts_of_a_pipeline_add_up(family: dict[str, Arrays]) -> None:
    a, b = memory(family["A"], "F32"), memory(_sum(family, {"x": 0.6, "y": 0.4}), "F32")
    found = gather(a, b, by_name(a, b), _sources(family, "x y", b, "F32"), related=True)
    assert found is not None
    merge = weigh(found + found)
    assert merge is not None
    assert merge.formula.startswith("B = A + 0.60·(x − A) + 0.40·(y − A)")


def test_few_elements_of_large_tensors_are_read() -> None:
    draw = np.random.default_rng(0)
    base, x = ({"w": draw.standard_normal((600, 700)).astype(np.float32)} for _ in range(2))
    a, b = memory(base), memory({"w": 0.5 * (base["w"] + x["w"])})
    found = gather(a, b, by_name(a, b), [Candidate("x", memory(x), by_name(a, b))], related=True, seed=1)
    assert found is not None
    assert found.counts.tolist() == [EACH]
    merge = weigh(found)
    assert merge is not None
    assert merge.shares[0].weight == pytest.approx(0.5, abs=0.001)


def test_short_names_are_kept_apart() -> None:
    paths = ["models/ft.safetensors", "hub/org-a/model.safetensors", "hub/org-b", "one/B", "two/x.gguf", "x.bin"]
    assert labels(paths) == ["ft", "org-a", "org-b", "one/B", "two/x.gguf", "x.bin"]


def _verdict(**changes: Any) -> Verdict:
    given: dict[str, Any] = {"class_": "transformed", "related": True, "log10_p": -99.0, "coverage": 1.0}
    return Verdict(**(given | {"reasons": ("First.",)} | changes))


def test_the_verdict_carries_relation_and_reason(family: dict[str, Arrays]) -> None:
    found = with_merge(_verdict(), _weighed(family, _sum(family, {"x": 0.6, "y": 0.4}), "x y"))
    assert found.relations == ("merged",)
    assert found.reasons[0] == "First."
    assert found.reasons[1].startswith("B = A + 0.60·(x − A) + 0.40·(y − A)")


def test_a_stranger_is_no_parent_of_a_merge_of_others(family: dict[str, Arrays]) -> None:
    merge = _weighed(family, _sum(family, {"x": 0.6, "y": 0.4}), "x y", a="stranger", related=False)
    found = with_merge(_verdict(class_="retrained", related=False), merge)
    assert found.relations == ()
    assert found.reasons[1].startswith("B is made of the candidates, not of A: B = ")
