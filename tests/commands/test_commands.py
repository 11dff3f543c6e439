"""The command group: help, shared options, exit codes, errors on one line."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import click
import numpy as np
import pytest
from safetensors.numpy import save_file

from lineage.checkpoint import opening
from lineage.commands import Settings, common_options, main
from lineage.errors import InputError
from tests.conftest import Golden, Lineage

ROOT = Path(__file__).parents[2]


def _leaves(group: click.Group, above: str = "") -> Iterator[tuple[str, click.Command]]:
    """Every command that does something, by the words that call it."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _leaves(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


LEAVES = dict(_leaves(main))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"w": np.zeros((2, 3), np.float32)}, path)
    return path


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_has_help_and_an_example(name: str) -> None:
    text = LEAVES[name].help or ""
    assert text.split("\n")[0].endswith((".", "?"))
    assert f"Example: lineage {name} " in text


@pytest.mark.parametrize("name", LEAVES)
def test_every_option_of_every_command_is_explained(name: str) -> None:
    options = [p for p in LEAVES[name].params if isinstance(p, click.Option)]
    assert all(option.help for option in options)


@pytest.mark.parametrize("name", LEAVES)
def test_every_command_takes_the_shared_options(name: str) -> None:
    assert set(Settings._fields) <= {p.name for p in LEAVES[name].params}


@pytest.mark.parametrize("name", ["", "lora", *LEAVES])
def test_help_reads_as_agreed(name: str, lineage: Lineage, golden: Golden) -> None:
    done = lineage(*name.split(), "--help")
    assert done.code == 0
    golden(f"help/{name.replace(' ', '-') or 'lineage'}.txt", done.out)


def test_settings_reach_the_command() -> None:
    @click.command("probe")
    @common_options
    def probe(settings: Settings) -> int:
        assert settings == Settings(quiet=True, verbose=2, threads=3, seed=4, device="cpu", no_progress=True)
        return 0

    words = ["-q", "-vv", "--threads", "3", "--seed", "4", "--no-progress"]
    assert probe.main(words, standalone_mode=False) == 0


def test_threads_default_to_the_cores_at_hand() -> None:
    found: list[Settings] = []

    @click.command("probe")
    @common_options
    def probe(settings: Settings) -> int:
        found.append(settings)
        return 0

    probe.main([], standalone_mode=False)
    assert 1 <= found[0].threads <= 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "lineage: No such command 'nope'; see lineage --help\n"),
        (["inspect"], "lineage: Missing argument 'PATH'; see lineage inspect --help\n"),
        (["inspect", "x", "--threads", "0"], "'--threads': 0 is not in the range x>=1; see"),
        (["inspect", "x", "--sed", "1"], "lineage: No such option '--sed'"),
        (
            ["map", "a", "b", "--check", "m", "-o", "n"],
            "lineage: --check writes nothing: leave out -o; see",
        ),
        (["check", "a", "b", "--expect", "related", "--claim", "fine-tuning"], 'did you mean "fine-tuned"?'),
        (["inspect", "/nowhere/x"], "lineage: /nowhere/x: no such file or folder\n"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(words: list[str], message: str, lineage: Lineage) -> None:
    done = lineage(*words)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


def test_no_command_at_all_shows_the_help_and_exits_2(lineage: Lineage) -> None:
    done = lineage()
    assert done.code == 2
    assert "Usage: lineage" in done.err


def test_cuda_that_is_not_there_is_refused_with_a_remedy(
    file: Path, lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = lineage("inspect", file, "--device", "cuda")
    assert done.code == 2
    assert done.err.startswith("lineage: --device cuda: torch finds no CUDA device; use --device cpu")


def _raiser(exc: BaseException) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise exc

    return fail


@pytest.mark.parametrize(
    ("exc", "code", "message"),
    [
        (InputError("x", "is odd", "mend it"), 2, "lineage: x: is odd; mend it\n"),
        (InputError("x\x1b[2J\n", "is odd"), 2, "lineage: x\\x1b[2J\\n: is odd\n"),
        (MemoryError(), 2, "lineage: not enough memory; try fewer --threads\n"),
        (RecursionError("deep"), 2, "lineage: the input is nested too deep\n"),
        (OSError(errno.ENOSPC, "no", "out.csv"), 2, "lineage: out.csv: no space left on the disk; free some space"),
        (OSError(errno.EFBIG, "no"), 2, "lineage: output: the file would become larger than this system allows"),
        (BrokenPipeError(errno.EPIPE, "no"), 141, ""),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_goes_wrong_is_one_line(
    exc: BaseException, code: int, message: str, file: Path, lineage: Lineage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "open_checkpoint", _raiser(exc))
    done = lineage("inspect", file)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(message)
    assert done.err.count("\n") <= 1


def test_a_bug_keeps_its_traceback(file: Path, lineage: Lineage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "open_checkpoint", _raiser(ZeroDivisionError("bug")))
    with pytest.raises(ZeroDivisionError):
        lineage("inspect", file)


def _start(words: list[str], **how: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "lineage", *words], cwd=ROOT, stderr=subprocess.PIPE, **how)  # type: ignore[call-overload, no-any-return]


def test_a_pipe_closed_early_is_nobodys_fault(file: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = _start(["inspect", str(file), "--json"], stdout=write)
    os.close(write)
    err = process.communicate(timeout=60)[1]
    assert (process.returncode, err) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_said_once(file: Path, unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with open("/dev/full", "wb") as full:
        process = _start(["inspect", str(file)], stdout=full)
        err = process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert err == b"lineage: output: no space left on the disk; free some space or name another place\n"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_behind(sent: signal.Signals, code: int, tmp_path: Path) -> None:
    process = _start(["example", str(tmp_path / "models")], stdout=subprocess.DEVNULL)
    for _ in range(600):
        if any(tmp_path.iterdir()):
            break
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    assert list(tmp_path.iterdir()) == []
