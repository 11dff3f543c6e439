"""`lineage lora`: adapters inspected, mapped, converted, extracted, merged, resized, added and checked."""

from __future__ import annotations

import click

from lineage.commands import Settings, common_options, say

FORMATS = (
    "peft", "diffusers", "kohya", "comfy", "ai-toolkit", "xlabs", "onetrainer", "longcat", "mlx", "gguf", "openpi",
)  # fmt: skip


@click.group("lora")
def lora_group() -> None:
    """Adapters: inspect, map, convert, extract, merge, resize, add, check.

    Example: lineage lora inspect DIR/lora
    """


@lora_group.command("convert")
@click.argument("adapter")
@click.option("--map", "mapping", required=True, metavar="MAPPING", help="Mapping from the adapter's base to B.")
@click.option("--to", "to", required=True, type=click.Choice(FORMATS), help="Format to write.")
@click.option("-o", "--out", required=True, metavar="OUT", help="File to write; a folder for peft.")
@click.option("--from", "format", type=click.Choice(FORMATS), help="Format of ADAPTER.  [found out key by key]")
@click.option("--base", metavar="A", help="The adapter's base.")
@click.option("--target", metavar="B", help="The model that the adapter is wanted for.")
@click.option("--allow-partial", is_flag=True, help="Exit 0 though keys were left over.")
@common_options
def convert_command(
    settings: Settings, adapter: str, mapping: str, to: str, out: str, format: str | None, base: str | None,
    target: str | None, allow_partial: bool,
) -> int:  # fmt: skip
    """Write for B the adapter that was trained on A.

    Example: lineage lora convert DIR/lora --map mapping.yaml --to kohya -o out.safetensors --base DIR/base
    """
    from lineage.checkpoint import open_checkpoint
    from lineage.layout.document import read_mapping
    from lineage.lora.converting import convert

    rules = read_mapping(mapping)
    a = open_checkpoint(base) if base else None
    b = open_checkpoint(target) if target else None
    inputs = [p for p in (mapping, base, target) if p]
    done = convert(adapter, rules, to, out, format=format, base=a, target=b, inputs=inputs)
    for fate in done.left:
        say(settings, f"left over: {fate.key}: {fate.reason}")
    return 1 if done.left and not allow_partial else 0
