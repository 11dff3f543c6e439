"""Number formats of safetensors files that NumPy lacks."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.errors import InputError


def _open(folder: Path, dtype: str, shape: tuple[int, ...], data: bytes) -> Checkpoint:
    head = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    (folder / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
    return open_checkpoint(folder / "m.safetensors")


@pytest.mark.parametrize("word", ["F8_E4M3", "F8_E4M3FN"])
def test_spellings_of_one_format_are_one_word(tmp_path: Path, word: str) -> None:
    checkpoint = _open(tmp_path, word, (2,), b"\x38\xb8")
    assert checkpoint.specs["w"].dtype == "F8_E4M3"
    assert checkpoint.tensor("w").tolist() == [1, -1]


def test_scales_that_are_powers_of_two_are_read(tmp_path: Path) -> None:
    assert _open(tmp_path, "F8_E8M0", (2,), b"\x7f\x80").tensor("w").tolist() == [1, 2]


def test_four_bit_floats_are_read_from_any_element(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path, "F4", (2, 4), b"\x21\x43\x65\x87")
    values = [0.5, 1, 1.5, 2, 3, 4, 6, 0]
    assert checkpoint.tensor("w").reshape(-1).tolist() == values
    for start in range(8):
        for stop in range(start, 9):
            assert checkpoint.read("w", start, stop).tolist() == values[start:stop]
    assert not checkpoint.specs["w"].plain


def test_six_bit_floats_are_listed_and_refused_when_read(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path, "F6_E2M3", (4,), b"\0\0\0")
    assert checkpoint.specs["w"].shape == (4,)
    with pytest.raises(InputError, match="F6_E2M3 is not decoded; convert it"):
        checkpoint.tensor("w")


def test_complex_numbers_are_read_as_pairs(tmp_path: Path) -> None:
    checkpoint = _open(tmp_path, "C64", (2,), np.array([1 + 2j, 3 - 1j], np.complex64).tobytes())
    assert checkpoint.tensor("w").tolist() == [[1, 2], [3, -1]]


def test_any_byte_but_zero_is_true(tmp_path: Path) -> None:
    assert _open(tmp_path, "BOOL", (3,), b"\0\1\7").read_codes("w").view(np.uint8).tolist() == [0, 1, 1]


def test_names_of_any_letters_are_kept(tmp_path: Path) -> None:
    names = ["new\nline", 'quote"\\', "äß中😀", " ", "\u202eabc", "{i}", "a..b", "l" * 4096]
    entries = {n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}
    head = json.dumps(entries | {"__metadata__": {"k": "v"}}, ensure_ascii=False).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(range(8)))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert [checkpoint.tensor(n)[0] for n in names] == list(range(8))
        assert checkpoint.metadata == {"k": "v"}


def test_a_file_without_tensors_opens(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    assert len(open_checkpoint(tmp_path / "m.safetensors")) == 0


@pytest.mark.parametrize("kept", [0, 4])
def test_a_file_of_which_only_the_first_bytes_were_fetched_opens_for_its_header(tmp_path: Path, kept: int) -> None:
    head = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    raw = struct.pack("<Q", len(head)) + head + b"\0" * kept
    for number in (1, 2):
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(raw.replace(b"w", b"%d" % number, 1))
    with pytest.raises(InputError, match="it was cut short"):
        open_checkpoint(tmp_path)
    opened = open_checkpoint(tmp_path, headers=True)
    assert {spec.name: spec.shape for spec in opened} == {"1": (2,), "2": (2,)}
    with pytest.raises(InputError):
        opened.tensor("1")
