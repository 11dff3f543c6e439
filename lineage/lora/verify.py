"""An adapter file read again and held against what it should say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.errors import LineageError
from lineage.lora.delta import Delta
from lineage.lora.grammar import Grammar
from lineage.lora.reading import read_with
from lineage.lora.source import Base, open_adapter

__all__ = ["TOLERANCE", "VerificationError", "verify"]

#: how far a stored difference may be from what it should be, relative to it: float32 factors, multiplied
TOLERANCE = 1e-5


class VerificationError(LineageError):
    """The adapter that was written does not say what it should; nothing is left of it."""


def verify(
    path: Path,
    g: Grammar,
    base: Base,
    deltas: Mapping[str, Delta],
    wanted: Callable[[str], NDArray[Any]],
    *,
    refused: Collection[str] = (),
) -> tuple[int, float]:
    """Reads the file and compares every difference in it.

    Parameters
    ----------
    g : grammar that it was written in
    base : the model that it was written for
    deltas : what was written, by tensor
    wanted : the dense difference that a tensor should have
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
        want = wanted(name)
        got = again.deltas[name].dense() if name in again.deltas else np.zeros(want.shape)
        worst = max(worst, _distance(name, got, want))
        _compare_magnitudes(name, again.deltas.get(name), deltas[name])
    extra = [n for n, d in again.deltas.items() if n not in deltas and d.dense().any()]
    if extra:
        raise VerificationError(f"{extra[0]}: the output changes it, the adapter does not")
    return len(names), worst


def _distance(name: str, got: NDArray[Any], want: NDArray[Any]) -> float:
    """Distance of two differences relative to the wanted one."""
    if got.shape != want.shape:
        raise VerificationError(f"{name}: written with the shape {list(got.shape)}, not {list(want.shape)}")
    size = float(np.linalg.norm(want))
    distance = float(np.linalg.norm(got - want))
    relative = distance / size if size else distance
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
