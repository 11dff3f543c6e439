"""Speed of measuring: `pytest -m benchmark tests/benchmarks`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lineage.checkpoint.dtypes import encode
from lineage.measure import compare
from lineage.measure.kernels import choose
from lineage.measure.pairs import BLOCK, QUANTILES
from lineage.measure.plain import PlainKernel
from tests.measure.memory import Memory, numbers, tuned

pytestmark = pytest.mark.benchmark(group="measure")


def _blocks(word: str, n: int) -> tuple[Any, Any]:
    a = numbers(1, n, scale=0.02)
    return encode(a, word), encode(tuned(a, 2), word)


@pytest.mark.benchmark
@pytest.mark.parametrize("make", [choose, PlainKernel])
@pytest.mark.parametrize("word", ["BF16", "F16", "F32"])
def test_sums_of_one_block(benchmark: Callable[..., Any], make: Any, word: str) -> None:
    a, b = _blocks(word, BLOCK)
    kernel = make()
    benchmark(kernel.sums, a, word, b, word, tiny=2.0**-126)


@pytest.mark.benchmark
@pytest.mark.parametrize("word", ["BF16", "F32"])
def test_ranks_and_quantiles_of_a_sample(benchmark: Callable[..., Any], word: str) -> None:
    a, b = _blocks(word, 1 << 20)
    benchmark(choose().order, a, word, b, word, QUANTILES)


@pytest.mark.benchmark
def test_a_checkpoint_of_many_small_tensors(benchmark: Callable[..., Any]) -> None:
    tensors = {
        f"layers.{k % 40}.mlp.experts.{k // 40}.weight": ("BF16", np.full((16, 16), k / 1000)) for k in range(2000)
    }
    a, b = Memory(tensors), Memory(tensors)
    benchmark(compare, a, b, threads=2)
