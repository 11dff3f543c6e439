"""`lineage example`: small real models to try everything on."""

from __future__ import annotations

import click

from lineage.commands import Settings, common_options, open_progress, say


@click.command("example")
@click.argument("folder", metavar="DIR")
@common_options
def example_command(settings: Settings, folder: str) -> int:
    """Train and write small models to DIR, in seconds: base, suspect, stranger, and a LoRA for the base.

    Example: lineage example DIR
    """
    from lineage.example import WRITTEN, write_example

    with open_progress(settings) as progress:
        out = write_example(folder, threads=settings.threads, seed=settings.seed, progress=progress.step)
    for name, what in WRITTEN.items():
        say(settings, f"{out / name}: {what}")
    say(settings, f"Now try: lineage investigate {out / 'base'} {out / 'suspect'}")
    return 0
