"""What an adapter needs on the other model."""

from __future__ import annotations

import pytest

from lineage.judge.grade import grade_of
from lineage.layout.mapping import Evidence, Mapping, Rule
from lineage.layout.operations import Take


def _rule(ops: tuple[object, ...] = (), how: str = "values", cosine: float | None = 1.0) -> Mapping:
    evidence = Evidence(tensors=1, cosine=cosine)
    rule = Rule(to=("h.{i}.q.weight",), source=("layers.{i}.q.weight",), ops=ops, how=how, evidence=evidence)  # type: ignore[arg-type]
    return Mapping(rules=(rule,))


@pytest.mark.parametrize(
    ("rules", "class_", "grade"),
    [
        (_rule(), None, "remap"),
        (_rule((Take(0, [1, 0]),)), None, "reshape"),
        (_rule(cosine=0.02), None, "retrain"),
        (_rule(how="structure"), None, "retrain"),
        (_rule(how="structure"), "undetermined", "retrain"),
        (_rule(), "undetermined", "remap"),
        (_rule(), "retrained", "retrain"),
        (_rule(how="structure"), "unrelated", "none"),
        (_rule(cosine=0.02), "transformed", "remap"),
        (Mapping(), "copied", "none"),
    ],
)
def test_the_grade_says_what_an_adapter_needs(rules: Mapping, class_: str | None, grade: str) -> None:
    assert grade_of(rules, class_) == grade
