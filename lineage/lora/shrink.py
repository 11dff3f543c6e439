"""Pairs of a lower rank: the best one by singular values, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.lora.delta import Delta, stacked
from lineage.lora.forms import low_rank, slices
from lineage.lora.network import Term

__all__ = ["Shrunk", "chosen_rank", "from_matrix", "shrunk", "shrunk_all"]


class Shrunk(msgspec.Struct, frozen=True):
    """A delta of a lower rank.

    Attributes
    ----------
    delta : one pair, scale 1
    before, rank : ranks, the highest ones of a stack
    lost : share of the squared norm that is gone, the mean of a stack
    """

    delta: Delta
    before: int
    rank: int
    lost: float


def chosen_rank(values: NDArray[Any], rank: int | None, energy: float | None) -> int:
    """How many singular values are kept: at most `rank`, and as many as hold `energy` of the squared norm.

    Examples
    --------
    >>> import numpy as np
    >>> chosen_rank(np.array([3.0, 1.0, 0.0]), None, 0.9)
    1
    """
    kept = int(np.count_nonzero(values > values[0] * np.finfo(np.float64).eps * len(values))) if values.any() else 1
    if energy is not None:
        shares = np.cumsum(values**2) / max(float((values**2).sum()), np.finfo(np.float64).tiny)
        kept = min(kept, int(np.searchsorted(shares, energy - 1e-12)) + 1)
    return max(1, min(kept, rank) if rank is not None else kept)


def shrunk(delta: Delta, *, rank: int | None = None, energy: float | None = None, lead: int = 0) -> Shrunk:
    """The best approximation of a matrix delta by fewer ranks (Eckart and Young).

    Parameters
    ----------
    lead : axes that number matrices; each of them is cut by itself

    Notes
    -----
    Cost: two QR decompositions of the factors, never the matrix itself. Magnitudes stay as they are.
    """
    if lead:
        some = [shrunk(d, rank=rank, energy=energy, lead=lead - 1) for d in slices(delta, 1)]
        lost = sum(s.lost for s in some) / len(some)
        whole = msgspec.structs.replace(delta, terms=stacked([s.delta for s in some], 0).terms)
        return Shrunk(whole, max(s.before for s in some), max(s.rank for s in some), lost)
    pair = low_rank(delta)
    up, down = pair.up.astype(np.float64) * pair.scale, pair.down.astype(np.float64)
    left, r_left = np.linalg.qr(up)
    right, r_right = np.linalg.qr(down.T)
    u, values, v = np.linalg.svd(r_left @ r_right.T)
    kept = chosen_rank(values, rank, energy)
    if kept >= pair.rank:
        return Shrunk(delta, pair.rank, pair.rank, 0.0)
    total = float((values**2).sum())
    lost = float((values[kept:] ** 2).sum()) / total if total else 0.0
    root = np.sqrt(values[:kept])
    term = _term((left @ u[:, :kept]) * root, (root[:, None] * v[:kept]) @ right.T, delta.shape)
    return Shrunk(msgspec.structs.replace(delta, terms=(term,)), pair.rank, kept, lost)


def shrunk_all(
    deltas: Mapping[str, Delta], *, rank: int | None = None, energy: float | None = None
) -> dict[str, Shrunk]:
    """Every matrix cut; parameters that stand alone with more than two axes are stacks of matrices."""
    found = {}
    for name, delta in deltas.items():
        if len(delta.shape) > 1 and delta.terms:
            lead = 0 if name.endswith(".weight") else len(delta.shape) - 2
            found[name] = shrunk(delta, rank=rank, energy=energy, lead=lead)
    return found


def from_matrix(
    difference: NDArray[Any], *, rank: int | None = None, energy: float | None = None, seed: int = 0
) -> tuple[Delta, int, float]:
    """A dense difference as a pair of few ranks: the delta, its rank, the share of the squared norm lost.

    Notes
    -----
    A large matrix of which few ranks are wanted is projected on random vectors first, with four power steps (Halko,
    Martinsson and Tropp 2011, algorithm 4.4); the loss is measured, not estimated.
    """
    shape = difference.shape
    matrix = difference.reshape(shape[0], -1).astype(np.float64)
    total = float((matrix**2).sum())
    small = min(matrix.shape)
    if rank is not None and small > 8 * rank and small > 512:
        u, values, v = _projected(matrix, rank, seed)
    else:
        u, values, v = np.linalg.svd(matrix, full_matrices=False)
    kept = chosen_rank(values, rank, energy)
    root = np.sqrt(values[:kept])
    lost = max(0.0, 1 - float((values[:kept] ** 2).sum()) / total) if total else 0.0
    term = _term((u[:, :kept] * root).astype(np.float32), (root[:, None] * v[:kept]).astype(np.float32), shape)
    return Delta(shape=shape, terms=(term,)), kept, lost


def _projected(matrix: NDArray[Any], rank: int, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The leading singular values and vectors."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(matrix @ generator.standard_normal((matrix.shape[1], min(2 * rank + 10, *matrix.shape))))[0]
    for _ in range(4):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    u, values, v = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, values, v


def _term(up: NDArray[Any], down: NDArray[Any], shape: tuple[int, ...]) -> Term:
    letters = "ihwdt"[: len(shape) - 1]
    return Term.of([(up, "ok"), (down.reshape(-1, *shape[1:]), "k" + letters)], ["o", *letters])
