"""`lineage investigate`: does B come from A, how, and how sure is that?"""

from __future__ import annotations

import shutil
import sys

import click

from lineage.commands import Settings, budget_option, common_options, open_progress, parents_option, say, write_json

#: columns of text that goes to a file or a pipe
_WIDE = 100


@click.command("investigate")
@click.argument("a")
@click.argument("b")
@click.option("-o", "--out", metavar="DIR", help="Write report.json, .md, .html, tensors.csv and mapping.yaml to DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print report.json.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Elements behind ranks and quantiles.  [4194304]")
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
    budget: int | None,
    parents: tuple[str, ...],
) -> int:
    """Answer whether B's weights come from A's: mapping, figures, an exact test, a verdict with its reasons.

    Example: lineage investigate DIR/base DIR/suspect -o DIR/report
    """
    from lineage import api
    from lineage.measure.compare import SAMPLE
    from lineage.report.folder import check_folder, write_folder

    if out is not None:
        check_folder(out, inputs=(a, b, *parents))
    with api.open(a) as one, api.open(b) as two, open_progress(settings) as progress:
        report = api.investigate(
            one, two, seed=settings.seed, threads=settings.threads, sample=samples or SAMPLE, device=settings.device,
            budget=budget, parents=parents, progress=progress,
        )  # fmt: skip
    if out is not None:
        write_folder(report, out, inputs=(a, b, *parents))
        say(settings, f"wrote {out}")
    if as_json:
        write_json(report.document)
        return 0
    from lineage.report.terminal import text

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((_WIDE, 24)).columns if terminal else _WIDE
    click.echo(text(report, width=width, quiet=settings.quiet, verbose=settings.verbose > 0, color=terminal, out=out))
    return 0
