"""The stored layouts of this installation: each file is valid, invertible, says where its facts come from."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from lineage.errors import InputError
from lineage.layout.mapping import Mapping
from lineage.match.pairs import fitting, pairs

PAIRS = {pair.name: pair for pair in pairs()}
every_pair = pytest.mark.parametrize("name", PAIRS)


def mapping(name: str) -> Mapping:
    return PAIRS[name].mapping()


@every_pair
def test_a_file_says_what_it_describes_where_it_was_read_and_when(name: str) -> None:
    head = PAIRS[name].file.read_text("utf-8").split("lineage-mapping:")[0]
    said = " ".join(line.removeprefix("#").strip() for line in head.splitlines())
    assert re.search(r"\. Read in: [\w.-]+/[\w.-]+ .*\.py.* 20\d\d-\d\d\.$", said)


@every_pair
def test_every_rule_can_be_undone(name: str) -> None:
    inverse = mapping(name).inverse()
    assert [(r.to, r.source) for r in inverse.rules] == [(r.source, r.to) for r in mapping(name).rules]
    assert inverse.inverse().inverse().rules == inverse.rules


@every_pair
def test_a_file_claims_nothing_that_only_weights_can_show(name: str) -> None:
    assert {(rule.how, rule.evidence, rule.where, rule.table) for rule in mapping(name).rules} == {
        ("given", None, None, None)
    }


@every_pair
def test_no_two_rules_give_one_tensor_unless_sources_or_shapes_tell_them_apart(name: str) -> None:
    givers: dict[str, set[int]] = {}
    rules = mapping(name).rules
    for number, rule in enumerate(rules):
        for template in rule.templates[0]:
            for values in product(range(4), repeat=len(template.placeholders)):
                bound = dict(zip(template.placeholders, values, strict=True))
                if all(n.constant + sum(f * bound[p] for p, f in n.terms) >= 0 for n in template.numbers):
                    givers.setdefault(template.name(bound), set()).add(number)
    twice = [numbers for numbers in givers.values() if len(numbers) > 1]
    for numbers in twice:
        sources = {rules[k].source for k in numbers}
        assert len(sources) == len(numbers) or (len(sources) == 1 and all(rules[k].ops for k in numbers))


def test_each_layout_is_told_from_all_others_by_its_lead() -> None:
    leads = [(pair.source, pair.to) for pair in PAIRS.values()]
    for name, pair in PAIRS.items():
        found = fitting({pair.source}, {pair.to}, [("",), ("",)], PAIRS.values())
        assert [fit.pair.name for fit in found] == [name]
    assert len(set(leads)) == len(leads)


def test_a_file_without_a_lead_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text("lineage-mapping: 1\nrules:\n  - {to: a, from: b}\n")
    with pytest.raises(InputError, match=r"odd.yaml: the first rule is not one name to one name"):
        pairs([file])
