"""The mapping between two layouts is found from the weights, and applying it rebuilds either file bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lineage.checkpoint import open_checkpoint
from lineage.filling import apply
from lineage.layout.mapping import Mapping
from lineage.match import find_mapping
from tests.match import models
from tests.match.models import Tensors, save

Layout = Callable[[Tensors], Tensors]

LAYOUTS: dict[str, tuple[Callable[[], Tensors], Layout]] = {
    "renamed": (models.language_model, models.renamed),
    "fused": (models.language_model, models.fused),
    "grouped": (models.language_model, models.grouped),
    "rotary": (models.language_model, models.rotary),
    "scanned": (models.language_model, models.scanned),
    "stacked experts": (lambda: models.language_model(experts=True), models.stacked_experts),
    "unrolled": (models.convolutional, models.unrolled),
    "groups put in blocks": (
        lambda: models.grouped(models.language_model()),
        lambda _: models.blocked(models.language_model()),
    ),
    "joined short convolutions": (models.with_convolutions, models.short_convolutions),
    "stacked gains of heads": (models.with_head_gains, models.stacked_head_gains),
    "experts under bare names": (models.bare_experts, models.parted_experts),
}


def mapped(tmp_path: Path, a: Tensors, b: Tensors, dtype: str = "F32") -> Mapping:
    """The mapping found between two sets of tensors."""
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b, dtype)
    found: Mapping = find_mapping(open_checkpoint(one), open_checkpoint(two))
    return found


def differing(got: Path, wanted: Tensors) -> list[str]:
    """Names that are missing, too many, or not equal bit by bit."""
    made = open_checkpoint(got)
    names = set(made.specs) ^ set(wanted)
    return sorted(names | {n for n in set(made.specs) & set(wanted) if not np.array_equal(made.tensor(n), wanted[n])})


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_recovered_both_ways(tmp_path: Path, layout: str, turned: bool, noise: float) -> None:
    make, change = LAYOUTS[layout]
    a, b = make(), change(make())
    if turned:
        a, b = b, a
    mapping = mapped(tmp_path, a, models.noisy(b, noise, 1) if noise else b)
    apply(mapping, open_checkpoint(save(tmp_path / "a.safetensors", a)), tmp_path / "made_b.safetensors")
    apply(mapping, open_checkpoint(save(tmp_path / "b.safetensors", b)), tmp_path / "made_a.safetensors", inverse=True)
    assert differing(tmp_path / "made_b.safetensors", b) == []
    assert differing(tmp_path / "made_a.safetensors", a) == []
    assert mapping.unmatched_source == mapping.unmatched_target == ()


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_too_large_to_be_read_whole_are_mapped_alike(
    tmp_path: Path, layout: str, turned: bool, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("values", "rows", "strips"):
        monkeypatch.setattr(f"lineage.match.{module}.SMALL", 256)
    monkeypatch.setattr("lineage.match.rows.LARGE", 1 << 10)
    test_a_layout_is_recovered_both_ways(tmp_path, layout, turned, noise)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_a_cast_copy_is_certified_as_equal(tmp_path: Path, dtype: str) -> None:
    a = models.language_model()
    mapping = mapped(tmp_path, a, models.fused(a), dtype)
    evidence = [r.evidence for r in mapping.rules]
    assert all(e is not None and e.certified and e.cosine == 1.0 for e in evidence)


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_gains_stored_minus_one_get_the_constant_back(tmp_path: Path, noise: float) -> None:
    a = {n: np.round(x * 256) / 256 for n, x in models.language_model().items()}
    b = models.shifted(a)
    mapping = mapped(tmp_path, a, models.noisy(b, noise, 1) if noise else b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


def test_rows_of_256_elements_are_told_apart_at_a_cosine_of_one_half_root_two(tmp_path: Path) -> None:
    a = models.language_model(width=256)
    b = models.grouped(a)
    mapping = mapped(tmp_path, a, models.noisy(b, 1.0, 1))
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


def test_constants_are_matched_by_structure_and_never_certified(tmp_path: Path) -> None:
    a = models.language_model()
    a |= {n: np.ones_like(x) if "norm" in n else np.zeros_like(x) for n, x in a.items() if x.ndim == 1}
    b = models.fused(a)
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []
    gains = [r for r in mapping.rules if any("norm" in t or "ln" in t for t in r.to)]
    assert gains
    assert all(r.how != "values" and r.evidence is not None and not r.evidence.certified for r in gains)


def test_a_model_trained_anew_is_mapped_by_names_and_structure_only(tmp_path: Path) -> None:
    a, b = models.language_model(1), models.renamed(models.language_model(2))
    mapping = mapped(tmp_path, a, b)
    assert mapping.unmatched_target == ()
    assert {r.how for r in mapping.rules} <= {"structure", "name"}


def test_nothing_is_forced_between_models_of_other_shapes(tmp_path: Path) -> None:
    mapping = mapped(tmp_path, models.language_model(), models.convolutional())
    assert mapping.rules == ()


def test_layers_left_out_doubled_and_reversed_are_found(tmp_path: Path) -> None:
    a = models.language_model()
    order = [2, 0, 0]
    b = {n: x for n, x in a.items() if ".layers." not in n}
    for new, old in enumerate(order):
        b |= {n.replace(f"layers.{old}.", f"layers.{new}."): x for n, x in a.items() if f"layers.{old}." in n}
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []
    assert all(".layers.1." in n for n in mapping.unmatched_source)


def test_a_tied_tensor_stored_twice_serves_both_and_comes_back(tmp_path: Path) -> None:
    a = models.language_model()
    a["lm_head.weight"] = a["model.embed_tokens.weight"]
    b = models.renamed({n: x for n, x in a.items() if n != "lm_head.weight"})
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "b.safetensors"), tmp_path / "made.safetensors", inverse=True)
    assert differing(tmp_path / "made.safetensors", a) == []


def test_new_vocabulary_rows_are_not_made_up(tmp_path: Path) -> None:
    a = models.language_model()
    b = dict(a)
    rng = np.random.default_rng(5)
    extra = rng.standard_normal((8, models.WIDTH)).astype(np.float32)
    b["model.embed_tokens.weight"] = np.concatenate([a["model.embed_tokens.weight"], extra])
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == ["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" not in open_checkpoint(tmp_path / "made.safetensors").specs


def test_the_order_of_tensors_in_a_file_changes_nothing(tmp_path: Path) -> None:
    a = models.language_model()
    b = models.grouped(a)
    straight = mapped(tmp_path, a, b)
    turned = mapped(tmp_path, dict(reversed(a.items())), dict(reversed(b.items())))

    def said(mapping: Mapping) -> set[tuple[object, ...]]:
        return {(r.to, r.source, tuple(op.word for op in r.ops)) for r in mapping.rules}

    assert said(straight) == said(turned)


def test_a_fused_model_trained_anew_is_still_mapped_whole(tmp_path: Path) -> None:
    a, b = models.language_model(1), models.fused(models.language_model(2))
    mapping = mapped(tmp_path, a, b)
    assert mapping.unmatched_target == mapping.unmatched_source == ()
    rule = next(r for r in mapping.rules if r.to[0].endswith("qkv.weight"))
    assert [s.split(".")[-2] for s in rule.source] == ["q_proj", "k_proj", "v_proj"]
    assert rule.how == "structure"


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_gains_of_doubled_layers_are_found_twice(tmp_path: Path, noise: float) -> None:
    a = models.language_model()
    b = {n: x for n, x in a.items() if ".layers." not in n}
    for new, old in enumerate([0, 1, 1, 2]):
        b |= {n.replace(f"layers.{old}.", f"layers.{new}."): x for n, x in a.items() if f"layers.{old}." in n}
    mapping = mapped(tmp_path, a, models.noisy(b, noise, 1) if noise else b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


def test_rows_of_a_large_matrix_in_any_order_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = {f"layers.{i}.up.weight": rng.standard_normal((1024, 96)).astype(np.float32) for i in range(2)}
    b = {n: x[rng.permutation(len(x))] for n, x in a.items()}
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_values_that_are_no_numbers_hide_no_layout(tmp_path: Path, broken: float) -> None:
    a = models.language_model()
    b = models.grouped(a)
    spoilt = {n: x.copy() for n, x in models.noisy(b, 0.05, 1).items()}
    for x in spoilt.values():
        x.reshape(-1)[len(x.reshape(-1)) // 3] = broken
    mapping = mapped(tmp_path, a, spoilt)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


def test_constant_gains_follow_their_layer_not_its_number(tmp_path: Path) -> None:
    a = models.language_model()
    a |= {n: np.full_like(x, 1 + 0.0 * i) for i, (n, x) in enumerate(a.items()) if "norm" in n}
    b = {n: x for n, x in a.items() if ".layers." not in n}
    for new, old in enumerate([2, 0]):
        b |= {n.replace(f"layers.{old}.", f"layers.{new}."): x for n, x in a.items() if f"layers.{old}." in n}
    mapping = mapped(tmp_path, a, b)
    pairs = {
        (i.source_names[0], i.target_names[0])
        for i in mapping.instances({n: x.shape for n, x in a.items()})
        if "norm" in i.target_names[0] and ".layers." in i.target_names[0]
    }
    assert {(s.split(".")[2], t.split(".")[2]) for s, t in pairs} == {("2", "0"), ("0", "1")}
    assert all(s.split(".")[3:] == t.split(".")[3:] for s, t in pairs)


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_rows_of_zeros_are_seen_through_noise(tmp_path: Path, noise: float) -> None:
    a = models.language_model()
    b = dict(a)
    empty = np.zeros((16, models.WIDTH), np.float32)
    b["model.embed_tokens.weight"] = np.concatenate([a["model.embed_tokens.weight"], empty])
    mapping = mapped(tmp_path, a, models.noisy(b, noise, 1))
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


def test_padding_that_was_cut_off_comes_back(tmp_path: Path) -> None:
    a, b = models.language_model(), models.language_model()
    empty = np.zeros((16, models.WIDTH), np.float32)
    a["model.embed_tokens.weight"] = np.concatenate([a["model.embed_tokens.weight"], empty])
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "b.safetensors"), tmp_path / "made.safetensors", inverse=True)
    assert differing(tmp_path / "made.safetensors", a) == []


def test_one_cut_vocabulary_serves_two_tensors(tmp_path: Path) -> None:
    a, b = models.language_model(), models.language_model()
    extra = np.random.default_rng(4).standard_normal((16, models.WIDTH)).astype(np.float32)
    b["lm_head.weight"] = b["model.embed_tokens.weight"]
    a["model.embed_tokens.weight"] = np.concatenate([a["model.embed_tokens.weight"], extra])
    mapping = mapped(tmp_path, a, models.noisy(b, 0.5, 1))
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


def test_numbers_that_stand_alone_are_matched_by_what_they_are(tmp_path: Path) -> None:
    a = models.language_model() | {"t": np.array([4.605], np.float32), "s": np.array([-16.77], np.float32)}
    b = models.renamed(models.language_model()) | {
        "logit_bias": np.array([-16.77], np.float32),
        "logit_scale": np.array([4.605], np.float32),
    }
    mapping = mapped(tmp_path, a, b)
    found = {i.target_names[0]: i.source_names[0] for i in mapping.instances({n: x.shape for n, x in a.items()})}
    assert (found["logit_scale"], found["logit_bias"]) == ("t", "s")


@pytest.mark.parametrize("trained", [("k",), ("q", "v")])
@pytest.mark.parametrize("noise", [0.05, 0.5])
@pytest.mark.parametrize("joined", ["A", "B"])
def test_fused_parts_are_found_though_only_some_were_trained(
    tmp_path: Path, joined: str, trained: tuple[str, ...], noise: float
) -> None:
    apart = models.language_model()
    some = {n: x for n, x in apart.items() if any(f".{t}_proj.weight" in n for t in trained)}
    tuned = apart | models.noisy(some, noise, 3)
    a, b, suspect = (
        (apart, models.fused(apart), models.fused(tuned)) if joined == "B" else (models.fused(apart), apart, tuned)
    )
    mapping = mapped(tmp_path, a, suspect)
    apply(mapping, open_checkpoint(save(tmp_path / "a.safetensors", a)), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.5])
def test_a_row_stored_apart_from_those_beside_it_is_found(tmp_path: Path, noise: float) -> None:
    a = models.encoder(width=64)
    a["tokens"] = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    b = {f"model.{n}": x for n, x in a.items() if n != "tokens"}
    b |= {"model.class": a["tokens"][None, :1], "model.registers": a["tokens"][None, 1:]}
    mapping = mapped(tmp_path, a, models.noisy(b, noise, 2) if noise else b)
    apply(mapping, open_checkpoint(save(tmp_path / "a.safetensors", a)), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []


@pytest.mark.parametrize("layout", ["fused", "grouped", "rotary", "scanned"])
def test_a_cast_copy_in_another_layout_is_rebuilt_bit_by_bit(tmp_path: Path, layout: str) -> None:
    make, change = LAYOUTS[layout]
    a, b = make(), change(make())
    mapping = mapped(tmp_path, a, b, "BF16")
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    made = open_checkpoint(tmp_path / "made.safetensors")
    rounded = save(tmp_path / "rounded.safetensors", {n: made.tensor(n) for n in made.specs}, "BF16")
    copy = open_checkpoint(tmp_path / "b.safetensors")
    assert differing(rounded, {n: copy.tensor(n) for n in b}) == []


@pytest.mark.parametrize("layout", ["renamed", "fused", "rotary", "scanned"])
def test_values_shuffled_within_every_tensor_leave_nothing_certified(tmp_path: Path, layout: str) -> None:
    make, change = LAYOUTS[layout]
    rng = np.random.default_rng(4)
    b = {n: rng.permutation(x.reshape(-1)).reshape(x.shape) for n, x in change(make()).items()}
    mapping = mapped(tmp_path, make(), b)
    assert [r.to for r in mapping.rules if r.how == "values" or r.evidence and r.evidence.certified] == []


def test_zero_biases_of_queries_and_keys_and_equal_gains_are_never_certified(tmp_path: Path) -> None:
    a = models.language_model()
    for name, x in a.items():
        if "norm" in name:
            a[name] = np.ones_like(x)
        if name.endswith(("q_proj.bias", "k_proj.bias")):
            a[name] = np.zeros_like(x)
    b = models.renamed(a)
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []
    told = [t for r in mapping.rules if r.how == "values" for t in r.to]
    assert [t for t in told if "norm" in t or t.endswith(("q_proj.bias", "k_proj.bias"))] == []


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_on_a_lattice_with_scales_beside_them_are_matched_to_no_other(tmp_path: Path, bits: int) -> None:
    a = models.language_model()
    b: Tensors = {}
    for name, x in models.renamed(a).items():
        if x.ndim < 2:
            b[name] = x
            continue
        scale = np.abs(x).max(axis=1, keepdims=True) / (2 ** (bits - 1) - 1)
        b[name], b[name.replace("weight", "weight_scale")] = np.round(x / scale), scale
    mapping = mapped(tmp_path, a, b)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    made = open_checkpoint(tmp_path / "made.safetensors")
    wanted = models.renamed(a)
    assert set(made.specs) == set(wanted)
    alike = {n: np.corrcoef(made.tensor(n).ravel(), x.ravel())[0, 1] for n, x in wanted.items()}
    assert [n for n, r in alike.items() if r < 0.97] == []


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_a_broken_tensor_is_laid_out_as_those_of_other_layers_are(tmp_path: Path, noise: float) -> None:
    a = models.language_model()
    b = models.rotary(a)
    suspect = models.noisy(b, noise, 6) if noise else dict(b)
    suspect["blocks.0.attn.wk.weight"] = np.full_like(b["blocks.0.attn.wk.weight"], np.nan)
    mapping = mapped(tmp_path, a, suspect)
    apply(mapping, open_checkpoint(tmp_path / "a.safetensors"), tmp_path / "made.safetensors")
    assert differing(tmp_path / "made.safetensors", b) == []
