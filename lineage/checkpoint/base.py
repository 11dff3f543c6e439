"""What every checkpoint answers, whatever its file format: specs first, bytes on demand.

A format subclasses `Checkpoint` and provides `_codes` (stored elements of a flat range). Everything else
(decoding, rows, whole tensors, views of a part) follows here. Reading is thread-safe and never maps or copies a
whole file.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE, decode
from lineage.errors import InputError

__all__ = ["Checkpoint", "Joined", "Part", "TensorSpec"]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One tensor as its file declares it; no data.

    Attributes
    ----------
    name : unique within the checkpoint
    shape : lengths of the axes, first axis slowest
    dtype : word of `lineage.checkpoint.dtypes.STORAGE`, or the word of a quantised type (`Q4_0`, `F8_E4M3+scale`, …)
    nbytes : bytes of its data in the file
    file : file that holds the data
    component : part of a pipeline (`transformer`, `vae`, …), "" where there is only one
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str = ""
    component: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def plain(self) -> bool:
        """True where each element is stored by itself, so that `read_codes` works."""
        return self.dtype in STORAGE

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """NumPy dtype of decoded values."""
        storage = STORAGE.get(self.dtype)
        if storage is None or (self.dtype[0] in "FB" and self.dtype not in ("F64", "BOOL")):
            return np.dtype(np.float32)
        return storage


class Checkpoint(ABC):
    """A lazy checkpoint: `specs` by name, and bytes by tensor and by range of elements.

    Attributes
    ----------
    path : as the user gave it
    format : `safetensors`, `torch`, `gguf`, `numpy`, …
    specs : tensors in file order
    metadata : text pairs that the file carries about itself
    notes : sentences that a reader of the report should know (unwrapped dictionaries, decoded scales)
    cut : the error of a file whose header is whole and whose data are not; None for a whole file
    """

    path: str
    format: str
    specs: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()
    cut: InputError | None = None

    @abstractmethod
    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        """Stored elements [start, stop) of a plain tensor, in C order."""

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        """Decoded elements [start, stop); formats with quantised types override it."""
        return decode(self._codes(spec, start, stop, None), spec.dtype)

    def close(self) -> None:  # noqa: B027 - most views and wrappers hold nothing
        """Releases open files; harmless to repeat."""

    # -- the public face

    def read_codes(
        self, name: str, start: int = 0, stop: int | None = None, *, out: NDArray[Any] | None = None
    ) -> NDArray[Any]:
        """Stored codes of the flat range [start, stop) of a plain tensor, 1-D, dtype `STORAGE[spec.dtype]`.

        `out`, where given, is a 1-D contiguous buffer of that dtype with at least stop - start elements; the result
        is then a view of it.

        Raises
        ------
        KeyError : no such tensor
        ValueError : the tensor is not plain, or the range is not inside it
        InputError : the file changed or cannot be read
        """
        spec = self.specs[name]
        if not spec.plain:
            raise ValueError(f"{name} is stored as {spec.dtype}; read its values")
        return self._codes(spec, *_inside(spec, start, stop), out)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Decoded values of the flat range [start, stop), 1-D, dtype `spec.value_dtype`.

        Raises
        ------
        KeyError : no such tensor
        ValueError : the range is not inside the tensor
        InputError : the file changed, cannot be read, or holds a type that nobody decodes
        """
        spec = self.specs[name]
        return self._values(spec, *_inside(spec, start, stop))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Decoded rows [start, stop) of the first axis, shape (stop - start, *shape[1:]); a scalar has none."""
        spec = self.specs[name]
        width = math.prod(spec.shape[1:])
        stop = spec.shape[0] if stop is None else stop
        return self.read(name, start * width, stop * width).reshape(stop - start, *spec.shape[1:])

    def tensor(self, name: str) -> NDArray[Any]:
        """The whole tensor, decoded, in its shape."""
        return self.read(name).reshape(self.specs[name].shape)

    def codes(self, name: str) -> NDArray[Any]:
        """The whole plain tensor as stored codes, in its shape."""
        return self.read_codes(name).reshape(self.specs[name].shape)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(s.size for s in self.specs.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors' data."""
        return sum(s.nbytes for s in self.specs.values())

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parts in file order; ("",) where the checkpoint is one network."""
        return tuple(dict.fromkeys(s.component for s in self.specs.values())) or ("",)

    def component(self, name: str) -> Part:
        """The tensors of one component under the names that they have without the component's prefix.

        Raises
        ------
        KeyError : no such component
        """
        chosen = {s.name: s for s in self.specs.values() if s.component == name}
        if not chosen:
            raise KeyError(name)
        return Part(self, chosen, f"{name}/" if name else "")

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.specs.values())

    def __len__(self) -> int:
        return len(self.specs)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path!r}: {self.format}, {len(self)} tensors, {self.parameters:,} parameters>"


class Part(Checkpoint):
    """A view of some tensors of a checkpoint, under names without the prefix that they share."""

    def __init__(self, whole: Checkpoint, chosen: Mapping[str, TensorSpec], prefix: str) -> None:
        self.whole, self.path, self.format = whole, whole.path, whole.format
        self.metadata, self.notes = whole.metadata, whole.notes
        self._whole_specs: dict[str, TensorSpec] = {}
        self.specs = specs = {}
        for name, spec in chosen.items():
            short = name.removeprefix(prefix)
            specs[short] = msgspec.structs.replace(spec, name=short, component="" if prefix else spec.component)
            self._whole_specs[short] = spec

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        return self.whole._codes(self._whole_specs[spec.name], start, stop, out)

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        return self.whole._values(self._whole_specs[spec.name], start, stop)


class Joined(Checkpoint):
    """Several checkpoints as one: shards of a model, or the components of a pipeline.

    Parameters
    ----------
    path : as the user gave it
    parts : (component or "", checkpoint) in order; a component's tensors are named `component/name`

    Raises
    ------
    ValueError : two parts hold a tensor of one name (its text: the name and both files)
    """

    def __init__(self, path: str, parts: Iterable[tuple[str, Checkpoint]], *, notes: Iterable[str] = ()) -> None:
        self.path = path
        self._home: dict[str, tuple[Checkpoint, TensorSpec]] = {}
        self._parts: list[Checkpoint] = []
        specs: dict[str, TensorSpec] = {}
        metadata: dict[str, str] = {}
        told = list(notes)
        for component, part in parts:
            self._parts.append(part)
            for own in part.specs.values():
                name = f"{component}/{own.name}" if component else own.name
                if name in specs:
                    raise ValueError(f"{name} stands in {specs[name].file} and in {own.file}")
                spec = msgspec.structs.replace(own, name=name, component=component) if component else own
                specs[name], self._home[name] = spec, (part, own)
            for key, value in part.metadata.items():
                metadata.setdefault(f"{component}/{key}" if component else key, value)
            told.extend(f"{component}: {note}" if component else note for note in part.notes)
        self.specs, self.metadata, self.notes = specs, metadata, tuple(dict.fromkeys(told))
        self.cut = next((part.cut for part in self._parts if part.cut is not None), None)
        self.format = "+".join(dict.fromkeys(part.format for part in self._parts))

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        part, own = self._home[spec.name]
        return part._codes(own, start, stop, out)

    def _values(self, spec: TensorSpec, start: int, stop: int) -> NDArray[Any]:
        part, own = self._home[spec.name]
        return part._values(own, start, stop)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _inside(spec: TensorSpec, start: int, stop: int | None) -> tuple[int, int]:
    """The range with its default filled in, checked against the tensor."""
    size = spec.size
    stop = size if stop is None else stop
    if not 0 <= start <= stop <= size:
        raise ValueError(f"{spec.name}: elements {start} to {stop} of {size}")
    return start, stop
