"""`lineage map`: how the tensors of B are laid out in A, found or verified, and written as a mapping or as code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lineage.commands import Settings, common_options, open_progress, say

if TYPE_CHECKING:
    from lineage.layout.mapping import Mapping

#: forms that `lineage.emit` knows; listed here so that the command starts without loading it
FORMS = ("json", "python", "transformers")
#: names of tensors left over that are printed; all of them with -v
_SHOWN = 10


@click.command("map")
@click.argument("a")
@click.argument("b", required=False)
@click.option("-o", "--out", metavar="FILE", help="File to write.  [printed]")
@click.option("--emit", "form", type=click.Choice(FORMS), help="Write code or JSON instead of YAML.")
@click.option("--check", "given", metavar="FILE", help="Verify this mapping again from the weights instead.")
@common_options
def map_command(settings: Settings, a: str, b: str | None, out: str | None, form: str | None, given: str | None) -> int:
    """Find how the tensors of B are laid out in A: names, order of axes, fused and split tensors.

    With --emit, a mapping file alone may stand for A and B: what was found before is written in another form.

    Exits 1 where nothing corresponds at all, and with --check where a rule does not hold.

    Example: lineage map DIR/base DIR/suspect -o mapping.yaml
    """
    if given is not None:
        if out is not None or form is not None:
            raise click.UsageError(f"--check writes nothing: leave out {'--emit' if out is None else '-o'}")
        if b is None:
            raise click.UsageError("--check needs A and B beside the mapping")
        return _check(settings, given, a, b)
    if b is not None:
        return _find(settings, a, b, out, form)
    if form is None:
        raise click.UsageError("give A and B; a mapping file alone needs --emit")
    return _rewrite(settings, a, form, out)


def _rewrite(settings: Settings, path: str, form: str, out: str | None) -> int:
    """Writes an existing mapping in another form."""
    from lineage.layout.document import read_mapping

    _emit(settings, read_mapping(path), form, name=path, out=out, inputs=(path,))
    return 0


def _emit(
    settings: Settings,
    mapping: Mapping,
    form: str,
    *,
    name: str,
    out: str | None,
    inputs: tuple[str, ...],
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Writes or prints a mapping in another form, and says what that form cannot say."""
    from lineage.emit import EMITTERS, emit

    emitted = emit(mapping, EMITTERS[form], name=name, out=out, shapes=shapes, inputs=inputs)
    if out is None:
        click.echo(emitted.text, nl=False)
    else:
        say(settings, f"wrote {out}: {len(mapping.rules):,} rules")
    for line in emitted.unsaid:
        say(settings, f"{form}: {line}")


def _find(settings: Settings, a: str, b: str, out: str | None, form: str | None) -> int:
    """Finds the mapping and writes or prints it."""
    from lineage import api
    from lineage.checkpoint.write import check_output
    from lineage.layout.document import dump_mapping, write_mapping
    from lineage.report.document import summarise_mapping

    if out is not None:
        check_output(out, inputs=(a, b))
    with api.open(a) as one, api.open(b) as two, open_progress(settings) as progress:
        mapping = api.map(one, two, seed=settings.seed, threads=settings.threads, progress=progress.step)
        found = summarise_mapping(mapping, one, two)
        names = len(one), len(two)
        shapes = {name: spec.shape for name, spec in one.specs.items()}
    if not mapping.rules:
        say(settings, f"nothing in {b} corresponds to anything in {a}; no mapping is written")
        return 1
    if form is not None:
        title = f"the mapping from {a} to {b}"
        _emit(settings, mapping, form, name=title, out=out, inputs=(a, b), shapes=shapes)
    elif out is None:
        click.echo(dump_mapping(mapping), nl=False)
    else:
        write_mapping(mapping, out, inputs=(a, b))
        say(settings, f"wrote {out}: {found.rules} rules")
    say(
        settings, f"B: {found.matched_b} of {names[1]} tensors matched, {found.certified_b} of them certified by values"
    )
    say(settings, f"A: {found.matched_a} of {names[0]} tensors used")
    _say_left(settings, "B", found.unmatched_b)
    _say_left(settings, "A", found.unmatched_a)
    return 0


def _check(settings: Settings, given: str, a: str, b: str) -> int:
    """Verifies a mapping file against the weights."""
    from lineage import api

    with api.open(a) as one, api.open(b) as two:
        found = api.check_mapping(given, one, two, threads=settings.threads)
    wrong = [place for place in found if not place.holds]
    for place in wrong if settings.verbose else wrong[:_SHOWN]:
        click.echo(f"rules[{place.rule}]: {_printable(place.why)}")
    if len(wrong) > _SHOWN and not settings.verbose:
        click.echo(f"… and {len(wrong) - _SHOWN:,} more (-v lists them)")
    exact = sum(place.exact for place in found)
    click.echo(f"{len(found) - len(wrong):,} of {len(found):,} places hold, {exact:,} of them bit by bit")
    return 1 if wrong or not found else 0


def _printable(text: str) -> str:
    from lineage.errors import printable

    return printable(text)


def _say_left(settings: Settings, side: str, names: Sequence[str]) -> None:
    """The tensors of one side that no rule speaks of."""
    if names:
        shown = names if settings.verbose else names[:_SHOWN]
        more = f", and {len(names) - len(shown):,} more (-v names them)" if len(shown) < len(names) else ""
        say(settings, f"{side}: nothing corresponds to {', '.join(shown)}{more}")
