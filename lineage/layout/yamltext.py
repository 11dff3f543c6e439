"""YAML read without trust, and text written so that any YAML reader gives it back.

Reading: plain data only, no tags, no aliases, no key twice, bounded size and depth. Writing: a scalar in its plainest
safe spelling; whatever a name holds (line ends, escape codes, words that YAML takes for numbers) survives.
"""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from lineage.layout.axes import LayoutError

__all__ = ["flow", "load", "scalar"]

#: a mapping of 100,000 single rules takes about 25 MB; a reader needs 50 times the text in memory
MOST_BYTES = 32 << 20
MOST_DEPTH = 64

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./+\-]*(?:\{[A-Za-z0-9_+*\-]+\}[A-Za-z0-9_./+\-]*)*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
#: a plain word with placeholders inside brackets, as people write it although YAML wants quotes there
_UNQUOTED = re.compile(r"(?<=[\[,\s])((?:[^\s\[\]{},\"'#]*\{[A-Za-z0-9_+*\- ]+\})+[^\s\[\]{},\"'#:]*)(?=\s*[,\]])")


_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}|0x[0-9a-fA-F]{1,4000}|0o[0-7]{1,4000}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def load(text: str) -> Any:
    """The one document of a YAML text, words read by the core schema of YAML 1.2.

    Raises
    ------
    LayoutError : not YAML, with the line; tags, aliases, a key twice, too deep or too large
    """
    if len(text) > MOST_BYTES:
        raise LayoutError(f"{len(text) >> 20} MB of text, a mapping has at most {MOST_BYTES >> 20}")
    try:
        return _document(text)
    except yaml.YAMLError as exc:
        quoted = _UNQUOTED.sub(lambda m: '"' + m.group(1).replace("\\", "\\\\") + '"', text)
        if quoted != text:
            try:
                return _document(quoted)
            except yaml.YAMLError:
                pass
        raise LayoutError(_reason(exc)) from exc


def _document(text: str) -> Any:
    """Data built from the parser's events: nothing recursive, nothing that could be shared or executed."""
    result: list[Any] = []
    # one entry for each open collection: its items so far, keys and values in turn for a dictionary
    stack: list[tuple[list[Any], bool]] = [(result, False)]
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.ScalarEvent):
            _check_tag(event)
            stack[-1][0].append(_word(event.value) if event.implicit[0] else event.value)
        elif isinstance(event, yaml.CollectionStartEvent):
            _check_tag(event)
            if len(stack) > MOST_DEPTH:
                raise LayoutError(f"nested more than {MOST_DEPTH} deep{_at(event)}")
            stack.append(([], isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, yaml.CollectionEndEvent):
            items, pairs = stack.pop()
            stack[-1][0].append(_pairs(items, event) if pairs else items)
        elif isinstance(event, yaml.AliasEvent):
            raise LayoutError(f"aliases (*{event.anchor}) are not allowed{_at(event)}")
    if len(result) != 1:
        raise LayoutError(f"{len(result)} documents in one file" if result else "the file is empty")
    return result[0]


def _check_tag(event: Any) -> None:
    if event.tag is not None and event.tag != "!":
        raise LayoutError(f"tags ({event.tag[:60]}) are not allowed{_at(event)}")


def _pairs(items: list[Any], event: Any) -> dict[Any, Any]:
    """Keys and values in turn, as a dictionary."""
    result = {}
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, list | dict):
            raise LayoutError(f"a key is a word{_at(event)}")
        if key in result:
            raise LayoutError(f'the key "{str(key)[:60]}" stands twice in what ends here{_at(event)}')
        result[key] = value
    return result


def _word(text: str) -> Any:
    """A plain scalar: null, truth value, number or text."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] in "+-.0123456789":
        if _INTEGER.fullmatch(text):
            return int(text, 8 if text[1:2] == "o" else 16 if text[1:2] == "x" else 10)
        if _FLOAT.fullmatch(text):
            return float(text.lower().replace(".", "")) if "n" in text.lower() else float(text)
    return text


def _at(event: Any) -> str:
    return f" (line {event.start_mark.line + 1})" if event.start_mark else ""


def _reason(exc: yaml.YAMLError) -> str:
    """The parser's complaint on one line."""
    mark = getattr(exc, "problem_mark", None)
    problem: str = getattr(exc, "problem", None) or str(exc).splitlines()[0]
    return f"not YAML that can be read: {problem}" + (f" (line {mark.line + 1})" if mark else "")


def scalar(value: Any, *, inside: bool = False) -> str:
    """A string, number, truth value or None as YAML.

    Parameters
    ----------
    inside : it stands inside brackets, where more has to be quoted

    Examples
    --------
    >>> scalar("layers.{i}.w"), scalar("layers.{i}.w", inside=True), scalar("off"), scalar("1e3")
    ('layers.{i}.w', '"layers.{i}.w"', '"off"', '"1e3"')
    """
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 takes 1e-05 for a word: it wants a point and a signed exponent
        mantissa, e, exponent = text.partition("e")
        return text if not e else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"
    word = str(value)
    if _PLAIN.fullmatch(word) and word.lower() not in _WORDS and not (inside and "{" in word):
        return word
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else _escape(c)) for c in word) + '"'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def flow(value: Any) -> str:
    """A value on one line: brackets for lists and dictionaries.

    Examples
    --------
    >>> flow([{"concat": {"axis": 0, "sizes": [4, 2]}}, "a b -> b a"])
    '[{concat: {axis: 0, sizes: [4, 2]}}, "a b -> b a"]'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{scalar(k, inside=True)}: {flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(flow(v) for v in value) + "]"
    return scalar(value, inside=True)
