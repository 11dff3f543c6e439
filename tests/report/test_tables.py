"""Tables for terminals and Markdown."""

from __future__ import annotations

import pytest

from lineage.report.tables import Table, as_text, figure, size

TABLE = Table(title="Tensors", heads=("name", "n"), rows=(("model.layers.10.weight", 1), ("b", None), ("c", 2.5)))


def test_numbers_stand_right_and_names_left() -> None:
    assert as_text(TABLE).splitlines() == [
        "Tensors",
        "name                      n",
        "model.layers.10.weight    1",
        "b                         -",
        "c                       2.5",
    ]


def test_long_names_lose_their_middle_where_the_terminal_is_narrow() -> None:
    lines = as_text(TABLE, width=20).splitlines()
    assert lines[2] == "model…s.10.weight  1"[:20] or lines[2].endswith("weight    1")
    assert max(map(len, lines[1:])) <= 20


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0"), (1.0, "1"), (-1.0, "-1"), (0.99999, "0.99999"), (1.00001, "1.00001"), (12, "12")]
)
def test_what_is_nearly_one_does_not_read_as_one(value: float, shown: str) -> None:
    assert figure(value) == shown


def test_sizes_have_three_digits() -> None:
    assert [size(n) for n in (0, 999, 1500, 7.24e9, 1.2e13)] == ["0", "999", "1.5K", "7.24B", "12T"]
