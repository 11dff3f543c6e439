"""What every medium says alike, and that names from files do no harm in any of them."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lineage.checkpoint.claims import Claim
from lineage.report.diff import csv_text
from lineage.report.document import RELATIONS, Report
from lineage.report.html import heat_map, page
from lineage.report.markdown import markdown
from lineage.report.terminal import text
from lineage.report.words import HEADLINES, certainty, next_steps, percent
from tests.report.pairs import HOSTILE, network, report, verdict

MEDIA: dict[str, Callable[[Report], str]] = {"terminal": text, "markdown": markdown, "html": page}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    names = ("attn.q", "mlp.up")
    return network(folder / "base", names), network(folder / "child", names, moved=0.01)


@pytest.mark.parametrize("medium", MEDIA)
@pytest.mark.parametrize("class_", HEADLINES)
def test_every_medium_tells_verdict_reasons_and_coverage(medium: str, class_: str, pair: tuple[str, str]) -> None:
    told = MEDIA[medium](report(*pair, verdict(class_, coverage=0.5)))
    for words in (class_, "First.", "Second.", "50.0 % of B"):
        assert words.lower() in told.lower()


@pytest.mark.parametrize("medium", MEDIA)
def test_every_medium_tells_claims_and_components(medium: str, tmp_path: Path) -> None:
    for side in "ab":
        for part in ("transformer", "vae"):
            network(tmp_path / side / part, ["up"], seed=len(part))
        (tmp_path / side / "model_index.json").write_text("{}")
    parts = [("transformer", "transformed"), ("vae", "copied")]
    claims = [Claim("README.md base_model", "org/a")]
    told = MEDIA[medium](report(str(tmp_path / "a"), str(tmp_path / "b"), parts=parts, claims=claims))
    assert "org/a" in told
    assert "supported" in told
    assert re.search(r"vae\W.*copied", told)


@pytest.mark.parametrize("medium", MEDIA)
def test_hostile_names_do_no_harm(medium: str, tmp_path: Path) -> None:
    a, b = network(tmp_path / "a", HOSTILE), network(tmp_path / "b", HOSTILE, moved=0.01)
    found = report(a, b, verdict(reasons=HOSTILE), claims=[Claim("README.md base_model", name) for name in HOSTILE])
    told = MEDIA[medium](found)
    assert not set(told) & {"\x1b", "\u202e"}
    outside = re.sub(r"(?s)```yaml\n.*?\n```", "", told)
    assert medium == "terminal" or "<script>alert" not in outside


def test_hostile_names_leave_the_page_whole(tmp_path: Path) -> None:
    a, b = network(tmp_path / "a", HOSTILE), network(tmp_path / "b", HOSTILE, moved=0.01)
    seen: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            seen.append(tag)

    Reader().feed(page(report(a, b)))
    assert seen.count("script") == 1
    assert seen.count("body") == 1


def test_the_page_loads_nothing_from_elsewhere(pair: tuple[str, str]) -> None:
    told = page(report(*pair))
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|https?:", told)
    assert "default-src 'none'" in told


def test_the_page_shows_a_heat_map_by_layer_and_role(pair: tuple[str, str]) -> None:
    (found,) = heat_map(report(*pair))
    assert found["roles"] == ["attn.q", "mlp.up"]
    assert [line["layer"] for line in found["lines"]] == [0, 1]
    assert all(0.4 < cell["heat"] < 0.6 and 0.005 < cell["value"] < 0.02 for cell in found["lines"][0]["cells"])


def test_unchanged_tensors_are_cold_on_the_heat_map(pair: tuple[str, str]) -> None:
    (found,) = heat_map(report(pair[0], pair[0]))
    assert all(cell == {"value": 0.0, "heat": 0.0} for line in found["lines"] for cell in line["cells"])


def test_many_roles_are_shown_by_group(tmp_path: Path) -> None:
    names = [f"mlp.part_{'abcdefghijrstuwxyz'[i]}" for i in range(18)]
    (found,) = heat_map(report(network(tmp_path / "a", names), network(tmp_path / "b", names, moved=0.01)))
    assert found["roles"] == ["mlp"]


def test_experts_share_a_column_of_the_heat_map(tmp_path: Path) -> None:
    names = [f"mlp.experts.{i}.up" for i in range(3)]
    (found,) = heat_map(report(network(tmp_path / "a", names), network(tmp_path / "b", names, moved=0.01)))
    assert found["roles"] == ["mlp.experts.*.up"]


def test_the_csv_has_a_line_for_every_tensor(pair: tuple[str, str]) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(report(*pair).diff))))
    assert [line["b_name"] for line in lines] == [f"layers.{i}.{n}" for i in range(2) for n in ("attn.q", "mlp.up")]


def test_quiet_is_one_line(pair: tuple[str, str]) -> None:
    told = text(report(*pair), quiet=True)
    assert told == "TRANSFORMED: B's weights are derived from A's, or both from a common ancestor's."


def test_only_a_terminal_gets_colour(pair: tuple[str, str]) -> None:
    assert text(report(*pair), color=True).startswith("\x1b[1;33mTRANSFORMED\x1b[0m")
    assert "\x1b" not in text(report(*pair))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_sentences_fit_the_terminal(width: int, pair: tuple[str, str]) -> None:
    found = report(*pair, verdict(reasons=("word " * 60,)))
    lines = text(found, width=width).split("Why")[1].split("How sure")[0].splitlines()
    assert all(len(line) <= width for line in lines)


def test_warnings_are_cut_until_asked_for(pair: tuple[str, str]) -> None:
    import msgspec

    found = report(*pair)
    many = msgspec.structs.replace(found.document, warnings=tuple(f"warning {i}" for i in range(9)))
    found = msgspec.structs.replace(found, document=many)
    assert "4 more, shown with -v" in text(found)
    assert "warning 8" in text(found, verbose=True)


@pytest.mark.parametrize(
    ("log10_p", "words"),
    [(-412.7, "10^-412.7."), (-0.2, "0.63."), (None, "no p-value")],
)
def test_how_sure_is_said_in_words(log10_p: float | None, words: str) -> None:
    from lineage.report.document import VerdictSummary

    found = VerdictSummary(
        class_="transformed", related=True, log10_p=log10_p, coverage=1.0, relations=(), direction=None, reasons=()
    )
    assert words in certainty(found)


@pytest.mark.parametrize("share", [0.0, 1e-9, 0.25, 1 - 1e-9, 1.0])
def test_a_share_reads_as_all_or_nothing_only_where_it_is(share: float) -> None:
    assert (percent(share) in ("0 %", "100 %")) == (share in (0.0, 1.0))


@pytest.mark.parametrize(
    ("class_", "words"),
    [
        ("transformed", "lineage diff"),
        ("copied", "who came first"),
        ("retrained", "Nothing speaks for a common origin"),
        ("undetermined", "Compare other parts"),
    ],
)
def test_there_is_always_a_next_step(class_: str, words: str, pair: tuple[str, str]) -> None:
    assert any(words in step for step in next_steps(report(*pair, verdict(class_))))


def test_a_false_claim_is_a_reason_to_ask(pair: tuple[str, str]) -> None:
    claim = Claim("README.md base_model", "org/base")
    steps = next_steps(report(*pair, verdict("retrained"), claims=[claim]))
    assert steps[-1] == "B names A as its origin, which its weights contradict: ask its authors."


def test_commands_that_are_offered_quote_odd_paths(tmp_path: Path) -> None:
    a, b = network(tmp_path / "my base", ["up"]), network(tmp_path / "child", ["up"])
    assert any(f"lineage diff '{a}'" in step for step in next_steps(report(a, b)))


def test_every_relation_has_a_place_in_the_summary(pair: tuple[str, str]) -> None:
    told = text(report(*pair, verdict(relations=RELATIONS)), width=4000)
    assert ", ".join(RELATIONS) in told


@pytest.mark.parametrize(
    ("claims", "hinted"),
    [
        ([("README.md base_model", "org/a"), ("README.md base_model", "org/c")], True),
        ([("README.md base_model_relation", "merge")], True),
        ([("README.md base_model", "org/a"), ("config.json _name_or_path", "org/c")], False),
    ],
)
def test_who_calls_himself_a_merge_is_asked_for_parents(
    claims: list[tuple[str, str]], hinted: bool, pair: tuple[str, str]
) -> None:
    found = report(*pair, verdict(), claims=[Claim(*words) for words in claims])
    assert any("--parent" in step for step in next_steps(found)) is hinted
