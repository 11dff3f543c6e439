"""Each operation of the layout algebra as an expression of torch, and a chain of them as statements.

A chain's state is a variable: one tensor, or a list of them; where placeholders make lists, tensors are nested lists.
`known` chains do the same to masks that say which elements anybody knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lineage.emit.module import Module
from lineage.layout.axes import LayoutError
from lineage.layout.operations import (
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

__all__ = ["DTYPES", "EXPRESSIONS", "State", "arithmetic", "chain"]

#: torch's words for the dtypes of the layout algebra
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip

Levels = tuple[str, ...]


class State:
    """What a chain's variable holds.

    Parameters
    ----------
    name : the variable, or an item of it
    entries : for each tensor of the chain's list the placeholders that it is a nested list over
    many : the variable is a list of the entries; otherwise it is the only one
    origins : for each entry the sources and the dtypes that decide its dtype
    """

    def __init__(self, name: str, entries: Sequence[Levels], *, many: bool, origins: Sequence[frozenset[Any]]) -> None:
        self.name, self.entries, self.many = name, list(entries), many
        #: False where the number of entries shows only at run time; `entries` then holds one for all
        self.counted = True
        self.origins = list(origins)

    def item(self, k: int) -> str:
        """The k-th entry."""
        return f"{self.name}[{k}]" if self.many else self.name

    @property
    def alike(self) -> bool:
        """Whether all entries are nested in one way."""
        return len(set(self.entries)) <= 1


class _Writer:
    """How operations become expressions.

    Parameters
    ----------
    module : the file
    known : masks are computed, not values
    wide : values are widened, so that a cast has to widen again
    """

    def __init__(self, module: Module, *, known: bool, wide: bool) -> None:
        self.module, self.known, self.wide = module, known, wide

    def __call__(self, op: Operation, x: str) -> str:
        """The expression for one tensor, or for the list that a gathering operation takes."""
        return EXPRESSIONS[op.word](op, x, self)


def _rearrange(op: Rearrange, x: str, to: _Writer) -> str:
    return to.module.rearranged(op, x)


def _alike(x: str, to: _Writer) -> str:
    return x if to.known else f"{to.module.use('_alike')}({x})"


def _concat(op: Concat, x: str, to: _Writer) -> str:
    return f"torch.cat({_alike(x, to)}, {op.axis})"


def _stack(op: Stack, x: str, to: _Writer) -> str:
    return f"torch.stack({_alike(x, to)}, {op.axis})"


def _split(op: Split, x: str, to: _Writer) -> str:
    if op.sizes is not None:
        return f"{x}.split({to.module.lengths(op.sizes)}, {op.axis})"
    return f"{x}.unflatten({op.axis}, ({op.parts}, -1)).unbind({op.axis if op.axis >= 0 else op.axis - 1})"


def _unstack(op: Unstack, x: str, to: _Writer) -> str:
    return f"{x}.unbind({op.axis})"


def _slice(op: Slice, x: str, to: _Writer) -> str:
    more = "" if op.stop is None else f", {op.stop}"
    return f"{to.module.use('_sliced')}({x}, {op.axis}, {op.start}{more}{_of(op.of)})"


def _take(op: Take, x: str, to: _Writer) -> str:
    places = to.module.places(op.index, op.places)
    return f"{to.module.use('_taken')}({x}, {op.axis}, {places}{_of(op.of)})"


def _of(length: int | None) -> str:
    return "" if length is None else f", of={length}"


def _pad(op: Pad, x: str, to: _Writer) -> str:
    value = op.value is not None if to.known else op.value or 0
    return f"{to.module.use('_padded')}({x}, {op.axis}, {op.before}, {op.after}, {value!r})"


def _constant(sign: str) -> Callable[[Scale | Add, str, _Writer], str]:
    def write(op: Scale | Add, x: str, to: _Writer) -> str:
        if to.known:
            return x
        if isinstance(op.by, Data):
            text = f"{sign} {to.module.use('_along')}({to.module.vector(op.by)}, {x}, {op.axis})"
        else:
            text = f"- {-op.by!r}" if sign == "+" and op.by < 0 else f"{sign} {op.by!r}"
        return f"{to.module.use('_back')}({x}.double() {text}, {x}.dtype)"

    return write


def _cast(op: Cast, x: str, to: _Writer) -> str:
    if to.known:
        return x
    text = f"{to.module.use('_cast')}({x}, torch.{DTYPES[op.to]})"
    return f"{to.module.use('_wide')}({text})" if to.wide else text


def _matmul(op: Matmul, x: str, to: _Writer) -> str:
    if to.known:
        rows, columns = op.matrix.array.shape
        shape = f"({rows}, *{x}.shape[1:])" if op.side == "left" else f"(*{x}.shape[:-1], {columns})"
        # every element is a sum over an axis: one unknown place spoils it
        return f"{x}.all().expand({shape})"
    return f'{to.module.use("_product")}({to.module.vector(op.matrix)}, {x}, "{op.side}")'


#: the expression of every operation; `each` is a chain of its own
EXPRESSIONS: dict[str, Callable[[Any, str, _Writer], str]] = {
    "rearrange": _rearrange,
    "concat": _concat,
    "split": _split,
    "slice": _slice,
    "stack": _stack,
    "unstack": _unstack,
    "take": _take,
    "pad": _pad,
    "scale": _constant("*"),
    "add": _constant("+"),
    "cast": _cast,
    "matmul": _matmul,
}


def arithmetic(ops: Sequence[Operation]) -> bool:
    """Whether some operation computes with the values, so that short floats are widened first."""
    inner = [step for op in ops if isinstance(op, Each) for _, steps in op.chains for step in steps]
    return any(isinstance(op, Scale | Add | Matmul) for op in ops) or (bool(inner) and arithmetic(inner))


def chain(ops: Sequence[Operation], state: State, module: Module, *, known: bool, wide: bool) -> list[str]:
    """Statements that run the chain; `state` is then what they leave.

    Raises
    ------
    LayoutError : an operation does not fit what the steps before it give
    """
    to = _Writer(module, known=known, wide=wide)
    lines: list[str] = []
    for op in ops:
        if isinstance(op, Each):
            lines += _each(op, state, module, known=known, wide=wide)
        elif op.over is not None:
            lines += _over(op, state, to)
        elif op.single:
            lines += _mapped(state, lambda x, levels, op=op: _nested(to, op, x, levels))  # type: ignore[misc]
        elif op.gathers:
            lines += _joined(op, state, to)
        else:
            lines += _cut(op, state, to)
        if isinstance(op, Cast):
            state.origins = [frozenset([op.to])] * len(state.origins)
    return lines


def _each(op: Each, state: State, module: Module, *, known: bool, wide: bool) -> list[str]:
    lines: list[str] = []
    for k, inner in op.chains:
        place = k if state.counted else 0
        if place >= len(state.entries):
            raise LayoutError(f"each: no array {k} in a list of {len(state.entries)}")
        one = State(state.item(k), [state.entries[place]], many=False, origins=[state.origins[place]])
        lines += chain(inner, one, module, known=known, wide=wide)
        if one.many:
            raise LayoutError(f"each: the operations for array {k} do not give one array")
        if state.counted:
            state.entries[k], state.origins[k] = one.entries[0], one.origins[0]
        elif one.entries != state.entries:
            raise LayoutError("each: cannot be written for a list of unknown length")
    return lines


def _mapped(state: State, write: Callable[[str, Levels], str]) -> list[str]:
    """One expression for every entry."""
    if not state.many:
        return _set(state.name, write(state.name, state.entries[0]))
    if state.alike and len(state.entries):
        text = write("w", state.entries[0])
        return [] if text == "w" else [f"{state.name} = [{text} for w in {state.name}]"]
    items = [(state.item(k), levels) for k, levels in enumerate(state.entries)]
    return [line for x, levels in items for line in _set(x, write(x, levels))]


def _set(name: str, text: str) -> list[str]:
    return [] if text == name else [f"{name} = {text}"]


def _variable(depth: int) -> str:
    return f"w{depth}"


def _nested(to: _Writer, op: Operation, x: str, levels: Levels) -> str:
    """The operation on every tensor of a nested list."""
    if not levels:
        return to(op, x)
    w = _variable(len(levels))
    text = _nested(to, op, w, levels[1:])
    return x if text == w else f"[{text} for {w} in {x}]"


def _over(op: Operation, state: State, to: _Writer) -> list[str]:
    """An operation that collapses the lists over a placeholder, or makes them."""
    over = op.over or ""
    if op.gathers:
        if not any(over in levels for levels in state.entries):
            raise LayoutError(f"{op.word}: no list over {over} here")
        lines = _mapped(state, lambda x, levels: _gathered(to, op, x, levels, over))
        state.entries = [tuple(n for n in levels if n != over) for levels in state.entries]
        return lines
    if any(over in levels for levels in state.entries):
        raise LayoutError(f"{op.word}: there is a list over {over} already")
    lines = _mapped(state, lambda x, levels: _nested(to, op, x, levels))
    state.entries = [(*levels, over) for levels in state.entries]
    return lines


def _gathered(to: _Writer, op: Operation, x: str, levels: Levels, over: str) -> str:
    if over not in levels:
        return x
    if levels[0] == over:
        return _collapsed(to, op, x, levels[1:])
    w = _variable(len(levels))
    return f"[{_gathered(to, op, w, levels[1:], over)} for {w} in {x}]"


def _collapsed(to: _Writer, op: Operation, x: str, inner: Levels) -> str:
    """The outermost list put together, once for each place of the lists inside."""
    if not inner:
        return to(op, x)
    w = _variable(len(inner))
    return f"[{_collapsed(to, op, w, inner[1:])} for {w} in zip(*{x}, strict=True)]"


def _joined(op: Operation, state: State, to: _Writer) -> list[str]:
    """All entries put together."""
    if state.alike:
        levels = state.entries[0]
        text = _collapsed(to, op, state.name if state.many else f"[{state.name}]", levels)
    else:
        text, levels = _mixed(to, op, [(state.item(k), entry) for k, entry in enumerate(state.entries)])
    origins = frozenset[Any]().union(*state.origins)
    state.entries, state.origins, state.many, state.counted = [levels], [origins], False, True
    return [f"{state.name} = {text}"]


def _mixed(to: _Writer, op: Operation, entries: list[tuple[str, Levels]]) -> tuple[str, Levels]:
    """Entries nested in different ways: what is no list over a placeholder stands in every place of it."""
    first = next((levels for _, levels in entries if levels), None)
    if first is None:
        return to(op, f"[{', '.join(x for x, _ in entries)}]"), ()
    spread = [k for k, (_, levels) in enumerate(entries) if levels[:1] == first[:1]]
    depth = sum(len(levels) for _, levels in entries)
    inside = list(entries)
    for k in spread:
        inside[k] = (f"w{depth}_{k}", entries[k][1][1:])
    text, levels = _mixed(to, op, inside)
    names, lists = (", ".join(e[k][0] for k in spread) for e in (inside, entries))
    source = f"{names} in {lists}" if len(spread) == 1 else f"{names} in zip({lists}, strict=True)"
    return f"[{text} for {source}]", (first[0], *levels)


def _cut(op: Operation, state: State, to: _Writer) -> list[str]:
    """One entry taken apart into the chain's list."""
    if state.counted and len(state.entries) != 1:
        raise LayoutError(f"{op.word}: takes one array, the list holds {len(state.entries)}")
    if not state.counted:
        raise LayoutError(f"{op.word}: takes one array; how many there are shows only in the tensors")
    levels, origin = state.entries[0], state.origins[0]
    text = _columns(to, op, state.item(0), levels)
    count = op.arity(1)
    state.many, state.counted = True, count is not None
    state.entries, state.origins = [levels] * (count or 1), [origin] * (count or 1)
    return [f"{state.name} = list({text})"]


def _columns(to: _Writer, op: Operation, x: str, levels: Levels) -> str:
    if not levels:
        return to(op, x)
    w = _variable(len(levels))
    return f"zip(*[{_columns(to, op, w, levels[1:])} for {w} in {x}], strict=True)"
