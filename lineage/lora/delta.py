"""What an adapter does to one tensor: a sum of terms, and the magnitudes of DoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import Shape
from lineage.lora.network import Term

__all__ = ["Delta", "Magnitude", "Refused", "strength"]


class Refused(ValueError):
    """A difference that the target layout or format cannot express; the message is the reason."""


class Magnitude(msgspec.Struct, frozen=True):
    """DoRA's vector along one axis of a tensor, carried as a tensor that is the same along all others.

    Attributes
    ----------
    term : the vector, its other labels free
    width : elements that one norm runs over
    axis : the vector's axis where it was read
    """

    term: Term
    width: int


class Delta(msgspec.Struct, frozen=True, kw_only=True):
    """The difference of one tensor.

    Attributes
    ----------
    shape : the tensor's
    terms : their sum is the difference; () is zero
    magnitudes : DoRA vectors of parts of the tensor; the terms are then what is added before normalising
    whole : the file held the tensor's new value, not its difference
    embedding : the file says that the tensor is an embedding table (rows are tokens)
    assumed : no scale was stored, the format's rule for that case was used
    """

    shape: Shape
    terms: tuple[Term, ...] = ()
    magnitudes: tuple[Magnitude, ...] = ()
    whole: bool = False
    embedding: bool = False
    assumed: bool = False

    def dense(self) -> NDArray[Any]:
        """The sum of the terms, float64; magnitudes are not applied."""
        result = np.zeros(self.shape)
        for term in self.terms:
            result += term.dense()
        return result

    def at(self, places: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
        """Single elements of the sum of the terms, one for each place, given axis by axis."""
        result = np.zeros(len(places[0]))
        for term in self.terms:
            result += term.at(places)
        return result

    def changed(self, change: Callable[[Term], Term], shape: Shape) -> Delta:
        """The delta with every term and magnitude changed the same way."""
        return msgspec.structs.replace(
            self,
            shape=shape,
            terms=tuple(change(t) for t in self.terms),
            magnitudes=tuple(Magnitude(change(m.term), m.width) for m in self.magnitudes),
        )

    def compact(self) -> Delta:
        """Terms and ranks that give zeros dropped; magnitudes that reach no element too."""
        terms = tuple(t for term in self.terms if (t := term.compact()) is not None)
        kept = tuple(Magnitude(t, m.width) for m in self.magnitudes if (t := m.term.compact()) is not None)
        return msgspec.structs.replace(self, terms=terms, magnitudes=kept)

    def magnitude(self) -> tuple[int, NDArray[Any], NDArray[np.bool_]] | None:
        """DoRA's vector: its axis, its values, and where it is given; None without DoRA.

        Raises
        ------
        Refused : the layout mixes what a norm ran over
        """
        if not self.magnitudes:
            return None
        axes = {_axis(m) for m in self.magnitudes}
        if len(axes) > 1:
            raise Refused("DoRA magnitudes of rows and of columns meet in one tensor")
        axis = axes.pop()
        vector = np.zeros(self.shape[axis])
        for m in self.magnitudes:
            group = m.term.layout[axis]
            alone = m.term.with_layout([group])
            vector += alone.dense()
        return axis, vector, vector != 0


def _axis(m: Magnitude) -> int:
    """Axis of the tensor along which a magnitude runs."""
    term = m.term
    axes = [k for k, group in enumerate(term.layout) if any(not term.free(n) for n in group)]
    if len(axes) > 1 or term.inner:
        raise Refused("DoRA: this layout mixes rows and columns, whose norms the magnitudes belong to")
    axis = axes[0] if axes else 0
    others = [n for k, group in enumerate(term.layout) if k != axis for n in group]
    if term.length(others) != m.width or any(term.free(n) for n in term.layout[axis]):
        raise Refused("DoRA: this layout cuts what each norm runs over")
    return axis


def strength(weight: NDArray[Any], delta: NDArray[Any], axis: int, vector: NDArray[Any]) -> NDArray[Any]:
    """DoRA's whole difference: m · (W + Δ) / |W + Δ| − W, norms over every axis but `axis`.

    Source: Liu et al., arXiv 2402.09353, equation 5; peft `tuners/lora/dora.py`.
    """
    merged = weight + delta
    others = tuple(k for k in range(merged.ndim) if k != axis)
    norm = np.sqrt((merged**2).sum(axis=others, keepdims=True))
    shape = [-1 if k == axis else 1 for k in range(merged.ndim)]
    result: NDArray[Any] = vector.reshape(shape) * merged / norm - weight
    return result


def concatenated(deltas: Sequence[Delta], axis: int) -> Delta:
    """Deltas side by side along an axis: each padded with zeros, then summed."""
    length = sum(d.shape[axis] for d in deltas)
    start, terms, magnitudes = 0, [], []
    for delta in deltas:
        before, after = start, length - start - delta.shape[axis]
        terms += [t.padded(axis, before, after) for t in delta.terms]
        magnitudes += [Magnitude(m.term.padded(axis, before, after), m.width) for m in delta.magnitudes]
        start += delta.shape[axis]
    first = deltas[0].shape
    return _summed(deltas, (*first[:axis], length, *first[axis + 1 :]), terms, magnitudes)


def stacked(deltas: Sequence[Delta], axis: int) -> Delta:
    """Deltas along a new axis."""
    terms = [t.placed(axis, k, len(deltas)) for k, d in enumerate(deltas) for t in d.terms]
    magnitudes = [
        Magnitude(m.term.placed(axis, k, len(deltas)), m.width) for k, d in enumerate(deltas) for m in d.magnitudes
    ]
    first = deltas[0].shape
    return _summed(deltas, (*first[:axis], len(deltas), *first[axis:]), terms, magnitudes)


def _summed(deltas: Sequence[Delta], shape: Shape, terms: Sequence[Term], magnitudes: Sequence[Magnitude]) -> Delta:
    return Delta(
        shape=shape,
        terms=tuple(terms),
        magnitudes=tuple(magnitudes),
        whole=any(d.whole for d in deltas),
        embedding=any(d.embedding for d in deltas),
        assumed=any(d.assumed for d in deltas),
    )
