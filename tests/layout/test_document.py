"""Mapping files: what is written is read back, what is wrong is named with its place, nothing in a file is trusted."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lineage.errors import InputError
from lineage.layout.axes import LayoutError
from lineage.layout.document import dump_mapping, mapping_data, parse_mapping, read_mapping, write_mapping
from lineage.layout.mapping import Evidence, Mapping, Rule, Side, settled
from lineage.layout.operations import (
    Add,
    Cast,
    Concat,
    Data,
    Each,
    Matmul,
    Operation,
    Rearrange,
    Scale,
    Split,
    Stack,
    Take,
    Unstack,
)
from lineage.layout.templates import literal
from tests.strategies import chains, names

#: the example of the contract, word for word but for its dots
CONTRACT = """lineage-mapping: 1
source: {name: a, tensors: 291}
target: {name: b, tensors: 227}
sizes: {h: 32, kv: 8, d: 128}
rules:
  - to: model.layers.{i}.self_attn.qkv_proj.weight
    from: [layers.{i}.attention.wq.weight, layers.{i}.attention.wk.weight, layers.{i}.attention.wv.weight]
    ops: [{each: {0: "(h d two) k -> (h two d) k", 1: "(kv d two) k -> (kv two d) k"}}, {concat: 0}]
    how: values            # values | structure | name | given
    evidence: {tensors: 32, cosine: 1.0, certified: true}
unmatched: {source: [rope.freqs], target: []}
"""


def rule(ops: str = "[]", *, to: str = '"x.{i}"', source: str = '["y.{i}"]', more: str = "") -> str:
    """A document of one rule."""
    return (
        f"lineage-mapping: 1\nsizes: {{h: 4, d: 2}}\nrules:\n  - to: {to}\n    from: {source}\n    ops: {ops}\n"
        f"    how: given\n{more}"
    )


def test_the_contracts_example_is_read() -> None:
    mapping = parse_mapping(CONTRACT)
    (found,) = mapping.rules
    sizes = {"h": 32, "kv": 8, "d": 128}
    first, second = ("(h d two) k -> (h two d) k", "(kv d two) k -> (kv two d) k")
    assert found.ops == (Each({0: Rearrange(first, sizes), 1: Rearrange(second, sizes)}), Concat(0))
    assert found.source[1] == "layers.{i}.attention.wk.weight"
    assert found.evidence == Evidence(32, 1.0, certified=True)
    assert mapping.unmatched_source == ("rope.freqs",)


def test_the_contracts_example_written_and_read_is_the_same() -> None:
    mapping = parse_mapping(CONTRACT)
    assert parse_mapping(dump_mapping(mapping)) == mapping


@st.composite
def mappings(draw: st.DrawFn) -> Mapping:
    """Mappings of any rules, with any names."""
    rules = []
    for shapes, ops in draw(st.lists(chains(), max_size=3)):
        count: int | None = len(shapes)
        for op in ops:
            count = op.arity(count)
        to = [str(literal(draw(names))) for _ in range(1 if count is None else count)]
        source = [str(literal(draw(names))) for _ in shapes]
        evidence = draw(st.none() | st.builds(Evidence, st.integers(0, 9), st.none() | st.floats(-1, 1), st.booleans()))
        rules.append(Rule(to=tuple(to), source=tuple(source), ops=ops, how="values", evidence=evidence))
    done, sizes = settled(rules)
    side = st.builds(Side, names, st.integers(0, 9))
    left = st.lists(names, max_size=3).map(tuple)
    return Mapping(
        source=draw(side),
        target=draw(side),
        sizes=sizes,
        rules=done,
        unmatched_source=draw(left),
        unmatched_target=draw(left),
    )


@given(mappings())
def test_any_mapping_written_is_read_back(mapping: Mapping) -> None:
    data = mapping_data(mapping)
    assert parse_mapping(dump_mapping(mapping), lambda _, key: data[key]) == mapping


@given(mappings())
def test_what_is_written_means_the_same_to_any_yaml_reader(mapping: Mapping) -> None:
    plain = yaml.safe_load(dump_mapping(mapping))
    assert plain["unmatched"] == {"source": [*mapping.unmatched_source], "target": [*mapping.unmatched_target]}
    for written, one in zip(plain["rules"] or [], mapping.rules, strict=True):
        assert written["to"] in (list(one.to), one.to[0])


def test_long_arrays_go_beside_the_mapping_and_come_back(tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(500)
    ops: tuple[Operation, ...] = (
        Take(0, order),
        Take(0, order),
        Matmul("right", Data(np.eye(3))),
        Scale(Data([2.0]), 0),
    )
    mapping = Mapping(rules=(Rule(to=("x",), source=("y",), ops=ops),))
    write_mapping(mapping, tmp_path / "m.yaml")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors", "m.yaml"]
    assert read_mapping(tmp_path / "m.yaml") == mapping
    assert len((tmp_path / "m.yaml").read_text()) < 500


def test_a_model_of_the_mappings_name_is_left_alone(tmp_path: Path) -> None:
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    order = np.random.default_rng(0).permutation(500)
    mapping = Mapping(rules=(Rule(to=("x",), source=("y",), ops=(Take(0, order),)),))
    for _ in range(2):
        write_mapping(mapping, tmp_path / "m.yaml")
        assert read_mapping(tmp_path / "m.yaml") == mapping
    assert len(model.read_bytes()) == 10
    assert len(list(tmp_path.iterdir())) == 3


def test_a_mapping_without_long_arrays_is_one_file(tmp_path: Path) -> None:
    write_mapping(parse_mapping(CONTRACT), tmp_path / "m.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["m.yaml"]


@pytest.mark.parametrize(
    ("ops", "parsed"),
    [
        ("[{concat: {axis: 0, sizes: [h*d, 3]}}]", (Concat(0, sizes=(8, 3)),)),
        ("[{split: {parts: 1}}]", (Split(0, parts=1),)),
        ("a b -> b a", (Rearrange("a b -> b a"),)),
        ("{take: {axis: 1, index: ['2:4', 0, '9:5:-2']}}", (Take(1, [2, 3, 0, 9, 7]),)),
        ("[{scale: 1.0e-5}, {add: 1}, {cast: BF16}]", (Scale(1e-5), Add(1), Cast("BF16"))),
        (None, ()),
    ],
)
def test_short_spellings_mean_what_they_say(ops: str | None, parsed: tuple[Operation, ...]) -> None:
    text = rule(ops or "[]").replace('["y.{i}"]', '["y.{i}", "z.{i}"]' if ops and "concat" in ops else '["y.{i}"]')
    assert parse_mapping(text).rules[0].ops == parsed


@pytest.mark.parametrize(("pair", "line"), [(("one",), "pair: one"), (("one", "two"), "pair: [one, two]")])
def test_a_mapping_says_which_stored_layouts_it_rests_on(pair: tuple[str, ...], line: str) -> None:
    text = dump_mapping(Mapping(rules=(Rule(to=("b",), source=("a",)),), pair=pair))
    assert line in text.splitlines()
    assert parse_mapping(text).pair == parse_mapping(text).inverse().pair == pair


def test_a_list_that_only_one_operation_can_mean_needs_no_over() -> None:
    (stacked,) = parse_mapping(rule("[{stack: 1}]", source='"y.{i}.{e}"')).rules
    assert stacked.ops == (Stack(1, over="e"),)
    (unstacked,) = parse_mapping(rule('[{unstack: 0}, "a b -> b a"]', to='"x.{e}"', source='"y"')).rules
    assert unstacked.ops == (Unstack(0, over="e"), Rearrange("a b -> b a"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (rule("[{concatenate: 0}]"), r'rules\[0\]\.ops\[0\]: no operation "concatenate"; did you mean "concat"\?'),
        (rule("[{transpose: [1, 0]}]"), r'no operation "transpose"; write an einops pattern, such as "a b -> b a"'),
        (rule("[permute]"), 'no operation "permute"; write an einops pattern'),
        (rule("[{reshape: 3}]"), "write an einops pattern"),
        (rule('["(h d k -> q"]'), r"rules\[0\]\.ops\[0\]: .* a parenthesis stays open"),
        (rule('[{each: {0: ["a b -> c"]}}]'), r"rules\[0\]\.ops\[0\]\.each\[0\]\[0\]: .* on one side only"),
        (rule("[{concat: {axes: 0}}]"), 'no argument "axes"; did you mean "axis"'),
        (rule("[{concat: {sizes: [h*dd, 2]}}]"), 'no size "dd"; did you mean "d"'),
        (rule("[{split: 3}]"), "split: takes named arguments: axis, parts, sizes, over"),
        (rule("[{split: {axis: 0}}]"), "give either parts or sizes"),
        (rule("[{concat: {axis: }}]"), "concat: axis is a whole number"),
        (rule("[{slice: {axis: 0, start: }}]"), "slice: start is a whole number"),
        (rule("[{slice: {start: one}}]"), "slice: start is a whole number"),
        (rule("[{take: ../../../../etc/passwd}]"), "take: takes named arguments"),
        (rule("[{take: {index: [a]}}]"), "a is no place and no range"),
        (rule("[{cast: bf16}]"), 'no dtype "bf16"; did you mean "BF16"'),
        (rule("[{scale: .nan}]"), "finite number"),
        (rule("[{add: true}]"), "finite number"),
        (rule("[{matmul: {side: up, file: k}}]"), "side is left or right"),
        (rule("[17]"), "an operation is an einops pattern in quotes, or one word"),
        (rule("[concat]"), "concat needs an argument"),
        (rule("[{concat: 0, split: 1}]"), "one word with its arguments"),
        (rule("[{split: {parts: 2}}]"), "the operations give 2 arrays for 1 targets"),
        (rule(source='"y.{i}.{e}"'), "{e} stands only in from"),
        (rule(source='"y"'), "{i} stands only in to"),
        (rule("[{stack: {over: f}}]", source='"y.{i}.{e}"'), 'no placeholder "f"'),
        (rule(to='"x.{i"'), r"rules\[0\]\.to\[0\]: .* a brace stays open"),
        (rule(source="[]"), r"rules\[0\]\.from: at least one name"),
        (rule(more="    where: {i: a}\n"), r"rules\[0\]\.where\.i: .*lists no numbers"),
        (rule(more="    where: {j: '3'}\n"), r'rules\[0\]\.where: no placeholder "j"'),
        (rule(to='"x.{i}.{j}"', more="    table: {i: [1], j: [1, 2]}\n"), "different lengths"),
        (rule().replace("how:", "hwo:"), r'rules\[0\]: no key "hwo"; did you mean "how"'),
        (rule().replace("how: given", "how: value"), r'rules\[0\]\.how: no word "value"; did you mean "values"'),
        (rule().replace("  - to: ", "  - too: "), 'no key "too"; did you mean "to"'),
        ("lineage-mapping: 1\nrules:\n  - from: [a]\n", r'rules\[0\]: the key "to" is missing'),
        ("lineage-mapping: 1\n", 'the key "rules" is missing'),
        ("lineage-mapping: 1\nrules: 3\n", "rules: expected list"),
        ("lineage-mapping: 1\nrules: []\nsizes: {h: -1}\n", "sizes.h: a size is a name and a length"),
        ("lineage-mapping: 1\nrules: []\nsize: {}\n", 'no key "size"; did you mean "sizes"'),
        ("lineage-mapping: 99\nrules: []\n", "version 99; this program reads version 1"),
        ("rules: []\n", "the key lineage-mapping is missing"),
        ("- 1\n- 2\n", "this is a list"),
        ("word", "this is one word"),
        ("", "the file is empty"),
        ("a: 1\n---\nb: 2\n", "2 documents"),
        ("rules: [unclosed\n  - : :\n\t{", r"not YAML that can be read: .*\(line"),
        ("b: 0\na: 1\na: 2\n", r'the key "a" stands twice in what ends here \(line'),
        ("? [a]\n: b\n", "a key is a word"),
        ('lineage-mapping: !!python/object/apply:builtins.open ["x", "w"]\n', "tags .* are not allowed"),
        ("a: &a [x]\nb: *a\n", r"aliases \(\*a\) are not allowed \(line 2\)"),
        ("[" * 200, "nested more than 64 deep"),
        ("- " * 200, "nested more than 64 deep"),
        # deeper still, a parser may give up before it tells of anything
        ("[" * 100_000, "nest"),
        ("- " * 100_000, "nest"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        parse_mapping(text)


def test_aliases_that_would_explode_are_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 40)]
    start = time.process_time()
    with pytest.raises(LayoutError, match="aliases"):
        parse_mapping("\n".join(lines))
    assert time.process_time() - start < 1


@given(st.data())
def test_a_spoilt_document_is_a_mapping_or_a_message(data: st.DataObject) -> None:
    text = CONTRACT
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        some = data.draw(
            st.text(max_size=3) | st.sampled_from(["{", "]", ": ", "- ", "\n", "*a", "!!x ", "0", "-1", "null"])
        )
        text = text[:at] + some + text[at + data.draw(st.integers(0, 20)) :]
    try:
        found = parse_mapping(text)
    except LayoutError as exc:
        # a message of its own, not the empty one of a bare exception
        assert "rules" in str(exc) or len(str(exc)) > 10  # noqa: PT017
    else:
        assert isinstance(found, Mapping)


@pytest.mark.parametrize("name", ["../m.safetensors", "/etc/passwd", "a\\b.safetensors", "m.bin"])
def test_arrays_are_never_read_from_elsewhere(tmp_path: Path, name: str) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(rule("[{take: {file: k}}]", more=f"data: '{name}'\n"))
    with pytest.raises(InputError, match=r"m\.yaml: rules\[0\]\.ops\[0\]: data: .* is no \.safetensors file beside"):
        read_mapping(file)


def test_an_array_that_is_not_there_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text(rule("[{take: {file: k}}]"))
    with pytest.raises(InputError, match=r"the array k should be in m\.safetensors, which is not beside"):
        read_mapping(file)
    (tmp_path / "m.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(InputError, match='no array "k"'):
        read_mapping(file)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_mapping(tmp_path / "m.yaml")
    with pytest.raises(InputError, match="is a directory"):
        read_mapping(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"bytes\.yaml: this is no UTF-8 text"):
        read_mapping(tmp_path / "bytes.yaml")


def test_five_thousand_rules_are_written_and_read_quickly() -> None:
    rules = tuple(
        Rule(
            to=(f"b.{k}.w",),
            source=(f"a.{k}.w",),
            ops=(Rearrange("a b -> b a"),),
            evidence=Evidence(1, 1.0, certified=True),
        )
        for k in range(5000)
    )
    start = time.process_time()
    assert parse_mapping(dump_mapping(Mapping(rules=rules))).rules == rules
    # measured: 0.3 s
    assert time.process_time() - start < 3
