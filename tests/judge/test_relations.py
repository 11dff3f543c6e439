"""Every tag: a pair that has it, the nearest pair that has not, and an innocent pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.judge.material import Sample
from lineage.judge.relations import RELATIONS
from lineage.judge.relations.grids import find_grid
from lineage.judge.relations.training import low_rank
from lineage.judge.relations.values import diagonal_fit
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Concat, Pad, Rearrange, Slice, Take, Unstack
from tests.judge.networks import HIDDEN, LAYERS, WIDTH, Arrays, changed, decoder, experts, tuned, verdict

Changer = Callable[[str, NDArray[Any]], NDArray[Any]]
BASE = decoder(1)


def content(change: Changer) -> Arrays:
    """The base with its matrices changed."""
    return changed(BASE, lambda name, values: change(name, values) if values.ndim > 1 else values)


def rounded(bits: int, block: int) -> Arrays:
    def round_to(name: str, values: NDArray[Any]) -> Any:
        blocks = values.reshape(-1, block or values.shape[1])
        step = np.abs(blocks).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        return (np.round(blocks / step) * step).reshape(values.shape)

    return content(round_to)


def noisy(size: float) -> Arrays:
    rng = np.random.default_rng(5)
    return content(lambda n, v: v + size * np.sqrt(np.mean(v**2)) * rng.standard_normal(v.shape))


def pruned(name: str, values: NDArray[Any]) -> Any:
    return np.where(np.abs(values) < np.median(np.abs(values)), 0, values)


def adapted(rank: int) -> Arrays:
    rng = np.random.default_rng(6)

    def add(name: str, values: NDArray[Any]) -> Any:
        if ".q." not in name and ".v." not in name:
            return values
        update = rng.standard_normal((values.shape[0], rank)) @ rng.standard_normal((rank, values.shape[1]))
        return values + 0.1 * values.std() * update / np.sqrt(rank)

    return content(add)


def layers(order: list[int]) -> tuple[Arrays, Mapping]:
    """The base with these layers, and the mapping."""
    result = {n: v for n, v in BASE.items() if not n.startswith("layers.")}
    rules = [Rule(to=(n,), source=(n,)) for n in result]
    names = [n.removeprefix("layers.0.") for n in BASE if n.startswith("layers.0.")]
    for at, origin in enumerate(order):
        result |= {f"layers.{at}.{n}": BASE[f"layers.{origin}.{n}"] for n in names}
        rules += [Rule(to=(f"layers.{at}.{n}",), source=(f"layers.{origin}.{n}",)) for n in names]
    left = tuple(n for n in BASE if n.startswith("layers.") and int(n.split(".")[1]) not in order)
    return result, Mapping(rules=tuple(rules), unmatched_source=left)


def scaled(signs: bool) -> Arrays:
    rng = np.random.default_rng(7)

    def factors(length: int) -> NDArray[Any]:
        return rng.choice([-1.0, 1.0], length) if signs else np.exp(0.3 * rng.standard_normal(length))

    channels = factors(WIDTH)
    neurons = [factors(HIDDEN) for _ in range(LAYERS)]

    def scale(name: str, values: NDArray[Any]) -> Any:
        if "mlp.up" in name:
            return values * channels * neurons[int(name.split(".")[1])][:, None]
        if "mlp.down" in name:
            return values / channels[:, None] / neurons[int(name.split(".")[1])]
        return values / channels[:, None] if ".o." in name else values * channels

    return content(scale)


def tags(other: Arrays, layout: Mapping | None = None, words: tuple[str, str] = ("F32", "F32")) -> set[str]:
    return set(verdict(BASE, other, layout, words=words).relations)


def tags_of(one: Arrays, other: Arrays) -> set[str]:
    return set(verdict(one, other).relations)


def names_of(rename: Callable[[str], str]) -> tuple[Arrays, Mapping]:
    rules = tuple(Rule(to=(rename(n),), source=(n,)) for n in BASE)
    return {rename(n): v for n, v in BASE.items()}, Mapping(rules=rules)


def test_equal_files_are_identical() -> None:
    assert tags(BASE) == {"identical"}


def test_other_names_are_renamed_and_not_identical() -> None:
    assert tags(*names_of(lambda name: f"model.{name}")) == {"renamed"}


def test_equal_vectors_taken_for_each_other_are_not_renamed_and_unlike_ones_are() -> None:
    one, two = np.random.default_rng(3).standard_normal((2, WIDTH)).astype(np.float32)
    swap = {"short.bias": "norm.bias", "norm.bias": "short.bias"}
    rules = (*(Rule(to=(n,), source=(n,)) for n in BASE), *(Rule(to=(n,), source=(o,)) for n, o in swap.items()))
    both = BASE | {"norm.bias": one, "short.bias": one}
    assert "renamed" not in verdict(both, both, Mapping(rules=rules)).relations
    a, b = BASE | {"norm.bias": one, "short.bias": two}, BASE | {"norm.bias": two, "short.bias": one}
    assert "renamed" in verdict(a, b, Mapping(rules=rules)).relations


def test_other_layers_numbers_are_no_new_names() -> None:
    assert "renamed" not in tags(*layers([0, 2, 3]))


def test_joined_tensors_are_fused() -> None:
    other = {n: v for n, v in BASE.items() if ".q." not in n and ".k." not in n}
    rules = [Rule(to=(n,), source=(n,)) for n in other]
    for i in range(LAYERS):
        pair = tuple(f"layers.{i}.attn.{x}.weight" for x in "qk")
        other[f"layers.{i}.attn.qk.weight"] = np.concatenate([BASE[n] for n in pair])
        rules.append(Rule(to=(f"layers.{i}.attn.qk.weight",), source=pair, ops=(Concat(0),)))
    assert tags(other, Mapping(rules=tuple(rules))) == {"fused"}


def test_turned_matrices_are_transposed_and_not_fused() -> None:
    turn = (Rearrange("r c -> c r"),)
    rules = tuple(Rule(to=(n,), source=(n,), ops=turn if v.ndim > 1 else ()) for n, v in BASE.items())
    assert tags(content(lambda n, v: v.T), Mapping(rules=rules)) == {"transposed"}


def test_halves_laid_out_the_other_way_round_are_fused_and_not_permuted() -> None:
    swap = (Take(0, np.array([*range(24, 48), *range(24)])),)
    rules = tuple(Rule(to=(n,), source=(n,), ops=swap if "gate" in n else ()) for n in BASE)
    other = {n: np.roll(v, 24, axis=0) if "gate" in n else v for n, v in BASE.items()}
    found = verdict(BASE, other, Mapping(rules=rules))
    assert (found.class_, found.relations) == ("copied", ("fused",))


def test_axes_that_are_taken_apart_only_to_pick_units_are_permuted_and_not_fused() -> None:
    order = np.random.default_rng(2).permutation(12)
    ops = (Rearrange("(h d) k -> h d k", {"d": 12}), Take(1, order), Rearrange("h d k -> (h d) k", {"d": 12}))
    rules = tuple(Rule(to=(n,), source=(n,), ops=ops if "gate" in n else ()) for n in BASE)
    other = {n: v.reshape(4, 12, -1)[:, order].reshape(v.shape) if "gate" in n else v for n, v in BASE.items()}
    assert tags(other, Mapping(rules=rules)) == {"permuted"}


def test_another_dtype_is_cast() -> None:
    assert tags(BASE, words=("F32", "F16")) == {"cast"}


def test_tuned_weights_of_another_dtype_are_not_cast() -> None:
    assert "cast" not in tags(tuned(BASE, 2), words=("F32", "BF16"))


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 16), (8, 16), (4, 0)])
@pytest.mark.parametrize("word", ["F32", "BF16"])
def test_values_on_a_lattice_are_quantized(bits: int, block: int, word: str) -> None:
    found = verdict(BASE, rounded(bits, block), words=("F32", word))
    assert "quantized" in found.relations
    assert "fine-tuned" not in found.relations
    assert found.direction == "a-to-b"


def test_rows_too_short_to_show_a_lattice_have_no_vote() -> None:
    rng = np.random.default_rng(3)
    short = {f"layers.{i}.conv.weight": rng.standard_normal((88, 1, 4)).astype(np.float32) for i in range(LAYERS)}
    for word in ("step", "mix"):
        short |= {f"layers.{i}.{word}.weight": rng.standard_normal((88, 5)).astype(np.float32) for i in range(LAYERS)}
    coarse = {n: v + 1e-3 * rng.standard_normal(v.shape).astype(np.float32) for n, v in short.items()}
    found = verdict(BASE | short, rounded(8, 0) | coarse)
    assert ("quantized" in found.relations, found.direction) == (True, "a-to-b")


def test_a_lattice_by_columns_is_quantized_too() -> None:
    turned = {n: v.T for n, v in rounded(8, 0).items()}
    found = verdict({n: v.T for n, v in BASE.items()}, {n: np.ascontiguousarray(v) for n, v in turned.items()})
    assert ("quantized" in found.relations, found.direction) == (True, "a-to-b")
    assert any("by columns" in reason for reason in found.reasons)


def test_the_lattice_is_seen_from_the_other_side_too() -> None:
    found = verdict(rounded(4, 16), BASE)
    assert ("quantized" in found.relations, found.direction) == (True, "b-to-a")


def test_a_tuned_and_rounded_cousin_shows_no_direction() -> None:
    base = tuned(BASE, 9, 0.5)
    found = verdict(base, rounded(8, 0))
    assert ("quantized" in found.relations, found.direction) == (True, None)


@pytest.mark.parametrize("size", [0.02, 0.1])
def test_white_noise_of_one_size_is_noised(size: float) -> None:
    found = tags(noisy(size))
    assert "noised" in found
    assert not found & {"fine-tuned", "quantized", "lora-merged"}


def test_faint_noise_on_float32_is_noised() -> None:
    assert "noised" in tags(noisy(0.001))


def test_pruned_weights_are_not_noised_as_well() -> None:
    assert "noised" not in tags(content(pruned))


def test_zeros_are_sparsified_and_the_pruned_side_is_the_child() -> None:
    one, two = verdict(BASE, content(pruned)), verdict(content(pruned), BASE)
    assert "sparsified" in one.relations
    assert (one.direction, two.direction) == ("a-to-b", "b-to-a")


def test_small_steps_everywhere_are_fine_tuned() -> None:
    assert tags(tuned(BASE, 2)) == {"fine-tuned"}


def test_long_training_is_continued_pretraining() -> None:
    assert tags(tuned(BASE, 2, 1.0)) == {"continued-pretraining"}


def test_norms_that_were_tuned_alone_are_tuned_in_part() -> None:
    found = tags(changed(BASE, lambda n, v: v * 1.05 if v.ndim == 1 else v))
    assert {"fine-tuned", "partially-tuned"} <= found


def test_norms_that_were_only_rounded_are_not_tuned() -> None:
    assert "fine-tuned" not in tags(changed(BASE, lambda n, v: v * (1 + 1e-3) if v.ndim == 1 else v))


def test_equal_parts_beside_tuned_ones_are_partially_tuned() -> None:
    other = BASE | {n: v for n, v in tuned(BASE, 2).items() if "mlp" in n}
    assert tags(other) == {"fine-tuned", "partially-tuned"}


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("word", ["F32", "BF16"])
def test_a_low_rank_difference_is_a_merged_lora(rank: int, word: str) -> None:
    found = verdict(BASE, adapted(rank), words=(word, word))
    assert "lora-merged" in found.relations
    assert "fine-tuned" not in found.relations
    assert found.direction is None
    assert any(f"rank {rank} " in finding.sentence for finding in found.findings)


def test_an_adapter_that_fills_small_matrices_shows_in_the_large_ones() -> None:
    rng = np.random.default_rng(6)

    def add(name: str, values: NDArray[Any]) -> Any:
        update = rng.standard_normal((values.shape[0], 8)) @ rng.standard_normal((8, values.shape[1]))
        return values + (0.1 * values.std() * update / 4 if "mlp" in name or ".k." in name else 0)

    base = changed(BASE, lambda name, values: values[:16] if ".k." in name else values)
    found = verdict(base, changed(base, lambda name, values: add(name, values) if values.ndim > 1 else values))
    assert "lora-merged" in found.relations


def test_a_difference_of_nearly_full_rank_is_no_lora() -> None:
    assert "lora-merged" not in tags(adapted(14))


def test_missing_layers_are_depth_pruned() -> None:
    found = verdict(BASE, *layers([0, 2, 3]))
    assert (found.class_, found.relations, found.direction) == ("transformed", ("depth-pruned",), "a-to-b")


def test_repeated_layers_are_depth_grown() -> None:
    found = verdict(BASE, *layers([0, 1, 2, 1, 2, 3]))
    assert (found.relations, found.direction) == (("depth-grown",), "a-to-b")


def test_a_base_without_its_clones_is_no_child_of_theirs() -> None:
    grown, mapping = layers([0, 1, 1, 2, 3])
    found = verdict(grown, BASE, mapping.inverse())
    assert ("depth-pruned" in found.relations, found.direction) == (True, "b-to-a")


def test_blocks_that_another_program_numbers_otherwise_are_neither_grown_nor_pruned() -> None:
    def number(name: str) -> str:
        head, _, rest = name.removeprefix("layers.").partition(".")
        return f"blocks.{int(head) // 2}.{int(head) % 2}.{rest}" if name.startswith("layers.") else name

    other, mapping = names_of(number)
    for found in (verdict(BASE, other, mapping), verdict(other, BASE, mapping.inverse())):
        assert (found.class_, found.relations, found.direction) == ("copied", ("renamed",), None)


def test_unlike_blocks_that_are_numbered_from_the_other_end_are_not_reordered() -> None:
    rng = np.random.default_rng(4)
    blocks = {f"up.{i}.conv.weight": rng.standard_normal((24 + 8 * i, 40)).astype(np.float32) for i in range(5)}
    other = {f"up.{4 - i}.conv.weight": blocks[f"up.{i}.conv.weight"] for i in range(5)}
    rules = [Rule(to=(n,), source=(n,)) for n in BASE]
    rules += [Rule(to=(f"up.{4 - i}.conv.weight",), source=(f"up.{i}.conv.weight",)) for i in range(5)]
    found = verdict(BASE | blocks, BASE | other, Mapping(rules=tuple(rules)))
    assert (found.class_, "layers-reordered" in found.relations) == ("copied", False)


def test_the_shorter_one_of_two_stacks_is_seen_to_be_pruned() -> None:
    short, mapping = layers([0, 2])
    whole = {n.replace("layers", "encoder"): v for n, v in decoder(2).items() if "layers" in n}
    rules = (*mapping.rules, *(Rule(to=(n,), source=(n,)) for n in whole))
    found = verdict(BASE | whole, short | whole, Mapping(rules=rules, unmatched_source=mapping.unmatched_source))
    assert ("depth-pruned" in found.relations, found.direction) == (True, "a-to-b")


def test_swapped_layers_are_reordered() -> None:
    assert tags(*layers([0, 2, 1, 3])) == {"layers-reordered"}


def test_fewer_neurons_are_width_pruned_and_more_are_grown() -> None:
    def cut(name: str, values: NDArray[Any]) -> Any:
        return values[:, :36] if "mlp.down" in name else values[:36] if "mlp" in name else values

    one, two = verdict(BASE, content(cut)), verdict(content(cut), BASE)
    assert ("width-pruned" in one.relations, one.direction) == (True, "a-to-b")
    assert ("width-grown" in two.relations, two.direction) == (True, "b-to-a")


def test_neurons_that_were_copied_to_grow_show_the_wider_one_as_the_child() -> None:
    def double(name: str, values: NDArray[Any]) -> Any:
        if "mlp" not in name:
            return values
        axis = 1 if "down" in name else 0
        return np.concatenate([values, np.take(values, range(12), axis=axis)], axis=axis)

    found = verdict(BASE, content(double))
    assert ("width-grown" in found.relations, found.direction) == (True, "a-to-b")


def test_heads_that_were_cut_show_the_narrower_side_as_the_child_unless_the_others_are_clones() -> None:
    rules = [Rule(to=(n,), source=(n,), ops=(Slice(0, 0, 16),) if ".k." in n else ()) for n in BASE]
    half = {n: v[:16] if ".k." in n else v for n, v in BASE.items()}
    repeated = {n: np.concatenate([v[:16], v[:16]]) if ".k." in n else v for n, v in BASE.items()}
    found = [verdict(a, half, Mapping(rules=tuple(rules))) for a in (BASE, repeated)]
    assert [f.direction for f in found] == ["a-to-b", None]


def test_experts_that_stood_in_one_tensor_are_not_upcycled() -> None:
    apart = experts(1, count=4)
    one = {n: v for n, v in apart.items() if "experts" not in n}
    rules = [Rule(to=(n,), source=(n,)) for n in one]
    for i in range(LAYERS):
        for word in ("up", "down"):
            name = f"layers.{i}.experts.{word}"
            names = tuple(f"layers.{i}.experts.{e}.{word}.weight" for e in range(4))
            one[name] = np.stack([apart[n] for n in names])
            rules.append(Rule(to=names, source=(name,), ops=(Unstack(0),)))
    found = verdict(one, apart, Mapping(rules=tuple(rules)))
    assert (found.class_, "expert-upcycled" in found.relations) == ("copied", False)


def test_a_small_matrix_that_does_not_agree_hides_no_training_and_a_large_one_does() -> None:
    rng = np.random.default_rng(2)
    router, table = (rng.standard_normal((2, *shape)).astype(np.float32) for shape in ((12, WIDTH), (400, WIDTH)))
    other = tuned(BASE, 2, 0.3)
    assert "fine-tuned" in tags_of(
        BASE | {"layers.0.router.weight": router[0]}, other | {"layers.0.router.weight": router[1]}
    )
    assert "fine-tuned" not in tags_of(BASE | {"table.weight": table[0]}, other | {"table.weight": table[1]})


def test_experts_that_were_left_out_show_the_smaller_side_as_the_child() -> None:
    whole = experts(1, count=4)
    rules = [Rule(to=(n,), source=(n.replace("experts.1", "experts.2"),)) for n in whole if ".experts." in n]
    kept = [rule for rule in rules if "experts.0" in rule.to[0] or "experts.1" in rule.to[0]]
    routers = [n for n in whole if "router" in n]
    some = {rule.to[0]: whole[rule.source[0]] for rule in kept} | {n: whole[n][[0, 2]] for n in routers}
    kept += [Rule(to=(n,), source=(n,), ops=(Take(0, np.array([0, 2])),)) for n in routers]
    assert verdict(whole, some, Mapping(rules=tuple(kept))).direction == "a-to-b"


def test_new_rows_of_the_embedding_extend_the_vocabulary() -> None:
    more = np.random.default_rng(8).standard_normal((6, WIDTH)).astype(np.float32)
    other = BASE | {n: np.concatenate([BASE[n], 0.05 * more]) for n in ("embed.weight", "head.weight")}
    pad = (Pad(0, 0, 6, value=None),)
    rules = tuple(Rule(to=(n,), source=(n,), ops=pad if n in ("embed.weight", "head.weight") else ()) for n in BASE)
    found = verdict(BASE, other, Mapping(rules=rules))
    assert (found.relations, found.direction) == (("vocabulary-extended",), "a-to-b")


def test_a_vocabulary_that_was_cut_makes_nobody_the_child() -> None:
    rules = [Rule(to=(n,), source=(n,)) for n in BASE if n not in ("embed.weight", "head.weight")]
    ends = [Rule(to=(n,), source=(n,), ops=(Slice(0, 0, 60),)) for n in ("embed.weight", "head.weight")]
    shorter = {n: v[:60] if n in ("embed.weight", "head.weight") else v for n, v in BASE.items()}
    found = verdict(BASE, shorter, Mapping(rules=(*rules, *ends)))
    assert ("vocabulary-extended" in found.relations, found.direction) == (True, None)


def test_one_mlp_in_several_experts_is_upcycled() -> None:
    other = {n: v for n, v in BASE.items() if "mlp" not in n}
    rules = [Rule(to=(n,), source=(n,)) for n in other]
    for i in range(LAYERS):
        for e in range(3):
            for part in ("gate", "up", "down"):
                source, target = f"layers.{i}.mlp.{part}.weight", f"layers.{i}.experts.{e}.{part}.weight"
                other[target] = BASE[source] + 0.001 * e
                rules.append(Rule(to=(target,), source=(source,)))
    found = verdict(BASE, other, Mapping(rules=tuple(rules)))
    assert "expert-upcycled" in found.relations
    assert found.direction == "a-to-b"
    assert not set(found.relations) & {"depth-grown", "depth-pruned"}


def test_scaled_rows_and_columns_are_rescaled() -> None:
    found = tags(scaled(signs=False))
    assert "rescaled" in found
    assert not found & {"fine-tuned", "sign-flipped", "continued-pretraining"}


def test_flipped_signs_are_sign_flipped() -> None:
    found = tags(scaled(signs=True))
    assert "sign-flipped" in found
    assert not found & {"rescaled", "fine-tuned"}


def test_some_units_at_home_in_every_layer_are_a_shared_beginning() -> None:
    start, one, two = decoder(50), decoder(51), decoder(52)
    a, b = ({n: start[n] + 2.4 * x[n] for n in start} for x in (one, two))
    assert "shared-initialisation" in verdict(a, b).relations


@pytest.mark.parametrize("tag", RELATIONS)
def test_no_stranger_has_any_tag(tag: str) -> None:
    assert tag not in tags(decoder(2))


@pytest.mark.parametrize("seed", range(30))
def test_trained_weights_stand_on_no_lattice(seed: int) -> None:
    assert (
        find_grid(np.random.default_rng(seed).standard_normal((24, 64)).astype(np.float16).astype(np.float32)) is None
    )


def test_weights_stored_in_bf16_stand_on_no_lattice() -> None:
    values = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    assert find_grid((values.view(np.uint32) & 0xFFFF0000).view(np.float32)) is None


def test_noise_has_no_low_rank() -> None:
    a = np.random.default_rng(0).standard_normal((64, 64))
    assert low_rank(Sample("w", a, a + 0.01 * np.random.default_rng(1).standard_normal((64, 64))), "F32") == 0


def test_strangers_are_no_scaled_rows_of_each_other() -> None:
    rng = np.random.default_rng(0)
    fit = diagonal_fit(rng.standard_normal((32, 32)), rng.standard_normal((32, 32)))
    assert fit is not None
    assert fit.off > 0.5
    assert fit.signed < 0.8
