"""`lineage map`: how the tensors of B are laid out in A, found or verified, and written as a mapping or as code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lineage.commands import Settings, common_options, open_progress, say, say_stored

if TYPE_CHECKING:
    from lineage.layout.mapping import Mapping

#: forms that `lineage.emit` knows; listed here so that the command starts without loading it
FORMS = ("json", "python", "transformers")
#: names of tensors left over that are printed; all of them with -v
_SHOWN = 10


def _sizes(ctx: click.Context, option: click.Parameter, values: Sequence[str]) -> dict[str, int]:
    """Sizes by name."""
    sizes: dict[str, int] = {}
    for value in values:
        name, _, number = value.partition("=")
        if not name or not number.isdecimal() or not 0 < int(number) < 1 << 31:
            raise click.BadParameter(f"{value} is no name and number such as d=128")
        sizes[name] = int(number)
    return sizes


@click.command("map")
@click.argument("a")
@click.argument("b", required=False)
@click.option("-o", "--out", metavar="FILE", help="File to write.  [printed]")
@click.option("--emit", "form", type=click.Choice(FORMS), help="Write code or JSON instead of YAML.")
@click.option("--check", "given", metavar="FILE", help="Verify this mapping again from the weights instead.")
@click.option("--headers", is_flag=True, help="Read no weights: what a stored layout of public models says.")
@click.option(
    "--size", "sizes", multiple=True, callback=_sizes, metavar="NAME=N",
    help="With --headers: a size that shapes do not tell, such as d=128.",
)  # fmt: skip
@common_options
def map_command(
    settings: Settings,
    a: str,
    b: str | None,
    out: str | None,
    form: str | None,
    given: str | None,
    headers: bool,
    sizes: dict[str, int],
) -> int:
    """Find how the tensors of B are laid out in A: names, order of axes, fused and split tensors.

    Stored layouts of public models are tried first and kept where the weights show them. With --emit, a mapping
    file alone may stand for A and B: what was found before is written in another form.

    Exits 1 where nothing corresponds at all, and with --check where a rule does not hold.

    Example: lineage map DIR/base DIR/suspect -o mapping.yaml
    """
    if given is not None:
        if out is not None or form is not None:
            raise click.UsageError(f"--check writes nothing: leave out {'--emit' if out is None else '-o'}")
        if headers:
            raise click.UsageError("--check reads weights: leave out --headers")
        if b is None:
            raise click.UsageError("--check needs A and B beside the mapping")
        return _check(settings, given, a, b)
    if sizes and not headers:
        raise click.UsageError("--size goes with --headers: weights tell every size by themselves")
    if b is None:
        if headers or form is None:
            raise click.UsageError("give A and B; a mapping file alone needs --emit")
        return _rewrite(settings, a, form, out)
    if headers:
        return _from_headers(settings, a, b, out, form, sizes)
    return _find(settings, a, b, out, form)


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


def _from_headers(settings: Settings, a: str, b: str, out: str | None, form: str | None, sizes: dict[str, int]) -> int:
    """Writes or prints what a stored layout says of names and shapes."""
    from lineage import api
    from lineage.checkpoint.write import check_output
    from lineage.report.document import summarise_mapping

    if out is not None:
        check_output(out, inputs=(a, b))
    with api.open(a, headers=True) as one, api.open(b, headers=True) as two:
        mapping, asked, _ = api.map_headers(one, two, sizes=sizes)
        found = summarise_mapping(mapping, one, two)
        names = len(one), len(two)
        shapes = {name: spec.shape for name, spec in one.specs.items()}
    if asked:
        words = " or ".join(asked)
        say(settings, f"shapes do not tell {words}: what needs it is left out; say it with --size {asked[0]}=N")
    if not mapping.rules:
        say(settings, f"no stored layout fits {a} and {b} as a whole; fetch the weights and leave out --headers")
        return 1
    _write(settings, mapping, (a, b), out, form, shapes)
    pair = ", ".join(mapping.pair)
    say(settings, f"from the stored layout {pair} alone, by names and shapes; no weight was read, nothing is verified")
    say(settings, f"B: {found.matched_b} of {names[1]} tensors matched")
    _say_left(settings, "B", found.unmatched_b)
    _say_left(settings, "A", found.unmatched_a)
    return 0


def _find(settings: Settings, a: str, b: str, out: str | None, form: str | None) -> int:
    """Finds the mapping and writes or prints it."""
    from lineage import api
    from lineage.checkpoint.write import check_output
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
    _write(settings, mapping, (a, b), out, form, shapes)
    say_stored(settings, mapping)
    say(
        settings, f"B: {found.matched_b} of {names[1]} tensors matched, {found.certified_b} of them certified by values"
    )
    say(settings, f"A: {found.matched_a} of {names[0]} tensors used")
    _say_left(settings, "B", found.unmatched_b)
    _say_left(settings, "A", found.unmatched_a)
    return 0


def _write(
    settings: Settings,
    mapping: Mapping,
    inputs: tuple[str, str],
    out: str | None,
    form: str | None,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """The mapping into its file, or printed; as YAML, or in another form."""
    from lineage.layout.document import dump_mapping, write_mapping

    if form is not None:
        title = f"the mapping from {inputs[0]} to {inputs[1]}"
        _emit(settings, mapping, form, name=title, out=out, inputs=inputs, shapes=shapes)
    elif out is None:
        click.echo(dump_mapping(mapping), nl=False)
    else:
        write_mapping(mapping, out, inputs=inputs)
        say(settings, f"wrote {out}: {len(mapping.rules)} rules")


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
