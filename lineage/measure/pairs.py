"""Reads tensor pairs block by block, in several threads, and hands them to a kernel.

A pair becomes jobs (ranges of elements); blocks are read into buffers that each thread reuses, so memory is
threads × (blocks + one sample), whatever the files hold. Cuts depend on sizes alone and sums are merged in the
order of the blocks: results do not depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import FLOATS, STORAGE, TINY
from lineage.measure.kernels import Kernel
from lineage.measure.metrics import AT, FIGURES, Metrics, Order, figures, merge
from lineage.measure.plain import PlainKernel, finite_pairs
from lineage.measure.sample import Sample

__all__ = ["BLOCK", "MANTISSA", "QUANTILES", "Measured", "Side", "measure_pairs"]

#: elements of a block: both sides as bf16 and the working arrays stay in a 1 MiB cache
BLOCK = 1 << 17
#: elements of a job, a multiple of the block
JOB = 1 << 22
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
#: bits of the mantissa; where two dtypes differ the one with fewer is the coarser
MANTISSA = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7, "F8_E4M3": 3, "F8_E5M2": 2}
_SAMPLED = tuple(f for f in FIGURES if f == "spearman" or f.startswith("q"))


class Measured(msgspec.Struct, frozen=True):
    """What one pair gave.

    Attributes
    ----------
    metrics : its figures
    sums : what they were made of, for merging
    only_rounded : dtypes differ and rounding to the coarser one explains every difference
    sampled : the figures that come from a sample, and its size; None where none does
    """

    metrics: Metrics
    sums: NDArray[np.float64]
    only_rounded: bool
    sampled: dict[str, Any] | None

    @property
    def lost(self) -> bool:
        """True where NaN or an infinity on one side meets something else on the other."""
        return bool(self.sums[AT["other"]])


class Side:
    """One tensor of a pair: how its blocks are read, as codes where they are stored plainly, else as values."""

    def __init__(self, checkpoint: Checkpoint, spec: TensorSpec) -> None:
        self.checkpoint, self.spec = checkpoint, spec
        self.word = spec.dtype if spec.plain else _word(spec.value_dtype)
        self.storage = STORAGE[self.word]
        self.tiny = TINY.get(spec.dtype, TINY["F32"]) if spec.dtype in FLOATS or not spec.plain else 1.0

    def read(self, start: int, stop: int, out: NDArray[Any]) -> NDArray[Any]:
        """Elements [start, stop) in `out` or elsewhere."""
        if self.spec.plain:
            return self.checkpoint.read_codes(self.spec.name, start, stop, out=out)
        return self.checkpoint.read(self.spec.name, start, stop)

    def comparable(self, other: Side) -> bool:
        """True where elements correspond in flat order: equal shapes, axes of length one aside."""
        return [n for n in self.spec.shape if n != 1] == [n for n in other.spec.shape if n != 1]


def _word(dtype: np.dtype[Any]) -> str:
    """Word of decoded values."""
    return next(word for word, storage in STORAGE.items() if storage == dtype and word != "BF16")


class _Buffers(threading.local):
    """Memory of one thread, by purpose; grows to the largest wish and stays."""

    def __init__(self) -> None:
        self.memory: dict[str, NDArray[np.uint8]] = {}

    def get(self, purpose: str, size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """An uninitialised array of `size` elements."""
        nbytes = size * dtype.itemsize
        held = self.memory.get(purpose)
        if held is None or held.nbytes < nbytes:
            held = self.memory[purpose] = np.empty(nbytes, np.uint8)
        return held[:nbytes].view(dtype)


class _Samples:
    """Sample buffers, handed out to pairs in work and taken back, so that pages are touched once."""

    def __init__(self) -> None:
        self.free: list[NDArray[np.uint8]] = []
        self.lock = threading.Lock()

    def take(self, nbytes: int) -> NDArray[np.uint8]:
        """A buffer of at least `nbytes` bytes."""
        with self.lock:
            held = self.free.pop() if self.free else None
        return held if held is not None and held.nbytes >= nbytes else np.empty(nbytes, np.uint8)

    def give(self, buffer: NDArray[np.uint8]) -> None:
        """Takes a buffer back."""
        with self.lock:
            self.free.append(buffer)


class _Pair:
    """The work on one pair: its jobs, their sums, and the sample that grows with them."""

    def __init__(self, a: Side, b: Side, sample: Sample, kernel: Kernel) -> None:
        self.a, self.b, self.sample = a, b, sample
        fits = {a.word, b.word} <= kernel.words
        self.kernel = kernel if fits else PlainKernel()
        # jobs end where stretches of the sample end, so that no run is cut
        count = max(1, -(-sample.n // JOB)) if sample.whole else max(1, min(sample.count, -(-sample.n // JOB)))
        self.jobs = count
        self.left = count
        self.sums: list[list[NDArray[np.float64]]] = [[] for _ in range(count)]
        words = {a.word, b.word}
        self.rounding = len(words) == 2 and words <= set(FLOATS)
        self.lock = threading.Lock()
        self.held: NDArray[np.uint8] | None = None

    def buffers(self, samples: _Samples) -> tuple[NDArray[Any], NDArray[Any]]:
        """The two sample arrays; taken at the first job."""
        size = self.sample.size
        split = size * self.a.storage.itemsize
        split += -split % 64
        whole = split + size * self.b.storage.itemsize
        with self.lock:
            if self.held is None:
                self.held = samples.take(whole)
        return (self.held[: size * self.a.storage.itemsize].view(self.a.storage),
                self.held[split:whole].view(self.b.storage))  # fmt: skip

    def stretches(self, job: int) -> tuple[int, int]:
        """The stretches of the sample that belong to a job."""
        return job * self.sample.count // self.jobs, (job + 1) * self.sample.count // self.jobs


class _Work:
    """One run over many pairs."""

    def __init__(self, pairs: Sequence[_Pair], progress: Callable[[int, int], None] | None) -> None:
        self.pairs = pairs
        self.progress = progress
        self.total = sum(pair.sample.n for pair in pairs)
        self.done = 0
        self.lock = threading.Lock()
        self.buffers = _Buffers()
        self.samples = _Samples()
        self.queue = ((at, job) for at, pair in enumerate(pairs) for job in range(pair.jobs))
        self.results: list[Measured | None] = [None] * len(pairs)
        self.stop = False

    def run(self) -> None:
        """What each thread does: jobs in order until none is left."""
        try:
            while not self.stop:
                with self.lock:
                    at, job = next(self.queue, (-1, 0))
                if at < 0:
                    return
                pair = self.pairs[at]
                self.measure(pair, job)
                with pair.lock:
                    pair.left -= 1
                    last = pair.left == 0
                if last and not self.stop:
                    self.results[at] = self.finish(pair)
        except BaseException:
            self.stop = True
            raise

    def measure(self, pair: _Pair, job: int) -> None:
        """Sums of one job's blocks; copies its part of the sample."""
        sample = pair.sample
        if not sample.n:
            return
        kept = pair.buffers(self.samples)
        if sample.whole:
            start, stop = job * sample.n // pair.jobs, (job + 1) * sample.n // pair.jobs
            for low in range(start, stop, BLOCK):
                high = min(stop, low + BLOCK)
                for side, codes in zip(kept, self.block(pair, job, low, high), strict=True):
                    side[low:high] = codes
                if self.stop:
                    return
        else:
            self.measure_sampled(pair, job, kept)

    def measure_sampled(self, pair: _Pair, job: int, kept: tuple[NDArray[Any], NDArray[Any]]) -> None:
        """The same where the sample is a part: blocks end with stretches."""
        sample, (first, last) = pair.sample, pair.stretches(job)
        starts = sample.starts(first, last)
        # stretches whose elements fit a block; a longer one is read in pieces, of which one or two hold its run
        many = max(1, BLOCK * sample.count // sample.n)
        for at in range(first, last, many):
            upto = min(last, at + many)
            runs = starts[at - first : upto - first]
            low, end = sample.edge(at), sample.edge(upto)
            for low_piece in range(low, end, 2 * BLOCK):
                high = min(end, low_piece + 2 * BLOCK)
                self.copy_runs(pair, job, low_piece, high, kept, at, runs)
            if self.stop:
                return

    def copy_runs(
        self, pair: _Pair, job: int, low: int, high: int,
        kept: tuple[NDArray[Any], NDArray[Any]], at: int, runs: NDArray[np.int64],
    ) -> None:  # fmt: skip
        """Measures [low, high) and copies what the runs take of it; `at` is the number of the first run."""
        run = pair.sample.run
        for side, codes in zip(kept, self.block(pair, job, low, high), strict=True):
            if runs[0] >= low and runs[-1] + run <= high:
                pair.kernel.copy_runs(codes, runs - low, run, side[at * run : (at + len(runs)) * run])
            else:
                for k, start in enumerate(runs.tolist(), at):
                    one, two = max(low, start), min(high, start + run)
                    if one < two:
                        side[k * run + one - start : k * run + two - start] = codes[one - low : two - low]

    def block(self, pair: _Pair, job: int, low: int, high: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Reads one block of both sides, adds its sums to the job's and returns its codes."""
        a, b = pair.a, pair.b
        codes_a = a.read(low, high, self.buffers.get("a", high - low, a.storage))
        codes_b = b.read(low, high, self.buffers.get("b", high - low, b.storage))
        pair.sums[job].append(pair.kernel.sums(codes_a, a.word, codes_b, b.word, tiny=a.tiny))
        if pair.rounding and not _rounded(pair, codes_a, codes_b):
            pair.rounding = False
        if self.progress is not None:
            with self.lock:
                self.done += high - low
                self.progress(self.done, self.total)
        return codes_a, codes_b

    def finish(self, pair: _Pair) -> Measured:
        """Figures of a pair whose jobs are all done."""
        sums = merge(part for job in pair.sums for part in job)
        order = Order()
        if pair.sample.n:
            order = self.order(pair, sums)
        if pair.held is not None:
            self.samples.give(pair.held)
            pair.held = None
        size = pair.sample.size
        sampled = None if pair.sample.whole else {"figures": list(_SAMPLED), "size": size}
        return Measured(figures(sums, order), sums, pair.rounding, sampled)

    def order(self, pair: _Pair, sums: NDArray[np.float64]) -> Order:
        """Ranks and quantiles from the sample; known beforehand where nothing differs."""
        one, two = pair.buffers(self.samples)
        a, b = pair.a, pair.b
        if sums[AT["changed"]] == 0 and sums[AT["n"]] == pair.sample.n:
            constant = bool((one == one[0]).all()) or (sums[AT["zero_a"]] == sums[AT["n"]])
            return Order(None if constant else 1.0, (0.0,) * len(QUANTILES))
        if sums[AT["nan_a"]] or sums[AT["nan_b"]]:
            one, two = finite_pairs(one, a.word, two, b.word)
        return pair.kernel.order(one, a.word, two, b.word, QUANTILES)


def _rounded(pair: _Pair, codes_a: NDArray[Any], codes_b: NDArray[Any]) -> bool:
    """True where the coarser side is the finer one, rounded."""
    from lineage.checkpoint.dtypes import decode

    a, b = pair.a.word, pair.b.word
    if MANTISSA[a] >= MANTISSA[b]:
        return pair.kernel.equal_when_rounded(decode(codes_a, a), codes_b, b)
    return pair.kernel.equal_when_rounded(decode(codes_b, b), codes_a, a)


def measure_pairs(
    pairs: Sequence[tuple[Side, Side]],
    *,
    kernel: Kernel,
    threads: int,
    seed: int,
    sample: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Figures of pairs of equal size, in their order.

    Parameters
    ----------
    sample : elements above which ranks and quantiles come from a sample of about this size
    progress : called with elements done and elements in all

    Notes
    -----
    Memory: threads × (two blocks + two samples).
    """
    work = _Work([_Pair(a, b, Sample(a.spec.size, sample, seed), kernel) for a, b in pairs], progress)
    if threads <= 1:
        work.run()
    else:
        with ThreadPoolExecutor(threads) as pool:
            waiting = [pool.submit(work.run) for _ in range(threads)]
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                work.stop = True
                raise
    return [one for one in work.results if one is not None]
