"""The kernel in C (`_kernels.c`), for the float formats at memory speed; importing this fails where it was not built.

ctypes releases the GIL during each call, so that blocks are measured in parallel.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import decode, encode
from lineage.measure.metrics import Order, empty_sums
from lineage.measure.plain import PlainKernel, interpolate, positions

__all__ = ["NativeKernel"]

#: numbers that the C side gives the formats; 8-bit ones are decoded through a table of 256 floats
_KINDS = {"BF16": 0, "F16": 1, "F32": 2, "F64": 3, "F8_E4M3": 4, "F8_E5M2": 4}
#: ranks as float32 are exact up to this many elements
_RANKED = 1 << 23
_BINS = 1 << 16
_WANTED = 16
#: below this many elements sorting is quicker than clearing and reading 65,536 counters
_COUNTED = 4096


def _load() -> ctypes.CDLL:
    """The library with its signatures."""
    spec = find_spec("lineage.measure._kernels")
    if spec is None or spec.origin is None:
        raise ImportError("lineage.measure._kernels was not built")
    try:
        library = ctypes.CDLL(spec.origin)
    except OSError as exc:
        raise ImportError(str(exc)) from exc
    pointer, integer, long, double = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_double
    for name, result, arguments in (
        ("level", integer, [integer]),
        ("sums", None, [pointer, integer, pointer, pointer, integer, pointer, long, double, pointer]),
        ("ranks16", double, [pointer, long, integer, pointer, pointer]),
        ("spearman32", None, [pointer, pointer, long, pointer, pointer, pointer]),
        ("cross", double, [pointer, pointer, pointer, pointer, long]),
        ("quantiles", integer, [pointer, integer, pointer, integer, long, pointer, integer, pointer, pointer]),
        ("rounds_to", integer, [pointer, pointer, integer, long]),
        ("copy_runs", None, [pointer, pointer, long, long, pointer]),
    ):
        function = getattr(library, f"lineage_{name}")
        function.restype, function.argtypes = result, arguments
    library.lineage_level(2)
    return library


_LIBRARY = _load()


@lru_cache
def _table(word: str) -> NDArray[np.float32]:
    """The 256 values of an 8-bit format."""
    return decode(np.arange(256, dtype=np.uint8), word)


@lru_cache
def _as_bf16(word: str) -> NDArray[np.uint16]:
    """The bf16 codes of the 256 values of an 8-bit format: all are exact there."""
    return encode(_table(word), "BF16")


class NativeKernel:
    """Sums and order statistics of float codes in C; the NumPy kernel does what C does not know."""

    name = "native"
    words = frozenset(_KINDS)

    def __init__(self, level: int = 2) -> None:
        """`level` 0 to 2 limits the instruction set (plain, AVX2, AVX-512), for tests; it holds for the process."""
        self.level = _LIBRARY.lineage_level(level)
        self._plain = PlainKernel()

    def sums(self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, *, tiny: float) -> NDArray[np.float64]:
        """Sums over one block; see `Kernel.sums`."""
        out = empty_sums()
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        table_a, table_b = (_at(_table(w)) if _KINDS[w] == 4 else None for w in (word_a, word_b))
        _LIBRARY.lineage_sums(
            _at(a), _KINDS[word_a], table_a, _at(b), _KINDS[word_b], table_b, min(len(a), len(b)), tiny, _at(out)
        )
        return out

    def order(
        self, a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, probabilities: Sequence[float]
    ) -> Order:
        """Ranks and quantiles over all given elements; see `Kernel.order`."""
        if "F64" in (word_a, word_b) or len(a) > _RANKED or len(probabilities) > _WANTED // 2:
            return self._plain.order(a, word_a, b, word_b, probabilities)
        if not len(a):
            return Order(None, (None,) * len(probabilities))
        (a, word_a), (b, word_b) = (_plainly(codes, word) for codes, word in ((a, word_a), (b, word_b)))
        by_code = "F32" not in (word_a, word_b) and len(a) >= _COUNTED
        cross, squares_a, squares_b = (_by_code if by_code else _by_value)(a, word_a, b, word_b)
        scale = float(np.sqrt(squares_a) * np.sqrt(squares_b))
        spearman = max(-1.0, min(1.0, cross / scale)) if scale else None
        return Order(spearman, _quantiles(a, word_a, b, word_b, probabilities))

    def equal_when_rounded(self, fine: NDArray[Any], coarse: NDArray[Any], word: str) -> bool:
        """True where rounding the values `fine` to the dtype `word` gives the codes `coarse`."""
        if word not in ("BF16", "F16") or fine.dtype != np.float32:
            return self._plain.equal_when_rounded(fine, coarse, word)
        fine, coarse = np.ascontiguousarray(fine), np.ascontiguousarray(coarse)
        return bool(_LIBRARY.lineage_rounds_to(_at(fine), _at(coarse), _KINDS[word], min(len(fine), len(coarse))))

    def copy_runs(self, codes: NDArray[Any], starts: NDArray[np.int64], run: int, out: NDArray[Any]) -> None:
        """Copies runs one behind the other; see `Kernel.copy_runs`."""
        codes, offsets = np.ascontiguousarray(codes), starts * codes.itemsize
        _LIBRARY.lineage_copy_runs(_at(codes), _at(offsets), len(starts), run * codes.itemsize, _at(out))


_HELD = threading.local()


def _work(purpose: str, size: int, dtype: type) -> NDArray[Any]:
    """Uninitialised memory of the calling thread, kept for the next call so that its pages are touched once."""
    held = _HELD.__dict__.get(purpose)
    if held is None or len(held) < size:
        held = _HELD.__dict__[purpose] = np.empty(size, dtype)
    return cast("NDArray[Any]", held[:size])


def _at(array: NDArray[Any]) -> int:
    """Address of the first element of a contiguous array."""
    return array.ctypes.data


def _plainly(codes: NDArray[Any], word: str) -> tuple[NDArray[Any], str]:
    """Contiguous codes of a 16-bit or 32-bit format."""
    if _KINDS[word] == 4:
        return _as_bf16(word)[codes], "BF16"
    return np.ascontiguousarray(codes), word


def _by_code(a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str) -> tuple[float, float, float]:
    """Sum of products and of squares of doubled centred ranks, for two 16-bit formats: a table by code gives ranks."""
    hist = _work("counters", 2 * _BINS, np.uint32)
    tables, squares = [], []
    for side, (codes, word) in enumerate(((a, word_a), (b, word_b))):
        tables.append(_work(f"ranks {side}", _BINS, np.float32))
        found = _LIBRARY.lineage_ranks16(_at(codes), len(codes), _KINDS[word], _at(hist), _at(tables[side]))
        squares.append(found)
    cross = _LIBRARY.lineage_cross(_at(a), _at(tables[0]), _at(b), _at(tables[1]), len(a))
    return cross, squares[0], squares[1]


def _by_value(a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str) -> tuple[float, float, float]:
    """The same for values that fit float32, by sorting."""
    x, y = (np.ascontiguousarray(decode(codes, word), np.float32) for codes, word in ((a, word_a), (b, word_b)))
    one, two = (_work(f"records {k}", len(x), np.uint64) for k in "12")
    out = np.empty(3)
    _LIBRARY.lineage_spearman32(_at(x), _at(y), len(x), _at(one), _at(two), _at(out))
    return float(out[0]), float(out[1]), float(out[2])


def _quantiles(
    a: NDArray[Any], word_a: str, b: NDArray[Any], word_b: str, probabilities: Sequence[float]
) -> tuple[float | None, ...]:
    """Quantiles of |b - a| over finite values."""
    below, above, share = positions(len(a), probabilities)
    wanted = np.unique(np.concatenate([below, above]))
    if len(a) < _COUNTED:
        with np.errstate(over="ignore"):
            size = np.sort(np.abs(decode(b, word_b) - decode(a, word_a)))
        return interpolate(size[below], size[above], share)
    work = _work("counters", _WANTED * _BINS, np.uint32)
    values = np.empty(len(wanted), np.float32)
    _LIBRARY.lineage_quantiles(
        _at(a), _KINDS[word_a], _at(b), _KINDS[word_b], len(a), _at(wanted), len(wanted), _at(work), _at(values)
    )
    return interpolate(values[np.searchsorted(wanted, below)], values[np.searchsorted(wanted, above)], share)
