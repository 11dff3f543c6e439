"""The folder of a report: all of its files or none, and nobody else's files touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lineage.errors import InputError
from lineage.layout.document import read_mapping
from lineage.report import folder as module
from lineage.report.document import Report
from lineage.report.folder import check_folder, write_folder
from tests.report.pairs import network, report

WRITTEN = {"report.json", "report.md", "report.html", "tensors.csv", "mapping.yaml"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("pair")
    return report(network(folder / "base", ["up"]), network(folder / "child", ["up"], moved=0.01))


def _held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_all_files_are_written(found: Report, tmp_path: Path) -> None:
    write_folder(found, tmp_path / "new" / "report")
    assert _held(tmp_path / "new" / "report") == WRITTEN
    assert json.loads((tmp_path / "new/report/report.json").read_text())["verdict"]["class"] == "transformed"
    assert read_mapping(tmp_path / "new/report/mapping.yaml").rules == found.mapping.rules


def test_an_earlier_report_is_replaced(found: Report, tmp_path: Path) -> None:
    write_folder(found, tmp_path)
    (tmp_path / "report.md").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    write_folder(found, tmp_path)
    assert _held(tmp_path) == WRITTEN | {"notes.txt"}
    assert (tmp_path / "report.md").read_text().startswith("# Transformed")


def test_a_file_that_is_no_reports_is_not_replaced(found: Report, tmp_path: Path) -> None:
    (tmp_path / "mapping.yaml").write_text("mine")
    with pytest.raises(InputError, match="mapping.yaml: is there already and belongs to no report"):
        write_folder(found, tmp_path)
    assert _held(tmp_path) == {"mapping.yaml"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000])
def test_somebody_elses_report_json_is_not_replaced(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(InputError, match="belongs to no report"):
        check_folder(tmp_path)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        check_folder(tmp_path / "file")
    with pytest.raises(InputError, match="is a file, not a folder"):
        check_folder(tmp_path / "file" / "report")


def test_a_failure_leaves_nothing(found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Report) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "page", full)
    with pytest.raises(InputError, match="no space left on the disk"):
        write_folder(found, tmp_path / "new" / "report")
    assert _held(tmp_path) == set()


def test_an_interrupt_leaves_the_earlier_report(found: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(found, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def stop(_: Report) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "page", stop)
    with pytest.raises(KeyboardInterrupt):
        write_folder(found, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_names_that_utf8_cannot_hold_are_written_as_escapes(found: Report, tmp_path: Path) -> None:
    import msgspec

    odd = msgspec.structs.replace(found.document, warnings=("\udcff",))
    write_folder(msgspec.structs.replace(found, document=odd), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == ["\udcff"]
