"""The singular values of B - A: in how many directions a matrix changed, and how many of them rounding cannot explain.

Small matrices are decomposed whole. Of large ones the leading values come from a seeded random projection and the
rest from a seeded quadrature; they are read block by block where they are too large to be held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import FLOATS
from lineage.measure.pairs import MANTISSA

__all__ = ["LEADING", "Spectrum", "effective_rank", "matrix_shape", "rounding_variance", "spectrum"]

Floats = NDArray[np.floating[Any]]

#: how many leading directions the shares are of
LEADING = (1, 4, 16, 64)
#: shorter axis squared times longer axis, up to which a matrix is decomposed whole (512 x 1024: 0.1 s)
WHOLE = 1 << 28
#: random directions of the projection: those wanted and as many more as Halko et al. advise (section 4.2)
DIRECTIONS = LEADING[-1] + 16
#: times that the projection is sharpened; two suffice for the slow decay of trained weights (Halko et al., 9.3)
POWERS = 2
#: probes and steps of the quadrature: measured on spectra that decay into rounding, effective ranks come out within
#: 4 %, counts above the rounding within 15 % (20 steps: 30 %)
PROBES, STEPS = 4, 48
#: elements of a difference that is held in memory; a larger one is read anew for every product
HELD = 1 << 26
#: elements that are read at a time
BLOCK = 1 << 22
#: tail energy below this share is the arithmetic's own
NOTHING = 1e-12


class Spectrum(msgspec.Struct, frozen=True, kw_only=True):
    """Singular values of one matrix B - A, in figures.

    Attributes
    ----------
    effective_rank : exp of the entropy of the singular values, 1 to `size`
    rank_above_rounding : singular values that rounding to the stored dtypes cannot make, `size` at most; None where
        a side is stored in blocks with scales of their own, whose rounding has no such bound
    leading : shares of the squared norm in the first 1, 4, 16 and 64 directions
    size : directions that the matrix has: its shorter axis
    exact : the matrix was decomposed whole; False: ranks beyond the leading directions are estimates
    """

    effective_rank: float
    rank_above_rounding: int | None
    leading: tuple[float, ...]
    size: int
    exact: bool


def spectrum(
    a: Checkpoint, b: Checkpoint, name: str, b_name: str | None = None, *, seed: int = 0, held: int = HELD
) -> Spectrum | None:
    """The singular values of one tensor's difference, None where it is no matrix, holds no real numbers, or is zero.

    Parameters
    ----------
    name, b_name : in A and in B, equal where only one is given; the tensors have equal sizes
    seed : of projection and probes
    held : elements up to which the difference is kept in memory

    Raises
    ------
    InputError : a file changed or cannot be read

    Notes
    -----
    A tensor of more than two axes is cut in two where that makes it most nearly square: kernels lie beside their
    input channels, stacked matrices below each other. Elements that are not finite on both sides count as equal.

    Leading directions: Halko, Martinsson and Tropp, "Finding Structure with Randomness", SIAM Review 53 (2011),
    algorithms 4.4 and 5.1. All others, of large matrices: stochastic Lanczos quadrature (Ubaru, Chen and Saad, SIAM
    J. Matrix Anal. Appl. 38, 2017) on what the leading ones leave over.

    Cost of an r × c matrix that is not decomposed whole: about 4 r c (80 (POWERS + 1) + 4 STEPS) operations; memory
    4 to 8 bytes an element where it is held, else one block, and 80 (r + c) numbers in either case.
    """
    one, two = a.specs[name], b.specs[b_name or name]
    rows, columns = matrix_shape(two.shape)
    if min(rows, columns) < 2 or not (_real(one) and _real(two)):
        return None
    delta = _Difference(a, b, one, two, rows, columns, held)
    if delta.energy == 0:
        return None
    size = min(rows, columns)
    if delta.whole is not None and size * rows * columns <= WHOLE:
        values: Floats = np.linalg.svd(delta.whole.astype(np.float64), compute_uv=False)
        tail = _Tail.none()
    else:
        values, basis = _leading(delta, seed)
        tail = _tail(delta, values, basis, seed) if len(values) < size else _Tail.none()
    shares = np.minimum(np.cumsum(values**2) / delta.energy, 1.0)
    leading = tuple(round(float(shares[min(k, len(shares)) - 1]), 6) for k in LEADING)
    above = None
    if delta.floor is not None:
        floor = max(delta.floor, float(values[0]) * max(rows, columns) * delta.grain)
        above = int(np.count_nonzero(values > floor))
        above = min(size, above + round(tail.above(floor))) if above == len(values) else above
    rank = min(float(size), math.exp(_entropy(values, tail)))
    return Spectrum(
        effective_rank=round(rank, 3), rank_above_rounding=above, leading=leading, size=size, exact=not tail.values.size
    )  # fmt: skip


def effective_rank(values: Floats) -> float:
    """exp of the Shannon entropy of singular values that are scaled to sum to 1; 0 where all are zero.

    Notes
    -----
    Source: Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, definition 1.

    Examples
    --------
    >>> import numpy as np
    >>> effective_rank(np.array([2.0, 2.0, 2.0, 0.0])), effective_rank(np.zeros(3))
    (3.0, 0.0)
    """
    return round(math.exp(_entropy(values, _Tail.none())), 9) if np.any(values) else 0.0


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a tensor as a matrix: cut in two where that makes it most nearly square.

    Examples
    --------
    >>> matrix_shape((64, 32, 3, 3)), matrix_shape((3, 3, 32, 64)), matrix_shape((48, 96, 96)), matrix_shape((7,))
    ((64, 288), (288, 64), (4608, 96), (7, 1))
    """
    cuts = [(math.prod(shape[:at]), math.prod(shape[at:])) for at in range(1, len(shape) + 1)]
    return max(cuts, key=min, default=(1, 1))


def rounding_variance(values: Floats, word: str) -> Floats | None:
    """Variance that storing as the float format `word` gives each value: a uniform error in one step, step² / 12.

    None where the format has blocks with scales of their own. Integers are exact.
    """
    if word not in MANTISSA:
        return None
    if values.dtype == np.float32:  # the exponent's bits alone are the power of two below
        binade = (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    else:
        binade = np.ldexp(np.sign(np.abs(values)) / 2, np.frexp(values)[1])
    step = binade * binade.dtype.type(2.0 ** -MANTISSA[word] / 12**0.5)
    squares: Floats = step * step
    return squares


# -- the difference


class _Difference:
    """B - A as a matrix: its squared norm, the norm that rounding can reach, and products with thin matrices.

    Attributes
    ----------
    whole : the matrix, None where it is too large to be held
    energy : squared Frobenius norm
    floor : bound of the spectral norm of both sides' rounding errors, None where it is unknown
    dtype, grain : of the products, and its epsilon: float64 where values hold more digits than float32 keeps
    """

    def __init__(
        self, a: Checkpoint, b: Checkpoint, one: TensorSpec, two: TensorSpec, rows: int, columns: int, held: int
    ) -> None:
        self._sides = ((a, one), (b, two))
        self.rows, self.columns = self._stored = rows, columns
        self._turned = False
        fine = all(spec.dtype in ("F32", "F64") for spec in (one, two))
        self.dtype = np.dtype(np.float64 if fine else np.float32)
        self.grain = float(np.finfo(np.float64 if fine else np.float32).eps)
        self.energy = 0.0
        keep = rows * columns <= held
        self.whole: Floats | None = np.empty((rows, columns), self.dtype) if keep else None
        sums: list[Floats] | None = [np.zeros(rows), np.zeros(columns)]
        for at, x, y in self._read():
            block = _finite(x, y)
            self.energy += float(np.vdot(block, block))
            if self.whole is not None:
                self.whole[at : at + len(block)] = block
            sums = _rounded(sums, at, x, y, one.dtype, two.dtype)
        # E|X| for independent entries: greatest row norm + greatest column norm (Bandeira and van Handel, Annals of
        # Probability 44, 2016, theorem 1.1, whose last term vanishes at this size)
        self.floor = None if sums is None else float(np.sqrt(sums[0].max()) + np.sqrt(sums[1].max()))

    def _read(self) -> Iterator[tuple[int, Floats, Floats]]:
        """First row and both sides' values of each block of rows."""
        (a, one), (b, two) = self._sides
        rows, columns = self._stored
        step = max(1, BLOCK // columns)
        for at in range(0, rows, step):
            start, stop = at * columns, min(rows, at + step) * columns
            x, y = a.read(one.name, start, stop), b.read(two.name, start, stop)
            yield at, x.reshape(-1, columns), y.reshape(-1, columns)

    def turn(self) -> None:
        """Products are those of the transposed matrix from here on, where that has fewer columns."""
        self._turned = self.columns > self.rows
        if self._turned:
            self.rows, self.columns = self.columns, self.rows
            self.whole = None if self.whole is None else self.whole.T

    def times(self, right: Floats) -> Floats:
        """The matrix times `right`, shape (columns, k)."""
        right = right.astype(self.dtype)
        if self.whole is not None:
            return np.asarray(self.whole @ right, np.float64)
        return self._down(right) if self._turned else self._across(right)

    def squared(self, right: Floats) -> Floats:
        """The transposed matrix times the matrix times `right`."""
        right = right.astype(self.dtype)
        if self.whole is not None:
            return np.asarray(self.whole.T @ (self.whole @ right), np.float64)
        if self._turned:
            return self._across(self._down(right).astype(self.dtype))
        result = np.zeros(right.shape)
        for _, block in self._blocks():  # one pass for both products
            result += block.T @ (block @ right)
        return result

    def _across(self, right: Floats) -> Floats:
        """The matrix as it is stored times `right`."""
        return np.concatenate([np.asarray(block @ right, np.float64) for _, block in self._blocks()])

    def _down(self, right: Floats) -> Floats:
        """The matrix as it is stored, transposed, times `right`."""
        return sum((block.T @ right[at : at + len(block)] for at, block in self._blocks()), np.zeros(()))

    def _blocks(self) -> Iterator[tuple[int, Floats]]:
        """First row and rows of each block as it is stored."""
        for at, x, y in self._read():
            yield at, _finite(x, y).astype(self.dtype, copy=False)


def _finite(x: Floats, y: Floats) -> Floats:
    """y - x in float64, 0 where a side is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        block = np.subtract(y, x, dtype=np.float64)
    if not np.isfinite(block).all():
        block[~np.isfinite(block)] = 0.0
    return block


def _rounded(sums: list[Floats] | None, at: int, x: Floats, y: Floats, word_a: str, word_b: str) -> list[Floats] | None:
    """Variances of the rounding errors, by row and by column, with those of one more block."""
    for values, word in ((x, word_a), (y, word_b)):
        variance = rounding_variance(np.where(np.isfinite(values), values, 0), word)
        if variance is None or sums is None:
            return None
        sums[0][at : at + len(values)] += variance.sum(axis=1, dtype=np.float64)
        sums[1] += variance.sum(axis=0, dtype=np.float64)
    return sums


def _real(spec: TensorSpec) -> bool:
    """False for integers and truth values, which count something."""
    return spec.dtype in FLOATS or not spec.plain


# -- singular values


class _Tail(msgspec.Struct, frozen=True):
    """Singular values beyond the leading ones: some of them, and how many each stands for; shape (probes, steps)."""

    values: Floats
    counts: Floats

    @classmethod
    def none(cls) -> _Tail:
        """Nothing beyond the leading ones."""
        return cls(np.empty((0, 0)), np.empty((0, 0)))

    def above(self, floor: float) -> float:
        """How many are larger."""
        return float(self.counts[self.values > floor].sum())


def _entropy(values: Floats, tail: _Tail) -> float:
    """Shannon entropy (nats) of singular values that are scaled to sum to 1."""
    every = np.concatenate([np.asarray(values, np.float64), tail.values.reshape(-1)])
    counts = np.concatenate([np.ones(len(values)), tail.counts.reshape(-1)])[every > 0]
    every = every[every > 0]
    shares = every / float(counts @ every)
    return -float(counts @ (shares * np.log(shares)))


def _leading(delta: _Difference, seed: int) -> tuple[Floats, Floats]:
    """The leading singular values, and their right vectors as columns."""
    delta.turn()
    draw = np.random.default_rng([seed, delta.rows, delta.columns])
    count = min(DIRECTIONS, delta.rows, delta.columns)
    basis = draw.standard_normal((delta.columns, count))
    for _ in range(POWERS + 1):
        basis = np.linalg.qr(delta.squared(basis))[0]
    _, values, turn = np.linalg.svd(delta.times(basis), full_matrices=False)
    return values, basis @ turn.T


def _tail(delta: _Difference, values: Floats, basis: Floats, seed: int) -> _Tail:
    """All other singular values, by quadrature: nodes and weights of Lanczos runs from random starts."""
    energy = delta.energy - float(values @ values)
    if energy <= NOTHING * delta.energy:
        return _Tail.none()

    def outside(x: Floats) -> Floats:
        """What the leading directions leave of x; twice, for the digits."""
        x = x - basis @ (basis.T @ x)
        return x - basis @ (basis.T @ x)

    draw = np.random.default_rng([seed, delta.rows, delta.columns, 1])
    starts = outside(draw.standard_normal((delta.columns, PROBES)))
    starts /= np.linalg.norm(starts, axis=0)
    diagonal, beside = _lanczos(lambda x: outside(delta.squared(x)), starts)
    nodes, weights = [], []
    for d, e in zip(diagonal.T, beside.T, strict=True):
        theta, vectors = np.linalg.eigh(np.diag(d) + np.diag(e[:-1], 1) + np.diag(e[:-1], -1))
        nodes.append(np.sqrt(np.maximum(theta, 0.0)))
        weights.append(vectors[0] ** 2)
    found, counts = np.stack(nodes), np.stack(weights) * ((delta.columns - len(values)) / PROBES)
    # the greatest of the rest is not above the least of the leading ones; and the energy is known
    found = np.minimum(found, values[-1])
    seen = float((counts * found**2).sum())
    return _Tail(found * math.sqrt(energy / seen), counts) if seen > 0 else _Tail.none()


def _lanczos(times: Callable[[Floats], Floats], starts: Floats) -> tuple[Floats, Floats]:
    """Diagonals of the tridiagonal matrices of one Lanczos run for each start, shape (steps, starts).

    All vectors of a run are kept orthogonal to each other.
    """
    steps = min(STEPS, starts.shape[0])
    diagonal, beside = np.zeros((steps, starts.shape[1])), np.zeros((steps, starts.shape[1]))
    held = np.zeros((steps, *starts.shape))
    current = starts
    for at in range(steps):
        held[at] = current
        further = times(current)
        diagonal[at] = (current * further).sum(axis=0)
        for _ in range(2):
            further = further - (held[: at + 1] * (held[: at + 1] * further).sum(axis=1, keepdims=True)).sum(axis=0)
        beside[at] = np.linalg.norm(further, axis=0)
        done = beside[at] <= NOTHING * np.abs(diagonal).max(axis=0)
        beside[at][done] = 0.0
        current = np.where(done, 0.0, further / np.where(done, 1.0, beside[at]))
    return diagonal, beside
