"""A small file of every format, written by the format's own library, with the values that must be read from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import open_checkpoint


class Sample(NamedTuple):
    """A file, the dtype word of every tensor and its values (bf16 and fp8 as float32)."""

    path: Path
    words: dict[str, str]
    values: dict[str, NDArray[Any]]


def read_everything(path: Path) -> None:
    """Opens a file and reads every tensor."""
    with open_checkpoint(path) as checkpoint:
        for spec in checkpoint:
            checkpoint.read(spec.name)


def _numbers() -> dict[str, NDArray[Any]]:
    """Arrays of the dtypes that NumPy and every container know."""
    draw = np.random.default_rng(5)
    return {
        "F64": draw.standard_normal((3, 5)),
        "F32": draw.standard_normal((300, 7)).astype(np.float32),
        "F16": draw.standard_normal((4, 3)).astype(np.float16),
        "I64": draw.integers(-9, 9, (2, 3, 2)),
        "I32": draw.integers(-9, 9, 6).astype(np.int32),
        "I16": draw.integers(-9, 9, (2, 2)).astype(np.int16),
        "I8": draw.integers(-9, 9, (2, 2)).astype(np.int8),
    }


def _more() -> dict[str, NDArray[Any]]:
    draw = np.random.default_rng(6)
    return {
        **_numbers(),
        "BF16": draw.standard_normal((6, 4)).astype(ml_dtypes.bfloat16),
        "U8": draw.integers(0, 9, (2, 2)).astype(np.uint8),
        "U16": draw.integers(0, 9, (2, 2)).astype(np.uint16),
        "U32": draw.integers(0, 9, (2, 2)).astype(np.uint32),
        "U64": draw.integers(0, 9, (2, 2)).astype(np.uint64),
        "BOOL": draw.integers(0, 2, (3, 3)).astype(bool),
    }


_SMALL = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def _sample(path: Path, arrays: dict[str, NDArray[Any]]) -> Sample:
    """The sample's record; every array's key is its dtype word, perhaps after a prefix and a dot."""
    values = {name: a.astype(np.float32) if a.dtype.kind == "V" or "F8" in name else a for name, a in arrays.items()}
    values = {n: v.astype(np.float32) if n.endswith(("F16", "BF16")) else v for n, v in values.items()}
    return Sample(path, {name: name.rpartition(".")[2] for name in arrays}, values)


def _with_odd_shapes(arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {**arrays, "empty.F32": np.zeros((0, 3), np.float32), "scalar.F64": np.array(2.5)}


def safetensors(folder: Path) -> Sample:
    from safetensors.numpy import save_file

    arrays = _with_odd_shapes(_more()) | {
        word: np.linspace(-3, 3, 20).reshape(4, 5).astype(kind) for word, kind in _SMALL.items()
    }
    save_file(arrays, folder / "sample.safetensors", metadata={"made": "here"})
    return _sample(folder / "sample.safetensors", arrays)


def _tensors() -> dict[str, Any]:
    import torch

    tensors: dict[str, Any] = {}
    for name, array in _with_odd_shapes(_more()).items():
        if array.dtype == ml_dtypes.bfloat16:
            tensors[name] = torch.from_numpy(array.astype(np.float32)).bfloat16()
        elif name not in ("U16", "U32", "U64"):
            tensors[name] = torch.from_numpy(array)
    tensors["transposed.F32"] = torch.arange(70_000, dtype=torch.float32).reshape(250, 280).T
    tensors["slice.I64"] = torch.arange(100).reshape(10, 10)[2:5, 3:7]
    tensors["expanded.F32"] = torch.arange(5, dtype=torch.float32).expand(4, 5)
    tensors["tied.F32"] = tensors["F32"]
    return tensors


def _torch(path: Path, *, zipped: bool) -> Sample:
    import torch

    tensors = _tensors()
    if zipped:
        tensors["F8_E4M3"] = torch.linspace(-3, 3, 20).reshape(4, 5).to(torch.float8_e4m3fn)
        tensors["U16"] = torch.arange(5).to(torch.uint16)
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    single = {"BF16", "F8_E4M3", "F16"}
    return Sample(
        path,
        {name: name.rpartition(".")[2] for name in tensors},
        {name: (t.float() if name in single else t).numpy() for name, t in tensors.items()},
    )


def torch_zip(folder: Path) -> Sample:
    return _torch(folder / "sample.pt", zipped=True)


def torch_stream(folder: Path) -> Sample:
    return _torch(folder / "sample.bin", zipped=False)


def gguf(folder: Path) -> Sample:
    import gguf as library

    plain = {k: v for k, v in _numbers().items() if k != "F64"}
    draw = np.random.default_rng(7)
    kinds = library.GGMLQuantizationType
    writer = library.GGUFWriter(folder / "sample.gguf", "llama")
    writer.add_string("general.name", "sample")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    values: dict[str, NDArray[Any]] = {}
    for name, array in plain.items():
        writer.add_tensor(name, array)
        values[name] = array.astype(np.float32) if name == "F16" else array
    bf16 = draw.standard_normal((4, 32)).astype(ml_dtypes.bfloat16)
    writer.add_tensor("BF16", bf16.view(np.uint8), raw_dtype=kinds.BF16)
    values["BF16"] = bf16.astype(np.float32)
    for kind in library.quants._type_traits:
        if kind.name == "BF16":
            continue
        block, width = library.GGML_QUANT_SIZES[kind]
        raw = draw.integers(0, 60, (3, 2 * width)).astype(np.uint8)
        writer.add_tensor(kind.name, raw, raw_dtype=kind)
        with np.errstate(all="ignore"):
            values[kind.name] = library.quants.dequantize(raw, kind)
        assert values[kind.name].shape == (3, 2 * block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Sample(folder / "sample.gguf", {name: name for name in values}, values)


def _arrays() -> dict[str, NDArray[Any]]:
    draw = np.random.default_rng(8)
    return {
        **_with_odd_shapes(_more()),
        "fortran.F64": np.asfortranarray(draw.standard_normal((250, 280))),
        "big.F32": draw.standard_normal((4, 3)).astype(">f4"),
        "both.F32": np.asfortranarray(draw.standard_normal((4, 3)).astype(">f4")),
    }


def npz(folder: Path) -> Sample:
    np.savez(folder / "sample.npz", **_arrays())  # type: ignore[arg-type]
    return _sample(folder / "sample.npz", _arrays())


def npz_compressed(folder: Path) -> Sample:
    np.savez_compressed(folder / "sample.npz", **_arrays())  # type: ignore[arg-type]
    return _sample(folder / "sample.npz", _arrays())


def npy(folder: Path) -> Sample:
    values = np.random.default_rng(9).standard_normal((30, 4))
    np.save(folder / "sample.npy", values)
    return Sample(folder / "sample.npy", {"array": "F64"}, {"array": values})


#: word of the format in FORMATS -> writers of its kinds of files
WRITERS: dict[str, tuple[Callable[[Path], Sample], ...]] = {
    "safetensors": (safetensors,),
    "torch": (torch_zip, torch_stream),
    "gguf": (gguf,),
    "numpy": (npz, npz_compressed, npy),
}
