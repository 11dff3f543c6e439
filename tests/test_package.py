"""The package as it is installed and imported."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lineage
from lineage.data import mapping_file
from lineage.errors import InputError

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def _loaded(statement: str) -> set[str]:
    """Modules that are loaded after a statement in a new interpreter."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_importing_lineage_loads_neither_numpy_nor_torch() -> None:
    assert not _loaded("import lineage") & {"numpy", "torch", "scipy", "msgspec"}


def test_help_loads_click_and_nothing_heavy() -> None:
    run = "import lineage.commands as c\nc.main.main(['--help'], standalone_mode=False)"
    assert not _loaded(run) & {"numpy", "torch", "scipy", "msgspec", "rich", "jinja2", "yaml"}


def test_opening_a_checkpoint_loads_no_torch() -> None:
    assert "torch" not in _loaded("import lineage; lineage.open; import lineage.match, lineage.judge")


def test_python_m_lineage_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lineage", "--version"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == f"lineage {lineage.__version__}\n"


@pytest.mark.parametrize("name", lineage.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(lineage, name) is not None


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lineage.nothing


def test_the_version_is_written_once_more_only_in_pyproject() -> None:
    assert PROJECT["project"]["version"] == lineage.__version__


def test_the_wheel_holds_every_package() -> None:
    folders = {p.parent for p in (ROOT / "lineage").rglob("*.py")}
    found = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | {"lineage.mappings"}


def test_every_table_is_found_by_name() -> None:
    tables = [p.relative_to(ROOT / "mappings").as_posix() for p in (ROOT / "mappings").rglob("*.yaml")]
    assert tables
    assert all(mapping_file(name).is_file() for name in tables)


def test_a_missing_table_says_how_to_mend_it() -> None:
    with pytest.raises(InputError, match=r"nowhere.yaml: the table is missing; install weight-lineage again"):
        mapping_file("nowhere.yaml")


def test_the_top_level_holds_only_what_it_should() -> None:
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=False, cwd=ROOT).stdout.split()
    top = {name.split("/")[0] for name in listed}
    allowed = {"pyproject.toml", "README.md", "lineage", "mappings", "tests", "reports", "LICENSE", "CHANGELOG.md"}
    assert {name for name in top if not name.startswith(".")} <= allowed
