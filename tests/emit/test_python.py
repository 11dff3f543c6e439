"""Emitted Python does what `lineage apply` does, bit by bit, there and back, whatever the mapping holds."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from lineage.emit import EMITTERS, emit
from lineage.emit.steps import DTYPES, EXPRESSIONS
from lineage.errors import InputError
from lineage.layout.axes import LayoutError
from lineage.layout.document import parse_mapping
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import (
    OPERATIONS,
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
from lineage.layout.templates import literal
from tests.emit.running import agree, emitted, loaded, of_tensors, random, tensor
from tests.layout.test_operations import CASES, ROTATION
from tests.strategies import chains, codes, names, patterns

#: every dtype but those whose random values could not tell a wrong rounding
WORDS = [word for word in DTYPES if word != "BOOL"]


def one(to: str | tuple[str, ...], source: str | tuple[str, ...], *ops: Operation, **more: Any) -> Mapping:
    """A mapping of one rule."""
    sides = [(s,) if isinstance(s, str) else s for s in (to, source)]
    return Mapping(rules=(Rule(to=sides[0], source=sides[1], ops=ops, **more),))


def test_every_operation_has_an_expression() -> None:
    assert EXPRESSIONS.keys() | {"each"} == OPERATIONS.keys()


@pytest.mark.parametrize("word", ["BF16", "F32"])
@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_every_operation_gives_what_apply_gives(op: Operation, shapes: list[tuple[int, ...]], word: str) -> None:
    count = len(op.shapes(shapes))
    mapping = one(tuple(f"b.{k}" for k in range(count)), tuple(f"a.{k}" for k in range(len(shapes))), op)
    assert len(agree(mapping, {f"a.{k}": random(s, word, k) for k, s in enumerate(shapes)}, word)) <= count


@given(chains(), st.sampled_from(WORDS))
def test_chains_give_what_apply_gives(drawn: tuple[list[tuple[int, ...]], tuple[Operation, ...]], word: str) -> None:
    shapes, ops = drawn
    given_values = {f"a.{k}": random(shape, word, k) for k, shape in enumerate(shapes)}
    count = 0
    for op in ops:
        shapes = op.shapes(shapes)
    count = len(shapes)
    assert (
        len(agree(one(tuple(f"b.{k}" for k in range(count)), tuple(given_values), *ops), given_values, word)) == count
    )


@st.composite
def computed(draw: st.DrawFn) -> tuple[tuple[int, int], tuple[Operation, ...]]:
    """A matrix's shape and a chain over it that computes, casts, cuts and pads."""
    rows, columns = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    values = st.sampled_from([0.5, -2.0, 3.0, 0.1, 1e-3, 7.25])
    ops: list[Operation] = []
    shape = (rows, columns)
    for _ in range(draw(st.integers(1, 4))):
        axis = draw(st.integers(0, 1))
        length = shape[axis]
        vector = Data(draw(st.lists(values, min_size=length, max_size=length)))
        turn = Data(
            np.eye(length)[list(draw(st.permutations(range(length))))] * draw(st.sampled_from([1.0, -0.5, 2.0]))
        )
        kinds: list[Operation] = [
            Scale(draw(values)), Add(draw(values)), Scale(vector, axis), Add(vector, axis - 2),
            Cast(draw(st.sampled_from(["BF16", "F16", "F32", "F64", "F8_E4M3", "F8_E5M2", "I16"]))),
            Matmul("left" if axis == 0 else "right", turn), Pad(axis, 1, 0, draw(st.sampled_from([0.0, 2.5]))),
            Slice(axis, 0, length, of=length), Take(axis, [*range(length), 0], of=length), Rearrange("a b -> b a"),
        ]  # fmt: skip
        ops.append(draw(st.sampled_from(kinds)))
        (shape,) = ops[-1].shapes([shape])  # type: ignore[assignment]
    return (rows, columns), tuple(ops)


@given(computed(), st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I32", "U8"]))
def test_computations_round_where_apply_rounds(drawn: tuple[tuple[int, int], tuple[Operation, ...]], word: str) -> None:
    shape, ops = drawn
    assert len(agree(one("b", "a", *ops), {"a": random(shape, word)}, word)) == 1


@given(patterns(), st.sampled_from(["", "...", "... "]))
def test_patterns_become_methods_of_torch(drawn: tuple[str, dict[str, int], tuple[int, ...]], rest: str) -> None:
    pattern, lengths, shape = drawn
    if rest:
        left, right = pattern.split(" -> ")
        pattern, shape = (f"{left} ... -> ... {right}", (*shape, 2, 3))
    agree(one("b", "a", Rearrange(pattern, lengths)), {"a": codes(shape)})


@pytest.mark.parametrize(
    "pattern", ["a ... b -> b ... a", "... (a x) b -> ... a b x", "1 a ... -> a ... 1", "... -> ... 1"]
)
@pytest.mark.parametrize("shape", [(1, 4, 6), (1, 2, 3, 4, 6)])
def test_an_ellipsis_stands_for_any_axes(pattern: str, shape: tuple[int, ...]) -> None:
    agree(one("b", "a", Rearrange(pattern, {"x": 2})), {"a": codes(shape)})


@pytest.mark.parametrize(
    "words", [("F32", "BF16"), ("BF16", "F16"), ("F8_E4M3", "F8_E5M2"), ("I8", "U8"), ("I32", "F64")]
)
def test_tensors_of_two_dtypes_get_the_one_that_holds_both(words: tuple[str, str]) -> None:
    given_values = {"a": random((2, 3), words[0]), "c": random((2, 3), words[1], 1)}
    agree(one("b", ("a", "c"), Concat(1)), given_values, dict(zip("ac", words, strict=True)))


#: rules with numbers in their names, and the names that they are tried on
NUMBERED: dict[str, tuple[Mapping, list[str]]] = {
    "one number": (one("b.{i}", "a.{i}"), ["a.0", "a.10", "a.2", "a.03", "a.x", "a.1.b", "c.1"]),
    "several tensors": (one("b.{i}", ("a.{i}.q", "a.{i}.k"), Concat(0)), ["a.0.q", "a.0.k", "a.1.q", "a.2.k"]),
    "a name without number beside": (one("b.{i}", ("a.{i}", "c"), Concat(0)), ["a.0", "a.3", "c"]),
    "a missing one": (one("b.{i}", ("a.{i}", "c"), Concat(0)), ["a.0"]),
    "two templates with numbers of their own": (one("b.{i}.{j}", ("a.{i}", "c.{j}"), Concat(0)), ["a.0", "a.1", "c.5"]),
    "a sum": (one("b.{i+1}", "a.{i}"), ["a.0", "a.4"]),
    "a sum taken apart": (one("b.{i}", "a.{i+2}"), ["a.0", "a.1", "a.2", "a.5"]),
    "from the end": (one("b.{i}", "a.{11-i}"), ["a.0", "a.11", "a.12"]),
    "mixed radix": (one("d.{b}.{r}", "x.{3*b+r+1}"), [f"x.{k}" for k in range(9)]),
    "mixed radix back": (one("x.{3*b+r+1}", "d.{b}.{r}"), ["d.0.0", "d.0.2", "d.1.1"]),
    "a number that repeats": (one("b.{i}", "a.{i}.c.{i}"), ["a.0.c.0", "a.1.c.2"]),
    "a number and a sum of it": (one("b.{i}", "a.{i}.c.{i+1}"), ["a.0.c.1", "a.1.c.1"]),
    "where": (one("b.{i}", "a.{i}", where={"i": "0:2,5"}), [f"a.{k}" for k in range(7)]),
    "where on a sum": (one("b.{i}", "a.{i+1}", where={"i": "1:3"}), [f"a.{k}" for k in range(7)]),
    "a table": (one("b.{j}", "a.{i}", table={"i": (0, 3), "j": (5, 1)}), ["a.0", "a.3", "a.5"]),
    "a table of one": (one("b.{i}", "a.{i}", table={"i": (3,)}), ["a.0", "a.3"]),
    "a table and where": (one("b.{j}", "a.{i}", table={"i": (0, 3), "j": (5, 1)}, where={"j": "1"}), ["a.0", "a.3"]),
    "a table beside a free number": (
        one("b.{j}.{k}", "a.{i}.{k}", table={"i": (0, 3), "j": (5, 1)}), ["a.0.0", "a.0.7", "a.3.1"],
    ),
    "a list": (one("b.{i}", "a.{i}.{e}", Stack(over="e")), ["a.0.0", "a.0.1", "a.1.0", "a.2.1", "a.3.0", "a.3.2"]),
    "a list that where orders": (
        one("b.{i}", "a.{i}.{e}", Stack(over="e"), where={"e": "2,0:2"}), [f"a.4.{e}" for e in range(4)],
    ),
    "a list joined": (one("b", "a.{e}", Concat(0, over="e"), where={"e": "0:3"}), ["a.0", "a.1", "a.2"]),
    "a list with a gap in where": (one("b", "a.{e}", Stack(over="e"), where={"e": "0:3"}), ["a.0", "a.2"]),
    "two lists side by side": (
        one("b.{i}", ("a.{i}.{e}.u", "a.{i}.{e}.v"), Concat(0), Stack(over="e"), where={"e": "0:2"}),
        [f"a.{i}.{e}.{w}" for i in range(2) for e in range(2) for w in "uv"] + ["a.2.0.u", "a.2.1.u", "a.2.0.v"],
    ),
    "a list beside a tensor": (one("b", ("a.{e}", "c"), Concat(0), Stack(over="e")), ["a.0", "a.1", "c"]),
    "a list of sums": (one("b", "a.{2*e+1}", Stack(over="e")), ["a.1", "a.3", "a.2"]),
    "a list of lists": (
        one("b.{i}", "a.{i}.{e}.{f}", Stack(over="f"), Concat(1, over="e")),
        [f"a.{i}.{e}.{f}" for i in range(2) for e in range(2) for f in range(3)] + ["a.2.0.0", "a.2.1.1"],
    ),
    "the outer list first": (
        one("b", "a.{e}.{f}", Stack(over="e"), Stack(over="f")), [f"a.{e}.{f}" for e in range(2) for f in range(3)],
    ),
    "a list made": (one("b.{i}.{e}", "a.{i}", Unstack(over="e")), ["a.0", "a.1"]),
    "a list made and numbered": (one("b.{e+1}", "a", Unstack(over="e"), where={"e": "2:5"}), ["a"]),
    "lists made and split": (
        one(("b.{i}.{e}.u", "b.{i}.{e}.v"), "a.{i}", Unstack(over="e"), Split(0, sizes=(1, 2))),
        ["a.0", "a.1"],
    ),
    "lists of lists made": (one("b.{e}.{f}", "a", Unstack(over="e"), Unstack(over="f")), ["a"]),
    "placeholders that are names of the code": (
        one("b.{v0}.{T_1}.{e_values}.{rows_0}", "a.{rows_0}.{v0}.{e}.{e_values}", Stack(over="e"), Unstack(over="T_1")),
        [f"a.1.2.{e}.{k}" for e in range(2) for k in range(2)],
    ),
    "placeholders that are words of Python": (one("b.{for}.{x}.{len}", "a.{len}.{x}.{for}"), ["a.1.2.3"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", NUMBERED)
def test_numbers_in_names_are_found_as_apply_finds_them(kind: str) -> None:
    mapping, held = NUMBERED[kind]
    agree(mapping, {name: codes((3, 3), k) for k, name in enumerate(held)})


@pytest.mark.parametrize("kind", NUMBERED)
def test_and_on_the_targets_names(kind: str) -> None:
    mapping, held = NUMBERED[kind]
    try:
        back = mapping.rules[0].inverse()
    except LayoutError:
        pytest.skip("has no inverse")
    agree(Mapping(rules=(back,)), {name.replace("a.", "b."): codes((3, 3), k) for k, name in enumerate(held)})


def test_parts_that_several_rules_know_make_one_tensor() -> None:
    mapping = Mapping(rules=(
        Rule(to=("q",), source=("qkv",), ops=(Slice(0, 0, 2, of=4),)),
        Rule(to=("k",), source=("qkv",), ops=(Slice(0, 2, of=4), Cast("F32"))),
        Rule(to=("half",), source=("w",), ops=(Slice(0, 0, 2, of=4),)),
    ))  # fmt: skip
    given_values = {"qkv": random((4, 3), "BF16"), "w": random((4, 3), "BF16")}
    found = agree(mapping, given_values, "BF16")
    space = loaded(emitted(mapping))
    back = of_tensors(space["revert"](space["convert"]({n: tensor(v, "F32") for n, v in given_values.items()})))
    assert back.keys() == {"qkv"}
    assert found.keys() == {"q", "k", "half"}


def test_the_first_of_several_rules_gives_a_target() -> None:
    rules = tuple(Rule(to=("b",), source=(name,)) for name in ("x", "y", "z"))
    found = agree(Mapping(rules=rules), {"y": codes((2,), 1), "z": codes((2,), 2)})
    assert found["b"][2] == codes((2,), 1).tobytes()


def test_results_lie_in_memory_of_their_own() -> None:
    mapping = Mapping(rules=(
        Rule(to=("q", "k"), source=("qk",), ops=(Split(0, parts=2),)),
        Rule(to=("head",), source=("embed",)),
        Rule(to=("tied",), source=("embed",)),
    ))  # fmt: skip
    state = {"qk": torch.arange(8.0).reshape(4, 2), "embed": torch.ones(3)}
    found = loaded(emitted(mapping))["convert"](state)
    assert len({x.untyped_storage().data_ptr() for x in found.values()}) == 4
    assert all(x.is_contiguous() for x in found.values())


@pytest.mark.parametrize(
    ("ops", "shape", "words"),
    [
        ((Slice(0, 0, 2, of=4),), (5, 2), "axis 0 has 5, expected 4"),
        ((Take(0, [1, 0], of=2),), (5, 2), "axis 0 has 5, expected 2"),
        ((Rearrange("a 1 -> a"),), (5, 2), "axis 1 of 2 should have length one"),
        ((Scale(Data([1.0, 2.0]), 0),), (5, 2), "2 values for axis 0 of 5"),
        ((Unstack(0),), (5, 2), "5 tensors for 1 names"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(ops: tuple[Operation, ...], shape: tuple[int, ...], words: str) -> None:
    convert = loaded(emitted(one("b", "a", *ops)))["convert"]
    with pytest.raises(ValueError, match=words):
        convert({"a": torch.zeros(shape)})


HOSTILE = ['"', "'", '"""', "\\", "\\N{DASH}", "{", "}", "{x!r}", "a\nimport os", "a\r", "\x00", "#", "%s", "\u202e",
           '");import os;("', "\ud800", "'''", "${x}", "\x1b[2J", "é"]  # fmt: skip


@given(st.lists(names, min_size=2, max_size=4, unique=True))
@example(HOSTILE[:8])
@example(HOSTILE[8:])
def test_names_stay_names(drawn: list[str]) -> None:
    rules = tuple(Rule(to=(str(literal(n + "\n")),), source=(str(literal(n)),)) for n in drawn)
    mapping = Mapping(rules=rules)
    text = emitted(mapping)
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)}
    assert calls <= {"all"}
    assert text.isascii()
    agree(mapping, {n: codes((2,), k) for k, n in enumerate(drawn)})


@given(st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=3))
def test_names_around_numbers_stay_names(parts: list[str]) -> None:
    source, target = (str(literal(".".join(p))).replace("@", "{i}") for p in ([*parts, "@"], ["@", *parts]))
    agree(one(target, source), {".".join([*parts, str(k)]): codes((2,), k) for k in (0, 3)})


def test_names_of_models_and_reasons_stay_text() -> None:
    from lineage.layout.mapping import Side

    evil = '"""\nimport os\n\\'
    mapping = Mapping(source=Side(name=evil), target=Side(name="b\x00\\"), rules=one("b", "a").rules)
    text = EMITTERS["python"](mapping, name=evil, beside=evil).text
    nodes = ast.parse(text).body
    assert [type(node).__name__ for node in nodes] == ["Expr", "ImportFrom", "ImportFrom", "FunctionDef", "FunctionDef"]
    assert loaded(text)["convert"]({"a": torch.ones(1)}).keys() == {"b"}


def test_the_file_needs_torch_alone() -> None:
    ops = (Rearrange("(h two) k -> (two h) k", {"two": 2}), Take(0, np.random.default_rng(0).permutation(200)))
    tree = ast.parse(emitted(one("b.{i}", ("a.{i}.{e}",), Stack(over="e"), *ops)))
    roots = {node.names[0].name for node in ast.walk(tree) if isinstance(node, ast.Import)}
    roots |= {str(node.module).partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert roots <= {"__future__", "collections", "json", "pathlib", "re", "torch"}


def test_sizes_keep_their_names() -> None:
    text = emitted(parse_mapping(
        'lineage-mapping: 1\nsizes: {h: 2, H: 3}\nrules: [{to: b, from: a, ops: ["(h H d) k -> (d h H) k"]}]'
    ))  # fmt: skip
    assert "\nH = 2\n" in text
    assert "x.unflatten(0, (H, H_1_SIZE, -1))" in text


def test_a_placeholder_does_not_hide_a_size() -> None:
    turned = Rearrange("(h d) -> d h", {"h": 3})
    mapping = Mapping(rules=one("b.{H}", "a.{H}", turned, Rearrange("d h -> (h d)")).rules, sizes={"h": 3})
    agree(mapping, {"a.2": codes((12,))})


def test_sizes_that_look_like_numbers_get_longer_names() -> None:
    text = emitted(
        parse_mapping('lineage-mapping: 1\nsizes: {i: 2}\nrules: [{to: b, from: a, ops: ["(i d) -> (d i)"]}]')
    )
    assert "\nI_0_SIZE = 2\n" in text


def test_a_rule_that_cannot_be_undone_is_named() -> None:
    mapping = Mapping(rules=(*one("b", "a").rules, Rule(to=("d",), source=("c",), ops=(Scale(0.0),))))
    found = EMITTERS["python"](mapping, name="m", beside="x")
    assert found.unsaid == ("revert leaves out rules[1]: scale: by 0 cannot be undone",)
    assert f"# {found.unsaid[0]}\n" in found.text
    assert loaded(found.text)["revert"]({"b": torch.ones(1), "d": torch.ones(1)}).keys() == {"a"}


def test_a_pattern_without_its_sizes_is_an_error_with_its_place() -> None:
    with pytest.raises(InputError, match=r'm.yaml: rules\[0\]: "\(a b\) -> b a": give a size for a or b'):
        emit(one("b", "a", Rearrange("(a b) -> b a")), EMITTERS["python"], name="m.yaml")


LONG = one(
    ("b", "c"), ("a", "d"), Take(0, np.random.default_rng(1).permutation(300)),
    Each({0: Scale(Data(np.arange(1.0, 301)), 0), 1: Matmul("right", Data(np.kron(np.eye(2), ROTATION)))}),
)  # fmt: skip


def test_long_arrays_lie_beside_the_file(tmp_path: Path) -> None:
    out = tmp_path / "convert.py"
    (tmp_path / "convert.safetensors").write_bytes(b"the mapping's own")
    emit(LONG, EMITTERS["python"], name="m", out=out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["convert.py", "convert.py.safetensors", "convert.safetensors"]
    space = loaded(out.read_text(), out)
    state = {name: tensor(random((300, 4), "F32", k), "F32") for k, name in enumerate("ad")}
    back = space["revert"](space["convert"](state))
    assert torch.allclose(back["a"], state["a"], atol=1e-5)
    assert torch.allclose(back["d"], state["d"], atol=1e-5)


def test_long_arrays_need_a_file_to_lie_beside() -> None:
    with pytest.raises(InputError, match="arrays too long for the text; name a file with -o"):
        emit(LONG, EMITTERS["python"], name="m")


def _ruff(text: str, path: Path) -> None:
    path.write_text(text)
    for words in (["check", "--select", "E,F,W,I,B,UP,C4,SIM,PIE"], ["format", "--check", "--diff"]):
        words = [sys.executable, "-m", "ruff", *words, "--isolated", "--line-length", "120", str(path)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_code_is_laid_out_as_ruff_formats_it(tmp_path: Path) -> None:
    rules = [rule for mapping, _ in NUMBERED.values() for rule in mapping.rules] + list(LONG.rules)
    for width in range(20, 100, 7):
        names = ("a." + "w" * width, "a.{i}." + "w" * width, "a.{i}.{e}." + "w" * (width // 2))
        rules += one("b." + "t" * width, names[0]).rules + one("b.{i}." + "t" * width, names[1], Scale(2)).rules
        rules += one("b.{i}." + "t" * width, names[2], Stack(over="e")).rules
        rules += one("c.{i}." + "t" * width, (names[1], names[0], names[2]), Stack(over="e"), Concat(0)).rules
    _ruff(emitted(Mapping(rules=tuple(rules))), tmp_path / "emitted.py")


@settings(max_examples=5, phases=[Phase.generate])
@given(st.data())
def test_chains_are_laid_out_as_ruff_formats_them(data: st.DataObject) -> None:
    rules = []
    for k in range(40):
        shapes, ops = data.draw(chains())
        sources = tuple(f"a.{k}.{n}" for n in range(len(shapes)))
        for op in ops:
            shapes = op.shapes(shapes)
        rules.append(Rule(to=tuple(f"b.{k}.{n}" for n in range(len(shapes))), source=sources, ops=ops))
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _ruff(emitted(Mapping(rules=tuple(rules))), Path(folder) / "emitted.py")
