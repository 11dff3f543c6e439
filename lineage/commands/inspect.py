"""`lineage inspect`: what one checkpoint holds."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import click

from lineage.commands import Settings, common_options, open_progress, write_json

if TYPE_CHECKING:
    from lineage.checkpoint.inspection import Inspection, Tensor
    from lineage.report.tables import Table

#: columns of text that goes to a file or a pipe
_WIDE = 160
_FIGURES = ("mean", "std", "min", "max", "zero", "nan")


@click.command("inspect")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with every tensor.")
@click.option("--stats", is_flag=True, help="Read the data too: mean, spread, range, zeros and NaN of every tensor.")
@common_options
def inspect_command(settings: Settings, path: str, as_json: bool, stats: bool) -> int:
    """Show what a checkpoint holds and what it says of its origin.

    Tensors whose names differ only in numbers share a line. The network is a guess from names; what the files say of
    their origin is repeated, not checked: `lineage investigate` checks it.

    Example: lineage inspect DIR/base
    """
    from lineage.checkpoint import open_checkpoint
    from lineage.checkpoint.inspection import inspect

    with open_checkpoint(path) as checkpoint, open_progress(settings) as progress:
        progress.step("reading")
        found = inspect(checkpoint, statistics=stats, progress=progress.count)
    if as_json:
        write_json(found)
    else:
        click.echo(_text(found, stats, settings.quiet))
    return 0


def _text(found: Inspection, stats: bool, quiet: bool) -> str:
    """The record for people; whatever comes from the file is made printable."""
    from lineage.errors import printable
    from lineage.report.tables import as_text, count, size

    width = shutil.get_terminal_size((_WIDE, 24)).columns if sys.stdout.isatty() else _WIDE
    dtypes = ", ".join(f"{number:,} {dtype}" for dtype, number in found.dtypes.items())
    lines = [
        printable(found.path),
        f"{found.format}, {count(found.count, 'tensor')}, {found.parameters:,} parameters, {size(found.bytes, 'B')}"
        + (f" ({dtypes})" if dtypes else ""),
    ]
    if found.architecture:
        lines.append(f"network: {found.architecture} (a guess from names)")
    lines += [f"says of itself: {claim.source}: {claim.says}" for claim in found.claims]
    if not quiet:
        lines += [f"note: {printable(note, 300)}" for note in found.notes]
    if len(found.components) > 1:
        lines += ["", as_text(_component_table(found), width=width)]
    if found.tensors:
        table = _statistics_table(found) if stats else _group_table(found)
        lines += ["", as_text(table, width=width)]
    return "\n".join(lines)


def _component_table(found: Inspection) -> Table:
    """One row a component."""
    from lineage.report.tables import Table, size

    rows = [(p.name, p.tensors, size(p.parameters), size(p.bytes, "B"), p.network or "") for p in found.components]
    return Table(heads=("component", "tensors", "parameters", "size", "network"), rows=tuple(rows))


def _group_table(found: Inspection) -> Table:
    """One row a template of names, so that a hundred layers take no more room than one."""
    from lineage.checkpoint.inspection import name_groups
    from lineage.report.tables import Table, size

    groups = name_groups(found.tensors)
    rows = [(g.template, g.tensors, _shape(g.shape), g.dtype, size(g.parameters)) for g in groups]
    return Table(heads=("name", "tensors", "shape", "dtype", "parameters"), rows=tuple(rows))


def _statistics_table(found: Inspection) -> Table:
    """One row a tensor with its figures."""
    from lineage.report.tables import Table

    def row(tensor: Tensor) -> tuple[str | float | None, ...]:
        figures = (getattr(tensor.statistics, name) for name in _FIGURES)
        return (tensor.name, _shape(tensor.shape), tensor.dtype, *figures)

    return Table(heads=("name", "shape", "dtype", *_FIGURES), rows=tuple(map(row, found.tensors)))


def _shape(shape: tuple[int, ...]) -> str:
    """`384 × 96`, or a word for no axis."""
    return " × ".join(map(str, shape)) or "scalar"
