"""The nearest row of many."""

from __future__ import annotations

import numpy as np
import pytest

from lineage.match import nearest
from lineage.match.nearest import highest


def _unit(values: np.ndarray) -> np.ndarray:
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize(("noise", "strangers"), [(0.0, 0), (0.05, 0), (0.05, 40), (1.0, 0), (0.05, 500)])
def test_near_copies_among_many_rows_are_those_that_all_products_give(
    monkeypatch: pytest.MonkeyPatch, noise: float, strangers: int
) -> None:
    rng = np.random.default_rng(0)
    theirs = rng.standard_normal((2000, 64))
    theirs[7] = theirs[1200]  # equal rows: the first one counts
    wanted = rng.permutation(2000)[:600]
    copies = theirs[wanted] + noise * rng.standard_normal((600, 64))
    mine = np.concatenate([copies, rng.standard_normal((strangers, 64))])
    every = highest(_unit(mine), _unit(theirs))
    monkeypatch.setattr(nearest, "MOST_PRODUCTS", 1)
    some = highest(_unit(mine), _unit(theirs))
    np.testing.assert_array_equal(some[0], every[0])
    np.testing.assert_allclose(some[1], every[1], rtol=1e-5)


@pytest.mark.parametrize("layout", ["stacked", "alternating", "interleaved", "shuffled"])
def test_runs_of_rows_that_noise_blurred_are_found_beside_their_neighbours(
    monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    rng = np.random.default_rng(1)
    theirs = rng.standard_normal((4096, 96)).astype(np.float32)
    orders = {
        "stacked": np.roll(np.arange(4096), 1024),
        "alternating": np.arange(4096).reshape(2, -1).T.ravel(),
        "interleaved": np.arange(4096).reshape(64, -1).T.ravel(),
        "shuffled": rng.permutation(4096),
    }
    mine = theirs[orders[layout]] + 0.7 * rng.standard_normal(theirs.shape)
    every = highest(_unit(mine), _unit(theirs))
    products = []
    plain = nearest._by_products
    monkeypatch.setattr(nearest, "MOST_PRODUCTS", 1)

    def counted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        products.append(len(x) * len(y))
        return plain(x, y)

    monkeypatch.setattr(nearest, "_by_products", counted)
    some = highest(_unit(mine), _unit(theirs))
    np.testing.assert_array_equal(some[0], every[0])
    np.testing.assert_array_equal(every[0], orders[layout])
    assert sum(products) < len(mine) * len(theirs) * (1.3 if layout in ("interleaved", "shuffled") else 0.4)
