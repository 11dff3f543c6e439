"""Every operation: inverse undoes apply, the shape rule holds, text gives it back, flat ranges are what apply moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lineage.layout.arguments import Context, parse_operation
from lineage.layout.axes import LayoutError
from lineage.layout.chain import Level, apply_chain, chain_shapes, inverse_chain
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
from lineage.layout.operations.base import NOTHING
from lineage.layout.operations.data import compressed, positions
from tests.strategies import chains, codes

ROTATION = np.array([[0.6, -0.8], [0.8, 0.6]])

#: for every word an operation with all its arguments, and shapes that it fits
EXAMPLES: dict[str, list[tuple[Operation, list[tuple[int, ...]]]]] = {
    "rearrange": [(Rearrange("(h d) k -> (d h) k", {"h": 2}), [(6, 3), (4, 1)])],
    "each": [(Each({0: Take(0, [1, 0]), 2: (Rearrange("a b -> b a"), Take(1, [1, 0]))}), [(2, 3)] * 3)],
    "concat": [(Concat(0), [(2, 3), (2, 3)]), (Concat(-1, sizes=(3, 1)), [(2, 3), (2, 1)])],
    "split": [(Split(0, parts=2), [(4, 3)]), (Split(1, sizes=(1, 2)), [(4, 3)])],
    "stack": [(Stack(), [(2, 3), (2, 3)]), (Stack(-1), [(2, 3), (2, 3)])],
    "unstack": [(Unstack(), [(2, 3)]), (Unstack(1), [(2, 3)])],
    "slice": [(Slice(0, 1, 3), [(4, 2)]), (Slice(1, 1), [(4, 2)]), (Slice(0, 0, -1, of=4), [(4, 2)])],
    "take": [(Take(0, [2, 0, 1]), [(3, 2)]), (Take(1, [(1, -1, -1)]), [(3, 2)]), (Take(0, [0, 0], of=3), [(3, 2)])],
    "pad": [(Pad(0, 1, 2), [(3, 2)]), (Pad(1, 0, 1, 7.0), [(3, 2)]), (Pad(0, 1, 1, None), [(3, 2)])],
    "scale": [(Scale(2), [(3, 2)]), (Scale(Data([1.0, 2.0]), axis=1), [(3, 2)])],
    "add": [(Add(-1.5), [(3, 2)]), (Add(Data([1.0, 2.0, 3.0]), axis=0), [(3, 2)])],
    "cast": [(Cast("BF16"), [(3, 2)])],
    "matmul": [
        (Matmul("left", Data(ROTATION)), [(2, 3)]),
        (Matmul("right", Data(np.array([[1.0, 2.0], [0, 1]]))), [(3, 2)]),
    ],
}
CASES = [pytest.param(op, shapes, id=f"{word}-{k}") for word, c in EXAMPLES.items() for k, (op, shapes) in enumerate(c)]


def arrays(shapes: list[tuple[int, ...]], dtype: type[Any] = np.float32) -> list[NDArray[Any]]:
    return [codes(shape, seed).astype(dtype) for seed, shape in enumerate(shapes)]


def test_every_operation_has_an_example_here() -> None:
    assert EXAMPLES.keys() == OPERATIONS.keys()


@pytest.mark.parametrize(("op", "shapes"), CASES)
class TestEveryOperation:
    def test_the_shape_rule_tells_what_apply_gives(self, op: Operation, shapes: list[tuple[int, ...]]) -> None:
        assert op.shapes(shapes) == [a.shape for a in op.apply(arrays(shapes))]

    def test_arity_counts_what_apply_gives(self, op: Operation, shapes: list[tuple[int, ...]]) -> None:
        assert op.arity(len(shapes)) in (None, len(op.apply(arrays(shapes))))

    def test_apply_leaves_its_inputs_alone(self, op: Operation, shapes: list[tuple[int, ...]]) -> None:
        given, before = arrays(shapes), arrays(shapes)
        op.apply(given)
        assert all(np.array_equal(x, y) for x, y in zip(given, before, strict=True))

    def test_text_gives_it_back(self, op: Operation, shapes: list[tuple[int, ...]]) -> None:
        data: dict[str, NDArray[Any]] = {}
        written = op.document(data)
        context = Context({"h": 2}, data.__getitem__)
        assert parse_operation(written, "ops[0]", context) == op
        assert hash(parse_operation(written, "ops[0]", context)) == hash(op)

    def test_flat_ranges_are_what_apply_moves(self, op: Operation, shapes: list[tuple[int, ...]]) -> None:
        ranges = op.flat(shapes)
        given = arrays(shapes)
        for result, segments in zip(op.apply(given), ranges or [], strict=bool(ranges)):
            flat = [np.zeros(b - a) if k == NOTHING else given[k].reshape(-1)[a:b] for k, a, b in segments]
            assert np.array_equal(np.concatenate(flat), result.reshape(-1))

    def test_the_inverse_gives_back_every_element_it_knows(self, op: Operation, shapes: list[tuple[int, ...]]) -> None:
        given = arrays(shapes)
        try:
            back = inverse_chain([op], len(given), {})
        except LayoutError as exc:
            assert isinstance(op, Slice | Take), op
            assert "add of" in str(exc)  # noqa: PT017 (the example decides whether it may raise)
            return
        result = apply_chain(back, op.apply(given))
        known = apply_chain(back, [np.ones(a.shape, np.bool_) for a in op.apply(given)]) if op.moves else None
        for k, (got, wanted) in enumerate(zip(result, given, strict=True)):
            assert got.shape == wanted.shape
            where = known[k] if known is not None else np.ones(got.shape, np.bool_)
            assert np.allclose(got[where], wanted[where], rtol=1e-6, atol=1e-6)


@given(chains())
def test_the_inverse_of_a_chain_undoes_it_bit_by_bit(
    drawn: tuple[list[tuple[int, ...]], tuple[Operation, ...]],
) -> None:
    shapes, ops = drawn
    given_arrays = [codes(s, k) for k, s in enumerate(shapes)]
    there = apply_chain(ops, given_arrays)
    back = apply_chain(inverse_chain(ops, len(shapes), {}), there)
    assert all(np.array_equal(x, y) for x, y in zip(back, given_arrays, strict=True))


@given(chains())
def test_the_shapes_of_a_chain_are_those_of_what_it_gives(
    drawn: tuple[list[tuple[int, ...]], tuple[Operation, ...]],
) -> None:
    shapes, ops = drawn
    assert chain_shapes(ops, shapes) == [a.shape for a in apply_chain(ops, [codes(s) for s in shapes])]


def test_a_list_over_a_placeholder_is_collapsed_where_the_operation_says_so() -> None:
    gate = Level("e", [codes((2, 3), k) for k in range(4)])
    up = Level("e", [codes((2, 3), k + 10) for k in range(4)])
    (fused,) = apply_chain((Concat(0), Stack(0, over="e")), [gate, up])
    assert fused.shape == (4, 4, 3)
    assert np.array_equal(fused[1, :2], gate.items[1])
    assert np.array_equal(fused[1, 2:], up.items[1])
    back = apply_chain(inverse_chain((Concat(0), Stack(0, over="e")), 2, {"e": 4}), [fused])
    assert np.array_equal(back[1].items[3], up.items[3])


def test_nested_lists_collapse_one_by_one() -> None:
    nested = Level("i", [Level("e", [codes((2,), 4 * i + e) for e in range(3)]) for i in range(2)])
    (whole,) = apply_chain((Stack(0, over="e"), Stack(0, over="i")), [nested])
    assert whole.shape == (2, 3, 2)
    assert np.array_equal(whole[1, 2], nested.items[1].items[2])
    (other,) = apply_chain((Stack(0, over="i"), Stack(0, over="e")), [nested])
    assert np.array_equal(other, whole.transpose(1, 0, 2))


@pytest.mark.parametrize(
    ("ops", "shapes", "reason"),
    [
        ((Concat(0),), [(2, 3), (2, 4)], "along axis 0 the shapes"),
        ((Concat(0, sizes=(2, 3)),), [(2, 3), (2, 3)], r"parts of \[2, 2\] along axis 0, expected \[2, 3\]"),
        ((Split(0, parts=3),), [(4, 2)], "does not divide into 3 parts"),
        ((Split(0, sizes=(1, 2)),), [(4, 2)], "add up to 3, axis 0 has 4"),
        ((Split(0, parts=2),), [(4, 2), (4, 2)], "takes one array, the list holds 2"),
        ((Stack(0),), [(4, 2), (2, 4)], "are not equal"),
        ((Stack(0, over="e"),), [(4, 2)], "no list over e here"),
        ((Slice(0, 1, 9),), [(4, 2)], "outside axis 0 of 4"),
        ((Take(0, [4]),), [(4, 2)], "place 4 is outside axis 0 of 4"),
        ((Unstack(2),), [(4, 2)], "no axis 2 in an array of 2 dimensions"),
        ((Each({1: Stack(0)}),), [(4, 2)], "no array 1 in a list of 1"),
        ((Matmul("left", Data(ROTATION)),), [(4, 2)], "does not fit"),
        ((Scale(Data([1.0]), axis=0),), [(4, 2)], "1 values for axis 0 of 4"),
    ],
)
def test_what_does_not_fit_says_why(ops: tuple[Operation, ...], shapes: list[tuple[int, ...]], reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        chain_shapes(ops, shapes)


@pytest.mark.parametrize("op", [Scale(0), Matmul("left", Data(np.ones((2, 3)))), Matmul("left", Data(np.ones((2, 2))))])
def test_what_loses_everything_has_no_inverse(op: Operation) -> None:
    with pytest.raises(LayoutError, match="cannot be undone"):
        op.inverse(1, {})


@given(st.lists(st.integers(0, 30), max_size=40))
def test_an_index_list_is_compressed_without_loss(places: list[int]) -> None:
    runs = compressed(np.array(places, np.int64))
    assert positions(runs).tolist() == places
    assert len(runs) <= len(places)


def test_long_runs_are_one_entry() -> None:
    assert compressed(np.concatenate([np.arange(48, 96), np.arange(48)])) == ((48, 96, 1), (0, 48, 1))


def test_casting_rounds_to_the_dtype() -> None:
    assert Cast("BF16").one(np.array([1.001], np.float32)).tolist() == [1.0]


def test_arithmetic_keeps_whole_numbers_whole() -> None:
    assert Scale(0.5).one(np.array([2, 3, 4], np.int64)).tolist() == [1, 2, 2]
