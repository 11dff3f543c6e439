"""The comparison of two checkpoints as JSON, CSV, Markdown, HTML and text; everything said is in the record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lineage.errors import printable
from lineage.measure.compare import TensorRow
from lineage.measure.diff import Described, Diff, top_rows
from lineage.measure.metrics import FIGURES
from lineage.measure.spectrum import LEADING, Spectrum
from lineage.report.tables import Cell, Table, as_csv, as_markdown, as_text, bar, count, figure, size

__all__ = ["csv_text", "html", "json_lines", "markdown", "names", "text"]

#: figures in tables for people; JSON and CSV hold all
SHOWN = ("cosine", "rel_l2", "max_abs", "mean_rel", "norm_ratio", "changed")
#: columns of singular values, where they were asked for
SPECTRAL = ("size", "rank_above_rounding", "effective_rank", *(f"leading_{k}" for k in LEADING))
#: rows at a time on their way to JSON
CHUNK = 512
#: rows of the HTML table; a browser takes no more with ease
HTML_ROWS = 3000
#: names in a list of one status
LISTED = 12
_MARK = {"warning": "!", "notice": "*", "info": "-"}
#: red, yellow, and no colour (ECMA-48)
_PAINT = {"warning": "31", "notice": "33", "info": "0"}
_GAP = {"removed": "only in A", "added": "only in B", "shape-changed": "of another shape"}


def json_lines(diff: Diff) -> Iterator[bytes]:
    """The document of `diff --json`, piece by piece, one tensor a line; what is undefined is null."""
    encode = _encode
    yield b'{"a": ' + encode(diff.a) + b',\n"b": ' + encode(diff.b) + b',\n"summary": ' + encode(diff.summary())
    rows = diff.comparison.rows
    yield b',\n"tensors": [\n'
    for at in range(0, len(rows), CHUNK):
        part = b",\n".join(encode(row) for row in rows[at : at + CHUNK])
        yield part + (b",\n" if at + CHUNK < len(rows) else b"\n")
    yield b"]}\n"


def _encode(value: Any) -> bytes:
    """JSON of a record; a lone surrogate in a name, which UTF-8 lacks, becomes an escape."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(value), allow_nan=False).encode("ascii")


def csv_text(diff: Diff) -> str:
    """One line by tensor with every figure."""
    heads = ["name", "b_name", "status", "shape", "shape_b", "dtype_a", "dtype_b", "group", "layer", *FIGURES, "sample"]
    spectral = diff.spectral
    rows = ([*_csv_row(row), *(_spectral(row) if spectral else ())] for row in diff.comparison.rows)
    return as_csv([*heads, *(SPECTRAL if spectral else ())], rows)


def _spectral(row: TensorRow) -> list[Cell]:
    """Cells of `SPECTRAL`; all empty where the difference is zero or no matrix."""
    found = row.spectrum
    if not isinstance(found, Spectrum):
        return [None] * len(SPECTRAL)
    return [found.size, found.rank_above_rounding, found.effective_rank, *found.leading]


def _csv_row(row: TensorRow) -> list[Any]:
    figures = [None if row.metrics is None else getattr(row.metrics, name) for name in FIGURES]
    shape_b = None if row.shape_b is None else _shape(row.shape_b)
    return [row.name, row.b_name, row.status, _shape(row.shape), shape_b, row.dtype_a, row.dtype_b, row.group,
            row.layer, *figures, row.sampled and row.sampled["size"]]  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def names(diff: Diff) -> str:
    """One line by tensor: status and name, with B's name where it differs."""
    lines = []
    for row in diff.comparison.rows:
        other = f" -> {printable(row.b_name)}" if row.b_name not in (None, row.name) and row.b_name else ""
        lines.append(f"{row.status:13}  {printable(row.name)}{other}")
    return "\n".join(lines)


def text(
    diff: Diff, *, top: int, by: str, width: int = 0, verbose: bool = False, quiet: bool = False, color: bool = False
) -> str:
    """The comparison for a terminal: what differs, what it means, then tables.

    Parameters
    ----------
    top, by : how many of the most changed tensors are listed, and by which figure
    width : columns of the terminal, 0 where it does not matter
    verbose : also layer by layer, and every name that only one side has
    quiet : what differs and what it means, no tables
    color : paint insights by severity, for a terminal
    """
    parts = [_headline(diff), _insights(diff, color)]
    if quiet:
        return "\n\n".join(part for part in parts if part)
    parts.append(_alone(diff, verbose))
    if verbose or _changed(diff.comparison.rows):
        parts += [as_text(table, width=width) for table in _tables(diff, top, by, layers=verbose)]
    if not verbose:
        parts.append(_course(diff))
    parts.append(_footnote(diff))
    return "\n\n".join(part for part in parts if part)


def markdown(diff: Diff, *, top: int, by: str) -> str:
    """The comparison as a Markdown document."""
    lines = ["## Comparison", "", f"- A: {_side(diff.a)}", f"- B: {_side(diff.b)}", f"- {_counts(diff)}", ""]
    lines += [f"- **{i.severity}**: {i.text}" for i in diff.comparison.insights]
    tables = [as_markdown(table) for table in _tables(diff, top, by, layers=True)]
    alone = _alone(diff, True)
    return "\n\n".join(filter(None, ["\n".join(lines), *tables, f"```\n{alone}\n```" if alone else "",
                                     _footnote(diff)])) + "\n"  # fmt: skip


def html(diff: Diff, *, by: str) -> str:
    """The comparison as one HTML file without anything from elsewhere."""
    import jinja2

    source = (Path(__file__).parent / "diff.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["figure"] = figure
    template = environment.from_string(source)
    rows = top_rows(diff.comparison, by, HTML_ROWS)
    listed = {id(row) for row in rows}
    rest = [row for row in diff.comparison.rows if id(row) not in listed]
    rows += rest[: max(0, HTML_ROWS - len(rows))]
    groups, heat = _heat(diff)
    return template.render(
        a=_side(diff.a), b=_side(diff.b), counts=_counts(diff), insights=diff.comparison.insights,
        tables=_tables(diff, 0, by, layers=False)[:2], groups=groups, heat=heat,
        figures=(*FIGURES, *(SPECTRAL if diff.spectral else ())),
        rows=[_html_row(row, diff.spectral) for row in rows], hidden=len(diff.comparison.rows) - len(rows),
        patterns=diff.comparison.change.patterns, note=_footnote(diff),
    )  # fmt: skip


def _html_row(row: TensorRow, spectral: bool) -> dict[str, Any]:
    figures = [None if row.metrics is None else getattr(row.metrics, name) for name in FIGURES]
    figures += _spectral(row) if spectral else []
    other = printable(row.b_name) if row.b_name and row.b_name != row.name else ""
    dtypes = dict.fromkeys(filter(None, (row.dtype_a, row.dtype_b)))
    return {"name": printable(row.name), "b_name": other, "status": row.status, "shape": _shape(row.shape),
            "dtype": " → ".join(dtypes), "group": row.group, "layer": row.layer, "figures": figures}  # fmt: skip


def _heat(diff: Diff) -> tuple[list[str], list[dict[str, Any]]]:
    """Relative L2 by layer and group, each cell with its share of the largest, 0 to 1."""
    groups = sorted({group for layer in diff.comparison.layers for group in layer["groups"]})
    values = [[layer["groups"].get(g, {}).get("rel_l2") for g in groups] for layer in diff.comparison.layers]
    top = max((v for line in values for v in line if v is not None), default=0.0) or 1.0
    heat = []
    for layer, line in zip(diff.comparison.layers, values, strict=True):
        cells = [{"value": v, "share": None if v is None else v / top} for v in line]
        heat.append({"name": printable(f"{layer['stack']}.{layer['layer']}"), "cells": cells})
    return groups, heat


def _headline(diff: Diff) -> str:
    return f"A  {_side(diff.a)}\nB  {_side(diff.b)}\n\n{_counts(diff)}"


def _side(side: Described) -> str:
    dtypes = ", ".join(side.dtypes) or "nothing"
    return (
        f"{printable(side.path)}: {side.format}, {count(side.tensors, 'tensor')}, {size(side.parameters)} parameters, "
        f"{size(side.bytes, 'B')}, {dtypes}"
    )


def _counts(diff: Diff) -> str:
    """How many tensors have each status, and how they were paired."""
    how = {
        "name": "paired by name",
        "values": "no name occurs in both: paired by their values",
        "mapping": "paired by the mapping",
        "nothing": "no name occurs in both and no values correspond: nothing to compare",
    }[diff.matched_by]
    counts = ", ".join(f"{n:,} {status}" for status, n in diff.comparison.statuses.items() if n)
    return f"{counts or 'no tensors on either side'} ({how})"


def _insights(diff: Diff, color: bool) -> str:
    lines = []
    for one in diff.comparison.insights:
        line = f"{_MARK[one.severity]} {one.text}"
        lines.append(f"\x1b[{_PAINT[one.severity]}m{line}\x1b[0m" if color else line)
    return "\n".join(lines)


def _alone(diff: Diff, whole: bool) -> str:
    """Names that only one side has or whose shape differs."""
    parts = []
    for status, words in _GAP.items():
        rows = [row for row in diff.comparison.rows if row.status == status]
        shown = rows if whole else rows[:LISTED]
        if rows:
            lines = [f"{count(len(rows), 'tensor')} {words}:", *(f"  {_described(row)}" for row in shown)]
            if len(shown) < len(rows):
                lines.append(f"  … and {len(rows) - len(shown):,} more (-v lists them)")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _described(row: TensorRow) -> str:
    shape = _shape(row.shape) + (f" -> {_shape(row.shape_b)}" if row.shape_b is not None else "")
    return f"{printable(row.name)}  {shape or 'scalar'}  {row.dtype_a or row.dtype_b}"


def _tables(diff: Diff, top: int, by: str, *, layers: bool) -> list[Table]:
    """Overall, groups, layers where wanted, and the most changed tensors."""
    comparison = diff.comparison
    tables = []
    if comparison.overall["tensors"]:
        tables.append(_spread("Content weights", comparison.overall))
    if comparison.overall["apart"]["changed_tensors"]:
        tables.append(_spread("Norms, biases and other vectors", comparison.overall["apart"]))
    if comparison.groups:
        rows = [_pooled_row(group, found) for group, found in comparison.groups.items()]
        tables.append(Table(title="Groups", heads=("group", "tensors", "differ", *SHOWN), rows=tuple(rows)))
    if layers and comparison.layers:
        rows = [_pooled_row(f"{one['stack']}.{one['layer']}", one) for one in comparison.layers]
        tables.append(Table(title="Layers", heads=("layer", "tensors", "differ", *SHOWN), rows=tuple(rows)))
    chosen = top_rows(comparison, by, top)
    if chosen:
        shown = SHOWN if by in SHOWN else (by, *SHOWN)
        listed = tuple((row.name, _shape(row.shape), *(getattr(row.metrics, f) for f in shown)) for row in chosen)
        title = f"Most changed by {by}: {len(chosen)} of {count(_changed(comparison.rows), 'tensor')}"
        tables.append(Table(title=title, heads=("tensor", "shape", *shown), rows=listed))
    if diff.spectral and chosen:
        tables.append(_directions(chosen))
    return tables


def _directions(rows: Sequence[TensorRow]) -> Table:
    """In how many directions each of the matrices changed."""
    heads = ("tensor", "directions", "above rounding", "effective rank", *(f"first {k}" for k in LEADING))
    listed = [(row.name, *_spectral(row)) for row in rows if isinstance(row.spectrum, Spectrum)]
    title = "Directions of B - A: singular values above rounding, effective rank, share of the leading ones"
    return Table(title=title, heads=heads, rows=tuple(listed))


def _changed(rows: Sequence[TensorRow]) -> int:
    return sum(row.status in ("changed", "shape-changed") and row.metrics is not None for row in rows)


def _pooled_row(name: str, found: dict[str, Any]) -> tuple[Cell, ...]:
    return (name, found["tensors"], found["changed_tensors"], *(found[f] for f in SHOWN))


def _spread(title: str, found: dict[str, Any]) -> Table:
    """Figures of a summary: pooled, and over its tensors."""
    rows = tuple((name, found[name], *(found[w][name] for w in ("mean", "std", "min", "max"))) for name in SHOWN)
    title = f"{title}: {found['changed_tensors']:,} of {count(found['tensors'], 'tensor')} differ"
    return Table(title=title, heads=("figure", "pooled", "mean", "std", "min", "max"), rows=rows)


def _course(diff: Diff) -> str:
    """Relative L2 over the layers as a line of bars, one line by stack."""
    stacks: dict[str, list[float | None]] = {}
    for layer in diff.comparison.layers:
        stacks.setdefault(layer["stack"], []).append(layer["rel_l2"])
    if not any(v for values in stacks.values() for v in values):
        return ""
    lines = [f"  {printable(stack, 48)}  {bar(values)}" for stack, values in stacks.items() if len(values) > 1]
    return "\n".join(["Relative L2 by layer (-v for figures)", *lines]) if lines else ""


def _footnote(diff: Diff) -> str:
    """What was sampled or estimated."""
    lines = []
    sampled = [row for row in diff.comparison.rows if row.sampled]
    if sampled:
        lines.append(
            f"Spearman and quantiles of {count(len(sampled), 'tensor')} come from samples of about "
            f"{size(diff.comparison.sample)} elements (seed {diff.comparison.seed}); all else is exact."
        )
    spectra = [row.spectrum for row in diff.comparison.rows if isinstance(row.spectrum, Spectrum)]
    guessed = sum(not found.exact for found in spectra)
    if guessed:
        lines.append(
            f"Singular values of {guessed:,} of {len(spectra):,} matrices: the leading ones by random projection, "
            f"ranks beyond {LEADING[-1]} are estimates (seed {diff.comparison.seed})."
        )
    return "\n".join(lines)
