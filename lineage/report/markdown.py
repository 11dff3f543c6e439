"""The report as a Markdown document."""

from __future__ import annotations

from collections.abc import Iterable

from lineage.errors import printable
from lineage.layout.document import dump_mapping
from lineage.report.document import Report
from lineage.report.tables import Table, as_markdown
from lineage.report.words import HEADLINES, component_table, facts, group_table, next_steps, side

__all__ = ["markdown"]

#: rules that are printed; mapping.yaml holds all
_RULES = 200
#: characters that Markdown or HTML inside it would take for their own
_MARKS = str.maketrans({c: "\\" + c for c in "\\`*_[]#|"} | {"<": "&lt;", "&": "&amp;"})


def markdown(report: Report) -> str:
    """The whole report but the figures of each tensor, which tensors.csv holds."""
    document, verdict = report.document, report.verdict
    blocks = [
        f"# {verdict.class_.capitalize()}: {HEADLINES[verdict.class_]}",
        f"- A: {_plain(side(document.a))}\n- B: {_plain(side(document.b))}",
        _listed("Why", verdict.reasons),
        as_markdown(Table(heads=("", ""), rows=tuple(facts(report)))),
        _listed("What B says of itself", (f"{c.source}: {c.says} ({c.verdict})" for c in document.claims)),
    ]
    blocks += [as_markdown(table) for table in (component_table(report), group_table(report)) if table]
    blocks.append(_listed("What changed", (i.text for i in report.diff.comparison.insights)))
    blocks.append(_listed("Warnings", document.warnings))
    if report.mapping.rules:
        blocks.append(f"## Mapping\n\n```yaml\n{_rules(report)}\n```")
    blocks.append(_listed("Next", next_steps(report, ".")))
    blocks.append(f"Written by lineage {document.lineage}. What the verdict proves and what not: see its README.")
    return "\n\n".join(block for block in blocks if block) + "\n"


def _rules(report: Report) -> str:
    """The mapping as its file has it, cut where it grows long."""
    import msgspec

    rules = report.mapping.rules
    text = dump_mapping(msgspec.structs.replace(report.mapping, rules=rules[:_RULES])).rstrip().replace("```", "'''")
    return text + (f"\n# … and {len(rules) - _RULES} more rules" if len(rules) > _RULES else "")


def _listed(title: str, sentences: Iterable[str]) -> str:
    """A list under a heading, "" where it is empty."""
    lines = [f"- {_plain(sentence)}" for sentence in sentences]
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _plain(text: str) -> str:
    """Text whose every character is meant as itself."""
    return printable(text).translate(_MARKS)
