"""What terminal, Markdown and HTML say alike about a report: headline, certainty, facts, tables, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePath

from lineage.checkpoint.files import size_words
from lineage.errors import printable
from lineage.measure.diff import Described
from lineage.report.document import ClaimSummary, Report, VerdictSummary
from lineage.report.tables import Cell, Table, count, size

__all__ = ["HEADLINES", "certainty", "component_table", "facts", "group_table", "next_steps", "percent", "side"]

HEADLINES = {
    "copied": "B holds A's weights, renamed, laid out anew or cast at most.",
    "transformed": "B's weights are derived from A's, or both from a common ancestor's.",
    "retrained": "B has A's architecture, but weights of its own.",
    "unrelated": "B shares neither architecture nor weights with A.",
    "undetermined": "There is too little evidence to tell.",
}
_GRADES = {
    "remap": "fits B once its keys are renamed",
    "reshape": "fits B exactly once its factors are cut and joined as the mapping says",
    "retrain": "finds its places in B, but the weights there are others: train it anew",
    "none": "has no place in B",
}
_DIRECTIONS = {"a-to-b": "B comes from A", "b-to-a": "A comes from B", None: "the weights do not show who came first"}
#: figures in the table of groups
_FIGURES = ("cosine", "rel_l2", "norm_ratio", "changed")
#: chances above this are written as decimals
_PLAIN = -3.0


def percent(share: float) -> str:
    """A share in percent that reads as 0 or 100 only where it is.

    Examples
    --------
    >>> percent(1.0), percent(0.99996), percent(0.5), percent(0.00001)
    ('100 %', '99.9 %', '50.0 %', '0.1 %')
    """
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", " %")
    return f"{min(max(100 * share, 0.1), 99.9):.1f} %"


def certainty(verdict: VerdictSummary) -> str:
    """How sure the verdict is, in a sentence."""
    p = verdict.log10_p
    if p is None:
        return "No exact test applies, so there is no p-value; the reasons say what the verdict rests on."
    chance = f"{10**p:.2g}" if p > _PLAIN else f"10^{p:.1f}"
    return f"Models trained independently agree this much with probability {chance}."


def facts(report: Report) -> list[tuple[str, str]]:
    """What there is to know beside the reasons: (word, sentence)."""
    document, verdict = report.document, report.verdict
    mapping, read = document.mapping, document.read
    by_values = f"{mapping.certified_b:,} certified by their values"
    if read is not None:
        by_values = f"{mapping.matched_b - mapping.by_structure_b:,} by sampled values"
    found = [
        ("How sure", certainty(verdict)),
        ("Coverage", f"{percent(verdict.coverage)} of B's parameters take part in matched tensors"),
        (
            "Tensors",
            f"{mapping.matched_b:,} of B's {document.b.tensors:,} found in A by {count(mapping.rules, 'rule')}, "
            f"{by_values}, {mapping.by_structure_b:,} by structure alone",
        ),
        ("Relations", ", ".join(verdict.relations) or "none found"),
    ]
    if read is not None:
        total = size_words(document.a.bytes + document.b.bytes)
        told = f"{size_words(read.bytes)} of {total}, {100 * read.share:.2f} % (the budget: {size_words(read.budget)})"
        found.insert(1, ("Read", told))
    if document.units is not None and document.units.rows is not None:
        told = f"{document.units.rows:,} units a layer for the exact test, chosen with seed {document.units.seed}"
        found.insert(1, ("Sampled", told))
    if verdict.related and read is None:
        found.append(("Direction", _DIRECTIONS[verdict.direction]))
    patterns = report.diff.comparison.change.patterns
    if verdict.related and patterns:
        found.append(("Change", ", ".join(patterns)))
    as_it_is = document.lora.grade == "remap" and all(rule.to == rule.source for rule in report.mapping.rules)
    found.append(("LoRA", f"a LoRA made for A {'fits B as it is' if as_it_is else _GRADES[document.lora.grade]}"))
    return found


def side(found: Described) -> str:
    """One checkpoint in a line."""
    dtypes = ", ".join(found.dtypes) or "nothing"
    return (
        f"{printable(found.path)} ({found.format}, {count(found.tensors, 'tensor')}, "
        f"{size(found.parameters)} parameters, {dtypes})"
    )


def component_table(report: Report) -> Table | None:
    """One row by component, None where there is only one."""
    parts = report.document.components
    if len(parts) < 2:
        return None
    rows: list[tuple[Cell, ...]] = []
    for part in parts:
        v = part.verdict
        p = None if v.log10_p is None else round(v.log10_p, 1)
        rows.append((part.name, part.a, v.class_, p, percent(v.coverage), ", ".join(v.relations) or None))
    return Table(
        title="Components", heads=("component", "in A", "verdict", "log10 p", "coverage", "relations"), rows=tuple(rows)
    )


def group_table(report: Report) -> Table | None:
    """One row by group of tensors: how alike they are, None where nothing was compared."""
    groups = report.document.metrics.groups
    rows = tuple((name, found["tensors"], *(found[f] for f in _FIGURES)) for name, found in groups.items())
    heads = ("group", "tensors", "cosine", "relative L2", "norm ratio", "values changed")
    return Table(title="How alike, by group of tensors", heads=heads, rows=rows) if rows else None


def next_steps(report: Report, out: str | None = None) -> list[str]:
    """What a person can do now, as sentences with commands.

    Parameters
    ----------
    out : folder that the report's files were written to, None where they were not
    """
    document, verdict = report.document, report.verdict
    steps = []
    if verdict.related is None:
        steps.append("Compare other parts, or larger models of both families: untrained ones carry no evidence.")
    elif not verdict.related:
        steps.append("Nothing speaks for a common origin. If you suspect another ancestor, investigate that one.")
    else:
        steps += _related_steps(report, out)
    if any(c.verdict == "contradicted" for c in document.claims):
        steps.append("B names A as its origin, which its weights contradict: ask its authors.")
    return steps


def _related_steps(report: Report, out: str | None) -> list[str]:
    """What can be done with a relative: look closer, use the mapping, ask who came first."""
    document, verdict = report.document, report.verdict
    a, b = (shlex.quote(printable(s.path)) for s in (document.a, document.b))
    steps = [f"See which tensors changed most: lineage diff {a} {b}"]
    moved = any(rule.ops or rule.to != rule.source for rule in report.mapping.rules)
    if not out:
        steps.append(f"Keep the mapping and a report to show: lineage investigate {a} {b} -o report")
    elif moved:
        mapping = shlex.quote(printable(str(PurePath(out) / "mapping.yaml")))
        steps.append(f"Lay A out as B is, to use B's tools on it: lineage apply {mapping} {a} -o a-as-b.safetensors")
        steps.append(
            "Carry a LoRA made for A over to B: "
            f"lineage lora convert LORA --map {mapping} --base {a} --to peft -o lora-for-b"
        )
    if all(part.merge is None for part in document.components) and _several(document.claims):
        steps.append(
            "B's files speak of several origins. If it was merged, name them to weigh each: "
            f"lineage investigate {a} {b} --parent C --parent D"
        )
    if verdict.direction is None:
        steps.append("To learn who came first, compare publication dates, or investigate both against older models.")
    return steps


def _several(claims: Sequence[ClaimSummary]) -> bool:
    """True where the files call B a merge, or name more than one base."""
    bases = {claim.says for claim in claims if claim.source.endswith(("base_model", "base_models"))}
    return len(bases) > 1 or any(claim.says == "merge" or "merge" in claim.source for claim in claims)
