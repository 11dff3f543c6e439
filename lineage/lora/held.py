"""What a file will hold for each module: the best form that its format knows, and what belongs to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint
from lineage.layout.axes import Shape
from lineage.lora.delta import Delta, Refused
from lineage.lora.forms import LoHa, LoKr, LowRank, dead, loha, lokr, low_rank, slices
from lineage.lora.modules import split_name

__all__ = ["Form", "Full", "Held", "Stacked", "Target", "held", "row_norms"]


class Full(msgspec.Struct, frozen=True):
    """A difference element by element."""

    array: NDArray[Any]


class Stacked(msgspec.Struct, frozen=True):
    """One pair for each place of the leading axes, all of one rank.

    Attributes
    ----------
    ups : (places, rows, rank), scale folded in
    downs : (places, rank, columns)
    """

    ups: NDArray[Any]
    downs: NDArray[Any]


Form = LowRank | LoHa | LoKr | Full | Stacked


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One module of the target.

    Attributes
    ----------
    path : the module's full name
    tensor : its weight, or its bias where only that has a difference
    shape : of that tensor
    form : of the weight's difference, None where there is none
    bias : the bias's difference, scale included, or None
    bias_tensor : its name
    magnitude : DoRA's axis and vector
    delta : the weight's delta
    dtype : stored dtype of the source's factors
    """

    path: str
    tensor: str
    shape: Shape
    form: Form | None = None
    bias: NDArray[Any] | None = None
    bias_tensor: str = ""
    bias_whole: bool = False
    magnitude: tuple[int, NDArray[Any]] | None = None
    delta: Delta | None = None
    dtype: str = "F32"


class Target:
    """The model that an adapter is written for: names, shapes, and values where the weights were given.

    Parameters
    ----------
    shapes : of the tensors by name
    values : a tensor in float64, None where it is not at hand
    verbatim : module names are pieces of keys and are written as they are
    """

    def __init__(
        self,
        shapes: Mapping[str, Shape],
        values: Callable[[str], NDArray[Any] | None] = lambda name: None,
        *,
        verbatim: bool = False,
    ) -> None:
        self.shapes, self.values, self.verbatim = shapes, values, verbatim

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Target:
        """A target whose weights are at hand."""
        shapes = {s.name: s.shape for s in checkpoint}
        return cls(shapes, lambda name: checkpoint.tensor(name).astype(np.float64) if name in shapes else None)

    def need(self, name: str, what: str) -> NDArray[Any]:
        """A tensor's values in float64.

        Raises
        ------
        Refused : they are not at hand
        """
        found = self.values(name)
        if found is None:
            raise Refused(f"{what} needs the values of {name}; give --target")
        return found


def held(
    name: str, delta: Delta, holds: frozenset[str], target: Target, dtype: str, *, stacks: tuple[str, ...] = ()
) -> Held:
    """The weight of one module in the best form that a format holds.

    Raises
    ------
    Refused : no form of the format can say it
    """
    path, _ = split_name(name)
    if len(delta.shape) < 2:
        if "vectors" not in holds and "whole" not in holds:
            raise Refused("this format holds no differences of vectors")
        return Held(path=path, tensor=name, shape=delta.shape, form=Full(delta.dense()), delta=delta, dtype=dtype)
    magnitude = _magnitude(name, delta, holds, target)
    form = _form(name, delta, holds, stacks)
    return Held(path=path, tensor=name, shape=delta.shape, form=form, magnitude=magnitude, delta=delta, dtype=dtype)


def _form(name: str, delta: Delta, holds: frozenset[str], stacks: tuple[str, ...]) -> Form:
    alone = split_name(name)[0] == name or any(word in name for word in stacks)
    if "einsum" not in holds and (len(delta.shape) > 4 or (len(delta.shape) > 2 and alone)):
        if "stacked" in holds and len(delta.shape) == 3:
            return _stack(delta, 1)
        if "diff" in holds:
            return Full(delta.dense())
        raise Refused("this format holds no stacked parameters")
    if "einsum" in holds:
        return _stack(delta, len(delta.shape) - 2)
    if "lokr" in holds and (kron := lokr(delta)) is not None:
        return kron
    if "loha" in holds and (product := loha(delta)) is not None:
        return product
    pair = low_rank(delta, keep_mid="mid" in holds)
    count = math.prod(delta.shape)
    if "diff" in holds and not dead(delta):
        whole = any(len(t.parts) == 1 for t in delta.terms)
        if whole or (pair.rank * (pair.up.shape[0] + count // pair.up.shape[0]) >= count and len(delta.terms) > 1):
            return Full(delta.dense())
    return pair


def _stack(delta: Delta, axes: int) -> Stacked:
    """Pairs for each place of the first axes, padded to one rank."""
    pairs = [low_rank(d) for d in slices(delta, axes)]
    rank = max(p.rank for p in pairs)
    ups = np.zeros((len(pairs), pairs[0].up.shape[0], rank))
    downs = np.zeros((len(pairs), rank, pairs[0].down.shape[1]))
    for k, p in enumerate(pairs):
        ups[k, :, : p.rank] = p.up.astype(np.float64) * p.scale
        downs[k, : p.rank] = p.down
    return Stacked(ups, downs)


def _magnitude(name: str, delta: Delta, holds: frozenset[str], target: Target) -> tuple[int, NDArray[Any]] | None:
    """DoRA's vector, rows of other sources filled with the norms that change nothing."""
    found = delta.magnitude()
    if found is None:
        return None
    axis, vector, given = found
    if ("rows" if axis == 0 else "columns") not in holds:
        raise Refused("this format holds no DoRA magnitudes" + ("" if axis == 0 else " of inputs"))
    if not given.all():
        vector = np.where(given, vector, row_norms(name, delta, target, axis))
    return axis, vector


def row_norms(name: str, delta: Delta, target: Target, axis: int = 0) -> NDArray[Any]:
    """Norms of W + Δ along an axis: the magnitudes with which DoRA is plain LoRA."""
    merged = target.need(name, "DoRA beside modules without it") + delta.dense()
    others = tuple(k for k in range(merged.ndim) if k != axis)
    norms: NDArray[Any] = np.sqrt((merged**2).sum(axis=others))
    return norms
