"""Templates give names and names give them back, whatever the names hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineage.layout.axes import LayoutError
from lineage.layout.names import Names, parse_where, where_text
from lineage.layout.templates import MARK, literal, parse_template, skeleton, texts
from tests.strategies import names


@given(names)
def test_a_literal_template_printed_and_parsed_gives_the_name_alone(name: str) -> None:
    template = parse_template(str(literal(name)))
    assert template == literal(name)
    assert template.name({}) == name


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from([MARK, "0", "1", ".", "{", "}"])))
def test_a_name_is_its_skeleton_and_its_numbers(name: str) -> None:
    text, numbers = skeleton(name)
    parts = texts(text)
    assert "".join(p + str(n) for p, n in zip(parts, numbers, strict=False)) + parts[-1] == name
    assert literal(name).skeleton == text


@pytest.mark.parametrize(
    ("template", "bindings", "name"),
    [
        ("layers.{i}.w", {"i": 10}, "layers.10.w"),
        ("a.{i+1}.b{j}", {"i": 0, "j": 2}, "a.1.b2"),
        ("in.{3*b+r+1}.0", {"b": 2, "r": 1}, "in.8.0"),
        ("{ 2 * i - 1 }", {"i": 3}, "5"),
        ("{11-i}.%d", {"i": 3}, "8.%d"),
        ("{{i}}.{i}", {"i": 3}, "{i}.3"),
    ],
)
def test_a_template_gives_names(template: str, bindings: dict[str, int], name: str) -> None:
    parsed = parse_template(template)
    assert parsed.name(bindings) == name
    assert parse_template(str(parsed)) == parsed


@pytest.mark.parametrize(
    "template", ["{i}{j}", "1{i}", "{i}0", "{i", "i}", "{}", "{i*j}", "{3}", "{i+}", "{-}", "{2i}"]
)
def test_what_no_name_could_be_told_from_is_refused(template: str) -> None:
    with pytest.raises(LayoutError, match="brace|digit"):
        parse_template(template)


def test_a_negative_number_is_no_name() -> None:
    with pytest.raises(LayoutError, match="would be -1"):
        parse_template("a.{i-1}").name({"i": 0})


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("a.{i}.{j}", {(0, 0), (0, 1), (1, 0), (7, 2)}),
        ("a.{i}.{i}", {(0,)}),
        ("a.{i}.{i+1}", {(0,)}),
        ("a.{3*b+r+1}.{r}", {(0, 0)}),
        ("a.{3*b+r}.0", {(0, 0), (0, 1)}),
        ("a.{2*i+1}.0", {(0,)}),
        ("a.{7-i}.{j}", {(7, 0), (7, 1), (6, 0), (0, 2)}),
        ("b.{i}", set()),
        ("a.1.0", {()}),
    ],
)
def test_names_that_a_template_means_are_found_with_their_numbers(template: str, found: set[tuple[int, ...]]) -> None:
    names = Names(["a.0.0", "a.0.1", "a.1.0", "a.7.2", "a.01.0", "a.x.0"])
    assert set(names.relation(parse_template(template), {}).names) == found


def test_numbers_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(LayoutError, match="write a table"):
        Names(["a.3"]).relation(parse_template("a.{i+j}"), {})


@given(st.lists(st.integers(0, 99), unique=True, min_size=1, max_size=30))
def test_a_restriction_lists_its_values_in_order(values: list[int]) -> None:
    assert list(parse_where(where_text(values))) == values


@pytest.mark.parametrize("text", ["", "a", "1:", "-3", "0:2,1", "0:99999999", "1.5"])
def test_what_lists_no_numbers_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="lists"):
        parse_where(text)
