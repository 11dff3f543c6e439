"""Weights that were trained anew: structure alone maps one architecture whole, and pads nothing for another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lineage.checkpoint import open_checkpoint
from lineage.filling import apply
from lineage.match import find_mapping
from lineage.match.anew import turning
from lineage.match.values import Values
from tests.match import models
from tests.match.models import Tensors, save
from tests.match.test_layouts import differing


def made_of(tmp_path: Path, a: Tensors, suspect: Tensors) -> Path:
    """What the map between A and a suspect trained anew makes of A."""
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", suspect)
    mapping = find_mapping(open_checkpoint(one), open_checkpoint(two))
    assert not any(r.evidence is not None and r.evidence.certified for r in mapping.rules)
    made = tmp_path / "made.safetensors"
    apply(mapping, open_checkpoint(one), made)
    return made


@pytest.mark.parametrize("layout", [models.kernels, models.stacked_kernels])
def test_square_matrices_go_the_way_of_the_others(tmp_path: Path, layout: Callable[[Tensors], Tensors]) -> None:
    a = models.encoder(1)
    assert differing(made_of(tmp_path, a, layout(models.encoder(2))), layout(a)) == []


def test_square_matrices_stay_where_the_others_stay(tmp_path: Path) -> None:
    a, b = models.encoder(1), models.encoder(2)

    def renamed(t: Tensors) -> Tensors:
        return {n.replace("encoder.layer.", "blocks.").replace("attention.self", "attn"): x for n, x in t.items()}

    assert differing(made_of(tmp_path, a, renamed(b)), renamed(a)) == []


def test_a_matrix_outside_the_layers_under_a_word_of_its_own_is_not_turned(tmp_path: Path) -> None:
    a, b = models.encoder(1), models.encoder(2)

    def changed(t: Tensors) -> Tensors:
        out = models.kernels(t)
        del out["pooler/dense/kernel"]
        return out | {"pooler/dense/table": t["pooler.dense.weight"]}

    assert differing(made_of(tmp_path, a, changed(b)), changed(a)) == []


def test_numbers_that_stand_for_roles_are_told_from_layers(tmp_path: Path) -> None:
    a, b = models.encoder(1), models.encoder(2)

    def numbered(t: Tensors) -> Tensors:
        made = {n.replace("intermediate.dense", "mlp.0").replace("encoder.layer", "blocks"): x for n, x in t.items()}
        return {n if "attention" in n else n.replace("output.dense", "mlp.2"): x for n, x in made.items()}

    assert differing(made_of(tmp_path, a, numbered(b)), numbered(a)) == []


def test_levels_of_a_decoder_that_are_numbered_from_the_other_end_are_told_by_their_widths(tmp_path: Path) -> None:
    def decoder(seed: int, name: str, part: str, *, back: bool) -> Tensors:
        rng = np.random.default_rng(seed)
        found: Tensors = {}
        for level, (narrow, wide) in enumerate([(8, 16), (16, 24), (24, 24), (24, 24)]):
            at = f"{name}.{3 - level if back else level}"
            for k in range(3):
                read = wide if k == 0 else narrow
                found[f"{at}.{part}.{k}.norm1.weight"] = rng.standard_normal(read, np.float32)
                found[f"{at}.{part}.{k}.conv1.weight"] = rng.standard_normal((narrow, read, 3, 3), np.float32)
                found[f"{at}.{part}.{k}.conv2.weight"] = rng.standard_normal((narrow, narrow, 3, 3), np.float32)
        return found

    a = decoder(1, "decoder.up", "block", back=False)
    other, true = (decoder(seed, "decoder.up_blocks", "resnets", back=True) for seed in (2, 1))
    assert differing(made_of(tmp_path, a, other), true) == []


def test_one_shape_in_common_is_no_map(tmp_path: Path) -> None:
    one, two = (
        save(tmp_path / "a.safetensors", models.encoder()),
        save(tmp_path / "b.safetensors", models.state_space(5)),
    )
    assert find_mapping(open_checkpoint(one), open_checkpoint(two)).rules == ()


def test_constants_of_a_copied_part_stay_beside_it_though_the_rest_is_a_stranger(tmp_path: Path) -> None:
    small = {n: np.ones_like(x) if "Norm" in n else x for n, x in models.encoder(1).items()}
    a = {"text." + n: x for n, x in small.items()} | models.encoder(2, width=96)
    b = {"te." + n.replace("layer.", "h."): x for n, x in small.items()} | models.state_space(3, width=160)
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    mapping = find_mapping(open_checkpoint(one), open_checkpoint(two))
    assert all(n.startswith("backbone.") for n in mapping.unmatched_target)


def test_shapes_tell_the_transposition_only_where_they_can(tmp_path: Path) -> None:
    def told(a: Tensors, b: Tensors) -> bool | None:
        ones = Values(open_checkpoint(save(tmp_path / "a.safetensors", a)))
        twos = Values(open_checkpoint(save(tmp_path / "b.safetensors", b)))
        return turning(ones, twos, list(a), list(b))

    up = {f"layers.{i}.up.weight": np.ones((8, 4), np.float32) for i in range(3)}
    down = {f"layers.{i}.down.weight": np.ones((4, 8), np.float32) for i in range(3)}
    assert told(up, {n: x.T for n, x in up.items()}) is True
    assert told(up, up) is False
    assert told(up | down, up | down) is None
