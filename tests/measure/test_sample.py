"""Samples: where their runs lie."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lineage.measure.sample import Sample


@given(st.integers(1, 10**6), st.integers(1, 10**5), st.integers(0, 2**63 - 1))
def test_runs_lie_inside_their_stretches_and_take_about_the_wanted_size(n: int, size: int, seed: int) -> None:
    sample = Sample(n, size, seed)
    assert sample.size == n if n <= size else size // 2 < sample.size <= size
    starts = sample.starts(0, sample.count)
    edges = np.array([sample.edge(k) for k in range(sample.count + 1)])
    assert (edges[0], edges[-1]) == (0, n)
    assert (starts >= edges[:-1]).all()
    assert (starts + sample.run <= np.maximum(edges[1:], edges[:-1] + sample.run)).all()
    assert starts[-1] + sample.run <= n


def test_starts_do_not_depend_on_how_they_are_asked_for() -> None:
    sample = Sample(10**9, 2**16, 7)
    parts = [sample.starts(k, min(k + 100, sample.count)) for k in range(0, sample.count, 100)]
    assert np.array_equal(np.concatenate(parts), sample.starts(0, sample.count))


def test_another_seed_takes_other_elements() -> None:
    one, two = (Sample(10**7, 2**16, seed).starts(0, 1000) for seed in (0, 1))
    assert np.mean(one == two) < 0.05


def test_runs_are_spread_evenly_over_their_stretches() -> None:
    sample = Sample(10**8, 2**16, 3)
    stretch = sample.n // sample.count
    share = (sample.starts(0, sample.count) - np.array([sample.edge(k) for k in range(sample.count)])) / stretch
    assert abs(float(share.mean()) - 0.5 * (1 - sample.run / stretch)) < 0.02
