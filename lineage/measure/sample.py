"""Which elements stand for a large tensor: short runs at seeded places, one in each of equal stretches.

Places depend on the seed and the number of elements only, so a renamed tensor keeps its figures.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Sample"]

#: elements of a run: two cache lines of bf16, so that sampling costs little more than reading
RUN = 64
#: below this many runs the runs get shorter
RUNS = 4096


class Sample:
    """A stratified sample of flat positions out of `n` elements.

    Stretch k covers elements [edge(k), edge(k+1)) and gives one run of `run` elements, in order.

    Parameters
    ----------
    n : elements of the tensor
    size : wanted sample size; all elements are taken where n is not larger
    seed : draws the place of each run inside its stretch
    """

    def __init__(self, n: int, size: int, seed: int) -> None:
        self.n = n
        self.whole = n <= size
        if self.whole:
            self.run, self.count = n, 1
        else:
            self.run = max(1, min(RUN, size // RUNS))
            self.count = max(1, size // self.run)
        self.seed = seed

    @property
    def size(self) -> int:
        """Elements in the sample."""
        return self.run * self.count

    def edge(self, stretch: int) -> int:
        """First element of a stretch."""
        return stretch * self.n // self.count

    def starts(self, first: int, last: int) -> NDArray[np.int64]:
        """First element of the run of each stretch in [first, last)."""
        index = np.arange(first, last + 1, dtype=np.int64)
        # stretch * n can pass 2^63 only beyond 10^12 elements: quotient and remainder apart keep it exact
        step, rest = divmod(self.n, self.count)
        edges = index * step + index * rest // self.count
        room = np.maximum(edges[1:] - edges[:-1] - self.run + 1, 1).astype(np.uint64)
        return np.asarray(edges[:-1] + (_mixed(index[:-1], self.seed) % room).astype(np.int64))


def _mixed(index: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Uniform 64-bit numbers by counter (splitmix64, Steele, Lea and Flood 2014)."""
    start = np.uint64((seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) & 0xFFFFFFFFFFFFFFFF)
    z = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))
