"""Operations read from a mapping file: every argument checked, every message with its place and the nearest word."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE
from lineage.errors import nearest
from lineage.layout.axes import LayoutError
from lineage.layout.operations import (
    OPERATIONS,
    Add,
    Cast,
    Concat,
    Data,
    Each,
    Matmul,
    Operation,
    Pad,
    Rearrange,
    Scale,
    Slice,
    Split,
    Stack,
    Take,
    Unstack,
)
from lineage.layout.operations.data import Run

__all__ = ["Context", "parse_operation", "parse_operations", "unknown"]

#: words of other libraries that einops patterns replace
EINOPS_WORDS = {
    "transpose": '"a b -> b a"',
    "permute": '"a b c -> b c a"',
    "reshape": '"(a b) c -> a b c", with the lengths in sizes',
    "view": '"(a b) c -> a b c", with the lengths in sizes',
    "flatten": '"a b c -> (a b) c"',
    "squeeze": '"a 1 -> a"',
    "unsqueeze": '"a -> a 1"',
    "rearrange": '"a b -> b a"',
}
_RANGE = re.compile(r"(-?[0-9]{1,10}):(-?[0-9]{1,10})(?::(-?[0-9]{1,10}))?")
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class Context:
    """What operations refer to: lengths by name, and arrays in the file beside the mapping.

    Parameters
    ----------
    sizes : lengths of axes
    array : gives the array of a key; LayoutError where there is none
    """

    def __init__(self, sizes: Mapping[str, int], array: Callable[[str], NDArray[Any]]) -> None:
        self.sizes, self.array = sizes, array


def unknown(word: str, words: Iterable[str], what: str) -> str:
    """`no WHAT "word"`, with the valid word that was probably meant."""
    words = list(words)
    meant = next((w for w in words if w.lower() == word.lower()), None) or nearest(word, words)
    return f'no {what} "{word[:60]}"' + (f'; did you mean "{meant}"?' if meant else "")


def parse_operations(value: Any, place: str, context: Context) -> tuple[Operation, ...]:
    """A chain: a list of operations, or a single one.

    Raises
    ------
    LayoutError : with the place of what is wrong
    """
    if not isinstance(value, list):
        return (parse_operation(value, place, context),)
    return tuple(parse_operation(item, f"{place}[{k}]", context) for k, item in enumerate(value))


def parse_operation(value: Any, place: str, context: Context) -> Operation:
    """One operation as it stands in a mapping file.

    Raises
    ------
    LayoutError : with the place of what is wrong
    """
    try:
        if isinstance(value, str) and "->" in value:
            return Rearrange(value, context.sizes)
        if isinstance(value, str):
            _refuse(value)
            raise LayoutError(f"{value} needs an argument")
        if not isinstance(value, dict) or len(value) != 1:
            raise LayoutError("an operation is an einops pattern in quotes, or one word with its arguments")
        ((word, given),) = value.items()
        if not isinstance(word, str):
            raise LayoutError(f"{str(word)[:60]} is no operation")
        _refuse(word)
        if word == "each":
            return _each(given, f"{place}.each", context)
        return _READERS[word](_Arguments(word, given, context))
    except LayoutError as exc:
        text = str(exc)
        raise LayoutError(text if text.startswith(place) else f"{place}: {text}") from exc


def _refuse(word: str) -> None:
    """Raises for a word that is no operation, with the one that was meant."""
    if word in EINOPS_WORDS:
        raise LayoutError(f'no operation "{word}"; write an einops pattern, such as {EINOPS_WORDS[word]}')
    if word not in OPERATIONS:
        raise LayoutError(unknown(word, [w for w in OPERATIONS if w != "rearrange"], "operation"))


def _each(given: Any, place: str, context: Context) -> Operation:
    if not isinstance(given, dict):
        raise LayoutError("each: takes places in the list, each with its operations: {0: …, 2: …}")
    chains: dict[int, tuple[Operation, ...]] = {}
    for key, value in given.items():
        # JSON has no keys but text
        k = int(key) if isinstance(key, str) and re.fullmatch("0|[1-9][0-9]{0,8}", key) else key
        if k in chains:
            raise LayoutError(f"each: the place {k} stands twice")
        if not isinstance(k, int) or isinstance(k, bool) or k < 0:
            raise LayoutError(f"each: {str(k)[:60]} is no place in the list; places are 0, 1, …")
        chains[k] = parse_operations(value, f"{place}[{k}]", context)
    return Each(chains)


class _Arguments:
    """The arguments of one operation.

    Parameters
    ----------
    word : the operation's
    given : as the file has it
    context : what it may refer to
    """

    def __init__(self, word: str, given: Any, context: Context) -> None:
        self.word, self.given, self.context = word, given, context

    def named(self, *names: str) -> _Arguments:
        """These arguments, all of them among `names`."""
        if not isinstance(self.given, dict):
            raise LayoutError(f"{self.word}: takes named arguments: {', '.join(names)}")
        for name in self.given:
            if name not in names:
                raise LayoutError(f"{self.word}: {unknown(str(name), names, 'argument')}")
        return self

    def integer(self, name: str, default: int | None = None, *, needed: bool = False) -> Any:
        """A whole number."""
        value = self.given.get(name, default)
        if value is None and default is None and not needed:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 62:
            raise LayoutError(f"{self.word}: {name} is {'a whole number' if name in self.given else 'missing'}")
        return value

    def number(self, name: str, value: Any) -> float:
        """Any finite number."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(float(value)):
            raise LayoutError(f"{self.word}: {name} is a finite number")
        return float(value)

    def lengths(self, name: str) -> tuple[int, ...] | None:
        """A list of lengths: numbers, or products of names from sizes."""
        value = self.given.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise LayoutError(f"{self.word}: {name} is a list of lengths")
        return tuple(self._length(name, item) for item in value)

    def _length(self, name: str, item: Any) -> int:
        if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62:
            return item
        result = 1
        for factor in str(item).split("*") if isinstance(item, str) else [""]:
            word = factor.strip()
            if word.isdecimal() and len(word) < 18:
                result *= int(word)
            elif word in self.context.sizes:
                result *= self.context.sizes[word]
            elif _NAME.fullmatch(word):
                raise LayoutError(f"{self.word}: {name}: {unknown(word, self.context.sizes, 'size')}")
            else:
                raise LayoutError(f"{self.word}: {name}: {str(item)[:60]} is neither a length nor a product of sizes")
        return result

    def over(self) -> str | None:
        """The placeholder whose list is meant."""
        value = self.given.get("over")
        if value is not None and (not isinstance(value, str) or not _NAME.fullmatch(value)):
            raise LayoutError(f"{self.word}: over is the name of a placeholder")
        return value

    def array(self) -> NDArray[Any]:
        """The array that `file` names."""
        key = self.given.get("file")
        if not isinstance(key, str):
            raise LayoutError(f"{self.word}: file is the name of a tensor in the file beside the mapping")
        return self.context.array(key)

    def index(self) -> list[Run]:
        """Places and ranges."""
        value = self.given.get("index")
        if not isinstance(value, list):
            raise LayoutError(f'{self.word}: index is a list of places and ranges such as "48:96", or give file')
        runs: list[Run] = []
        for item in value:
            match = _RANGE.fullmatch(item) if isinstance(item, str) else None
            if match:
                runs.append((int(match[1]), int(match[2]), int(match[3] or 1)))
            elif isinstance(item, int) and not isinstance(item, bool) and abs(item) < 1 << 40:
                runs.append(item)
            else:
                raise LayoutError(f'{self.word}: index: {str(item)[:60]} is no place and no range such as "48:96"')
        return runs


def _axis_only(arguments: _Arguments, *names: str) -> _Arguments:
    """Named arguments, where a bare number stands for the axis."""
    if isinstance(arguments.given, int) and not isinstance(arguments.given, bool):
        arguments.given = {"axis": arguments.given}
    return arguments.named("axis", *names)


def _concat(given: _Arguments) -> Operation:
    a = _axis_only(given, "sizes", "over")
    return Concat(a.integer("axis", 0), a.lengths("sizes"), a.over())


def _split(given: _Arguments) -> Operation:
    a = given.named("axis", "parts", "sizes", "over")
    return Split(a.integer("axis", 0), a.integer("parts"), a.lengths("sizes"), a.over())


def _stack(given: _Arguments) -> Operation:
    a = _axis_only(given, "over")
    return Stack(a.integer("axis", 0), a.over())


def _unstack(given: _Arguments) -> Operation:
    a = _axis_only(given, "over")
    return Unstack(a.integer("axis", 0), a.over())


def _slice(given: _Arguments) -> Operation:
    a = given.named("axis", "start", "stop", "of", "value")
    value = a.given.get("value")
    value = None if value is None else a.number("value", value)
    return Slice(a.integer("axis", 0), a.integer("start", 0), a.integer("stop"), a.integer("of"), value)


def _take(given: _Arguments) -> Operation:
    a = given.named("axis", "index", "file", "of")
    if "file" in a.given and "index" not in a.given:
        array = a.array()
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise LayoutError(f"take: {a.given['file']} is no list of whole numbers")
        return Take(a.integer("axis", 0), array, a.integer("of"))
    return Take(a.integer("axis", 0), a.index(), a.integer("of"))


def _pad(given: _Arguments) -> Operation:
    a = given.named("axis", "before", "after", "value")
    value = a.given.get("value", 0.0)
    value = None if value is None else a.number("value", value)
    return Pad(a.integer("axis", 0), a.integer("before", 0), a.integer("after", 0), value)


def _constant(kind: type[Scale | Add]) -> Callable[[_Arguments], Operation]:
    def read(given: _Arguments) -> Operation:
        if not isinstance(given.given, dict):
            return kind(given.number("the operand", given.given))
        a = given.named("axis", "file")
        return kind(Data(a.array()), a.integer("axis", needed=True))

    return read


def _cast(given: _Arguments) -> Operation:
    if given.given not in STORAGE:
        raise LayoutError(f"cast: {unknown(str(given.given), STORAGE, 'dtype')}")
    return Cast(given.given)


def _matmul(given: _Arguments) -> Operation:
    a = given.named("side", "file")
    side: Literal["left", "right"] = "left" if a.given.get("side") == "left" else "right"
    if a.given.get("side") != side:
        raise LayoutError("matmul: side is left or right")
    return Matmul(side, Data(a.array()))


_READERS: dict[str, Callable[[_Arguments], Operation]] = {
    "concat": _concat,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "slice": _slice,
    "take": _take,
    "pad": _pad,
    "scale": _constant(Scale),
    "add": _constant(Add),
    "cast": _cast,
    "matmul": _matmul,
}
