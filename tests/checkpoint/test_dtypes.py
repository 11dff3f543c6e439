"""Codes and values of the small number formats agree with ml_dtypes (0.6.0)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lineage.checkpoint.dtypes import FLOATS, STORAGE, TINY, decode, decode_packed, encode, itemsize

ORACLES: dict[str, Any] = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F16": np.float16,
}


@pytest.mark.parametrize("word", ORACLES)
def test_every_code_decodes_to_its_value(word: str) -> None:
    codes = np.arange(256 ** itemsize(word)).astype(STORAGE[word] if word != "F16" else np.uint16)
    with np.errstate(invalid="ignore"):
        expected = codes.view(ORACLES[word]).astype(np.float32)
        found = decode(codes.view(STORAGE[word]), word)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("word", ORACLES)
def test_values_round_to_the_nearest_code(word: str) -> None:
    draw = np.random.default_rng(2)
    special = [0.0, -0.0, np.nan, np.inf, -np.inf, 448, 464, 465, 57344, 61440, 61439, 240, 248, 247.9, 1.5, 3.0, 6.0]
    values = np.concatenate([draw.standard_normal(5000) * 10 ** draw.uniform(-6, 6, 5000), special]).astype(np.float32)
    with np.errstate(all="ignore"):
        expected = values.astype(ORACLES[word]).astype(np.float32)
        found = decode(encode(values, word), word)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("word", ORACLES)
def test_the_smallest_normal_number_is_that_of_the_format(word: str) -> None:
    info: Any = np.finfo if word == "F16" else ml_dtypes.finfo
    assert TINY[word] == float(info(ORACLES[word]).smallest_normal)


def test_every_float_has_a_smallest_normal_number() -> None:
    assert set(FLOATS) == set(TINY)


def test_four_bit_floats_lie_low_half_first() -> None:
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(decode_packed((codes[::2] | (codes[1::2] << 4)).astype(np.uint8), "F4"), expected)
    with pytest.raises(ValueError, match="not decoded"):
        decode_packed(codes, "F6_E2M3")


def test_an_unknown_word_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        decode(np.zeros(1), "X")
