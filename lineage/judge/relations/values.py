"""Relations that single values show: quantised, sparsified, noised, rescaled, sign-flipped, rotated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.dtypes import FLOATS, STORAGE
from lineage.judge.common import Common
from lineage.judge.material import WHOLE_ROWS, WHOLE_VALUES, Material, Sample, unstacked
from lineage.judge.relations.finding import Finding
from lineage.judge.relations.grids import Grid, find_grid

__all__ = [
    "Diagonal",
    "beginning",
    "diagonal_fit",
    "edge",
    "gridded",
    "noised",
    "quantized",
    "rescaled",
    "rotated",
    "sign_flipped",
    "sparsified",
]

Floats = NDArray[np.floating[Any]]

#: share of sampled matrices that must show a property of values
MOST = 0.8
#: elements of a matrix up to which its columns are looked at, too
TURNED = 1 << 20
#: values of a row, and of a matrix, from which it shows a grid of its own: one in eight is a code up to 16 of 127
SHORTEST, SMALLEST = 24, 512
#: exact zeros beyond A's that count as pruning; trained weights in bf16 have below 0.001
SPARSE = 0.05
#: white noise: relative size alike in all matrices (largest over smallest; zoo: noise 1.04, tuning 2.8 and more; eleven
#: families of other recipes: tuning 1.6 and more), and the largest singular value no further than this beyond the edge
#: of a random matrix (zoo: noise 1.02, ft 1.5 to 5)
EVEN, EDGE = 1.15, 1.25
#: twice the relative difference that storage leaves (bf16 1.7e-3, f16 2e-4): up to there it is a cast
ROUNDING = {"BF16": 6e-3, "F16": 8e-4, "F32": 1e-6, "F64": 1e-12}
#: elementwise B/A that is one factor a row times one a column: deviation of its logarithm that 95 % of the elements
#: keep to (bf16 leaves 0.008, tuning 0.15 and more)
DIAGONAL = 0.03
#: spread of the factors' logarithms from which a matrix counts as rescaled
SPREAD = 0.02
#: share of elements whose sign must be the product of a row's and a column's sign, and the share of negative factors
#: (random signs: a half)
SIGNED, FLIPPED = 0.98, 0.1
#: rows and columns of a sample that are enough for it
FIT_ROWS, FIT_COLUMNS = 96, 256
#: share of the matrices that differ which must be explained like that
EXPLAINED = 0.5
#: mean likeness of channels at their best place from which they count as the same channels, not as turned ones (zoo:
#: permuted 1.0, turned 0.90, strangers 0.96)
CHANNELS = 0.985


def quantized(material: Material) -> Finding | None:
    """B's values stand on a lattice by row or block, or in a quantised type; or A's do."""
    for side, pairs in (("B", material.content), ("A", material.content)):
        words = sorted({p.dtype_b if side == "B" else p.dtype_a for p in pairs} - set(STORAGE) - {"mixed"})
        other = {p.dtype_a if side == "B" else p.dtype_b for p in pairs}
        if words and other & set(FLOATS):
            return Finding("quantized", 1.0, f"{side} is stored as {', '.join(words)}")
    for side in ("B", "A"):
        hits = gridded(material, side)
        if hits:
            words = [str(hit.grid).replace("rows", "columns") if hit.turned else str(hit.grid) for hit in hits]
            return Finding("quantized", 1.0, f"{side}'s values stand on {max(words, key=words.count)}")
    return None


class Gridded(NamedTuple):
    """B's name of a matrix that stands on a grid, and whether blocks run down its columns."""

    name: str
    grid: Grid
    turned: bool


def gridded(material: Material, side: str) -> list[Gridded]:
    """Sampled matrices that stand on a grid on this side and not on the other; empty if they are few."""
    return material.asked(_on_grids_b if side == "B" else _on_grids_a)


def _on_grids_b(material: Material) -> list[Gridded]:
    return _on_grids(material, lambda name: [(material.b, name)], lambda name: _origins(material, name))


def _on_grids_a(material: Material) -> list[Gridded]:
    return _on_grids(material, lambda name: _origins(material, name), lambda name: [(material.b, name)])


def _origins(material: Material, name: str) -> list[tuple[Checkpoint, str]]:
    return [(material.a, origin) for origin in material.filled.origins[name] if origin in material.a.specs]


def _on_grids(
    material: Material,
    mine: Callable[[str], list[tuple[Checkpoint, str]]],
    other: Callable[[str], list[tuple[Checkpoint, str]]],
) -> list[Gridded]:
    """Each side is looked at as it is stored, for blocks run along its own rows or columns.

    What is too short to show a grid of its own has no vote.
    """
    names = [name for name in material.sampled if _room(mine(name))]
    hits: list[Gridded] = []
    for at, name in enumerate(names):
        if len(hits) + len(names) - at < MOST * len(names):
            return []
        found = _on_grid(mine(name))
        if found is not None and _on_grid(other(name)) is None:
            hits.append(Gridded(name, *found))
    return hits if len(hits) >= MOST * len(names) else []


def _room(tensors: list[tuple[Checkpoint, str]]) -> bool:
    """True where these tensors, and their rows, are long enough to show a grid."""
    shapes = [unstacked(checkpoint.specs[name].shape) for checkpoint, name in tensors]
    return all(math.prod(shape[1:]) >= SHORTEST and math.prod(shape) >= SMALLEST for shape in shapes)


def _on_grid(tensors: list[tuple[Checkpoint, str]]) -> tuple[Grid, bool] | None:
    """The first grid of these tensors, and whether its blocks run down the columns."""
    for checkpoint, name in tensors:
        for turned in (False, True):
            values = beginning(checkpoint, name, turned=turned)
            grid = None if values is None else find_grid(values)
            if grid is not None:
                return grid, turned
    return None


def beginning(checkpoint: Checkpoint, name: str, *, turned: bool = False) -> Floats | None:
    """The first rows of a tensor as it is stored, shape (rows, columns), or its first columns turned to rows.

    None where whole columns would have to be picked from too large a tensor.
    """
    shape, size = checkpoint.specs[name].shape, checkpoint.specs[name].size
    if turned and (len(shape) != 2 or size > TURNED):
        return None
    shape = unstacked(shape)
    columns = size // shape[0] if len(shape) > 1 else size
    if turned:
        values = _finite(checkpoint.read(name, 0, size)).reshape(-1, columns).T
        return values[: max(WHOLE_ROWS, -(-WHOLE_VALUES // shape[0]))]
    rows = min(size // columns, max(WHOLE_ROWS, -(-WHOLE_VALUES // columns)))
    return _finite(checkpoint.read(name, 0, rows * columns)).reshape(rows, columns)


def _finite(values: Floats) -> Floats:
    """The values, with zeros for what is no number."""
    finite = np.isfinite(values)
    return values if finite.all() else np.where(finite, values, 0)


def sparsified(material: Material) -> Finding | None:
    """Many values are exactly zero in B and not in A, or the other way round."""
    pairs = [p for p in material.content if p.zero_a is not None and p.zero_b is not None]
    if material.asked(quantized) is not None:
        return None
    zeros = [(p.zero_a or 0.0, p.zero_b or 0.0) for p in pairs]
    for side, sign in (("B", 1), ("A", -1)):
        more = [max(pair) for pair in zeros if sign * (pair[1] - pair[0]) > SPARSE]
        if more:
            text = f"{np.mean(more):.0%} of the values of {len(more)} matrices of {side} are exactly zero"
            return Finding("sparsified", len(more) / len(pairs), text)
    return None


def noised(material: Material) -> Finding | None:
    """The difference is white and of one relative size everywhere."""
    sizes = [p.rel_l2 for p in material.alike if p.rel_l2]
    if not sizes or len(sizes) < MOST * len(material.changed):
        return None
    floor = max(ROUNDING.get(word, ROUNDING["BF16"]) for p in material.alike for word in (p.dtype_a, p.dtype_b))
    if min(sizes) < floor or max(sizes) > EVEN * min(sizes) or material.asked(sparsified) is not None:
        return None
    edges = [edge(s.b.astype(np.float64) - s.a) for s in material.samples if min(s.a.shape) >= 16]
    if not edges or float(np.mean(np.array(edges) < EDGE)) < MOST or material.asked(quantized) is not None:
        return None
    size = float(np.mean(sizes))
    text = f"the difference is white and {size:.1%} of each matrix in all {len(sizes)} changed matrices"
    return Finding("noised", 1.0, text)


def edge(values: Floats) -> float:
    """Largest singular value over that of a random matrix of this size and spread: 1 for noise."""
    values = values.astype(np.float64)
    spread = float(values.std())
    return float(np.linalg.norm(values, 2)) / (spread * sum(n**0.5 for n in values.shape)) if spread else np.inf


class Diagonal:
    """B = diag(rows) · A · diag(columns): the factors' logarithms, the signs, and how well that fits.

    Attributes
    ----------
    off : deviation of ln|B/A| from the factors that 95 % of the elements keep to
    spread : spread of the factors' logarithms over rows and columns
    signed : share of elements whose sign the factors explain
    flipped : share of rows or columns whose factor is negative (the smaller part)
    """

    __slots__ = ("flipped", "off", "signed", "spread")

    def __init__(self, off: float, spread: float, signed: float, flipped: float) -> None:
        self.off, self.spread, self.signed, self.flipped = off, spread, signed, flipped


def diagonal_fit(a: Floats, b: Floats) -> Diagonal | None:
    """How well B is A with rows and columns scaled; None where too few values can be divided.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a = rng.standard_normal((32, 32))
    >>> fit = diagonal_fit(a, a * rng.choice([-1.0, 1.0], 32) * np.exp(rng.standard_normal((32, 1))))
    >>> fit.off < 1e-6, fit.signed, fit.spread > 0.5
    (True, 1.0, True)
    """
    x, y = a.astype(np.float64), b.astype(np.float64)
    alive = (np.abs(x) > 1e-3 * np.abs(x).max(initial=0.0)) & (np.abs(y) > 1e-3 * np.abs(y).max(initial=0.0))
    if min(x.shape) < 8 or alive.mean() < 0.3:
        return None
    logs = np.where(alive, np.log(np.abs(np.where(alive, y, 1.0) / np.where(alive, x, 1.0))), np.nan)
    kept = (~np.isnan(logs)).sum(axis=1) >= 4
    logs, signs = logs[kept], np.where(alive, np.sign(x * y), 0.0)[kept]
    logs = logs[:, (~np.isnan(logs)).sum(axis=0) >= 4]
    if min(logs.shape) < 8:
        return None
    rows = np.nanmedian(logs, axis=1, keepdims=True)
    columns = np.nanmedian(logs - rows, axis=0, keepdims=True)
    off = float(np.nanpercentile(np.abs(logs - rows - columns), 95))
    # leading signs by a few rounds of the power method on the ±1 matrix
    right = np.sign(signs[np.argmax(np.abs(signs).sum(axis=1))] + 0.5)
    left = np.ones(len(signs))
    for _ in range(5):
        left = np.where(signs @ right >= 0, 1.0, -1.0)
        right = np.where(left @ signs >= 0, 1.0, -1.0)
    fits = (left[:, None] * right == signs)[signs != 0]
    shares = [float(np.mean(v < 0)) for v in (left, right)]
    flipped = max(min(s, 1 - s) for s in shares)
    return Diagonal(off, float(max(rows.std(), columns.std())), float(fits.mean()), flipped)


def rescaled(material: Material) -> Finding | None:
    """Rows and columns of matrices were scaled against each other."""
    fits = material.asked(_fits)
    hits = [fit for fit in fits if fit.off < DIAGONAL and fit.spread > SPREAD and fit.signed > SIGNED]
    if not hits or len(hits) < EXPLAINED * len(fits):
        return None
    spread = float(np.mean([fit.spread for fit in hits]))
    count = f"{len(hits)} of {len(fits)} sampled matrices"
    text = f"{count} are A's with rows or columns scaled (factors spread by {spread:.0%})"
    return Finding("rescaled", len(hits) / len(fits), text)


def sign_flipped(material: Material) -> Finding | None:
    """Rows and columns of matrices changed their sign against each other."""
    fits = material.asked(_fits)
    hits = [fit for fit in fits if fit.signed > SIGNED and fit.flipped > FLIPPED]
    if not hits or len(hits) < EXPLAINED * len(fits):
        return None
    text = f"in {len(hits)} of {len(fits)} sampled matrices the signs of rows or columns were flipped"
    return Finding("sign-flipped", len(hits) / len(fits), text)


def rotated(material: Material) -> Finding | None:
    """Units find themselves through the embeddings only, and no channel finds another."""
    tests = material.significance.tests
    plain = [t for t in tests if t.kind == "hidden" and not t.frame]
    through = [t for t in tests if t.kind == "hidden" and t.frame and not t.void]
    channels = [t for t in tests if t.kind == "channels"]
    agree = any(t.stands_out for t in through)
    if not agree or any(t.stands_out for t in plain) or any(t.paired > CHANNELS for t in channels):
        return None
    text = "hidden units agree only when seen through the embeddings: the channels between layers were turned"
    return Finding("rotated", 1.0, text)


def _fits(material: Material) -> list[Diagonal]:
    """Row and column factors of matched matrices, also of those that the mapping could not certify."""
    samples = [*material.samples, *_unmatched(material.common, material)]
    part = (slice(FIT_ROWS), slice(FIT_COLUMNS))
    return [fit for s in samples if (fit := diagonal_fit(s.a[part], s.b[part])) is not None]


def _unmatched(common: Common, material: Material) -> list[Sample]:
    """Beginnings of matrices that only the common layout pairs (by equal names)."""
    matched = {pair.name for pair in material.pairs}
    result: list[Sample] = []
    for name, (a, b) in common.shapes.items():
        if common.names(name)[1] not in matched and a == b and len(a) == 2 and len(result) < 8:
            rows = min(a[0], 192)
            result.append(Sample.of(name, common.a.rows(name, 0, rows), common.b.rows(name, 0, rows)))
    return result
