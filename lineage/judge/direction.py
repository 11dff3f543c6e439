"""Who came first, where structure shows it: the coarser, the cut and the extended are children. Else nobody knows."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.dtypes import FLOATS, decode, encode
from lineage.errors import InputError
from lineage.filling import Filled
from lineage.judge.material import Material, counters
from lineage.judge.relations.finding import Finding
from lineage.judge.relations.shapes import cut
from lineage.judge.relations.values import beginning, gridded

__all__ = ["find_direction"]

Direction = Literal["a-to-b", "b-to-a"]

#: share of values that must lie within a step of the lattice from the other side's: rounded, not tuned and rounded
ROUNDED = 0.99
#: elements of a matrix up to which its units are looked through for clones
LARGEST = 1 << 22
#: matrices that were cut where the layout hides it (heads of a joined axis) and are looked through
MOST_CUT = 8
#: cosine of two units of one matrix from which one is a clone of the other
CLONE = 0.98

#: spread of the lengths (logarithms) of further vocabulary rows over that of the others up to which they were added
#: late (added 0.06 to 0.45; trained rows that were cut off 0.57 to 0.65), and rows that are looked at
ALIKE_ROWS, MOST_ROWS = 0.5, 2048


def find_direction(material: Material, findings: list[Finding]) -> Direction | None:
    """`a-to-b` where B shows signs of being made from A, `b-to-a` for the reverse, None without or with both."""
    tags = {finding.tag: finding for finding in findings}
    said = {sign for look in (_lattice, _zeros, _rounded, _layers, _widths, _rows) if (sign := look(material, tags))}
    return said.pop() if len(said) == 1 else None


def _lattice(material: Material, tags: dict[str, Finding]) -> Direction | None:
    """The side on a grid was made from the other one, if it is nothing but that side rounded."""
    if "quantized" not in tags:
        return None
    near = _rounded_to_grids(material)
    coarse_b = tags["quantized"].sentence.startswith("B")
    if not near or min(near) < ROUNDED:
        return None
    return "a-to-b" if coarse_b else "b-to-a"


def _rounded_to_grids(material: Material) -> list[float]:
    """For each sampled matrix on a grid, the share of values that lie within one step of it on the other side."""
    for side, coarse in (("B", material.b), ("A", material.a)):
        hits = gridded(material, side)
        if hits:
            fine = material.filled if side == "B" else _turned_back(material)
            near = []
            for hit in hits:
                name = hit.name if side == "B" else material.filled.origins[hit.name][0]
                if fine is None or name not in fine.specs:
                    return []
                x, y = (beginning(checkpoint, name, turned=hit.turned) for checkpoint in (fine, coarse))
                near += [] if x is None or y is None else [hit.grid.rounds(x, y)]
            return near
    return []


def _turned_back(material: Material) -> Checkpoint | None:
    """A's layout with B's values, where the mapping can be inverted."""
    try:
        return Filled(material.mapping.inverse(), material.b)
    except InputError:
        return None


def _zeros(material: Material, tags: dict[str, Finding]) -> Direction | None:
    """The side with exact zeros was pruned."""
    if "sparsified" not in tags:
        return None
    more = sum((p.zero_b or 0.0) - (p.zero_a or 0.0) for p in material.content)
    return "a-to-b" if more > 0 else "b-to-a"


def _rounded(material: Material, tags: dict[str, Finding]) -> Direction | None:
    """One side is the other one rounded, and not the reverse."""
    if "cast" not in tags:
        return None
    said: set[Direction] = set()
    for pair in material.content:
        if pair.equal and pair.dtype_a in FLOATS and pair.dtype_b in FLOATS and pair.dtype_a != pair.dtype_b:
            sample = material.sample(pair.name)
            down = np.array_equal(decode(encode(sample.a, pair.dtype_b), pair.dtype_b), sample.b)
            up = np.array_equal(decode(encode(sample.b, pair.dtype_a), pair.dtype_a), sample.a)
            if down != up:
                said.add("a-to-b" if down else "b-to-a")
    return said.pop() if len(said) == 1 else None


def _layers(material: Material, tags: dict[str, Finding]) -> Direction | None:
    """Layers that only one side has: clones of another layer were added, others were left out by the other side."""
    if "expert-upcycled" in tags:
        return "b-to-a" if "near copies" in tags["expert-upcycled"].sentence else "a-to-b"
    grown, pruned = "depth-grown" in tags, "depth-pruned" in tags
    if not grown and not pruned:
        return None
    if grown:
        origins = [pair.origins for pair in material.content if pair.equal or pair in material.alike]
        return "a-to-b" if len(set(origins)) < len(origins) else "b-to-a"
    content = {pair.name for pair in material.content}
    given = [name for i in material.instances for name in i.target_names if name in content]
    if len(set(given)) < len(given):  # several of A's layers are one of B's
        return "b-to-a"
    specs = material.a.specs
    left = [n for n in material.mapping.unmatched_source if n in specs and len(specs[n].shape) > 1]
    twins = [material.has_twin(name) for name in left[:4]]
    return ("b-to-a" if all(twins) else "a-to-b") if twins else None


def _widths(material: Material, tags: dict[str, Finding]) -> Direction | None:
    """The narrower side was cut: what the wider one has more are units of its own, no copies and no zeros."""
    wider = "b" if "width-grown" in tags else "a" if "width-pruned" in tags else ""
    if not wider:
        return None
    checkpoint, side = (material.common.b, 1) if wider == "b" else (material.common.a, 0)
    seen = set()
    for name, shapes in material.common.shapes.items():
        if shapes[0] != shapes[1] and len(shapes[0]) == 2 and counters(name):
            axis = next(k for k in (0, 1) if shapes[0][k] != shapes[1][k])
            units = checkpoint.tensor(name) if shapes[side][0] * shapes[side][1] <= LARGEST else None
            if units is not None and not _distinct(np.moveaxis(units, axis, 0)):
                return "b-to-a" if wider == "a" else "a-to-b"
            if shapes[0][1 - axis] == shapes[1][1 - axis]:
                seen.add(material.common.names(name)[0])
    # where one axis is known to be cut the other one need not be looked at: its units may be too short to differ
    for name in [name for name in material.asked(cut) if counters(name) and name not in seen][:MOST_CUT]:
        spec = material.a.specs[name]
        units = material.a.tensor(name).reshape(spec.shape[0], -1) if spec.size <= LARGEST else None
        if units is None or not (_distinct(units) and _distinct(units.T)):
            return None
    return "a-to-b" if wider == "a" else "b-to-a"


def _distinct(units: NDArray[Any]) -> bool:
    """True where no unit is nothing, and none is a multiple of another one."""
    lengths = np.linalg.norm(units.astype(np.float64), axis=1)
    if (lengths < 1e-6 * lengths.max(initial=0.0)).any():
        return False
    rows = units / lengths[:, None]
    alike = np.abs(rows @ rows.T) - np.eye(len(rows))
    return bool(alike.max() < CLONE)


def _rows(material: Material, tags: dict[str, Finding]) -> Direction | None:
    """The longer vocabulary is the child's where its further rows are of one kind: they started alike and late.

    A vocabulary that was cut loses rows that are as unlike as all others; of rows that look trained nobody knows.
    """
    if "vocabulary-extended" not in tags:
        return None
    fewer = "fewer" in tags["vocabulary-extended"].sentence
    longer, shorter = (material.a, material.b) if fewer else (material.b, material.a)
    pairs = [(i.source_names[0], i.target_names[0]) for i in material.instances if len(i.source_names) == 1]
    pairs += [material.common.names(name) for name in material.common.shapes]
    for names in pairs:
        name, other = names if fewer else names[::-1]
        if name in longer.specs and other in shorter.specs and not counters(names[1]):
            shapes = longer.specs[name].shape, shorter.specs[other].shape
            grown = len(shapes[0]) == len(shapes[1]) == 2 and shapes[0][0] > shapes[1][0]
            if grown and not _late(longer, name, shapes[1][0]):
                return None
    return "b-to-a" if fewer else "a-to-b"


def _late(checkpoint: Checkpoint, name: str, first: int) -> bool:
    """True where rows from `first` on have lengths much more alike than the rows before them."""
    rows, columns = checkpoint.specs[name].shape
    some = min(first, MOST_ROWS)
    spread = []
    for start, stop in ((first - some, first), (first, min(rows, first + MOST_ROWS))):
        values = checkpoint.read(name, start * columns, stop * columns).reshape(-1, columns)
        lengths = np.linalg.norm(values.astype(np.float64), axis=1)
        spread.append(float(np.std(np.log(np.maximum(lengths, 1e-30)))))
    return spread[1] < ALIKE_ROWS * spread[0]
