"""Verdicts on small networks: relatives are named, innocents are not accused, reasons can be checked."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Slice, Take
from tests.judge.networks import HIDDEN, LAYERS, Arrays, changed, decoder, tuned, verdict


def test_a_copy_is_copied_and_identical() -> None:
    found = verdict(decoder(1), decoder(1))
    assert (found.class_, found.related, found.relations, found.coverage) == ("copied", True, ("identical",), 1.0)


def test_a_cast_copy_is_copied() -> None:
    found = verdict(decoder(1), decoder(1), words=("F32", "BF16"))
    assert (found.class_, found.relations, found.direction) == ("copied", ("cast",), "a-to-b")


def test_a_tuned_network_is_transformed() -> None:
    base = decoder(1)
    found = verdict(base, tuned(base, 2))
    assert (found.class_, found.related) == ("transformed", True)
    assert "fine-tuned" in found.relations


@pytest.mark.parametrize("broken", [np.nan, np.inf, 3e38])
def test_values_that_are_no_numbers_hide_no_relative(broken: float) -> None:
    base = decoder(1)
    holes = np.random.default_rng(3)
    spoilt = changed(tuned(base, 2), lambda _, v: np.where(holes.random(v.shape) < 0.001, broken, v).astype(v.dtype))
    found = verdict(base, spoilt)
    assert (found.class_, found.related) == ("transformed", True)


def test_a_stranger_of_one_architecture_is_retrained() -> None:
    found = verdict(decoder(1), decoder(2))
    assert (found.class_, found.related, found.relations, found.direction) == ("retrained", False, (), None)


def test_another_architecture_is_unrelated() -> None:
    found = verdict(decoder(1), {f"net.{n}": v[:, :20] if v.ndim > 1 else v[:20] for n, v in decoder(2).items()})
    assert (found.class_, found.related, found.coverage) == ("unrelated", False, 0.0)


def test_equal_norms_alone_do_not_make_relatives() -> None:
    base, other = decoder(1), decoder(2)
    found = verdict(base, other | {n: v for n, v in base.items() if "norm" in n})
    assert found.class_ == "retrained"


def test_an_embedding_alone_is_a_shared_part() -> None:
    base, other = decoder(1), decoder(2)
    found = verdict(base, other | {"embed.weight": base["embed.weight"]})
    assert found.related is True
    assert "partially-shared" in found.relations
    assert any("embed.weight" in reason for reason in found.reasons)


def test_a_student_with_its_teachers_channels_and_none_of_its_weights_is_no_relative() -> None:
    teacher, student = decoder(1), decoder(2)
    noise = decoder(3)["head.weight"]
    found = verdict(teacher, student | {"head.weight": teacher["head.weight"] + noise})
    assert (found.class_, found.related) == ("retrained", False)
    assert found.log10_p is not None
    assert found.log10_p > -2
    assert any("training on A's features" in reason for reason in found.reasons)


def test_a_taught_student_is_spared_where_no_hidden_unit_can_be_tested() -> None:
    teacher, student = ({n: v for n, v in decoder(k).items() if "mlp" not in n} for k in (1, 2))
    gains = [{"gains.weight": 1 + x["layers.0.attn.q.weight"]} for x in (teacher, student)]
    taught = {"head.weight": teacher["head.weight"] + decoder(3)["head.weight"]}
    assert verdict(teacher | gains[0], student | taught | gains[1]).related is not True


def test_channels_of_strangers_that_do_not_agree_still_tell_strangers() -> None:
    one, two = ({n: v for n, v in decoder(k).items() if "mlp" not in n} for k in (1, 2))
    assert verdict(one, two).class_ == "retrained"


def test_attention_that_was_copied_between_strangers_is_found() -> None:
    base, other = decoder(1), decoder(2)
    found = verdict(base, other | {n: v for n, v in base.items() if ".v." in n or ".o." in n})
    assert (found.class_, found.log10_p) == ("transformed", None)
    assert "partially-shared" in found.relations


def test_an_initialisation_that_strangers_kept_accuses_nobody() -> None:
    base, other = decoder(1), decoder(2)
    rng = np.random.default_rng(7)
    untrained = {n: rng.standard_normal(v.shape).astype(np.float32) for n, v in base.items() if "attn" in n}
    assert verdict(base | untrained, other | untrained).related is False


def test_tables_that_anyone_computes_accuse_nobody() -> None:
    angle = np.arange(64)[:, None] / 10000 ** (np.arange(16) / 16)
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    tables = {f"layers.{i}.attn.table": table * (i + 1) for i in range(LAYERS)}
    assert verdict(decoder(1) | tables, decoder(2) | tables).related is False


def test_a_mask_that_one_side_alone_stores_makes_a_copy_no_less_one() -> None:
    base = decoder(1)
    masks = {f"layers.{i}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)) for i in range(LAYERS)}
    assert verdict(base | masks, base).class_ == verdict(base, base | masks).class_ == "copied"


def test_layers_without_half_of_their_heads_are_no_copy() -> None:
    base = decoder(1)
    half = {n: v[:, :16] if ".o." in n else v[:16] if "attn" in n else v for n, v in base.items()}
    kept = {n: (Slice(1 if ".o." in n else 0, 0, 16),) if "attn" in n else () for n in base}
    found = verdict(base, half, Mapping(rules=tuple(Rule(to=(n,), source=(n,), ops=kept[n]) for n in base)))
    assert found.class_ == "transformed"
    assert "width-pruned" in found.relations


def test_layers_alone_are_a_shared_part_that_is_named() -> None:
    base, other = decoder(1), decoder(2)
    found = verdict(base, other | {n: v for n, v in base.items() if n.startswith(("layers.0", "layers.1"))})
    assert "partially-shared" in found.relations
    assert any("layers.0.mlp, layers.1.mlp agree" in reason for reason in found.reasons)


def test_networks_that_never_left_zero_are_undetermined() -> None:
    flat = changed(decoder(1), lambda name, values: np.zeros_like(values))
    found = verdict(flat, flat)
    assert (found.class_, found.related, found.log10_p) == ("undetermined", None, None)


def test_too_few_units_for_a_test_are_undetermined() -> None:
    one, two = (decoder(seed, layers=1, hidden=6, width=8) for seed in (1, 2))
    assert verdict(one, two).class_ == "undetermined"


def reordered(tensors: Arrays, seed: int) -> tuple[Arrays, Mapping]:
    """Neurons in another order, and the mapping that undoes it."""
    result, rules = dict(tensors), []
    orders = [np.random.default_rng([seed, i]).permutation(HIDDEN) for i in range(LAYERS)]
    for name, values in tensors.items():
        ops: tuple[Any, ...] = ()
        if "mlp" in name:
            axis, order = (1 if "down" in name else 0), orders[int(name.split(".")[1])]
            result[name] = np.take(values, order, axis=axis)
            ops = (Take(axis, order),)
        rules.append(Rule(to=(name,), source=(name,), ops=ops))
    return result, Mapping(rules=tuple(rules))


def test_neurons_in_another_order_are_permuted_not_copied() -> None:
    base = decoder(1)
    found = verdict(base, *reordered(base, 3))
    assert (found.class_, found.relations) == ("transformed", ("permuted",))


def test_where_all_units_were_reordered_effect_sizes_decide_and_there_is_no_p_value() -> None:
    base, rng = decoder(1), np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(base["embed.weight"].shape[1],) * 2))[0]

    def move(name: str, values: NDArray[Any]) -> Any:
        if values.ndim < 2:
            return values
        return turn.T @ values if "down" in name or ".o." in name else values @ turn

    found = verdict(base, changed(reordered(base, 3)[0], move))
    assert (found.class_, found.log10_p) == ("transformed", None)
    assert {"permuted", "rotated"} <= set(found.relations)
    assert any("no p-value" in reason for reason in found.reasons)


@pytest.mark.parametrize("seed", range(10))
def test_no_stranger_is_accused_with_or_without_a_comparison(seed: int) -> None:
    for measured in (True, False):
        assert verdict(decoder(100 + seed), tuned(decoder(200 + seed), seed), measured=measured).related is False


def test_samples_say_what_the_comparison_says() -> None:
    base = decoder(1)
    for other in (base, tuned(base, 2), decoder(2)):
        full, sampled = (verdict(base, other, measured=measured) for measured in (True, False))
        assert (full.class_, full.relations, full.log10_p) == (sampled.class_, sampled.relations, sampled.log10_p)


def test_the_first_reason_names_the_units_and_the_chance() -> None:
    base = decoder(1)
    assert verdict(base, tuned(base, 2)).reasons[0] == (
        "layers.{}.mlp (48 units), 4 layers: of 192 units matched by their weights, 192 stand at the place of A's "
        "(chance: about 4); log10 p = -242.9."
    )


def test_the_negative_control_is_among_the_reasons() -> None:
    assert any(reason.startswith("Negative control") for reason in verdict(decoder(1), decoder(2)).reasons)


def test_a_void_axis_is_named_with_its_cause() -> None:
    eye = np.eye(HIDDEN, 32)
    one, two = (
        changed(decoder(seed), lambda n, v: v + (eye.T if "down" in n else eye) if "mlp" in n else v) for seed in (1, 2)
    )
    found = verdict(one, two)
    assert found.related is not True
    assert any("Not counted: layers.{}.mlp" in reason for reason in found.reasons)


def test_the_record_prints_the_contract_s_words() -> None:
    document = json.loads(msgspec.json.encode(verdict(decoder(1), decoder(2))))
    fields = ("class", "related", "log10_p", "coverage", "relations", "direction", "reasons")
    assert tuple(document)[: len(fields)] == fields
    assert document["log10_p"] <= 0


def test_networks_of_one_build_that_nothing_pairs_are_undetermined() -> None:
    base = {f"x{n}": v for n, v in decoder(1).items()}
    assert verdict(decoder(1), base, Mapping()).class_ == "undetermined"


def test_networks_of_unlike_build_that_nothing_pairs_are_unrelated() -> None:
    base = {f"x{n}": v for n, v in decoder(1, layers=6).items()}
    assert verdict(decoder(1), base, Mapping()).class_ == "unrelated"


def test_that_channels_have_no_negative_control_is_among_the_reasons() -> None:
    base, other = decoder(1), decoder(2)
    found = verdict(base, other | {"embed.weight": base["embed.weight"]})
    assert any(reason.startswith("No negative control exists for channels") for reason in found.reasons)
