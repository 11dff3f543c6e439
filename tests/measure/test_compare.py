"""Comparing checkpoints: statuses, figures, samples, threads, memory of names."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import TINY, decode
from lineage.measure import compare
from lineage.measure.compare import TensorRow
from lineage.measure.pairs import BLOCK
from tests.measure import oracle
from tests.measure.memory import Memory, Quantised, numbers, tuned

FLOATS = ("BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2")


def _row(a: NDArray[Any], b: NDArray[Any], words: tuple[str, str] = ("F32", "F32"), **options: Any) -> TensorRow:
    found = compare(Memory({"w": (words[0], a)}), Memory({"w": (words[1], b)}), threads=1, **options)
    return found.rows[0]


def _pair(seed: int = 1) -> tuple[Memory, Memory]:
    names = [f"layers.{i}.{part}.weight" for i in range(4) for part in ("attn", "mlp", "norm")]
    values = {name: numbers(seed + at, 32 if "norm" in name else 24, 32) for at, name in enumerate(names)}
    a = Memory({name: ("BF16", x) for name, x in values.items()})
    b = Memory({name: ("BF16", tuned(x, 100 + at)) for at, (name, x) in enumerate(values.items())})
    return a, b


@pytest.mark.parametrize(
    "words", [("BF16", "BF16"), ("F16", "F32"), ("F8_E4M3", "BF16"), ("F64", "F64"), ("I8", "F32")]
)
def test_a_row_holds_the_figures_of_the_plain_formulas(words: tuple[str, str]) -> None:
    a = numbers(1, 50, 60) * (20 if words[0] == "I8" else 1)
    one, two = Memory({"w": (words[0], a)}), Memory({"w": (words[1], tuned(a, 2))})
    row = compare(one, two, threads=1).rows[0]
    expected = oracle.figures(decode(one.codes("w"), words[0]), decode(two.codes("w"), words[1]), TINY.get(words[0], 1))
    for name, value in expected.items():
        assert getattr(row.metrics, name) == pytest.approx(value, rel=1e-6, abs=1e-12), name
    assert (row.dtype_a, row.dtype_b, row.shape, row.sampled) == (*words, (50, 60), None)


def test_statuses_tell_what_happened_to_each_tensor() -> None:
    x, y = numbers(1, 6, 4), numbers(2, 6, 4)
    a = Memory({"same": ("F32", x), "moved": ("F32", x), "gone": ("F32", x), "turned": ("F32", x), "tall": ("F32", x)})
    b = Memory(
        {"tall": ("F32", x[:3]), "turned": ("F32", x.T), "new": ("F32", x), "moved": ("F32", y), "same": ("F32", x)}
    )
    found = compare(a, b)
    assert {row.name: row.status for row in found.rows} == {
        "same": "unchanged", "moved": "changed", "gone": "removed", "turned": "shape-changed",
        "tall": "shape-changed", "new": "added",
    }  # fmt: skip
    assert found.statuses == {"unchanged": 1, "changed": 1, "added": 1, "removed": 1, "shape-changed": 2}
    assert found.differs
    added = next(row for row in found.rows if row.status == "added")
    assert (added.b_name, added.dtype_a, added.dtype_b, added.metrics) == ("new", None, "F32", None)


def test_axes_of_length_one_do_not_hide_the_figures() -> None:
    x = numbers(1, 8)
    row = _row(x, x.reshape(8, 1, 1))
    assert (row.status, row.shape_b, row.metrics and row.metrics.cosine) == ("shape-changed", (8, 1, 1), 1.0)


@pytest.mark.parametrize("word", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_a_cast_alone_is_no_change_in_either_direction(word: str) -> None:
    x = numbers(1, 100, 50)
    assert _row(x, x, ("F32", word)).status == "unchanged"
    assert _row(x, x, (word, "F32")).status == "unchanged"
    nudged = x.copy()
    nudged[3, 3] *= 1.5
    assert _row(x, tuned(x, 2, 0.2), ("F32", word)).status == "changed"
    if word in ("BF16", "F16"):
        assert _row(x, nudged, ("F32", word)).status == "changed"


def test_a_cast_that_rounds_another_way_is_told_by_its_size() -> None:
    x = numbers(1, 100, 50)
    twice = x.astype(np.float16).astype(np.float32)
    found = _row(x, twice, ("F32", "BF16"))
    assert found.metrics is not None
    assert found.status == "unchanged"


def test_one_changed_bit_is_a_change() -> None:
    a = np.ones(5000, np.float32)
    b = a.copy()
    b.view(np.uint32)[4999] ^= 1
    assert _row(a, b).status == "changed"


def test_the_threshold_is_absolute() -> None:
    a = np.ones(100, np.float32)
    b = a.copy()
    b[3] += np.float32(0.25)
    assert _row(a, b, threshold=0.25).status == "unchanged"
    assert _row(a, b, threshold=0.2).status == "changed"
    assert _row(a, b).status == "changed"


def test_nan_that_came_or_went_is_a_change_but_nan_that_stayed_is_none() -> None:
    a = np.ones(100, np.float32)
    b = a.copy()
    b[3] = np.nan
    assert _row(a, b).status == _row(b, a).status == _row(a, b, threshold=9.0).status == "changed"
    assert _row(b, b).status == "unchanged"
    row = _row(a, b)
    assert row.metrics is not None
    assert (row.metrics.nan_a, row.metrics.nan_b, row.metrics.changed, row.metrics.cosine) == (0, 1, 0.0, 1.0)
    everywhere = _row(a, np.full(100, np.inf, np.float32))
    assert everywhere.metrics is not None
    assert (everywhere.metrics.cosine, everywhere.metrics.nan_b, everywhere.status) == (None, 100, "changed")


def test_zeros_scalars_and_empty_tensors_give_null_not_nan() -> None:
    for shape in ((0, 16), (0,), (), (3,)):
        row = _row(np.zeros(shape, np.float32), np.zeros(shape, np.float32))
        assert row.status == "unchanged"
        text = msgspec.json.encode(row)
        assert b"NaN" not in text
        assert row.metrics is not None
        assert row.metrics.cosine is None


def test_large_tensors_are_measured_whole_and_ranked_by_a_sample() -> None:
    a = numbers(1, 3 * BLOCK + 77)
    b = tuned(a, 2)
    row = _row(a, b, ("BF16", "BF16"), sample=2**15)
    whole = _row(a, b, ("BF16", "BF16"))
    assert row.sampled == {"figures": ["spearman", "q01", "q05", "q50", "q95", "q99"], "size": 2**15}
    assert whole.sampled is None
    assert row.metrics is not None
    assert whole.metrics is not None
    assert row.metrics.rel_l2 == whole.metrics.rel_l2
    assert row.metrics.spearman == pytest.approx(whole.metrics.spearman, abs=1e-4)
    assert row.metrics.q95 == pytest.approx(whole.metrics.q95, rel=0.05)


def test_a_tiny_sample_of_a_large_tensor_works() -> None:
    a = numbers(1, 3 * BLOCK)
    for sample in (1, 2, 5, 100):
        row = _row(a, tuned(a, 2), sample=sample)
        assert row.sampled is not None
        assert row.sampled["size"] == sample


@pytest.mark.parametrize("sample", [2**22, 2**14])
def test_threads_change_nothing(sample: int) -> None:
    a, b = _pair()
    wide = numbers(50, 3, BLOCK)
    one = Memory({name: ("BF16", a.tensor(name)) for name in a.specs} | {"wide": ("BF16", wide)})
    two = Memory({name: ("BF16", b.tensor(name)) for name in b.specs} | {"wide": ("BF16", tuned(wide, 3))})
    found = [msgspec.json.encode(compare(one, two, threads=n, sample=sample)) for n in (1, 2, 5)]
    assert found[0] == found[1] == found[2]


def test_renaming_keeps_every_figure() -> None:
    a, b = _pair()
    renamed = Memory({f"x{at}": ("BF16", b.tensor(name)) for at, name in enumerate(b.specs)})
    pairs = [(name, f"x{at}") for at, name in enumerate(a.specs)]
    assert [r.metrics for r in compare(a, renamed, pairs).rows] == [r.metrics for r in compare(a, b).rows]


def test_order_of_tensors_changes_no_summary() -> None:
    a, b = _pair()
    turned = Memory({name: ("BF16", a.tensor(name)) for name in reversed(list(a.specs))})
    one, two = compare(a, b), compare(turned, b)
    for name in ("cosine", "rel_l2", "mean_abs", "changed"):
        assert one.overall[name] == two.overall[name]


def test_quantised_tensors_are_compared_by_value() -> None:
    x = numbers(1, 4, 64)
    row = compare(Quantised({"w": ("F16", x)}), Memory({"w": ("F16", x)})).rows[0]
    assert row.metrics is not None
    assert (row.dtype_a, row.status, row.metrics.cosine) == ("Q8_0", "unchanged", 1.0)


def test_groups_and_layers_pool_their_tensors() -> None:
    a, b = _pair()
    found = compare(a, b)
    assert set(found.groups) == {"attention", "mlp", "norm"}
    assert [layer["layer"] for layer in found.layers] == [0, 1, 2, 3]
    one, two = (np.concatenate([side.read(n) for n in side.specs if "attn" in n]) for side in (a, b))
    expected = oracle.figures(one, two, TINY["BF16"])
    for name in ("cosine", "rel_l2", "pearson", "mean_rel", "changed"):
        assert found.groups["attention"][name] == pytest.approx(expected[name], rel=1e-10), name
    assert found.overall["tensors"] == 12 - found.overall["apart"]["tensors"]
    cosines = [r.metrics.cosine for r in found.rows if r.metrics and r.group != "norm"]
    assert found.overall["mean"]["cosine"] == pytest.approx(np.mean([c for c in cosines if c is not None]))


def test_names_can_be_chosen() -> None:
    a, b = _pair()
    found = compare(a, b, wanted=lambda name: "mlp" in name)
    assert {row.group for row in found.rows} == {"mlp"}


def test_progress_ends_at_all_elements() -> None:
    a, b = _pair()
    seen: list[tuple[int, int]] = []
    compare(a, b, threads=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (a.parameters, a.parameters)


def test_a_failure_in_a_worker_reaches_the_caller() -> None:
    class Broken(Memory):
        def _codes(self, spec: Any, start: int, stop: int, out: Any) -> Any:
            raise OSError("the disk is gone")

    x = numbers(1, 4, 4)
    with pytest.raises(OSError, match="the disk is gone"):
        compare(Memory({"w": ("F32", x)}), Broken({"w": ("F32", x)}), threads=2)


def test_the_numpy_kernel_gives_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = _pair()
    fast = compare(a, b, sample=500)
    monkeypatch.setitem(sys.modules, "lineage.measure.native", None)
    slow = compare(a, b, sample=500)
    for one, two in zip(fast.rows, slow.rows, strict=True):
        assert (one.status, one.sampled) == (two.status, two.sampled)
        assert one.metrics is not None
        assert two.metrics is not None
        for name, value in msgspec.structs.asdict(one.metrics).items():
            assert value == pytest.approx(getattr(two.metrics, name), rel=1e-11), name
