"""Convolutions, chains of linear layers, recurrent layers: the order of channels, carried from kernel to kernel.

Every axis of a kernel has one of the orders that are known for its length, or one that nobody knows yet. A kernel
with one known axis gives the order of its other axis (a fit); a kernel whose axes are both known before it is looked
at took no part in any fit, and shows whether they are right. Nothing is read from names.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
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
from lineage.judge.axes import KERNEL, Shape, matrices
from lineage.layout.operations import Operation, Take
from lineage.match.words import stem

__all__ = ["ChannelFit", "fit_channels"]

Floats = NDArray[np.floating[Any]]
Order = NDArray[np.intp]

#: fewest kernels of a stack
FEWEST_KERNELS = 3
#: least mean cosine of what took no part. Strangers (550 pairs of small networks of the three kinds) show nothing, or
#: one kernel at 0.47; students of all features, whose kernels become alike by themselves, 0.45 to 0.7; relatives that
#: were trained for twice the base's steps 0.82 and more
NEAR = 0.8
#: fits in a row that show nothing before the search gives up: a bottleneck with a shortcut needs four
PATIENCE = 6
#: units of each axis that are compared when orders are tried on a kernel
TRIED = 64
#: elements of a network without convolutions that is searched: there is no bound on what its axes may be
PLAIN = 1 << 26
#: units that are matched at most (4,096 take two seconds)
LONGEST = 4096
#: by how much units must agree better than with features in another order for a fit to be tried
ABOVE_CHANCE = 0.05
#: axes that know a length which is bound to an index, at most
BOUND = 2
#: kernels of each kind that an order is looked for in at a time
FEW = 12
#: elements of kernels that are read whole where some rows would do
READ_WHOLE = 1 << 19
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
    carried : mean cosine of those of them that an order which was found explains; 0.0 where there are none. What
        stands as it stood (an embedding that was copied) says nothing of the orders
    """

    orders: dict[str, tuple[Order | None, Order | None]]
    axes: dict[str, tuple[int, int]]
    lengths: dict[str, tuple[tuple[int, int], tuple[int, int]]]
    vectors: dict[str, Order]
    fits: tuple[Fitted, ...]
    shown: tuple[Shown, ...]
    cosine: float
    carried: float
    floor: float

    @property
    def holds(self) -> bool:
        """Whether what took no part agrees."""
        return min(self.cosine, self.carried) >= NEAR and holds(self.cosine, self.floor)

    @property
    def disguised(self) -> bool:
        """Whether any order but the one that stood there was looked for and found, right or wrong."""
        return bool(self._moved or self._cut)

    @property
    def _moved(self) -> list[Fitted]:
        return [fit for fit in self.fits if fit.moved >= 2]

    @property
    def _cut(self) -> list[Fitted]:
        return [fit for fit in self.fits if fit.family == "subset"]

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
        moved, cut = self._moved, self._cut
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
    places = any(len(shapes[k.name][1]) > 2 for k in kernels)
    size = sum(math.prod(shapes[k.name][1]) for k in kernels)
    if len(kernels) < FEWEST_KERNELS or (not places and size > PLAIN):
        return None
    return _Search(weights, kernels, seed).run(shapes)


class _Search:
    """State of one search: orders known by their lengths, kernels done and left."""

    def __init__(self, weights: Weights, kernels: list[_Kernel], seed: int) -> None:
        self.weights, self.left, self.seed = weights, kernels, seed
        self.all = {kernel.name: kernel for kernel in kernels}
        self.known: dict[tuple[int, int], list[Order]] = defaultdict(list)
        for one, two in (pair for kernel in kernels for pair in kernel.lengths):
            if one == two and not self.known[one, two]:
                self.known[one, two].append(np.arange(two))
        # lengths that two axes at most know are bound to an index: colours, classes
        uses = Counter(pair for kernel in kernels for pair in kernel.lengths)
        self.sure = {(pair, 0) for pair, count in uses.items() if count <= BOUND and pair[0] == pair[1]}
        self.tried: set[tuple[str, int, int]] = set()
        self.matched: dict[tuple[str, int, int], tuple[float, Order]] = {}
        self.orders: dict[str, tuple[Order | None, Order | None]] = {}
        self.fits: list[Fitted] = []
        self.shown: list[Shown] = []
        self.carried: list[float] = []
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
            carried=float(np.mean(self.carried)) if self.carried else 0.0, floor=self.floor,
        )  # fmt: skip

    def _rows(self, kernel: _Kernel, side: int, some: Order | None = None) -> Floats:
        """The kernel as (writes, reads, places), or some of what it writes."""
        checkpoint = self.weights.sides[side]
        size = checkpoint.specs[kernel.name].size
        if some is not None and kernel.axes == (0, 1) and size > READ_WHOLE and len(some) * 2 < kernel.lengths[0][side]:
            read = [checkpoint.rows(kernel.name, int(k), int(k) + 1) for k in some]
            array = np.nan_to_num(np.concatenate(read).astype(np.float32), posinf=0.0, neginf=0.0)
        else:
            array = np.moveaxis(self.weights.tensor(side, kernel.name), kernel.axes, (0, 1))
            array = array if some is None else array[some]
        return array.reshape(*array.shape[:2], -1)

    def _shows(self) -> bool:
        """Takes in every kernel that two known orders explain; true where there was one."""
        found = False
        for kernel in list(self.left):
            pair = self._explained(kernel)
            if pair is None:
                continue
            at = tuple(self.known[lengths][k] for lengths, k in zip(kernel.lengths, pair, strict=True))
            self.sure.update(zip(kernel.lengths, pair, strict=True))
            a, b = self._rows(kernel, 0), self._rows(kernel, 1)
            self.shown.append(Shown(kernel.name, cosine(a[at[0]][:, at[1]], b), len(b)))
            if any(k or one != two for k, (one, two) in zip(pair, kernel.lengths, strict=True)):
                self.carried.append(self.shown[-1].cosine)
            self.floor = max(self.floor, abs(cosine(a[np.roll(at[0], 1)][:, np.roll(at[1], 1)], b)))
            self.orders[kernel.name] = (at[0], at[1])
            self.left.remove(kernel)
            found = True
        return found

    def _explained(self, kernel: _Kernel) -> tuple[int, int] | None:
        """The two known orders that explain a kernel best, if they do; tried on a sample of it, each pair once."""
        writes, reads = (self.known[pair] for pair in kernel.lengths)
        left = [(i, j) for i in range(len(writes)) for j in range(len(reads)) if (kernel.name, i, j) not in self.tried]
        if not left:
            return None
        rng = np.random.default_rng(self.seed)
        some, columns = (np.sort(rng.choice(n, min(n, TRIED), replace=False)) for _, n in kernel.lengths)
        small = self._rows(kernel, 1, some)[:, columns]
        best, chosen = LEAST_SHOWN, None
        for i in dict.fromkeys(i for i, _ in left):
            rows = self._rows(kernel, 0, writes[i][some])
            for j in (j for k, j in left if k == i):
                self.tried.add((kernel.name, i, j))
                score = cosine(rows[:, reads[j][columns]], small)
                if score > best:
                    best, chosen = score, (i, j)
        return chosen

    def _fits(self) -> bool:
        """Learns one new order from the kernel that gives it most clearly; false where none gives any."""
        best: tuple[float, _Kernel, int, int, Order] | None = None
        for kernel, side, at in self._chances():
            score, take = self._match(kernel, side, at)
            if best is None or score > best[0]:
                best = score, kernel, side, at, take
        if best is None or best[0] < ABOVE_CHANCE:
            return False
        _, kernel, side, at, take = best
        order = self.known[kernel.lengths[side]][at]
        self._learn(kernel, 1 - side, take)
        self.orders[kernel.name] = (order, take) if side == 0 else (take, order)
        self.left.remove(kernel)
        return True

    def _chances(self) -> Iterator[tuple[_Kernel, int, int]]:
        """Kernels with an axis whose order is known, the axis and the order; the first few of each length."""
        count: Counter[tuple[tuple[int, int], tuple[int, int], int]] = Counter()
        for kernel in self.left:
            for side in (0, 1):
                one, two = kernel.lengths[1 - side]
                for at in range(len(self.known[kernel.lengths[side]])):
                    key = (kernel.lengths[side], (one, two), at)
                    fits = LONGEST >= one >= two > 1 and (kernel.lengths[side], at) in self.sure
                    if fits and count[key] < FEW:
                        count[key] += 1
                        yield kernel, side, at

    def _match(self, kernel: _Kernel, side: int, at: int) -> tuple[float, Order]:
        """How much better units agree than with their features in another order, and the match."""
        key = (kernel.name, side, at)
        if key not in self.matched:
            a, b = self._rows(kernel, 0), self._rows(kernel, 1)
            x = np.moveaxis(np.take(a, self.known[kernel.lengths[side]][at], axis=side), side, 1)
            y = np.moveaxis(b, side, 1)
            x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
            take = match_units([x], [y], seed=self.seed)
            mixed = np.random.default_rng(self.seed).permutation(x.shape[1])
            chance = match_units([x[:, mixed]], [y], seed=self.seed)
            above = np.mean(np.abs(unit_cosines(x[take], y))) - np.mean(np.abs(unit_cosines(x[chance][:, mixed], y)))
            self.matched[key] = float(above), take
        return self.matched[key]

    def _learn(self, kernel: _Kernel, side: int, take: Order) -> None:
        """Adds an order, unless it is one that is known."""
        one, two = kernel.lengths[side]
        known = self.known[one, two]
        family = "subset" if two < one else "order"
        moved = int(np.count_nonzero(take != np.arange(two)))
        self.fits.append(Fitted(f"channels of {kernel.name}", family, two, moved, (kernel.name,)))
        at = next((k for k, other in enumerate(known) if np.mean(other == take) >= SAME), len(known))
        if at == len(known):
            known.append(take)
        self.sure.add(((one, two), at))

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
    told = {matrix.name: matrix.axes for matrix in matrices(shapes)[0] if not matrix.index}
    for name, (a, b) in shapes.items():
        if len(a) != len(b) or len(b) < 2 or sum(n > 1 for n in b) < 2:
            continue
        last = len(b) == 2 or (told[name][0] == 0 if name in told else max(b[2:]) <= KERNEL)
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
