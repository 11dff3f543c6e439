"""One table record, printed for a terminal, as Markdown or as CSV; and how figures look in print."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from lineage.errors import printable

__all__ = ["Cell", "Table", "as_csv", "as_markdown", "as_text", "bar", "count", "figure", "size"]

Cell = str | int | float | None
#: shown where a figure is not defined
MISSING = "-"
_BARS = "·▁▂▃▄▅▆▇█"


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """Rows under headings.

    Attributes
    ----------
    heads : heading of each column
    rows : cells; numbers stay numbers until they are printed
    title : a line above the table, "" for none
    """

    heads: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""


def figure(value: Cell, digits: int = 4) -> str:
    """A cell as text: figures with `digits` significant digits, what is undefined as a dash.

    Examples
    --------
    >>> figure(0.00019999), figure(None), figure(1), figure(0.9999999)
    ('0.0002', '-', '1', '0.9999999')
    """
    if value is None:
        return MISSING
    if not isinstance(value, float):
        return str(value)
    text = f"{value:.{digits}g}"
    while abs(value) != 1 and text in ("1", "-1") and digits < 17:  # a cosine of 0.9999999 must not read as 1
        digits += 1
        text = f"{value:.{digits}g}"
    return text


def count(n: int, what: str) -> str:
    """A number of things, in words.

    Examples
    --------
    >>> count(1, "tensor"), count(1200, "tensor")
    ('1 tensor', '1,200 tensors')
    """
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def size(n: float, unit: str = "") -> str:
    """A large number in three digits with K, M, B or T.

    Examples
    --------
    >>> size(6738415616), size(1030000000, "B")
    ('6.74B', '1.03 GB')
    """
    steps = [(1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k" if unit else "K")]
    for step, letter in steps:
        if n >= step:
            text = f"{n / step:.3g}"
            return f"{text} {letter}{unit}" if unit else text + letter
    return f"{n:g} {unit}".rstrip()


def bar(values: Iterable[float | None]) -> str:
    """One character for each value, its height the share of the largest; a dot for zero, a gap for none.

    Examples
    --------
    >>> bar([0.0, 0.5, 1.0, None])
    '·▄█ '
    """
    listed = list(values)
    top = max((v for v in listed if v is not None), default=0.0) or 1.0
    last = len(_BARS) - 1
    return "".join(" " if v is None else _BARS[round(v / top * last) or int(v > 0)] for v in listed)


def as_text(table: Table, *, width: int = 0) -> str:
    """Aligned columns for a terminal; control characters in cells are escaped.

    Parameters
    ----------
    width : columns of the terminal, 0 where it does not matter; the first column gives way
    """
    cells = [[printable(figure(c)) for c in row] for row in (table.heads, *table.rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(table.heads))]
    if width and widths:
        spare = width - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = max(min(widths[0], spare), 12)
    right = [_numeric(table.rows, at) for at in range(len(table.heads))]
    lines = [table.title] if table.title else []
    for row in cells:
        parts = []
        for at, text in enumerate(row):
            text = _shorten(text, widths[at])
            parts.append(text.rjust(widths[at]) if right[at] else text.ljust(widths[at]))
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _numeric(rows: Sequence[Sequence[Cell]], at: int) -> bool:
    """True where a column holds numbers only."""
    column = [row[at] for row in rows if row[at] is not None]
    return bool(column) and not any(isinstance(c, str) for c in column)


def _shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters; names are told apart by their ends, so the middle goes."""
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def as_markdown(table: Table) -> str:
    """A Markdown table under its title.

    Examples
    --------
    >>> print(as_markdown(Table(heads=("name", "cosine"), rows=(("a|b", 0.5),))))
    | name | cosine |
    | --- | ---: |
    | a\\|b | 0.5 |
    """
    marks = ["---:" if _numeric(table.rows, at) else "---" for at in range(len(table.heads))]
    lines = [f"### {table.title}", ""] if table.title else []
    for row in (table.heads, marks, *table.rows):
        lines.append("| " + " | ".join(_escaped(figure(c)) for c in row) + " |")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text that Markdown and HTML inside it leave alone."""
    clean = printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return clean.replace("`", "\\`") or " "


def as_csv(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated lines with full precision; what is undefined stays empty.

    Examples
    --------
    >>> as_csv(["name", "cosine"], [["a,b", None], ["c", 0.1]]).splitlines()
    ['name,cosine', '"a,b",', 'c,0.1']
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(rows)
    return out.getvalue()
