"""Digits of row sequences and tilings: what was interleaved is read back, errors and gaps included."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lineage.match.explain import Strides, factors, strides, tile

SIZES = st.lists(st.integers(2, 5), min_size=1, max_size=4)


def shuffled(sizes: list[int], order: list[int]) -> np.ndarray:
    """Row in the whole of each row of a part whose digits the whole holds in another order."""
    rows = np.arange(int(np.prod(sizes))).reshape(sizes).transpose(order)
    back = np.empty(rows.size, np.int64)
    back[rows.ravel()] = np.arange(rows.size)
    return back


@given(SIZES, st.randoms(use_true_random=False))
def test_any_order_of_digits_is_read_back(sizes: list[int], random: object) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = shuffled(sizes, order)
    found = strides(rows)
    assert found is not None
    assert np.array_equal(found.rows(), rows)


@pytest.mark.parametrize("seed", range(5))
def test_a_fifth_of_wrong_and_a_fifth_of_unknown_rows_change_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = shuffled([6, 2, 16], [0, 2, 1])
    spoiled = rows.copy()
    spoiled[rng.random(len(rows)) < 0.2] = -1
    wrong = rng.random(len(rows)) < 0.2
    spoiled[wrong] = rng.integers(0, len(rows), wrong.sum())
    found = strides(spoiled)
    assert found is not None
    assert np.array_equal(found.rows(), rows)


def test_a_random_order_has_no_digits() -> None:
    assert strides(np.random.default_rng(0).permutation(64)) is None


@given(st.integers(1, 4), st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_interleaved_parts_tile_their_whole(groups: int, widths: list[int]) -> None:
    width = sum(widths)
    whole = np.arange(groups * width).reshape(groups, width)
    cuts = np.cumsum([0, *widths])
    parts = [strides(whole[:, cuts[i] : cuts[i + 1]].ravel()) for i in range(len(widths))]
    assert all(p is not None for p in parts)
    tiling = tile([p for p in parts if p is not None], groups * width)
    assert tiling is not None
    assert [tiling.parts[i].width * tiling.groups for i in tiling.order] == [w * groups for w in widths]


def test_parts_that_leave_a_gap_do_not_tile() -> None:
    two = [Strides(strides(np.arange(4)).digits, at, 1.0) for at in (0, 5)]  # type: ignore[union-attr]
    assert tile(two, 9) is None


@given(st.lists(st.integers(2, 4), min_size=1, max_size=5), st.integers(0, 4), st.integers(0, 4))
def test_factors_refine_every_radix(sizes: list[int], cut: int, other: int) -> None:
    def merged(at: int) -> list[int]:
        at = min(at, len(sizes))
        return [int(np.prod(sizes[:at])), *sizes[at:]] if at else list(sizes)

    one, two = merged(cut), merged(other)
    found = factors(one, two)
    assert found is not None
    for radix, place in ((one, 1), (two, 2)):
        for i, n in enumerate(radix):
            assert int(np.prod([f[0] for f in found if f[place] == i])) == n
