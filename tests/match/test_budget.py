"""A mapping from few bytes: what the limit allows is found, the rest is left alone and said so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.metered import Meter, Metered
from lineage.layout.mapping import Mapping
from lineage.match import find_mapping
from lineage.match.budget import Searched, search
from tests.match.models import LAYERS, Tensors, noisy, save

WIDTH, FFN, KV = 288, 640, 256


def tall(seed: int = 0) -> Tensors:
    """Matrices too large to be read whole in passing."""
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for i in range(LAYERS):
        shapes = {"q": (WIDTH, WIDTH), "k": (KV, WIDTH), "o": (WIDTH, WIDTH), "gate": (FFN, WIDTH), "up": (FFN, WIDTH)}
        for name, shape in (shapes | {"down": (WIDTH, FFN)}).items():
            out[f"layers.{i}.{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        out[f"layers.{i}.norm.weight"] = 1 + 0.2 * rng.standard_normal(WIDTH).astype(np.float32)
    return out


def joined(a: Tensors, *, alternating: bool = False) -> Tensors:
    """q and k in one, gate and up in one; layers under other names, in the other order."""
    out: Tensors = {}
    for i in range(LAYERS):
        t = {n.split(".")[2]: x for n, x in a.items() if n.startswith(f"layers.{i}.")}
        at = f"h.{LAYERS - 1 - i}."
        pair = np.stack([t["gate"], t["up"]], axis=1 if alternating else 0)
        out |= {
            at + "qk.weight": np.concatenate([t["q"], t["k"]]),
            at + "proj.weight": t["o"],
            at + "wide.weight": np.ascontiguousarray(pair.reshape(2 * FFN, WIDTH)),
            at + "narrow.weight": t["down"],
            at + "ln.weight": t["norm"],
        }
    return out


def searched(tmp_path: Path, a: Tensors, b: Tensors, limit: int) -> tuple[Searched, Meter]:
    """What a search of so many bytes finds, and its meter."""
    meter = Meter(limit)
    one, two = save(tmp_path / "a.safetensors", a, "BF16"), save(tmp_path / "b.safetensors", b, "BF16")
    found = search(Metered(open_checkpoint(one), meter), Metered(open_checkpoint(two), meter), meter)
    return found, meter


def said(mapping: Mapping) -> set[tuple[object, ...]]:
    """The rules without their evidence."""
    return {(rule.to, rule.source, tuple(map(repr, rule.ops))) for rule in mapping.rules}


@pytest.mark.parametrize("noise", [0.0, 0.05])
@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_strips_find_the_fusions_that_whole_rows_find(
    tmp_path: Path, turned: bool, alternating: bool, noise: float
) -> None:
    a, b = tall(), noisy(joined(tall(), alternating=alternating), noise, 1)
    a, b = (b, a) if turned else (a, b)
    found, meter = searched(tmp_path, a, b, 3_000_000)
    full = find_mapping(open_checkpoint(tmp_path / "a.safetensors"), open_checkpoint(tmp_path / "b.safetensors"))
    assert said(found.mapping) == said(full)
    assert found.unsettled == ()
    assert meter.read < 0.25 * sum(c.nbytes for c in (a | b).values()) / 2


def test_nothing_is_called_certified(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, tall(), joined(tall()), 3_000_000)
    assert not any(rule.evidence is None or rule.evidence.certified for rule in found.mapping.rules)


def test_strangers_are_paired_by_structure_only(tmp_path: Path) -> None:
    found, _ = searched(tmp_path, tall(), tall(1), 3_000_000)
    assert {rule.how for rule in found.mapping.rules} <= {"structure", "name"}


@pytest.mark.parametrize("limit", [0, 2_000, 60_000, 200_000])
def test_the_limit_is_never_passed_and_what_it_forbade_is_named(tmp_path: Path, limit: int) -> None:
    found, meter = searched(tmp_path, tall(), joined(tall()), limit)
    assert meter.read <= limit
    assert {n for n in found.mapping.unmatched_target if n.endswith(("qk.weight", "wide.weight"))} <= {*found.unsettled}
    assert found.unsettled
