"""Bytes are counted before they are read, and never pass the limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.metered import Meter, Metered, Spent
from tests.match.models import save


def opened(tmp_path: Path, limit: int) -> Metered:
    path = save(tmp_path / "a.safetensors", {"x": np.arange(100, dtype=np.float32)}, "BF16")
    return Metered(open_checkpoint(path), Meter(limit))


def test_the_stored_bytes_of_a_range_are_counted(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, 1000)
    assert checkpoint.read("x", 3, 7).tolist() == [3, 4, 5, 6]
    checkpoint.read_codes("x", 0, 10)
    assert checkpoint.meter.read == 28


def test_a_read_past_the_limit_is_refused_and_costs_nothing(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, 50)
    with pytest.raises(Spent, match="200 bytes wanted, 50 left"):
        checkpoint.tensor("x")
    assert (checkpoint.meter.read, checkpoint.meter.stopped) == (0, 1)


def test_a_tighter_limit_ends_with_its_block(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, 300)
    with checkpoint.meter.at_most(10), pytest.raises(Spent):
        checkpoint.tensor("x")
    assert len(checkpoint.tensor("x")) == 100


def test_parts_are_counted_too(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, 300)
    checkpoint.component("").read("x", 0, 5)
    assert checkpoint.meter.read == 10
