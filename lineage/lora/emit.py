"""A converter for one pair of models as a Python script of its own: torch and safetensors, nothing else.

What happens to rows and columns is found by carrying index numbers through the mapping; a target whose factors are
not rows and columns of its sources' factors is left out, and the script says so when it meets one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.operations.data import compressed
from lineage.lora.carry import carried
from lineage.lora.delta import Delta, Refused
from lineage.lora.grammar import grammar
from lineage.lora.naming import Namer
from lineage.lora.network import Term
from lineage.lora.source import Base

__all__ = ["FORMATS", "script"]

#: formats with one pair and at most one alpha a module, in one file
FORMATS = ("kohya", "onetrainer", "comfy", "diffusers", "ai-toolkit")


def script(
    mapping: LayoutMapping, a: Mapping[str, Shape], b: Mapping[str, Shape], *, source: str = "kohya", to: str = "comfy"
) -> str:
    """The text of the script.

    Parameters
    ----------
    a, b : shapes of both models' tensors
    source, to : formats that it reads and writes

    Raises
    ------
    InputError : a format that is not in `FORMATS`, or no matrix corresponds
    """
    for name in (source, to):
        if name not in FORMATS:
            raise InputError(name, "no format that a script can be written for", "choose from " + ", ".join(FORMATS))
    ours, theirs = Namer(grammar(source), a), Namer(grammar(to), b)
    table: dict[str, list[Any]] = {}
    left_out: list[str] = []
    matrices = {n: s for n, s in a.items() if len(s) == 2 and n.endswith(".weight")}
    probes = {n: _probe(s) for n, s in matrices.items()}
    by_target: dict[str, list[Any]] = {}
    for name in matrices:
        try:
            carry = carried({name: probes[name]}, mapping, Base(dict(a)))
        except Refused:
            continue
        for target, delta in carry.deltas.items():
            moved = _moved(delta)
            if moved is None or len(delta.shape) != 2:
                left_out.append(target)
            else:
                by_target.setdefault(target, []).append([ours.stem(name.removesuffix(".weight"), name), *moved])
    for target, pieces in by_target.items():
        if target not in left_out and target in b:
            table[theirs.stem(target.removesuffix(".weight"), target)] = [list(b[target]), pieces]
    if not table:
        raise InputError("mapping", "no matrix of B is made of whole rows and columns of A")
    return _TEXT.format(
        source=source, to=to, left_out=json.dumps(sorted(set(left_out))), table=_listed(table),
        down=json.dumps(ours.g.roles["down"]), up=json.dumps(ours.g.roles["up"]),
        new=json.dumps([theirs.g.roles["down"][0], theirs.g.roles["up"][0]]),
        alpha="alpha" in theirs.g.roles and theirs.g.scale == "alpha",
    )  # fmt: skip


def _probe(shape: Shape) -> Delta:
    """A pair of rank one whose factors hold the numbers of their rows and columns, counted from one."""
    up = np.arange(1.0, shape[0] + 1)[:, None]
    down = np.arange(1.0, shape[1] + 1)[None]
    return Delta(shape=shape, terms=(Term.of([(up, "ok"), (down, "ki")], ["o", "i"]),))


def _moved(delta: Delta) -> list[Any] | None:
    """Whether the factors change places, and the rows and columns taken; None where they are not simply taken."""
    if len(delta.terms) != 1 or delta.terms[0].scale != 1.0 or len(delta.terms[0].parts) != 2:
        return None
    term = delta.terms[0].joined(0).joined(1)
    first, second = term.parts
    (rows,), (columns,) = term.layout
    sides = [{rows} <= set(p.labels) for p in (first, second)], [{columns} <= set(p.labels) for p in (first, second)]
    if sides == ([True, False], [False, True]):
        swapped, ours, theirs = False, first, second
    elif sides == ([False, True], [True, False]):
        swapped, ours, theirs = True, second, first
    else:
        return None
    return [swapped, _runs(ours.array), _runs(theirs.array)]


def _runs(numbers: NDArray[Any]) -> list[Any]:
    """Places as ranges, -1 for rows of zeros."""
    return [
        list(run) if isinstance(run, tuple) else run for run in compressed(numbers.reshape(-1).astype(np.int64) - 1)
    ]


def _listed(table: Mapping[str, list[Any]]) -> str:
    """The table as Python text, one module a line."""
    return "{\n" + "".join(f"    {key!r}: {value!r},\n" for key, value in table.items()) + "}"


_TEXT = '''#!/usr/bin/env python3
"""Converts a LoRA ({source} keys) to {to} keys. Written by `lineage lora map --emit python`.

    python this.py LORA.safetensors OUT.safetensors
"""

import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file

# new module: [shape of its weight, [[old module, factors change places, rows, columns], ...]]
TABLE = {table}
LEFT_OUT = {left_out}
DOWN, UP, NEW = {down}, {up}, {new}


def places(runs):
    found = []
    for run in runs:
        found.extend(range(*run) if isinstance(run, list) else [run])
    return torch.tensor(found)


def taken(factor, axis, runs):
    """Rows or columns in a new order; place -1 is zero."""
    index = places(runs)
    if len(index) == factor.shape[axis] and bool((index == torch.arange(len(index))).all()):
        return factor
    result = factor.index_select(axis, index.clamp(min=0))
    if bool((index < 0).any()):
        shape = [1, 1]
        shape[axis] = -1
        result = result * (index >= 0).to(result.dtype).reshape(shape)
    return result


def main(old_path, new_path):
    with safe_open(old_path, "pt") as file:
        old = {{key: file.get_tensor(key) for key in file.keys()}}
        metadata = file.metadata() or {{}}
    used, new = set(), {{}}
    for module, (shape, pieces) in TABLE.items():
        pairs = []
        for name, swapped, rows, columns in pieces:
            down = next((f"{{name}}.{{end}}" for end in DOWN if f"{{name}}.{{end}}" in old), None)
            up = next((f"{{name}}.{{end}}" for end in UP if f"{{name}}.{{end}}" in old), None)
            if down is None or up is None:
                continue
            used.update((down, up, f"{{name}}.alpha"))
            a, b = old[down].flatten(1), old[up].flatten(1)
            if f"{{name}}.alpha" in old and float(old[f"{{name}}.alpha"]):
                scale = float(old[f"{{name}}.alpha"]) / a.shape[0]
            else:
                scale = 1.0
            if swapped:
                a, b = b.T, a.T
            pairs.append((taken(b, 0, rows), taken(a, 1, columns), scale))
        if not pairs:
            continue
        scale = pairs[0][2] if {alpha} else 1.0
        ups = [up if s == scale else (up.float() * (s / scale)) for up, _, s in pairs]
        dtype = torch.float32 if any(u.dtype != ups[0].dtype for u in ups) else ups[0].dtype
        up = torch.cat([u.to(dtype) for u in ups], 1)
        down = torch.cat([d for _, d, _ in pairs], 0)
        alive = up.any(0) & down.any(1)
        if not bool(alive.any()):
            continue
        new[f"{{module}}.{{NEW[0]}}"] = down[alive].contiguous()
        new[f"{{module}}.{{NEW[1]}}"] = up[:, alive].contiguous()
        if {alpha}:
            new[f"{{module}}.alpha"] = torch.tensor(scale * int(alive.sum()))
    left = [key for key in old if key not in used]
    for key in left:
        print(f"left over: {{key}}", file=sys.stderr)
    for name in LEFT_OUT:
        print(f"not covered by this script: {{name}}", file=sys.stderr)
    save_file(new, new_path, metadata=metadata)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
'''
