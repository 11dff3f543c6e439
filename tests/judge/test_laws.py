from __future__ import annotations

import math
from collections import Counter
from itertools import permutations, product

import numpy as np
import pytest

from lineage.judge.laws import (
    corrected,
    log10_fixed_points,
    log10_fixed_points_in_equal_groups,
    log10_fixed_points_in_groups,
    log10_fixed_points_in_parts,
    log10_fixed_points_together,
    log10_order_kept,
    log10_orders_kept_together,
    longest_increasing,
)


def tail(counts: Counter[int], agreed: int) -> float:
    return sum(n for k, n in counts.items() if k >= agreed) / counts.total()


@pytest.mark.parametrize(("units", "places"), [(n, m) for n in range(1, 7) for m in range(n, 7)])
def test_fixed_points_agree_with_enumeration(units: int, places: int) -> None:
    hits = Counter(sum(i == p for i, p in enumerate(perm)) for perm in permutations(range(places), units))
    for agreed in hits:
        assert 10 ** log10_fixed_points(units, agreed, places) == pytest.approx(tail(hits, agreed), rel=1e-12)


def test_what_cannot_happen_has_chance_zero() -> None:
    assert log10_fixed_points(4, 5) == -math.inf


def test_all_but_one_unit_at_home_is_as_rare_as_all() -> None:
    assert log10_fixed_points(6, 5) == pytest.approx(log10_fixed_points(6, 6))


@pytest.mark.parametrize("agreed", range(9))
def test_blocks_together_agree_with_enumeration(agreed: int) -> None:
    one = [sum(i == p for i, p in enumerate(perm)) for perm in permutations(range(4))]
    two = [sum(i == p for i, p in enumerate(perm)) for perm in permutations(range(5), 4)]
    sums = Counter(x + y for x, y in product(one, two))
    found = log10_fixed_points_together([(4, 4), (4, 5)], agreed)
    assert 10**found == pytest.approx(tail(sums, agreed), rel=1e-10)


def test_whole_layers_in_place_multiply_far_below_what_a_float_holds() -> None:
    logs = math.lgamma(20_001) / math.log(10)
    assert log10_fixed_points(20_000, 20_000) == pytest.approx(-logs, rel=1e-12)
    assert log10_fixed_points_together([(20_000, 20_000)] * 100, 2_000_000) <= -99 * logs


def test_too_many_blocks_for_the_exact_law_give_an_upper_bound_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [(160, 160)] * 6
    counts = [9, 40, 200, 960]
    exact = [log10_fixed_points_together(blocks, k) for k in counts]
    monkeypatch.setattr("lineage.judge.laws.EXACT_WORK", 0)
    bounds = [log10_fixed_points_together(blocks, k) for k in counts]
    for one, bound in zip(exact, bounds, strict=True):
        assert one - 1e-9 <= bound <= 0.9 * one


def test_half_of_many_units_stays_finite_where_floats_end() -> None:
    assert -45_000 < log10_fixed_points_together([(512, 512)] * 64, 64 * 256) < -10_000


@pytest.mark.parametrize("units", range(1, 8))
def test_the_order_bound_is_never_below_the_true_chance(units: int) -> None:
    runs = Counter(longest_increasing(perm) for perm in permutations(range(units)))
    for kept in runs:
        assert 10 ** log10_order_kept(units, kept) >= tail(runs, kept) * (1 - 1e-12)


@pytest.mark.parametrize("kept", range(1, 9))
def test_the_order_bound_holds_for_blocks_together(kept: int) -> None:
    one = [longest_increasing(perm) for perm in permutations(range(4))]
    sums = Counter(x + y for x, y in product(one, one))
    assert 10 ** log10_orders_kept_together([4, 4], kept) >= tail(sums, kept) * (1 - 1e-12)


def test_the_cheap_order_bound_is_no_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = log10_orders_kept_together([50, 60], 100)
    monkeypatch.setattr("lineage.judge.laws.EXACT_WORK", 0)
    assert exact <= log10_orders_kept_together([50, 60], 100) < -50


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_the_bound_for_groups_holds_for_any_grouping(groups: int) -> None:
    size = 6 // groups
    hits: Counter[int] = Counter()
    for order in permutations(range(groups)):
        for inner in product(list(permutations(range(size))), repeat=groups):
            hits[sum(order[g] == g and inner[g][i] == i for g in range(groups) for i in range(size))] += 1
    for agreed in hits:
        assert 10 ** log10_fixed_points_in_groups(agreed) >= tail(hits, agreed) * (1 - 1e-12)


@pytest.mark.parametrize("seed", range(20))
def test_longest_run_agrees_with_the_plain_table(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(30)
    ends = np.ones(30, int)
    for at in range(30):
        before = [ends[k] for k in range(at) if order[k] < order[at]]
        ends[at] = 1 + max(before, default=0)
    assert longest_increasing(order) == ends.max()


def test_correction_never_makes_a_chance_above_one() -> None:
    assert corrected(-1.0, 5.0) == 0.0


def test_no_unit_is_no_evidence() -> None:
    assert log10_fixed_points_together([], 0) == log10_orders_kept_together([], 0) == 0.0


def test_more_units_than_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="5 units have no distinct labels among 4"):
        log10_fixed_points(5, 2, 4)


def dealt(groups: int, size: int) -> list[tuple[int, ...]]:
    """All ways of dealing equal groups, and units inside each of them."""
    inner = list(permutations(range(size)))
    return [
        tuple(place * size + unit for place, order in zip(outer, orders, strict=True) for unit in order)
        for outer in permutations(range(groups))
        for orders in product(inner, repeat=groups)
    ]


@pytest.mark.parametrize(("groups", "size"), [(1, 6), (2, 3), (3, 2), (6, 1), (2, 2)])
def test_units_that_may_stand_in_groups_agree_no_more_often_than_said(groups: int, size: int) -> None:
    orders, units = dealt(groups, size), groups * size
    hits = [sum(i == p for i, p in enumerate(order)) for order in orders]
    for agreed in range(units + 1):
        share = sum(hit >= agreed for hit in hits) / len(hits)
        assert 10 ** log10_fixed_points_in_equal_groups([units], agreed) >= share * (1 - 1e-12)


def test_all_units_at_their_place_are_as_rare_as_the_likeliest_groups_allow() -> None:
    assert 10 ** log10_fixed_points_in_equal_groups([6], 6) == pytest.approx(1 / len(dealt(3, 2)), rel=1e-9)


def test_grouped_blocks_of_many_layers_count_together() -> None:
    one, four = (log10_fixed_points_in_equal_groups([8] * n, 8 * n) for n in (1, 4))
    assert four == pytest.approx(4 * one, rel=1e-9)


@pytest.mark.parametrize("parts", [3, 4])
@pytest.mark.parametrize("units", [12, 40])
def test_the_bound_on_parts_holds_for_one_permutation_and_for_parts_that_share_one(parts: int, units: int) -> None:
    for agreed in range(1, units + 1):
        bound = log10_fixed_points_in_parts(agreed, parts)
        assert bound >= log10_fixed_points(units, agreed)
        assert bound >= log10_fixed_points(math.ceil(units / parts), math.ceil(agreed / parts))
