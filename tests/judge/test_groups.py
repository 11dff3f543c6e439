"""Attention heads and experts as units: found by shapes, proof where neurons were moved, silent between strangers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lineage.judge.axes import hidden_axes, matrices
from lineage.judge.groups import expert_axes, head_axes
from lineage.judge.significance import AxisTest, Significance
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Concat
from tests.judge.networks import Arrays, attending, bound, decoder, exact, experts, tuned

Shapes = dict[str, tuple[int, ...]]


def of_kind(kind: str, found: Significance) -> list[AxisTest]:
    return [test for test in found.tests if test.kind == kind]


def home(found: Significance) -> list[float]:
    """Share of heads at their place in each test on heads."""
    return [test.fixed / test.units for test in of_kind("heads", found)]


def titles(shapes: Shapes) -> dict[str, int]:
    axes = head_axes({name: (shape, shape) for name, shape in shapes.items()}, bound)
    return {axis.title: len(axis.blocks) for axis in axes}


def attention(query: int, key: int, width: int = 64, **more: tuple[int, ...]) -> Shapes:
    layer: Shapes = {"attn.q": (query, width), "attn.k": (key, width), "attn.v": (key, width)}
    layer |= {"attn.o": (width, query), "mlp.up": (160, width), "mlp.down": (width, 160)}
    layer |= {f"attn.{name}": shape for name, shape in more.items()}
    return {f"layers.{i}.{name}.weight": shape for i in range(3) for name, shape in layer.items()}


def shuffled(tensors: Arrays, seed: int, *, neurons: bool = False, groups: bool = False, each: int = 4) -> Arrays:
    """The network with its neurons, or its groups of heads (of `each` rows of keys), in another order."""
    rng, result = np.random.default_rng(seed), dict(tensors)
    layers = sorted({name.split(".")[1] for name in tensors if name.startswith("layers.")})
    for at in (f"layers.{i}." for i in layers):
        if neurons:
            order = rng.permutation(len(tensors[at + "mlp.up.weight"]))
            result |= {at + f"mlp.{x}.weight": tensors[at + f"mlp.{x}.weight"][order] for x in ("gate", "up")}
            result[at + "mlp.down.weight"] = tensors[at + "mlp.down.weight"][:, order]
        if groups:
            count = len(tensors[at + "attn.k.weight"]) // each
            moved = rng.permutation(count)
            for x in "qkvo":
                axis = int(x == "o")
                values = np.moveaxis(tensors[at + f"attn.{x}.weight"], axis, 0)
                taken = values.reshape(count, -1, values.shape[1])[moved].reshape(values.shape)
                result[at + f"attn.{x}.weight"] = np.moveaxis(taken, 0, axis)
    return result


def unspoken(tensors: Arrays) -> Arrays:
    """The network with another one's vocabulary: its channels prove nothing."""
    return {name: decoder(99)[name] if name in ("embed.weight", "head.weight") else v for name, v in tensors.items()}


# -- which rows belong to a head


def test_groups_and_the_heads_inside_them_are_found_where_a_norm_tells_their_size() -> None:
    assert titles(attention(64, 32, q_norm=(8,), k_norm=(8,))) == {
        "layers.{}.attn (2 heads in each group)": 12,
        "layers.{}.attn (4 heads)": 3,
    }


def test_an_axis_of_heads_tells_their_number() -> None:
    layer: Shapes = {"attn.q": (64, 8, 8), "attn.k": (64, 8, 8), "attn.v": (64, 8, 8), "attn.o": (8, 8, 64)}
    shapes = {f"layers.{i}.{n}": shape for i in range(2) for n, shape in layer.items()}
    assert titles(shapes | {"layers.0.mlp.up": (64, 160), "layers.0.mlp.down": (160, 64)}) == {
        "layers.{}.attn (8 heads)": 2
    }


def test_heads_of_unknown_size_are_joined_in_units_that_cut_none() -> None:
    assert titles(attention(4096, 1024, 4096)) == {"layers.{}.attn (2 heads or more, in units of 512 rows)": 3}


def test_heads_whose_size_nothing_tells_are_left_out() -> None:
    assert titles(attention(768, 768, 768)) == {}


def test_norms_of_unlike_lengths_leave_heads_out() -> None:
    assert titles(attention(64, 32, q_norm=(8,), k_norm=(16,))) == {}


def test_tensors_that_hold_query_key_and_value_together_are_left_out() -> None:
    layer: Shapes = {"attn.qkv": (192, 64), "attn.o": (64, 64), "attn.q_norm": (8,), "mlp.up": (160, 64)}
    assert titles({f"layers.{i}.{n}.weight": s for i in range(3) for n, s in layer.items()}) == {}


def test_experts_are_named_by_the_router() -> None:
    shapes = {name: (values.shape, values.shape) for name, values in experts(1).items()}
    found, vectors = matrices(shapes)
    (axis,) = expert_axes(found, hidden_axes(found, vectors, bound))
    assert (axis.title, len(axis.blocks)) == ("layers.{}.router.weight (8 experts)", 4)


# -- relatives


def test_a_copy_whose_neurons_were_permuted_is_proved_by_its_heads() -> None:
    base = attending(1)
    found = exact(base, unspoken(shuffled(tuned(base, 2), 3, neurons=True)))
    assert home(found) == [1.0, 1.0]
    assert all(t.log10_p > -2 for t in of_kind("hidden", found))
    assert (found.log10_p or 0.0) < -8


def test_a_copy_whose_heads_were_permuted_is_proved_by_its_neurons() -> None:
    base = attending(1)
    found = exact(base, shuffled(tuned(base, 2), 3, groups=True))
    assert min(t.log10_p for t in of_kind("hidden", found)) < -200
    assert (found.log10_p or 0.0) < -200


def test_heads_are_found_where_the_suspect_holds_query_key_and_value_in_one_tensor() -> None:
    base = attending(1)
    moved = unspoken(shuffled(base, 3, neurons=True))
    other = {n: v for n, v in moved.items() if not n.endswith(("q.weight", "k.weight", "v.weight"))}
    for i in range(4):
        other[f"layers.{i}.attn.qkv.weight"] = np.concatenate([moved[f"layers.{i}.attn.{x}.weight"] for x in "qkv"])
    rules = [Rule(to=(n,), source=(n,)) for n in other if "qkv" not in n]
    three = tuple(f"layers.{{i}}.attn.{x}.weight" for x in "qkv")
    rules.append(Rule(to=("layers.{i}.attn.qkv.weight",), source=three, ops=(Concat(0, (64, 32, 32)),)))
    found = exact(base, other, Mapping(rules=tuple(rules)))
    assert home(found) == [1.0, 1.0]


def test_experts_prove_a_copy_whose_neurons_were_permuted() -> None:
    base, rng = experts(1), np.random.default_rng(0)
    other = dict(base)
    for name in (n for n in base if ".up." in n):
        order = rng.permutation(len(base[name]))
        down = name.replace(".up.", ".down.")
        other |= {name: base[name][order], down: base[down][:, order]}
    found = exact(base, unspoken(other))
    (test,) = of_kind("experts", found)
    assert (test.fixed, test.units) == (32, 32)
    assert (found.log10_p or 0.0) < -8


def test_neurons_are_matched_inside_the_experts_that_the_router_pairs() -> None:
    base, rng = experts(1), np.random.default_rng(0)
    other = dict(base)
    for i in range(4):
        at, order = f"layers.{i}.", rng.permutation(8)
        other[at + "router.weight"] = base[at + "router.weight"][order]
        for new, old in enumerate(order):
            for x in ("up", "down"):
                other[at + f"experts.{new}.{x}.weight"] = base[at + f"experts.{old}.{x}.weight"]
    found = exact(base, unspoken(other))
    best = min(found.valid, key=lambda t: t.log10_p)
    assert best.axis.endswith("experts paired by the router)")
    assert best.fixed == best.units > 1000
    assert (found.log10_p or 0.0) < -200


# -- innocents


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("build", [attending, experts])
def test_heads_and_experts_of_strangers_show_nothing(build: Callable[[int], Arrays], seed: int) -> None:
    found = exact(build(2 * seed), build(2 * seed + 1), seed=seed)
    assert of_kind("heads", found) or of_kind("experts", found)
    assert (found.log10_p or 0.0) > -2


def test_heads_that_carry_their_index_in_every_layer_are_void() -> None:
    slopes = np.random.default_rng(0).standard_normal((8, 32)).repeat(4, axis=0)

    def sloped(seed: int) -> Arrays:
        tensors = attending(seed, layers=8)
        for name, values in tensors.items():
            if name.endswith(("attn.k.weight", "attn.v.weight")):
                tensors[name] = np.asarray(values + 0.3 * slopes, np.float32)
        return tensors

    found = exact(sloped(1), sloped(2))
    assert any("index itself carries meaning" in t.void or "alike" in t.void for t in of_kind("heads", found))
    assert (found.log10_p or 0.0) > -2


def test_equal_heads_have_no_identity() -> None:
    def flat(seed: int) -> Arrays:
        tensors = attending(seed)
        return {n: np.ones_like(v) if "attn" in n and v.ndim > 1 else v for n, v in tensors.items()}

    assert of_kind("heads", exact(flat(1), flat(2))) == []


def test_experts_that_the_mapping_paired_one_by_one_cost_their_choices() -> None:
    base, other = experts(1), experts(2)
    rules = [Rule(to=(n,), source=(n,)) for n in base if "experts" not in n]
    turned = {e: (e * 3 + 1) % 8 for e in range(8)}
    rules += [
        Rule(to=(f"layers.{i}.experts.{e}.{x}.weight",), source=(f"layers.{i}.experts.{turned[e]}.{x}.weight",))
        for i in range(4)
        for e in range(8)
        for x in ("up", "down")
    ]
    assert exact(base, other, Mapping(rules=tuple(rules))).log10_p == 0.0
