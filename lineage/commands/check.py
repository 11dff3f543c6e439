"""`lineage check`: the verdict as a gate for scripts."""

from __future__ import annotations

import click

from lineage.commands import (
    Settings,
    budget_option,
    common_options,
    open_progress,
    parents_option,
    rows_option,
    write_json,
)

#: exit code where there is too little evidence either way
_UNTOLD = 3


@click.command("check")
@click.argument("a")
@click.argument("b")
@click.option(
    "--expect",
    required=True,
    type=click.Choice(["related", "unrelated", "copied", "transformed", "retrained"]),
    help="What must hold. `related`: copied or transformed; `unrelated`: no ancestor shared.",
)
@click.option("--claim", metavar="TAG", help="A relation that must be among those found, such as fine-tuned.")
@click.option("--json", "as_json", is_flag=True, help="Print the answer and the report as one JSON document.")
@rows_option
@budget_option
@parents_option
@common_options
def check_command(
    settings: Settings,
    a: str,
    b: str,
    expect: str,
    claim: str | None,
    as_json: bool,
    rows: int | None,
    budget: int | None,
    parents: tuple[str, ...],
) -> int:
    """Exit 0 when what is expected of B holds, 1 when it does not, 3 when it cannot be told.

    Example: lineage check DIR/base DIR/suspect --expect related
    """
    from lineage import api
    from lineage.errors import printable

    if claim is not None:
        _known(claim)
    with api.open(a) as one, api.open(b) as two, open_progress(settings) as progress:
        answer = api.check(
            one, two, expect=expect, claim=claim, seed=settings.seed, threads=settings.threads,
            device=settings.device, rows=rows, budget=budget, parents=parents, progress=progress,
        )  # fmt: skip
    if as_json:
        write_json(answer.to_dict())
    elif not settings.quiet:
        word = {True: "holds", False: "does not hold", None: "cannot be told"}[answer.holds]
        click.echo(f"{word}: {printable(answer.why)}")
    return _UNTOLD if answer.holds is None else int(not answer.holds)


def _known(claim: str) -> None:
    """Refuses a relation that does not exist, and names the nearest."""
    from lineage.errors import InputError, nearest
    from lineage.report.document import RELATIONS

    if claim not in RELATIONS:
        near = nearest(claim, RELATIONS)
        remedy = f'did you mean "{near}"?' if near else f"one of {' '.join(RELATIONS)}"
        raise InputError("--claim", f'no relation "{claim}"', remedy)
