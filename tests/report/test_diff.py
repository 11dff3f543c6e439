"""The comparison as JSON, CSV, Markdown, HTML and text."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest

from lineage.measure.diff import Diff, diff
from lineage.measure.metrics import FIGURES
from lineage.report.diff import csv_text, html, json_lines, markdown, names, text
from tests.measure.memory import Memory, numbers, tuned

BAD = "\x1b[2J<b>|`\nw"


@pytest.fixture(scope="module")
def found() -> Diff:
    a, b = {}, {}
    for i in range(6):
        for at, part in enumerate(("attn.q_proj", "mlp.up_proj")):
            name, x = f"model.layers.{i}.{part}.weight", numbers(10 * i + at, 16, 24)
            a[name] = ("F32", x)
            b[name] = ("F32", x if i == 0 else tuned(x, 100 + 10 * i + at))
        a[f"model.layers.{i}.input_norm.weight"] = ("F32", 1 + numbers(i, 24, scale=0.1))
        b[f"model.layers.{i}.input_norm.weight"] = ("F32", 1.01 + numbers(i, 24, scale=0.1))
    a |= {"gone": ("F32", numbers(1, 3)), "cut": ("F32", numbers(1, 8, 4)), BAD: ("F32", numbers(2, 8, 8))}
    b |= {"new": ("F32", numbers(1, 3)), "cut": ("F32", numbers(1, 6, 4)), BAD: ("F32", -numbers(2, 8, 8))}
    b["broken"] = a["broken"] = ("F32", np.full((4, 4), np.nan, np.float32))
    return diff(Memory(a), Memory(b), sample=200)


def test_json_is_strict_and_holds_every_tensor(found: Diff) -> None:
    def refuse(word: str) -> None:
        raise AssertionError(word)

    document = json.loads(b"".join(json_lines(found)), parse_constant=refuse)
    assert document == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {row["name"] for row in document["tensors"]} >= {"gone", "new", "cut", BAD}
    assert document["summary"]["status"]["removed"] == 1


def test_json_of_many_rows_comes_in_pieces_that_join() -> None:
    a = Memory({f"w{k}": ("F32", np.array([k], np.float32)) for k in range(1100)})
    document = json.loads(b"".join(json_lines(diff(a, a))))
    assert [row["name"] for row in document["tensors"]] == list(a.specs)


def test_a_name_that_utf8_lacks_becomes_an_escape() -> None:
    a = Memory({"\ud800w": ("F32", np.array([1], np.float32))})
    assert json.loads(b"".join(json_lines(diff(a, a))))["tensors"][0]["name"] == "\ud800w"


def test_csv_holds_every_figure_in_full_precision(found: Diff) -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(found))))
    assert len(rows) == len(found.comparison.rows)
    for line, row in zip(rows, found.comparison.rows, strict=True):
        assert (line["name"], line["status"]) == (row.name, row.status)
        for name in FIGURES:
            value = None if row.metrics is None else getattr(row.metrics, name)
            assert line[name] == ("" if value is None else str(value))


def test_text_says_what_differs_and_escapes_names(found: Diff) -> None:
    shown = text(found, top=5, by="rel_l2", width=100)
    for part in ("3 unchanged", "1 tensor only in A:", "1 tensor only in B:", "gone", "cut  8x4 -> 6x4", "rel_l2",
                 "model.layers ", "Groups", "attention", "samples of about 200"):  # fmt: skip
        assert part in shown, part
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 180


def test_quiet_text_has_no_tables_and_verbose_text_has_layers(found: Diff) -> None:
    assert "Groups" not in text(found, top=5, by="rel_l2", quiet=True)
    assert "model.layers.5" in text(found, top=0, by="rel_l2", verbose=True)
    assert "\x1b[31m!" in text(found, top=0, by="rel_l2", color=True)


def test_figures_that_tables_lack_are_added_when_asked_for(found: Diff) -> None:
    assert "q99" not in text(found, top=5, by="rel_l2")
    assert "q99" in text(found, top=5, by="q99")


def test_markdown_holds_the_tables_and_escapes_names(found: Diff) -> None:
    shown = markdown(found, top=50, by="rel_l2")
    assert "| tensor | shape | cosine |" in shown
    assert "\\x1b[2J&lt;b>\\|\\`\\\\n" in shown.replace("\\\\x1b", "\\x1b")
    assert "\x1b" not in shown


def test_names_are_listed_by_status(found: Diff) -> None:
    lines = names(found).splitlines()
    assert len(lines) == len(found.comparison.rows)
    assert "removed        gone" in lines


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_html_is_one_file_without_anything_from_elsewhere(found: Diff) -> None:
    page = html(found, by="rel_l2")
    parser = _Tags()
    parser.feed(page)
    assert not [tag for tag, attributes in parser.tags if {"src", "href"} & set(attributes)]
    assert "http" not in page
    assert "b" not in {tag for tag, _ in parser.tags[parser.tags.index(("tbody", {})) :]}
    rows = [tag for tag, _ in parser.tags[parser.tags.index(("tbody", {})) :] if tag == "tr"]
    assert len(rows) == len(found.comparison.rows)
    assert "prefers-color-scheme: dark" in page


def test_html_lists_the_most_changed_tensors_of_a_huge_model_only(monkeypatch: pytest.MonkeyPatch, found: Diff) -> None:
    monkeypatch.setattr("lineage.report.diff.HTML_ROWS", 4)
    page = html(found, by="rel_l2")
    assert f"The 4 most changed; {len(found.comparison.rows) - 4} more" in page


def test_nothing_at_all_is_still_an_answer() -> None:
    empty = diff(Memory({}), Memory({}))
    assert "no tensors on either side" in text(empty, top=5, by="rel_l2")
    assert json.loads(b"".join(json_lines(empty)))["tensors"] == []
    assert "no tensors" in markdown(empty, top=5, by="rel_l2")
    assert "no tensors" in html(empty, by="rel_l2")
