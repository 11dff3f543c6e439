"""`lineage lora`: adapters inspected, mapped, converted, extracted, merged, resized, added up and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from lineage.commands import Settings, common_options, say, write_json

if TYPE_CHECKING:
    from lineage.checkpoint import Checkpoint
    from lineage.layout.mapping import Mapping as LayoutMapping
    from lineage.report.tables import Table

FORMATS = (
    "peft", "diffusers", "kohya", "comfy", "ai-toolkit", "xlabs", "onetrainer", "longcat", "mlx", "gguf", "openpi",
)  # fmt: skip
#: keys left over that are printed; all of them with -v
_SHOWN = 10
_FORMAT = click.Choice(FORMATS)


@click.group("lora")
def lora_group() -> None:
    """Carry adapters (LoRA, DoRA, LoHa, LoKr) from one model to another, and look after them.

    Example: lineage lora convert DIR/lora --map mapping.yaml --to kohya -o lora.safetensors --base DIR/base
    """


@lora_group.command("inspect")
@click.argument("adapter")
@click.option("--base", "bases", multiple=True, metavar="A", help="A model that it may be for; may be repeated.")
@click.option("--from", "format", type=_FORMAT, help="Format of ADAPTER.  [found out]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def inspect_command(settings: Settings, adapter: str, bases: tuple[str, ...], format: str | None, as_json: bool) -> int:
    """Show what an adapter is, which base it is for, and what ails it.

    Example: lineage lora inspect DIR/lora --base DIR/base
    """
    from lineage.lora.inspection import inspect

    with ExitStack() as stack:
        found = inspect(adapter, [_open(stack, b) for b in bases], format=format)
    if as_json:
        write_json(found)
        return 0
    lines = [
        f"{found.path}: {' and '.join(found.formats)}, {found.keys} keys, {found.tensors} tensors, "
        + ", ".join(f"{n} {word}" for word, n in found.dtypes.items()),
        "ranks: " + _histogram(found.ranks),
        "scales: " + _histogram(found.scales),
        "modules: " + _histogram(dict(list(found.targets.items())[:12])),
    ]
    lines += [f"says of its base: {key}: {value}" for key, value in found.claims.items()]
    for fit in found.fits:
        told = {None: "", True: ", and it is the file that it was trained on", False: ", but it was trained on another"}
        lines.append(f"fits {fit.path}: {fit.fitting} of {fit.keys} keys{told[fit.hash]}")
    lines += [f"mind: {text}" for text in found.ailments]
    _print(lines)
    if settings.verbose:
        rows = [(m.tensor, m.kind, m.rank, m.scale, m.norm) for m in found.modules]
        _print_table(("tensor", "kind", "rank", "scale", "norm"), rows)
    _say_left(settings, found.left)
    return 0


@lora_group.command("map")
@click.argument("a")
@click.argument("b")
@click.option("--map", "mapping", metavar="MAPPING", help="Mapping from A to B.  [found]")
@click.option("--from", "source_format", type=_FORMAT, default="peft", help="Format of A's keys.  [peft]")
@click.option("--to", "target_format", type=_FORMAT, help="Format of B's keys.  [that of A's]")
@click.option("--each", is_flag=True, help="One line for every module, not for every rule.")
@click.option(
    "--emit",
    type=click.Choice(["yaml", "json", "table", "python"]),
    default="table",
    help="What to write; python is a stand-alone converter.  [table]",
)
@click.option("-o", "--out", metavar="FILE", help="File to write.  [printed]")
@common_options
def map_command(
    settings: Settings, a: str, b: str, mapping: str | None, source_format: str, target_format: str | None, each: bool,
    emit: str, out: str | None,
) -> int:  # fmt: skip
    """Show which keys of an adapter for A become which keys for B, and what happens to their factors.

    Exits 1 where no matrix of B corresponds to one of A.

    Example: lineage lora map DIR/base DIR/suspect --emit yaml -o lora_keys.yaml
    """
    import msgspec

    from lineage.lora.emit import script
    from lineage.lora.keymap import key_map

    with ExitStack() as stack:
        one, two = _open(stack, a), _open(stack, b)
        rules = _mapping(settings, mapping, one, two)
        found = key_map(rules, one, two, source_format=source_format, target_format=target_format, each=each)
        if emit == "python":
            shapes = [{s.name: s.shape for s in checkpoint} for checkpoint in (one, two)]
            text = script(rules, *shapes, source=source_format, to=target_format or source_format)
        elif emit == "yaml":
            text = found.to_yaml()
        elif emit == "json":
            text = msgspec.json.format(msgspec.json.encode(found), indent=2).decode() + "\n"
        else:
            text = f"grade: {found.grade}\n" + _table(
                (source_format, target_format or source_format, "factors"),
                [("\n".join(k.source), "\n".join(k.to), k.how) for k in found.keys],
            )
    _write_or_print(text, out, inputs=[p for p in (a, b, mapping) if p])
    return 0 if found.grade != "none" else 1


@lora_group.command("convert")
@click.argument("adapter")
@click.option("--map", "mapping", required=True, metavar="MAPPING", help="Mapping from the adapter's base to B.")
@click.option("--to", "to", required=True, type=_FORMAT, help="Format to write.")
@click.option("-o", "--out", required=True, metavar="OUT", help="File to write; a folder for peft.")
@click.option("--from", "format", type=_FORMAT, help="Format of ADAPTER.  [found out key by key]")
@click.option("--base", metavar="A", help="The adapter's base.")
@click.option("--target", metavar="B", help="The model that the adapter is wanted for.")
@click.option("--inverse", is_flag=True, help="The adapter is for the mapping's target, B; write it for A.")
@click.option("--allow-partial", is_flag=True, help="Exit 0 though keys were left over.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Cut every pair to rank N.  [lossless]")
@click.option("--scale", type=float, metavar="S", help="Scale of an MLX or openpi adapter that does not tell it.")
@click.option("--trained-strength", is_flag=True, help="Undo the weak alphas of kohya's split_qkv.")
@click.option("--prefix", metavar="TEXT", help="Beginning of the new keys.  [the format's own]")
@click.option("--architecture", metavar="NAME", help="general.architecture of a GGUF adapter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with the fate of every key.")
@common_options
def convert_command(
    settings: Settings, adapter: str, mapping: str, to: str, out: str, format: str | None, base: str | None,
    target: str | None, inverse: bool, allow_partial: bool, rank: int | None, scale: float | None,
    trained_strength: bool, prefix: str | None, architecture: str | None, as_json: bool,
) -> int:  # fmt: skip
    """Write for B the adapter that was trained on A, exactly, and account for every key.

    The output is read again and every difference in it compared before it gets its name. Exits 1 where keys were
    left over.

    Example: lineage lora convert DIR/lora --map mapping.yaml --to kohya -o out.safetensors --base DIR/base
    """
    from lineage.layout.document import read_mapping
    from lineage.lora.converting import convert

    rules = read_mapping(mapping)
    with ExitStack() as stack:
        done = convert(
            adapter, rules.inverse() if inverse else rules, to, out, format=format,
            base=_open(stack, base) if base else None, target=_open(stack, target) if target else None,
            scale=scale, prefix=prefix, architecture=architecture, rank=rank, trained_strength=trained_strength,
            inputs=[p for p in (mapping, base, target) if p],
        )  # fmt: skip
    if as_json:
        write_json(done)
    else:
        if settings.verbose:
            for key in done.keys:
                say(settings, f"{key.key} -> {', '.join(key.to) or key.reason}")
        source = " and ".join(done.source_formats)
        say(settings, f"wrote {out}: {len(done.keys)} keys of {source} to {done.format}, {done.tensors} tensors")
        say(settings, f"read again: {done.verified} differences, none more than {done.largest_error:.1e} away")
        for name, (before, after) in done.grown.items():
            say(settings, f"{name}: rank {before} became {after}, so that it stays exact", level=1)
        if done.lost:
            worst = max(done.lost, key=lambda n: done.lost[n])
            say(settings, f"rank {rank}: {max(done.lost.values()):.2%} of the square of {worst} lost, the most of all")
        for note in done.notes:
            say(settings, note)
        _say_left(settings, {k.key: k.reason for k in done.left})
    return 1 if done.left and not allow_partial else 0


@lora_group.command("extract")
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--out", required=True, metavar="OUT", help="Adapter to write.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Most ranks a matrix gets.")
@click.option("--energy", type=click.FloatRange(0, 1), metavar="E", help="Share of each difference's square to keep.")
@click.option("--map", "mapping", metavar="MAPPING", help="Mapping from BASE to TUNED.  [found where names differ]")
@click.option("--to", "to", type=_FORMAT, default="peft", help="Format to write.  [peft]")
@click.option("--no-vectors", is_flag=True, help="Leave norms and biases out.")
@common_options
def extract_command(
    settings: Settings, base: str, tuned: str, out: str, rank: int | None, energy: float | None, mapping: str | None,
    to: str, no_vectors: bool,
) -> int:  # fmt: skip
    """Write the difference of two models as an adapter of few ranks for the first.

    Example: lineage lora extract DIR/base DIR/suspect --rank 16 -o extracted
    """
    from lineage.lora.extraction import extract

    with ExitStack() as stack:
        one, two = _open(stack, base), _open(stack, tuned)
        rules = _mapping(settings, mapping, one, two) if mapping or set(one.specs) != set(two.specs) else None
        done = extract(
            one, two, out, mapping=rules, rank=rank, energy=energy, to=to, vectors=not no_vectors, seed=settings.seed,
            inputs=[mapping] if mapping else [],
        )  # fmt: skip
    say(settings, f"wrote {out}: {len(done.tensors)} matrices, {done.lost:.2%} of the square of the difference lost")
    _say_left(settings, done.skipped)
    return 0


@lora_group.command("merge")
@click.argument("model")
@click.argument("adapter")
@click.option("-o", "--out", required=True, metavar="OUT", help="Checkpoint to write (safetensors).")
@click.option("--weight", type=float, default=1.0, metavar="W", help="Weight of the adapter.  [1]")
@click.option("--map", "mapping", metavar="MAPPING", help="Mapping from the adapter's base to MODEL.")
@click.option("--base", metavar="A", help="The adapter's base, with --map.")
@click.option("--from", "format", type=_FORMAT, help="Format of ADAPTER.  [found out key by key]")
@click.option("--scale", type=float, metavar="S", help="Scale of an MLX or openpi adapter that does not tell it.")
@common_options
def merge_command(
    settings: Settings, model: str, adapter: str, out: str, weight: float, mapping: str | None, base: str | None,
    format: str | None, scale: float | None,
) -> int:  # fmt: skip
    """Write a model with an adapter added into its weights, tensor by tensor.

    Exits 1 where parts of the adapter went nowhere.

    Example: lineage lora merge DIR/base DIR/lora -o merged.safetensors
    """
    from lineage.layout.document import read_mapping
    from lineage.lora.merging import merge

    with ExitStack() as stack:
        done = merge(
            _open(stack, model), adapter, out, mapping=read_mapping(mapping) if mapping else None,
            base=_open(stack, base) if base else None, weight=weight, format=format, scale=scale,
            inputs=[p for p in (mapping, base) if p],
        )  # fmt: skip
    say(settings, f"wrote {out}: {done.changed} of {done.tensors} tensors changed")
    if done.decoded:
        say(settings, f"{done.decoded} tensors were stored quantised and are now BF16")
    for note in done.notes:
        say(settings, note)
    _say_left(settings, done.left)
    return 1 if done.left else 0


@lora_group.command("resize")
@click.argument("adapter")
@click.option("-o", "--out", required=True, metavar="OUT", help="Adapter to write.")
@click.option("--rank", type=click.IntRange(1), metavar="N", help="Most ranks a pair keeps.")
@click.option("--energy", type=click.FloatRange(0, 1), metavar="E", help="Share of each pair's square to keep.")
@click.option("--base", metavar="A", help="The adapter's base, where its keys alone do not tell the modules.")
@click.option("--to", "to", type=_FORMAT, help="Format to write, with --base.  [the adapter's]")
@common_options
def resize_command(
    settings: Settings, adapter: str, out: str, rank: int | None, energy: float | None, base: str | None, to: str | None
) -> int:
    """Cut every pair of an adapter to a rank, or to the ranks that hold a share of its energy.

    Example: lineage lora resize DIR/lora --energy 0.95 -o smaller
    """
    from lineage.lora.sums import resize

    with ExitStack() as stack:
        done = resize(adapter, out, rank=rank, energy=energy, base=_open(stack, base) if base else None, to=to)
    rows = [(c.tensor, c.before, c.rank, c.lost) for c in done.tensors]
    if not settings.quiet:
        _print_table(("tensor", "rank", "now", "lost"), rows)
    _say_left(settings, done.left)
    return 1 if done.left else 0


@lora_group.command("add")
@click.argument("adapters", nargs=-1, required=True)
@click.option("-o", "--out", required=True, metavar="OUT", help="Adapter to write.")
@click.option("--weight", "weights", type=float, multiple=True, metavar="W", help="Weight of each, in order.  [1]")
@click.option("--base", metavar="A", help="Their base, where they are of several formats.")
@click.option("--to", "to", type=_FORMAT, help="Format to write, with --base.  [that of the first]")
@common_options
def add_command(
    settings: Settings,
    adapters: tuple[str, ...],
    out: str,
    weights: tuple[float, ...],
    base: str | None,
    to: str | None,
) -> int:
    """Write the weighted sum of adapters of one base, exact: their ranks add.

    Example: lineage lora add DIR/lora DIR/lora --weight 0.5 --weight 0.5 -o sum
    """
    from lineage.lora.sums import add

    with ExitStack() as stack:
        done = add(adapters, out, weights=weights or None, base=_open(stack, base) if base else None, to=to)
    say(settings, f"wrote {out}: {len(done.tensors)} pairs of {len(adapters)} adapters")
    _say_left(settings, done.left)
    return 1 if done.left else 0


@lora_group.command("check")
@click.argument("adapter")
@click.argument("a")
@click.argument("b")
@click.option("--map", "mapping", metavar="MAPPING", help="Mapping from A to B.  [found]")
@click.option("--from", "format", type=_FORMAT, help="Format of ADAPTER.  [found out key by key]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@common_options
def check_command(
    settings: Settings, adapter: str, a: str, b: str, mapping: str | None, format: str | None, as_json: bool
) -> int:
    """Tell whether an adapter of A should work on B, module by module.

    Compares the two models inside the adapter's own subspace: what it reads and what it writes. Exits 0 whatever
    the answer.

    Example: lineage lora check DIR/lora DIR/base DIR/suspect
    """
    from lineage.lora.checking import check

    with ExitStack() as stack:
        one, two = _open(stack, a), _open(stack, b)
        rules = _mapping(settings, mapping, one, two)
        found = check(adapter, one, two, rules, format=format, seed=settings.seed, threads=settings.threads)
    if as_json:
        write_json(found)
        return 0
    words = {True: "should work", False: "should not work", None: "cannot be told"}
    p = "" if found.log10_p is None else f", log10 p {found.log10_p:.1f}"
    click.echo(f"{words[found.works]}: {found.weights} (verdict {found.class_}{p}, coverage {found.coverage:.2f})")
    if not settings.quiet:
        rows = [(m.tensor, m.answer, m.whole, m.reads, m.writes, m.strength) for m in found.modules]
        _print_table(("tensor", "answer", "B - A", "where it reads", "where it writes", "adapter"), rows)
    _say_left(settings, found.left)
    return 0


def _open(stack: ExitStack, path: str) -> Checkpoint:
    """An opened checkpoint that the stack closes."""
    from lineage.checkpoint import open_checkpoint

    return stack.enter_context(open_checkpoint(path))


def _mapping(settings: Settings, path: str | None, a: Checkpoint, b: Checkpoint) -> LayoutMapping:
    """The mapping of a file, or the one that is found."""
    from lineage import api
    from lineage.layout.document import read_mapping

    if path:
        return read_mapping(path)
    return api.map(a, b, seed=settings.seed, threads=settings.threads)


def _histogram(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{n} x {value}" for value, n in counts.items()) or "none"


def _print(lines: Iterable[str]) -> None:
    from lineage.errors import printable

    for line in lines:
        click.echo(printable(line))


def _table(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    from lineage.report.tables import Table, as_text

    spread = []
    for row in rows:
        cells = [str(c).split("\n") if isinstance(c, str) else [c] for c in row]
        for k in range(max(map(len, cells))):
            spread.append(tuple(c[k] if k < len(c) else "" for c in cells))
    table: Table = Table(heads=heads, rows=tuple(spread))
    return as_text(table, width=200) + "\n"


def _print_table(heads: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    click.echo(_table(heads, rows), nl=False)


def _write_or_print(text: str, out: str | None, *, inputs: list[str]) -> None:
    from lineage.checkpoint.write import atomic

    if out is None:
        click.echo(text, nl=False)
        return
    with atomic(out, inputs=inputs) as part:
        part.write_text(text, encoding="utf-8")


def _say_left(settings: Settings, left: Mapping[str, str]) -> None:
    """What went nowhere, the first few unless more is asked for."""
    if not left:
        return
    shown = list(left.items()) if settings.verbose else list(left.items())[:_SHOWN]
    say(settings, f"{len(left)} left over:")
    for key, reason in shown:
        say(settings, f"  {key}: {reason}")
    if len(shown) < len(left):
        say(settings, f"  and {len(left) - len(shown)} more (-v names them)")
