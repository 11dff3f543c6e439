"""Views of storage in another order give the elements that NumPy gives."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from lineage.checkpoint import strided


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 30)), min_size=0, max_size=4),
    st.booleans(),
    st.data(),
)
def test_a_range_of_a_view_equals_the_slice(axes: list[tuple[int, int]], small: bool, data: st.DataObject) -> None:
    shape, strides = tuple(n for n, _ in axes), tuple(s for _, s in axes)
    storage = np.arange(strided.span(shape, strides), dtype=np.int64)
    view = as_strided(storage, shape, tuple(8 * s for s in strides)).reshape(-1)
    start = data.draw(st.integers(0, view.size))
    stop = data.draw(st.integers(start, view.size))

    def read(low: int, high: int) -> NDArray[Any]:
        assert 0 <= low <= high <= storage.size
        return storage[low:high]

    before = strided._SMALL
    strided._SMALL = 0 if small else before  # also where every piece is read by itself
    try:
        found = strided.gather(read, storage.dtype, shape, strides, start, stop)
    finally:
        strided._SMALL = before
    np.testing.assert_array_equal(found, view[start:stop])


def test_a_row_of_a_transposed_matrix_reads_no_more_than_its_elements() -> None:
    read_elements = 0

    def read(low: int, high: int) -> NDArray[Any]:
        nonlocal read_elements
        read_elements += high - low
        return np.arange(low, high)

    strided.gather(read, np.dtype(np.int64), (1000, 1000), (1, 1000), 5000, 6000)
    assert read_elements == 1000
