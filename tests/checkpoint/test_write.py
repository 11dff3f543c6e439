"""Written files are whole or not there, read back as they were, and never replace an input."""

from __future__ import annotations

import json
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.dtypes import STORAGE
from lineage.checkpoint.write import atomic, check_output, write_safetensors
from lineage.errors import InputError

_CODES = np.arange(12, dtype=np.float32).reshape(3, 4)
_SPECS = [("a", "F32", (3, 4)), ("b", "F32", (3, 4))]


def _codes(name: str) -> NDArray[Any]:
    return _CODES + (name == "b")


def _left(folder: Path) -> list[str]:
    return sorted(os.path.relpath(os.path.join(at, f), folder) for at, _, files in os.walk(folder) for f in files)


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
        st.tuples(st.sampled_from(sorted(STORAGE)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=5,
    ),
    st.integers(10, 200),
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, entries: dict[str, tuple[str, list[int]]], shard_bytes: int
) -> None:
    draw = np.random.default_rng(0)
    codes = {
        name: (draw.integers(0, 2, shape) if dtype == "BOOL" else draw.integers(0, 99, shape)).astype(STORAGE[dtype])
        for name, (dtype, shape) in entries.items()
    }
    specs = [(name, dtype, tuple(shape)) for name, (dtype, shape) in entries.items()]
    out = tmp_path_factory.mktemp("out") / "model"
    write_safetensors(out, specs, codes.__getitem__, shard_bytes=shard_bytes)
    with open_checkpoint(out) as checkpoint:
        assert {(s.name, s.dtype, s.shape) for s in checkpoint} == set(specs)
        for name, array in codes.items():
            np.testing.assert_array_equal(checkpoint.codes(name), array)


def test_the_reference_implementation_reads_what_is_written(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", _SPECS, _codes, metadata={"made": "here"})
    with safe_open(tmp_path / "m.safetensors", "np") as file:
        assert file.metadata() == {"made": "here"}
        np.testing.assert_array_equal(file.get_tensor("b"), _CODES + 1)


def test_a_large_model_becomes_a_folder_of_shards_with_an_index(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "m.safetensors", _SPECS, _codes, shard_bytes=60)
    index = json.loads((tmp_path / "m.safetensors" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 96
    assert index["weight_map"]["b"] == "model-00002-of-00002.safetensors"
    with safe_open(tmp_path / "m.safetensors" / "model-00002-of-00002.safetensors", "np") as file:
        assert list(file.keys()) == ["b"]


def test_pieces_are_written_one_after_another(tmp_path: Path) -> None:
    def pieces(name: str) -> Iterator[NDArray[Any]]:
        yield from _codes(name)

    write_safetensors(tmp_path / "m.safetensors", _SPECS, pieces)
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "m.safetensors").tensor("a"), _CODES)


def test_an_existing_folder_gets_the_usual_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_safetensors(tmp_path, _SPECS, _codes)
    assert _left(tmp_path) == ["config.json", "model.safetensors"]
    with pytest.raises(InputError, match="holds weights already"):
        write_safetensors(tmp_path, _SPECS, _codes)


@pytest.mark.parametrize("name", ["m.safetensors", "folder", "new/place/m.safetensors"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_nothing_is_left_when_writing_stops(tmp_path: Path, name: str, error: type[BaseException]) -> None:
    def failing(tensor: str) -> NDArray[Any]:
        if tensor == "b":
            assert _left(tmp_path)
            raise error
        return _CODES

    with pytest.raises(error):
        write_safetensors(tmp_path / name, _SPECS, failing, shard_bytes=60 if name == "folder" else 5e9)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(InputError, match="m.safetensors: the file would become larger") as caught:
            write_safetensors(tmp_path / "m.safetensors", _SPECS, _codes)
        with pytest.raises(InputError, match="t.csv"), atomic(tmp_path / "t.csv") as part:
            part.write_bytes(b"x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_an_input_is_not_replaced_whatever_leads_to_it(tmp_path: Path) -> None:
    source = tmp_path / "folder" / "in.safetensors"
    write_safetensors(source, _SPECS, _codes)
    before = source.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(source)
    os.link(source, tmp_path / "hard.safetensors")
    (tmp_path / "loop").symlink_to(tmp_path / "folder")
    ways = [source, tmp_path / "link.safetensors", tmp_path / "hard.safetensors", tmp_path / "loop" / "in.safetensors"]
    for inputs in ([source], [source.parent]):
        for way in [*ways, source.parent / "." / "in.safetensors"]:
            with pytest.raises(InputError, match="the output is an input"):
                write_safetensors(way, _SPECS, _codes, inputs=inputs)
            with pytest.raises(InputError, match="the output is an input"), atomic(way, inputs=inputs):
                pass
    assert source.read_bytes() == before


def test_another_file_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("old")
    with atomic(tmp_path / "t.txt") as part:
        part.write_text("new")
        assert (tmp_path / "t.txt").read_text() == "old"
    assert (tmp_path / "t.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["t.txt"]


@pytest.mark.parametrize("below", ["sub", "sub/deeper"])
def test_an_output_below_a_file_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "good.safetensors").write_text("x")
    for call in (check_output, lambda out: write_safetensors(out, _SPECS, _codes)):
        with pytest.raises(InputError, match="good.safetensors is a file, not a folder"):
            call(tmp_path / "good.safetensors" / below / "m.safetensors")


def test_a_folder_is_no_file_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="this is a folder"), atomic(tmp_path):
        pass


def test_another_format_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="torch files are read, not written"):
        write_safetensors(tmp_path / "m.pt", _SPECS, _codes)


def test_shards_do_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("x")
    with pytest.raises(InputError, match="2 shards need a folder"):
        write_safetensors(tmp_path / "m.safetensors", _SPECS, _codes, shard_bytes=60)


def test_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    with atomic("/dev/null") as part:
        part.write_text("gone")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="no permission to write"):
        check_output(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("specs", "codes", "message"),
    [
        ([("a", "F32", (2,)), ("a", "F32", (2,))], np.ones(2, np.float32), "twice"),
        ([("a", "F32", (2,))], np.ones(3, np.float32), "12 bytes given, 8 bytes promised"),
        ([("a", "F32", (2,))], np.ones(2), "float64 codes for F32"),
    ],
)
def test_codes_that_break_the_promise_are_a_mistake_of_the_caller(
    tmp_path: Path, specs: Any, codes: NDArray[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "m.safetensors", specs, lambda name: codes)
    assert os.listdir(tmp_path) == []
