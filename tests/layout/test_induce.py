"""Rules say what the matches say, and nothing more, in few words."""

from __future__ import annotations

import time

import pytest
from hypothesis import given

from lineage.layout.chain import Level
from lineage.layout.induce import Match, induce
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Concat, Operation, Rearrange, Stack, Unstack
from tests.strategies import correspondences

TURN: tuple[Operation, ...] = (Rearrange("a b -> b a"),)


def said(rules: list[Rule], names: list[str]) -> set[tuple[object, ...]]:
    """What the rules give over names: targets, sources, operations."""
    found = list(Mapping(rules=tuple(rules)).instances(dict.fromkeys(names, (4, 4))))
    result: set[tuple[object, ...]] = {(i.targets, i.sources, i.rule.ops) for i in found}
    assert len(result) == len(found)
    return result


def one(targets: str, sources: str, ops: tuple[Operation, ...] = ()) -> Match:
    return Match((targets,), (sources,), ops)


@given(correspondences())
def test_rules_over_all_names_give_exactly_the_matches(drawn: tuple[list[Match], list[str], list[str]]) -> None:
    matches, sources, targets = drawn
    rules = induce(matches, sources, targets)
    assert said(rules, sources) == {(m.targets, m.sources, m.ops) for m in matches}
    backwards = [r.inverse() for r in rules]
    there = {(i.sources, i.targets) for i in Mapping(rules=tuple(backwards)).instances(dict.fromkeys(targets, (4, 4)))}
    assert there == {(m.targets, m.sources) for m in matches}


@pytest.mark.parametrize(
    ("pairs", "to", "source"),
    [
        ([(f"x.{i}.w", f"y.{i}.w") for i in range(9)], "x.{i}.w", "y.{i}.w"),
        ([(f"x.{i}.w", f"y.{i + 1}.w") for i in range(9)], "x.{i-1}.w", "y.{i}.w"),
        ([(f"x.{8 - i}.w", f"y.{i}.w") for i in range(9)], "x.{8-i}.w", "y.{i}.w"),
        (
            [(f"x.{3 * b + r + 1}.0", f"y.{b}.r.{r}") for b in range(4) for r in range(2)],
            "x.{3*i+j+1}.0",
            "y.{i}.r.{j}",
        ),
        (
            [(f"y.{b}.r.{r}", f"x.{3 * b + r + 1}.0") for b in range(4) for r in range(2)],
            "y.{i}.r.{j}",
            "x.{3*i+j+1}.0",
        ),
        ([("{i}.w", "y.{i}.w")], "{{i}}.w", "y.{{i}}.w"),
    ],
)
def test_numbers_become_a_formula(pairs: list[tuple[str, str]], to: str, source: str) -> None:
    (rule,) = induce([one(t, s) for t, s in pairs])
    assert (rule.to, rule.source, rule.where, rule.table) == ((to,), (source,), None, None)


def test_a_rule_for_some_layers_says_which() -> None:
    matches = [one(f"x.{i}", f"y.{i}", TURN if i < 3 else ()) for i in range(8)]
    first, second = induce(matches)
    assert (first.where, second.where) == ({"i": "0:3"}, {"i": "3:8"})


def test_layers_that_only_one_side_has_are_kept_out() -> None:
    (rule,) = induce([one(f"x.{i}", f"y.{i}") for i in range(3)], [f"y.{i}" for i in range(5)], None)
    assert rule.where == {"i": "0:3"}


def test_an_order_without_a_formula_becomes_one_table() -> None:
    (rule,) = induce([one(f"x.{i}", f"y.{k}") for i, k in enumerate([5, 3, 1, 2, 9])])
    assert rule.table == {"i": (0, 1, 2, 3, 4), "j": (5, 3, 1, 2, 9)}


def test_a_sum_that_tells_nothing_of_its_terms_is_no_formula_of_a_table() -> None:
    order = [(0, 0, 4), (1, 0, 2), (0, 1, 3), (1, 1, 0), (2, 1, 5), (2, 0, 1)]
    matches = [one(f"x.{i}.{k}", f"y.{j}.{i + j + k}") for i, k, j in order]
    assert said(induce(matches), [m.sources[0] for m in matches]) == {(m.targets, m.sources, ()) for m in matches}


def test_a_number_that_decides_between_formulas_cuts_the_rule() -> None:
    matches = [one(f"x.{i}.{w}", f"y.{i + 5 * w}.{w}") for w in range(2) for i in (range(8) if w else [3, 0, 1, 2])]
    assert said(induce(matches), [m.sources[0] for m in matches]) == {(m.targets, m.sources, ()) for m in matches}


def test_a_stack_of_experts_is_one_rule_with_its_list_spelt() -> None:
    ops = (Concat(0), Stack(0, over="e"))
    names = [[tuple(f"l.{i}.e.{e}.{w}" for e in range(8)) for w in ("gate", "up")] for i in range(3)]
    (rule,) = induce([Match((f"l.{i}.gu",), tuple(names[i]), ops) for i in range(3)])
    assert rule.source == ("l.{i}.e.{e}.gate", "l.{i}.e.{e}.up")
    assert rule.where == {"e": "0:8"}
    flat = [n for layer in names for side in layer for n in side]
    assert said([rule], flat) == {((f"l.{i}.gu",), tuple(Level("e", n) for n in names[i]), ops) for i in range(3)}


def test_unrolled_layers_keep_the_order_of_their_list() -> None:
    (rule,) = induce([Match((tuple(f"x.{i}.w" for i in (2, 0, 1)),), ("scan",), (Unstack(0, over="i"),))])
    assert (rule.to, rule.where) == (("x.{i}.w",), {"i": "2,0:2"})
    (instance,) = Mapping(rules=(rule,)).instances({"scan": (3, 4)})
    assert instance.target_names == ("x.2.w", "x.0.w", "x.1.w")


def test_lists_that_begin_elsewhere_in_each_layer_are_a_formula() -> None:
    matches = [
        Match((f"x.{b}",), (tuple(f"y.{4 * b + e}" for e in range(4)),), (Stack(0, over="e"),)) for b in range(3)
    ]
    (rule,) = induce(matches)
    assert rule.source == ("y.{4*i+e}",)
    assert [i.source_names for i in Mapping(rules=(rule,)).instances({f"y.{k}": (1,) for k in range(12)})] == [
        m.sources[0] for m in matches
    ]


def test_a_list_without_a_pattern_is_written_name_by_name() -> None:
    (rule,) = induce([Match(("x",), (("y.a", "y.c", "y.b"),), (*TURN, Stack(1, over="e")))])
    assert (rule.source, rule.ops) == (("y.a", "y.c", "y.b"), (*TURN, Stack(1)))


def test_evidence_is_that_of_the_weakest_match() -> None:
    matches = [
        Match((f"x.{i}",), (f"y.{i}",), (), cosine=1 - i / 10, certified=True, margin=0.5 - i / 10) for i in range(3)
    ]
    (rule,) = induce(matches)
    assert rule.evidence is not None
    assert (rule.evidence.tensors, rule.evidence.cosine, rule.evidence.certified) == (3, 0.8, True)
    assert rule.evidence.margin == pytest.approx(0.3)


def test_tens_of_thousands_of_matches_become_few_rules_quickly() -> None:
    words = ("gate", "up", "down")
    matches = [one(f"l.{i}.e.{e}.{w}", f"m.{i}.x.{e}.{w}_proj") for i in range(30) for e in range(256) for w in words]
    start = time.process_time()
    rules = induce(matches)
    assert len(rules) == 3
    assert time.process_time() - start < 5
