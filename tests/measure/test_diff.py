"""The question behind `lineage diff`: what is paired with what, and what comes first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.layout.document import read_mapping
from lineage.measure.diff import diff, top_rows
from lineage.measure.metrics import FIGURES
from tests.measure.memory import Memory, numbers, tuned


def _layers(prefix: str, *, fused: bool = False) -> Memory:
    out: dict[str, tuple[str, NDArray[Any]]] = {}
    for i in range(3):
        q, k, v = (numbers(10 * i + at, 16, 24) for at in range(3))
        parts = {"qkv": np.concatenate([q, k, v])} if fused else {"q": q, "k": k, "v": v}
        out |= {f"{prefix}.{i}.{name}.weight": ("F32", x) for name, x in parts.items()}
        out[f"{prefix}.{i}.mlp.weight"] = ("F32", numbers(10 * i + 5, 40, 24))
    return Memory(out)


def test_equal_names_are_paired_by_name() -> None:
    found = diff(_layers("layers"), _layers("layers"))
    assert (found.matched_by, found.comparison.statuses["unchanged"]) == ("name", 12)


def test_where_no_name_agrees_values_are_matched_first() -> None:
    called: list[bool] = []
    found = diff(_layers("layers"), _layers("blocks", fused=True), matching=lambda: called.append(True))
    assert called == [True]
    assert found.matched_by == "values"
    assert found.comparison.statuses["unchanged"] == 6
    row = next(r for r in found.comparison.rows if r.b_name == "blocks.1.qkv.weight")
    assert row.name == "layers.1.q.weight + layers.1.k.weight + layers.1.v.weight"
    assert row.metrics is not None
    assert row.metrics.cosine == 1.0


def test_strangers_are_all_removed_and_added() -> None:
    a = Memory({"x": ("F32", numbers(1, 12, 18))})
    b = Memory({"y": ("F32", numbers(2, 7, 11))})
    found = diff(a, b)
    assert found.matched_by == "nothing"
    assert [(r.name, r.status) for r in found.comparison.rows] == [("x", "removed"), ("y", "added")]


def test_a_given_mapping_is_used(tmp_path: Path) -> None:
    file = tmp_path / "mapping.yaml"
    file.write_text(
        "lineage-mapping: 1\nsource: {name: a, tensors: 2}\ntarget: {name: b, tensors: 1}\nsizes: {}\nrules:\n"
        '  - {to: "y", from: ["x"], ops: [], how: given}\nunmatched: {source: [], target: []}\n'
    )
    x = numbers(1, 6, 4)
    found = diff(Memory({"x": ("F32", x), "z": ("F32", x)}), Memory({"y": ("F32", x)}), mapping=read_mapping(file))
    assert found.matched_by == "mapping"
    assert [(r.name, r.b_name, r.status) for r in found.comparison.rows] == [
        ("x", "y", "unchanged"),
        ("z", None, "removed"),
    ]


def test_the_record_is_a_plain_document_and_a_data_frame() -> None:
    a = _layers("layers")
    b = Memory({name: ("F32", tuned(a.tensor(name), at)) for at, name in enumerate(a.specs)})
    found = diff(a, b)
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(document) == ["a", "b", "summary", "tensors"]
    assert document["a"]["dtypes"] == {"F32": 12}
    assert list(document["tensors"][0]["metrics"]) == list(FIGURES)
    frame = found.to_pandas()
    assert frame["rel_l2"].between(0.015, 0.025).all()
    assert "12 changed" in repr(found)


@pytest.mark.parametrize(
    ("by", "first"), [("rel_l2", "noisy"), ("cosine", "noisy"), ("norm_ratio", "scaled"), ("max_abs", "noisy")]
)
def test_the_most_changed_tensors_come_first(by: str, first: str) -> None:
    x = numbers(1, 20, 20)
    a = Memory(dict.fromkeys(("same", "noisy", "scaled", "slightly"), ("F32", x)))
    b = Memory(
        {"same": ("F32", x), "noisy": ("F32", tuned(x, 2, 0.5)), "scaled": ("F32", x * np.float32(0.6))}
        | {"slightly": ("F32", tuned(x, 3, 0.01))}
    )
    rows = top_rows(diff(a, b).comparison, by, 10)
    assert (rows[0].name, len(rows)) == (first, 3)
    assert len(top_rows(diff(a, b).comparison, by, 1)) == 1


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="no figure 'cosinus'"):
        top_rows(diff(_layers("a"), _layers("a")).comparison, "cosinus", 1)
