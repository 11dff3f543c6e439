"""Figures from sums: identities that hold for every pair, merging, and what is undefined."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineage.measure.kernels import choose
from lineage.measure.metrics import FIGURES, MERGED, SUMS, empty_sums, figures, merge
from tests.measure.memory import numbers, tuned

singles = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-1e6, max_value=1e6)
pairs = st.lists(st.tuples(singles, singles), min_size=1, max_size=60)


def _figures(values: list[tuple[float, float]]) -> dict[str, float | None]:
    a, b = (np.array(column, np.float32) for column in zip(*values, strict=True))
    return msgspec.structs.asdict(figures(choose().sums(a, "F32", b, "F32", tiny=2.0**-126)))


@given(pairs)
def test_no_figure_is_nan_and_no_cosine_passes_one(values: list[tuple[float, float]]) -> None:
    found = _figures(values)
    assert all(value is None or math.isfinite(value) for value in found.values())
    for name in ("cosine", "pearson"):
        value = found[name]
        assert value is None or -1.0 <= value <= 1.0


@given(pairs)
def test_cosine_relative_l2_and_norm_ratio_obey_the_law_of_cosines(values: list[tuple[float, float]]) -> None:
    found = _figures(values)
    cosine, rel, ratio = found["cosine"], found["rel_l2"], found["norm_ratio"]
    if cosine is not None and rel is not None and ratio is not None:
        expected = 1 + ratio**2 - 2 * ratio * cosine
        assert rel**2 == pytest.approx(expected, rel=1e-9, abs=1e-12 * (1 + ratio**2))


@given(pairs)
def test_swapping_the_sides_keeps_symmetric_figures(values: list[tuple[float, float]]) -> None:
    one, two = _figures(values), _figures([(b, a) for a, b in values])
    for name in ("cosine", "pearson", "l2", "l1", "max_abs", "mean_abs", "changed"):
        assert (
            one[name] == pytest.approx(two[name], rel=1e-12, abs=1e-12) if one[name] is not None else two[name] is None
        )
    if one["norm_ratio"] and two["norm_ratio"]:
        assert one["norm_ratio"] * two["norm_ratio"] == pytest.approx(1.0, rel=1e-12)


@given(st.lists(singles, min_size=1, max_size=60))
def test_a_tensor_against_itself_has_cosine_exactly_one(values: list[float]) -> None:
    found = _figures([(value, value) for value in values])
    assert found["cosine"] == (1.0 if any(values) else None)
    assert found["rel_l2"] == (0.0 if any(values) else None)
    assert found["changed"] == 0.0


@given(st.lists(st.lists(singles, min_size=19, max_size=19), min_size=2, max_size=6), st.randoms())
def test_merging_depends_neither_on_order_nor_on_a_part_of_nothing(rows: list[list[float]], chance: object) -> None:
    parts = [np.array(row) for row in rows]
    mixed = [*parts[::-1], empty_sums() - np.eye(19)[-1] * 1e9 - np.eye(19)[-2] * 1e9]
    assert np.array_equal(merge(parts), merge(mixed))


def test_blocks_merge_to_the_figures_of_the_whole() -> None:
    a = numbers(1, 10_000)
    b = tuned(a, 2)
    kernel = choose()
    whole = figures(kernel.sums(a, "F32", b, "F32", tiny=2.0**-126))
    parts = [kernel.sums(a[k : k + 999], "F32", b[k : k + 999], "F32", tiny=2.0**-126) for k in range(0, 10_000, 999)]
    for name in MERGED:
        assert getattr(figures(merge(parts)), name) == pytest.approx(getattr(whole, name), rel=1e-12), name


def test_figures_of_nothing_are_all_undefined() -> None:
    found = msgspec.structs.asdict(figures(empty_sums()))
    assert {name for name, value in found.items() if value is None} == set(FIGURES) - {"nan_a", "nan_b"}


def test_cosine_with_zeros_and_correlation_with_a_constant_are_undefined() -> None:
    zeros = _figures([(0.0, 1.0), (0.0, 2.0)])
    assert (zeros["cosine"], zeros["rel_l2"], zeros["norm_ratio"], zeros["zero_a"]) == (None, None, None, 1.0)
    constant = _figures([(0.1, 1.0), (0.1, 2.0), (0.1, 4.0)])
    assert (constant["pearson"], constant["std_ratio"]) == (None, None)
    assert constant["cosine"] is not None


def test_relative_differences_skip_subnormal_numbers() -> None:
    found = _figures([(1e-40, 1.0), (2.0, 3.0)])
    assert (found["max_rel"], found["mean_rel"]) == (0.5, 0.5)


def test_sums_too_large_for_float64_give_null() -> None:
    a, b = np.array([1e300, 2e300]), np.array([1e300, -2e300])
    found = figures(choose().sums(a, "F64", b, "F64", tiny=2.0**-1022))
    assert (found.cosine, found.l2, found.max_abs) == (None, None, 4e300)


def test_there_is_a_sum_for_each_place_of_the_kernel() -> None:
    assert len(SUMS) == len(empty_sums()) == 19


@pytest.mark.slow
def test_self_cosine_of_a_hundred_million_elements_is_exactly_one() -> None:
    rng = np.random.Generator(np.random.SFC64(1))
    kernel = choose()
    parts = []
    for _ in range(100):
        block = rng.standard_normal(10**6, dtype=np.float32)
        parts.append(kernel.sums(block, "F32", block.copy(), "F32", tiny=2.0**-126))
    found = figures(merge(parts))
    assert (found.cosine, found.pearson, found.norm_ratio, found.rel_l2) == (1.0, 1.0, 1.0, 0.0)
