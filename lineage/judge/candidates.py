"""Samples of B and of everything that it may have been merged from, all in B's layout: what `merging` fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import FLOATS
from lineage.filling import Filled
from lineage.layout.mapping import Mapping
from lineage.measure.spectrum import rounding_variance

__all__ = ["Candidate", "Gathered", "gather", "labels"]

Floats = NDArray[np.floating[Any]]

#: elements of a tensor that are read at most, in so many runs; weights come out within 0.001 (zoo: bf16 merges)
EACH, RUNS = 1 << 16, 8
#: ... of which so many are kept one by one, and values of all tensors together
PICKED, ALL_PICKED = 1024, 1 << 16
#: tensors that are read at most, evenly over the file
MOST = 1024
#: smaller tensors and vectors take no part: rounding covers what a merge does to them
LEAST = 256
#: share of B's matrices that a candidate must have a counterpart for
COVERED = 0.5
#: file names that tell nothing: the folder's does
_PLAIN = frozenset({"model", "pytorch_model", "consolidated", "diffusion_pytorch_model", "adapter_model"})


class Candidate(msgspec.Struct, frozen=True):
    """What B may have been merged from: its name in sentences, its weights, and how B's tensors are laid out in it."""

    label: str
    checkpoint: Checkpoint
    mapping: Mapping


class Gathered(msgspec.Struct, frozen=True):
    """Inner products of the sampled tensors.

    Attributes
    ----------
    labels : of A, where it takes part, and the candidates
    products : for each tensor, of each source's difference from B, then B: shape (tensors, sources + 1, sources + 1);
        scaled up to the whole tensor
    rounding : for each tensor, the squared norm that rounding to B's dtype leaves
    counts : elements sampled of each tensor
    values : some single values: of each source's difference from B, then B; shape (sources + 1, values)
    errors : the greatest error that rounding to B's dtype makes of each of them, 0 where it is unknown
    left_out : candidates without a counterpart for most of B
    """

    labels: tuple[str, ...]
    products: Floats
    rounding: Floats
    counts: NDArray[np.int64]
    values: Floats
    errors: Floats
    left_out: tuple[str, ...] = ()

    def __add__(self, other: Gathered) -> Gathered:
        """Both parts of a pipeline together; the sources must be the same."""
        return Gathered(
            self.labels, np.concatenate([self.products, other.products]),
            np.concatenate([self.rounding, other.rounding]), np.concatenate([self.counts, other.counts]),
            np.concatenate([self.values, other.values], axis=1), np.concatenate([self.errors, other.errors]),
            self.left_out,
        )  # fmt: skip


def labels(paths: Sequence[str]) -> list[str]:
    """Short names of checkpoints: the file's or folder's, or the whole path where that is not enough."""
    short = []
    for path in map(PurePath, paths):
        alone = path.stem if path.suffix else path.name
        short.append((path.parent.name if alone in _PLAIN else alone) or str(path))
    taken = Counter([*short, "A", "B"])
    return [str(path) if taken[word] > 1 else word for word, path in zip(short, paths, strict=True)]


def gather(
    a: Checkpoint, b: Checkpoint, mapping: Mapping, candidates: Sequence[Candidate], *, related: bool, seed: int = 0
) -> Gathered | None:
    """Reads samples of B and of everything that it may be made of; None where that is nothing, or no matrix is shared.

    Parameters
    ----------
    mapping : from A to B
    related : B comes from A, which is the base of the sum then; else A takes no part
    seed : of the places that are read

    Notes
    -----
    Reads at most 65,536 elements of at most 1,024 matrices, of each of the checkpoints.
    """
    content = [spec for spec in b if _content(spec)]
    size = sum(spec.size for spec in content)
    sources: list[tuple[str, Checkpoint]] = [("A", Filled(mapping, a))] if related else []
    left_out = []
    for candidate in candidates:
        filled = Filled(candidate.mapping, candidate.checkpoint)
        if sum(spec.size for spec in content if _has(filled, spec)) >= COVERED * size > 0:
            sources.append((candidate.label, filled))
        else:
            left_out.append(candidate.label)
    shared = [spec for spec in content if all(_has(source, spec) for _, source in sources)]
    if len(sources) < 2 or not shared:
        return None
    if len(shared) > MOST:
        shared = [shared[int(at)] for at in np.linspace(0, len(shared) - 1, MOST)]
    most = min(PICKED, ALL_PICKED // len(shared))
    found = [_products([source for _, source in sources], b, spec, seed, most) for spec in shared]
    return Gathered(
        tuple(label for label, _ in sources), np.stack([f[0] for f in found]), np.array([f[1] for f in found]),
        np.array([f[2] for f in found]), np.concatenate([f[3] for f in found], axis=1),
        np.concatenate([f[4] for f in found]), tuple(left_out),
    )  # fmt: skip


def _content(spec: TensorSpec) -> bool:
    """True for matrices of real numbers."""
    return spec.size >= LEAST and sum(n > 1 for n in spec.shape) > 1 and (spec.dtype in FLOATS or not spec.plain)


def _has(source: Checkpoint, spec: TensorSpec) -> bool:
    found = source.specs.get(spec.name)
    return found is not None and found.size == spec.size and _content(found)


def _products(
    sources: Sequence[Checkpoint], b: Checkpoint, spec: TensorSpec, seed: int, most: int
) -> tuple[Floats, float, int, Floats, Floats]:
    """Inner products over a sample of one tensor, what rounding leaves of it, the sample's size, and some values."""
    length = min(spec.size, EACH) // (RUNS if spec.size > EACH else 1)
    edges = np.linspace(0, spec.size, RUNS + 1 if spec.size > EACH else 2).astype(np.int64)
    draw = np.random.default_rng([seed, spec.size])
    room = np.maximum(np.diff(edges) - length, 0)
    starts = [int(low + draw.integers(0, free + 1)) for low, free in zip(edges[:-1], room, strict=True)]

    def read(checkpoint: Checkpoint) -> Floats:
        return np.concatenate([checkpoint.read(spec.name, at, at + length) for at in starts]).astype(np.float64)

    target = read(b)
    columns = np.stack([*(read(source) for source in sources), target])
    finite = np.isfinite(columns).all(axis=0)
    columns, target = columns[:, finite], target[finite]
    columns[:-1] -= target
    variance = rounding_variance(target, spec.dtype)
    scale = spec.size / max(1, target.size)
    rounding = 0.0 if variance is None else float(variance.sum())
    some = np.sort(draw.permutation(target.size)[:most])
    errors = np.zeros(len(some)) if variance is None else np.sqrt(3 * variance[some])
    return columns @ columns.T * scale, rounding * scale, int(target.size), columns[:, some], errors
