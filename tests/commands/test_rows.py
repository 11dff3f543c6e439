"""`--rows`: how many units a layer the exact test compares, stated with the seed."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from lineage.report.document import schema
from tests.conftest import Lineage


@pytest.mark.parametrize("budget", [(), ("--budget", "2MB")])
def test_fewer_units_weigh_less_and_the_report_states_them(
    budget: tuple[str, ...], models: Path, lineage: Lineage
) -> None:
    words = ("investigate", models / "base", models / "suspect", "--json", "--seed", "3", *budget)
    few, many = (json.loads(lineage(*words, "--rows", n).out) for n in ("16", "48"))
    jsonschema.validate(few, schema())
    assert few["units"] == {"rows": 16, "seed": 3}
    assert many["verdict"]["log10_p"] < few["verdict"]["log10_p"] < -6


def test_a_person_reads_how_many_units_and_which_seed(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--rows", "24", "--seed", "5")
    assert "24 units a layer for the exact test, chosen with seed 5" in done.out


def test_the_gate_takes_rows_too(models: Path, lineage: Lineage) -> None:
    words = ("check", models / "base", models / "suspect", "--expect", "related", "--rows", "20", "--json")
    done = lineage(*words)
    assert (done.code, json.loads(done.out)["report"]["units"]["rows"]) == (0, 20)


def test_without_rows_as_many_as_are_quick_are_compared(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "base", "--json")
    assert json.loads(done.out)["units"] == {"rows": None, "seed": 0}


@pytest.mark.parametrize("rows", ["0", "11", "513", "many"])
def test_rows_that_prove_nothing_or_take_too_long_are_refused(rows: str, models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--rows", rows)
    assert done.code == 2
    assert "--rows" in done.err
