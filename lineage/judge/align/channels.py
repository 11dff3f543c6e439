"""Convolution stacks: the order of channels, carried from kernel to kernel.

Every axis of a kernel has one of the orders that are known for its length, or one that nobody knows yet. A kernel
with one known axis gives the order of its other axis (a fit); a kernel whose axes are both known before it is looked
at took no part in any fit, and shows whether they are right. Nothing is read from names.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.chains import Chains
from lineage.judge.align.choice import LEAST_SHOWN, holds
from lineage.judge.align.neurons import match_units
from lineage.judge.align.records import Fitted, Shown, Trait
from lineage.judge.align.weights import Weights, cosine, unit_cosines
from lineage.judge.axes import KERNEL, Shape
from lineage.layout.operations import Operation, Take
from lineage.match.words import stem

__all__ = ["ChannelFit", "fit_channels"]

Floats = NDArray[np.floating[Any]]
Order = NDArray[np.intp]

#: fewest kernels of a stack, and fewest that must have shown something
FEWEST_KERNELS, FEWEST_SHOWN = 3, 2
#: fits in a row that show nothing before the search gives up: a bottleneck with a shortcut needs four
PATIENCE = 6
#: units of each axis that are compared when orders are tried on a kernel
TRIED = 64
#: by how much units must agree better than with features in another order for a fit to be tried
ABOVE_CHANCE = 0.05
#: share of units by which two orders are one
SAME = 0.9


class _Kernel(msgspec.Struct, frozen=True):
    """A tensor with an axis of units that it writes and one of units that it reads (lengths in A and in B)."""

    name: str
    axes: tuple[int, int]
    lengths: tuple[tuple[int, int], tuple[int, int]]


class ChannelFit(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes
    ----------
    orders : for each kernel the orders of its two axes; None where nothing is known
    vectors : the order of each vector (biases, norms, running statistics)
    shown : kernels that took no part in any fit, after the orders found elsewhere
    """

    orders: dict[str, tuple[Order | None, Order | None]]
    axes: dict[str, tuple[int, int]]
    lengths: dict[str, tuple[tuple[int, int], tuple[int, int]]]
    vectors: dict[str, Order]
    fits: tuple[Fitted, ...]
    shown: tuple[Shown, ...]
    cosine: float
    floor: float

    @property
    def holds(self) -> bool:
        """Whether what took no part agrees."""
        return len(self.shown) >= FEWEST_SHOWN and holds(self.cosine, self.floor)

    def chains(self) -> Chains:
        """Operations on each tensor."""
        made: Chains = {}
        for name, orders in self.orders.items():
            found = zip(orders, self.axes[name], self.lengths[name], strict=True)
            made[name] = tuple(op for order, axis, (length, _) in found for op in _take(order, axis, length))
        for name, order in self.vectors.items():
            made[name] = tuple(_take(order, 0, int(order.max()) + 1))
        return {name: chain for name, chain in made.items() if chain}

    def traits(self) -> tuple[Trait, ...]:
        """Relations in words."""
        if not self.holds:
            return ()
        moved = [fit for fit in self.fits if fit.moved >= 2]
        cut = [fit for fit in self.fits if fit.family == "subset"]
        shown = (
            f"{len(self.shown)} kernels that took no part agree at cosine {self.cosine:.3f}, by chance {self.floor:.3f}"
        )
        found = []
        if cut:
            found.append(Trait("width-pruned", f"{sum(f.units for f in cut)} channels are left of more; {shown}"))
        elif moved:
            units, total = sum(f.moved for f in moved), sum(f.units for f in self.fits)
            found.append(Trait("permuted", f"{units} of {total} channels stand in another order; {shown}"))
        return tuple(found)


def fit_channels(weights: Weights, shapes: Mapping[str, tuple[Shape, Shape]], *, seed: int) -> ChannelFit | None:
    """The order of channels in a stack of convolutions, or None where there is none.

    Parameters
    ----------
    shapes : shapes in A and in B by common name
    """
    kernels = list(_kernels(shapes))
    if len(kernels) < FEWEST_KERNELS or not any(len(shapes[k.name][1]) > 2 for k in kernels):
        return None
    return _Search(weights, kernels, seed).run(shapes)


class _Search:
    """State of one search: orders known by their lengths, kernels done and left."""

    def __init__(self, weights: Weights, kernels: list[_Kernel], seed: int) -> None:
        self.weights, self.left, self.seed = weights, kernels, seed
        self.known: dict[tuple[int, int], list[Order]] = defaultdict(list)
        for kernel in kernels:
            for one, two in kernel.lengths:
                if one == two and not self.known[one, two]:
                    self.known[one, two].append(np.arange(two))
        self.orders: dict[str, tuple[Order | None, Order | None]] = {}
        self.all = {kernel.name: kernel for kernel in kernels}
        self.fits: list[Fitted] = []
        self.shown: list[Shown] = []
        self.floor = 0.0

    def run(self, shapes: Mapping[str, tuple[Shape, Shape]]) -> ChannelFit:
        """Both steps in turn until nothing is left or nothing is found."""
        patience = PATIENCE
        while self.left:
            if self._shows():
                patience = PATIENCE
                continue
            patience -= 1
            if patience < 0 or not self._fits():
                break
        shown = [s.cosine for s in self.shown]
        return ChannelFit(
            orders=self.orders, axes={n: k.axes for n, k in self.all.items()},
            lengths={n: k.lengths for n, k in self.all.items()}, vectors=dict(self._vectors(shapes)),
            fits=tuple(self.fits), shown=tuple(self.shown), cosine=float(np.mean(shown)) if shown else 0.0,
            floor=self.floor,
        )  # fmt: skip

    def _rows(self, kernel: _Kernel, side: int) -> Floats:
        """The kernel as (writes, reads, places)."""
        array = np.moveaxis(self.weights.tensor(side, kernel.name), kernel.axes, (0, 1))
        return array.reshape(*array.shape[:2], -1)

    def _shows(self) -> bool:
        """Takes in every kernel that two known orders explain; true where there was one."""
        found = False
        for kernel in list(self.left):
            best = self._explained(kernel)
            if best is not None:
                a, b = self._rows(kernel, 0), self._rows(kernel, 1)
                write, read = best
                self.shown.append(Shown(kernel.name, cosine(a[write][:, read], b), len(b)))
                self.floor = max(self.floor, abs(cosine(a[np.roll(write, 1)][:, np.roll(read, 1)], b)))
                self.orders[kernel.name] = best
                self.left.remove(kernel)
                found = True
        return found

    def _explained(self, kernel: _Kernel) -> tuple[Order, Order] | None:
        """The two known orders that explain a kernel best, if they do; tried on a sample of it."""
        rng = np.random.default_rng(self.seed)
        a, b = self._rows(kernel, 0), self._rows(kernel, 1)
        some = [np.sort(rng.choice(n, min(n, TRIED), replace=False)) for n in b.shape[:2]]
        small = b[np.ix_(*some)]
        best, chosen = LEAST_SHOWN, None
        for write in self.known[kernel.lengths[0]]:
            rows = a[write[some[0]]]
            for read in self.known[kernel.lengths[1]]:
                score = cosine(rows[:, read[some[1]]], small)
                if score > best:
                    best, chosen = score, (write, read)
        return chosen

    def _fits(self) -> bool:
        """Learns one new order from the kernel that gives it most clearly; false where none gives any."""
        best: tuple[float, _Kernel, int, Order, Order] | None = None
        for kernel in self.left:
            a, b = self._rows(kernel, 0), self._rows(kernel, 1)
            for side in (0, 1):  # the side whose order is known
                for order in self.known[kernel.lengths[side]]:
                    x, y = np.moveaxis(np.take(a, order, axis=side), side, 1), np.moveaxis(b, side, 1)
                    if x.shape[0] < y.shape[0] or y.shape[0] < 2:
                        continue
                    score, take = self._matched(x.reshape(len(x), -1), y.reshape(len(y), -1))
                    if best is None or score > best[0]:
                        best = score, kernel, side, order, take
        if best is None or best[0] < ABOVE_CHANCE:
            return False
        _, kernel, side, order, take = best
        self._learn(kernel, 1 - side, take)
        pair = (order, take) if side == 0 else (take, order)
        self.orders[kernel.name] = pair
        self.left.remove(kernel)
        return True

    def _matched(self, x: Floats, y: Floats) -> tuple[float, Order]:
        """How much better units agree than with their features in another order, and the match."""
        take = match_units([x], [y], seed=self.seed)
        mixed = np.random.default_rng(self.seed).permutation(x.shape[1])
        chance = match_units([x[:, mixed]], [y], seed=self.seed)
        above = np.mean(np.abs(unit_cosines(x[take], y))) - np.mean(np.abs(unit_cosines(x[chance][:, mixed], y)))
        return float(above), take

    def _learn(self, kernel: _Kernel, side: int, take: Order) -> None:
        """Adds an order, unless it is one that is known."""
        one, two = kernel.lengths[side]
        family = "subset" if two < one else "order"
        moved = int(np.count_nonzero(take != np.arange(two)))
        self.fits.append(Fitted(f"channels of {kernel.name}", family, two, moved, (kernel.name,)))
        if all(np.mean(other == take) < SAME for other in self.known[one, two]):
            self.known[one, two].append(take)

    def _vectors(self, shapes: Mapping[str, tuple[Shape, Shape]]) -> Iterator[tuple[str, Order]]:
        """Vectors that share a stem have one order: the known one under which they agree best."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, (_, b) in shapes.items():
            if len(b) == 1 and b[0] > 1:
                groups[stem(name)].append(name)
        for names in groups.values():
            lengths = {(shapes[n][0][0], shapes[n][1][0]) for n in names}
            orders = self.known.get(next(iter(lengths)), []) if len(lengths) == 1 else []
            pairs = [(_centred(self.weights.tensor(0, n)), _centred(self.weights.tensor(1, n))) for n in names]
            scores = [float(np.mean([cosine(a[order], b) for a, b in pairs])) for order in orders]
            if scores:
                for name in names:
                    yield name, orders[int(np.argmax(scores))]


def _kernels(shapes: Mapping[str, tuple[Shape, Shape]]) -> Iterator[_Kernel]:
    """Tensors with two axes of units: (out, in, …) or, where the kernel comes first, (…, in, out)."""
    for name, (a, b) in shapes.items():
        if len(a) != len(b) or len(b) < 2 or sum(n > 1 for n in b) < 2:
            continue
        last = len(b) == 2 or max(b[2:]) <= KERNEL
        axes = (0, 1) if last else (len(b) - 1, len(b) - 2)
        rest = [k for k in range(len(b)) if k not in axes]
        if all(a[k] == b[k] for k in rest):
            yield _Kernel(name, axes, ((a[axes[0]], b[axes[0]]), (a[axes[1]], b[axes[1]])))


def _centred(vector: Floats) -> Floats:
    return np.asarray(vector - vector.mean())


def _take(order: Order | None, axis: int, length: int) -> list[Operation]:
    if order is None or (len(order) == length and np.array_equal(order, np.arange(length))):
        return []
    return [Take(axis, order.astype(np.int64), length)]
