"""A mapping run over a checkpoint gives the other layout: bit by bit, lazily, and back again."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from numpy.typing import NDArray

from lineage.checkpoint import open_checkpoint
from lineage.checkpoint.dtypes import decode
from lineage.checkpoint.write import write_safetensors
from lineage.commands.apply import apply_command
from lineage.errors import InputError
from lineage.filling import Filled, apply
from lineage.layout import lazy
from lineage.layout.chain import apply_chain
from lineage.layout.document import dump_mapping
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import (
    Add,
    Cast,
    Concat,
    Data,
    Each,
    Matmul,
    Operation,
    Pad,
    Rearrange,
    Scale,
    Slice,
    Split,
    Stack,
    Take,
    Unstack,
)
from tests.layout.memory import Memory
from tests.strategies import chains, codes


def rules(*given: tuple[str | tuple[str, ...], str | tuple[str, ...], tuple[Operation, ...]], **more: Any) -> Mapping:
    """A mapping of rules written as (to, from, ops)."""
    sides = [tuple((s,) if isinstance(s, str) else s for s in (to, source)) for to, source, _ in given]
    return Mapping(
        rules=tuple(Rule(to=t, source=s, ops=ops) for (t, s), (_, _, ops) in zip(sides, given, strict=True)), **more
    )


def floats(values: Any) -> NDArray[np.float32]:
    return np.array(values, np.float32)


def contents(checkpoint: Any) -> dict[str, list[Any]]:
    return {name: checkpoint.codes(name).tolist() for name in checkpoint.specs}


@given(chains())
def test_filling_lazily_gives_what_the_chain_gives_and_back(
    drawn: tuple[list[tuple[int, ...]], tuple[Operation, ...]],
) -> None:
    shapes, ops = drawn
    held = {f"a.{k}": codes(shape, k) for k, shape in enumerate(shapes)}
    wanted = apply_chain(ops, list(held.values()))
    mapping = rules((tuple(f"b.{k}" for k in range(len(wanted))), tuple(held), ops))
    a = Memory(held)
    filled = Filled(mapping, a)
    assert contents(filled) == {f"b.{k}": w.tolist() for k, w in enumerate(wanted)}
    assert {spec.dtype for spec in filled} <= {"U16"}
    assert contents(Filled.inverse(mapping, filled)) == contents(a)
    for (name, spec), whole in zip(Filled(mapping, a).specs.items(), wanted, strict=True):
        for start, stop in ((spec.size // 4, spec.size // 2), (spec.size // 2, -(-spec.size // 2))):
            assert np.array_equal(Filled(mapping, a).read_codes(name, start, stop), whole.ravel()[start:stop])


@given(chains())
def test_large_tensors_are_laid_out_slice_by_slice_to_the_same_end(
    drawn: tuple[list[tuple[int, ...]], tuple[Operation, ...]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "LARGE", 0)
        test_filling_lazily_gives_what_the_chain_gives_and_back.hypothesis.inner_test(drawn)  # type: ignore[attr-defined]


def test_one_layer_of_a_large_stack_is_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy, "LARGE", 0)
    a = Memory({"scan": codes((3, 2, 2, 2))})
    ops = (Rearrange("l a g b -> l (g b) a"), Split(1, parts=2), Unstack(0, over="i"))
    filled = Filled(rules((("gate.{i}", "up.{i}"), "scan", ops)), a)
    assert filled.codes("up.1").tolist() == codes((3, 2, 2, 2))[1, :, 1].T.tolist()
    assert a.reads == [("scan", 8, 16)]


def test_a_rename_reads_the_source_where_it_lies() -> None:
    a = Memory({"a.0": codes((4, 4))})
    filled = Filled(rules(("b.{i}", "a.{i}", ())), a)
    out = np.empty(4, np.uint16)
    assert filled.read_codes("b.0", 3, 7, out=out).tolist() == [3, 4, 5, 6]
    assert a.reads == [("a.0", 3, 7)]
    assert filled.origins == {"b.0": ("a.0",)}


def test_a_range_of_a_joined_tensor_reads_that_range_only() -> None:
    a = Memory({f"e.{k}": codes((2, 3), k) for k in range(4)})
    mapping = Mapping(rules=(Rule(to=("x",), source=("e.{e}",), ops=(Stack(0, over="e"),), where={"e": "0:4"}),))
    assert Filled(mapping, a).read_codes("x", 4, 8).tolist() == [4, 5, 1000, 1001]
    assert a.reads == [("e.0", 4, 6), ("e.1", 0, 2)]


def test_one_layer_of_a_scanned_stack_is_read_alone_even_if_it_is_turned() -> None:
    a = Memory({"scan": codes((3, 2, 2))})
    filled = Filled(rules(("l.{i}", "scan", (Unstack(0, over="i"), Rearrange("a b -> b a")))), a)
    assert filled.codes("l.1").tolist() == [[4, 6], [5, 7]]
    assert a.reads == [("scan", 4, 8)]


def test_a_computed_tensor_is_computed_once_for_all_its_blocks_and_threads() -> None:
    a = Memory({"a": codes((64, 64))})
    filled = Filled(rules(("b", "a", (Rearrange("a b -> b a"),))), a)
    workers = [threading.Thread(target=lambda k=k: filled.read_codes("b", k * 64, k * 64 + 64)) for k in range(16)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert a.reads == [("a", 0, 4096)]


_ORDER = [3, 0, 5, 1, 4, 2]
_VECTOR = Data(np.arange(1.0, 7.0))


@pytest.mark.parametrize(
    "ops",
    [
        (Take(0, _ORDER), Matmul("right", Data(np.arange(24.0).reshape(4, 6)))),
        (Matmul("left", Data(np.arange(36.0).reshape(6, 6))), Scale(Data(np.arange(4.0)), 1)),
        (Scale(_VECTOR, 0), Rearrange("a (b c) -> a (c b)", {"a": 6, "b": 2}), Add(_VECTOR, 0)),
        (Add(Data(np.arange(4.0)), 1), Cast("F16"), Take(1, [2, 0])),
        (Slice(1, 1, 3, of=4), Scale(2.0), Pad(1, 1, 0)),
    ],
)
def test_some_rows_of_a_computed_tensor_are_made_alone_and_alike(ops: tuple[Operation, ...]) -> None:
    held = {"a": floats(np.random.default_rng(0).standard_normal((6, 4)))}
    (whole,) = apply_chain(ops, list(held.values()))
    width = whole.shape[1]
    for row in range(6):
        a = Memory(held, "F32")
        found = Filled(rules(("b", "a", ops)), a).read("b", row * width + 1, (row + 1) * width)
        assert np.allclose(found, whole[row, 1:], rtol=1e-6)
        if not any(isinstance(op, Matmul) and op.side == "left" for op in ops):
            source = _ORDER[row] if ops[0] == Take(0, _ORDER) else row
            assert a.reads == [("a", 4 * source, 4 * source + 4)]


def test_rows_whose_input_has_to_be_made_whole_make_it_once() -> None:
    held = {"a": floats(np.arange(64).reshape(8, 8))}
    a = Memory(held, "F32")
    filled = Filled(rules(("b", "a", (Rearrange("a b -> b a"), Scale(Data(np.arange(8.0)), 1)))), a)
    blocks = [filled.read("b", at, at + 8) for at in range(0, 64, 8)]
    assert np.array_equal(blocks, held["a"].T * np.arange(8))
    assert a.reads == [("a", 0, 64)]


def test_codes_that_only_move_are_kept_bit_by_bit() -> None:
    strange = np.array([[0x7FC1, 0xFFFF], [0x8000, 0x0001]], np.uint16)
    filled = Filled(rules(("b", "a", (Rearrange("a b -> b a"),))), Memory({"a": strange}, "BF16"))
    assert filled.specs["b"].dtype == "BF16"
    assert np.array_equal(filled.codes("b"), strange.T)


def test_arithmetic_works_on_values_and_rounds_once() -> None:
    filled = Filled(rules(("b", "a", (Scale(1 / 3), Add(1)))), Memory({"a": floats([3, 6])}, words={"a": "BF16"}))
    assert filled.tensor("b").tolist() == [2.0, 3.0]
    assert filled.specs["b"].dtype == "BF16"


def test_a_range_of_a_cast_tensor_reads_that_range_only() -> None:
    a = Memory({"a": np.arange(8, dtype=np.float32)}, words={"a": "BF16"})
    filled = Filled(rules(("b", "a", (Add(1), Cast("F32")))), a)
    assert filled.read("b", 2, 5).tolist() == [3, 4, 5]
    assert a.reads == [("a", 2, 5)]


def test_whole_numbers_of_any_size_are_gathered_exactly() -> None:
    big = np.array([[2**60 + 1, 3], [5, 2**60 + 7]], np.int64)
    mapping = rules(("x", "w", (Slice(1, 0, 1, of=2),)), ("y", "w", (Slice(1, 1, 2, of=2),)))
    a = Memory({"w": big}, "I64")
    assert Filled.inverse(mapping, Filled(mapping, a)).codes("w").tolist() == big.tolist()


def test_a_cast_changes_the_dtype() -> None:
    filled = Filled(rules(("b", "a", (Cast("F16"),))), Memory({"a": floats([1, 0.1])}, words={"a": "F32"}))
    assert filled.specs["b"].dtype == "F16"
    assert filled.codes("b").tolist() == np.array([1, 0.1], np.float16).tolist()


@pytest.mark.parametrize(
    ("one", "two", "together"),
    [("BF16", "F32", "F32"), ("BF16", "F16", "F32"), ("F8_E4M3", "F8_E5M2", "F16"), ("F8_E4M3", "BF16", "BF16")],
)
def test_dtypes_that_meet_become_the_one_that_holds_both(one: str, two: str, together: str) -> None:
    values = floats([1.5, 0.25])
    a = Memory({"x": values, "y": values}, words={"x": one, "y": two})
    filled = Filled(rules(("b", ("x", "y"), (Concat(0),))), a)
    assert filled.specs["b"].dtype == together
    assert filled.tensor("b").tolist() == [1.5, 0.25, 1.5, 0.25]


def test_slices_in_several_rules_are_gathered_on_the_way_back() -> None:
    a = Memory({"qkv": codes((6, 2))})
    turn = Rearrange("(h d) k -> (d h) k", {"h": 2})
    mapping = rules(
        ("q", "qkv", (Slice(0, 0, 4, of=6), turn)),
        ("kv", "qkv", (Slice(0, 4, 6, of=6),)),
    )
    assert contents(Filled.inverse(mapping, Filled(mapping, a))) == contents(a)


def test_columns_in_several_rules_are_gathered_on_the_way_back() -> None:
    a = Memory({"w": codes((3, 5))})
    mapping = rules(("x", "w", (Slice(1, 0, 3, of=5),)), ("y", "w", (Take(1, [4, 3], of=5),)))
    assert contents(Filled.inverse(mapping, Filled(mapping, a))) == contents(a)


@pytest.mark.parametrize(
    "ops",
    [
        (Slice(0, 0, 4, of=6),),
        (Slice(0, 0, 4),),
        (Take(0, [0, 1, 3], of=6),),
        (Slice(1, 0, 1, of=2),),
        (Take(1, [1], of=2),),
    ],
)
def test_a_tensor_of_which_a_part_was_lost_is_not_offered(ops: tuple[Operation, ...]) -> None:
    mapping = rules(("x", "w", ops), ("y", "v", ()))
    back = Filled.inverse(mapping, Filled(mapping, Memory({"w": codes((6, 2)), "v": codes((2,))})))
    assert set(back.specs) == {"v"}
    assert back.missing == ("w",)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_padding_of_parts_that_several_rules_give_counts_as_known(value: float) -> None:
    whole = floats(np.arange(12).reshape(4, 3))
    halves = Memory({"x": whole[:2], "y": whole[2:]}, "F32")
    padded = Pad(axis=1, after=1, value=value)
    upper, lower = Take(0, [0, 1, -1, -1]), Take(0, [-1, -1, 0, 1])
    filled = Filled(rules(("t", "x", (upper, padded)), ("t", "y", (lower, padded))), halves)
    assert filled.tensor("t").tolist() == np.pad(whole, ((0, 0), (0, 1)), constant_values=value).tolist()


def test_a_tied_tensor_comes_back_from_the_first_rule_that_has_it_whole() -> None:
    mapping = rules(("head", "emb", (Slice(0, 0, 2, of=3),)), ("embed", "emb", ()), ("out", "emb", ()))
    filled = Filled(mapping, Memory({"emb": codes((3, 2))}))
    back = Filled.inverse(mapping, filled)
    assert back.codes("emb").tolist() == codes((3, 2)).tolist()
    assert back.origins["emb"] == ("embed",)


def test_padding_comes_off_again() -> None:
    mapping = rules(("x", "w", (Pad(0, 1, 2), Pad(1, 0, 1, 3.0))))
    a = Memory({"w": floats([[1, 2]])}, "F32")
    filled = Filled(mapping, a)
    assert filled.tensor("x").tolist() == [[0, 0, 3], [1, 2, 3], [0, 0, 3], [0, 0, 3]]
    assert Filled.inverse(mapping, filled).tensor("w").tolist() == [[1, 2]]


def test_what_does_not_fit_names_rule_and_tensor() -> None:
    mapping = rules(("a.{i}", "b.{i}", ()), ("x.{i}", "y.{i}", (Split(0, parts=4), Concat(0))))
    with pytest.raises(InputError, match=r"m\.yaml: rules\[1\]: x\.3: split: axis 0 of 6 does not divide"):
        Filled(mapping, Memory({"y.3": codes((6, 2))}), place="m.yaml")


def test_what_is_left_over_is_listed() -> None:
    a = Memory({"a": codes((2,)), "spare": codes((2,))})
    filled = Filled(rules(("b", "a", ()), ("d", "c", ()), unmatched_target=("new",)), a)
    assert (filled.unused, filled.missing) == (("spare",), ("d", "new"))


# -- files


def saved(path: Path, tensors: dict[str, NDArray[np.uint16]]) -> Path:
    write_safetensors(path, [(n, "BF16", t.shape) for n, t in tensors.items()], tensors.__getitem__)
    return path


def test_a_file_is_written_and_the_inverse_restores_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {f"l.{i}.{w}": codes((4, 2), i) for i in range(3) for w in "qkv"})
    ops = (Each({0: Rearrange("(h d) k -> (d h) k", {"h": 2})}), Concat(0))
    mapping = rules(("x.{i}", ("l.{i}.q", "l.{i}.k", "l.{i}.v"), ops))
    with open_checkpoint(path) as a:
        applied = apply(mapping, a, tmp_path / "b.safetensors")
        assert (applied.written, applied.complete) == (3, True)
        with open_checkpoint(tmp_path / "b.safetensors") as b:
            apply(mapping, b, tmp_path / "c.safetensors", inverse=True)
        with open_checkpoint(tmp_path / "c.safetensors") as c:
            assert contents(c) == contents(a)


def test_strict_writes_nothing_where_tensors_are_left_over(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": codes((2, 2)), "spare": codes((2, 2))})
    with open_checkpoint(path) as a:
        applied = apply(rules(("b", "a", ())), a, tmp_path / "b.safetensors", strict=True)
    assert applied.unused == ("spare",)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_mapping_of_other_models_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": codes((2, 2))})
    with open_checkpoint(path) as a, pytest.raises(InputError, match=r"no rule finds its tensors in .*a\.safetensors"):
        apply(rules(("b", "z", ())), a, tmp_path / "b.safetensors")


def test_the_input_is_never_replaced(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": codes((2, 2))})
    before = path.read_bytes()
    with open_checkpoint(path) as a, pytest.raises(InputError, match="the output is an input"):
        apply(rules(("b", "a", ())), a, path)
    assert path.read_bytes() == before


def test_values_survive_the_decoding_of_what_is_computed() -> None:
    held = np.array([[0x3F80, 0x4000], [0x4040, 0x4080]], np.uint16)
    filled = Filled(rules(("b", "a", (Rearrange("a b -> b a"),))), Memory({"a": held}, "BF16"))
    assert np.array_equal(filled.tensor("b"), decode(held, "BF16").T)


# -- the command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    saved(tmp_path / "a.safetensors", {"a.0": codes((2, 2)), "a.1": codes((2, 2), 1), "spare": codes((2, 2))})
    mapping = rules(("b.{i}", "a.{i}", (Rearrange("a b -> b a"),)), unmatched_target=("new\x1b[2J",))
    (tmp_path / "m.yaml").write_text(dump_mapping(mapping))
    return tmp_path


def command(folder: Path, *words: str) -> Result:
    """`lineage apply` in the folder."""
    paths = [str(folder / w) if "." in w else w for w in words]
    return CliRunner().invoke(apply_command, paths, standalone_mode=False)


def test_the_command_writes_the_file_and_says_what_was_left(folder: Path) -> None:
    result = command(folder, "m.yaml", "a.safetensors", "-o", "b.safetensors")
    assert (result.return_value, result.exception, result.stdout) == (0, None, "")
    assert "1 tensors of" in result.stderr
    assert "no rule reads: spare" in result.stderr
    assert r"could not be filled: new\x1b[2J" in result.stderr
    with open_checkpoint(folder / "b.safetensors") as b:
        assert set(b.specs) == {"b.0", "b.1"}


def test_the_command_with_strict_writes_nothing_and_ends_with_one(folder: Path) -> None:
    result = command(folder, "m.yaml", "a.safetensors", "-o", "b.safetensors", "--strict", "--quiet")
    assert (result.return_value, result.stderr) == (1, "")
    assert not (folder / "b.safetensors").exists()


def test_the_command_goes_back_with_inverse(folder: Path) -> None:
    command(folder, "m.yaml", "a.safetensors", "-o", "b.safetensors")
    result = command(folder, "m.yaml", "b.safetensors", "-o", "c.safetensors", "--inverse")
    assert result.return_value == 0
    with open_checkpoint(folder / "a.safetensors") as a, open_checkpoint(folder / "c.safetensors") as c:
        assert contents(c) == {name: values for name, values in contents(a).items() if name != "spare"}


def test_the_command_never_replaces_the_mapping(folder: Path) -> None:
    os.link(folder / "m.yaml", folder / "m.safetensors")
    result = command(folder, "m.yaml", "a.safetensors", "-o", "m.safetensors")
    assert isinstance(result.exception, InputError)
    assert "the output is an input" in str(result.exception)
