"""The `lineage` command: which subcommands there are, the options they share, exit codes, errors on one line.

Each subcommand is one module, imported when it is asked for, so that `lineage --help` loads click and nothing else.
"""

from __future__ import annotations

import functools
import gc
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import click

from lineage.errors import InputError, LineageError, printable
from lineage.progress import Progress

if TYPE_CHECKING:
    from lineage.layout.mapping import Mapping

__all__ = [
    "COMMANDS",
    "Progress",
    "Settings",
    "budget_option",
    "common_options",
    "main",
    "open_progress",
    "parents_option",
    "rows_option",
    "run",
    "say",
    "say_stored",
    "write_json",
]

#: subcommand -> its line in the list of commands; its module is `lineage.commands.<name>`
COMMANDS = {
    "investigate": "Answer the whole question: does B come from A, how, and how sure is that?",
    "check": "The same as a gate for scripts: exit 0 when it holds, 1 when not, 3 when it cannot be told.",
    "diff": "Compare tensor by tensor: structure and figures.",
    "map": "Find how the tensors of B are laid out in A.",
    "apply": "Fill B's layout from A's weights, or the other way round.",
    "lora": "Adapters (LoRA): carry them from A over to B, inspect, extract, merge, resize, check.",
    "inspect": "Show what a checkpoint holds and what it says of its origin.",
    "example": "Write small real models to try everything on.",
}
#: what the shell reports for a process that SIGPIPE or SIGTERM ended, and for Ctrl-C
_PIPE, _TERMINATED, _INTERRUPTED = 141, 143, 130
#: threads taken where nobody says how many: each holds blocks of both files
_MOST_THREADS = 8


class Settings(NamedTuple):
    """The options that every subcommand takes.

    Attributes
    ----------
    quiet : print the answer only
    verbose : how much to tell beside it
    threads : workers that read and compute
    seed : of samples and of ties that chance breaks
    device : `cpu` or `cuda`
    no_progress : no progress bars
    """

    quiet: bool = False
    verbose: int = 0
    threads: int = 1
    seed: int = 0
    device: str = "cpu"
    no_progress: bool = False


def common_options(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command the shared options; the function gets them as its argument `settings`."""

    @functools.wraps(function)
    def command(**arguments: Any) -> int:
        settings = Settings(**{name: arguments.pop(name) for name in Settings._fields})
        if settings.device == "cuda":
            _need_cuda()
        return function(settings=settings, **arguments)

    for option in (
        click.option("--no-progress", is_flag=True, help="Show no progress bars."),
        click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="Where to compute.  [cpu]"),
        click.option("--seed", type=click.IntRange(0), default=0, metavar="N", help="Of samples.  [0]"),
        click.option(
            "--threads", type=click.IntRange(1), default=_threads, metavar="N", help="Workers.  [all cores, at most 8]"
        ),
        click.option("-v", "--verbose", count=True, help="Tell more; twice tells most."),
        click.option("-q", "--quiet", is_flag=True, help="Print the answer only."),
    ):
        command = option(command)
    return command


def rows_option(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command `--rows`."""
    return click.option(
        "--rows", type=click.IntRange(12, 512), metavar="N",
        help="Units a layer that the exact test compares.  [as many as are quick; 64 within a budget]",
    )(function)  # fmt: skip


def budget_option(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command `--budget`."""
    return click.option(
        "--budget", callback=_size, metavar="SIZE",
        help="Answer from samples: read at most so much of both, such as 64MB.  [everything]",
    )(function)  # fmt: skip


def _size(ctx: click.Context, option: click.Parameter, value: str | None) -> int | None:
    """Bytes as people write them."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", value.strip().lower())
    count = int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")) if found else 0
    if count < 1:
        raise click.BadParameter(f'"{value}" is no size; write bytes, or such as 64MB or 1GiB', ctx, option)
    return count


def parents_option(function: Callable[..., int]) -> Callable[..., int]:
    """Gives a command `--parent`."""
    return click.option(
        "--parent", "parents", multiple=True, metavar="C",
        help="What B may be merged from, beside A; may be repeated. Gives each one's weight.",
    )(function)  # fmt: skip


def _threads() -> int:
    """Cores that this process may use, within reason."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_THREADS)


def _need_cuda() -> None:
    """Refuses `--device cuda` where there is none, before anything is read."""
    import torch

    if not torch.cuda.is_available():
        raise InputError("--device cuda", "torch finds no CUDA device", "use --device cpu, or a CUDA build of torch")


class _Group(click.Group):
    """A group whose commands are imported when they are used; their help lines stand in `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"{__name__}.{cmd_name}")
        return next(c for c in vars(module).values() if isinstance(c, click.Command) and c.name == cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version(ctx: click.Context, option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from lineage.version import __version__

        click.echo(f"lineage {__version__}")
        ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
)
def main() -> None:
    """Does model B come from model A, how, and can what was made for A be used with B?

    A is the claimed ancestor, B the suspect: files or folders of weights. `lineage COMMAND --help` tells more.

    Example: lineage example DIR, then lineage investigate DIR/base DIR/suspect
    """


def run() -> NoReturn:
    """Runs the command and ends the process with the exit code that the contract names."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            # file names and tensor names may hold what the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    # files may hold any numbers: what overflows is checked where it is used, and a warning is no message for people
    warnings.simplefilter("ignore", RuntimeWarning)
    for library in ("OPENBLAS", "OMP", "MKL"):
        # the program has threads of its own; those of a linear algebra library spin on the same cores meanwhile
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, _terminated)
    # names and matches are many and live long: looking through them for cycles at every 700 new objects is vain work
    gc.set_threshold(200_000, 20, 20)
    code = _code()
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError) as exc:
        # what could not be written before was told already
        code = _explain(exc) if isinstance(exc, OSError) and code != 2 else code
    _quietly_closed()
    sys.exit(code)


def _code() -> int:
    """Runs the command; what it raises becomes a line and an exit code."""
    try:
        with main.make_context("lineage", sys.argv[1:]) as context:
            found = main.invoke(context)
    except click.exceptions.Exit as exc:
        return exc.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        return _INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as exc:
        with suppress(OSError):
            exc.show()
        return 2
    except (click.ClickException, LineageError, OSError, MemoryError, RecursionError) as exc:
        return _explain(exc)
    return found if isinstance(found, int) else 0


def _explain(exc: BaseException) -> int:
    """One line on stderr for what went wrong, and the exit code."""
    if isinstance(exc, BrokenPipeError):
        return _PIPE
    if isinstance(exc, LineageError):
        text = str(exc)
    elif isinstance(exc, click.ClickException):
        context = getattr(exc, "ctx", None)
        text = exc.format_message().rstrip(".") + f"; see {context.command_path if context else 'lineage'} --help"
    elif isinstance(exc, MemoryError):
        text = "not enough memory; try fewer --threads"
    elif isinstance(exc, RecursionError):
        text = "the input is nested too deep"
    else:
        assert isinstance(exc, OSError)
        from lineage.checkpoint.files import reason

        cause, remedy = reason(exc)
        text = f"{exc.filename or 'output'}: {cause}" + (f"; {remedy}" if remedy else "")
    with suppress(OSError):
        click.echo(f"lineage: {printable(text)}", err=True)
    return 2


def _quietly_closed() -> None:
    """Points a stdout that nobody reads any more, or that is full, to nowhere: Python flushes it once more at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, AttributeError):
        pass


def _terminated(number: int, frame: object) -> NoReturn:
    """SIGTERM ends the program like an error, so that temporary files are removed."""
    sys.exit(_TERMINATED)


def write_json(document: Any) -> None:
    """Prints a record as one JSON document on stdout; what is not a finite number is null."""
    from lineage.report.encode import as_json

    sys.stdout.buffer.write(as_json(document))
    sys.stdout.buffer.flush()


def say(settings: Settings, text: str, *, level: int = 0) -> None:
    """A message on stderr: level 0 always but for `--quiet`, level 1 with `-v`, level 2 with `-vv`."""
    if not settings.quiet and settings.verbose >= level:
        click.echo(printable(text), err=True)


def say_stored(settings: Settings, mapping: Mapping) -> None:
    """Says which stored layout a mapping rests on, and whether the weights bear it out."""
    if mapping.pair:
        sure = any(rule.evidence is not None and rule.evidence.certified for rule in mapping.rules)
        how = "certified by the weights" if sure else "by names and shapes; the weights share no values"
        say(settings, f"used the stored layout {', '.join(mapping.pair)}, {how}")


@contextmanager
def open_progress(settings: Settings) -> Iterator[Progress]:
    """A progress bar on stderr while the block runs, where that is a terminal and nobody declined."""
    if settings.quiet or settings.no_progress or not (sys.stderr and sys.stderr.isatty()):
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("reading", total=None)

        class Shown(Progress):
            def step(self, name: str) -> None:
                bars.update(task, description=name, total=None, completed=0)

            def count(self, done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

        yield Shown()
