"""The report as one self-contained HTML page, and as a fragment for notebooks."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from lineage.errors import printable
from lineage.layout.mapping import Rule
from lineage.layout.yamltext import flow
from lineage.measure.compare import TensorRow
from lineage.measure.diff import top_rows
from lineage.report.document import Report
from lineage.report.tables import count, figure
from lineage.report.words import HEADLINES, component_table, facts, group_table, next_steps, side

__all__ = ["fragment", "heat_map", "page"]

#: rows of the table of tensors and of rules; a browser takes no more with ease, the CSV and the YAML hold all
_ROWS, _RULES = 3000, 300
#: columns of a heat map; networks with more roles are shown by group
_ROLES = 16
#: relative L2 that is drawn as nothing and as full colour; between them on a logarithmic scale
_COLD, _HOT = 1e-4, 1.0
_FIGURES = ("cosine", "rel_l2", "max_abs", "mean_rel", "norm_ratio", "changed")
#: a number that counts experts or blocks: a whole component of the name
_NUMBER = re.compile(r"(?<![^./])\d+(?![^./])")


def page(report: Report) -> str:
    """The whole report; no scripts, fonts or pictures from elsewhere."""
    import jinja2

    source = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": figure, "printable": printable}
    document = report.document
    rows = _chosen(report)
    return environment.from_string(source).render(
        document=document, verdict=report.verdict, headline=HEADLINES[report.verdict.class_], facts=facts(report),
        sides=(("A", side(document.a)), ("B", side(document.b))), insights=report.diff.comparison.insights,
        tables=[t for t in (component_table(report), group_table(report)) if t], heat=heat_map(report),
        rules=[_rule(rule) for rule in report.mapping.rules[:_RULES]], more_rules=len(report.mapping.rules) - _RULES,
        figures=_FIGURES, rows=[_row(row) for row in rows], hidden=len(report.diff.comparison.rows) - len(rows),
        steps=next_steps(report, "."), change=", ".join(report.diff.comparison.change.patterns),
    )  # fmt: skip


def fragment(report: Report) -> str:
    """The verdict and its reasons, for a notebook's cell."""
    import jinja2

    template = (
        "<div><p><b>{{ word }}</b>: {{ headline }}</p><ul>{% for r in reasons %}<li>{{ r }}</li>{% endfor %}</ul>"
        "<table>{% for name, value in facts %}<tr><th>{{ name }}</th><td style='text-align:left'>{{ value }}</td></tr>"
        "{% endfor %}</table></div>"
    )
    word = report.verdict.class_
    return jinja2.Environment(autoescape=True).from_string(template).render(
        word=word, headline=HEADLINES[word], reasons=report.verdict.reasons, facts=facts(report)
    )  # fmt: skip


def _chosen(report: Report) -> list[TensorRow]:
    """The rows that are shown: all in order, or the most changed and as many others as fit."""
    rows = list(report.diff.comparison.rows)
    if len(rows) <= _ROWS:
        return rows
    top = top_rows(report.diff.comparison, "rel_l2", _ROWS)
    listed = {id(row) for row in top}
    return top + [row for row in rows if id(row) not in listed][: _ROWS - len(top)]


def _row(row: TensorRow) -> dict[str, Any]:
    figures = [None if row.metrics is None else getattr(row.metrics, name) for name in _FIGURES]
    dtypes = dict.fromkeys(d for d in (row.dtype_a, row.dtype_b) if d)
    sources = [] if row.status == "added" else [printable(name) for name in row.name.split(" + ")]
    return {
        "name": printable(row.b_name or row.name), "sources": sources if row.b_name else [], "status": row.status,
        "group": row.group, "layer": row.layer, "shape": "×".join(map(str, row.shape)), "dtype": " → ".join(dtypes),
        "figures": figures,
    }  # fmt: skip


def _rule(rule: Rule) -> dict[str, Any]:
    """A rule for people: names, operations, what speaks for it."""
    evidence = rule.evidence
    words = [flow(op.document({})) for op in rule.ops]
    told: str = rule.how
    if evidence is not None:
        cosine = "" if evidence.cosine is None else f", cosine {figure(evidence.cosine)}"
        told = f"{rule.how}, {count(evidence.tensors, 'tensor')}{cosine}{', certified' if evidence.certified else ''}"
    return {
        "to": [printable(t) for t in rule.to], "source": [printable(t) for t in rule.source],
        "ops": [printable(word, 300) for word in words], "told": told,
    }  # fmt: skip


def heat_map(report: Report) -> list[dict[str, Any]]:
    """Relative L2 by layer and role, one map by stack of layers.

    Returns
    -------
    for each stack its name, `roles` (columns) and `lines` (rows): cells with `value` and `heat` (0 to 1, None where
    there is no figure)
    """
    stacks: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in report.diff.comparison.rows:
        if row.layer is not None and row.b_name and row.metrics is not None and row.metrics.rel_l2 is not None:
            cell = stacks.setdefault(row.stack, {}).setdefault(row.layer, {}).setdefault(_role(row), [])
            cell.append(row.metrics.rel_l2)
    maps = []
    for stack, layers in stacks.items():
        roles = list(dict.fromkeys(role for cells in layers.values() for role in cells))
        if len(roles) > _ROLES:
            roles, layers = _by_group(report, stack)
        lines = [
            {"layer": layer, "cells": [_cell(layers[layer].get(role, [])) for role in roles]}
            for layer in sorted(layers)
        ]
        maps.append({"stack": printable(stack, 80), "roles": [printable(r, 60) for r in roles], "lines": lines})
    return maps


def _role(row: TensorRow) -> str:
    """What the tensor is within its layer: its name after the layer's number, experts and blocks together."""
    name = row.b_name or row.name
    found = re.search(rf"[._]{row.layer}[./](.+)$", name)
    role = found[1] if found else name
    return _NUMBER.sub("*", role).removesuffix(".weight")


def _by_group(report: Report, stack: str) -> tuple[list[str], dict[int, dict[str, list[float]]]]:
    """Columns by group where a network has more roles than a page has room for."""
    layers: dict[int, dict[str, list[float]]] = {}
    for entry in report.diff.comparison.layers:
        if entry["stack"] == stack:
            cells = {
                group: [found["rel_l2"]] for group, found in entry["groups"].items() if found["rel_l2"] is not None
            }
            layers[entry["layer"]] = cells
    return sorted({group for cells in layers.values() for group in cells}), layers


def _cell(values: list[float]) -> dict[str, float | None]:
    """Mean of the tensors in one cell and its share of the colour."""
    if not values:
        return {"value": None, "heat": None}
    value = sum(values) / len(values)
    if value <= _COLD:
        return {"value": value, "heat": 0.0}
    return {"value": value, "heat": min(1.0, math.log(value / _COLD) / math.log(_HOT / _COLD))}
