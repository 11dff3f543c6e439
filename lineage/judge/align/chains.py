"""The transforms of a fitted stack as operations on each tensor of the common layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.anatomy import Layer, Part
from lineage.judge.align.stack import StackFit
from lineage.judge.align.turns import Turn, along, identity
from lineage.judge.align.weights import Weights
from lineage.layout.operations import Data, Operation, Rearrange, Scale, Take

__all__ = ["Chains", "chains"]

Floats = NDArray[np.floating[Any]]
Chains = dict[str, tuple[Operation, ...]]
_LETTERS = "abcdefgh"


class _Unit(msgspec.Struct, frozen=True):
    """A part of a tensor, the transform of its units (None: as they stand), and the norm that it reads through."""

    part: Part
    turn: Turn | None
    gain: str


def chains(fit: StackFit, weights: Weights, *, units: bool = True) -> Chains:
    """Operations that turn A's tensors of a stack into B's, for tensors that anything happened to.

    Parameters
    ----------
    units : with the transforms of units inside layers; without them only those of the residual space
    """
    tensors: dict[str, list[_Unit]] = defaultdict(list)
    for unit in _units(fit):
        turn = unit.turn if units else None
        tensors[unit.part.name].append(msgspec.structs.replace(unit, turn=turn))
    made: Chains = {name: _tensor(fit, weights, held) for name, held in tensors.items()}
    for held in tensors.values():
        made.update(_biases(weights, held))
    spoken = {unit.part.bias for held in tensors.values() for unit in held if unit.part.reads}
    for name in fit.anatomy.vectors:
        if name not in spoken:
            made[name] = _vector(fit, weights, name)
    made.update(_gains(fit, weights))
    return {name: chain for name, chain in made.items() if chain}


def _units(fit: StackFit) -> Iterator[_Unit]:
    """Every part of the stack with what happened to its units."""
    fits = {layer.layer.number: layer for layer in fit.layers}
    outside = [weight for weight, _ in fit.anatomy.gains]
    for part in fit.anatomy.outside:
        yield _Unit(part, None, outside[0] if part.reads and len(outside) == 1 else "")
    for layer in fit.anatomy.layers:
        found = fits.get(layer.number)
        before = {kind: _norm(layer, fit.norms[kind]) for kind in ("mlp", "attention")}
        for part in layer.rest:
            yield _Unit(part, None, before["mlp"] if part.reads else "")
        for k, mlp in enumerate(layer.mlps):
            hidden = found.mlps[k] if found and k < len(found.mlps) and found.mlps[k].holds else None
            for j, part in enumerate(mlp.readers):
                yield _Unit(part, hidden.readers[j] if hidden else None, before["mlp"])
            for part in mlp.writers:
                yield _Unit(part, hidden.writer.side(True) if hidden else None, "")
        for k, block in enumerate(layer.attentions):
            heads = found.attentions[k] if found and k < len(found.attentions) and found.attentions[k].holds else None
            for role in ("query", "key", "value"):
                yield _Unit(getattr(block, role), getattr(heads, role) if heads else None, before["attention"])
            yield _Unit(block.out, heads.out.side(True) if heads else None, "")


def _norm(layer: Layer, at: int | None) -> str:
    return layer.gains[at][0] if at is not None and at < len(layer.gains) else ""


def _tensor(fit: StackFit, weights: Weights, held: list[_Unit]) -> tuple[Operation, ...]:
    """Operations on a matrix: its units, then its residual axis."""
    held = sorted(held, key=lambda unit: unit.part.start)
    part = held[0].part
    turns = [unit.turn or identity(unit.part.units[0]) for unit in held]
    dimensions = len(weights.sides[0].specs[part.name].shape)
    residual = _residual(fit, weights, part.axis, dimensions, part.reads, held[0].gain)
    if all(turn.plain for turn in turns):
        return residual
    if sum(turn.length for turn in turns) != part.whole[0]:
        return residual
    if dimensions == 2:
        return along(1 - part.axis, 2, turns) + residual
    one, two = (_flat(weights.sides[side].specs[part.name].shape, part.axis) for side in (0, 1))
    inner = along(1 if part.axis == 0 else 0, 2, turns)
    moved = part.axis not in (0, dimensions - 1)
    if moved:
        return residual
    return (one[0], *inner, two[1], *residual)


def _flat(shape: tuple[int, ...], axis: int) -> tuple[Rearrange, Rearrange]:
    """All axes but the residual one as one, and back."""
    names = _LETTERS[: len(shape)]
    sizes = dict(zip(names, shape, strict=True))
    rest = "(" + " ".join(n for k, n in enumerate(names) if k != axis) + ")"
    flat = f"{names[0]} {rest}" if axis == 0 else f"{rest} {names[axis]}"
    return Rearrange(f"{' '.join(names)} -> {flat}", sizes), Rearrange(f"{flat} -> {' '.join(names)}", sizes)


def _residual(
    fit: StackFit, weights: Weights, axis: int, dimensions: int, reads: bool, gain: str
) -> tuple[Operation, ...]:
    """Operations on the residual axis of a matrix; what a norm multiplied moves with it where norms were folded."""
    turn = fit.residual.side(reads)
    if not fit.folded or not gain:
        return turn.operations(axis, dimensions)
    before, after = (_sane(weights.gain(side, gain)) for side in (0, 1))
    if turn.blocks:
        into, out = Scale(Data(before), axis), Scale(Data(1.0 / after), axis)
        return (into, *turn.operations(axis, dimensions), out)
    taken = before if turn.take is None else before[turn.take]
    scale = taken / after * (1.0 if turn.scale is None else turn.scale)
    return msgspec.structs.replace(turn, scale=scale).operations(axis, dimensions)


def _biases(weights: Weights, held: list[_Unit]) -> Chains:
    """Biases of readers go the way of their units."""
    first = held[0].part
    if not first.reads or not first.bias:
        return {}
    held = sorted(held, key=lambda unit: unit.part.start)
    turns = [unit.turn or identity(unit.part.units[0]) for unit in held]
    shape = weights.sides[0].specs[first.bias].shape
    if len(shape) != 1 or sum(turn.length for turn in turns) != shape[0] or all(turn.plain for turn in turns):
        return {}
    return {first.bias: along(0, 1, turns)}


def _vector(fit: StackFit, weights: Weights, name: str) -> tuple[Operation, ...]:
    """A vector that is added to the residual stream."""
    shape = weights.sides[0].specs[name].shape
    axis = next(k for k, n in enumerate(shape) if n > 1)
    return fit.residual.operations(axis, len(shape))


def _gains(fit: StackFit, weights: Weights) -> Chains:
    """Norms: in the order of the channels; those that were folded are what B has, as nothing else tells them."""
    made: Chains = {}
    turn = fit.residual
    read = {unit.gain for unit in _units(fit) if unit.gain}
    every = [*fit.anatomy.gains, *(pair for layer in fit.anatomy.layers for pair in layer.gains)]
    for weight, shift in every:
        axis = int(np.argmax(weights.sides[0].specs[weight].shape))
        take = turn.take
        if turn.blocks and turn.units != turn.length:
            take = np.arange(turn.units)
        ops: list[Operation] = [] if take is None else [Take(axis, take.astype(np.int64), turn.length)]
        before, after = (_sane(weights.tensor(side, weight)) for side in (0, 1))
        folded = fit.folded and weight in read and not weights.around_zero(weight)
        if folded:
            ops.append(Scale(Data(after / (before if take is None else before[take])), axis))
        if ops and not (take is not None and turn.plain):
            made[weight] = tuple(ops)
        if shift:
            made[shift] = _shift(turn, before, after, folded=folded)
    return made


def _shift(turn: Turn, before: Floats, after: Floats, *, folded: bool) -> tuple[Operation, ...]:
    """The shift of a norm, which is added after the gain."""
    if not folded:
        return turn.operations(0, 1)
    return (Scale(Data(1.0 / before), 0), *turn.operations(0, 1), Scale(Data(after), 0))


def _sane(gain: Floats) -> Floats:
    """Gains without zeros, which nothing can be divided by."""
    flat = gain.reshape(-1).astype(np.float64)
    return np.where(np.abs(flat) > 1e-12, flat, 1.0)
