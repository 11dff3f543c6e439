"""Conversions for Transformers: what they say is exact, what they cannot say is named."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lineage.emit import EMITTERS
from lineage.emit.emitted import Emitted
from lineage.layout.document import parse_mapping
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Concat
from tests.emit.test_python import HOSTILE, LONG, NUMBERED, _ruff

#: rules, as a mapping file has them, and the conversions that say them
SAID = {
    "a name": ("{to: b.weight, from: a.weight}", [r'WeightRenaming(r"^a\.weight(?!.)", "b.weight")']),
    "the same name": ("{to: a.weight, from: a.weight}", []),
    "a layer": ("{to: b.{i}.w, from: a.{i}.w}", [r'WeightRenaming(r"^a\.(\d+)\.w(?!.)", r"b.\1.w")']),
    "some layers": (
        '{to: b.{i}.w, from: a.{i}.w, where: {i: "0:2,5"}}', [r'WeightRenaming(r"^a\.(0|1|5)\.w(?!.)", r"b.\1.w")'],
    ),
    "two numbers": (
        "{to: b.{i}.x.{e}.v, from: a.{i}.x.{e}.w}", [r'WeightRenaming(r"^a\.(\d+\.x\.\d+)\.w(?!.)", r"b.\1.v")'],
    ),
    "two numbers with other texts between": (
        "{to: b.{i}.y.{e}.v, from: a.{i}.x.{e}.w}",
        [
            r'WeightRenaming(r"^a\.(\d+)\.x\.(?=\d+\.w(?!.))", r"b.\1.y.")',
            r'WeightRenaming(r"^(b\.\d+\.y\.\d+)\.w(?!.)", r"\1.v")',
        ],
    ),
    "joined": (
        "{to: a.{i}.qk, from: [a.{i}.q, a.{i}.k], ops: [{concat: 0}]}",
        [r'WeightConverter([r"(?<=\d)\.q(?!.)", r"(?<=\d)\.k(?!.)"], [".qk"], [Concatenate(dim=0)])'],
    ),
    "cut": (
        "{to: [q, k], from: qk, ops: [{split: {axis: 1, parts: 2}}]}",
        [r'WeightConverter(["^qk(?!.)"], ["q", "k"], [Chunk(dim=1)])'],
    ),
    "cut into unequal parts": (
        "{to: [q, k], from: qk, ops: [{split: {axis: 0, sizes: [4, 2]}}]}",
        [r'WeightConverter(["^qk(?!.)"], ["q", "k"], [Split(dim=0)])'],
    ),
    "turned": (
        '{to: b, from: a, ops: ["x y z -> x z y"]}',
        ['WeightConverter(["^a(?!.)"], ["b"], [Transpose(dim0=1, dim1=2)])'],
    ),
    "experts": (
        "{to: l.{i}.up, from: [l.{i}.e.{e}.g.w, l.{i}.e.{e}.u.w], ops: [{concat: 0}, {stack: {axis: 0, over: e}}]}",
        [
            r'WeightConverter([r"(?<=\d)\.e\.*.g\.w(?!.)", r"(?<=\d)\.e\.*.u\.w(?!.)"], [".up"], '
            "[MergeModulelist(dim=0), Concatenate(dim=1)])"
        ],
    ),
    "rotary": (
        '{to: q, from: a, ops: ["(h d two) k -> (h two d) k"]}',
        [r'WeightConverter(["^a(?!.)"], ["q"], [PermuteForRope()])'],
    ),
    "pairs": (
        '{to: b, from: a, ops: ["(d two) k -> (two d) k"]}',
        ['WeightConverter(["^a(?!.)"], ["b"], [Interleave(dim=0)])'],
    ),
}  # fmt: skip

#: rules that cannot be said, and why
UNSAID = {
    "{to: b.{i+1}, from: a.{i}}": "numbers in its names are computed; give A and B",
    "{to: b.{i}.{j}, from: a.{j}.{i}}": "its names hold their numbers in different orders",
    "{to: b, from: a, ops: [{scale: 2}]}": "scale has no counterpart",
    "{to: b, from: a, ops: [{cast: F32}]}": "cast has no counterpart",
    '{to: b, from: a, ops: ["x y -> (x y)"]}': '"x y -> (x y)" has no counterpart',
    "{to: b.{i}, from: a, ops: [{unstack: {over: i}}]}": "loading makes no lists of tensors",
    "{to: b+, from: a}": "its names hold characters that mean something in a pattern",
    "{to: b, from: [a.{e}.w, c], ops: [{concat: 0}, {stack: {over: e}}]}": "more than one list, or a tensor beside one",
    "{to: b, from: a.{e}.w, ops: [{stack: {over: e}}], where: {e: [1, 0]}}": "its list is in an order of its own",
}


def mapping(*rules: str) -> Mapping:
    return parse_mapping(
        f"lineage-mapping: 1\nsizes: {{h: 4, g: 2, two: 2}}\nrules: [{', '.join(map(_quoted, rules))}]"
    )


def _quoted(rule: str) -> str:
    """Names with placeholders in quotes, as flow style wants them."""
    import re

    return re.sub(r"(?<=[ \[])([\w.+]*(?:\{\w[\w+]*\}[\w.+]*)+)(?=[,\]}])", r'"\1"', rule)


def said(*rules: str) -> Emitted:
    return EMITTERS["transformers"](mapping(*rules), name="m", beside="")


def conversions(found: Emitted) -> list[str]:
    """The items of the list, each on one line."""
    (value,) = [node.value for node in ast.parse(found.text).body if isinstance(node, ast.Assign)]
    assert isinstance(value, ast.List)
    return [ast.unparse(item) for item in value.elts]


@pytest.mark.parametrize("kind", SAID)
def test_what_can_be_said_is_said(kind: str) -> None:
    rule, wanted = SAID[kind]
    found = said(rule)
    assert conversions(found) == [ast.unparse(ast.parse(line)) for line in wanted]
    assert found.unsaid == ()


@pytest.mark.parametrize("rule", UNSAID)
def test_what_cannot_be_said_is_named(rule: str) -> None:
    found = said(rule)
    assert len(found.unsaid) == 1
    assert found.unsaid[0].endswith(UNSAID[rule])
    assert conversions(found) == []
    assert f"# cannot be said: {found.unsaid[0]}\n" in found.text


def test_a_table_is_said_row_by_row() -> None:
    found = conversions(said("{to: b.{j}.w, from: a.{i}.w, table: {i: [0, 1], j: [4, 3]}}"))
    assert found == [rf"WeightRenaming('^a\\.{i}\\.w(?!.)', 'b.{j}.w')" for i, j in ((0, 4), (1, 3))]


def test_computed_numbers_are_said_one_by_one_where_the_source_is_known() -> None:
    rules = Mapping(rules=(Rule(to=("down.{b}.{r}.w",), source=("x.{3*b+r+1}.w",)),))
    shapes = {f"x.{k}.w": (2,) for k in (1, 2, 4)}
    found = EMITTERS["transformers"](rules, name="m", beside="", shapes=shapes)
    places = ((1, "0.0"), (2, "0.1"), (4, "1.0"))
    assert conversions(found) == [rf"WeightRenaming('^x\\.{k}\\.w(?!.)', 'down.{place}.w')" for k, place in places]


def test_names_that_are_swapped_go_by_a_third() -> None:
    found = conversions(said("{to: l.{i}.b, from: l.{i}.a}", "{to: l.{i}.a, from: l.{i}.b}"))
    assert found[0] == r"WeightRenaming('^l\\.(\\d+)\\.a(?!.)', 'lineage-0.\\1')"
    assert found[-1] == r"WeightRenaming('^lineage-0\\.(\\d+)(?!.)', 'l.\\1.b')"


def test_a_tensor_that_goes_to_two_places_is_said_once() -> None:
    found = said("{to: b, from: a}", "{to: c, from: a}")
    assert found.unsaid == ("rules[1] c: a tensor that an earlier rule reads can go to one place only",)


def test_a_second_number_of_heads_is_told() -> None:
    found = said(
        '{to: q, from: a, ops: ["(h d two) k -> (h two d) k"]}', '{to: k, from: b, ops: ["(g d two) k -> (g two d) k"]}'
    )
    assert "# needs config.num_attention_heads == 4\n" in found.text
    assert found.unsaid == (
        "rules[1] k: a rotary order of 2 heads; PermuteForRope knows config.num_attention_heads only",
    )


def test_converters_that_would_match_each_others_names_are_not_both_said() -> None:
    rules = [
        f"{{to: {p}.{{i}}.qk, from: [{p}.{{i}}.q, {p}.{{i}}.k], ops: [{{concat: {k}}}]}}" for k, p in enumerate("ab")
    ]
    assert [line.partition(" ")[2] for line in said(*rules).unsaid][:1] == [
        "a.{i}.qk: its patterns would match names of other rules"
    ]


@pytest.mark.parametrize("name", [name for name in HOSTILE if name not in ("é",)])
def test_no_name_becomes_code_or_a_pattern(name: str) -> None:
    from lineage.layout.templates import literal

    found = EMITTERS["transformers"](
        Mapping(rules=(Rule(to=(str(literal(name)),), source=("a",)),)), name=name, beside=""
    )
    assert len(found.unsaid) == 1
    assert [type(node).__name__ for node in ast.parse(found.text).body] == ["Expr", "Assign"]


def test_the_code_is_laid_out_as_ruff_formats_it(tmp_path: Path) -> None:
    rules = [rule for m, _ in NUMBERED.values() for rule in m.rules] + list(LONG.rules)
    rules += [rule for text, _ in SAID.values() for rule in mapping(text).rules]
    for n in range(9, 60, 5):
        sources = tuple(f"a.{{i}}.{letter * n}" for letter in "su")
        rules.append(Rule(to=("b.{i}." + "t" * n,), source=sources, ops=(Concat(0),)))
    _ruff(EMITTERS["transformers"](Mapping(rules=tuple(rules)), name="m", beside="").text, tmp_path / "emitted.py")
