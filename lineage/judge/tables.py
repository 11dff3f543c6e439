"""Tensors that anyone computes alike: sinusoids, identities, constants. They prove nothing and void their axes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["constant", "diagonal", "few_values", "sinusoidal"]

Floats = NDArray[np.floating[Any]]

#: share of columns that must follow x[t-1] + x[t+1] = 2·cos(w)·x[t] for the tensor to count as sinusoids
WAVES = 0.9
#: median violation of that recurrence, relative to the column's size. Tables in bf16 leave up to 0.01, tables that
#: were trained on 0.05 to 0.2; trained positions start at 0.8 (zoo: vit, gpt2)
WAVY = 0.3
#: energy on the diagonal over that of the average place. Gaussian matrices of 64 rows stay below 1.7 in 10^5 draws
DIAGONAL = 3.0


def constant(values: Floats) -> bool:
    """True where all values are equal (initialised and never trained, or a mask)."""
    return values.size == 0 or bool(np.all(values == values.flat[0]))


def few_values(values: Floats, most: int) -> bool:
    """True where there are at most `most` different values."""
    return len(np.unique(values[: 1 << 14])) <= most


def sinusoidal(positions: Floats) -> bool:
    """True for a table of sines and cosines over positions, also after some training on top.

    Parameters
    ----------
    positions : (positions, channels); fewer than 8 positions are never taken for a table

    Notes
    -----
    Any sinusoid of any frequency and phase follows a linear recurrence of two terms; its coefficient is fitted
    for each column. Tables over two directions follow it but for one position in each row.

    Examples
    --------
    >>> angle = np.arange(32)[:, None] / 10000 ** (np.arange(16) / 16)
    >>> sinusoidal(np.concatenate([np.sin(angle), np.cos(angle)], axis=1))
    True
    >>> sinusoidal(np.random.default_rng(0).standard_normal((32, 32)))
    False
    """
    if positions.ndim != 2 or len(positions) < 8:
        return False
    x = positions.astype(np.float64)
    centre, around = x[1:-1], x[:-2] + x[2:]
    power = np.einsum("ij,ij->j", centre, centre)
    alive = power > 0
    if not alive.any():
        return False
    # least squares is thrown off by the ends of rows of a table over two directions; a median ratio is not
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nanmedian(np.where(np.abs(centre) > 0, around / centre, np.nan)[:, alive], axis=0)
    off = np.median(np.abs(around[:, alive] - ratio * centre[:, alive]), axis=0)
    size = np.sqrt(power[alive] / len(centre))
    return bool(np.mean(off <= WAVY * size) >= WAVES)


def diagonal(units: Floats) -> bool:
    """True where unit i speaks mostly of feature i: an identity or Dirac initialisation shows through.

    Parameters
    ----------
    units : (units, features), in the order of the axis, whole

    Examples
    --------
    >>> noise = np.random.default_rng(0).standard_normal((64, 64)) / 8
    >>> diagonal(noise), diagonal(noise + np.eye(64))
    (False, True)
    """
    rows, columns = units.shape
    if min(rows, columns) < 8:
        return False
    energy = np.square(units, dtype=np.float64)
    mean = float(energy.mean())
    shorter = min(rows, columns)
    places = np.arange(shorter)
    spots = [energy[places, places]]
    # a wider identity repeats: (2n, n) stacks two of them
    for repeat in range(1, max(rows, columns) // shorter):
        at = places + repeat * shorter
        spots.append(energy[at, places] if rows > columns else energy[places, at])
    return mean > 0 and max(float(spot.mean()) for spot in spots) > DIAGONAL * mean
