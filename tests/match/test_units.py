from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lineage.match.units import likeness, normalised, pair_units


def test_shuffled_units_are_found_again() -> None:
    rng = np.random.default_rng(0)
    units, order = normalised(rng.standard_normal((40, 64))), rng.permutation(40)
    found = pair_units(likeness([units], [units[order]])[0], seed=1)
    assert order[found.b].tolist() == found.a.tolist() == list(range(40))


def test_ties_are_broken_by_chance_not_by_index() -> None:
    fixed = [pair_units(np.ones((30, 30)), seed=seed).fixed for seed in range(200)]
    assert np.mean(fixed) == pytest.approx(1.0, abs=0.3)


def test_the_shorter_side_is_paired_whole() -> None:
    found = pair_units(np.random.default_rng(0).random((5, 9)), seed=0)
    assert (len(found.a), len(set(found.b.tolist()))) == (5, 5)


def test_labels_make_no_difference_to_the_pairing() -> None:
    rng = np.random.default_rng(0)
    alike, order = rng.random((20, 20)), rng.permutation(20)
    plain, moved = pair_units(alike, seed=0), pair_units(alike[order], seed=0)
    assert dict(zip(order[moved.a].tolist(), moved.b.tolist(), strict=True)) == dict(
        zip(plain.a.tolist(), plain.b.tolist(), strict=True)
    )


def test_fixed_points_of_strangers_follow_the_law_of_chance() -> None:
    rng = np.random.default_rng(0)
    counts: Counter[int] = Counter()
    for seed in range(400):
        one, two = (normalised(rng.standard_normal((12, 16))) for _ in "ab")
        counts[pair_units(likeness([one], [two])[0], seed=seed).fixed] += 1
    assert counts[0] / 400 == pytest.approx(1 / np.e, abs=0.08)
    assert sum(k * n for k, n in counts.items()) / 400 == pytest.approx(1.0, abs=0.15)


def test_signs_make_no_difference_to_likeness() -> None:
    units = normalised(np.random.default_rng(0).standard_normal((6, 8)))
    np.testing.assert_array_equal(likeness([units], [-units])[0], likeness([units], [units])[0])


def test_rows_have_length_one_after_their_common_part_was_taken_off() -> None:
    rows = normalised(100 + np.random.default_rng(0).standard_normal((9, 30)))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(rows.sum(axis=0), rows.sum(axis=0).mean(), atol=1.0)


def test_dead_rows_stay_zero() -> None:
    units = np.random.default_rng(0).standard_normal((6, 8))
    units[2] = 0
    assert not normalised(units, centred=False)[2].any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_sizes_at_the_ends_of_the_float_range_do_no_harm(scale: float) -> None:
    units = np.random.default_rng(0).standard_normal((6, 8))
    np.testing.assert_allclose(normalised(units * scale), normalised(units), rtol=1e-4, atol=1e-6)


def test_what_is_no_number_counts_as_zero() -> None:
    units = np.random.default_rng(0).standard_normal((6, 8))
    units[0, 0], units[1, 1] = np.nan, np.inf
    assert np.isfinite(normalised(units)).all()
