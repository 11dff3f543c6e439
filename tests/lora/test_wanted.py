"""What a conversion is held against: rules on whole arrays and on single places agree, and a mistake is seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.mapping import Rule
from lineage.layout.operations import Add, Operation, Split, Take
from lineage.lora import verify as verification
from lineage.lora.carry import carried
from lineage.lora.converting import convert, written_for
from lineage.lora.grammar import grammar
from lineage.lora.held import Target
from lineage.lora.source import Base
from lineage.lora.storing import store
from lineage.lora.verify import VerificationError, verify
from lineage.lora.wanted import Known, Ruled
from tests.lora.builders import base, delta_of, mapping, random, save
from tests.strategies import chains


@given(chains(), st.sampled_from(["lora", "loha", "lokr"]))
def test_places_of_a_rule_are_the_places_of_the_whole(
    chain: tuple[list[Shape], tuple[Operation, ...]], kind: str
) -> None:
    shapes, ops = chain
    assume(all(0 not in shape for shape in shapes))
    names = [f"s{k}.weight" for k in range(len(shapes))]
    deltas = {n: delta_of(kind, s, k) for k, (n, s) in enumerate(zip(names, shapes, strict=True))}
    outs = len(_results(shapes, ops))
    rule = Rule(to=tuple(f"t{k}.weight" for k in range(outs)), source=tuple(names), ops=ops)
    model = Base(dict(zip(names, shapes, strict=True)))
    carry = carried(deltas, LayoutMapping(rules=(rule,)), model)
    wanted = Ruled(carry, deltas, model)
    for name, delta in carry.deltas.items():
        if 0 in delta.shape or not delta.shape:
            continue
        places = [p.reshape(-1) for p in np.indices(delta.shape)]
        found = wanted.at(name, places)
        assert found is not None
        assert np.array_equal(found.reshape(delta.shape), wanted.dense(name))
        assert np.array_equal(delta.at(places), found)


def _results(shapes: list[Shape], ops: tuple[Operation, ...]) -> list[Shape]:
    given_: list[Shape] = list(shapes)
    for op in ops:
        given_ = list(op.shapes(given_))
    return given_


def test_constants_that_an_operation_adds_are_no_part_of_a_difference() -> None:
    deltas = {"a.weight": delta_of("lora", (4, 6))}
    model = Base({"a.weight": (4, 6)})
    carry = carried(deltas, mapping((("b.weight",), ("a.weight",), (Add(1.0),))), model)
    assert np.array_equal(Ruled(carry, deltas, model).dense("b.weight"), deltas["a.weight"].dense())


@pytest.mark.parametrize("whole", [1, 1 << 20])
def test_large_and_small_tensors_are_verified_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int
) -> None:
    monkeypatch.setattr(verification, "WHOLE", whole)
    arrays = {"lora_unet_qk.lora_down.weight": random(0, 2, 6), "lora_unet_qk.lora_up.weight": random(1, 8, 2)}
    rules = mapping((("q.weight", "k.weight"), ("qk.weight",), (Take(0, [(4, 8, 1), (0, 4, 1)]), Split(0, 2))))
    done = convert(
        save(tmp_path / "l.safetensors", arrays), rules, "kohya", tmp_path / "o.safetensors",
        base=base(tmp_path, "a", {"qk.weight": (8, 6)}),
    )  # fmt: skip
    assert (done.verified, done.largest_error < 1e-6) == (2, True)


@pytest.mark.parametrize("whole", [1, 1 << 20])
def test_one_wrong_row_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    monkeypatch.setattr(verification, "WHOLE", whole)
    right = delta_of("lora", (64, 8))
    wrong = {"q.weight": right.changed(lambda t: t.taken(0, np.array([1, *range(1, 64)])), (64, 8))}
    written = written_for(grammar("kohya"), wrong, Target({"q.weight": (64, 8)}), {})
    model = Base({"q.weight": (64, 8)})

    def check(path: Path) -> None:
        verify(path, grammar("kohya"), model, {"q.weight": right}, Known({"q.weight": right}))

    with pytest.raises(VerificationError, match="away from the one wanted"):
        store(written, tmp_path / "o.safetensors", check)
    assert not list(tmp_path.iterdir())
