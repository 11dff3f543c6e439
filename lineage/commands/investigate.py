"""`lineage investigate`: does B come from A, how, and how sure is that?"""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

import click

from lineage.commands import (
    Settings,
    budget_option,
    common_options,
    open_progress,
    parents_option,
    rows_option,
    say,
    say_stored,
    write_json,
)

if TYPE_CHECKING:
    from lineage.checkpoint import Checkpoint
    from lineage.report.document import Report

#: columns of text that goes to a file or a pipe
_WIDE = 100


@click.command("investigate")
@click.argument("a")
@click.argument("b")
@click.option(
    "-o",
    "--out",
    metavar="DIR",
    help="Write report.json .md .html, tensors.csv, mapping.yaml, lora_keys.yaml to DIR.",
)
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Elements behind ranks and quantiles.  [4194304]")
@rows_option
@budget_option
@parents_option
@common_options
def investigate_command(
    settings: Settings,
    a: str,
    b: str,
    out: str | None,
    as_json: bool,
    samples: int | None,
    rows: int | None,
    budget: int | None,
    parents: tuple[str, ...],
) -> int:
    """Answer whether B's weights come from A's: mapping, figures, an exact test, a verdict with its reasons.

    Example: lineage investigate DIR/base DIR/suspect -o DIR/report
    """
    from lineage import api
    from lineage.measure.compare import SAMPLE
    from lineage.report.document import with_keys
    from lineage.report.folder import KEYS, check_folder, write_folder

    if out is not None:
        check_folder(out, inputs=(a, b, *parents))
    with api.open(a) as one, api.open(b) as two, open_progress(settings) as progress:
        report = api.investigate(
            one, two, seed=settings.seed, threads=settings.threads, sample=samples or SAMPLE, device=settings.device,
            rows=rows, budget=budget, parents=parents, progress=progress,
        )  # fmt: skip
        if out is not None:
            keys = _keys(report, one, two)
            report = report if keys is None else with_keys(report, KEYS)
            write_folder(report, out, keys=keys, inputs=(a, b, *parents))
    say_stored(settings, report.mapping)
    if out is not None:
        say(settings, f"wrote {out}")
    if as_json:
        write_json(report.document)
        return 0
    from lineage.report.terminal import text

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((_WIDE, 24)).columns if terminal else _WIDE
    click.echo(text(report, width=width, quiet=settings.quiet, verbose=settings.verbose > 0, color=terminal, out=out))
    return 0


def _keys(report: Report, a: Checkpoint, b: Checkpoint) -> str | None:
    """The key map for adapters, where a mapping was found."""
    from lineage.lora.keymap import key_map

    if not report.mapping.rules:
        return None
    return key_map(report.mapping, a, b, class_=report.document.verdict.class_).to_yaml()
