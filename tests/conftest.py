"""What all tests share: small trained models, the command in this process, golden files, one hypothesis profile."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "lineage", max_examples=60, deadline=None, derandomize=True, database=None, print_blob=True
)
hypothesis.settings.load_profile("lineage")

# arrays of tests are tiny: threads of BLAS cost more than they bring, and tests may run beside each other
os.environ.setdefault("OMP_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Lineage = Callable[..., Ran]
Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the files under tests/golden")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `lineage example`: base, suspect, stranger, lora. Trained once, never to be changed."""
    from lineage.example import write_example

    return write_example(tmp_path_factory.mktemp("models") / "example")


@pytest.fixture
def lineage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Lineage]:
    """Runs the command in this process, as the installed script does."""
    from lineage.commands import run

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["lineage", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            run()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compares text with a file under tests/golden, or writes it with --update-golden."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / name
        if request.config.getoption("--update-golden"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.read_text(encoding="utf-8") == text, f"{name} differs; read the diff, then pytest --update-golden"

    return compare
