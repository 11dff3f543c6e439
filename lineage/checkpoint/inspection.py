"""What `lineage inspect` says of one checkpoint, as a record: sizes, templates of names, network, claims, figures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from lineage.checkpoint.base import Checkpoint, TensorSpec
from lineage.checkpoint.catalog import read_data
from lineage.checkpoint.claims import Claim, read_claims

__all__ = ["Group", "Inspection", "Statistics", "Tensor", "guess_network", "inspect", "name_groups"]

#: elements of a piece when figures are computed: 1 MiB of float32
_PIECE = 2**18
#: a number that counts something: not part of a word such as `fc1`
_INTEGER = re.compile(r"(?<![0-9A-Za-z])([0-9]{1,9})(?![0-9A-Za-z])")


class Statistics(msgspec.Struct, frozen=True):
    """Figures of one tensor over its finite elements; None where there are none.

    `zero` is a share (0 to 1), `nan` counts NaN and infinities.
    """

    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    zero: float | None
    nan: int


class Tensor(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tensor: `parameters` elements in `bytes` bytes of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    bytes: int
    file: str = ""
    component: str = ""
    statistics: Statistics | None = None


class Component(msgspec.Struct, frozen=True):
    """A part of a pipeline or bundle; `network` is guessed from names."""

    name: str
    tensors: int
    parameters: int
    bytes: int
    network: str | None


class Group(msgspec.Struct, frozen=True):
    """Tensors whose names differ only in integers and whose shapes and dtypes agree."""

    template: str
    tensors: int
    shape: tuple[int, ...]
    dtype: str
    parameters: int


class Inspection(msgspec.Struct, frozen=True):
    """What a checkpoint holds; `count` tensors, `dtypes` counts tensors by dtype word."""

    path: str
    format: str
    count: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]
    architecture: str | None
    components: tuple[Component, ...]
    claims: tuple[Claim, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]
    tensors: tuple[Tensor, ...]


class _Network(msgspec.Struct, frozen=True):
    """A kind of network, and key endings that all of its checkpoints have."""

    name: str
    keys: tuple[str, ...]


class _Architectures(msgspec.Struct, frozen=True):
    """`mappings/architectures.yaml`."""

    networks: tuple[_Network, ...]


def inspect(
    checkpoint: Checkpoint, *, statistics: bool = False, progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """What a checkpoint holds. Reads tensor data only for `statistics`, a piece at a time.

    Parameters
    ----------
    progress : called with the tensors done and the tensors in all

    Raises
    ------
    InputError : with `statistics`, where data cannot be read or decoded
    """
    claims, notes = read_claims(checkpoint)
    tensors: list[Tensor] = []
    for spec in checkpoint:
        figures = _figures(checkpoint, spec) if statistics else None
        if progress is not None:
            progress(len(tensors), len(checkpoint))
        tensors.append(
            Tensor(
                name=spec.name,
                shape=spec.shape,
                dtype=spec.dtype,
                parameters=spec.size,
                bytes=spec.nbytes,
                file=spec.file,
                component=spec.component,
                statistics=figures,
            )
        )
    parts = tuple(_component(name, [s for s in checkpoint if s.component == name]) for name in checkpoint.components)
    largest = max(parts, key=lambda part: part.parameters)
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        count=len(checkpoint),
        parameters=checkpoint.parameters,
        bytes=checkpoint.nbytes,
        dtypes=dict(Counter(spec.dtype for spec in checkpoint).most_common()),
        architecture=largest.network,
        components=parts,
        claims=claims,
        metadata=dict(checkpoint.metadata),
        notes=(*checkpoint.notes, *notes),
        tensors=tuple(tensors),
    )


def _component(name: str, specs: list[TensorSpec]) -> Component:
    prefix = f"{name}/" if name else ""
    return Component(
        name=name,
        tensors=len(specs),
        parameters=sum(s.size for s in specs),
        bytes=sum(s.nbytes for s in specs),
        network=guess_network(s.name.removeprefix(prefix) for s in specs),
    )


@lru_cache
def _architectures() -> _Architectures:
    """The kinds of networks that ship with the package."""
    return read_data("architectures.yaml", _Architectures)


def guess_network(names: Iterable[str]) -> str | None:
    """The kind of network that tensors of these names belong to, or None. A guess for people, never evidence.

    Examples
    --------
    >>> guess_network(["layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"])
    'decoder with gated MLP (Meta names)'
    """
    endings: set[str] = set()
    for template in {re.sub(r"\d+", "{i}", name) for name in names}:
        words = re.split(r"(?<=[./])", template)
        endings.update("".join(words[k:]) for k in range(max(len(words) - 12, 0), len(words)))
    for network in _architectures().networks:
        if all(re.sub(r"\d+", "{i}", key) in endings for key in network.keys):
            return network.name
    return None


def name_groups(tensors: Iterable[Tensor]) -> list[Group]:
    """Tensors gathered by template, in file order; integers become `{first–last}` where they vary.

    Examples
    --------
    >>> shape = (2, 2)
    >>> rows = [Tensor(f"layers.{i}.w", shape, "F32", 4, 16) for i in range(3)]
    >>> name_groups(rows)[0].template
    'layers.{0–2}.w'
    """
    found: dict[tuple[tuple[str, ...], tuple[int, ...], str], list[tuple[Tensor, list[int]]]] = {}
    for tensor in tensors:
        pieces = _INTEGER.split(tensor.name)
        key = (tuple(pieces[::2]), tensor.shape, tensor.dtype)
        found.setdefault(key, []).append((tensor, [int(text) for text in pieces[1::2]]))
    groups = []
    for (words, shape, dtype), members in found.items():
        columns = zip(*(numbers for _, numbers in members), strict=True)
        spans = [_span(min(column), max(column)) for column in columns]
        template = "".join(word + span for word, span in zip(words, [*spans, ""], strict=True))
        parameters = sum(tensor.parameters for tensor, _ in members)
        groups.append(Group(template, len(members), shape, dtype, parameters))
    return groups


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{{{low}–{high}}}"


def _figures(checkpoint: Checkpoint, spec: TensorSpec) -> Statistics:
    """Figures of one tensor from one pass, piece by piece, in float64."""
    count = zero = bad = 0
    mean = spread = np.float64(0)
    low, high = np.inf, -np.inf
    for start in range(0, spec.size, _PIECE):
        with np.errstate(invalid="ignore"):
            values: Any = checkpoint.read(spec.name, start, min(start + _PIECE, spec.size)).astype(np.float64)
        finite = values[np.isfinite(values)]
        bad += len(values) - len(finite)
        if not len(finite):
            continue
        zero += len(finite) - int(np.count_nonzero(finite))
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        # Pieces merge by means and sums of squares about them: no loss where the mean is large (Chan et al. 1979).
        with np.errstate(over="ignore", invalid="ignore"):
            own = finite.mean()
            total = count + len(finite)
            spread += np.square(finite - own).sum() + (own - mean) ** 2 * count * len(finite) / total
            mean += (own - mean) * len(finite) / total
        count = total
    if not count:
        return Statistics(None, None, None, None, None, bad)
    return Statistics(_number(mean), _number(np.sqrt(spread / count)), low, high, zero / count, bad)


def _number(value: np.float64) -> float | None:
    """The figure, None where it left the range of numbers."""
    return float(value) if np.isfinite(value) else None
