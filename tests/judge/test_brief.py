"""Verdicts within a limit of bytes: what was not tested for want of bytes acquits nobody."""

from __future__ import annotations

import numpy as np
import pytest

from lineage.checkpoint.metered import Meter, Metered
from lineage.judge.brief import judge_briefly
from tests.judge.networks import HIDDEN, LAYERS, Arrays, by_name, decoder, memory


def with_other_neurons(tensors: Arrays) -> Arrays:
    """The network with its neurons in another order: only its channels show where it comes from."""
    out = dict(tensors)
    for i in range(LAYERS):
        order = np.random.default_rng(i).permutation(HIDDEN)
        for name in ("gate", "up"):
            out[f"layers.{i}.mlp.{name}.weight"] = tensors[f"layers.{i}.mlp.{name}.weight"][order]
        out[f"layers.{i}.mlp.down.weight"] = tensors[f"layers.{i}.mlp.down.weight"][:, order]
    return out


@pytest.mark.parametrize("limit", [2**k + 2 ** (k - 1) * half for k in range(10, 21) for half in (0, 1)])
def test_no_limit_of_bytes_acquits_a_copy_whose_channels_show_it(limit: int) -> None:
    base = decoder(1)
    one, two, meter = memory(base), memory(with_other_neurons(base)), Meter(limit)
    verdict = judge_briefly(Metered(one, meter), Metered(two, meter), by_name(one, two), meter)
    assert verdict.related is not False


def test_channels_show_a_copy_whose_neurons_stand_in_another_order() -> None:
    base = decoder(1)
    one, two, meter = memory(base), memory(with_other_neurons(base)), Meter(1 << 22)
    assert judge_briefly(Metered(one, meter), Metered(two, meter), by_name(one, two), meter).related is True


def test_a_stranger_is_acquitted_where_every_test_was_made() -> None:
    one, two, meter = memory(decoder(1)), memory(decoder(2)), Meter(1 << 22)
    verdict = judge_briefly(Metered(one, meter), Metered(two, meter), by_name(one, two), meter)
    assert verdict.class_ == "retrained"
