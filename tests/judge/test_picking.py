"""Merges that pick single values: TIES and DARE are told by their factors, and nothing else is taken for them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from lineage.checkpoint.dtypes import decode, encode
from lineage.judge.candidates import Candidate, gather
from lineage.judge.merging import Merge, weigh, with_merge
from lineage.judge.relations import Finding
from lineage.judge.verdict import Verdict
from tests.judge.networks import Arrays, by_name, decoder, memory, tuned


def stored(tensors: Arrays) -> Arrays:
    """As parents stand in their files: what is merged are rounded values."""
    return {n: decode(encode(x, "BF16"), "BF16") for n, x in tensors.items()}


BASE = stored(decoder(0))
FAMILY = {name: stored(tuned(BASE, seed)) for seed, name in enumerate("xyz", 1)}


def changes(names: str) -> list[Arrays]:
    return [{n: FAMILY[name][n] - BASE[n] for n in BASE} for name in names]


def ties(names: str, factor: float, *, kept: float = 0.4) -> Arrays:
    """The largest changes of each parent, averaged where their sign is that of their sum."""

    def merged(n: str) -> np.ndarray:
        all_ = np.stack([one[n] for one in changes(names)])
        all_ = np.stack([np.where(np.abs(one) >= np.quantile(np.abs(one), 1 - kept), one, 0) for one in all_])
        agreeing = (np.sign(all_) == np.sign(all_.sum(axis=0))) & (all_ != 0)
        return np.asarray(BASE[n] + factor * (all_ * agreeing).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1))

    return {n: np.asarray(merged(n), np.float32) for n in BASE}


def dare(names: str, weights: Sequence[float], *, kept: float = 0.5) -> Arrays:
    """A random part of the changes of each parent, scaled up."""
    rng = np.random.default_rng(4)
    result = {n: x.astype(np.float64) for n, x in BASE.items()}
    for weight, one in zip(weights, changes(names), strict=True):
        for n, x in one.items():
            result[n] += weight * x * (rng.random(x.shape) < kept) / kept
    return {n: x.astype(np.float32) for n, x in result.items()}


def weighed(b: Arrays, parents: str, word: str = "F32") -> Merge:
    one, two = memory(BASE, word), memory(b, word)
    sources = [Candidate(n, c, by_name(c, two)) for n in parents for c in [memory(FAMILY[n], word)]]
    gathered = gather(one, two, by_name(one, two), sources, related=True)
    assert gathered is not None
    merge = weigh(gathered)
    assert merge is not None
    return merge


@pytest.mark.parametrize("word", ["F32", "BF16"])
def test_a_ties_merge_is_recognised_with_its_factor(word: str) -> None:
    found = weighed(ties("xyz", 0.8), "xyz", word)
    assert found.merged
    assert [share.weight for share in found.shares] == pytest.approx([0.8] * 3, abs=0.02)
    assert "as TIES merging leaves it" in found.sentence


@pytest.mark.parametrize("word", ["F32", "BF16"])
def test_a_dare_merge_is_recognised_with_the_factor_of_each_parent(word: str) -> None:
    found = weighed(dare("xy", (0.7, 0.3)), "xy", word)
    assert found.merged
    assert [share.weight for share in found.shares] == pytest.approx([1.4, 0.6], abs=0.02)
    assert "as DARE leaves it" in found.sentence


@pytest.mark.parametrize("b", [ties("xyz", 0.8), dare("xyz", (0.5, 0.5, 0.5)), FAMILY["z"]], ids=["ties", "dare", "z"])
def test_what_two_parents_do_not_explain_is_no_merge_of_them(b: Arrays) -> None:
    assert not weighed(b, "xy").merged


def test_a_linear_merge_keeps_its_weights() -> None:
    b = {n: np.asarray(BASE[n] + sum(0.5 * one[n] for one in changes("xy")), np.float32) for n in BASE}
    found = weighed(b, "xy")
    assert found.picked is None
    assert [share.weight for share in found.shares] == pytest.approx([0.5, 0.5], abs=0.005)


def test_a_picked_merge_takes_the_place_of_training_in_the_verdict() -> None:
    tuned_ = Finding("fine-tuned", 1.0, "33 of 33 matrices differ a little")
    before = Verdict(
        class_="transformed", related=True, log10_p=-50.0, coverage=1.0, relations=("fine-tuned",),
        reasons=("because.",), findings=(tuned_,),
    )  # fmt: skip
    assert with_merge(before, weighed(ties("xyz", 0.8), "xyz")).relations == ("merged",)
