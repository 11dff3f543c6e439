"""A first look at large models: do the units of one layer do the same to the same tokens, in whatever basis?

What a unit reads and writes, multiplied with the rows of the embeddings, does not change when channels are permuted,
flipped or rotated. So nothing is fitted, and strangers are told in a second, before any decomposition is made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.anatomy import Anatomy, Layer, Part
from lineage.judge.align.residual import FEWEST_ROWS, Frame, frame
from lineage.judge.align.weights import Weights, unit_cosines
from lineage.match.units import normalised

__all__ = ["first_look"]

Floats = NDArray[np.floating[Any]]

#: rows of the embeddings, and units of B, that are looked at
TOKENS, UNITS = 384, 192


def first_look(weights: Weights, anatomy: Anatomy, *, seed: int) -> tuple[float, float] | None:
    """Agreement of what units write, for units matched by what they read, and the same between different layers.

    Returns
    -------
    cosine and floor, or None where there are no tokens or no MLPs to look at
    """
    rows = frame(weights, anatomy, seed=seed, most=TOKENS)
    layers = [layer for layer in anatomy.layers if layer.mlps]
    if rows is None or len(rows.a) < FEWEST_ROWS or not layers:
        return None
    middle = len(layers) // 2
    here = layers[middle]
    found = _agreement(weights, rows, here, here, seed)
    there = layers[middle - 1] if len(layers) > 1 else here
    apart = 0.0
    if there is not here and [m.units for m in there.mlps[:1]] == [m.units for m in here.mlps[:1]]:
        apart = _agreement(weights, rows, there, here, seed)
    return found, apart


def _agreement(weights: Weights, rows: Frame, one: Layer, two: Layer, seed: int) -> float:
    """The same for a layer of A and one of B."""
    a, b = one.mlps[0], two.mlps[0]
    if len(a.readers) != len(b.readers):
        return 0.0
    some = np.sort(np.random.default_rng(seed).permutation(b.units[1])[:UNITS])
    alike = np.zeros((a.units[0], len(some)), np.float32)
    signs = np.ones_like(alike)
    for p, q in zip(a.readers, b.readers, strict=True):
        x = normalised(_seen(weights, 0, p, rows.a, None), centred=False)
        y = normalised(_seen(weights, 1, q, rows.b, some), centred=False)
        product = x @ y.T
        alike += np.abs(product)
        signs *= np.sign(product)
    take = alike.argmax(axis=0)
    x = _seen(weights, 0, a.writers[0], rows.a, take) * signs[take, np.arange(len(some))][:, None]
    return abs(float(np.mean(unit_cosines(x, _seen(weights, 1, b.writers[0], rows.b, some)))))


def _seen(weights: Weights, side: int, part: Part, tokens: Floats, some: NDArray[np.intp] | None) -> Floats:
    """What units do for each token, shape (units, tokens)."""
    units = weights.part(side, part)
    units = units if some is None else units[some]
    seen = units @ tokens.T
    return np.asarray(seen - seen.mean(axis=1, keepdims=True))
