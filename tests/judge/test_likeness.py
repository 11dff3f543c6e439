"""Networks without an axis for an exact test: their likeness is held against that of mispaired matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.judge.networks import Arrays, changed, decoder, tuned, verdict

WIDTH = 48


def square(seed: int) -> Arrays:
    """Layers of one width throughout: any of their axes may be any other."""
    return {n: v for n, v in decoder(seed, width=WIDTH, hidden=WIDTH).items() if n.startswith("layers")}


def recurrent(seed: int) -> Arrays:
    """Three recurrent layers with four gates, of which no name says which matrix reads the layer's own units."""
    rng = np.random.default_rng(seed)
    out: Arrays = {}
    for i in range(3):
        for kind in "wu":
            out[f"lstm.weight_{kind}_l{i}"] = (rng.standard_normal((4 * WIDTH, WIDTH)) * 0.1).astype(np.float32)
        out[f"lstm.bias_ih_l{i}"] = rng.standard_normal(4 * WIDTH).astype(np.float32)
    return out


def with_identity(tensors: Arrays) -> Arrays:
    """Matrices that began as the identity."""
    return changed(tensors, lambda _, v: v + np.eye(*v.shape) * v.std() * 20 if v.ndim > 1 else v)


def with_means(tensors: Arrays) -> Arrays:
    """Every matrix around one pattern of column means, as shared data leaves it."""
    pattern = np.random.default_rng(99).standard_normal(WIDTH)
    return changed(tensors, lambda _, v: v + pattern[: v.shape[-1]] * v.std() * 3 if v.ndim > 1 else v)


@pytest.mark.parametrize("network", [square, recurrent])
def test_a_relative_without_a_testable_axis_is_found_by_its_likeness(network: Callable[[int], Arrays]) -> None:
    base = network(1)
    found = verdict(base, tuned(base, 2))
    assert (found.class_, found.related, found.log10_p) == ("transformed", True, None)
    assert "no p-value" in found.reasons[0]


@pytest.mark.parametrize("network", [square, recurrent])
@pytest.mark.parametrize("shared", [lambda tensors: tensors, with_identity, with_means])
def test_strangers_without_a_testable_axis_are_not_accused(
    network: Callable[[int], Arrays], shared: Callable[[Arrays], Arrays]
) -> None:
    found = verdict(shared(network(1)), shared(network(2)))
    assert (found.class_, found.log10_p) == ("undetermined", None)


def test_siblings_of_one_initialisation_are_not_accused() -> None:
    rng = np.random.default_rng(5)
    start = square(1)
    one, two = (changed(start, lambda _, v: v + 1.5 * v.std() * rng.standard_normal(v.shape)) for _ in range(2))
    assert verdict(one, two).class_ == "undetermined"


def test_mispaired_layers_that_are_alike_leave_the_question_open() -> None:
    base = square(1)
    cloned = {n: base[n.replace(n.split(".")[1], "0", 1)] for n in base}
    assert verdict(cloned, tuned(cloned, 2, size=0.05)).class_ == "undetermined"
