"""Patterns mean what einops means, and know their shapes and inverses without data."""

from __future__ import annotations

import einops
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineage.layout.axes import LayoutError, OpenSize, parse_pattern
from tests.strategies import codes, patterns

Pattern = tuple[str, dict[str, int], tuple[int, ...]]


@given(patterns())
def test_a_pattern_moves_elements_as_einops_does(drawn: Pattern) -> None:
    text, sizes, shape = drawn
    array = codes(shape)
    assert np.array_equal(parse_pattern(text).apply(array, sizes), einops.rearrange(array, text, **sizes))


@given(patterns())
def test_the_inverse_pattern_undoes_it_and_the_shape_rule_tells_its_shape(drawn: Pattern) -> None:
    text, sizes, shape = drawn
    pattern, array = parse_pattern(text), codes(shape)
    there = pattern.apply(array, sizes)
    assert there.shape == pattern.shape(shape, sizes)
    assert np.array_equal(pattern.inverse().apply(there, sizes), array)


@given(patterns())
def test_a_pattern_printed_and_parsed_is_the_same(drawn: Pattern) -> None:
    pattern = parse_pattern(drawn[0])
    assert parse_pattern(str(pattern)) == pattern


@given(patterns())
def test_keeps_order_says_whether_the_flat_elements_stay(drawn: Pattern) -> None:
    text, sizes, shape = drawn
    pattern, array = parse_pattern(text), codes(shape)
    if pattern.keeps_order(shape, sizes):
        assert np.array_equal(pattern.apply(array, sizes).ravel(), array.ravel())


@given(st.lists(st.integers(1, 3), max_size=3))
def test_an_ellipsis_stands_for_any_further_axes(rest: list[int]) -> None:
    array = codes((6, *rest))
    ours = parse_pattern("(h d) ... -> (d h) ...").apply(array, {"h": 2})
    assert np.array_equal(ours, einops.rearrange(array, "(h d) ... -> (d h) ...", h=2))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(h d k -> q", "a parenthesis stays open"),
        ("a b", 'one "->" is needed'),
        ("a -> b", "on one side only"),
        ("a a -> a", "stands twice"),
        ("a 2 -> a", 'unexpected "2"'),
        ("a) -> a", r'unexpected "\)"'),
        ("(a (b)) -> a b", r'unexpected "\("'),
        ("_a -> _a", 'unexpected "_a"'),
    ],
)
def test_what_is_no_pattern_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        parse_pattern(text)


@pytest.mark.parametrize(
    ("shape", "sizes", "reason"),
    [
        ((6, 2), {}, "give a size for h or d"),
        ((6, 2), {"h": 4}, r"\(h d\) does not fit a length of 6, h = 4"),
        ((6,), {"h": 2}, "takes 2 axes"),
        ((6, 2, 1), {"h": 2}, "takes 2 axes"),
    ],
)
def test_a_pattern_that_does_not_fit_says_where(shape: tuple[int, ...], sizes: dict[str, int], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        parse_pattern("(h d) k -> h d k").shape(shape, sizes)


def test_a_pattern_names_the_lengths_that_it_lacks_and_what_they_make_together() -> None:
    pattern = parse_pattern("(h two d) k -> (h d two) k")
    with pytest.raises(OpenSize, match="give a size for h or d") as raised:
        pattern.lengths((48, 5), {"two": 2})
    assert (raised.value.names, raised.value.product) == (("h", "d"), 24)
    assert pattern.lengths((48, 5), {"two": 2, "d": 4}) == {"h": 6, "two": 2, "d": 4, "k": 5}
