"""T(ΔW) of factors against the operation on the dense difference, for every operation and random chains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lineage.layout.axes import Shape
from lineage.layout.chain import apply_chain, leaves
from lineage.layout.operations import (
    OPERATIONS,
    Add,
    Cast,
    Concat,
    Data,
    Each,
    Matmul,
    Operation,
    Pad,
    Rearrange,
    Scale,
    Slice,
    Split,
    Stack,
    Take,
    Unstack,
)
from lineage.lora.delta import Delta, Refused, strength
from lineage.lora.forms import loha, lokr, low_rank
from lineage.lora.transport import ACTIONS, transported
from tests.lora.builders import KINDS, delta_of
from tests.strategies import chains

_ROTATION = np.array([[0.6, 0.8, 0, 0], [-0.8, 0.6, 0, 0], [0, 0, 0, 1.0], [0, 0, 1.0, 0]])
#: one or more uses of every operation, with the shapes that they take
EXAMPLES: list[tuple[Operation, list[Shape]]] = [
    (Rearrange("(h d two) k -> (h two d) k", {"h": 2, "d": 2}), [(8, 6)]),
    (Rearrange("o i -> i o"), [(8, 6)]),
    (Rearrange("o (a b) -> (o a) b", {"a": 3}), [(4, 6)]),
    (Rearrange("o i h w -> o (i h w)"), [(4, 3, 2, 2)]),
    (Each({0: Rearrange("(a b) k -> (b a) k", {"a": 2})}), [(4, 6), (8, 6)]),
    (Concat(0), [(4, 6), (8, 6), (2, 6)]),
    (Concat(1), [(4, 6), (4, 2)]),
    (Split(0, 2), [(8, 6)]),
    (Split(1, sizes=(1, 5)), [(8, 6)]),
    (Slice(0, 2, 7), [(8, 6)]),
    (Stack(0), [(4, 6), (4, 6), (4, 6)]),
    (Unstack(0), [(3, 4, 6)]),
    (Take(0, [(4, 8, 1), (0, 4, 1)]), [(8, 6)]),
    (Take(0, [3, -1, 3, 0]), [(4, 6)]),
    (Pad(0, 1, 2), [(4, 6)]),
    (Pad(1, 1, 0, 7.0), [(4, 6)]),
    (Scale(-2.0), [(4, 6)]),
    (Scale(Data([1.0, 2.0, -3.0, 0.5]), 0), [(4, 6)]),
    (Scale(Data([1.0, 2.0, -3.0, 0.5]), 1), [(6, 4)]),
    (Add(3.0), [(4, 6)]),
    (Add(Data([1.0, 2.0, 3.0, 4.0]), 0), [(4, 6)]),
    (Cast("BF16"), [(4, 6)]),
    (Matmul("left", Data(_ROTATION)), [(4, 6)]),
    (Matmul("right", Data(_ROTATION)), [(6, 4)]),
]


def _plain(ops: tuple[Operation, ...], arrays: list[NDArray[Any]]) -> list[NDArray[Any]]:
    """The linear part of a chain on dense differences."""
    linear = tuple(op for op in ops if not isinstance(op, Cast))
    zero = apply_chain(linear, [np.zeros(a.shape) for a in arrays])
    found = apply_chain(linear, arrays)
    return [f - z for f, z in zip(map(_one, found), map(_one, zero), strict=True)]


def _one(entry: Any) -> NDArray[Any]:
    (array,) = leaves(entry)
    return np.asarray(array, np.float64)


def test_every_operation_acts_on_adapters() -> None:
    assert set(ACTIONS) == set(OPERATIONS.values())


def test_the_examples_use_every_operation() -> None:
    assert {type(op) for op, _ in EXAMPLES} == set(OPERATIONS.values())


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize(("op", "shapes"), EXAMPLES, ids=lambda v: getattr(v, "word", ""))
def test_the_converted_adapter_is_the_operation_on_the_difference(
    op: Operation, shapes: list[Shape], kind: str
) -> None:
    deltas = [delta_of(kind, shape, seed) for seed, shape in enumerate(shapes)]
    found = transported([op], deltas)
    wanted = _plain((op,), [d.dense() for d in deltas])
    for delta, dense in zip(found, wanted, strict=True):
        assert delta.shape == dense.shape
        if op.moves:
            assert np.array_equal(delta.dense(), dense)
        else:
            np.testing.assert_allclose(delta.dense(), dense, atol=1e-9)


@pytest.mark.parametrize(("op", "shapes"), EXAMPLES, ids=lambda v: getattr(v, "word", ""))
def test_dora_under_an_operation_is_right_or_refused(op: Operation, shapes: list[Shape]) -> None:
    _check_dora((op,), [delta_of("dora", shape, seed) for seed, shape in enumerate(shapes)])


@given(chains(), st.sampled_from(["lora", "loha", "lokr"]), st.integers(0, 99))
def test_random_chains_carry_differences_bit_by_bit(
    chain: tuple[list[Shape], tuple[Operation, ...]], kind: str, seed: int
) -> None:
    shapes, ops = chain
    assume(all(0 not in shape for shape in shapes))
    deltas = [delta_of(kind, shape, seed + k) for k, shape in enumerate(shapes)]
    found = transported(ops, deltas)
    for delta, dense in zip(found, _plain(ops, [d.dense() for d in deltas]), strict=True):
        assert np.array_equal(delta.dense(), dense)


@given(chains(), st.integers(0, 99))
def test_random_chains_carry_dora_or_refuse_it(chain: tuple[list[Shape], tuple[Operation, ...]], seed: int) -> None:
    shapes, ops = chain
    assume(all(0 not in shape for shape in shapes))
    _check_dora(ops, [delta_of("dora", shape, seed + k) for k, shape in enumerate(shapes)])


@given(chains(), st.sampled_from(["lora", "loha", "lokr"]), st.integers(0, 99))
def test_every_form_of_a_carried_delta_says_the_same(
    chain: tuple[list[Shape], tuple[Operation, ...]], kind: str, seed: int
) -> None:
    shapes, ops = chain
    assume(all(0 not in shape for shape in shapes))
    for delta in transported(ops, [delta_of(kind, shape, seed + k) for k, shape in enumerate(shapes)]):
        if len(delta.shape) < 2 or 0 in delta.shape:
            continue
        dense = delta.dense().reshape(delta.shape[0], -1)
        pair = low_rank(delta)
        np.testing.assert_allclose(pair.scale * pair.up @ pair.down, dense, atol=1e-5)
        if (product := loha(delta)) is not None:
            both = (product.w1_a @ product.w1_b) * (product.w2_a @ product.w2_b)
            np.testing.assert_allclose(product.scale * both, dense, atol=1e-4)
        if (kron := lokr(delta)) is not None:
            w1, w2 = (f[0] if len(f) == 1 else f[0] @ f[1].reshape(len(f[1]), -1) for f in (kron.w1, kron.w2))
            w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - 2))
            np.testing.assert_allclose(kron.scale * np.kron(w1, w2).reshape(dense.shape), dense, atol=1e-4)


def _check_dora(ops: tuple[Operation, ...], deltas: list[Delta]) -> None:
    """The whole DoRA difference of the result is the chain on the whole differences of the inputs, or a refusal."""
    if any(len(d.shape) < 2 for d in deltas):
        return
    generator = np.random.default_rng(7)
    weights = [generator.standard_normal(d.shape) for d in deltas]
    try:
        found = transported(ops, deltas)
        magnitudes = [d.magnitude() for d in found]
    except Refused:
        return
    wholes = [_whole(d, w) for d, w in zip(deltas, weights, strict=True)]
    linear = tuple(op for op in ops if not isinstance(op, Cast | Add))
    moved = [_one(w) for w in apply_chain(linear, weights)]
    for delta, told, weight, wanted in zip(found, magnitudes, moved, _plain(ops, wholes), strict=True):
        result = delta.dense()
        if told is not None:
            axis, vector, given_ = told
            shape = [-1 if k == axis else 1 for k in range(result.ndim)]
            with np.errstate(invalid="ignore"):
                whole = strength(weight, result, axis, vector)
            result = np.where(given_.reshape(shape), whole, result)
        np.testing.assert_allclose(result, wanted, atol=1e-8)


def _whole(delta: Delta, weight: NDArray[Any]) -> NDArray[Any]:
    told = delta.magnitude()
    assert told is not None
    return strength(weight, delta.dense(), told[0], told[1])


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        (Matmul("left", Data(_ROTATION)), "rotation"),
        (Scale(Data([1.0, 2, 3, 4, 5, 6]), 1), "scale along an axis"),
        (Slice(1, 0, 3), "cuts what each norm runs over|mixes rows and columns"),
        (Rearrange("o (a b) -> (o a) b", {"a": 3}), "cuts what each norm runs over|mixes rows and columns"),
    ],
)
def test_dora_refuses_what_would_change_its_norms(op: Operation, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        transported([op], [delta_of("dora", (4, 6))])[0].magnitude()


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_rows_scales_magnitudes_by_its_absolute_value(kind: str) -> None:
    (found,) = transported([Scale(Data([1.0, -2, 3, 4]), 0)], [delta_of(kind, (4, 6))])
    told, before = found.magnitude(), delta_of(kind, (4, 6)).magnitude()
    if told is not None and before is not None:
        assert np.array_equal(told[1], before[1] * [1, 2, 3, 4])
