"""File formats: one table entry and one module each; detection by first bytes, then by suffix.

A format's module offers `open_file(file) -> Checkpoint`. It is imported when a file of that format is met. A new
format joins by its entry here.
"""

from __future__ import annotations

from importlib import import_module

import msgspec

from lineage.checkpoint.base import Checkpoint
from lineage.checkpoint.files import File
from lineage.errors import InputError

__all__ = ["FORMATS", "Format", "by_suffix", "detect", "open_file"]


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """One file format.

    Attributes
    ----------
    name : word in reports
    suffixes : endings of file names, in lower case
    magic : (offset, bytes) pairs; one that fits is enough
    module : text name of the module that reads it
    extra : optional dependency group that brings its library, "" where none is needed
    """

    name: str
    suffixes: tuple[str, ...]
    magic: tuple[tuple[int, bytes], ...]
    module: str
    extra: str = ""


#: in order of preference where a folder holds several
FORMATS = (
    Format(
        name="safetensors",
        suffixes=(".safetensors", ".sft"),
        magic=((8, b"{"),),
        module="lineage.checkpoint.formats.safetensors",
    ),
    Format(
        name="torch",
        suffixes=(".pt", ".pth", ".bin", ".ckpt", ".pkl"),
        magic=((0, b"PK\x03\x04"), *((0, bytes((0x80, version))) for version in (2, 3, 4, 5))),
        module="lineage.checkpoint.formats.torch",
    ),
    Format(name="gguf", suffixes=(".gguf",), magic=((0, b"GGUF"),), module="lineage.checkpoint.formats.gguf"),
    Format(
        name="numpy",
        suffixes=(".npz", ".npy"),
        magic=((0, b"PK\x03\x04"), (0, b"\x93NUMPY")),
        module="lineage.checkpoint.formats.arrays",
    ),
)

#: formats that people have and this version does not read: first bytes or suffix -> what it is
_UNREAD_MAGIC = ((b"\x89HDF\r\n", "an HDF5 (Keras) file"), (b"GGML", "an old GGML file"), (b"tjgg", "an old GGML file"))
_UNREAD_SUFFIX = {
    ".h5": "an HDF5 (Keras) file",
    ".keras": "a Keras file",
    ".msgpack": "a Flax msgpack file",
    ".onnx": "an ONNX model",
    ".nemo": "a NeMo archive",
    ".distcp": "a part of a distributed torch checkpoint",
    ".tflite": "a TensorFlow Lite model",
    ".index": "a part of a TensorFlow checkpoint",
}


def by_suffix(name: str) -> Format | None:
    """The format whose suffix `name` carries, or None."""
    lower = name.lower()
    return next((f for f in FORMATS if lower.endswith(f.suffixes)), None)


def detect(file: File) -> Format:
    """The format of an open file.

    Raises
    ------
    InputError : no format that is read here
    """
    head = file.read(0, min(file.size, 16))
    fitting = [f for f in FORMATS if any(head[at : at + len(word)] == word for at, word in f.magic)]
    named = by_suffix(file.path)
    if named is not None and (named in fitting or not fitting):
        return named
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        return _inside_zip(file, fitting)
    what = next((what for word, what in _UNREAD_MAGIC if head.startswith(word)), None)
    what = what or next((what for end, what in _UNREAD_SUFFIX.items() if file.path.lower().endswith(end)), None)
    remedy = "convert it to safetensors" if what else "formats read: " + ", ".join(f.name for f in FORMATS)
    raise InputError(file.path, f"this is {what}, which is not read" if what else "not a known weights format", remedy)


def _inside_zip(file: File, fitting: list[Format]) -> Format:
    """Torch and NumPy archives are both zips: the first member's name tells them apart."""
    named_arrays = b".npy" in file.read(0, min(file.size, 512))
    return next((f for f in fitting if (f.name == "numpy") == named_arrays), fitting[0])


def open_file(path: str) -> Checkpoint:
    """The checkpoint in one file.

    Raises
    ------
    InputError : it cannot be read
    """
    file = File(path)
    try:
        found: Checkpoint = import_module(detect(file).module).open_file(file)
    except BaseException:
        file.close()
        raise
    return found
