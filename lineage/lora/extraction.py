"""The difference of two models as an adapter of few ranks, also where their names and layouts differ."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint
from lineage.errors import InputError
from lineage.filling import Filled
from lineage.layout.mapping import Mapping
from lineage.lora.converting import written_for
from lineage.lora.delta import Delta, stacked
from lineage.lora.grammar import grammar
from lineage.lora.held import Target
from lineage.lora.metadata import carried_over
from lineage.lora.network import Term
from lineage.lora.shrink import from_matrix
from lineage.lora.source import Base
from lineage.lora.storing import store
from lineage.lora.sums import Change
from lineage.lora.verify import verify
from lineage.lora.wanted import Known

__all__ = ["Extracted", "extract"]


class Extracted(msgspec.Struct, frozen=True, kw_only=True):
    """What `extract` wrote.

    Attributes
    ----------
    out, format : what was written
    tensors : rank and loss of every matrix that differs
    equal : tensors that do not differ
    skipped : tensors that are left out, with the reason
    lost : share of the squared norm of all differences of matrices that the ranks leave out
    """

    out: str
    format: str
    tensors: tuple[Change, ...]
    equal: int
    skipped: dict[str, str]
    lost: float


def extract(
    base: Checkpoint,
    tuned: Checkpoint,
    out: str | os.PathLike[str],
    *,
    mapping: Mapping | None = None,
    rank: int | None = None,
    energy: float | None = None,
    to: str = "peft",
    vectors: bool = True,
    seed: int = 0,
    inputs: Sequence[str | Path] = (),
) -> Extracted:
    """Writes an adapter for `base` that makes it (almost) `tuned`.

    Parameters
    ----------
    mapping : from `base` to `tuned`, None where the names are equal
    rank, energy : most ranks a matrix gets; share of each difference's squared norm to keep
    vectors : norms and biases too, whole, where the format holds them
    seed : of the random projections of large matrices

    Raises
    ------
    InputError : neither `rank` nor `energy` is given, nothing differs, or nothing corresponds
    """
    if rank is None and energy is None:
        raise InputError("extract", "how large the adapter may be is missing", "give --rank or --energy")
    other = Filled.inverse(mapping, tuned) if mapping is not None else tuned
    deltas: dict[str, Delta] = {}
    skipped: dict[str, str] = {}
    changes, equal, energy_all, energy_lost = [], 0, 0.0, 0.0
    for spec in base:
        found = other.specs.get(spec.name)
        if found is None:
            skipped[spec.name] = "the tuned model has no such tensor"
            continue
        if found.shape != spec.shape:
            skipped[spec.name] = f"shape {list(spec.shape)} in the base, {list(found.shape)} in the tuned model"
            continue
        difference = other.tensor(spec.name).astype(np.float64) - base.tensor(spec.name)
        if not difference.any():
            equal += 1
        elif not np.isfinite(difference).all():
            skipped[spec.name] = "its difference holds NaN or infinity"
        elif len(spec.shape) < 2:
            if vectors:
                letters = "abc"[: difference.ndim]
                deltas[spec.name] = Delta(
                    shape=spec.shape, terms=(Term.of([(difference, letters)], list(letters)),), whole=True
                )
        else:
            lead = 0 if spec.name.endswith(".weight") else len(spec.shape) - 2
            deltas[spec.name], kept, lost = _pairs(difference, lead, rank, energy, seed)
            changes.append(Change(spec.name, min(spec.shape[0], difference.size // spec.shape[0]), kept, lost))
            square = float((difference**2).sum())
            energy_all, energy_lost = energy_all + square, energy_lost + lost * square
    if not deltas:
        raise InputError(tuned.path, "no matrix of it differs from the base", "is it the tuned model?")
    g = grammar(to)
    written = written_for(g, deltas, Target.of(base), {})
    skipped |= written.refused
    if not written.entries:
        raise InputError(out, f"{to} can hold none of the differences: {next(iter(written.refused.values()))}")
    if g.container != "gguf":
        written.header = {**carried_over({}, written), **written.header}

    def check(part: Path) -> None:
        verify(part, g, Base.of(base), deltas, Known(deltas), refused=written.refused)

    store(written, out, check, inputs=[base.path, tuned.path, *inputs])
    return Extracted(
        out=str(out), format=to, tensors=tuple(changes), equal=equal, skipped=skipped,
        lost=energy_lost / energy_all if energy_all else 0.0,
    )  # fmt: skip


def _pairs(
    difference: NDArray[Any], lead: int, rank: int | None, energy: float | None, seed: int
) -> tuple[Delta, int, float]:
    """One pair, or one for each place of the leading axes: the delta, its highest rank, the share lost."""
    if not lead:
        return from_matrix(difference, rank=rank, energy=energy, seed=seed)
    found = [_pairs(part, lead - 1, rank, energy, seed) for part in difference]
    squares = [float((part**2).sum()) for part in difference]
    lost = sum(f[2] * s for f, s in zip(found, squares, strict=True)) / max(sum(squares), np.finfo(np.float64).tiny)
    return stacked([f[0] for f in found], 0), max(f[1] for f in found), lost
