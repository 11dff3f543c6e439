"""A mapping as JSON is the same mapping: any JSON reader reads it, and so does the reader of the YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lineage.emit import EMITTERS, emit
from lineage.layout.document import parse_mapping, read_mapping
from lineage.layout.mapping import Evidence, Mapping, Rule, Side
from lineage.layout.operations import Operation
from lineage.layout.templates import literal
from tests.emit.test_python import HOSTILE, LONG, NUMBERED
from tests.layout.test_operations import CASES
from tests.strategies import names


def text(mapping: Mapping) -> str:
    return EMITTERS["json"](mapping, name="m", beside="m.json.safetensors").text


@pytest.mark.parametrize("kind", NUMBERED)
def test_reading_it_back_gives_the_mapping(kind: str) -> None:
    assert parse_mapping(text(NUMBERED[kind][0])) == NUMBERED[kind][0]


@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_every_operation_comes_back(op: Operation, shapes: list[tuple[int, ...]]) -> None:
    sides = tuple(f"b.{k}" for k in range(len(op.shapes(shapes)))), tuple(f"a.{k}" for k in range(len(shapes)))
    mapping = Mapping(rules=(Rule(to=sides[0], source=sides[1], ops=(op,)),), sizes={"h": 2})
    found = EMITTERS["json"](mapping, name="m", beside="m.safetensors")
    assert parse_mapping(found.text, lambda name, key: found.arrays[key]) == mapping


@given(st.lists(names, min_size=2, max_size=4, unique=True))
@example([name for name in HOSTILE if name != "\ud800"])
def test_names_come_back_whatever_they_hold(drawn: list[str]) -> None:
    mapping = Mapping(
        source=Side(drawn[0], 3),
        rules=(Rule(to=tuple(str(literal(n)) for n in drawn), source=tuple(str(literal(n)) for n in drawn)),),
        unmatched_target=tuple(drawn),
    )
    assert parse_mapping(text(mapping)) == mapping
    assert json.loads(text(mapping))["unmatched"]["target"] == drawn


def test_its_keys_are_those_of_the_yaml() -> None:
    rule = Rule(to=("b",), source=("a", "c"), how="values", evidence=Evidence(3, 1.0, True), table=None)
    found: dict[str, Any] = json.loads(text(Mapping(rules=(rule,), sizes={"h": 2})))
    assert [*found] == ["lineage-mapping", "source", "target", "sizes", "rules", "unmatched"]
    assert found["rules"] == [
        {"to": "b", "from": ["a", "c"], "ops": [], "how": "values",
         "evidence": {"tensors": 3, "cosine": 1.0, "certified": True}}
    ]  # fmt: skip


def test_long_arrays_lie_beside_it(tmp_path: Path) -> None:
    emit(LONG, EMITTERS["json"], name="m", out=tmp_path / "m.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.json", "m.json.safetensors"]
    assert read_mapping(tmp_path / "m.json") == LONG
