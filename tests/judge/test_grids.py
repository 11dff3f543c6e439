"""Grids that quantising leaves are found for any block length, and trained or pruned values stand on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import decode, encode
from lineage.judge.relations.grids import find_grid

Array = NDArray[Any]
NORMAL_FLOAT = np.array([-1, -0.7, -0.53, -0.39, -0.28, -0.18, -0.09, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1])


def weights(rows: int = 60, columns: int = 96, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((rows, columns)) * np.exp(0.4 * rng.standard_normal((rows, 1))), np.float32)


def by_block(values: Array, block: int, change: Callable[[Array], Array]) -> Array:
    flat = values.reshape(-1)
    whole = len(flat) // block * block
    return np.concatenate([change(flat[:whole].reshape(-1, block)).reshape(-1), flat[whole:]]).reshape(values.shape)


def steps(blocks: Array, bits: int) -> Array:
    step = np.abs(blocks).max(axis=-1, keepdims=True) / (2 ** (bits - 1) - 1)
    return np.asarray(np.round(blocks / step) * step)


def normal_float(blocks: Array) -> Array:
    most = np.abs(blocks).max(axis=1, keepdims=True)
    return np.asarray(NORMAL_FLOAT[np.abs((blocks / most)[..., None] - NORMAL_FLOAT).argmin(axis=-1)] * most)


def with_zero_point(blocks: Array) -> Array:
    low, high = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    step = (high - low) / 15
    zero = np.round(-low / step)
    return np.asarray((np.clip(np.round(blocks / step) + zero, 0, 15) - zero) * step)


def short_floats(values: Array, kind: torch.dtype = torch.float8_e4m3fn) -> Array:
    scale = np.abs(values).max() / torch.finfo(kind).max
    return np.asarray(torch.from_numpy(values / scale).to(kind).float().numpy() * scale)


QUANTISED: dict[str, Callable[[Array], Array]] = {
    "8-bit lattices by rows": lambda w: steps(w, 8),
    "8-bit lattices by whole matrices": lambda w: steps(w.reshape(1, -1), 8).reshape(w.shape),
    "4-bit lattices by blocks of 32": lambda w: by_block(w, 32, lambda b: steps(b, 4)),
    "4-bit lattices by blocks of 24": lambda w: by_block(w, 24, lambda b: steps(b, 4)),
    "4-bit lattices by blocks of 48": lambda w: by_block(w, 48, with_zero_point),
    "4-bit codes by blocks of 64": lambda w: by_block(w, 64, normal_float),
    "8-bit floats by whole matrices": short_floats,
}


@pytest.mark.parametrize("word", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("name", QUANTISED)
def test_a_grid_is_named_whatever_stores_it(name: str, word: str) -> None:
    values = np.asarray(QUANTISED[name](weights()), np.float32)
    assert str(find_grid(decode(encode(values, word), word))) == name


@pytest.mark.parametrize("name", QUANTISED)
def test_a_grid_is_told_from_the_values_it_was_rounded_from(name: str) -> None:
    fine = weights()
    coarse = np.asarray(QUANTISED[name](fine), np.float32)
    grid = find_grid(coarse)
    assert grid is not None
    assert grid.rounds(fine, coarse) > 0.99
    assert grid.rounds(weights(seed=1), coarse) < 0.9


@pytest.mark.parametrize("word", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("seed", range(4))
def test_weights_that_are_only_stored_short_stand_on_no_grid(seed: int, word: str) -> None:
    assert find_grid(decode(encode(weights(seed=seed), word), word)) is None


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8])
def test_pruned_weights_stand_on_no_grid(kept: float) -> None:
    values = weights()
    assert find_grid(np.where(np.abs(values) > np.quantile(np.abs(values), 1 - kept), values, 0)) is None


def test_nothing_but_zeros_stands_on_no_grid() -> None:
    assert find_grid(np.zeros((16, 64), np.float32)) is None
