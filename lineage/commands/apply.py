"""`lineage apply`: one side's layout filled from the other side's weights."""

from __future__ import annotations

from collections.abc import Sequence

import click

from lineage.commands import Settings, common_options, say

#: names of tensors left over that are printed; all of them with -v
SHOWN = 10


@click.command("apply")
@click.argument("mapping")
@click.argument("checkpoint")
@click.option("-o", "--out", required=True, metavar="OUT", help="File or folder to write (safetensors).")
@click.option("--inverse", is_flag=True, help="CHECKPOINT has the target's layout; write the source's.")
@click.option("--strict", is_flag=True, help="Write nothing and exit 1 where tensors would be left over.")
@common_options
def apply_command(settings: Settings, mapping: str, checkpoint: str, out: str, inverse: bool, strict: bool) -> int:
    """Fill B's layout from A's weights by a mapping that `lineage map` wrote.

    CHECKPOINT is A, or B with --inverse. Values that only move are copied bit by bit; a model above 5 GB becomes a
    folder of shards.

    Example: lineage apply mapping.yaml DIR/base -o DIR/as-suspect.safetensors
    """
    from lineage.checkpoint import open_checkpoint
    from lineage.filling import apply
    from lineage.layout.document import read_mapping

    rules = read_mapping(mapping)
    with open_checkpoint(checkpoint) as source:
        applied = apply(rules, source, out, inverse=inverse, strict=strict, place=mapping, inputs=(mapping, checkpoint))
    refused = strict and not applied.complete
    if not refused:
        say(settings, f"wrote {applied.written:,} tensors to {out}")
    _say_left(settings, applied.unused, f"tensors of {checkpoint} that no rule reads")
    _say_left(settings, applied.missing, "tensors that could not be filled")
    if refused:
        say(settings, "nothing written (--strict)")
    return 1 if refused else 0


def _say_left(settings: Settings, names: Sequence[str], what: str) -> None:
    """The names left over on one side, the first few unless more is asked for."""
    if not names:
        return
    shown = names if settings.verbose else names[:SHOWN]
    more = f", and {len(names) - len(shown):,} more (-v names them)" if len(shown) < len(names) else ""
    say(settings, f"{len(names):,} {what}: {', '.join(shown)}{more}")
