"""Disguises are undone where they are real, and nothing is made of strangers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lineage.filling import Filled
from lineage.judge.align import Aligned, align
from lineage.layout.document import read_mapping, write_mapping
from lineage.layout.mapping import Mapping as Layout
from tests.judge import disguises
from tests.judge.networks import by_name, memory
from tests.match.models import Tensors, language_model, noisy

UNDONE = [
    (disguises.signed_channels, {"permuted", "sign-flipped"}),
    (disguises.rotated, {"rotated"}),
    (disguises.neurons, {"permuted", "sign-flipped", "rescaled"}),
    (disguises.heads, {"permuted"}),
    (disguises.bases, {"rotated", "rescaled"}),
    (disguises.scaled_norms, {"rescaled"}),
    (disguises.everything, {"rotated", "permuted", "sign-flipped", "rescaled"}),
]


def aligned(a: Tensors, b: Tensors, layout: Layout | None = None) -> Aligned | None:
    one, two = memory(a), memory(b)
    return align(one, two, layout or by_name(one, two), seed=0, threads=1)


def found(a: Tensors, b: Tensors, layout: Layout | None = None) -> Aligned:
    result = aligned(a, b, layout)
    assert result is not None
    return result


def worst(result: Aligned, a: Tensors, b: Tensors) -> float:
    """The smallest cosine of B's tensors with A's under the refined mapping; -1 where one is missing."""
    filled = Filled(result.mapping, memory(a))
    if set(filled.specs) != set(b):
        return -1.0
    pairs = [(filled.tensor(n).ravel().astype(float), x.ravel().astype(float)) for n, x in b.items()]
    return float(min(x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in pairs))


@pytest.mark.parametrize(("disguise", "tags"), UNDONE, ids=[d.__name__ for d, _ in UNDONE])
def test_a_disguise_is_undone_and_named(disguise: disguises.Disguise, tags: set[str]) -> None:
    a = language_model(1)
    b = disguise(a, 5)
    result = found(a, b)
    assert result.holds
    assert set(result.tags) == tags
    assert worst(result, a, b) > 0.9999


@pytest.mark.parametrize("disguise", [d for d, _ in UNDONE], ids=[d.__name__ for d, _ in UNDONE])
def test_a_disguised_stranger_stays_a_stranger(disguise: disguises.Disguise) -> None:
    a, b = language_model(1), disguise(language_model(2), 5)
    one, two = memory(a), memory(b)
    given = by_name(one, two)
    result = align(one, two, given)
    assert result is not None
    assert not result.holds
    assert not result.tags
    assert result.mapping is given
    assert result.cosine < 0.3


def test_an_embedding_that_was_copied_makes_no_relatives_of_the_layers() -> None:
    a, b = language_model(1), disguises.rotated(language_model(2), 5)
    shared = {n: x for n, x in disguises.rotated({**language_model(2), **_ends(a)}, 5).items() if n in _ends(a)}
    assert not found(a, b | shared).holds


def _ends(tensors: Tensors) -> Tensors:
    return {n: tensors[n] for n in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight")}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25])
def test_training_alone_is_no_disguise(share: float) -> None:
    a = language_model(1)
    assert aligned(a, noisy(a, share, 3)) is None


def test_training_after_all_disguises_leaves_them_visible() -> None:
    a = language_model(1)
    b = noisy(disguises.everything(a, 5), 0.1, 3)
    result = found(a, b)
    assert result.holds
    assert {"rotated", "permuted"} <= set(result.tags)
    assert worst(result, a, b) > 0.9


def test_what_is_shown_was_not_fitted_on() -> None:
    a = language_model(1)
    result = found(a, disguises.everything(a, 5))
    assert result.shown
    assert not {s.tensor for s in result.shown} & {name for fit in result.fitted for name in fit.tensors}


def test_mispaired_layers_give_the_floor() -> None:
    a = language_model(1)
    clones = {n: a[n.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.0.")] for n in a}
    assert found(a, disguises.rotated(a, 5)).floor < 0.3
    assert not found(clones, disguises.rotated(clones, 5)).holds  # all layers alike: nothing tells a fit from chance


def test_the_exact_mapping_leaves_units_inside_layers_as_they_stand() -> None:
    a = language_model(1)
    b = disguises.rotated(disguises.neurons(a, 5), 6)
    result = found(a, b)
    assert result.exact_mapping is not None
    only = Filled(result.exact_mapping, memory(a)).tensor("model.layers.0.mlp.gate_proj.weight")
    dots = only @ b["model.layers.0.mlp.gate_proj.weight"].T
    order = np.random.default_rng(5).permutation(len(dots))
    assert (dots.argmax(axis=0) == order).all()


def test_channels_that_were_cut_are_found() -> None:
    a = language_model(1)
    kept = np.sort(np.random.default_rng(0).permutation(48)[:40])
    b = noisy(disguises.narrowed(a, kept), 0.05, 3)
    result = found(a, b)
    assert result.holds
    assert result.tags == ("width-pruned",)
    assert worst(result, a, b) > 0.99
    assert found(b, a).tags == ("width-grown",)


def test_fused_tensors_are_aligned_part_by_part() -> None:
    a = language_model(1)
    b, layout = disguises.fused(disguises.everything(a, 5))
    result = found(a, b, layout)
    assert result.holds
    assert worst(result, a, b) > 0.9999
    c, _ = disguises.fused(a)
    assert worst(found(c, b), c, b) > 0.9999


@pytest.mark.parametrize(
    ("network", "disguise"),
    [
        (disguises.transposed_model, disguises.permuted_transposed),
        (disguises.convolutions, disguises.permuted_convolutions),
    ],
)
def test_other_kinds_of_networks_are_put_back_in_order(
    network: Callable[[int], Tensors], disguise: disguises.Disguise
) -> None:
    a = network(1)
    b = disguise(a, 5)
    result = found(a, b)
    assert result.holds
    assert result.tags == ("permuted",)
    assert worst(result, a, b) == pytest.approx(1.0)
    assert not found(network(2), b).holds
    assert aligned(a, noisy(a, 0.1, 3)) is None


def test_the_refined_mapping_survives_its_file(tmp_path: Path) -> None:
    a = language_model(1)
    b = disguises.everything(a, 5)
    result = found(a, b)
    path = tmp_path / "mapping.yaml"
    write_mapping(result.mapping, path)
    assert read_mapping(path) == result.mapping


def test_large_strangers_are_told_before_anything_is_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lineage.judge.align.stack.LARGE", 16)
    a = language_model(1)
    stranger = found(a, language_model(2))
    assert not stranger.holds
    assert not stranger.shown
    relative = found(a, disguises.everything(a, 5))
    assert relative.holds
    assert worst(relative, a, disguises.everything(a, 5)) > 0.9999


@pytest.mark.parametrize("seed", [1, 2])
def test_a_disguise_is_undone_where_one_side_stores_its_embedding_once_and_the_other_as_its_head_too(seed: int) -> None:
    tied = {name: x for name, x in language_model(1).items() if name != "lm_head.weight"}
    other = language_model(seed) | {"lm_head.weight": language_model(seed)["model.embed_tokens.weight"]}
    words = {"model.embed_tokens.weight": "words", "lm_head.weight": "scores"}
    disguised = {words.get(name, name): x for name, x in disguises.everything(other, 5).items()}
    result = aligned(tied, disguised)
    assert (result is not None and result.holds) is (seed == 1)


def test_networks_of_blocks_that_nobody_could_take_apart_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lineage.judge.align.alignment.anatomies", lambda shapes: [])
    a = language_model(1)
    assert aligned(a, disguises.neurons(a, 5)) is None


def test_nothing_is_said_of_networks_without_a_common_space() -> None:
    assert aligned(language_model(1), disguises.convolutions(1)) is None
