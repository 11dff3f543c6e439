"""The residual space of a stack: signed order, a subset of channels, or a rotation, from tensors outside the layers.

Rows of embeddings, heads, positions and patches keep their index, so their columns can be matched. Strangers that
share a vocabulary share its statistics, too: such a fit says nothing by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.anatomy import Anatomy, Part
from lineage.judge.align.neurons import match_units
from lineage.judge.align.turns import Turn, identity
from lineage.judge.align.weights import Weights
from lineage.match.units import normalised

__all__ = ["Frame", "candidates", "frame", "order_of", "rotation_of"]

Floats = NDArray[np.floating[Any]]

#: rows of an outside tensor for each channel of the residual space
ROWS_EACH = 4
#: rows for each channel from which heads without a norm are left out
ENOUGH_EACH = 2
#: rows below which outside tensors say too little about the channels
FEWEST_ROWS = 16


class Frame(msgspec.Struct, frozen=True):
    """Rows over the residual space that correspond by their index.

    Attributes
    ----------
    a, b : (rows, channels), each tensor scaled to unit power
    tensors : where they come from
    """

    a: Floats
    b: Floats
    tensors: tuple[str, ...]


def frame(weights: Weights, anatomy: Anatomy, *, seed: int, most: int | None = None) -> Frame | None:
    """The rows of all outside tensors that both sides know; those that read are seen through the last norm.

    Parameters
    ----------
    most : rows of each tensor at most; None: enough to fit the residual space
    """
    rng = np.random.default_rng(seed)
    most = most or ROWS_EACH * max(anatomy.residual)
    found: list[tuple[str, Floats, Floats]] = []
    # heads whose norm is not known come last: what they read is scaled channel by channel
    for part in sorted(anatomy.outside, key=lambda p: p.reads and _gain(p, anatomy) is None):
        shared = min(part.units)
        gain = _gain(part, anatomy)
        enough = sum(len(a) for _, a, _ in found) >= ENOUGH_EACH * max(anatomy.residual)
        if not shared or (part.reads and gain is None and enough):
            continue
        chosen = np.sort(rng.choice(shared, most, replace=False)) if shared > most else np.arange(shared)
        a, b = (weights.rows(side, part, chosen, gain) for side in (0, 1))
        found.append((part.name, _unit_power(a), _unit_power(b)))
    if sum(len(a) for _, a, _ in found) < FEWEST_ROWS:
        return None
    names, rows_a, rows_b = zip(*found, strict=True)
    return Frame(np.concatenate(rows_a), np.concatenate(rows_b), names)


def candidates(rows: Frame | None, residual: tuple[int, int], *, seed: int) -> Iterator[tuple[str, Turn]]:
    """Families of transforms of the residual space, each fitted on these rows when it is asked for, simplest first."""
    if residual[0] == residual[1]:
        yield "identity", identity(residual[0])
    if rows is not None:
        yield "order", order_of(rows.a, rows.b, seed=seed)
        yield "rotation", rotation_of(rows.b.T @ rows.a)


def order_of(a: Floats, b: Floats, *, seed: int) -> Turn:
    """Channels in another order, with other signs, or some of them only.

    Parameters
    ----------
    a, b : (rows, channels) that correspond by row
    """
    one, two = (normalised(rows.T - rows.T.mean(axis=1, keepdims=True), centred=False) for rows in (a, b))
    take = match_units([one], [two], seed=seed)
    dots = np.einsum("ij,ij->i", one[take], two)
    signs = np.where(dots < 0, -1.0, 1.0)
    return Turn(length=a.shape[1], take=take, scale=None if np.all(signs > 0) else signs)


def rotation_of(cross: Floats) -> Turn:
    """The orthogonal matrix nearest to a cross product of B's and A's rows, shape (channels of B, channels of A)."""
    u, _, v = np.linalg.svd(cross.astype(np.float64), full_matrices=False)
    return Turn(length=cross.shape[1], blocks=(np.asarray(u @ v),), orthogonal=True)


def _gain(part: Part, anatomy: Anatomy) -> str | None:
    """The norm before a head: the only one that stands outside the layers."""
    weights = [weight for weight, _ in anatomy.gains]
    return weights[0] if part.reads and len(weights) == 1 else None


def _unit_power(rows: Floats) -> Floats:
    power = float(np.sqrt(np.mean(np.square(rows, dtype=np.float64))))
    return rows / np.float32(power) if power > 0 else rows
