"""Kernels: NumPy against plain formulas, C and torch against NumPy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import TINY, decode, encode
from lineage.errors import InputError
from lineage.measure.device import DeviceKernel
from lineage.measure.kernels import Kernel, choose
from lineage.measure.metrics import AT, figures
from lineage.measure.pairs import QUANTILES
from lineage.measure.plain import PlainKernel, finite_pairs
from tests.measure import oracle
from tests.measure.memory import numbers, tuned

FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")


def _others() -> Iterator[Any]:
    """Every kernel beside NumPy's that works here; C with each instruction set that this processor has."""
    try:
        from lineage.measure.native import NativeKernel
    except ImportError:
        yield pytest.param(None, marks=pytest.mark.skip("the C kernel was not built"))
    else:
        for level in range(NativeKernel().level + 1):
            yield pytest.param(lambda level=level: NativeKernel(level), id=f"native-{level}")
    yield pytest.param(lambda: DeviceKernel("cpu"), id="torch-cpu")
    yield pytest.param(lambda: DeviceKernel("cuda"), id="torch-cuda", marks=pytest.mark.gpu)


def _pair(word_a: str, word_b: str, n: int, *, broken: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    a = numbers(1, n, scale=0.05)
    b = tuned(a, 2)
    a[::17] = 0.0
    b[::34] = -0.0
    a[5::40] = 1e-6
    if broken:
        a[3::50], b[4::50], b[7::60], a[9::50], b[9::50] = np.nan, np.inf, -np.inf, np.nan, np.nan
    return encode(a, word_a), encode(b, word_b)


def _figures(kernel: Kernel, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str) -> dict[str, Any]:
    sums = kernel.sums(a, word_a, b, word_b, tiny=TINY[word_a])
    clean_a, clean_b = finite_pairs(a, word_a, b, word_b)
    return msgspec.structs.asdict(figures(sums, kernel.order(clean_a, word_a, clean_b, word_b, QUANTILES)))


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("word_b", FLOATS)
@pytest.mark.parametrize("word_a", FLOATS)
def test_numpy_kernel_agrees_with_plain_formulas(word_a: str, word_b: str, broken: bool) -> None:
    a, b = _pair(word_a, word_b, 3001, broken=broken)
    found = _figures(PlainKernel(), a, word_a, b, word_b)
    expected = oracle.figures(decode(a, word_a), decode(b, word_b), TINY[word_a])
    for name, value in expected.items():
        assert _close(found[name], value, 1e-6 if name[0] == "q" else 1e-11), name


def _close(found: float | None, value: float | None, relative: float) -> bool:
    """Both undefined, or equal to rounding."""
    if found is None or value is None:
        return found is value
    return bool(found == pytest.approx(value, rel=relative, abs=1e-12))


@pytest.mark.parametrize("n", [1, 2, 777, 6001])
@pytest.mark.parametrize("make", [*_others()])
def test_every_kernel_agrees_with_numpy(make: Any, n: int) -> None:
    kernel, plain = make(), PlainKernel()
    for word_a in FLOATS:
        for word_b in FLOATS:
            for broken in (False, True):
                a, b = _pair(word_a, word_b, n, broken=broken)
                found, expected = (_figures(k, a, word_a, b, word_b) for k in (kernel, plain))
                for name, value in expected.items():
                    assert _close(found[name], value, 1e-11), (word_a, word_b, name)


@pytest.mark.parametrize("make", [*_others()])
def test_sums_of_equal_blocks_have_equal_bits_on_both_sides(make: Any) -> None:
    for word in FLOATS:
        a = encode(numbers(3, 5000), word)
        sums = make().sums(a, word, a.copy(), word, tiny=TINY[word])
        assert sums[AT["aa"]] == sums[AT["bb"]] == sums[AT["ab"]]
        assert sums[AT["changed"]] == sums[AT["max_d"]] == sums[AT["rel"]] == 0


@pytest.mark.parametrize("make", [*_others()])
def test_same_nan_is_no_difference_and_nan_against_a_number_is_one(make: Any) -> None:
    a = np.array([0x7FC0, 0x7FC1, 0x7F80, 0x3F80, 0x7FC0], np.uint16)
    b = np.array([0x7FC0, 0x7FC0, 0x7F80, 0x7FC0, 0x3F80], np.uint16)
    for kernel in (make(), PlainKernel()):
        sums = kernel.sums(a, "BF16", b, "BF16", tiny=TINY["BF16"])
        assert (sums[AT["n"]], sums[AT["nan_a"]], sums[AT["nan_b"]], sums[AT["other"]]) == (0, 4, 4, 3)


@pytest.mark.parametrize("make", [*_others()])
def test_largest_differences_of_bf16_overflow_to_null_not_to_nan(make: Any) -> None:
    a = encode(np.full(5000, -3e38, np.float32), "BF16")
    b = encode(np.full(5000, 3e38, np.float32), "BF16")
    for kernel in (make(), PlainKernel()):
        found = _figures(kernel, a, "BF16", b, "BF16")
        assert found["q50"] is None
        assert found["max_abs"] == pytest.approx(6e38, rel=0.01)
        assert all(v is None or math.isfinite(v) for v in found.values())


@pytest.mark.parametrize("word", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("make", [*_others()])
def test_rounding_is_told_from_change(make: Any, word: str) -> None:
    fine = np.concatenate(
        [numbers(4, 4000), numbers(5, 1000, scale=1e-5), np.array([0.0, -0.0, 70000.0, np.nan], np.float32)]
    )
    codes = encode(fine, word)
    other = codes.copy()
    other.view(f"u{other.itemsize}")[2] ^= 1
    for kernel in (make(), PlainKernel()):
        assert kernel.equal_when_rounded(fine, codes, word)
        assert not kernel.equal_when_rounded(fine, other, word)


@pytest.mark.parametrize("make", [*_others()])
def test_concentrated_differences_keep_exact_quantiles(make: Any) -> None:
    a = np.zeros(20000, np.float32)
    b = np.zeros(20000, np.float32)
    b[:150] = 1.0
    b[150:220] = np.linspace(1.0, 1.001, 70)
    for kernel in (make(), PlainKernel()):
        found = kernel.order(a, "F32", b, "F32", (0.0, 0.5, 0.99, 0.995, 1.0)).quantiles
        assert found == pytest.approx(np.quantile(b, [0.0, 0.5, 0.99, 0.995, 1.0]).tolist(), abs=1e-12)


@pytest.mark.parametrize("word", ["I8", "U8", "I16", "I32", "I64", "U64", "BOOL"])
def test_integers_are_measured_by_value(word: str) -> None:
    a = np.arange(100).astype(encode(np.zeros(1), word).dtype)
    b = a.copy()
    b[7] = 0
    sums = PlainKernel().sums(a, word, b, word, tiny=1.0)
    assert sums[AT["changed"]] == 1
    assert sums[AT["max_d"]] == float(a[7])


def test_large_integers_differ_though_float64_cannot_tell() -> None:
    a = np.array([2**60], np.int64)
    assert PlainKernel().sums(a, "I64", a + 1, "I64", tiny=1.0)[AT["changed"]] == 1


def test_unknown_device_is_an_input_error() -> None:
    with pytest.raises(InputError, match="use cpu or cuda"):
        choose("tpu")


def test_device_without_gpu_is_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device; use --device cpu"):
        choose("cuda")


def test_without_the_c_library_numpy_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lineage.measure.native", None)
    assert choose().name == "numpy"
