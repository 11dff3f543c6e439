"""Calibration on pairs that are not related; the table and the plot of a longer run stand in reports/calibration.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from tests.judge.nulls import (
    ADVERSARIES,
    Kinds,
    Null,
    adversarial_pairs,
    mixture_pairs,
    resampled_pairs,
    trained_pairs,
)
from tests.judge.open_nets import KINDS, Open, open_pairs


def most(alpha: float, pairs: int) -> float:
    """Pairs that may fall below alpha: the expected number and three binomial errors."""
    return alpha * pairs + 3 * math.sqrt(alpha * (1 - alpha) * pairs)


def check(found: Sequence[Null] | Sequence[Kinds] | Sequence[Open]) -> None:
    for alpha in (0.05, 0.01, 0.001):
        for values in zip(*[[value or 0.0 for value in null] for null in found], strict=True):
            assert sum(value <= math.log10(alpha) for value in values) <= most(alpha, len(found))


def test_a_hundred_strangers_keep_to_the_nominal_tail() -> None:
    check(list(resampled_pairs(100)))


def test_heads_and_experts_of_trained_strangers_keep_to_the_nominal_tail() -> None:
    found = list(mixture_pairs(20))
    assert all(null.final is not None for null in found)
    check(found)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_strangers_are_not_accused(name: str) -> None:
    assert min(n.final or 0.0 for n in adversarial_pairs(ADVERSARIES[name], 8)) > -3


@pytest.mark.slow
def test_a_thousand_trained_strangers_keep_to_the_nominal_tail() -> None:
    check(list(trained_pairs(1000)))


@pytest.mark.slow
def test_heads_and_experts_of_a_thousand_trained_strangers_keep_to_the_nominal_tail() -> None:
    check(list(mixture_pairs(1000)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_trained_strangers_without_hidden_units_keep_to_the_nominal_tail(kind: str) -> None:
    check(list(open_pairs(kind, 1000)))


@pytest.mark.slow
def test_a_thousand_strangers_of_unlike_statistics_keep_to_the_nominal_tail() -> None:
    check(list(resampled_pairs(1000, seed=10_000)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVERSARIES)
def test_a_hundred_adversarial_strangers_are_not_accused(name: str) -> None:
    assert min(n.final or 0.0 for n in adversarial_pairs(ADVERSARIES[name], 100)) > -4
