"""Names with numbers in them: templates such as `layers.{i}.mlp.{3*b+r+1}`, and names taken apart.

A name is its skeleton (numbers replaced by a mark) and its numbers; the two give the name back. Numbers with leading
zeros or more than nine digits are part of the skeleton. A template has a skeleton too, so that templates and names
join by skeleton, without trying each with each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from lineage.layout.axes import LayoutError

__all__ = ["MARK", "Affine", "Skeleton", "Template", "affine", "literal", "parse_template", "skeleton", "texts"]

#: stands for a number; where a name itself has this private-use character, or the escape, an escape stands before it
MARK = "\ue000"
_ESCAPE = "\ue001"
Skeleton = str

_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|[^{}]+")
_UNESCAPE = re.compile(_ESCAPE + "([em])")
_TERM = re.compile(r"\s*([+-]?)\s*(?:([0-9]{1,9})\s*\*\s*)?([A-Za-z][A-Za-z0-9_]*|[0-9]{1,9})\s*")


def skeleton(name: str) -> tuple[Skeleton, tuple[int, ...]]:
    """The name with each number replaced by a mark, and the numbers.

    Examples
    --------
    >>> text, numbers = skeleton("layers.10.conv1.weight")
    >>> text.replace(MARK, "#"), numbers
    ('layers.#.conv#.weight', (10, 1))
    """
    parts = _NUMBER.split(name)
    return _joined(parts[::2]), tuple(map(int, parts[1::2]))


def texts(text: Skeleton) -> tuple[str, ...]:
    """The literal parts of a skeleton.

    Examples
    --------
    >>> texts(skeleton("layers.10.conv1")[0])
    ('layers.', '.conv', '')
    """
    parts = text.split(MARK)
    return tuple(_UNESCAPE.sub(lambda m: MARK if m.group(1) == "m" else _ESCAPE, p) for p in parts)


def _joined(parts: Sequence[str]) -> Skeleton:
    """The parts with marks between, their own marks escaped."""
    text = MARK.join(parts)
    if _ESCAPE in text or text.count(MARK) >= len(parts):
        return MARK.join(p.replace(_ESCAPE, _ESCAPE + "e").replace(MARK, _ESCAPE + "m") for p in parts)
    return text


@dataclass(frozen=True)
class Affine:
    """A whole number made of placeholders: constant + Σ factor · placeholder.

    Attributes
    ----------
    constant : may be negative; the value may not
    terms : pairs of a placeholder and its factor, largest factor first
    """

    constant: int
    terms: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        parts = [f"{f:+d}*{n}" if abs(f) != 1 else f"{'+' if f > 0 else '-'}{n}" for n, f in self.terms]
        if self.constant or not parts:
            # a leading minus reads badly: 11-i rather than -i+11
            first = self.constant > 0 and bool(self.terms) and self.terms[0][1] < 0
            parts.insert(0 if first else len(parts), f"{self.constant:+d}")
        return "".join(parts).removeprefix("+")


@dataclass(frozen=True)
class Template:
    """A name with numbers left open.

    Attributes
    ----------
    texts : the literal parts, one more than `numbers`
    numbers : what stands between them
    """

    texts: tuple[str, ...]
    numbers: tuple[Affine, ...]

    def __str__(self) -> str:
        parts = [_escaped(self.texts[0])]
        for number, text in zip(self.numbers, self.texts[1:], strict=True):
            parts += [f"{{{number}}}" if number.terms else str(number.constant), _escaped(text)]
        return "".join(parts)

    def namer(self, placeholders: Sequence[str]) -> Callable[[Sequence[int]], str]:
        """A quick `name` for many bindings, given as values of `placeholders` in that order."""
        place = {name: k for k, name in enumerate(placeholders)}
        form = self.texts[0].replace("%", "%%")
        sums: list[tuple[int, list[tuple[int, int]]]] = []
        for number, text in zip(self.numbers, self.texts[1:], strict=True):
            form += ("%d" if number.terms else str(number.constant)) + text.replace("%", "%%")
            if number.terms:
                sums.append((number.constant, [(place[name], factor) for name, factor in number.terms]))
        if all(constant == 0 and len(terms) == 1 and terms[0][1] == 1 for constant, terms in sums):
            order = [terms[0][0] for _, terms in sums]
            return lambda values: form % tuple([values[k] for k in order])

        def name(values: Sequence[int]) -> str:
            numbers = tuple(c + sum(values[k] * f for k, f in terms) for c, terms in sums)
            if min(numbers) < 0:
                raise LayoutError(f"{self}: a number in the name would be {min(numbers)}")
            return form % numbers

        return name

    @property
    def placeholders(self) -> tuple[str, ...]:
        """Placeholders in the order in which they first stand."""
        return tuple(dict.fromkeys(name for number in self.numbers for name, _ in number.terms))

    @property
    def skeleton(self) -> Skeleton:
        """The skeleton of every name that the template can give."""
        return _joined(self.texts)

    def name(self, bindings: Mapping[str, int]) -> str:
        """The name for these values of the placeholders.

        Raises
        ------
        LayoutError : a number would be negative
        """
        return self.namer(tuple(bindings))(tuple(bindings.values()))


@lru_cache(maxsize=1 << 14)
def parse_template(text: str) -> Template:
    """The template that `text` spells; `{{` and `}}` are braces of the name itself.

    Raises
    ------
    LayoutError : a brace stays open, an expression is not affine, or a placeholder touches a digit

    Examples
    --------
    >>> parse_template("down.{3*b+r+1}.{{x}}").name({"b": 2, "r": 0})
    'down.7.{x}'
    """
    parts: list[str | Affine] = [""]
    for match in _PIECE.finditer(text):
        piece = match.group()
        if piece in ("{", "}"):
            raise LayoutError(f'"{text}": a brace stays open; write {{{{ or }}}} for a brace in a name')
        if piece[0] == "{" and piece != "{{":
            parts += [_affine(match.group(1), text), ""]
        else:
            parts[-1] = str(parts[-1]) + ("{" if piece == "{{" else "}" if piece == "}}" else piece)
    texts: list[str] = [""]
    numbers: list[Affine] = []
    for k, part in enumerate(parts):
        if isinstance(part, Affine):
            before, after = str(parts[k - 1]), str(parts[k + 1])
            if (not before and k > 1) or before[-1:].isdecimal() or after[:1].isdecimal():
                raise LayoutError(f'"{text}": something other than a digit must stand around {{{part}}}')
            numbers.append(part)
            texts.append("")
        else:
            pieces = _NUMBER.split(part)
            texts[-1] += pieces[0]
            texts += pieces[2::2]
            numbers += [Affine(int(n), ()) for n in pieces[1::2]]
    return Template(tuple(texts), tuple(numbers))


def literal(name: str) -> Template:
    """The template that gives this one name.

    Examples
    --------
    >>> str(literal("{i}.weight"))
    '{{i}}.weight'
    """
    parts = _NUMBER.split(name)
    return Template(tuple(parts[::2]), tuple(Affine(int(n), ()) for n in parts[1::2]))


def affine(constant: int, terms: Sequence[tuple[str, int]]) -> Affine:
    """An `Affine` in its normal form: factors added up, none 0, largest first."""
    factors: dict[str, int] = {}
    for name, factor in terms:
        factors[name] = factors.get(name, 0) + factor
    kept = [(n, f) for n, f in factors.items() if f]
    return Affine(constant, tuple(sorted(kept, key=lambda t: (-t[1], t[0]))))


def _affine(text: str, template: str) -> Affine:
    """The expression between two braces."""
    constant, terms, at = 0, [], 0
    while at < len(text):
        match = _TERM.match(text, at)
        if match is None or (at and not match.group(1)):
            break
        sign = -1 if match.group(1) == "-" else 1
        factor = sign * int(match.group(2) or 1)
        if match.group(3).isdecimal():
            constant += factor * int(match.group(3))
        else:
            terms.append((match.group(3), factor))
        at = match.end()
    if at < len(text) or not terms:
        raise LayoutError(f'"{template}": {{{text}}} is no sum of placeholders; write {{{{ for a brace in a name')
    return affine(constant, terms)


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
