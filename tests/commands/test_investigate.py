"""`lineage investigate`, `check`, `map` and `example` as users run them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from safetensors.torch import load_file

from lineage.report.document import schema
from tests.conftest import Lineage
from tests.report.pairs import HOSTILE, network


def test_a_person_reads_verdict_reasons_certainty_and_what_to_do(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect")
    assert done.code == 0
    assert done.out.startswith("TRANSFORMED: B's weights are derived from A's")
    for words in ("\nWhy\n", "How sure", "Coverage   100 %", "renamed, fused", "README.md base_model", "\nNext\n"):
        assert words in done.out


def test_strangers_are_an_answer_too(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "stranger")
    assert done.code == 0
    assert done.out.startswith("RETRAINED")
    assert "example/base (contradicted)" in done.out


def test_json_is_the_report_and_nothing_else(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--json")
    jsonschema.validate(json.loads(done.out), schema())
    assert done.err == ""


def test_the_printed_json_is_the_written_one(models: Path, lineage: Lineage, tmp_path: Path) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "--json", "-o", tmp_path / "r")
    assert (tmp_path / "r" / "report.json").read_text() == done.out
    assert done.err == f"wrote {tmp_path / 'r'}\n"


def test_quiet_is_the_verdict_on_one_line(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "-q")
    assert (done.out.count("\n"), done.err) == (1, "")


def test_an_output_that_cannot_be_is_refused_before_any_work(models: Path, lineage: Lineage) -> None:
    done = lineage("investigate", models / "base", models / "suspect", "-o", models / "base/model.safetensors/r")
    assert done.code == 2
    assert "model.safetensors is a file, not a folder" in done.err


@pytest.mark.parametrize("command", ["investigate", "diff"])
def test_hostile_names_reach_no_terminal(command: str, lineage: Lineage, tmp_path: Path) -> None:
    a, b = network(tmp_path / "a", HOSTILE), network(tmp_path / "b", HOSTILE, moved=0.01)
    done = lineage(command, a, b, "-v")
    assert done.code == 0
    assert not set(done.out + done.err) & {"\x1b", "\u202e"}


@pytest.mark.parametrize(
    ("b", "words", "code", "said"),
    [
        ("suspect", ["--expect", "related"], 0, "holds: "),
        ("suspect", ["--expect", "copied"], 1, "does not hold: "),
        ("suspect", ["--expect", "related", "--claim", "fused"], 0, "holds: "),
        ("suspect", ["--expect", "related", "--claim", "quantized"], 1, "does not hold: "),
        ("stranger", ["--expect", "related"], 1, "does not hold: "),
        ("stranger", ["--expect", "unrelated", "-q"], 0, ""),
    ],
)
def test_check_is_a_gate(b: str, words: list[str], code: int, said: str, models: Path, lineage: Lineage) -> None:
    done = lineage("check", models / "base", models / b, *words)
    assert done.code == code
    assert done.out.startswith(said)


def test_check_exits_3_where_it_cannot_be_told(models: Path, lineage: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    from lineage import api

    def untold(*_: object, **__: object) -> api.Answer:
        return api.Answer(holds=None, why="It cannot be told: too small.", report=None)

    monkeypatch.setattr(api, "check", untold)
    done = lineage("check", models / "base", models / "suspect", "--expect", "related")
    assert (done.code, done.out) == (3, "cannot be told: It cannot be told: too small.\n")


def test_check_prints_its_answer_as_json(models: Path, lineage: Lineage) -> None:
    done = lineage("check", models / "base", models / "suspect", "--expect", "related", "--json")
    found = json.loads(done.out)
    assert found["holds"] is True
    assert found["report"]["verdict"]["related"] is True


def test_a_mapping_is_written_verified_and_applied(models: Path, lineage: Lineage, tmp_path: Path) -> None:
    a, b, m = models / "base", models / "suspect", tmp_path / "m.yaml"
    done = lineage("map", a, b, "-o", m)
    assert (done.code, done.out) == (0, "")
    assert "B: 21 of 21 tensors matched" in done.err
    done = lineage("map", "--check", m, a, b)
    assert (done.code, done.out) == (0, "21 of 21 places hold, 0 of them bit by bit\n")
    assert lineage("apply", m, a, "-o", tmp_path / "b.safetensors", "--strict").code == 0
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(b / "model.safetensors").keys()


def test_a_mapping_that_does_not_hold_exits_1_and_says_where(models: Path, lineage: Lineage, tmp_path: Path) -> None:
    lineage("map", models / "base", models / "suspect", "-o", tmp_path / "m.yaml")
    done = lineage("map", "--check", tmp_path / "m.yaml", models / "stranger", models / "suspect")
    assert done.code == 1
    assert done.out.startswith("rules[0]: ")
    assert "more (-v lists them)\n0 of 21 places hold" in done.out


def test_a_mapping_is_printed_where_no_file_is_named(models: Path, lineage: Lineage) -> None:
    done = lineage("map", models / "base", models / "suspect", "-q")
    assert done.out.startswith("lineage-mapping: 1\n")
    assert done.err == ""


def test_nothing_that_corresponds_exits_1_and_writes_nothing(lineage: Lineage, tmp_path: Path) -> None:
    a = network(tmp_path / "a", ["up"], layers=1)
    (tmp_path / "b").mkdir()
    import numpy as np
    from safetensors.numpy import save_file

    draw = np.random.default_rng(3)
    save_file({"odd": draw.standard_normal((7, 11, 3)).astype(np.float32)}, tmp_path / "b" / "model.safetensors")
    done = lineage("map", a, tmp_path / "b", "-o", tmp_path / "m.yaml")
    assert done.code == 1
    assert "no mapping is written" in done.err
    assert not (tmp_path / "m.yaml").exists()


def test_what_is_left_over_is_named(lineage: Lineage, tmp_path: Path) -> None:
    a, b = network(tmp_path / "a", ["up"], layers=3), network(tmp_path / "b", ["up"], layers=2)
    done = lineage("map", a, b, "-o", tmp_path / "m.yaml")
    assert done.code == 0
    assert "A: nothing corresponds to layers.2.up" in done.err


def test_an_example_names_what_it_wrote(models: Path, lineage: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lineage.example.write_example", lambda folder, **_: Path(folder))
    done = lineage("example", "there")
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines()[0] == "there/base: a decoder trained from scratch"
    assert done.err.splitlines()[-1] == "Now try: lineage investigate there/base there/suspect"


def test_an_example_overwrites_nothing(models: Path, lineage: Lineage) -> None:
    done = lineage("example", models)
    assert done.code == 2
    assert done.err == f"lineage: {models}: is there already and not empty; name a new folder\n"


def test_progress_is_shown_on_a_terminal_only(
    models: Path, lineage: Lineage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from lineage.commands import Settings, open_progress

    with open_progress(Settings()) as progress:
        progress.step("measuring")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with open_progress(Settings()) as progress:
        progress.step("measuring")
        progress.count(1, 2)
    assert "measuring" in capsys.readouterr().err


def test_the_folder_holds_the_key_map_for_adapters(models: Path, lineage: Lineage, tmp_path: Path) -> None:
    lineage("investigate", models / "base", models / "suspect", "-o", tmp_path / "r")
    keys = yaml.safe_load((tmp_path / "r" / "lora_keys.yaml").read_text())
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    assert document["lora"] == {"grade": "reshape", "keys": "lora_keys.yaml"}
    assert keys["grade"] == "reshape"
    assert any(len(line["from"]) == 3 and len(line["to"]) == 1 for line in keys["keys"])
