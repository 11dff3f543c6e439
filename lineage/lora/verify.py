"""An adapter file read again and held against what it should say."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.errors import LineageError
from lineage.lora.delta import Delta
from lineage.lora.forms import low_rank
from lineage.lora.grammar import Grammar
from lineage.lora.reading import read_with
from lineage.lora.source import Base, open_adapter
from lineage.lora.wanted import Wanted

__all__ = ["TOLERANCE", "VerificationError", "verify"]

#: how far a stored difference may be from what it should be, relative to it: float32 factors, multiplied
TOLERANCE = 1e-5
#: elements up to which a tensor is compared whole; places at which a larger one is compared with the mapping's rule
WHOLE, SAMPLED = 1 << 20, 1 << 14


class VerificationError(LineageError):
    """The adapter that was written does not say what it should; nothing is left of it."""


def verify(
    path: Path,
    g: Grammar,
    base: Base,
    deltas: Mapping[str, Delta],
    wanted: Wanted,
    *,
    refused: Collection[str] = (),
) -> tuple[int, float]:
    """Reads the file and compares every difference in it.

    Parameters
    ----------
    g : grammar that it was written in
    base : the model that it was written for
    deltas : what was written, by tensor
    wanted : the difference that a tensor should have
    refused : tensors of `deltas` that the format could not hold

    Returns
    -------
    number of tensors compared, and the largest relative distance

    Raises
    ------
    VerificationError : a key is not read again, a difference or a magnitude is another one, or there is one too many
    """
    again = read_with(open_adapter(path), base, [g], scale=1.0 if g.format == "openpi" else None, format=g.format)
    if again.left:
        raise VerificationError(f"{again.left[0].key}: written and not read again ({again.left[0].reason})")
    worst = 0.0
    names = [name for name in deltas if name not in refused]
    for name in names:
        got = again.deltas.get(name, Delta(shape=deltas[name].shape))
        if got.shape != deltas[name].shape:
            cause = f"written with the shape {list(got.shape)}, not {list(deltas[name].shape)}"
            raise VerificationError(f"{name}: {cause}")
        worst = max(worst, _checked(name, _distance(got, deltas[name], wanted, name)))
        _compare_magnitudes(name, again.deltas.get(name), deltas[name])
    extra = [n for n, d in again.deltas.items() if n not in deltas and d.dense().any()]
    if extra:
        raise VerificationError(f"{extra[0]}: the output changes it, the adapter does not")
    return len(names), worst


def _distance(got: Delta, carried: Delta, wanted: Wanted, name: str) -> float:
    """Distance of a difference that was read from the one that is wanted, relative to that.

    A large tensor is held against what the factors say it should be by the products of its factors, whole, and
    against what the rule says at a sample of places.
    """
    size = math.prod(got.shape)
    if size > WHOLE and len(got.shape) > 1:
        generator = np.random.default_rng(size)
        places = [generator.integers(0, n, SAMPLED) for n in got.shape]
        if (want := wanted.at(name, places)) is not None:
            return max(_relative(got.at(places) - want, want), _by_products(got, carried))
    dense = wanted.dense(name)
    return _relative(got.dense() - dense, dense)


def _relative(distance: NDArray[Any], want: NDArray[Any]) -> float:
    size, apart = float(np.linalg.norm(want)), float(np.linalg.norm(distance))
    return apart / size if size else apart


def _by_products(got: Delta, want: Delta) -> float:
    """|G - W| / |W| of two pairs from inner products of their factors; exact to the square root of rounding."""
    one, two = low_rank(got), low_rank(want)
    up = np.concatenate([one.up * one.scale, two.up * -two.scale], axis=1, dtype=np.float64)
    down = np.concatenate([one.down, two.down], axis=0, dtype=np.float64)
    products = (up.T @ up) * (down @ down.T)
    whole = float(products[one.rank :, one.rank :].sum())
    apart = math.sqrt(max(float(products.sum()), 0.0))
    # cancellation leaves the square root of float64's rounding: such a distance is none
    return apart / math.sqrt(whole) if whole > 0 and apart > 1e-7 * math.sqrt(whole) else 0.0 if whole > 0 else apart


def _checked(name: str, relative: float) -> float:
    if not relative <= TOLERANCE:
        raise VerificationError(f"{name}: the difference written is {relative:.1e} away from the one wanted")
    return relative


def _compare_magnitudes(name: str, got: Delta | None, want: Delta) -> None:
    """DoRA's vectors, where there are any."""
    wanted = want.magnitude()
    if wanted is None:
        return
    found = got.magnitude() if got is not None else None
    if found is None or found[0] != wanted[0]:
        raise VerificationError(f"{name}: its DoRA magnitudes were not written")
    given = wanted[2]
    if not np.allclose(found[1][given], wanted[1][given], rtol=TOLERANCE, atol=0):
        raise VerificationError(f"{name}: its DoRA magnitudes are not the ones wanted")
