"""The report as a summary for a terminal that a person can act on."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from lineage.errors import printable
from lineage.report.document import Report
from lineage.report.tables import as_text
from lineage.report.words import HEADLINES, component_table, facts, group_table, next_steps, side

__all__ = ["text"]

#: bold in green, yellow, blue, blue, magenta (ECMA-48): what was copied stands out, what is innocent is calm
_PAINT = {"copied": "1;31", "transformed": "1;33", "retrained": "1;34", "unrelated": "1;34", "undetermined": "1;35"}
#: warnings that are shown; the document holds all
_WARNINGS = 5


def text(
    report: Report, *, width: int = 100, quiet: bool = False, verbose: bool = False, color: bool = False,
    out: str | None = None,
) -> str:  # fmt: skip
    """The report in lines: verdict, why, how sure, coverage, tables, what to do next.

    Parameters
    ----------
    width : columns of the terminal
    quiet : the verdict alone, on one line
    verbose : every warning, and what the network's groups look like layer by layer
    color : paint the verdict, for a terminal
    out : folder that the report's files were written to
    """
    verdict, document = report.verdict, report.document
    word = verdict.class_.upper()
    word = f"\x1b[{_PAINT[verdict.class_]}m{word}\x1b[0m" if color else word
    if quiet:
        return f"{word}: {HEADLINES[verdict.class_]}"
    width = max(width, 40)
    blocks = [
        "\n".join([f"{word}: {HEADLINES[verdict.class_]}", f"A  {side(document.a)}", f"B  {side(document.b)}"]),
        _listed("Why", verdict.reasons, width),
        "\n".join(_wrapped(f"{name:<11}", printable(value), width) for name, value in facts(report)),
        _listed("What B says of itself", (f"{c.source}: {c.says} ({c.verdict})" for c in document.claims), width),
    ]
    tables = (component_table(report), group_table(report))
    blocks += [as_text(table, width=width) for table in tables if table]
    warnings = document.warnings if verbose else document.warnings[:_WARNINGS]
    more = len(document.warnings) - len(warnings)
    blocks.append(_listed("Warnings", [*warnings, *([f"{more} more, shown with -v"] if more else [])], width))
    blocks.append(_listed("Next", next_steps(report, out), width))
    return "\n\n".join(block for block in blocks if block)


def _listed(title: str, sentences: Iterable[str], width: int) -> str:
    """Sentences under a title, "" where there are none."""
    lines = [_wrapped("  - ", printable(sentence), width) for sentence in sentences]
    return "\n".join([title, *lines]) if lines else ""


def _wrapped(head: str, sentence: str, width: int) -> str:
    """A sentence over several lines, indented below its beginning; words (paths, names) stay whole."""
    return textwrap.fill(
        sentence, width, initial_indent=head, subsequent_indent=" " * len(head), break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
