"""The YAML document of a mapping: read with every mistake named, written short, round trip exact.

Arrays too long for a line sit in a `.safetensors` file beside the YAML; `read_mapping` and `write_mapping` handle
both files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import msgspec
from numpy.typing import NDArray

from lineage.checkpoint.dtypes import STORAGE
from lineage.errors import InputError, nearest
from lineage.layout.arguments import Context, parse_operations, unknown
from lineage.layout.axes import LayoutError
from lineage.layout.mapping import Evidence, How, Mapping, Rule, Side
from lineage.layout.names import parse_where
from lineage.layout.operations import Concat, Each, Operation, Split, Stack, Unstack
from lineage.layout.templates import parse_template
from lineage.layout.yamltext import MOST_BYTES, flow, load, scalar

__all__ = [
    "VERSION",
    "beside_of",
    "document_of",
    "dump_mapping",
    "mapping_data",
    "parse_mapping",
    "read_mapping",
    "write_arrays",
    "write_mapping",
]

#: the version of the document that this program reads and writes
VERSION = 1
#: longest line that a list of names may make
LINE = 120
#: what the file of a mapping's arrays says of itself
ARRAYS = {"format": "lineage-mapping"}
_LISTS = (Concat, Split, Stack, Unstack)

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class _Rule(msgspec.Struct, forbid_unknown_fields=True):
    """A rule as the file has it."""

    to: str | list[str]
    source: str | list[str] = msgspec.field(name="from")
    ops: Any = []
    how: How = "given"
    evidence: Evidence | None = None
    where: dict[str, int | str | list[int]] | None = None
    table: dict[str, list[int]] | None = None


class _Unmatched(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names that no rule speaks of."""

    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()


class _Document(msgspec.Struct, forbid_unknown_fields=True):
    """The file as a whole."""

    version: int = msgspec.field(name="lineage-mapping")
    rules: list[_Rule]
    source: Side = Side()
    target: Side = Side()
    sizes: dict[str, int] = {}
    unmatched: _Unmatched = _Unmatched()
    data: str | None = None
    pair: str | list[str] = []


def read_mapping(path: str | os.PathLike[str]) -> Mapping:
    """The mapping in a file.

    Raises
    ------
    InputError : the file cannot be read, is no mapping, or a place in it is wrong; the message names file and place
    """
    file = Path(path)
    try:
        if file.stat().st_size > MOST_BYTES:
            raise InputError(file, f"{file.stat().st_size >> 20} MB, a mapping has at most {MOST_BYTES >> 20}")
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as exc:
        raise InputError(file, (exc.strerror or str(exc)).lower()) from exc
    except UnicodeDecodeError as exc:
        raise InputError(file, "this is no UTF-8 text, so no mapping") from exc
    try:
        return parse_mapping(text, lambda name, key: _beside(file, name, key))
    except LayoutError as exc:
        raise InputError(file, str(exc)) from exc


def parse_mapping(text: str, array: Callable[[str | None, str], NDArray[Any]] | None = None) -> Mapping:
    """The mapping that a YAML text spells.

    Parameters
    ----------
    array : gives the array of a key in the file of a name (None: the one beside the mapping)

    Raises
    ------
    LayoutError : with the place inside the document
    """
    raw = load(text)
    if not isinstance(raw, dict):
        raise LayoutError(f"a mapping is a dictionary, this is {'a list' if isinstance(raw, list) else 'one word'}")
    version = raw.get("lineage-mapping")
    if "lineage-mapping" not in raw:
        raise LayoutError("this is no mapping: the key lineage-mapping is missing")
    if version != VERSION or isinstance(version, bool):
        raise LayoutError(f"lineage-mapping: version {str(version)[:20]}; this program reads version {VERSION}")
    _check_words(raw)
    try:
        document = msgspec.convert(raw, _Document)
    except msgspec.ValidationError as exc:
        raise LayoutError(_complaint(exc)) from exc
    for name, length in document.sizes.items():
        if not _NAME.fullmatch(name) or not 0 <= length < 1 << 62:
            raise LayoutError(f"sizes.{name}: a size is a name and a length of 0 or more")

    def found(key: str) -> NDArray[Any]:
        if array is None:
            raise LayoutError(f"no file with the array {key}")
        return array(document.data, key)

    context = Context(document.sizes, found)
    return Mapping(
        source=document.source,
        target=document.target,
        sizes=document.sizes,
        rules=tuple(_rule(rule, f"rules[{k}]", context) for k, rule in enumerate(document.rules)),
        unmatched_source=tuple(document.unmatched.source),
        unmatched_target=tuple(document.unmatched.target),
        pair=(document.pair,) if isinstance(document.pair, str) else tuple(document.pair),
    )


def _rule(raw: _Rule, place: str, context: Context) -> Rule:
    """A rule, its templates and chain parsed."""
    to, source = (tuple([side] if isinstance(side, str) else side) for side in (raw.to, raw.source))
    for key, side in (("to", to), ("from", source)):
        if not side:
            raise LayoutError(f"{place}.{key}: at least one name is needed")
        for k, template in enumerate(side):
            try:
                parse_template(template)
            except LayoutError as exc:
                raise LayoutError(f"{place}.{key}[{k}]: {exc}") from exc
    where = {}
    for name, values in (raw.where or {}).items():
        where[name] = ",".join(map(str, values)) if isinstance(values, list) else str(values)
        try:
            parse_where(where[name])
        except LayoutError as exc:
            raise LayoutError(f"{place}.where.{name}: {exc}") from exc
    placeholders = {n for t in (*to, *source) for n in parse_template(t).placeholders}
    for key, given in (("where", raw.where), ("table", raw.table)):
        for name in given or {}:
            if name not in placeholders:
                raise LayoutError(f"{place}.{key}: {unknown(name, placeholders, 'placeholder')}")
    table = {name: tuple(column) for name, column in (raw.table or {}).items()}
    if len({len(column) for column in table.values()}) > 1:
        raise LayoutError(f"{place}.table: its columns have different lengths")
    ops = parse_operations([] if raw.ops is None else raw.ops, f"{place}.ops", context)
    ops = _completed(ops, to, source, [*table], place)
    count: int | None = len(source)
    for op in ops:
        count = op.arity(count)
    if count is not None and count != len(to):
        raise LayoutError(f"{place}: the operations give {count} arrays for {len(to)} targets")
    return Rule(
        to=to, source=source, ops=ops, how=raw.how, evidence=raw.evidence, where=where or None, table=table or None
    )


def _completed(
    ops: tuple[Operation, ...], to: tuple[str, ...], source: tuple[str, ...], bound: list[str], place: str
) -> tuple[Operation, ...]:
    """The chain with `over` filled in where it can mean one placeholder only, and every placeholder accounted for."""
    made, read = (dict.fromkeys(n for t in side for n in parse_template(t).placeholders) for side in (to, source))
    named = [op.over for op in _every(ops) if op.over]
    for over in named:
        if over not in made and over not in read:
            raise LayoutError(f"{place}.ops: over: {unknown(over, [*made, *read], 'placeholder')}")
    for gathers, mine, other, key in ((True, read, made, "from"), (False, made, read, "to")):
        lists = [n for n in mine if n not in other and n not in bound and n not in named]
        open_ops = [op for op in ops if isinstance(op, _LISTS) and op.gathers == gathers and op.over is None]
        if lists and (len(lists) > 1 or len(open_ops) != 1 or len(source if gathers else to) > 1):
            word = "stack" if gathers else "unstack"
            raise LayoutError(
                f"{place}: {{{lists[0]}}} stands only in {key}; say what the list over it is for, "
                f"such as {{{word}: {{axis: 0, over: {lists[0]}}}}}"
            )
        if lists:
            ops = tuple(replace(op, over=lists[0]) if op is open_ops[0] else op for op in ops)
    return ops


def _every(ops: Iterable[Operation]) -> Iterator[Operation]:
    """All operations, those inside `each` too."""
    for op in ops:
        if isinstance(op, Each):
            for _, chain in op.chains:
                yield from _every(chain)
        else:
            yield op


def _check_words(raw: dict[Any, Any]) -> None:
    """Keys that no such document has, with the one that was meant."""
    parts: list[tuple[str, Any, Any]] = [("", raw, _Document)]
    parts += [(side, raw.get(side), Side) for side in ("source", "target")]
    parts.append(("unmatched", raw.get("unmatched"), _Unmatched))
    rules = raw.get("rules")
    for k, rule in enumerate(rules if isinstance(rules, list) else []):
        parts.append((f"rules[{k}]", rule, _Rule))
        if isinstance(rule, dict):
            parts.append((f"rules[{k}].evidence", rule.get("evidence"), Evidence))
    for place, value, kind in parts:
        words = kind.__struct_encode_fields__
        for key in value if isinstance(value, dict) else ():
            if key not in words:
                raise LayoutError(f"{place}: " * bool(place) + unknown(str(key), words, "key"))


def _complaint(exc: msgspec.ValidationError) -> str:
    """msgspec's message with the place first."""
    text, _, place = str(exc).partition(" - at `$")
    place = place.rstrip("`").removeprefix(".")
    missing = re.fullmatch(r"Object missing required field `(.*)`", text)
    if missing:
        text = f'the key "{missing[1]}" is missing'
    word = re.fullmatch(r"Invalid enum value '(.*)'", text)
    if word:
        meant = nearest(word[1], get_args(How))
        text = f'no word "{word[1]}"' + (f'; did you mean "{meant}"?' if meant else "")
    else:
        for theirs, ours in (("`", ""), ("Expected", "expected"), ("object", "dictionary"), ("array", "list")):
            text = text.replace(theirs, ours)
    return (f"{place}: " if place else "") + text


def _beside(mapping: Path, name: str | None, key: str) -> NDArray[Any]:
    """An array of the file beside the mapping; never of one in another folder."""
    name = name if name is not None else f"{mapping.stem}.safetensors"
    if os.path.basename(name) != name or "/" in name or "\\" in name or not name.endswith(".safetensors"):
        raise LayoutError(f'data: "{name[:80]}" is no .safetensors file beside the mapping')
    # imported here: this is the only thing that the algebra reads from a weight file
    from lineage.checkpoint import open_checkpoint

    path = mapping.parent / name
    if not path.is_file():
        raise LayoutError(f"the array {key[:80]} should be in {name}, which is not beside the mapping")
    with open_checkpoint(path) as arrays:
        if key not in arrays.specs:
            raise LayoutError(f"{name}: {unknown(key, arrays.specs, 'array')}")
        return arrays.tensor(key)


def mapping_data(mapping: Mapping) -> dict[str, NDArray[Any]]:
    """Arrays too long for the text, by the names that the text gives them."""
    data: dict[str, NDArray[Any]] = {}
    for rule in mapping.rules:
        for op in rule.ops:
            op.document(data)
    return data


def document_of(mapping: Mapping, *, data: str | None = None) -> dict[str, Any]:
    """The mapping as plain data, with the keys of the file.

    Parameters
    ----------
    data : name of the file with its long arrays, where that is not the document's own name with `.safetensors`
    """
    result: dict[str, Any] = {
        "lineage-mapping": VERSION,
        "source": msgspec.structs.asdict(mapping.source),
        "target": msgspec.structs.asdict(mapping.target),
        "sizes": mapping.sizes,
    }
    if data is not None:
        result["data"] = data
    result["rules"] = [_rule_data(rule) for rule in mapping.rules]
    result["unmatched"] = {"source": list(mapping.unmatched_source), "target": list(mapping.unmatched_target)}
    return result


def dump_mapping(mapping: Mapping, *, data: str | None = None) -> str:
    """The mapping as YAML text.

    Parameters
    ----------
    data : name of the file with its long arrays, where that is not the text's own name with `.safetensors`

    Examples
    --------
    >>> print(dump_mapping(Mapping(rules=(Rule(to=("b.{i}",), source=("a.{i}",)),))))
    lineage-mapping: 1
    source: {name: "", tensors: 0}
    target: {name: "", tensors: 0}
    sizes: {}
    rules:
      - to: b.{i}
        from: a.{i}
        ops: []
        how: given
    unmatched: {source: [], target: []}
    <BLANKLINE>
    """
    sides = [flow({"name": side.name, "tensors": side.tensors}) for side in (mapping.source, mapping.target)]
    lines = [f"lineage-mapping: {VERSION}", f"source: {sides[0]}", f"target: {sides[1]}"]
    if mapping.pair:
        lines.append(f"pair: {scalar(mapping.pair[0]) if len(mapping.pair) == 1 else flow(mapping.pair)}")
    lines.append(f"sizes: {flow(mapping.sizes)}")
    if data is not None:
        lines.append(f"data: {scalar(data)}")
    lines.append("rules:" if mapping.rules else "rules: []")
    for rule in mapping.rules:
        lines += _rule_lines(rule)
    lists = (("source", mapping.unmatched_source), ("target", mapping.unmatched_target))
    short = f"unmatched: {flow(dict(lists))}"
    if len(short) <= LINE:
        lines.append(short)
    else:
        lines.append("unmatched:")
        for key, names in lists:
            lines += [f"  {key}:", *(f"    - {scalar(n)}" for n in names)] if names else [f"  {key}: []"]
    return "\n".join(lines) + "\n"


def _rule_data(rule: Rule) -> dict[str, Any]:
    """A rule as plain data; a side of one name is that name."""
    sides = {key: side[0] if len(side) == 1 else list(side) for key, side in (("to", rule.to), ("from", rule.source))}
    result: dict[str, Any] = {**sides, "ops": [op.document({}) for op in rule.ops], "how": rule.how}
    if rule.where:
        result["where"] = rule.where
    if rule.table:
        result["table"] = {name: list(column) for name, column in rule.table.items()}
    if rule.evidence is not None:
        result["evidence"] = {k: v for k, v in msgspec.structs.asdict(rule.evidence).items() if v is not None}
    return result


def _rule_lines(rule: Rule) -> Iterable[str]:
    lines = [*_names("to", rule.to), *_names("from", rule.source)]
    data = _rule_data(rule)
    lines += [f"{key}: {flow(data[key])}" for key in ("ops", "how", "where", "table", "evidence") if key in data]
    return [("  - " if k == 0 else "    ") + line for k, line in enumerate(lines)]


def _names(key: str, names: tuple[str, ...]) -> list[str]:
    """One name, a short list on a line, or a line for each."""
    if len(names) == 1:
        return [f"{key}: {scalar(names[0])}"]
    line = f"{key}: {flow(names)}"
    return [line] if len(line) <= LINE else [f"{key}:", *(f"  - {scalar(name)}" for name in names)]


def write_mapping(
    mapping: Mapping, path: str | os.PathLike[str], *, inputs: Iterable[str | os.PathLike[str]] = ()
) -> None:
    """Writes the YAML file and, where there are long arrays, the `.safetensors` file beside it.

    Raises
    ------
    InputError : the output is an input or cannot be written; nothing is left of it
    """
    from lineage.checkpoint.write import atomic

    file, inputs = Path(path), list(inputs)
    data = mapping_data(mapping)
    beside = beside_of(file.parent, file.stem)
    named = beside.name if data and beside.stem != file.stem else None
    with atomic(file, inputs=inputs) as part:
        part.write_text(dump_mapping(mapping, data=named), encoding="utf-8")
        write_arrays(data, beside, inputs=inputs)


def beside_of(folder: Path, stem: str) -> Path:
    """Where the long arrays of a file go: under this name, unless a model has it already."""
    beside = folder / f"{stem}.safetensors"
    return folder / f"{stem}.arrays.safetensors" if beside.exists() and not _ours(beside) else beside


def write_arrays(data: dict[str, NDArray[Any]], path: Path, *, inputs: Iterable[str | os.PathLike[str]] = ()) -> None:
    """Writes the arrays that a text names, where there are any.

    Raises
    ------
    InputError : the output is an input or cannot be written
    """
    from lineage.checkpoint.write import write_safetensors

    words = {storage.str: word for word, storage in STORAGE.items() if word in ("I64", "F64")}
    entries = [(key, words[array.dtype.str], array.shape) for key, array in data.items()]
    if data:
        write_safetensors(path, entries, data.__getitem__, metadata=ARRAYS, inputs=inputs)


def _ours(path: Path) -> bool:
    """Whether the file holds the arrays of a mapping, so that it may be replaced."""
    from lineage.checkpoint import open_checkpoint

    try:
        with open_checkpoint(path) as arrays:
            return dict(arrays.metadata) == ARRAYS
    except InputError:
        return False
