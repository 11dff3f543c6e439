"""A pickle reader that cannot run anything: it builds plain values and inert stand-ins for all the rest.

Pickle is a small stack language whose calls can name any function. Here a name is only a `Global`; a call is
answered by a table that the caller gives, becomes an inert `Thing` where it could only make a plain object, and is
refused otherwise. Python's own unpickler is not used: besides running code it can be made to take any amount of
memory by a ten-byte file (memo indexes). Opcodes: Lib/pickle.py and Lib/pickletools.py of CPython.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lineage.errors import InputError, printable

__all__ = ["MAX_BYTES", "Cursor", "Global", "Thing", "load"]

#: standard modules whose classes only hold values
_INERT_STANDARD = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "pathlib",
                   "types", "typing", "uuid"}  # fmt: skip
#: names in `types` and `copyreg` that do more than hold values
_INERT_NAMES = {"types": {"SimpleNamespace"}, "copyreg": {"_reconstructor"}}
_BUILTIN_TYPES = {"bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
                  "range", "set", "slice", "str", "tuple", "NoneType", "long", "unicode"}  # fmt: skip
#: NumPy's own ways to say an array, a number, a random state
_NUMPY_NAMES = {"_reconstruct", "dtype", "ndarray", "scalar", "_frombuffer", "__bit_generator_ctor",
                "__generator_ctor", "__randomstate_ctor"}  # fmt: skip
#: modules of Python 2 whose functions no checkpoint needs
_OLD_STANDARD = {"__builtin__", "commands", "cPickle", "copy_reg", "os2", "popen2", "thread", "urllib2"}
_CHUNK_BYTES = 2**16
#: bytes and steps of one description; 10^5 tensors take some 20 MB and 4 million steps
MAX_BYTES = 2**27
_MAX_STEPS = 2**23


class Global:
    """The name of a class or function; nothing is imported."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Thing:
    """An object of a class that is not loaded: what it was made from, and what was put into it."""

    __slots__ = ("args", "items", "kind", "state", "values")

    def __init__(self, kind: Global, args: tuple[Any, ...]) -> None:
        self.kind, self.args = kind, args
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        self.values: list[Any] = []


class Cursor:
    """Bytes of a file front to back, through a small buffer.

    Parameters
    ----------
    read : function that gives `count` bytes at an offset
    at, end : where to begin and where to stop
    """

    def __init__(self, read: Callable[[int, int], bytes], at: int, end: int) -> None:
        self._read, self._end = read, min(end, at + MAX_BYTES)
        self._base, self._buffer, self._at = at, b"", 0

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._base + self._at

    def take(self, count: int) -> bytes:
        """The next `count` bytes; EOFError where there are fewer."""
        stop = self._at + count
        if stop > len(self._buffer):
            self._fill(count)
            stop = count
        piece = self._buffer[self._at : stop]
        self._at = stop
        return piece

    def line(self) -> bytes:
        """The bytes up to the next line feed, without it."""
        for length in (0, 256, _CHUNK_BYTES):
            if length:
                self._fill(min(length, self._end - self.tell()))
            stop = self._buffer.find(b"\n", self._at)
            if stop >= 0:
                piece = self._buffer[self._at : stop]
                self._at = stop + 1
                return piece
        raise EOFError

    def _fill(self, count: int) -> None:
        """Makes the buffer begin here, with at least `count` bytes."""
        self._base += self._at
        self._at = 0
        left = self._end - self._base
        if count > left:
            raise EOFError
        self._buffer = self._read(self._base, min(max(count, _CHUNK_BYTES), left))


Calls = Mapping[tuple[str, str], Callable[..., Any]]


def load(path: str, cursor: Cursor, calls: Calls, persistent: Callable[[Any], Any]) -> Any:
    """The value of one pickle; the cursor stands behind it afterwards.

    Parameters
    ----------
    path : named in errors
    calls : (module, name) -> function that answers a call of that name with plain values
    persistent : answers persistent ids (torch: storages)

    Raises
    ------
    InputError : the pickle is broken, or wants to call what is not in the table
    """
    try:
        return _Machine(path, cursor, calls, persistent).run()
    except EOFError as exc:
        raise InputError(path, "the pickle ends early", "fetch it again, it was cut short") from exc
    except (
        ArithmeticError, AttributeError, LookupError, TypeError, ValueError, MemoryError, RecursionError, struct.error
    ) as exc:  # fmt: skip
        cause = f"not a valid pickle ({type(exc).__name__}: {printable(str(exc), 80)})"
        raise InputError(path, cause, "fetch it again, it is broken") from exc


_MARK = object()


class _Machine:
    """The stack machine of one pickle."""

    def __init__(self, path: str, cursor: Cursor, calls: Calls, persistent: Callable[[Any], Any]) -> None:
        self.path, self.calls, self.persistent = path, calls, persistent
        self.take, self.line = cursor.take, cursor.line
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Executes opcodes until STOP."""
        take = self.take
        for _ in range(_MAX_STEPS):
            code = take(1)
            if code == b".":
                return self.stack.pop()
            handler = _HANDLERS.get(code)
            if handler is None:
                raise ValueError(f"opcode {code!r}")
            handler(self)
        raise ValueError("more steps than any model needs")

    # -- reading operands

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def counted(self, code: str) -> bytes:
        return self.take(self.number(code))

    def since_mark(self) -> list[Any]:
        """Takes the values above the topmost mark off the stack."""
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def many(self, count: int) -> tuple[Any, ...]:
        """Takes the topmost `count` values."""
        if len(self.stack) < count:
            raise ValueError("stack is empty")
        values = tuple(self.stack[-count:])
        del self.stack[-count:]
        return values

    # -- names and calls

    def named(self, module: str, name: str) -> Global:
        """A name that may stand in a checkpoint."""
        found = Global(module, name)
        top = module.partition(".")[0]
        if (module, name) in self.calls:
            return found
        if top in ("builtins", "__builtin__"):
            allowed = name in _BUILTIN_TYPES
        elif top == "copy_reg":
            allowed = name == "_reconstructor"
        elif top in sys.stdlib_module_names or top in _OLD_STANDARD:
            allowed = module in _INERT_STANDARD and name in _INERT_NAMES.get(module, {name}) and "." not in name
        else:
            allowed = True
        if not allowed:
            raise self.refusal(found)
        return found

    def refusal(self, found: Any) -> InputError:
        """The error for a pickle that wants to run something."""
        cause = f"this pickle wants to run {printable(str(found), 80)}, and code is never run"
        return InputError(self.path, cause, "ask its author for safetensors")

    def call(self, function: Any, args: Any) -> Any:
        """The answer to a call."""
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise self.refusal(function if isinstance(function, Global) else "a value")
        handler = self.calls.get((function.module, function.name))
        if handler is not None:
            return handler(*args)
        top = function.module.partition(".")[0]
        if function.name == "_reconstructor" and args and isinstance(args[0], Global):
            return Thing(args[0], ())
        if top in ("builtins", "__builtin__"):
            return _builtin(function.name, args)
        if top == "numpy":
            inert = function.name in _NUMPY_NAMES
        elif top in ("torch", "__main__"):
            inert = False
        elif top in _INERT_STANDARD:
            inert = True
        else:
            # Members of enumerations are written as a call of their class with one value.
            inert = len(args) == 1 and isinstance(args[0], (int, str))
        if not inert:
            raise self.refusal(function)
        return Thing(function, args)

    def create(self, kind: Any, args: Any) -> None:
        """An empty object of a class, without its constructor."""
        if not isinstance(kind, Global) or not isinstance(args, tuple):
            raise self.refusal("a value")
        handler = self.calls.get((kind.module, kind.name))
        if handler is not None:
            self.stack.append(handler(*args))
        elif kind.module in ("builtins", "__builtin__"):
            self.stack.append(_builtin(kind.name, args))
        else:
            self.stack.append(Thing(kind, args))

    # -- containers

    def put(self, values: list[Any]) -> None:
        """Key and value pairs into the dictionary on top of the stack."""
        target = self.stack[-1]
        table = target.items if isinstance(target, Thing) else target
        if not isinstance(table, dict):
            raise TypeError("items for something that is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            table[_key(key)] = value

    def extend(self, values: list[Any]) -> None:
        """Values into the list on top of the stack."""
        target = self.stack[-1]
        (target.values if isinstance(target, Thing) else target).extend(values)

    def build(self) -> None:
        """State of the object below; attributes of plain values are dropped."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Thing):
            target.state = state

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[index])


def _key(key: Any) -> Any:
    """A dictionary key that hashes in no time: deep tuples would overflow the C stack."""
    if isinstance(key, tuple) and not all(isinstance(k, (str, int, float, Global, type(None))) for k in key):
        raise TypeError("a key that no checkpoint has")
    return key


def _builtin(name: str, args: tuple[Any, ...]) -> Any:
    """A container of the standard types from its values; sets are lists here."""
    first = args[0] if args else []
    # The argument itself, not a copy: a pickle can ask for a million copies of one long list.
    if name in ("set", "frozenset", "list", "tuple"):
        return first if isinstance(first, (list, tuple)) else []
    if name == "dict":
        return first if isinstance(first, dict) else {}
    return Thing(Global("builtins", name), args)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8")


def _encodable(text: str) -> str:
    """The text, proved to hold no half of a surrogate pair."""
    text.encode()
    return text


def _line_text(machine: _Machine) -> str:
    return machine.line().decode("utf-8")


def _old_string(machine: _Machine) -> str:
    """STRING: a quoted literal; escapes are kept as they are."""
    raw = machine.line().strip()
    if len(raw) < 2 or raw[:1] != raw[-1:] or raw[:1] not in (b"'", b'"'):
        raise ValueError("STRING without quotes")
    return raw[1:-1].decode("latin1")


def _long_integer(machine: _Machine) -> int:
    """LONG4; no checkpoint needs more digits than a kilobyte holds."""
    raw = machine.counted("I")
    if len(raw) > 1024:
        raise ValueError("a number of more than 1024 bytes")
    return int.from_bytes(raw, "little", signed=True)


def _integer_line(machine: _Machine) -> Any:
    """INT: a number, or one of the old spellings of False and True."""
    raw = machine.line()
    return raw == b"01" if raw in (b"00", b"01") else int(raw.rstrip(b"L"))


def _global_line(machine: _Machine) -> Global:
    module, name = _line_text(machine), _line_text(machine)
    return machine.named(module, name)


def _stack_global(machine: _Machine) -> Global:
    module, name = machine.many(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is no text")
    return machine.named(module, name)


def _object(machine: _Machine) -> Any:
    """OBJ: a class and its arguments since the mark."""
    kind, *args = machine.since_mark()
    return machine.call(kind, tuple(args))


def _instance(machine: _Machine) -> Any:
    """INST: the same with the name in the text."""
    kind = _global_line(machine)
    return machine.call(kind, tuple(machine.since_mark()))


def _new_with_keywords(machine: _Machine) -> None:
    kind, args, _ = machine.many(3)
    machine.create(kind, args)


def _proto(machine: _Machine) -> None:
    version = machine.number("B")
    if version > 5:
        raise ValueError(f"protocol {version}")


def _pairs(machine: _Machine) -> dict[Any, Any]:
    values = machine.since_mark()
    return {_key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}


#: opcode -> value that it pushes
_PUSH: dict[bytes, Callable[[_Machine], Any]] = {
    b"(": lambda m: _MARK, b"N": lambda m: None, b"\x88": lambda m: True, b"\x89": lambda m: False,
    b"I": _integer_line, b"J": lambda m: m.number("i"), b"K": lambda m: m.number("B"), b"M": lambda m: m.number("H"),
    b"L": lambda m: int(m.line().rstrip(b"L")), b"\x8b": _long_integer,
    b"\x8a": lambda m: int.from_bytes(m.counted("B"), "little", signed=True),
    b"F": lambda m: float(m.line()), b"G": lambda m: struct.unpack(">d", m.take(8))[0],
    b"S": _old_string, b"T": lambda m: m.counted("I").decode("latin1"), b"U": lambda m: m.counted("B").decode("latin1"),
    b"V": lambda m: _encodable(m.line().decode("raw-unicode-escape")), b"X": lambda m: _text(m.counted("I")),
    b"\x8c": lambda m: _text(m.counted("B")), b"\x8d": lambda m: _text(m.counted("Q")),
    b"B": lambda m: m.counted("I"), b"C": lambda m: m.counted("B"), b"\x8e": lambda m: m.counted("Q"),
    b"\x96": lambda m: m.counted("Q"),
    b")": lambda m: (), b"t": lambda m: tuple(m.since_mark()), b"\x85": lambda m: m.many(1),
    b"\x86": lambda m: m.many(2), b"\x87": lambda m: m.many(3),
    b"]": lambda m: [], b"l": lambda m: m.since_mark(), b"}": lambda m: {}, b"d": _pairs,
    b"\x8f": lambda m: [], b"\x91": lambda m: m.since_mark(),
    b"c": _global_line, b"\x93": _stack_global, b"i": _instance, b"o": _object,
    b"P": lambda m: m.persistent(_line_text(m)), b"Q": lambda m: m.persistent(m.stack.pop()),
    b"2": lambda m: m.stack[-1],
}  # fmt: skip

#: opcode -> what it does to the machine
_HANDLERS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": _proto, b"\x95": lambda m: m.take(8), b"0": lambda m: m.stack.pop(), b"1": lambda m: m.since_mark(),
    b"a": lambda m: m.extend([m.stack.pop()]), b"e": lambda m: m.extend(m.since_mark()),
    b"s": lambda m: m.put(list(m.many(2))), b"u": lambda m: m.put(m.since_mark()),
    b"\x90": lambda m: m.extend(m.since_mark()), b"b": _Machine.build,
    b"\x81": lambda m: m.create(*m.many(2)), b"\x92": _new_with_keywords,
    b"R": lambda m: m.stack.append(m.call(*m.many(2))),
    b"p": lambda m: m.remember(int(m.line())), b"q": lambda m: m.remember(m.number("B")),
    b"r": lambda m: m.remember(m.number("I")), b"\x94": lambda m: m.remember(len(m.memo)),
    b"g": lambda m: m.recall(int(m.line())), b"h": lambda m: m.recall(m.number("B")),
    b"j": lambda m: m.recall(m.number("I")),
}  # fmt: skip


def _pushing(push: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(push(machine))


_HANDLERS.update((code, _pushing(push)) for code, push in _PUSH.items())
