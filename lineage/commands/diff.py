"""`lineage diff`: two checkpoints, tensor by tensor."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from fnmatch import translate
from typing import TYPE_CHECKING

import click

from lineage.commands import Settings, common_options, open_progress, say
from lineage.errors import InputError, nearest

if TYPE_CHECKING:
    from lineage.checkpoint import Checkpoint
    from lineage.measure.diff import Diff

#: columns of text that goes to a file or a pipe
_WIDE = 160


@click.command("diff")
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with every figure of every tensor.")
@click.option("--csv", metavar="FILE", help="Write one line by tensor.")
@click.option("--html", metavar="FILE", help="Write one self-contained page: heat map, sortable table.")
@click.option("--markdown", metavar="FILE", help="Write the tables as Markdown.")
@click.option("--top", type=click.IntRange(0), default=20, metavar="N", help="List the N most changed tensors.  [20]")
@click.option("--by", default="rel_l2", metavar="FIGURE", help="... by this figure.  [rel_l2]")
@click.option("--filter", "only", multiple=True, metavar="PATTERN", help="Only names that match: a glob, or re:REGEX.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="No names that match; same forms.")
@click.option("--names", is_flag=True, help="List names by status, no figures.")
@click.option("--threshold", type=float, metavar="X", help="Changed means max |b - a| above X.  [any difference]")
@click.option("--exit-code", is_flag=True, help="Exit 1 where anything differs.")
@click.option("--groups", "groups_file", metavar="FILE", help="YAML with name patterns of groups and layers.")
@click.option("--samples", type=click.IntRange(1), metavar="N", help="Elements behind ranks and quantiles.  [4194304]")
@click.option("--spectrum", is_flag=True, help="Also ranks and leading directions of B - A, matrix by matrix.")
@common_options
def diff_command(
    settings: Settings,
    a: str,
    b: str,
    as_json: bool,
    csv: str | None,
    html: str | None,
    markdown: str | None,
    top: int,
    by: str,
    only: tuple[str, ...],
    exclude: tuple[str, ...],
    names: bool,
    threshold: float | None,
    exit_code: bool,
    groups_file: str | None,
    samples: int | None,
    spectrum: bool,
) -> int:
    """Compare B with A tensor by tensor: what was added, removed, reshaped or changed, by how much and where.

    Norms, biases and other vectors are summed up apart from content weights: their values sit near one or zero in
    every model, so their cosines say little and would dilute those that do. A cast alone is no change. Where no name
    occurs in both, tensors are paired by their values first.

    Example: lineage diff DIR/base DIR/suspect
    """
    from lineage.measure.compare import SAMPLE
    from lineage.measure.diff import diff
    from lineage.measure.groups import read_groups

    _check_figure(by)
    outputs = {"csv": csv, "html": html, "markdown": markdown}
    groups = read_groups(groups_file)
    with ExitStack() as stack:
        one, two = (stack.enter_context(_open(path)) for path in (a, b))
        _check_outputs(outputs, (a, b))
        progress = stack.enter_context(open_progress(settings))
        progress.step("comparing")
        found = diff(
            one, two, threads=settings.threads, seed=settings.seed, sample=samples or SAMPLE, device=settings.device,
            threshold=threshold, groups=groups, wanted=_wanted(only, exclude, one, two), spectra=spectrum,
            progress=progress.count,
            matching=lambda: progress.step("no name occurs in both: pairing tensors by their values"),
        )  # fmt: skip
    _write(found, outputs, (a, b), top, by)
    if found.matched_by == "values":  # said last: an error must stay the only line on stderr
        say(settings, "lineage: no tensor name occurs in both; paired tensors by their values")
    _print(found, settings, as_json=as_json, names=names, top=top, by=by)
    return int(exit_code and found.comparison.differs)


def _open(path: str) -> Checkpoint:
    from lineage.checkpoint import open_checkpoint

    return open_checkpoint(path)


def _check_figure(by: str) -> None:
    """Refuses a figure that does not exist, and names the nearest."""
    from lineage.measure.metrics import FIGURES

    if by not in FIGURES:
        near = nearest(by, FIGURES)
        raise InputError(
            "--by", f'no figure "{by}"', f'did you mean "{near}"?' if near else f"one of {' '.join(FIGURES)}"
        )


def _check_outputs(outputs: dict[str, str | None], inputs: Sequence[str]) -> None:
    """Refuses outputs that cannot be written before anything is measured."""
    from lineage.checkpoint.write import check_output

    for path in filter(None, outputs.values()):
        check_output(path, inputs=inputs)


def _wanted(only: Sequence[str], exclude: Sequence[str], a: Checkpoint, b: Checkpoint) -> Callable[[str], bool] | None:
    """Says of a name whether it takes part; None where all do."""
    if not only and not exclude:
        return None
    keep, drop = [_pattern(p, "--filter") for p in only], [_pattern(p, "--exclude") for p in exclude]

    def wanted(name: str) -> bool:
        return (not keep or any(p.search(name) for p in keep)) and not any(p.search(name) for p in drop)

    if not any(wanted(name) for side in (a, b) for name in side.specs):
        raise InputError(
            "--filter" if only else "--exclude", "leaves no tensor to compare", "lineage inspect lists names"
        )
    return wanted


def _pattern(text: str, option: str) -> re.Pattern[str]:
    """A glob over whole names, or a regular expression after `re:`."""
    try:
        return re.compile(text[3:] if text.startswith("re:") else r"\A" + translate(text))
    except re.error as exc:
        raise InputError(option, f'"{text}" is no regular expression: {exc}') from exc


def _write(found: Diff, outputs: dict[str, str | None], inputs: Sequence[str], top: int, by: str) -> None:
    """Writes the files that were asked for."""
    from lineage.checkpoint.write import atomic
    from lineage.report import diff as report

    for kind, path in outputs.items():
        if path is None:
            continue
        if kind == "csv":
            text = report.csv_text(found)
        elif kind == "html":
            text = report.html(found, by=by)
        else:
            text = report.markdown(found, top=top, by=by)
        with atomic(path, inputs=inputs) as part:
            part.write_bytes(text.encode("utf-8", "backslashreplace"))


def _print(found: Diff, settings: Settings, *, as_json: bool, names: bool, top: int, by: str) -> None:
    """The answer on stdout."""
    from lineage.report import diff as report

    if as_json:
        for part in report.json_lines(found):
            sys.stdout.buffer.write(part)
        sys.stdout.buffer.flush()
        return
    if names:
        text = report.names(found) or "no tensors on either side"
    else:
        terminal = sys.stdout.isatty()
        width = shutil.get_terminal_size((_WIDE, 24)).columns if terminal else _WIDE
        text = report.text(
            found, top=top, by=by, width=width, verbose=settings.verbose > 0, quiet=settings.quiet, color=terminal
        )
    click.echo(text)
