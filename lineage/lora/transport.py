"""The action of every layout operation on a weight difference: `T(ΔW)` without ever forming ΔW.

Operations are linear up to added constants, which vanish from a difference. Each entry of `ACTIONS` does to deltas
what the operation's `apply` does to arrays; a test holds that no operation is without one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import Pattern, Shape
from lineage.layout.chain import Entry, run
from lineage.layout.operations import (
    Add,
    Cast,
    Concat,
    Each,
    Matmul,
    Operation,
    Pad,
    Rearrange,
    Scale,
    Slice,
    Split,
    Stack,
    Take,
    Unstack,
)
from lineage.layout.operations.data import Data
from lineage.lora.delta import Delta, Magnitude, Refused, concatenated, stacked
from lineage.lora.network import Term

__all__ = ["ACTIONS", "act", "transported"]

#: a matrix whose product with its transpose is this near to the identity keeps norms
ORTHOGONAL = 1e-6

Action = Callable[[Any, Sequence[Delta]], list[Delta]]


def transported(ops: Sequence[Operation], entries: Sequence[Entry]) -> list[Entry]:
    """What a chain makes of deltas (or Levels of them): the differences of its results.

    Raises
    ------
    LayoutError : the deltas' shapes do not fit the chain
    Refused : a magnitude would lose its meaning
    """
    return run(ops, entries, act)


def act(op: Operation, deltas: Sequence[Delta]) -> list[Delta]:
    """One operation on the list of deltas; an operation without an action is a bug."""
    shapes = op.shapes([d.shape for d in deltas])
    found = ACTIONS[type(op)](op, deltas)
    assert [d.shape for d in found] == list(shapes), (op, [d.shape for d in found], shapes)
    return found


def _rearrange(op: Rearrange, deltas: Sequence[Delta]) -> list[Delta]:
    """Labels move between axes; they are cut where the pattern cuts an axis."""
    return [
        d.changed(lambda t, d=d: _rearranged(op, t, d.shape), op.one_shape(d.shape))  # type: ignore[misc]
        for d in deltas
    ]


def _rearranged(op: Rearrange, term: Term, shape: Shape) -> Term:
    left, right = _spelt(op.parsed, len(shape))
    lengths = dict(op.sizes)
    runs: dict[str, tuple[int, ...]] = {}
    for axis, (group, length) in enumerate(zip(left, shape, strict=True)):
        known = math.prod(lengths[n] for n in group if n in lengths)
        sizes = [lengths.get(n, length // known) for n in group]
        term, found = term.refined(axis, sizes) if len(group) != 1 else (term, [term.layout[axis]])
        runs.update(zip(group, found, strict=True))
    return term.with_layout([[label for n in group for label in runs[n]] for group in right])


def _spelt(pattern: Pattern, axes: int) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Both sides of a pattern, `...` spelt out for so many axes."""
    rest = [(f"_{k}",) for k in range(axes - len(pattern.left) + 1)]
    spelt = []
    for side in (pattern.left, pattern.right):
        spelt.append([g for group in side for g in (rest if group == ("...",) else [group])])
    return spelt[0], spelt[1]


def _each(op: Each, deltas: Sequence[Delta]) -> list[Delta]:
    """The chains of single entries."""
    result = list(deltas)
    for k, chain in op.chains:
        (result[k],) = run(chain, [result[k]], act)
    return result


def _concat(op: Concat, deltas: Sequence[Delta]) -> list[Delta]:
    """Zeros around each: the factors become block-diagonal when they are written."""
    return [concatenated(deltas, op.axis % len(deltas[0].shape))]


def _split(op: Split, deltas: Sequence[Delta]) -> list[Delta]:
    """A range of the axis each, without the ranks that died."""
    (delta,) = deltas
    axis = op.axis % len(delta.shape)
    cuts = accumulate((s[axis] for s in op.shapes([delta.shape])), initial=0)
    return [_at(delta, axis, np.arange(a, b)) for a, b in pairwise(cuts)]


def _slice(op: Slice, deltas: Sequence[Delta]) -> list[Delta]:
    """A range of an axis."""
    found = []
    for d in deltas:
        axis = op.axis % len(d.shape)
        found.append(_at(d, axis, np.arange(d.shape[axis])[op.start : op.stop]))
    return found


def _take(op: Take, deltas: Sequence[Delta]) -> list[Delta]:
    """Chosen places; those that nobody knows have no difference."""
    return [_at(d, op.axis % len(d.shape), op.places) for d in deltas]


def _at(delta: Delta, axis: int, places: NDArray[np.int64]) -> Delta:
    shape = (*delta.shape[:axis], len(places), *delta.shape[axis + 1 :])
    found = delta.changed(lambda t: t.taken(axis, places), shape)
    whole = len(places) == delta.shape[axis] and np.array_equal(np.sort(places), np.arange(len(places)))
    return found if whole else found.compact()


def _pad(op: Pad, deltas: Sequence[Delta]) -> list[Delta]:
    """New places have no difference, whatever their value."""
    shapes = op.shapes([d.shape for d in deltas])
    pairs = zip(deltas, shapes, strict=True)
    return [d.changed(lambda t, d=d: t.padded(op.axis % len(d.shape), op.before, op.after), s) for d, s in pairs]  # type: ignore[misc]


def _stack(op: Stack, deltas: Sequence[Delta]) -> list[Delta]:
    """A new label, each delta at its place."""
    return [stacked(deltas, op.axis % (len(deltas[0].shape) + 1))]


def _unstack(op: Unstack, deltas: Sequence[Delta]) -> list[Delta]:
    """Each place of a label."""
    (delta,) = deltas
    axis = op.axis % len(delta.shape)
    shape = (*delta.shape[:axis], *delta.shape[axis + 1 :])
    return [
        delta.changed(lambda t, k=k: t.indexed(axis, k), shape).compact()  # type: ignore[misc]
        for k in range(delta.shape[axis])
    ]


def _same(op: Operation, deltas: Sequence[Delta]) -> list[Delta]:
    """Added constants vanish from a difference; it is not rounded to the dtype that the weights are stored in."""
    return list(deltas)


def _scale(op: Scale, deltas: Sequence[Delta]) -> list[Delta]:
    """A number goes into the scale, a vector becomes one more factor; magnitudes take its absolute value."""
    found = []
    for d in deltas:
        if not isinstance(op.by, Data):
            by = op.by
            terms = [_scaled(t, by) for t in d.terms]
            kept = [Magnitude(_scaled(m.term, abs(by)), m.width) for m in d.magnitudes]
        else:
            axis, vector = (op.axis or 0) % len(d.shape), op.by.array
            terms = [t.times(vector, axis) for t in d.terms]
            kept = [
                Magnitude(_strict(m.term, axis, "scale").times(np.abs(vector), axis), m.width) for m in d.magnitudes
            ]
        found.append(msgspec.structs.replace(d, terms=tuple(terms), magnitudes=tuple(kept)))
    return found


def _scaled(term: Term, by: float) -> Term:
    """The term with its scale multiplied."""
    return Term(term.parts, term.layout, term.sizes, term.scale * by)


def _strict(term: Term, axis: int, word: str) -> Term:
    """The magnitude's term where `axis` is its own; along any other axis its norms would change."""
    if any(term.free(n) for n in term.layout[axis]):
        raise Refused(f"DoRA: {word} along an axis that the norms run over")
    return term


def _matmul(op: Matmul, deltas: Sequence[Delta]) -> list[Delta]:
    """A matrix more in the network; norms survive an orthogonal one on the axis that they run over."""
    matrix = op.matrix.array if op.side == "left" else op.matrix.array.T
    found = []
    for d, shape in zip(deltas, op.shapes([d.shape for d in deltas]), strict=True):
        axis = 0 if op.side == "left" else len(d.shape) - 1
        keeps = matrix.shape[0] == matrix.shape[1] and np.allclose(
            matrix @ matrix.T, np.eye(len(matrix)), atol=ORTHOGONAL
        )
        for m in d.magnitudes:
            if not keeps or any(not m.term.free(n) for n in m.term.layout[axis]):
                raise Refused("DoRA: a rotation of the axis that the magnitudes stand on mixes their rows")
        terms = tuple(t.through(matrix, axis) for t in d.terms)
        found.append(msgspec.structs.replace(d, shape=shape, terms=terms))
    return found


#: what each operation does to deltas
ACTIONS: Mapping[type[Operation], Action] = {
    Rearrange: _rearrange,
    Each: _each,
    Concat: _concat,
    Split: _split,
    Slice: _slice,
    Take: _take,
    Pad: _pad,
    Stack: _stack,
    Unstack: _unstack,
    Add: _same,
    Cast: _same,
    Scale: _scale,
    Matmul: _matmul,
}
