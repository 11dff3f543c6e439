"""Singular values of B - A: ranks that rounding cannot make, shares of leading directions, effective ranks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Rearrange
from lineage.measure import spectrum as module
from lineage.measure.diff import diff
from lineage.measure.spectrum import LEADING, Spectrum, effective_rank, rounding_variance, spectrum
from tests.measure.memory import Memory, Quantised, numbers


def _found(x: NDArray[Any], y: NDArray[Any], word: str = "F32", **options: Any) -> Spectrum | None:
    return spectrum(Memory({"w": (word, x)}), Memory({"w": (word, y)}), "w", **options)


def _low(seed: int, rows: int, columns: int, rank: int, size: float) -> NDArray[np.float32]:
    """A product of two thin matrices whose values have the deviation `size`."""
    return np.asarray(numbers(seed, rows, rank) @ numbers(seed + 1, rank, columns) * size / math.sqrt(rank), np.float32)


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix counts as large."""
    monkeypatch.setattr(module, "WHOLE", 0)


@pytest.mark.parametrize("word", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96), (640, 700)])
def test_a_merged_adapter_of_rank_4_shows_4_directions_above_rounding(word: str, shape: tuple[int, int]) -> None:
    x = numbers(1, *shape, scale=0.02)
    found = _found(x, x + _low(2, *shape, 4, 0.002), word)
    assert found is not None
    assert found.rank_above_rounding == 4
    assert found.leading[1] > 0.98


def test_rounding_alone_has_no_rank() -> None:
    x = numbers(1, 300, 200, scale=0.02)
    heavy = x * np.exp(2 * numbers(2, 300, 1))  # a few rows carry most of the rounding
    for values in (x, heavy):
        found = spectrum(Memory({"w": ("F32", values)}), Memory({"w": ("BF16", values)}), "w")
        assert found is not None
        assert found.rank_above_rounding == 0


def test_white_noise_has_every_direction() -> None:
    x = numbers(1, 90, 60)
    found = _found(x, x + numbers(2, 90, 60))
    assert found is not None
    assert (found.rank_above_rounding, found.size, found.exact) == (60, 60, True)
    assert found.effective_rank > 50


def test_equal_matrices_vectors_and_counters_have_no_spectrum() -> None:
    x = numbers(1, 8, 8)
    assert _found(x, x) is None
    assert _found(numbers(1, 8), numbers(2, 8)) is None
    assert _found(np.arange(16).reshape(4, 4), np.ones((4, 4), np.int64), "I64") is None


def test_figures_of_small_matrices_are_those_of_their_singular_values() -> None:
    x, y = numbers(1, 30, 70), numbers(2, 30, 70)
    values = np.linalg.svd(y.astype(np.float64) - x, compute_uv=False)
    found = _found(x, y)
    assert found is not None
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), abs=1e-3)
    wanted = [float((values[:k] ** 2).sum() / (values**2).sum()) for k in LEADING]
    assert found.leading == pytest.approx(wanted, abs=2e-6)


@pytest.mark.parametrize("shape", [(500, 300), (300, 500)])
@pytest.mark.parametrize("held", [0, 1 << 20])
def test_large_matrices_come_out_alike_whether_held_or_read_in_blocks(
    shape: tuple[int, int], held: int, projected: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", 1 << 14)
    x = numbers(1, *shape)
    y = x + (numbers(2, shape[0], 300) * np.exp(-0.03 * np.arange(300))) @ numbers(3, 300, shape[1])
    found = _found(x, np.asarray(y, np.float32), held=held)
    values = np.linalg.svd(np.asarray(y, np.float32).astype(np.float64) - x, compute_uv=False)
    assert found is not None
    assert not found.exact
    assert found.effective_rank == pytest.approx(effective_rank(values), rel=0.03)
    wanted = [float((values[:k] ** 2).sum() / (values**2).sum()) for k in LEADING]
    assert found.leading == pytest.approx(wanted, abs=0.002)


def test_large_white_noise_is_full_and_low_ranks_are_counted_exactly(projected: None) -> None:
    x = numbers(1, 400, 600, scale=0.02)
    noise = _found(x, x + numbers(2, 400, 600))
    assert noise is not None
    assert noise.rank_above_rounding == noise.size == 400
    assert noise.effective_rank == pytest.approx(
        effective_rank(np.linalg.svd(numbers(2, 400, 600), compute_uv=False)), rel=0.02
    )
    merged = _found(x, x + _low(3, 400, 600, 4, 0.002), "BF16")
    assert merged is not None
    assert merged.rank_above_rounding == 4


def test_a_seed_gives_the_same_figures_again(projected: None) -> None:
    x, y = numbers(1, 200, 300), numbers(2, 200, 300)
    assert _found(x, y, seed=3) == _found(x, y, seed=3)


def test_elements_that_are_not_finite_count_as_equal() -> None:
    x = numbers(1, 20, 20)
    y = x.copy()
    y[0], y[1, 1] = np.nan, 5.0
    found = _found(x, y)
    assert found is not None
    assert (found.rank_above_rounding, found.leading[0]) == (1, 1.0)


def test_kernels_and_stacks_are_cut_where_they_are_widest() -> None:
    x = numbers(1, 24, 16, 3, 3)
    kernel = _found(x, x + _low(2, 24, 144, 4, 0.1).reshape(x.shape))
    assert kernel is not None
    assert (kernel.size, kernel.rank_above_rounding) == (24, 4)
    stack = _found(numbers(1, 3, 40, 30), numbers(2, 3, 40, 30))
    assert stack is not None
    assert stack.size == 30


def test_ranks_of_quantised_tensors_are_not_told() -> None:
    x = numbers(1, 20, 20)
    found = spectrum(Memory({"w": ("F32", x)}), Quantised({"w": ("F32", x + numbers(2, 20, 20))}), "w")
    assert found is not None
    assert found.rank_above_rounding is None


@pytest.mark.parametrize("word", ["BF16", "F16"])
def test_rounding_errors_have_the_variance_that_is_expected(word: str) -> None:
    x = numbers(1, 100_000)
    stored = Memory({"w": (word, x)}).tensor("w")
    expected = rounding_variance(x, word)
    assert expected is not None
    assert float(((stored - x) ** 2).sum()) == pytest.approx(float(expected.sum()), rel=0.02)


def test_the_comparison_carries_spectra_only_where_asked() -> None:
    x = numbers(1, 12, 18)
    a, b = (Memory({"w": ("F32", x), "v": ("F32", x), "n": ("F32", x[0])}),
            Memory({"w": ("F32", x + _low(2, 12, 18, 2, 0.1)), "v": ("F32", x), "n": ("F32", x[1])}))  # fmt: skip
    assert all("spectrum" not in row for row in diff(a, b).to_dict()["tensors"])
    found = {row["name"]: row["spectrum"] for row in diff(a, b, spectra=True).to_dict()["tensors"]}
    assert (found["v"], found["n"]) == (None, None)
    assert (found["w"]["rank_above_rounding"], found["w"]["size"]) == (2, 12)
    assert list(diff(a, b, spectra=True).to_pandas()["rank_above_rounding"].dropna()) == [2]


def test_spectra_are_those_of_the_layout_that_a_mapping_makes() -> None:
    x = numbers(1, 12, 18)
    a, b = Memory({"w": ("F32", x.T.copy())}), Memory({"renamed": ("F32", x + _low(2, 12, 18, 2, 0.1))})
    mapping = Mapping(rules=(Rule(to=("renamed",), source=("w",), ops=(Rearrange("a b -> b a"),)),))
    row = diff(a, b, mapping=mapping, spectra=True).comparison.rows[0]
    assert isinstance(row.spectrum, Spectrum)
    assert row.spectrum.rank_above_rounding == 2


def test_threads_change_no_figure() -> None:
    a = Memory({f"w{k}": ("F32", numbers(k, 40, 30)) for k in range(6)})
    b = Memory({f"w{k}": ("F32", numbers(k + 9, 40, 30)) for k in range(6)})
    one, two = (diff(a, b, spectra=True, threads=n).to_dict()["tensors"] for n in (1, 3))
    assert one == two
