"""A mapping run over a checkpoint: the other side's tensors, lazily (`Filled`) or as a file (`apply`).

What a rule only renames, joins or cuts along the outermost axis is read straight from the source, range by range;
anything else is computed one tensor at a time, and the latest are kept. Data that only moves is moved as stored
codes, bit for bit.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import FLOATS, STORAGE, decode, encode, itemsize
from lineage.checkpoint.write import write_safetensors
from lineage.errors import InputError
from lineage.layout.axes import LayoutError
from lineage.layout.chain import Entry, Level, mapped, run
from lineage.layout.lazy import Computed, Lazy, Merged, Stored, known, laid_out, united
from lineage.layout.mapping import Instance, Mapping
from lineage.layout.operations.base import Rows

__all__ = ["Applied", "Filled", "apply"]

#: bytes of computed tensors that are kept; the latest two are kept in any case, one a thread
KEPT_BYTES = 64 << 20
#: a part that needs this many times as many rows of its input as it has itself is made a few times only
MANY, PARTS = 8, 2
#: elements that are written at a time
BLOCK = 1 << 22


class Filled(Checkpoint):
    """A virtual checkpoint: the mapping's target names, filled with the source's data.

    Parameters
    ----------
    mapping : from `a`'s layout
    a : the source; it stays open as long as this is read
    place : what errors name, such as the mapping's file

    Attributes
    ----------
    origins : source tensors of each tensor, by name
    unused : source tensors that no rule reads
    missing : tensors that the mapping speaks of but that could not be filled whole

    Raises
    ------
    InputError : a rule does not fit the source's tensors; the message names the rule and the tensor

    Notes
    -----
    Quantised source tensors count as F32. Tensors of several dtypes together get the one that holds them all. Where
    several rules know parts of a tensor it is offered only if every element is known.
    """

    def __init__(self, mapping: Mapping, a: Checkpoint, *, place: str = "mapping") -> None:
        self.path, self.format, self.metadata, self.notes = a.path, "filled", {}, ()
        self._a, self._recent = a, _Recent()
        shapes = {name: spec.shape for name, spec in a.specs.items()}
        parts: dict[str, list[tuple[Lazy, tuple[str, ...]]]] = defaultdict(list)
        used: set[str] = set()
        try:
            for instance in mapping.instances(shapes):
                used.update(instance.source_names)
                for name, origins, tensor in self._made(instance):
                    parts[name].append((tensor, origins))
        except LayoutError as exc:
            raise InputError(place, str(exc), "the mapping does not fit this checkpoint") from exc
        self._tensors: dict[str, Lazy] = {}
        self.origins: dict[str, tuple[str, ...]] = {}
        for name, found in parts.items():
            try:
                whole = united([tensor for tensor, _ in found])
            except LayoutError as exc:
                raise InputError(place, f"{name}: {exc}") from exc
            if whole is not None:
                self._tensors[name] = whole
                first = next((o for t, o in found if t is whole), None)
                self.origins[name] = first or tuple(dict.fromkeys(n for _, origins in found for n in origins))
        self.specs = {name: self._spec(name, tensor) for name, tensor in self._tensors.items()}
        self.unused = tuple(name for name in a.specs if name not in used)
        incomplete = [name for name in parts if name not in self.specs]
        self.missing = tuple(dict.fromkeys([*incomplete, *_literals(mapping, self.specs), *mapping.unmatched_target]))

    @classmethod
    def inverse(cls, mapping: Mapping, b: Checkpoint, *, place: str = "mapping") -> Filled:
        """The source's tensors, filled from the target `b`; rules that cannot be undone give none."""
        return cls(mapping.inverse(), b, place=place)

    def _made(self, instance: Instance) -> Iterator[tuple[str, tuple[str, ...], Lazy]]:
        """Each target of an instance: its name, its source tensors, its data."""
        specs = self._a.specs
        origins = instance.source_names
        words = {specs[name].dtype for name in origins}
        decoded = len(words) > 1 or not words <= STORAGE.keys() or not all(op.moves for op in instance.rule.ops)

        def stored(name: str) -> Lazy:
            spec = specs[name]
            word = spec.dtype if spec.plain else "F32"
            return Lazy(spec.shape, [(Stored(name, word, decoded=decoded), 0, spec.size)])

        entries = [mapped(entry, stored) for entry in instance.sources]
        try:
            results = run(instance.rule.ops, entries, lambda op, given: laid_out(op, given, decoded=decoded))
            pairs = list(_paired(instance.targets, results))
        except LayoutError as exc:
            target = next(iter(instance.target_names), "")
            raise LayoutError(f"rules[{instance.number}]: {target}: {exc}") from exc
        for name, tensor in pairs:
            yield name, origins, tensor

    def _spec(self, name: str, tensor: Lazy) -> TensorSpec:
        first = self._a.specs[self.origins[name][0]]
        component = name.partition("/")[0] if first.component and "/" in name else ""
        size = tensor.size * itemsize(tensor.word)
        return TensorSpec(
            name=name, shape=tensor.shape, dtype=tensor.word, nbytes=size, file=first.file, component=component
        )

    def _codes(self, spec: TensorSpec, start: int, stop: int, out: NDArray[Any] | None) -> NDArray[Any]:
        if out is None:
            pieces = list(self._tensors[spec.name].between(start, stop))
            if len(pieces) == 1 and isinstance(pieces[0][0], Computed):
                return self._range(pieces[0][0], pieces[0][1], pieces[0][2], spec.dtype, None)
            out = np.empty(stop - start, STORAGE[spec.dtype])
        at = 0
        for source, first, last in self._tensors[spec.name].between(start, stop):
            assert source is not None
            self._range(source, first, last, spec.dtype, out[at : at + last - first])
            at += last - first
        return out[: stop - start]

    def _range(
        self, source: Stored | Computed | Merged, start: int, stop: int, word: str, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        """Codes of the dtype `word` of a flat range, in `out` where that is given."""
        if isinstance(source, Stored):
            if self._a.specs[source.name].dtype == word:
                found = self._a.read_codes(source.name, start, stop, out=out)
                if out is None or np.shares_memory(found, out):
                    return found
            else:
                found = encode(self._a.read(source.name, start, stop), word)
        else:
            if isinstance(source, Computed) and source.op.pointwise:
                found = encode(self._points(source, start, stop), source.word)
            else:
                found = self._part(source, start, stop)
            if source.word != word:
                found = encode(decode(found, source.word), word)
        if out is None:
            return found
        out[:] = found
        return out

    def _part(self, source: Computed | Merged, start: int, stop: int) -> NDArray[Any]:
        """Codes of a flat range of a computed tensor: of its rows alone, where they can be made alone."""
        whole = self._recent.found(source)
        if whole is None and isinstance(source, Computed):
            made = self._rows(source, start, stop)
            if made is not None:
                return encode(made, source.word) if source.decoded else np.ascontiguousarray(made)
        return self._recent.get(source, lambda: self._whole(source))[start:stop]

    def _rows(self, source: Computed, start: int, stop: int) -> NDArray[Any] | None:
        """Values (or codes) of a flat range, from the rows of the input that it comes from; None: make the whole."""
        length, width = source.shape[0] if source.shape else 1, math.prod(source.shape[1:])
        first, last = start // max(1, width), -(-stop // max(1, width))
        if not source.op.single or source.op.partial or not start < stop or 2 * (last - first) > length:
            return None
        given = source.inputs[0]
        found = source.op.rows(first, last, given.shape)
        if found is None:
            return None
        op, rows = found
        if len(rows) > MANY * (last - first) and not self._recent.again(source):
            return None
        each = math.prod(given.shape[1:])
        pieces = [piece for a, b in _runs(rows) for piece in given.between(a * each, b * each)]
        array = self._read(Lazy((len(rows), *given.shape[1:]), pieces), decoded=source.decoded)
        made = array if op is None else op.apply([array])[0]
        return made.reshape(-1)[start - first * width : stop - first * width]

    def _whole(self, source: Computed | Merged) -> NDArray[Any]:
        """Codes of a computed tensor, flat."""
        array = self._array(source)
        codes = encode(array, source.word) if source.decoded else array
        return np.ascontiguousarray(codes).reshape(-1)

    def _array(self, source: Computed | Merged) -> NDArray[Any]:
        """A computed tensor in its shape: values where it is decoded, otherwise codes."""
        if isinstance(source, Merged):
            result = np.zeros(source.shape, _storage(source.word, source.decoded))
            for part in reversed(source.parts):
                np.copyto(result, self._read(part, decoded=source.decoded), where=known(part))
            return result
        given = [self._read(i, decoded=source.decoded) for i in source.inputs]
        return source.op.apply(given)[source.output]

    def _points(self, source: Computed, start: int, stop: int) -> NDArray[Any]:
        """Values of a flat range of a tensor whose elements are computed one by one."""
        given = Lazy((stop - start,), list(source.inputs[0].between(start, stop)))
        return source.op.apply([self._read(given, decoded=True)])[0]

    def _read(self, tensor: Lazy, *, decoded: bool) -> NDArray[Any]:
        """A lazy tensor in its shape; unknown places hold 0."""
        arrays = [self._piece(source, start, stop, decoded, tensor.word) for source, start, stop in tensor.pieces]
        if not arrays:
            return np.zeros(tensor.shape, _storage(tensor.word, decoded))
        joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        return joined.reshape(tensor.shape)

    def _piece(
        self, source: Stored | Computed | Merged | None, start: int, stop: int, decoded: bool, word: str
    ) -> NDArray[Any]:
        if source is None:
            return np.zeros(stop - start, _storage(word, decoded))
        if isinstance(source, Stored):
            return self._a.read(source.name, start, stop) if decoded else self._a.read_codes(source.name, start, stop)
        if isinstance(source, Computed) and source.op.pointwise:
            return self._points(source, start, stop)
        made = self._rows(source, start, stop) if isinstance(source, Computed) else None
        if made is None:
            flat = partial(self._flat, source)
            some = stop - start < math.prod(source.shape)  # others may ask for the rest
            made = (self._recent.get((source, "array"), flat) if some else flat())[start:stop]
        return decode(made, source.word) if decoded and not source.decoded else made

    def _flat(self, source: Computed | Merged) -> NDArray[Any]:
        """A computed tensor as `_array` gives it, 1-D."""
        return np.ascontiguousarray(self._array(source)).reshape(-1)


class Applied(msgspec.Struct, frozen=True):
    """What `apply` wrote.

    Attributes
    ----------
    written : tensors in the output
    unused : source tensors that no rule reads
    missing : tensors that the mapping speaks of but that could not be filled
    """

    written: int
    unused: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing was left over on either side."""
        return not self.unused and not self.missing


def apply(
    mapping: Mapping,
    a: Checkpoint,
    out: str | Path,
    *,
    inverse: bool = False,
    strict: bool = False,
    place: str = "mapping",
    inputs: tuple[str | Path, ...] = (),
) -> Applied:
    """Writes the target's layout filled from `a` as safetensors, in shards where it grows large.

    Parameters
    ----------
    inverse : `a` is the mapping's target, its source is written
    strict : nothing is written where tensors would be left over
    place : what errors about the mapping name
    inputs : further files that the output must not replace

    Raises
    ------
    InputError : the mapping does not fit, nothing could be filled, or the output cannot be written
    """
    filled = Filled.inverse(mapping, a, place=place) if inverse else Filled(mapping, a, place=place)
    if not filled.specs:
        side = "target" if inverse else "source"
        raise InputError(place, f"no rule finds its tensors in {a.path}", f"is that the mapping's {side}?")
    applied = Applied(len(filled), filled.unused, filled.missing)
    if strict and not applied.complete:
        return applied

    def blocks(name: str) -> Iterator[NDArray[Any]]:
        size = filled.specs[name].size
        for start in range(0, size, BLOCK):
            yield filled.read_codes(name, start, min(size, start + BLOCK))

    entries = [(spec.name, spec.dtype, spec.shape) for spec in filled]
    write_safetensors(out, entries, blocks, metadata={"format": "pt"}, inputs=(a.path, *inputs))
    return applied


class _Recent:
    """Computed tensors used last; each is computed once, whichever threads ask for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[object, NDArray[Any]] = OrderedDict()
        self._busy: dict[object, threading.Lock] = {}
        self._again: Counter[object] = Counter()

    def again(self, key: object) -> bool:
        """Whether a part may be made once more, before the whole is."""
        with self._lock:
            self._again[key] += 1
            return self._again[key] <= PARTS

    def found(self, key: object) -> NDArray[Any] | None:
        """The array of `key`, None where it is not kept."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def get(self, key: object, make: Any) -> NDArray[Any]:
        """The array of `key`, made where it is not kept."""
        found = self.found(key)
        if found is not None:
            return found
        with self._lock:
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            found = self.found(key)
            if found is None:
                found = make()
                with self._lock:
                    self._kept[key] = found
                    self._busy.pop(key, None)
                    while len(self._kept) > 2 and sum(v.nbytes for v in self._kept.values()) > KEPT_BYTES:
                        self._kept.popitem(last=False)
        return found


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """Neighbouring rows as ranges."""
    if isinstance(rows, range):
        yield rows.start, rows.stop
        return
    first = at = rows[0]
    for row in rows[1:]:
        if row != at + 1:
            yield first, at + 1
            first = row
        at = row
    yield first, at + 1


def _storage(word: str, decoded: bool) -> np.dtype[Any]:
    """NumPy dtype of the values, or of the codes, of a dtype word."""
    if decoded and word in FLOATS:
        return np.dtype(np.float64 if word == "F64" else np.float32)
    return STORAGE[word]


def _paired(targets: tuple[Entry, ...], results: list[Entry]) -> Iterator[tuple[str, Lazy]]:
    """Target names with what the chain gave for them."""
    if len(targets) != len(results):
        raise LayoutError(f"the operations give {len(results)} arrays for {len(targets)} targets")
    for target, result in zip(targets, results, strict=True):
        if isinstance(target, Level) and isinstance(result, Level):
            yield from _paired(target.items, list(result.items))
        elif isinstance(result, Level):
            raise LayoutError(f"the list over {result.over} is not put together; add an operation over it")
        else:
            yield target, result


def _literals(mapping: Mapping, filled: dict[str, TensorSpec]) -> Iterator[str]:
    """Targets that stand in the mapping by name and were not filled."""
    for rule in mapping.rules:
        for template in rule.templates[0]:
            if not template.placeholders and template.name({}) not in filled:
                yield template.name({})
