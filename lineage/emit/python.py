"""A mapping as a Python file: `convert(state_dict)` and, where rules can be undone, `revert(state_dict)`.

The file needs torch alone and does what `lineage apply` does, bit for bit (a `matmul` up to the rounding of float64
sums). It is laid out as ruff formats it, and nothing that stands in the mapping can become code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from typing import Any

from lineage.emit.bindings import Loops
from lineage.emit.emitted import Emitted
from lineage.emit.module import Module
from lineage.emit.source import WIDTH, Group, assignment, comment, number, quoted, string, template, whole
from lineage.emit.steps import DTYPES, State, arithmetic, chain
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.mapping import Mapping, Rule
from lineage.layout.operations import Each, Operation
from lineage.layout.templates import Template

__all__ = ["emit_python"]

#: longest name of a checkpoint that the file's docstring repeats
_LONGEST_NAME = 60


def emit_python(mapping: Mapping, *, name: str, beside: str, shapes: Dict[str, Shape] | None = None) -> Emitted:
    """The file for a mapping.

    Parameters
    ----------
    name : of the mapping, for the docstring
    beside : name of the file with the arrays that are too long for code
    shapes : not needed: the code finds the tensors by their names

    Raises
    ------
    LayoutError : a rule leaves a length open, or its numbers do not tell its placeholders apart; with its place
    """
    del shapes
    module = Module(mapping.sizes)
    forward: dict[int, list[str]] = {}
    back: dict[int, list[str]] = {}
    unsaid: list[str] = []
    shared = _Shared(mapping.rules)
    for k, rule in enumerate(mapping.rules):
        try:
            forward[k] = _rule(rule, k, module, shared)
        except LayoutError as exc:
            raise LayoutError(f"rules[{k}]: {exc}") from exc
    undone: dict[int, Rule] = {}
    for k, rule in enumerate(mapping.rules):
        try:
            undone[k] = rule.inverse()
        except LayoutError as exc:
            unsaid.append(f"revert leaves out rules[{k}]: {exc}")
    shared_back = _Shared(list(undone.values()))
    for k, rule in undone.items():
        try:
            back[k] = _rule(rule, k, module, shared_back)
        except LayoutError as exc:
            unsaid.append(f"revert leaves out rules[{k}]: {exc}")
    functions = [_function("convert", forward, module, shared, "The target's tensors, made of the source's.")]
    if back:
        functions.append(_function("revert", back, module, shared_back, "The source's tensors, made of the target's."))
    for lines in functions:
        if any("arrays[" in line for line in lines):
            lines.insert(2, f"    arrays = _arrays({string(beside)})")
    bodies = [*functions, *module.functions()]
    code = "\n\n\n".join("\n".join(lines) for lines in bodies)
    constants = "\n".join(module.head())
    imports = "\n".join(module.imports(f"{constants}\n{code}"))
    told = "\n".join(line for text in unsaid for line in comment(text))
    docstring = _docstring(mapping, name, bool(back), beside if module.arrays else None)
    parts = [docstring, imports]
    parts += [part for part in (told, constants) if part]
    text = "\n\n".join(parts) + "\n\n\n" + code + "\n"
    if any(len(line) > WIDTH for line in text.splitlines()):
        # names too long for a line cannot be laid out
        text = "# ruff: noqa: E501\n# fmt: off\n" + text
    return Emitted(text=text, arrays=module.arrays, unsaid=tuple(unsaid))


def _docstring(mapping: Mapping, name: str, both: bool, beside: str | None) -> str:
    """What the file is and how it is used."""
    sides = [quoted(side.name[:_LONGEST_NAME]) or kind for side, kind in
             ((mapping.source, "the source"), (mapping.target, "the target"))]  # fmt: skip
    lines = [
        f"Tensors of {sides[1]} made of those of {sides[0]}.",
        "",
        f"Written by lineage from {quoted(name[:_LONGEST_NAME])}, {len(mapping.rules):,} rules. On files:",
        "",
        "    from safetensors.torch import load_file, save_file",
        "",
        '    save_file(convert(load_file("a.safetensors")), "b.safetensors")',
    ]
    lines += ['    save_file(revert(load_file("b.safetensors")), "a.safetensors")'] if both else []
    lines += ["", "Tensors that no rule speaks of are left out; inputs stay as they are."]
    lines += [f"Long arrays are read from {quoted(beside)} in the same folder."] if beside else []
    return '"""' + "\n".join(line.rstrip() for line in lines) + '\n"""'


def _function(name: str, rules: dict[int, list[str]], module: Module, shared: _Shared, says: str) -> list[str]:
    """Lines of `convert` or `revert`."""
    lines = [f"def {name}(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:", f'    """{says}"""']
    lines.append("    out: dict[str, Tensor] = {}")
    if shared.partial:
        lines.append("    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}")
    for body in rules.values():
        lines += body
    if shared.partial:
        lines.append(f"    {module.use('_unite')}(out, parts)")
    return [*lines, "    return out"]


class _Shared:
    """Which names several rules give or read.

    Parameters
    ----------
    rules : all of one direction
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        pairs = [rule.templates for rule in rules]
        self.made = Counter(t.skeleton for targets, _ in pairs for t in targets)
        self.read = Counter(t.skeleton for _, sources in pairs for t in sources)
        self.partial = any(_partial(rule.ops) for rule in rules)


def _partial(ops: tuple[Operation, ...]) -> bool:
    """Whether some element may be one that nobody knows."""
    return any(any(_partial(inner) for _, inner in op.chains) if isinstance(op, Each) else op.partial for op in ops)


def _rule(rule: Rule, place: int, module: Module, shared: _Shared) -> list[str]:
    """Statements for one rule."""
    loops = Loops(rule, module)
    sources, targets = loops.sources, loops.targets
    wide, partial = arithmetic(rule.ops), _partial(rule.ops)
    levels = [tuple(n for n in t.placeholders if n in loops.lists) for t in sources]
    many = len(sources) > 1
    variables = [("x", False), *([("m", True)] if partial else [])]
    states: list[State] = []
    _gather(loops, levels, many=many)
    if wide:
        _widen(loops, levels, many=many, module=module)
    if partial:
        loops.add(f"m = {_masks(levels, many=many)}")
    for name, known in variables:
        origins = [frozenset([k]) for k in range(len(sources))]
        state = State(name, levels, many=many, origins=origins)
        for line in chain(rule.ops, state, module, known=known, wide=wide):
            loops.add(line)
        if not state.counted:
            loops.add(f"{name} = {module.use('_counted')}({name}, {len(targets)})")
            state.entries, state.origins = state.entries * len(targets), state.origins * len(targets)
        if len(state.entries) != len(targets):
            raise LayoutError(f"the operations give {len(state.entries)} arrays for {len(targets)} targets")
        states.append(state)
    for k, target in enumerate(targets):
        _give(loops, target, k, states, module, shared)
    return [*comment(f"rules[{place}], {_found(rule)}", 4), *loops.lines]


def _found(rule: Rule) -> str:
    """How the rule was found, in a word or two."""
    certified = rule.evidence is not None and rule.evidence.certified
    return "given" if rule.how == "given" else f"found by {rule.how}{', certified' if certified else ''}"


def _gather(loops: Loops, levels: list[tuple[str, ...]], *, many: bool) -> None:
    """The source tensors as the chain's variable."""
    names = [template(t, loops.names) for t in loops.sources]
    texts: list[str | Group] = []
    for name, over in zip(names, levels, strict=True):
        text = f"state_dict[{name}]"
        for placeholder in reversed(over):
            text = f"[{text} for {loops.names[placeholder]} in {loops.values[placeholder]}]"
        texts.append(text)
    if many and loops.listed:
        loops.add("x = [state_dict[name] for name in names]")
    elif many:
        loops.add(Group("x = [", tuple(texts), "]"))
    elif any(levels) or len(f"x = {texts[0]}") + loops.indent <= WIDTH:
        loops.add(f"x = {texts[0]}")
    else:
        loops.lines += assignment(loops.indent, "name", names[0])
        loops.add("x = state_dict[name]")


def _leaves(x: str, levels: tuple[str, ...], write: str) -> str:
    """An expression with `write` for every tensor of a nested list; `{}` in it is the tensor."""
    if not levels:
        return write.format(x)
    w = f"w{len(levels)}"
    return f"[{_leaves(w, levels[1:], write)} for {w} in {x}]"


def _per_entry(levels: list[tuple[str, ...]], write: str, *, many: bool, x: str = "x") -> str:
    """An expression with `write` for every tensor of the chain's variable."""
    if not many:
        return _leaves(x, levels[0], write)
    if len(set(levels)) == 1:
        return f"[{_leaves('w', levels[0], write)} for w in {x}]"
    return f"[{', '.join(_leaves(f'{x}[{k}]', over, write) for k, over in enumerate(levels))}]"


def _widen(loops: Loops, levels: list[tuple[str, ...]], *, many: bool, module: Module) -> None:
    """The dtypes of the sources kept, and short floats widened."""
    if not any(levels):
        loops.add("dtypes = [w.dtype for w in x]" if many else "dtypes = [x.dtype]")
    else:
        helper = module.use("_common")
        dtypes = []
        for k, over in enumerate(levels):
            x = f"x[{k}]" if many else "x"
            dtypes.append(f"{helper}({_flat(x, over)})" if over else f"{x}.dtype")
        loops.add(Group("dtypes = [", tuple(dtypes), "]"))
    loops.add(f"x = {_per_entry(levels, module.use('_wide') + '({})', many=many)}")


def _flat(x: str, levels: tuple[str, ...]) -> str:
    """The dtypes of all tensors of a nested list."""
    loops = " ".join(f"for w{k + 1} in {x if k == 0 else f'w{k}'}" for k in range(len(levels)))
    return f"w{len(levels)}.dtype {loops}"


def _masks(levels: list[tuple[str, ...]], *, many: bool) -> str:
    return _per_entry(levels, "torch.ones_like({}, dtype=torch.bool)", many=many)


def _give(loops: Loops, target: Template, k: int, states: list[State], module: Module, shared: _Shared) -> None:
    """One target's statements."""
    indent, rule = loops.indent, loops.rule
    values = [state.item(k) for state in states]
    levels = states[0].entries[k]
    given = loops.where
    for depth, placeholder in enumerate(levels):
        if placeholder not in target.placeholders:
            raise LayoutError(f"the list over {placeholder} is not put together; add an operation over it")
        items = [f"v{depth}", f"u{depth}"][: len(values)]
        listed = whole(given[placeholder]) if placeholder in given else ""
        counted = listed if isinstance(listed, str) else module.constant("WHERE", listed)
        variable = loops.names[placeholder]
        if counted:
            loops.begin(f"for {', '.join([variable, *items])} in zip({', '.join([counted, *values])}, strict=True)")
        elif len(values) == 1:
            loops.begin(f"for {variable}, {items[0]} in enumerate({values[0]})")
        else:
            loops.begin(f"for {variable}, ({', '.join(items)}) in enumerate(zip({', '.join(values)}, strict=True))")
        values = items
    missing = [n for n in target.placeholders if n not in levels and n not in loops.kept]
    if missing:
        raise LayoutError(f"{target}: nothing says which values {missing[0]} takes; add an operation over it")
    _guard(loops, target)
    value = values[0]
    if arithmetic(rule.ops):
        dtype = _dtype(states[0].origins[k], len(loops.sources), module)
        value = f"{module.use('_cast')}({value}, {dtype})"
    if rule.ops or shared.read[loops.sources[0].skeleton] > 1:
        value = f"{module.use('_own')}({value})"
    name = template(target, loops.names)
    if len(states) > 1:
        loops.lines += assignment(loops.indent, "name", name)
        loops.add(f"parts.setdefault(name, []).append(({value}, {values[1]}))")
    elif shared.made[target.skeleton] > 1:
        # what several rules give is taken from the first
        loops.lines += assignment(loops.indent, "name", name)
        loops.add(f"out.setdefault(name, {value})")
    elif len(f"out[{name}] = {value}") + loops.indent <= WIDTH:
        loops.add(f"out[{name}] = {value}")
    else:
        loops.lines += assignment(loops.indent, "name", name)
        loops.add(f"out[name] = {value}")
    loops.indent = indent


def _guard(loops: Loops, target: Template) -> None:
    """A number in a name is never negative."""
    for value in target.numbers:
        if value.constant < 0 or any(factor < 0 for _, factor in value.terms):
            text = number(value, loops.names)
            loops.add(f"if {text} < 0:")
            loops.add(f'    raise ValueError(f"a number in a name would be {{{text}}}")')


def _dtype(origins: frozenset[Any], sources: int, module: Module) -> str:
    """The dtype of a result, as an expression."""
    words = sorted(DTYPES[o] for o in origins if isinstance(o, str))
    places = sorted(o for o in origins if not isinstance(o, str))
    parts = [f"torch.{word}" for word in words]
    if len(places) == sources > 1 and not words:
        return f"{module.use('_common')}(dtypes)"
    parts += [f"dtypes[{k}]" for k in places]
    return parts[0] if len(parts) == 1 else f"{module.use('_common')}([{', '.join(parts)}])"
