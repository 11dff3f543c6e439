"""The README shows what the program says: help texts to the letter, the example in its structure."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.commands.test_commands import LEAVES
from tests.conftest import GOLDEN, Lineage

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLE = ("investigate", "models/base", "models/suspect", "-o", "reports/example")
STRANGER = ("investigate", "models/base", "models/stranger")


def _block(name: str) -> str:
    """What stands between a pair of marks."""
    found = re.search(rf"(?s)<!-- {name} -->\n(.*?)<!-- /{name} -->", README.read_text(encoding="utf-8"))
    assert found, f"README.md has no block {name}"
    return found[1]


def _rewrite(name: str, text: str) -> None:
    whole = README.read_text(encoding="utf-8")
    marks = re.compile(rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)")
    README.write_text(marks.sub(lambda m: m[1] + text + m[2], whole), encoding="utf-8")


def _fenced(text: str) -> str:
    return f"```\n{text.rstrip()}\n```\n"


def test_help_blocks_are_those_of_the_commands(request: pytest.FixtureRequest) -> None:
    parts = []
    for name in LEAVES:
        text = (GOLDEN / "help" / f"{name.replace(' ', '-')}.txt").read_text(encoding="utf-8")
        parts.append(f"### lineage {name}\n\n{_fenced(text)}")
    wanted = "\n".join(parts)
    if request.config.getoption("--update-golden"):
        _rewrite("help", wanted)
    assert _block("help") == wanted


def _shape(text: str) -> list[str]:
    """Words of the lines that do not depend on the machine's arithmetic: verdict, titles, facts without figures."""
    lines = text.splitlines()
    return [line.split("  ")[0] for line in lines if re.match(r"[A-Z][A-Za-z ]+($|:|  )", line)]


@pytest.mark.parametrize(("name", "words"), [("example", EXAMPLE), ("stranger", STRANGER)])
def test_the_examples_output_is_what_the_program_prints(
    name: str, words: tuple[str, ...], models: Path, lineage: Lineage, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    update = request.config.getoption("--update-golden")
    if update and name == "example":
        (tmp_path / "reports").symlink_to(ROOT / "reports")
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    done = lineage(*words)
    assert done.code == 0
    if update:
        before = "$ lineage example models\n" if name == "example" else ""
        _rewrite(name, _fenced(f"{before}$ lineage {' '.join(words)}\n{done.out}"))
    assert _shape(_block(name).split("\n$ lineage investigate")[-1]) == _shape(done.out)


def test_the_report_that_ships_is_of_this_version() -> None:
    import json

    from lineage.report.document import schema

    found = json.loads((ROOT / "reports/example/report.json").read_text(encoding="utf-8"))
    import jsonschema

    jsonschema.validate(found, schema())
    assert found["verdict"]["class"] == "transformed"


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
