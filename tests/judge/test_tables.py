from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.judge.tables import banded, diagonal, sinusoidal, uniform


def sinusoids(positions: int, channels: int) -> NDArray[Any]:
    angle = np.arange(positions)[:, None] / 10_000 ** (np.arange(channels // 2) / (channels // 2))
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def noise(*shape: int, seed: int = 0) -> NDArray[Any]:
    return np.random.default_rng(seed).standard_normal(shape)


def test_sines_and_cosines_are_a_table() -> None:
    assert sinusoidal(sinusoids(64, 32))


def test_interleaved_and_rounded_sinusoids_are_a_table() -> None:
    table = sinusoids(64, 32).reshape(64, 2, 16).swapaxes(1, 2).reshape(64, 32)
    assert sinusoidal(table.astype(np.float16))


def test_a_table_over_two_directions_is_a_table() -> None:
    one = sinusoids(14, 32)
    grid = np.concatenate([np.repeat(one, 14, axis=0), np.tile(one, (14, 1))], axis=1)
    assert sinusoidal(grid)


def test_trained_positions_are_no_table() -> None:
    assert not sinusoidal(noise(64, 32))


def test_rows_that_never_got_a_gradient_are_no_table() -> None:
    assert not sinusoidal(noise(1, 32) + 0.001 * noise(200, 32))


def test_few_positions_are_never_taken_for_a_table() -> None:
    assert not sinusoidal(sinusoids(6, 32))


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_an_identity_shows_through_noise(size: float) -> None:
    assert diagonal(0.05 * noise(256, 64) + size * np.tile(np.eye(64), (4, 1)))


def test_an_identity_shows_in_sampled_rows_and_columns() -> None:
    columns = np.arange(0, 512, 2)
    whole = 0.05 * noise(512, 512) + np.eye(512)
    assert diagonal(whole[100:300][:, columns], np.arange(100, 300), columns, period=512)


@pytest.mark.parametrize("seed", range(200))
def test_heavy_tails_are_no_identity(seed: int) -> None:
    assert not diagonal(np.random.default_rng(seed).standard_t(2, (24, 24)))


def test_overlapping_windows_in_order_are_a_bank_of_filters_either_way_round() -> None:
    windows = np.exp(-(np.subtract.outer(np.arange(24) * 4, np.arange(96)) ** 2) / 40)
    assert banded(windows)
    assert banded(windows[::-1])


@pytest.mark.parametrize("seed", range(50))
def test_trained_rows_are_no_bank_of_filters(seed: int) -> None:
    assert not banded(np.random.default_rng(seed).standard_t(2, (32, 80)))


def test_rows_of_one_value_are_no_bank_of_filters() -> None:
    assert not banded(np.ones((32, 80)))


def test_signs_are_of_one_size_and_ternary_weights_are_not() -> None:
    signs = np.sign(noise(32, 32))
    assert uniform(signs)
    assert not uniform(signs * (noise(32, 32, seed=1) > 0))
