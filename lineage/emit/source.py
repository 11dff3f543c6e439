"""Python text that a formatter leaves as it is: literals of names that nobody vouches for, and lines cut to a width.

Whatever does not fit on a line is written one item a line with a comma after the last, which formatters keep.
"""

from __future__ import annotations

import keyword
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lineage.layout.templates import Affine, Template

__all__ = [
    "WIDTH",
    "Group",
    "Locals",
    "assignment",
    "comment",
    "number",
    "quoted",
    "statement",
    "string",
    "template",
    "whole",
]

#: longest line of emitted code
WIDTH = 120
#: longest placeholder that is used as a variable's name
LONGEST = 12


def quoted(text: str, *, braces: bool = False) -> str:
    """The inside of a string literal in double quotes: ASCII only, no quote of either kind, nothing that ends it.

    Parameters
    ----------
    braces : it stands in an f-string, where braces are doubled

    Examples
    --------
    >>> quoted('a"b\\n{c}', braces=True)
    'a\\\\x22b\\\\n{{c}}'
    """
    pieces = []
    for character in text:
        code = ord(character)
        if character in "{}" and braces:
            pieces.append(character * 2)
        elif character in _ESCAPES:
            pieces.append(_ESCAPES[character])
        elif 32 <= code < 127:
            pieces.append(character)
        else:
            form = f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
            pieces.append(form)
    return "".join(pieces)


_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", '"': "\\x22", "'": "\\x27"}


def string(text: str) -> str:
    """A string literal.

    Examples
    --------
    >>> string("it's")
    '"it\\\\x27s"'
    """
    return f'"{quoted(text)}"'


def comment(text: str, indent: int = 0) -> list[str]:
    """Comment lines: whatever the text holds, nothing of it leaves them.

    Examples
    --------
    >>> comment("a\\nb")
    ['# a\\\\nb']
    """
    room = WIDTH - indent - len("#   ")
    lines = textwrap.wrap(text.encode("unicode_escape").decode("ascii"), room, break_on_hyphens=False)
    return [f"{' ' * indent}#{'   ' if k else ' '}{line}" for k, line in enumerate(lines)]


@dataclass(frozen=True)
class Group:
    """Items between brackets.

    Attributes
    ----------
    before, after : what opens and closes it, such as `f(` and `)`
    items : texts or groups
    """

    before: str
    items: tuple[str | Group, ...]
    after: str

    def __str__(self) -> str:
        # a tuple of one item needs its comma, a call does not
        lone = len(self.items) == 1 and (self.before == "(" or self.before.endswith("= ("))
        return self.before + ", ".join(map(str, self.items)) + ("," if lone else "") + self.after


def statement(indent: int, item: str | Group, *, closing: str = "", always: bool = False) -> list[str]:
    """Lines of an expression or assignment.

    Parameters
    ----------
    indent : spaces before it
    closing : what follows on the last line
    always : one item a line even where one line would do
    """
    flat = " " * indent + str(item) + closing
    if isinstance(item, str) or (len(flat) <= WIDTH and not always) or not item.items:
        return [flat]
    lines = [" " * indent + item.before]
    for part in item.items:
        lines += statement(indent + 4, part, closing=",")
    return [*lines, " " * indent + item.after + closing]


def assignment(indent: int, name: str, text: str) -> list[str]:
    """`name = text` for a text without brackets to break at."""
    flat = f"{' ' * indent}{name} = {text}"
    if len(flat) <= WIDTH or indent + 4 + len(text) > WIDTH:
        return [flat]
    return [f"{' ' * indent}{name} = (", f"{' ' * (indent + 4)}{text}", f"{' ' * indent})"]


#: names that emitted files make themselves: constants, loop variables; and l, which looks like a number
_MADE = re.compile(r"[A-Z][A-Z0-9_]*|(found|rows|number|placeholder)_.*|[uvw][0-9].*|.*_values|l")


class Locals:
    """Placeholders and axes as variables: their own names where Python and the emitted file leave them free."""

    #: names that emitted functions use themselves
    TAKEN = frozenset({"x", "m", "w", "v", "out", "parts", "names", "name", "known", "found", "dtype", "dtypes",
                       "arrays", "state_dict", "torch", "range", "zip", "map", "list", "set", "int", "all", "len",
                       "sorted", "enumerate", "any", "tuple", "dict", "str", "float", "divmod", "max", "min",
                       "Tensor", "json", "re", "Path", "Iterable", "Sequence", "type", "next", "iter"})  # fmt: skip

    def __init__(self, names: Iterable[str]) -> None:
        self._names: dict[str, str] = {}
        for k, name in enumerate(dict.fromkeys(names)):
            plain = name.isascii() and name.isidentifier() and len(name) <= LONGEST and not keyword.iskeyword(name)
            free = plain and name not in self.TAKEN and not keyword.issoftkeyword(name)
            self._names[name] = name if free and not _MADE.fullmatch(name) else f"placeholder_{k}"

    def __getitem__(self, name: str) -> str:
        return self._names[name]


def number(value: Affine, names: Locals) -> str:
    """A whole number made of placeholders, as an expression.

    Examples
    --------
    >>> number(Affine(1, (("b", 3), ("r", 1))), Locals(["b", "r"]))
    '3 * b + r + 1'
    """
    text = ""
    terms = sorted(value.terms, key=lambda term: term[1] < 0)
    leading = value.constant if terms and terms[0][1] < 0 else 0
    if leading:
        text = str(leading)
    for name, factor in terms:
        size = names[name] if abs(factor) == 1 else f"{abs(factor)} * {names[name]}"
        sign = "-" if factor < 0 else "+"
        text += f" {sign} {size}" if text else size if factor > 0 else f"-{size}"
    rest = value.constant - leading
    return text + (f" {'+' if rest > 0 else '-'} {abs(rest)}" if rest and text else str(rest) if not text else "")


def template(given: Template, names: Locals) -> str:
    """A name with numbers in it, as a literal or an f-string.

    Examples
    --------
    >>> from lineage.layout.templates import parse_template
    >>> template(parse_template("h.{i+1}.{{w}}"), Locals(["i"]))
    'f"h.{i + 1}.{{w}}"'
    """
    if not given.placeholders:
        return string(given.name({}))
    pieces = [quoted(given.texts[0], braces=True)]
    for value, text in zip(given.numbers, given.texts[1:], strict=True):
        pieces.append(f"{{{number(value, names)}}}" if value.terms else str(value.constant))
        pieces.append(quoted(text, braces=True))
    return f'f"{"".join(pieces)}"'


def whole(values: Sequence[int]) -> str | Group:
    """Numbers as a range where they are one, else as a tuple.

    Examples
    --------
    >>> whole([0, 1, 2]), whole([4])
    ('range(3)', 'range(4, 5)')
    """
    if values and list(values) == list(range(values[0], values[0] + len(values))):
        return f"range({_ends(values[0], values[0] + len(values))})"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([value, value + 1])
    return Group("(", tuple(str(a) if b == a + 1 else f"*range({_ends(a, b)})" for a, b in runs), ")")


def _ends(start: int, stop: int) -> str:
    return f"{start}, {stop}" if start else str(stop)
