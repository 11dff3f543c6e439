"""Tensors that anyone computes alike: sinusoids, identities, banks of filters, signs. They void their axes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.judge.laws import log10_order_kept, longest_increasing

__all__ = ["banded", "diagonal", "sinusoidal", "uniform"]

Floats = NDArray[np.floating[Any]]

#: share of columns that must follow x[t-1] + x[t+1] = 2·cos(w)·x[t] for the tensor to count as sinusoids
WAVES = 0.9
#: median violation of that recurrence, relative to the column's size. Tables in bf16 leave up to 0.01, tables that
#: were trained on 0.05 to 0.2; trained positions start at 0.8 (zoo: vit, gpt2)
WAVY = 0.3
#: share of columns that must swing within 20 positions: rows that never got a gradient are all alike, and smooth too.
#: The usual tables (10000^-k) have 12 % such columns
SWINGING = 0.04
#: standard errors by which the mean rank of the diagonal may pass one half: never by chance (1e-9), while an identity
#: of a fifth of the noise's size shows with 512 rows
DIAGONAL = 6.0
#: log10 of the chance that trained units stand in the order of their centres as far as they do
BANDED = -9.0


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
    follows = off <= WAVY * size
    return bool(np.mean(follows) >= WAVES and np.mean(follows & (ratio < 1.9)) >= SWINGING)


def diagonal(
    units: Floats,
    rows: NDArray[np.intp] | None = None,
    columns: NDArray[np.intp] | None = None,
    *,
    period: int = 0,
    errors: float = DIAGONAL,
) -> bool:
    """True where unit i speaks mostly of feature i: an identity or Dirac initialisation shows through.

    Parameters
    ----------
    units : (units, features)
    rows, columns : index of each unit and of each feature on its axis; None: all of them, in order
    period : length after which a pattern wider than the other axis starts again; 0: the shorter side of `units`
    errors : standard errors by which the diagonal must stand out

    Examples
    --------
    >>> noise = np.random.default_rng(0).standard_normal((64, 64)) / 8
    >>> diagonal(noise), diagonal(noise + np.eye(64))
    (False, True)
    """
    rows = np.arange(units.shape[0]) if rows is None else rows
    columns = np.arange(units.shape[1]) if columns is None else columns
    period = period or min(units.shape)
    home = (rows % period)[:, None] == (columns % period)[None, :]
    at, place = np.nonzero(home)
    if not len(at):
        return False
    size = np.abs(units)
    below = (size[at] < size[at, place][:, None]).mean(axis=1)
    equal = (size[at] == size[at, place][:, None]).mean(axis=1)
    ranks = below + equal / 2
    return bool((ranks.mean() - 0.5) * math.sqrt(12 * len(ranks)) > errors)


def banded(units: Floats) -> bool:
    """True where the units' centres of mass along the features stand in order: a bank of filters.

    Parameters
    ----------
    units : (units, features), features in their order

    Examples
    --------
    >>> bands = np.exp(-np.subtract.outer(np.arange(16) * 4, np.arange(64)) ** 2 / 8)
    >>> banded(bands), banded(np.random.default_rng(0).standard_normal((16, 64)))
    (True, False)
    """
    size = np.abs(units.astype(np.float64))
    weight = size.sum(axis=1)
    alive = weight > 0
    centres = (size[alive] @ np.arange(size.shape[1])) / weight[alive]
    order = np.argsort(np.argsort(centres, kind="stable"), kind="stable")
    run = max(longest_increasing(order), longest_increasing(order[::-1])) if len(np.unique(centres)) > 1 else 0
    return run > 0 and log10_order_kept(len(order), run) < BANDED


def uniform(units: Floats) -> bool:
    """True where all values have one size, as in Hadamard matrices and signs.

    Examples
    --------
    >>> uniform(np.array([[1.0, -1.0], [1.0, 1.0]])), uniform(np.array([[1.0, 0.5]]))
    (True, False)
    """
    size = np.abs(units)
    return bool(size.size and size.max() > 0 and np.ptp(size) <= 1e-6 * size.max())
