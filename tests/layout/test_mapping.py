"""Rules mean tensors: joined over names, listed in order, turned round, their axes named once."""

from __future__ import annotations

import time

import pytest

from lineage.layout.axes import LayoutError
from lineage.layout.chain import Level
from lineage.layout.mapping import Mapping, Rule, settled
from lineage.layout.operations import Concat, Each, Rearrange, Slice, Split, Stack, Unstack


def instances(
    rule: Rule, *names: str, shape: tuple[int, ...] = (4, 2)
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    found = Mapping(rules=(rule,)).instances(dict.fromkeys(names, shape))
    return sorted((i.target_names, i.source_names) for i in found)


def test_a_rule_needs_all_its_sources() -> None:
    rule = Rule(to=("x.{i}",), source=("q.{i}", "k.{i}"), ops=(Concat(0),))
    assert instances(rule, "q.0", "k.0", "q.1", "k.2") == [(("x.0",), ("q.0", "k.0"))]


def test_where_restricts_a_rule() -> None:
    rule = Rule(to=("x.{i}",), source=("q.{i}",), where={"i": "1:3"})
    assert [s for _, s in instances(rule, *(f"q.{i}" for i in range(5)))] == [("q.1",), ("q.2",)]


def test_a_table_joins_what_no_formula_does() -> None:
    rule = Rule(to=("x.{i}",), source=("q.{j}",), table={"i": (0, 1, 2), "j": (7, 3, 5)})
    assert instances(rule, "q.3", "q.7", "q.9") == [(("x.0",), ("q.7",)), (("x.1",), ("q.3",))]


def test_a_list_is_ordered_by_number_not_by_name() -> None:
    rule = Rule(to=("x",), source=("q.{e}",), ops=(Stack(0, over="e"),))
    ((_, sources),) = instances(rule, *(f"q.{e}" for e in range(11)))
    assert sources == tuple(f"q.{e}" for e in range(11))


@pytest.mark.parametrize(
    ("names", "where"),
    [
        (["a.0", "a.1", "b.0"], None),
        (["a.0", "a.1", "b.0"], {"e": "0:2"}),
        (["a.0", "a.2", "b.0", "b.2"], None),
        (["a.1", "b.1"], {"e": "0:2"}),
    ],
)
def test_a_list_with_a_hole_is_no_instance(names: list[str], where: dict[str, str] | None) -> None:
    rule = Rule(to=("x",), source=("a.{e}", "b.{e}"), ops=(Concat(0), Stack(0, over="e")), where=where)
    assert instances(rule, *names) == []


def test_where_gives_a_list_another_order() -> None:
    rule = Rule(to=("x",), source=("q.{e}",), ops=(Stack(0, over="e"),), where={"e": "2,0,1"})
    ((_, sources),) = instances(rule, "q.0", "q.1", "q.2")
    assert sources == ("q.2", "q.0", "q.1")


def test_lists_over_two_placeholders_are_nested() -> None:
    rule = Rule(to=("x",), source=("l.{i}.e.{e}",), ops=(Stack(0, over="e"), Stack(0, over="i")))
    (instance,) = Mapping(rules=(rule,)).instances({f"l.{i}.e.{e}": (1,) for i in range(2) for e in range(3)})
    assert instance.sources == (Level("i", [Level("e", [f"l.{i}.e.{e}" for e in range(3)]) for i in range(2)]),)


def test_unstacking_names_as_many_targets_as_the_shape_holds() -> None:
    rule = Rule(to=("x.{i}.k", "x.{i}.v"), source=("kv",), ops=(Unstack(0, over="i"), Split(0, parts=2)))
    assert instances(rule, "kv", shape=(2, 4, 3)) == [(("x.0.k", "x.1.k", "x.0.v", "x.1.v"), ("kv",))]


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (Rule(to=("x.{i}",), source=("a",)), r"rules\[0\]: .*nothing says which values i takes"),
        (
            Rule(to=("x.{i}",), source=("a",), ops=(Unstack(0, over="i"),), where={"i": "0:3"}),
            "of 4 items does not fit",
        ),
        (Rule(to=("x.{i}",), source=("a",), ops=(Unstack(0, over="i"), Split(0, parts=2))), "2 arrays for 1 targets"),
    ],
)
def test_a_rule_that_makes_no_sense_says_why(rule: Rule, reason: str) -> None:
    with pytest.raises(LayoutError, match=reason):
        list(Mapping(rules=(rule,)).instances({"a": (4, 2)}))


def test_the_inverse_leaves_out_what_cannot_be_undone_and_lists_it() -> None:
    good = Rule(to=("x.{i}",), source=("q.{i}", "k.{i}"), ops=(Concat(0),))
    lossy = Rule(to=("y",), source=("z",), ops=(Slice(0, 0, 2),))
    inverse = Mapping(rules=(good, lossy), unmatched_source=("u",), unmatched_target=("v",)).inverse()
    assert inverse.rules == (Rule(to=good.source, source=good.to, ops=(Split(0, parts=2),)),)
    assert (inverse.unmatched_source, inverse.unmatched_target) == (("v",), ("u", "z"))


def test_an_axis_name_means_one_length_in_the_whole_mapping() -> None:
    patterns = [
        Rearrange("(h d) k -> (d h) k", {"h": 4}),
        Rearrange("(h d) k -> (d h) k", {"h": 2}),
        Rearrange("(h d) k -> (d h) k", {"d": 2}),
        Rearrange("h h2 -> h2 h"),
    ]
    rules, sizes = settled([Rule(to=("x",), source=("y",), ops=(op, Each({0: op}))) for op in patterns])
    for op, rule in zip(patterns, rules, strict=True):
        for new in (rule.ops[0], rule.ops[1].chains[0][1][0]):  # type: ignore[attr-defined]
            assert isinstance(new, Rearrange)
            assert dict(new.sizes) == {n: sizes[n] for n in new.parsed.names if n in sizes}
            assert sorted(v for _, v in new.sizes) == sorted(v for _, v in op.sizes)
    assert settled(rules) == (rules, sizes)


def test_a_hundred_thousand_names_are_joined_in_a_second() -> None:
    words = ("gate", "up", "down")
    shapes = {f"m.{i}.e.{e}.{w}": (8, 16) for i in range(61) for e in range(512) for w in words}
    rules = [Rule(to=(f"l.{{i}}.{{e}}.{w}",), source=(f"m.{{i}}.e.{{e}}.{w}",)) for w in words]
    rules += [Rule(to=(f"x.{w}.{{i}}",), source=(f"y.{{i}}.{w}",)) for w in "abcdefghijklmnop"]
    start = time.process_time()
    assert sum(1 for _ in Mapping(rules=tuple(rules)).instances(shapes)) == len(shapes)
    # measured: 0.6 s; several times that on a busy machine
    assert time.process_time() - start < 4
