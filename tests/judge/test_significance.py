"""The exact tests: what is related is found, and innocents of every kind are not accused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.judge.axes import Member, matrices
from lineage.judge.sampling import read_units
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Concat, Take
from tests.judge.networks import HIDDEN, LAYERS, WIDTH, Arrays, changed, decoder, exact, memory, tuned
from tests.judge.nulls import ADVERSARIES

ALL = LAYERS * HIDDEN


def by(test: str, found: Any) -> Any:
    return next(t for t in found.tests if t.kind == test)


def sorted_neurons(tensors: Arrays) -> Arrays:
    """The network with the neurons of each layer in order of size."""
    result = dict(tensors)
    for i in range(LAYERS):
        at = f"layers.{i}.mlp."
        order = np.argsort(np.linalg.norm(tensors[at + "gate.weight"], axis=1))
        for name in ("gate.weight", "up.weight"):
            result[at + name] = tensors[at + name][order]
        result[at + "down.weight"] = tensors[at + "down.weight"][:, order]
    return result


# -- relatives


def test_a_copy_is_found_with_every_unit_at_its_place() -> None:
    found = exact(decoder(1), decoder(1))
    assert (by("hidden", found).fixed, by("hidden", found).units) == (ALL, ALL)
    assert found.log10_p is not None
    assert found.log10_p < -200


def test_a_tuned_network_is_found() -> None:
    base = decoder(1)
    assert (exact(base, tuned(base, 2, 1.0)).log10_p or 0.0) < -100


def test_one_copied_layer_among_strangers_is_found() -> None:
    base, other = decoder(1), decoder(2)
    other |= {name: values for name, values in base.items() if name.startswith("layers.1.mlp")}
    found = exact(base, other)
    assert (found.log10_p or 0.0) < -30
    assert [block[1] > 40 for block in by("hidden", found).each] == [False, True, False, False]


def test_pruned_neurons_are_found_by_their_order() -> None:
    base = decoder(1)
    kept = np.sort(np.random.default_rng(0).permutation(HIDDEN)[:30])

    def cut(name: str, values: NDArray[Any]) -> Any:
        if "mlp" not in name:
            return values
        return values[:, kept] if "down" in name else values[kept]

    found = by("hidden", exact(base, changed(base, cut)))
    assert (found.ordered, found.units) == (LAYERS * 30, LAYERS * 30)
    assert found.log10_p < -50


def test_flipped_signs_of_channels_do_not_hide_a_copy() -> None:
    base, signs = decoder(1), np.random.default_rng(0).choice([-1.0, 1.0], WIDTH)

    def flip(name: str, values: NDArray[Any]) -> Any:
        if values.ndim < 2:
            return values
        return values * (signs[:, None] if "down" in name or ".o." in name else signs)

    assert (exact(base, changed(base, flip)).log10_p or 0.0) < -30


@pytest.mark.parametrize("turn", ["permuted", "rotated"])
def test_reordered_or_turned_channels_do_not_hide_neurons(turn: str) -> None:
    base, rng = decoder(1), np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    matrix = np.eye(WIDTH)[rng.permutation(WIDTH)] if turn == "permuted" else turned

    def move(name: str, values: NDArray[Any]) -> Any:
        if values.ndim < 2:
            return values
        return matrix.T @ values if "down" in name or ".o." in name else values @ matrix

    found = exact(base, changed(base, move))
    assert [t.frame for t in found.tests if t.log10_p < -100] == ["tokens"]
    assert (found.log10_p or 0.0) < -100


def test_channels_speak_where_only_the_embedding_was_copied() -> None:
    base, other = decoder(1), decoder(2)
    found = exact(base, other | {"embed.weight": base["embed.weight"]})
    assert by("channels", found).fixed == WIDTH
    assert by("hidden", found).log10_p > -2


def test_gate_and_up_in_one_tensor_of_the_suspect_are_told_apart() -> None:
    base = decoder(1)
    fused = {n: v for n, v in base.items() if "gate" not in n and "up" not in n}
    for i in range(LAYERS):
        at = f"layers.{i}.mlp."
        fused[at + "both"] = np.concatenate([base[at + "gate.weight"], base[at + "up.weight"]])
    rules = [Rule(to=(n,), source=(n,)) for n in fused if "both" not in n]
    pair = ("layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight")
    rules.append(Rule(to=("layers.{i}.mlp.both",), source=pair, ops=(Concat(0),)))
    found = by("hidden", exact(base, fused, Mapping(rules=tuple(rules))))
    assert (found.fixed, found.units) == (ALL, ALL)


# -- innocents


@pytest.mark.parametrize("seed", range(12))
def test_strangers_show_nothing(seed: int) -> None:
    assert (exact(decoder(2 * seed), decoder(2 * seed + 1), seed=seed).log10_p or 0.0) > -2


@pytest.mark.parametrize("seed", range(4))
def test_strangers_with_sorted_neurons_show_nothing(seed: int) -> None:
    found = exact(sorted_neurons(decoder(2 * seed)), sorted_neurons(decoder(2 * seed + 1)))
    assert (found.log10_p or 0.0) > -3


def test_strangers_with_equal_norms_and_embedding_statistics_show_nothing() -> None:
    base, other = decoder(1), decoder(2)
    for name, values in other.items():
        if values.ndim < 2:
            other[name] = base[name]
        elif "embed" in name:
            lengths = np.linalg.norm(base[name], axis=1, keepdims=True)
            other[name] = values / np.linalg.norm(values, axis=1, keepdims=True) * lengths
    assert (exact(base, other).log10_p or 0.0) > -2


def test_norms_and_deviations_that_accused_public_models_do_not_move_the_p_value() -> None:
    one, two = (decoder(seed) for seed in (1, 2))
    before = exact(one, two).log10_p
    alike_a, alike_b = (ADVERSARIES["equal norms and deviations by layer"](tensors) for tensors in (one, two))
    norms = [np.concatenate([t[n] for n in t if "norm" in n]) for t in (alike_a, alike_b)]
    spreads = [[float(v.std()) for v in t.values() if v.ndim > 1] for t in (alike_a, alike_b)]
    assert norms[0] @ norms[1] / np.prod([np.linalg.norm(n) for n in norms]) > 0.95
    assert np.asarray(np.corrcoef(spreads))[0, 1] > 0.9
    assert exact(alike_a, alike_b).log10_p == before


def test_a_mapping_that_sorts_neurons_after_their_likeness_proves_nothing() -> None:
    base, other = decoder(1), decoder(2)
    rules = []
    for name in base:
        if "mlp" not in name:
            rules.append(Rule(to=(name,), source=(name,)))
            continue
        from scipy.optimize import linear_sum_assignment

        axis = 1 if "down" in name else 0
        one, two = np.moveaxis(base[name], axis, 0), np.moveaxis(other[name], axis, 0)
        _, order = linear_sum_assignment(two @ one.T, maximize=True)
        rules.append(Rule(to=(name,), source=(name,), ops=(Take(axis, order),)))
    assert (exact(base, other, Mapping(rules=tuple(rules))).log10_p or 0.0) > -2


def test_identity_initialisation_is_void() -> None:
    def init(seed: int) -> Arrays:
        rng = np.random.default_rng(seed)
        eye = np.eye(HIDDEN, WIDTH)

        def add(name: str, values: NDArray[Any]) -> Any:
            noise = 0.05 * rng.standard_normal(values.shape)
            return noise + (eye.T if "down" in name else eye) if "mlp" in name else values

        return changed(decoder(seed), add)

    found = exact(init(1), init(2))
    assert all(t.void for t in found.tests if t.kind == "hidden")
    assert (found.log10_p or 0.0) > -2


def test_units_that_carry_their_index_in_every_layer_are_void() -> None:
    shared = np.random.default_rng(0).standard_normal((HIDDEN, WIDTH))

    def init(seed: int) -> Arrays:
        def add(name: str, values: NDArray[Any]) -> Any:
            return values + 0.1 * (shared.T if "down" in name else shared) if "mlp" in name else values

        return changed(decoder(seed), add)

    found = exact(init(1), init(2))
    assert all("index itself" in t.void or "all layers are alike" in t.void for t in found.tests if t.kind == "hidden")
    assert (found.log10_p or 0.0) > -2


def test_sinusoids_beside_the_embedding_void_the_channels() -> None:
    angle = np.arange(64)[:, None] / 10_000 ** (np.arange(WIDTH // 2) / (WIDTH // 2))
    table = np.concatenate([np.sin(angle), np.cos(angle)], axis=1).astype(np.float32)
    one, two = (decoder(seed) | {"positions": table} for seed in (1, 2))
    found = exact(one, two)
    assert "anyone computes alike" in by("channels", found).void
    assert (found.log10_p or 0.0) > -2


def test_dead_and_equal_units_are_left_out_of_the_count() -> None:
    base = decoder(1)
    for i in range(LAYERS):
        at = f"layers.{i}.mlp."
        for name in ("gate.weight", "up.weight"):
            base[at + name][:10] = 0.0
            base[at + name][10:20] = base[at + name][10]
        base[at + "down.weight"][:, :10] = 0.0
        base[at + "down.weight"][:, 10:20] = base[at + "down.weight"][:, 10:11]
    found = by("hidden", exact(base, base))
    assert found.units == found.fixed == LAYERS * (HIDDEN - 20)


def test_layers_of_nothing_but_equal_units_leave_nothing_to_test() -> None:
    flat = changed(decoder(1), lambda n, v: np.ones_like(v))
    assert exact(flat, flat).log10_p is None


def test_strangers_on_one_coarse_grid_show_nothing() -> None:
    one, two = (changed(decoder(seed), lambda n, v: np.sign(v)) for seed in (1, 2))
    assert (exact(one, two).log10_p or 0.0) > -2


def test_clones_of_a_layer_count_once() -> None:
    base = decoder(1)
    for i in (1, 2, 3):
        base |= {n.replace("layers.0", f"layers.{i}"): v for n, v in base.items() if n.startswith("layers.0.")}
    other = decoder(2)
    for i in (1, 2, 3):
        other |= {n.replace("layers.0", f"layers.{i}"): v for n, v in other.items() if n.startswith("layers.0.")}
    assert by("hidden", exact(base, other)).blocks == 1


def test_layers_of_one_network_against_each_other_show_nothing() -> None:
    base = decoder(1)
    order = {0: 1, 1: 2, 2: 3, 3: 0}
    rules = [Rule(to=(n,), source=(n,)) for n in base if not n.startswith("layers.")]
    for name in base:
        if name.startswith("layers."):
            i = int(name.split(".")[1])
            rules.append(Rule(to=(name,), source=(name.replace(f"layers.{i}.", f"layers.{order[i]}."),)))
    assert by("hidden", exact(base, base, Mapping(rules=tuple(rules)))).log10_p > -2


def test_the_negative_control_of_a_copy_finds_nothing() -> None:
    found = by("hidden", exact(decoder(1), decoder(1)))
    assert found.void == ""
    assert found.control > -2


# -- sampling


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_gives_the_same_answer(seed: int) -> None:
    one, two = decoder(seed), tuned(decoder(seed), 9, 2.0)
    assert exact(one, two, seed=5) == exact(one, two, seed=5)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("large", [False, True])
def test_units_are_read_by_ranges_as_from_the_whole_tensor(
    side: int, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(30 * 20 * 3, dtype=np.float32).reshape(30, 20, 3)
    ((matrix,), _) = matrices({"w": (values.shape, values.shape)})
    monkeypatch.setattr("lineage.judge.sampling.WHOLE", 0 if large else 1 << 19)
    chosen = np.array([1, 4, 9])
    length = values.shape[side]
    got = read_units(memory({"w": values}), Member(matrix, side), slice(3, 11), length=length, features=chosen)
    wanted = values[3:11][:, chosen] if side == 0 else values[chosen][:, 3:11].swapaxes(0, 1)
    np.testing.assert_array_equal(got, wanted.reshape(8, -1))


def test_rows_of_a_very_wide_matrix_are_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((30, 500)).astype(np.float32)
    ((matrix,), _) = matrices({"w": (values.shape, values.shape)})
    monkeypatch.setattr("lineage.judge.sampling.LARGE", 0)
    held = memory({"w": values})
    most = 0

    def read(name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        nonlocal most
        most = max(most, (stop or values.size) - start)
        return type(held).read(held, name, start, stop)

    monkeypatch.setattr(held, "read", read)
    got = read_units(held, Member(matrix, 0), slice(3, 11), length=30, features=np.arange(100, 140))
    np.testing.assert_array_equal(got, values[3:11, 100:140])
    assert most == 40
