"""Transforms of an index space: what writes into it and what reads from it move against each other."""

from __future__ import annotations

import numpy as np
import pytest

from lineage.judge.align.choice import holds, simplest
from lineage.judge.align.turns import Turn, along, identity
from lineage.layout.chain import apply_chain

RNG = np.random.default_rng(0)
TURNS = [
    identity(12),
    Turn(length=12, take=RNG.permutation(12)),
    Turn(length=12, take=RNG.permutation(12), scale=RNG.choice([-1.0, 1.0], 12)),
    Turn(length=12, scale=np.exp(RNG.standard_normal(12))),
    Turn(length=12, take=RNG.permutation(12), blocks=tuple(RNG.standard_normal((3, 4, 4)))),
    Turn(length=12, blocks=(np.linalg.qr(RNG.standard_normal((12, 12)))[0],), orthogonal=True),
]


@pytest.mark.parametrize("turn", TURNS)
def test_products_through_a_space_stay_what_they_are(turn: Turn) -> None:
    writes, reads = RNG.standard_normal((12, 5)), RNG.standard_normal((7, 12))
    made = turn.side(True).over(reads, 1) @ turn.over(writes, 0)
    assert made == pytest.approx(reads @ writes)


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(("axis", "shape"), [(0, (12, 5)), (1, (5, 12)), (0, (12, 2, 3)), (0, (12,))])
def test_operations_do_what_the_turn_does(turn: Turn, axis: int, shape: tuple[int, ...]) -> None:
    array = RNG.standard_normal(shape)
    (made,) = apply_chain(turn.operations(axis, len(shape)), [array])
    assert made == pytest.approx(turn.over(array, axis))


def test_a_turn_that_does_nothing_needs_no_operation() -> None:
    assert identity(12).plain
    assert Turn(length=12, take=np.arange(12), scale=np.ones(12)).operations(0, 2) == ()


def test_spaces_one_after_the_other_are_turned_apart() -> None:
    array = RNG.standard_normal((24, 5))
    (made,) = apply_chain(along(0, 2, [TURNS[1], TURNS[3]]), [array])
    assert made == pytest.approx(np.concatenate([TURNS[1].over(array[:12], 0), TURNS[3].over(array[12:], 0)]))


def test_a_basis_in_the_middle_of_a_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="a basis along axis 1 of 3"):
        TURNS[-1].operations(1, 3)


def test_a_freer_family_must_explain_much_more() -> None:
    assert simplest([0.63, 0.65, 0.66]) == 0
    assert simplest([0.88, 0.9999, 1.0]) == 1


def test_what_strangers_reach_does_not_hold() -> None:
    assert not holds(0.21, 0.09)
    assert not holds(0.5, 0.45)
    assert holds(0.55, 0.05)
