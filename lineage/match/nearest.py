"""The nearest of many rows for each of many rows, with as few products as the layout allows.

Rows have length one, so that a product is a correlation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["MANY_ROWS", "RIVAL", "highest"]

#: rows that are multiplied at a time; where A has more, half the probes must do
MANY_ROWS = 100_000
#: share of the correlation of the nearest row of B that another must reach to come from the same row of A, and of its
#: neighbours' that a row must reach to be one of theirs
RIVAL = 0.8
#: pairs of rows up to which all are multiplied; tables of signs, and members of a bucket that are looked at. Near
#: copies meet in one of the tables: at a correlation of 0.99 with 20 signs 98 % of them
MOST_PRODUCTS, TABLES, BUCKET = 1 << 27, 8, 4
#: correlation that ends the search for a row, and share of rows up to which the rest is looked up one by one
NEAR_COPY, MOSTLY_NEAR = 0.9, 0.25
#: rows that are looked for where some of them, so many, found theirs. Layouts keep runs of rows together: a stack of
#: 262 experts under noise of half a deviation (29,344 rows of 96) then takes about a fifteenth of the products, and
#: finds the same rows
STRETCH, SCOUTS = 128, 6


def highest(mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each row of `mine` the row of `theirs` with the highest product, and the product; rows have length one.

    Notes
    -----
    Of many rows those that have a near copy find it by the signs of a few projections (Charikar, Similarity
    estimation techniques from rounding algorithms, 2002), those that stand in a run like theirs beside their
    neighbours'; only the others are multiplied with all.
    """
    if len(mine) * len(theirs) > MOST_PRODUCTS:
        place, value = _by_signs(mine, theirs)
        far = np.flatnonzero(value < NEAR_COPY)
        if len(far) > len(mine) * MOSTLY_NEAR:
            place, value = _by_neighbours(mine, theirs)
            far = np.flatnonzero(np.isneginf(value))
        if len(far):
            place[far], value[far] = _by_products(mine[far], theirs)
        return place, value
    return _by_products(mine, theirs)


def _by_neighbours(
    mine: NDArray[np.float32], theirs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best row near those of a few neighbours, -inf where it is not as alike as theirs are, or by chance."""
    place = np.zeros(len(mine), np.int64)
    value = np.full(len(mine), -np.inf, np.float32)
    chance = (math.sqrt(2 * math.log(max(2, len(theirs)))) + 1) / math.sqrt(mine.shape[1])
    scouts = np.unique(np.linspace(0, len(mine) - 1, max(1, SCOUTS * len(mine) // STRETCH)).astype(np.int64))
    place[scouts], value[scouts] = _by_products(mine[scouts], theirs)
    for low in range(0, len(mine), STRETCH):
        high = min(len(mine), low + STRETCH)
        sent = scouts[np.searchsorted(scouts, low) : np.searchsorted(scouts, high)]
        others = np.setdiff1d(np.arange(low, high), sent)
        if not len(sent) or not len(others):
            continue
        blocks = place[sent][:, None] // STRETCH + np.arange(-1, 2)
        rows = (np.unique(blocks)[:, None] * STRETCH + np.arange(STRETCH)).ravel()
        rows = rows[(rows >= 0) & (rows < len(theirs))]
        where, found = _by_products(mine[others], theirs[rows])
        alike = found >= max(chance, RIVAL * float(np.median(value[sent])))
        place[others[alike]], value[others[alike]] = rows[where[alike]], found[alike]
    return place, value


def _by_signs(mine: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best row among those that lie on the same side of random planes, -inf where there is none."""
    place = np.zeros(len(mine), np.int64)
    value = np.full(len(mine), -np.inf, np.float32)
    bits = min(30, len(theirs).bit_length() + 3)
    powers = 1 << np.arange(bits, dtype=np.int64)
    rng = np.random.default_rng(20_241)
    for _ in range(TABLES):
        planes = rng.standard_normal((mine.shape[1], bits)).astype(np.float32)
        codes, known = ((rows @ planes > 0) @ powers for rows in (mine, theirs))
        order = np.argsort(known, kind="stable")
        at = np.searchsorted(known[order], codes)
        for step in range(BUCKET):
            near = np.minimum(at + step, len(order) - 1)
            tried = np.flatnonzero((known[order[near]] == codes) & (value < 1 - 1e-6))
            other = order[near[tried]]
            found = np.einsum("ij,ij->i", mine[tried], theirs[other])
            better = (found > value[tried]) | ((found == value[tried]) & (other < place[tried]))
            place[tried[better]], value[tried[better]] = other[better], found[better]
    return place, value


def _by_products(
    mine: NDArray[np.float32], theirs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The best row among all."""
    place = np.zeros(len(mine), np.int64)
    value = np.full(len(mine), -np.inf, np.float32)
    for low in range(0, len(theirs), MANY_ROWS):
        some = theirs[low : low + MANY_ROWS].T
        step = max(1, (64 << 20) // (4 * some.shape[1]))
        for first in range(0, len(mine), step):
            part = slice(first, first + step)
            scores = mine[part] @ some
            where = scores.argmax(axis=1)
            high = scores[np.arange(len(where)), where]
            better = high > value[part]
            place[part] = np.where(better, where + low, place[part])
            value[part] = np.where(better, high, value[part])
    return place, value
