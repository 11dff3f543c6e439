"""Broken and hostile files: one line that names the file and the cause, nothing run, nothing huge allocated."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lineage.checkpoint import open_checkpoint
from lineage.errors import InputError
from tests.checkpoint import samples


def _pack(head: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _entry(dtype: str = "F32", shape: Any = (4, 4), span: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


_TWICE = (
    b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"w":{"dtype":"F32","shape":[4],"data_offsets":[16,32]}}'
)
_ESCAPED = _TWICE.replace(b'},"w"', b'},"\\u0077"')
_DATA = b"\0" * 64

SAFETENSORS = {
    "only 7 bytes": b"1234567",
    "the file is empty": b"",
    "the header should take 18.4 EB": _pack({"w": _entry()}, _DATA, 2**64 - 1),
    "the header is not JSON": _pack(b"{'w': oops", _DATA),
    "a JSON list": _pack([1, 2], _DATA),
    "nested too deep": _pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "not UTF-8": _pack(b'{"\xff\xfe": 1}'),
    'unknown dtype "BF17"; did you mean "BF16"': _pack({"w": _entry("BF17")}, _DATA),
    '"w" and "v" overlap': _pack({"w": _entry(), "v": _entry(span=(32, 96))}, b"\0" * 96),
    "data from byte 64 to 0": _pack({"w": _entry(span=(64, 0))}, _DATA),
    "of shape (4, 5) takes 80 bytes, the header gives it 64": _pack({"w": _entry(shape=(4, 5))}, _DATA),
    "takes 295 EB": _pack({"w": _entry(shape=(2**33, 2**33))}, _DATA),
    "has a negative length": _pack({"w": _entry(shape=(-4, -4))}, _DATA),
    "lists 64 bytes of tensors, the file holds 40 bytes; fetch it again": _pack({"w": _entry()}, _DATA[:40]),
    "something was appended": _pack({"w": _entry()}, _DATA + b"tail"),
    "8 bytes before": _pack({"w": _entry(span=(8, 72))}, b"\0" * 72),
    'lists "w" twice': _pack(_TWICE, _DATA[:32]),
    'the header lists "w" twice': _pack(_ESCAPED, _DATA[:32]),
    "no dtype, shape or data_offsets": _pack({"w": {"dtype": "F32"}}, _DATA),
    "no array can have": _pack({"w": _entry(shape=(0, 2**40, 2**40), span=(0, 0))}),
    "can have 70 axes": _pack({"w": _entry(shape=[1] * 70, span=(0, 4))}, _DATA[:4]),
    "entry \"w\" is broken": _pack({"w": _entry(shape=(4.5, 4))}, _DATA),
    "a number has thousands of digits": _pack(b'{"w":{"dtype":"F32","shape":[1' + b"0" * 5000 + b"]}}", _DATA),
    "__metadata__ is not a table": _pack({"__metadata__": 7, "w": _entry()}, _DATA),
    "git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4976698672\n",
    "a web page": b"  <!DOCTYPE html><html><body>404</body></html>",
    "a gzip archive; unpack it": b"\x1f\x8b\x08" + b"\0" * 64,
    "an XML answer": b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
}  # fmt: skip


def _gguf(tensors: int, keys: int, tail: bytes = b"", magic: bytes = b"GGUF", version: int = 3) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys) + tail


def _text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _info(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def _key(name: bytes, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


_ROOM = b"\0" * 4096
GGUF = {
    "begins with b'GGUX'": _gguf(1, 0, _ROOM, magic=b"GGUX"),
    "only 10 bytes": b"GGUF\3\0\0\0\0\0",
    "announces 1,152,921,504,606,846,976 tensors": _gguf(2**60, 0, _ROOM),
    "announces 4,611,686,018,427,387,904 keys": _gguf(1, 2**62, _ROOM),
    "data up to byte": _gguf(1, 1, _text(b"general.name", 2**50) + _ROOM),
    "up to 1.1 TB": _gguf(1, 0, _info(b"w", (64, 64), 2, 2**40) + _ROOM),
    "version 77": _gguf(0, 0, _ROOM, version=77),
    "big-endian": _gguf(0, 0, _ROOM, version=3 << 24),
    "announces 72,057,594,037,927,936 list entries": _gguf(0, 1, _key(b"k", 9, struct.pack("<IQ", 8, 2**56)) + _ROOM),
    "value of unknown type 99": _gguf(0, 1, _key(b"k", 99, b"") + _ROOM),
    "a tensor with 1000 axes": _gguf(1, 0, _text(b"w") + struct.pack("<I", 1000) + _ROOM),
    "of unknown type 77": _gguf(1, 0, _info(b"w", (32,), 77) + _ROOM),
    "does not fill blocks of 32": _gguf(1, 0, _info(b"w", (33,), 2) + _ROOM),
    "is larger than any file": _gguf(1, 0, _info(b"w", (2**40, 2**40)) + _ROOM),
    'lists "w" twice': _gguf(2, 0, _info(b"w", (4,)) + _info(b"w", (4,), 0, 32) + _ROOM),
    '"v" overlap': _gguf(2, 0, _info(b"w", (64,)) + _info(b"v", (64,), 0, 32) + _ROOM),
    "general.alignment is": _gguf(0, 1, _key(b"general.alignment", 4, struct.pack("<I", 0)) + _ROOM),
}


def _npy(header: str, raw: bytes = b"") -> bytes:
    text = header.encode()
    text += b" " * ((-len(text) - 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + raw


def _declared(shape: object, descr: object = "<f4", raw: bytes = _DATA) -> bytes:
    return _npy(repr({"descr": descr, "fortran_order": False, "shape": shape}), raw)


NPY = {
    "declares 4 TB of data, the file holds 64 bytes": _declared((10**12,)),
    "holds pickled Python objects": _declared((1,), "|O"),
    "holds elements of type": _declared((16,), "<U1"),
    "an array larger than any file": _declared((2**40, 2**40)),
    "has no valid array header": _npy("{'descr': " + "(" * 3000),
    '"array" has no valid array header': _declared((-4,)),
    "no valid array header; fetch": b"\x93NUMPY\x09\x00" + _ROOM,
}


def _refused(path: Path) -> str:
    """The line that refuses the file; it names it and is one line."""
    with pytest.raises(InputError) as caught:
        samples.read_everything(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("cause", SAFETENSORS)
def test_a_broken_safetensors_file_is_refused_with_its_cause(tmp_path: Path, cause: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(SAFETENSORS[cause])
    assert cause in _refused(path)


@pytest.mark.parametrize("cause", GGUF)
def test_a_broken_gguf_file_is_refused_with_its_cause(tmp_path: Path, cause: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GGUF[cause])
    assert cause in _refused(path)


@pytest.mark.parametrize("cause", NPY)
@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_numpy_file_is_refused_with_its_cause(tmp_path: Path, cause: str, packed: bool) -> None:
    path = tmp_path / ("model.npz" if packed else "model.npy")
    path.write_bytes(NPY[cause])
    if packed:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("array.npy", NPY[cause])
    assert cause in _refused(path)


class _Bomb:
    def __init__(self, call: Any, *args: Any) -> None:
        self._made = (call, args)

    def __reduce__(self) -> Any:
        return self._made


def _pickled(value: Any, protocol: int) -> bytes:
    return pickle.dumps(value, protocol)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_that_wants_to_run_code_is_refused_and_nothing_is_run(
    tmp_path: Path, protocol: int, zipped: bool
) -> None:
    marker, path = tmp_path / "marker", tmp_path / "pytorch_model.bin"
    for call, args in (
        (open, (str(marker), "w")),
        (os.system, (f"touch {marker}",)),
        (exec, ("1",)),
        (getattr, (1, "x")),
    ):
        data = _pickled({"w": _Bomb(call, *args)}, protocol)
        path.write_bytes(data)
        if zipped:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", data)
        assert "wants to run" in _refused(path)
        assert not marker.exists()


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"\x80\x02r\xff\xff\xff\xff.", "not a valid pickle"),
        (b"\x80\x02]r\xff\xff\xff\xff.", "not one that torch wrote"),
        (b"\x80\x02\x8d" + struct.pack("<Q", 2**60), "ends early"),
        (b"\x80\x02X" + struct.pack("<I", 2**31), "ends early"),
        (b"\x80\x02" + b"(" * 1000 + b".", "not one that torch wrote"),
        (b"\x80\x02" + b"]" * 100 + b"a" * 98 + b".", "not one that torch wrote"),
        (b"\x80\x02N" + b"\x85" * 300_000 + b"}" + b"Nsu.", "not a valid pickle"),
        (b"\x80\x09N.", "not a valid pickle (ValueError: protocol 9)"),
        (b"\x80\x02c__builtin__\neval\n.", "wants to run __builtin__.eval"),
        (b"\x80\x02ctorch.hub\nload\n(tR.", "wants to run torch.hub.load"),
        (b"\x80\x02cnumpy\nload\n(tR.", "wants to run numpy.load"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "wants to run os.system"),
        (b"(S'echo'\nios\nsystem\n.", "not a known weights format"),
        (b"\x80\x02(S'echo'\nios\nsystem\n.", "wants to run os.system"),
        (b"\x80\x02U\x01xQ.", "a persistent id that is no storage"),
    ],
)  # fmt: skip
def test_a_hostile_pickle_is_refused(tmp_path: Path, data: bytes, cause: str) -> None:
    path = tmp_path / ("model.pt" if data[:1] == b"\x80" else "model.weights")
    path.write_bytes(data)
    assert cause in _refused(path)


def _torch_zip(path: Path, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], count: int = 4) -> None:
    """A zip of torch with one tensor `w` over a storage of `count` floats, of which 16 bytes are there."""

    def integers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x09" + value.to_bytes(9, "little", signed=True) for value in values) + b"t"

    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + integers((count,))[1:-1] + b"tQ"
    view = storage + integers((offset,))[1:-1] + integers(shape) + integers(strides) + b"\x89N"
    data = b"\x80\x02}U\x01wctorch._utils\n_rebuild_tensor_v2\n(" + view + b"tRs."
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", data)
        archive.writestr("m/data/0", b"\0" * 16)


@pytest.mark.parametrize(
    ("tensor", "cause"),
    [
        ((0, (2, 3), (3, 1)), "reaches beyond its storage"),
        ((3, (2,), (1,)), "reaches beyond its storage"),
        ((0, (2,), (2**40,)), "reaches beyond its storage"),
        ((0, (2**40,), (0,)), "is larger than its storage"),
        ((0, (2**61, 2**61), (0, 0)), "is larger than its storage"),
        ((-1, (2,), (1,)), "impossible numbers"),
        ((0, (2,), (-1,)), "impossible numbers"),
        ((0, (2, 2), (1,)), "impossible axes"),
        ((0, (8,), (1,), 8), 'storage "0" should hold 32 bytes, it holds 16 bytes'),
    ],
)
def test_a_torch_tensor_outside_its_storage_is_refused(tmp_path: Path, tensor: Any, cause: str) -> None:
    path = tmp_path / "model.pt"
    _torch_zip(path, *tensor)
    assert cause in _refused(path)


def test_a_small_torch_zip_made_by_hand_is_read(tmp_path: Path) -> None:
    _torch_zip(tmp_path / "model.pt", 0, (2, 2), (2, 1))
    assert open_checkpoint(tmp_path / "model.pt").tensor("w").tolist() == [[0, 0], [0, 0]]


def test_a_deflated_description_that_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("m/data.pkl", "w") as member:
        for _ in range(260):
            member.write(b"}" * 2**20)
    tracemalloc.start()
    assert "a description of 273 MB" in _refused(path)
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_things_that_are_no_files_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    begun = time.monotonic()
    assert "named pipe" in _refused(tmp_path / "pipe.safetensors")
    assert "symbolic link that leads to itself" in _refused(tmp_path / "loop.safetensors")
    assert "no weights in this folder" in _refused(tmp_path / "folder.safetensors")
    assert "a device" in _refused(Path("/dev/null"))
    assert "no such file" in _refused(tmp_path / "nowhere" / "model.safetensors")
    assert "is a file, not a folder" in _refused(Path(__file__) / "model.safetensors")
    assert "the name is too long" in _refused(tmp_path / ("x" * 300))
    assert time.monotonic() - begun < 5


def test_a_path_with_a_zero_byte_is_refused() -> None:
    with pytest.raises(InputError, match="not a path"):
        open_checkpoint("a\0b")


def test_an_address_is_refused_with_a_remedy() -> None:
    with pytest.raises(InputError, match="download it"):
        open_checkpoint("https://example.org/model.safetensors")


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("model.xyz", b"\1\2\3\4" * 64, "formats read: safetensors, torch, gguf, numpy"),
        ("model.h5", b"\x89HDF\r\n\x1a\n" + _ROOM, "an HDF5 (Keras) file, which is not read; convert it"),
        ("model.onnx", b"\x08\x07" + _ROOM, "an ONNX model, which is not read"),
    ],
)
def test_a_format_that_is_not_read_is_named(tmp_path: Path, name: str, data: bytes, cause: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert cause in _refused(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "locked.safetensors"
    path.write_bytes(_pack({"w": _entry()}, _DATA))
    path.chmod(0)
    assert "no permission" in _refused(path)


def test_an_escape_sequence_in_a_name_does_not_reach_the_message(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(_pack({"\x1b[2J": _entry("X")}, _DATA))
    assert "\x1b" not in _refused(path)


@pytest.mark.parametrize("writer", [w for writers in samples.WRITERS.values() for w in writers])
def test_random_damage_is_read_or_refused_and_nothing_else(tmp_path: Path, writer: Any) -> None:
    path = writer(tmp_path).path
    data, draw = path.read_bytes(), random.Random(3)
    target = tmp_path / f"damaged{path.suffix}"
    for _ in range(60):
        damaged = bytearray(data)
        reach = draw.choice([60, 600, len(data)])
        for _ in range(draw.choice([1, 2, 8])):
            damaged[draw.randrange(min(reach, len(damaged)))] = draw.choice([0, 255, 128, draw.randrange(256)])
        target.write_bytes(damaged)
        with contextlib.suppress(InputError):
            samples.read_everything(target)


def test_a_header_of_ninety_thousand_tensors_opens_in_a_second(tmp_path: Path) -> None:
    names = (f"model.layers.{i // 900}.experts.{i % 900}.weight" for i in range(90_000))
    path = tmp_path / "many.safetensors"
    path.write_bytes(_pack({n: _entry("U8", (1,), (i, i + 1)) for i, n in enumerate(names)}, b"\0" * 90_000))
    begun = time.process_time()
    with open_checkpoint(path) as checkpoint:
        assert len(checkpoint) == 90_000
    assert time.process_time() - begun < 1.5


def test_npz_with_a_member_that_is_no_array_says_so(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    np.savez(path, w=np.ones(3))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("notes.txt", "hello")
    with open_checkpoint(path) as checkpoint:
        assert list(checkpoint.specs) == ["w"]
        assert "notes.txt" in checkpoint.notes[0]
