"""`--budget`: an answer from samples, what was read for it, and what it does not claim."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

import lineage
from lineage.report.document import schema
from tests.conftest import Lineage


def test_the_bytes_read_are_in_the_json_and_within_the_budget(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--budget", "2MB", "--json")
    found = json.loads(done.out)
    jsonschema.validate(found, schema())
    read = found["read"]
    assert 0 < read["bytes"] <= read["budget"] == 2_000_000
    assert read["share"] == pytest.approx(read["bytes"] / (found["a"]["bytes"] + found["b"]["bytes"]), abs=1e-6)


def test_relatives_are_recognised_from_samples(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--budget", "2MB", "--json")
    verdict = json.loads(done.out)["verdict"]
    assert verdict["related"] is True
    assert verdict["log10_p"] < -50
    assert {"renamed", "fused"} <= set(verdict["relations"])
    assert verdict["reasons"][-1].startswith("Only ")


def test_strangers_are_not_accused_from_samples(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "stranger", "--budget", "2MB", "--json")
    assert json.loads(done.out)["verdict"]["related"] is not True


def test_a_copy_is_said_to_be_one_as_far_as_it_was_seen(models: Path) -> None:
    found = lineage.investigate(models / "base", models / "base", budget=2_000_000)
    assert found.verdict.class_ == "copied"
    assert found.verdict.reasons[0].startswith("Every value that was looked at is equal")
    assert found.document.mapping.certified_b == 0


def test_a_person_reads_how_much_was_read(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--budget", "1500kB")
    assert "\nRead       " in done.out
    assert "(the budget: 1.5 MB)" in done.out
    assert "Direction" not in done.out


def test_too_small_a_budget_tells_nothing(models: Path, lineage: Lineage) -> None:
    done = lineage("check", models / "base", models / "suspect", "--expect", "unrelated", "--budget", "1kB")
    assert done.code == 3
    assert "could not be looked up within the limit of bytes" in done.out


def test_a_claim_that_samples_cannot_show_is_left_open(models: Path, lineage: Lineage) -> None:
    words = ("check", models / "base", models / "suspect", "--expect", "related", "--budget", "2MB", "--claim")
    assert lineage(*words, "fused").code == 0
    done = lineage(*words, "quantized")
    assert (done.code, done.out) == (
        3, "cannot be told: Samples do not show quantized; a run without a budget may.\n",
    )  # fmt: skip


def test_without_a_budget_nothing_is_said_of_reading(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--json")
    assert "read" not in json.loads(done.out)


@pytest.mark.parametrize("size", ["64zz", "0", "-3MB", "MB", ""])
def test_a_size_that_is_none_is_refused(size: str, lineage: Lineage, models: Path) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--budget", size)
    assert done.code == 2
    assert "is no size; write bytes, or such as 64MB or 1GiB" in done.err


@pytest.mark.parametrize(("size", "count"), [("3000000", 3_000_000), ("3MB", 3_000_000), ("2 MiB", 2_097_152)])
def test_sizes_are_read_as_people_write_them(size: str, count: int, models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--budget", size, "--json")
    assert json.loads(done.out)["read"]["budget"] == count
