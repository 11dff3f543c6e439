"""One term of a weight difference as a small tensor network: arrays over labelled axes, multiplied and summed.

LoRA is up[o,k] · down[k,i] over the layout (o)(i); LoHa is four arrays, LoKr two whose labels share an axis, a per-head
adapter two with a head label in both. A layout operation moves, cuts or renames labels, so that the same few lines
carry every kind of adapter through it. Numbers are only moved unless a method's docstring says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import Shape

__all__ = ["Label", "Part", "Term", "contract", "fresh"]

Label = int
_numbers = itertools.count()


def fresh() -> Label:
    """A label that nobody uses yet."""
    return next(_numbers)


@dataclass(frozen=True, eq=False)
class Part:
    """One array of a network.

    Attributes
    ----------
    array : float32 or float64
    labels : one for each axis, none twice
    """

    array: NDArray[Any]
    labels: tuple[Label, ...]

    def taken(self, label: Label, places: NDArray[np.int64]) -> Part:
        """The part at these places of a label, in order; itself where it lacks the label. Place -1 gives zeros."""
        if label not in self.labels:
            return self
        axis = self.labels.index(label)
        found = np.take(self.array, np.maximum(places, 0), axis=axis)
        if (places < 0).any():
            found[(slice(None),) * axis + (np.flatnonzero(places < 0),)] = 0
        return Part(found, self.labels)

    def reshaped(self, label: Label, labels: Sequence[Label], sizes: Sequence[int]) -> Part:
        """One label cut into several; itself where it lacks the label."""
        if label not in self.labels:
            return self
        axis = self.labels.index(label)
        shape = (*self.array.shape[:axis], *sizes, *self.array.shape[axis + 1 :])
        return Part(self.array.reshape(shape), (*self.labels[:axis], *labels, *self.labels[axis + 1 :]))

    def renamed(self, names: Mapping[Label, Label]) -> Part:
        """The part under other labels."""
        return Part(self.array, tuple(names.get(n, n) for n in self.labels))


@dataclass(frozen=True, eq=False)
class Term:
    """A scaled network and how its open labels make up the axes of a tensor.

    Attributes
    ----------
    parts : arrays; a label in none of them means "the same for every place"
    layout : labels of each axis, outermost first; an axis of length one has none
    sizes : length of every label, 2 or more for open ones
    scale : number that multiplies the network
    """

    parts: tuple[Part, ...]
    layout: tuple[tuple[Label, ...], ...]
    sizes: Mapping[Label, int]
    scale: float = 1.0

    @classmethod
    def of(
        cls, parts: Sequence[tuple[NDArray[Any], str]], layout: Sequence[str], *, scale: float = 1.0, **sizes: int
    ) -> Term:
        """A network in letters: `Term.of([(up, "ok"), (down, "ki")], ["o", "i"])`; sizes for letters in no part.

        Examples
        --------
        >>> import numpy as np
        >>> Term.of([(np.ones((3, 1)), "ok"), (np.ones((1, 2)), "ki")], ["o", "i"], scale=2.0).dense().tolist()
        [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
        """
        lengths = dict(sizes)
        for array, letters in parts:
            for letter, length in zip(letters, array.shape, strict=True):
                if lengths.setdefault(letter, length) != length:
                    raise ValueError(f"axes of {lengths[letter]} and {length} cannot be one")
        names = {letter: fresh() for letter in lengths}
        used = [Part(a, tuple(names[x] for x in letters)) for a, letters in parts]
        groups = tuple(tuple(names[x] for x in group) for group in layout)
        return cls(tuple(used), groups, {names[x]: n for x, n in lengths.items()}, scale)._squeezed()

    def _squeezed(self) -> Term:
        """Open labels of length one taken out."""
        single = {n for group in self.layout for n in group if self.sizes[n] == 1}
        if not single:
            return self
        parts = [
            Part(
                p.array.reshape([self.sizes[n] for n in p.labels if n not in single]),
                tuple(n for n in p.labels if n not in single),
            )
            for p in self.parts
        ]
        layout = tuple(tuple(n for n in group if n not in single) for group in self.layout)
        return Term(tuple(parts), layout, {n: s for n, s in self.sizes.items() if n not in single}, self.scale)

    @property
    def shape(self) -> Shape:
        """Shape of the tensor."""
        return tuple(self.length(group) for group in self.layout)

    @property
    def open(self) -> tuple[Label, ...]:
        """Labels of the tensor's axes."""
        return tuple(n for group in self.layout for n in group)

    @property
    def inner(self) -> tuple[Label, ...]:
        """Labels that are summed over."""
        outside = set(self.open)
        return tuple(dict.fromkeys(n for p in self.parts for n in p.labels if n not in outside))

    def length(self, labels: Sequence[Label]) -> int:
        """Places of several labels together."""
        return math.prod(self.sizes[n] for n in labels)

    def free(self, label: Label) -> bool:
        """Whether the term is the same for every place of the label."""
        return not any(label in p.labels for p in self.parts)

    def with_layout(self, layout: Sequence[Sequence[Label]]) -> Term:
        """The same network with its open labels in other axes."""
        return replace(self, layout=tuple(tuple(group) for group in layout))

    # -- labels cut and joined

    def _cut(self, label: Label, sizes: Sequence[int]) -> tuple[Term, tuple[Label, ...]]:
        """One label as several, outermost first."""
        labels = tuple(fresh() for _ in sizes)
        parts = tuple(p.reshaped(label, labels, sizes) for p in self.parts)
        layout = tuple(tuple(m for n in group for m in (labels if n == label else (n,))) for group in self.layout)
        lengths = {n: s for n, s in self.sizes.items() if n != label} | dict(zip(labels, sizes, strict=True))
        return Term(parts, layout, lengths, self.scale), labels

    def refined(self, axis: int, sizes: Sequence[int]) -> tuple[Term, list[tuple[Label, ...]]]:
        """The term with an axis cut so that each of the sizes is a run of labels, and those runs.

        Labels whose lengths do not divide are joined first; the product of `sizes` is the axis's length.
        """
        term, left, runs = self, list(self.layout[axis]), []
        for size in sizes:
            need, run = size, []
            while need > 1:
                length = term.sizes[left[0]]
                if need % length == 0:
                    run.append(left.pop(0))
                    need //= length
                elif length % need == 0:
                    term, (first, second) = term._cut(left[0], (need, length // need))
                    run.append(first)
                    left[0] = second
                    need = 1
                else:
                    return self.joined(axis).refined(axis, sizes)
            runs.append(tuple(run))
        return term, runs

    def joined(self, axis: int) -> Term:
        """The term with one label for the axis; parts that hold some of its labels only are spread out."""
        group = self.layout[axis]
        if len(group) == 1:
            return self
        new = fresh()
        sizes = [self.sizes[n] for n in group]
        length = math.prod(sizes)
        places = np.unravel_index(np.arange(length), sizes) if group else ()
        parts = []
        for p in self.parts:
            held = [n for n in group if n in p.labels]
            if not held:
                parts.append(p)
                continue
            rest = [n for n in p.labels if n not in held]
            array = np.transpose(p.array, [p.labels.index(n) for n in (*held, *rest)])
            array = array.reshape(-1, *array.shape[len(held) :])
            if len(held) < len(group):
                spots = [places[group.index(n)] for n in held]
                array = array[np.ravel_multi_index(spots, [self.sizes[n] for n in held])]
            parts.append(Part(array, (new, *rest)))
        layout = (*self.layout[:axis], (new,), *self.layout[axis + 1 :])
        lengths = {n: s for n, s in self.sizes.items() if n not in group} | {new: length}
        return Term(tuple(parts), layout, lengths, self.scale)

    # -- places of an axis

    def taken(self, axis: int, places: NDArray[np.int64]) -> Term:
        """The tensor at these places of an axis, in order; place -1 gives zeros."""
        length = self.shape[axis]
        if len(places) == length and np.array_equal(places, np.arange(length)):
            return self
        group = self.layout[axis]
        if len(group) > 1:
            inner = self.length(group[1:])
            blocks = places.reshape(-1, inner) if len(places) % inner == 0 else None
            if blocks is not None and _whole_blocks(blocks, inner):
                # the inner labels stay together: only the outermost one is touched
                return self._taken(group[0], np.where(blocks[:, 0] < 0, -1, blocks[:, 0] // inner))
        term = self.joined(axis)
        return term._taken(term.layout[axis][0], places)

    def _taken(self, label: Label, places: NDArray[np.int64]) -> Term:
        free, parts = self.free(label), self.parts
        length = self.sizes[label]
        if free and len(places) == length and np.array_equal(np.sort(places), np.arange(length)):
            return self
        if free:
            parts = (*parts, Part(np.ones(length, np.float32), (label,)))
        term = replace(
            self, parts=tuple(p.taken(label, places) for p in parts), sizes={**self.sizes, label: len(places)}
        )
        return term._squeezed() if len(places) == 1 else term

    def padded(self, axis: int, before: int, after: int) -> Term:
        """Zeros added before and after an axis."""
        if not before and not after:
            return self
        length = self.shape[axis]
        places = np.full(before + length + after, -1, np.int64)
        places[before : before + length] = np.arange(length)
        return self.taken(axis, places)

    def indexed(self, axis: int, place: int) -> Term:
        """The slice at one place of an axis, which goes away."""
        term = self.taken(axis, np.array([place])) if self.layout[axis] else self
        return term.with_layout([g for k, g in enumerate(term.layout) if k != axis])

    def placed(self, axis: int, place: int, length: int) -> Term:
        """The term at one place of a new axis, zeros at the others."""
        layout = list(self.layout)
        if length == 1:
            layout.insert(axis, ())
            return self.with_layout(layout)
        label = fresh()
        layout.insert(axis, (label,))
        hot = np.zeros(length, np.float32)
        hot[place] = 1
        parts = (*self.parts, Part(hot, (label,)))
        return Term(parts, tuple(layout), {**self.sizes, label: length}, self.scale)

    # -- values

    def times(self, vector: NDArray[Any], axis: int) -> Term:
        """The term times a vector along an axis; the product is taken when the network is contracted."""
        group = self.layout[axis]
        array = vector.reshape([self.sizes[n] for n in group])
        return replace(self, parts=(*self.parts, Part(array, group)))

    def through(self, matrix: NDArray[Any], axis: int) -> Term:
        """The tensor with an axis replaced by a matrix's rows: Σ matrix[new, old] · term[old]."""
        term = self.joined(axis)
        old, new = term.layout[axis][0], fresh()
        parts = term.parts if not term.free(old) else (*term.parts, Part(np.ones(term.sizes[old]), (old,)))
        layout = (*term.layout[:axis], (new,), *term.layout[axis + 1 :])
        sizes = {**term.sizes, new: len(matrix)}
        return Term((*parts, Part(matrix, (new, old))), layout, sizes, term.scale)._squeezed()

    def compact(self) -> Term | None:
        """The term without summed places that give zeros, None where it is zero altogether."""
        scale, parts, sizes = self.scale, [], dict(self.sizes)
        for p in self.parts:
            if p.labels:
                parts.append(p)
            else:
                scale *= float(p.array)
        if scale == 0.0:
            return None
        for label in self.inner:
            alive = np.ones(sizes[label], np.bool_)
            for p in parts:
                if label in p.labels:
                    axis = p.labels.index(label)
                    alive &= p.array.any(axis=tuple(k for k in range(p.array.ndim) if k != axis))
            if not alive.any():
                return None
            if not alive.all():
                places = np.flatnonzero(alive)
                parts = [p.taken(label, places) for p in parts]
                sizes[label] = len(places)
        if not all(p.array.any() for p in parts):
            return None
        return Term(tuple(parts), self.layout, sizes, scale)

    def dense(self) -> NDArray[Any]:
        """The tensor itself in float64, scale included. Cost: its size times the ranks."""
        flat = contract(self.parts, self.open, self.sizes)
        return flat.reshape(self.shape) * self.scale

    def at(self, places: Sequence[NDArray[np.int64]]) -> NDArray[Any]:
        """Single elements of the tensor in float64, scale included: one for each place, given axis by axis."""
        spots: dict[Label, NDArray[np.int64]] = {}
        for group, column in zip(self.layout, places, strict=True):
            if group:
                spots.update(zip(group, np.unravel_index(column, [self.sizes[n] for n in group]), strict=True))
        count, point = len(places[0]) if places else 1, fresh()
        parts = [Part(np.ones(count), (point,))]
        for p in self.parts:
            opened = [n for n in p.labels if n in spots]
            inner = tuple(n for n in p.labels if n not in spots)
            array = np.transpose(p.array, [p.labels.index(n) for n in (*opened, *inner)])
            parts.append(Part(array[tuple(spots[n] for n in opened)], (point, *inner)) if opened else p)
        return contract(parts, [point], {**self.sizes, point: count}) * self.scale


def contract(parts: Sequence[Part], labels: Sequence[Label], sizes: Mapping[Label, int]) -> NDArray[Any]:
    """The network's product over all labels but `labels`, which order the result's axes.

    One part alone is only transposed and keeps its dtype; anything else is float64.
    """
    held = {n for p in parts for n in p.labels}
    missing = [n for n in labels if n not in held]
    if len(parts) == 1 and not missing and len(labels) == len(parts[0].labels):
        return np.transpose(parts[0].array, [parts[0].labels.index(n) for n in labels])
    used = [*parts, *(Part(np.ones(sizes[n]), (n,)) for n in missing)]
    if not used:
        return np.ones([sizes[n] for n in labels])
    number = {n: k for k, n in enumerate(dict.fromkeys(n for p in used for n in p.labels))}
    operands: list[Any] = []
    for p in used:
        operands += [p.array.astype(np.float64), [number[n] for n in p.labels]]
    result: NDArray[Any] = np.einsum(
        *operands, [number[n] for n in labels], optimize="greedy" if len(used) > 1 else False
    )
    return result


def _whole_blocks(blocks: NDArray[np.int64], inner: int) -> bool:
    """Whether each row is a run of `inner` places that begins at a multiple of it, or is all -1."""
    first = blocks[:, :1]
    runs = np.where(first < 0, -1, first + np.arange(inner))
    return bool((blocks == runs).all() and (first[first >= 0] % inner == 0).all())
