"""A disguise that is undone joins the verdict: relatives are found through it, strangers are not accused."""

from __future__ import annotations

from pathlib import Path

import pytest

from lineage import api
from tests.judge import disguises
from tests.match.models import language_model, save


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


@pytest.mark.parametrize("disguise", [disguises.rotated, disguises.everything])
def test_a_disguised_stranger_stays_a_stranger(tmp_path: Path, disguise: disguises.Disguise) -> None:
    a = save(tmp_path / "a.safetensors", language_model(1))
    b = save(tmp_path / "b.safetensors", disguise(language_model(2), 3))
    verdict = api.investigate(a, b).document.verdict
    assert verdict.related is not True
    assert not {"rotated", "sign-flipped", "rescaled", "permuted"} & set(verdict.relations)
