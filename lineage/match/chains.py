"""Operation chains for what was found: a transposition, a tiling of parts, a list of rows.

Chains are always written from the parts to the whole and inverted where the whole is A's. Axis names in patterns
are given out here: a name stands for one size in the whole mapping, and the free axes of a pattern have none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lineage.layout.chain import inverse_chain
from lineage.layout.operations import Concat, Each, Operation, Pad, Rearrange, Slice, Stack, Take
from lineage.match.explain import Digit, Tiling, factors
from lineage.match.rows import View

__all__ = ["Names", "PartShape", "inverted", "picked", "reordered", "tiled", "windowed"]

#: placeholder of the tensors that are stacked into one
OVER = "e"
_WORDS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}
_SIZED = tuple("hdgnmeuvwxyzft")
_FREE = tuple("kcrjpqsl")


class Names:
    """Gives every size of a composite axis a name that means that size everywhere in the mapping."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}

    def sized(self, size: int, taken: set[str]) -> str:
        """A name for `size` that is not in `taken`."""
        for name, known in self.sizes.items():
            if known == size and name not in taken:
                return name
        word = _WORDS.get(size)
        pool = ([word] if word else []) + list(_SIZED) + [f"{c}{i}" for i in range(1, 1000) for c in _SIZED]
        name = next(n for n in pool if n not in self.sizes and n not in taken)
        self.sizes[name] = size
        return name


class PartShape(NamedTuple):
    """A part's full shape, the view that gave its rows, and how many equal tensors are stacked in front (or None)."""

    shape: tuple[int, ...]
    view: View
    stacked: int | None = None

    def axes(self) -> tuple[list[int], list[int]]:
        """Indices of the row axes and of the column axes in the stacked full shape."""
        full = [i for i, n in enumerate(self.shape) if n != 1]
        shift = 0 if self.stacked is None else 1
        rows = [full[i] + shift for i in self.view.rows]
        columns = [full[i] + shift for i in self.view.columns]
        return ([0] if shift else []) + rows, columns

    def dims(self) -> tuple[int, ...]:
        """Lengths of all axes, the stacking one in front."""
        return self.shape if self.stacked is None else (self.stacked, *self.shape)


class _Factor(NamedTuple):
    size: int
    left: int
    rank: tuple[int, int]


def _write(
    left: Sequence[Sequence[int]], right: Sequence[Sequence[int]], sizes: Sequence[int], names: Names
) -> Rearrange | None:
    """The pattern whose axes are the numbered factors, grouped; None where it would move nothing."""
    if [tuple(g) for g in left] == [tuple(g) for g in right]:
        return None
    lonely_left = {g[0] for g in left if len(g) == 1}
    lonely = lonely_left & {g[0] for g in right if len(g) == 1}
    taken: set[str] = set()
    words: dict[int, str] = {}
    free = iter([*_FREE, *(f"k{i}" for i in range(1, 100))])
    for group in left:
        for factor in group:
            word = next(free) if factor in lonely else names.sized(sizes[factor], taken)
            words[factor] = word
            taken.add(word)

    def side(groups: Sequence[Sequence[int]]) -> str:
        texts = []
        for group in groups:
            inner = " ".join(words[f] for f in group)
            texts.append("1" if not group else inner if len(group) == 1 else f"({inner})")
        return " ".join(texts)

    known = {words[f]: sizes[f] for f in words if f not in lonely}
    return Rearrange(f"{side(left)} -> {side(right)}", known)


def reordered(
    shape: tuple[int, ...], order: tuple[int, ...], target: tuple[int, ...], names: Names
) -> tuple[Operation, ...]:
    """The rearrangement of a tensor of `shape` whose non-1 axes, in `order`, reshape to `target`; () for none."""
    if shape == target and list(order) == sorted(order):
        return ()
    axes = [i for i, n in enumerate(shape) if n != 1]
    lengths = [shape[axes[i]] for i in order]
    found = factors(lengths, [n for n in target if n != 1])
    if found is None:
        return ()
    places = [i for i, n in enumerate(target) if n != 1]
    left: list[list[int]] = [[] for _ in shape]
    right: list[list[int]] = [[] for _ in target]
    for number, (_, source, goal) in enumerate(found):
        left[axes[order[source]]].append(number)
        right[places[goal]].append(number)
    made = _write(left, right, [f[0] for f in found], names)
    return () if made is None else (made,)


def _cut(digits: Sequence[Digit], borders: Sequence[int]) -> list[Digit] | None:
    """Digits split so that none reaches across a border (a stride in the whole); None where one cannot be."""
    out = list(digits)
    for border in borders:
        cut: list[Digit] = []
        for digit in out:
            if digit.stride < border < digit.stride * digit.size:
                if border % digit.stride or digit.size % (border // digit.stride):
                    return None
                low = border // digit.stride
                cut += [Digit(digit.size // low, border), Digit(low, digit.stride)]
            else:
                cut.append(digit)
        out = cut
    return out


def _borders(lengths: Sequence[int]) -> list[int]:
    """Strides of axes of these lengths, without the innermost 1."""
    return [math.prod(lengths[i:]) for i in range(1, len(lengths))]


def _part_pattern(
    part: PartShape, digits: Sequence[Digit], columns: Sequence[int], goal: Sequence[int], goal_rows: Sequence[int],
    goal_columns: Sequence[int], names: Names,
) -> Rearrange | None | bool:  # fmt: skip
    """Pattern from a part's axes to axes of lengths `goal`, whose row and column axes are given; False: impossible."""
    dims = part.dims()
    rows, cols = part.axes()
    borders = _borders([goal[i] for i in goal_rows])
    cut = _cut(digits, borders)
    if cut is None:
        return False
    found = factors([dims[i] for i in rows], [d.size for d in cut])
    if found is None:
        return False
    sizes: list[int] = []
    left: list[list[int]] = [[] for _ in dims]
    placed: list[tuple[int, int]] = []
    below: dict[int, int] = {}
    for number in range(len(found) - 1, -1, -1):
        size, _, digit = found[number]
        placed.append((cut[digit].stride * below.get(digit, 1), number))
        below[digit] = below.get(digit, 1) * size
    for number, (size, axis, _) in enumerate(found):
        sizes.append(size)
        left[rows[axis]].append(number)
    right: list[list[int]] = [[] for _ in goal]
    strides = [math.prod(goal[i] for i in goal_rows[at + 1 :]) for at in range(len(goal_rows))]
    for stride, number in sorted(placed, reverse=True):
        at = next((i for i, s in enumerate(strides) if stride >= s and goal[goal_rows[i]] != 1), None)
        if at is None:
            return False
        right[goal_rows[at]].append(number)
    if columns:
        found_columns = factors([dims[i] for i in cols], [goal[i] for i in goal_columns])
        if found_columns is None:
            return False
        for size, axis, place in found_columns:
            number = len(sizes)
            sizes.append(size)
            left[cols[axis]].append(number)
            right[goal_columns[place]].append(number)
    return _write(left, right, sizes, names)


def tiled(
    tiling: Tiling, parts: Sequence[PartShape], whole: tuple[int, ...], view: View, names: Names, *, over: str = OVER
) -> tuple[Operation, ...] | None:
    """The chain from the parts, in the tiling's order, to the whole of full shape `whole` seen by `view`."""
    axes = [i for i, n in enumerate(whole) if n != 1]
    rows, cols = [axes[i] for i in view.rows], [axes[i] for i in view.columns]
    width = [math.prod(whole[i] for i in cols)] if cols else []
    stacks: list[Operation] = [Stack(axis=0, over=over)] if any(p.stacked is not None for p in parts) else []
    if len(parts) == 1:
        made = _part_pattern(parts[0], tiling.parts[0].digits, cols, whole, rows, cols, names)
        if made is False:
            return None
        return (*stacks, made) if isinstance(made, Rearrange) else tuple(stacks)
    grouped = tiling.groups > 1
    middle_rows = [0, 1] if grouped else [0]
    steps: dict[int, tuple[Operation, ...]] = {}
    plain = all(len(part.digits) == 1 for part in tiling.parts)
    direct = plain and not grouped and _direct(parts, whole, rows, cols)
    for place, index in enumerate(tiling.order):
        part, shape = tiling.parts[index], parts[index]
        if direct:
            continue
        goal = ([tiling.groups] if grouped else []) + [part.width] + width
        digits = [_regrouped(d, tiling.width, part.width) if grouped else d for d in part.digits]
        made = _part_pattern(shape, digits, cols, goal, middle_rows, [len(goal) - 1] if cols else [], names)
        if made is False:
            return None
        if isinstance(made, Rearrange):
            steps[place] = (made,)
    axis = 1 if grouped else (rows[0] if direct else 0)
    widths = tuple(tiling.parts[i].width for i in tiling.order)
    if direct:
        inner = math.prod(whole[i] for i in rows[1:])
        widths = tuple(w // inner for w in widths)
    concat = Concat(axis=axis, sizes=None if len(set(widths)) == 1 else widths)
    chain = [*stacks, *_together(steps, len(parts)), concat]
    if not direct:
        made = _middle_pattern(([tiling.groups] if grouped else []) + [tiling.width], width, whole, rows, cols, names)
        if made is False:
            return None
        if isinstance(made, Rearrange):
            chain.append(made)
    return tuple(chain)


def _regrouped(digit: Digit, width: int, part_width: int) -> Digit:
    """A digit of a group of `width` rows as it stands in the part's own window of `part_width` rows."""
    return digit if digit.stride < width else Digit(digit.size, digit.stride // width * part_width)


def _direct(parts: Sequence[PartShape], whole: tuple[int, ...], rows: list[int], cols: list[int]) -> bool:
    """True where the parts, as they are, are slabs of the whole along its first row axis."""
    if not rows:
        return False
    for part in parts:
        if part.stacked is not None or len(part.shape) != len(whole) or part.axes() != (rows, cols):
            return False
        if any(n != m for i, (n, m) in enumerate(zip(part.shape, whole, strict=True)) if i != rows[0]):
            return False
    return True


def _together(steps: dict[int, tuple[Operation, ...]], count: int) -> list[Operation]:
    """One pattern for all parts where they share it, else a pattern for each."""
    if not steps:
        return []
    if len(steps) == count and len(set(steps.values())) == 1:
        return list(steps[0])
    return [Each(steps)]


def _middle_pattern(
    row_lengths: list[int], width: list[int], whole: tuple[int, ...], rows: list[int], cols: list[int], names: Names
) -> Rearrange | None | bool:
    """Pattern from (groups, width, columns) to the axes of the whole; False: impossible."""
    found = factors(row_lengths, [whole[i] for i in rows])
    found_columns = factors(width, [whole[i] for i in cols]) if cols else []
    if found is None or found_columns is None:
        return False
    left: list[list[int]] = [[] for _ in row_lengths + width]
    right: list[list[int]] = [[] for _ in whole]
    sizes: list[int] = []
    for size, source, goal in found:
        left[source].append(len(sizes))
        right[rows[goal]].append(len(sizes))
        sizes.append(size)
    for size, _, goal in found_columns:
        left[-1].append(len(sizes))
        right[cols[goal]].append(len(sizes))
        sizes.append(size)
    return _write(left, right, sizes, names)


def picked(
    takes: Sequence[NDArray[np.int64]], parts: Sequence[PartShape], whole: tuple[int, ...], view: View, names: Names
) -> tuple[Operation, ...] | None:
    """The chain that takes given rows of each part, one below the other, and shapes them as the whole."""
    axes = [i for i, n in enumerate(whole) if n != 1]
    rows, cols = [axes[i] for i in view.rows], [axes[i] for i in view.columns]
    width = [math.prod(whole[i] for i in cols)] if cols else []
    steps: dict[int, tuple[Operation, ...]] = {}
    for place, (take, part) in enumerate(zip(takes, parts, strict=True)):
        dims = part.dims()
        part_rows, part_cols = part.axes()
        height = math.prod(dims[i] for i in part_rows)
        flat = _flat_pattern(dims, part_rows, part_cols, names)
        chain: list[Operation] = [flat] if flat is not None else []
        if len(take) != height or (np.diff(take) != 1).any():
            chain.append(Take(0, take, height))
        steps[place] = tuple(chain)
    chain = _together({k: v for k, v in steps.items() if v}, len(parts))
    if len(parts) == 1:
        chain = list(steps[0])
    else:
        sizes = tuple(len(t) for t in takes)
        chain.append(Concat(axis=0, sizes=None if len(set(sizes)) == 1 else sizes))
    made = _middle_pattern([sum(len(t) for t in takes)], width, whole, rows, cols, names)
    if made is False:
        return None
    return (*chain, made) if isinstance(made, Rearrange) else tuple(chain)


def windowed(
    part: PartShape, step: Slice | Pad, goal: tuple[int, ...], view: View, names: Names
) -> tuple[Operation, ...] | None:
    """The chain that cuts or pads the rows of one tensor, and shapes the result as `goal` seen by `view`."""
    dims = part.dims()
    rows, cols = part.axes()
    axes = [i for i, n in enumerate(goal) if n != 1]
    goal_rows, goal_cols = [axes[i] for i in view.rows], [axes[i] for i in view.columns]
    if len(dims) == len(goal) and len(rows) == 1 and rows == goal_rows and cols == goal_cols:
        return (dataclasses.replace(step, axis=rows[0]),)
    flat = _flat_pattern(dims, rows, cols, names)
    height = math.prod(goal[i] for i in goal_rows)
    made = _middle_pattern(
        [height], [math.prod(goal[i] for i in goal_cols)] if cols else [], goal, goal_rows, goal_cols, names
    )
    if made is False:
        return None
    steps: list[Operation] = [flat] if flat is not None else []
    return (*steps, step, made) if isinstance(made, Rearrange) else (*steps, step)


def _flat_pattern(dims: tuple[int, ...], rows: list[int], cols: list[int], names: Names) -> Rearrange | None:
    """Pattern from the axes of a tensor to (rows, columns)."""
    numbers = {axis: i for i, axis in enumerate(i for i, n in enumerate(dims) if n != 1)}
    left = [[numbers[i]] if i in numbers else [] for i in range(len(dims))]
    right = [[numbers[i] for i in rows]] + ([[numbers[i] for i in cols]] if cols else [])
    return _write(left, right, [dims[i] for i in numbers], names)


def inverted(
    chain: Sequence[Operation], entries: Sequence[str | tuple[str, ...]], *, over: str = OVER
) -> tuple[Operation, ...]:
    """A chain of arrangements from the whole to the parts `entries`, given the one from the parts to the whole."""
    lengths = [len(e) for e in entries if not isinstance(e, str)]
    return inverse_chain(chain, len(entries), {over: lengths[0]} if lengths else {})
