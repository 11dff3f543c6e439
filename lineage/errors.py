"""What a user can mend, said in one line; everything else is a bug and may raise what it likes.

`InputError` names the place, what was found there and what to do. Commands turn it into exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["InputError", "LineageError", "nearest", "printable"]


class LineageError(Exception):
    """Base of every error that the package raises on purpose."""


class InputError(LineageError):
    """Input that cannot be used: `place: cause; remedy` on one line.

    Parameters
    ----------
    place : file, folder or position inside a document
    cause : what was found, against what was expected
    remedy : what the user can do, or None where there is nothing
    """

    def __init__(self, place: object, cause: str, remedy: str | None = None) -> None:
        self.place, self.cause, self.remedy = str(place), cause, remedy
        text = f"{self.place}: {cause}" + (f"; {remedy}" if remedy else "")
        super().__init__(printable(text))


def nearest(word: str, words: Iterable[str]) -> str | None:
    """The valid word that `word` was probably meant to be, or None.

    Examples
    --------
    >>> nearest("concatt", ["concat", "split"])
    'concat'
    """
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return found[0] if found else None


def printable(text: str, limit: int | None = None) -> str:
    """`text` on one line without control or direction characters, cut to `limit` characters.

    Names of tensors come from files that nobody vouches for: escape sequences must not reach a terminal.

    Examples
    --------
    >>> printable("a\\x1b[2Jb")
    'a\\\\x1b[2Jb'
    """
    clean = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if limit is not None and len(clean) > limit:
        return clean[: limit - 1] + "…"
    return clean
