"""A disguise that is undone joins the verdict: relatives are found through it, strangers are not accused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage import api
from lineage.judge.align.records import Aligned, Trait
from lineage.judge.relations.finding import Finding
from lineage.judge.undone import with_alignment
from lineage.judge.verdict import Verdict
from lineage.layout.mapping import Mapping
from tests.judge import disguises
from tests.match.models import Tensors, language_model, save


@pytest.mark.parametrize(
    ("disguise", "tag"), [(disguises.rotated, "rotated"), (disguises.signed_channels, "sign-flipped")]
)
def test_a_disguised_copy_is_found_and_its_disguise_named(
    tmp_path: Path, disguise: disguises.Disguise, tag: str
) -> None:
    base = language_model(1)
    a = save(tmp_path / "a.safetensors", base)
    b = save(tmp_path / "b.safetensors", disguise(base, 3))
    report = api.investigate(a, b)
    verdict = report.document.verdict
    assert verdict.related is True
    assert tag in verdict.relations
    assert any("disguise was undone" in reason for reason in verdict.reasons)


def tuned(tensors: Tensors, size: float) -> Tensors:
    """Moved in a few directions, each matrix by a share of its own."""
    rng = np.random.default_rng(8)

    def step(x: NDArray[Any]) -> NDArray[Any]:
        found = (
            rng.standard_normal((x.shape[0], 9)) * np.exp(-0.2 * np.arange(9)) @ rng.standard_normal((9, x.shape[1]))
        )
        return np.asarray(found * size * np.exp(0.4 * rng.standard_normal()) * x.std() / found.std())

    return {n: np.asarray(x + step(x), np.float32) if x.ndim == 2 else x for n, x in tensors.items()}


def rounded(tensors: Tensors) -> Tensors:
    """The layers in 8 bits by rows."""
    found = dict(tensors)
    for name, x in tensors.items():
        if "proj" in name and x.ndim == 2:
            step = np.abs(x).max(axis=1, keepdims=True) / 127
            found[name] = np.asarray(np.round(x / step) * step, np.float32)
    return found


@pytest.mark.parametrize("disguise", [disguises.rotated, disguises.neurons, disguises.everything])
def test_training_beside_a_disguise_is_told_from_its_rounding(tmp_path: Path, disguise: disguises.Disguise) -> None:
    base = language_model(1)
    a = save(tmp_path / "a.safetensors", base)
    for name, b, trained in (("pure", base, False), ("tuned", tuned(base, 0.1), True)):
        found = api.investigate(a, save(tmp_path / f"{name}.safetensors", disguise(b, 3), "BF16")).document.verdict
        assert ("fine-tuned" in found.relations) is trained
        assert ("differ a little" in " ".join(found.reasons)) is trained


def test_a_disguised_copy_in_8_bits_is_quantized_and_not_tuned(tmp_path: Path) -> None:
    base = language_model(1)
    a = save(tmp_path / "a.safetensors", base)
    b = save(tmp_path / "b.safetensors", rounded(disguises.rotated(base, 3)))
    relations = api.investigate(a, b).document.verdict.relations
    assert {"rotated", "quantized"} <= set(relations)
    assert "fine-tuned" not in relations


@pytest.mark.parametrize("disguise", [disguises.rotated, disguises.everything])
def test_a_disguised_stranger_stays_a_stranger(tmp_path: Path, disguise: disguises.Disguise) -> None:
    a = save(tmp_path / "a.safetensors", language_model(1))
    b = save(tmp_path / "b.safetensors", disguise(language_model(2), 3))
    verdict = api.investigate(a, b).document.verdict
    assert verdict.related is not True
    assert not {"rotated", "sign-flipped", "rescaled", "permuted"} & set(verdict.relations)


def test_an_order_of_channels_is_no_rotation(tmp_path: Path) -> None:
    base = language_model(1)
    a = save(tmp_path / "a.safetensors", base)
    b = save(tmp_path / "b.safetensors", disguises.signed_channels(tuned(base, 0.5), 3))
    relations = api.investigate(a, b).document.verdict.relations
    assert {"permuted", "sign-flipped"} <= set(relations)
    assert "rotated" not in relations


def test_what_a_disguise_made_look_strange_is_no_longer_called_partly_shared() -> None:
    looked = Finding("partially-shared", 1.0, "half of the matrices are A's, the others are not")
    verdict = Verdict(
        class_="transformed", related=True, log10_p=-90.0, coverage=1.0, relations=("partially-shared",),
        reasons=("units agree.", "Half of the matrices are A's, the others are not."), findings=(looked,),
    )  # fmt: skip
    aligned = Aligned(
        mapping=Mapping(), exact_mapping=None, fitted=(), shown=(), cosine=1.0, floor=0.1, holds=True,
        traits=(Trait("permuted", "channels stand in another order"),), note="aligned by order",
    )  # fmt: skip
    found = with_alignment(verdict, aligned, [])
    assert found.relations == ("permuted",)
    assert not any("others are not" in reason for reason in found.reasons)
    assert with_alignment(verdict, aligned, [looked]).relations == ("permuted", "partially-shared")
