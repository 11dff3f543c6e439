"""Fusions that only structure shows: the left-over tensors of one module, one after the other, fill another's.

For weights that were trained anew no value tells in which order rows stand; the order that fused layouts share is
data (`mappings/names/order.yaml`), and the match says `structure`. Where values tell elsewhere they must tell here
too, and say the order (rows too short to be found one by one).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from lineage.layout.induce import Match
from lineage.layout.mapping import How
from lineage.layout.operations import Concat, Split
from lineage.match.structure import CLASH, LEAST_SCORE, NUMBERS, Links
from lineage.match.values import Values, agreement
from lineage.match.words import Roles, ancestors, load_order, numbers

__all__ = ["joined"]

#: parts that one tensor may be made of
MOST_PARTS = 4
#: elements of a tensor up to which every order of its parts is compared
MOST_ELEMENTS = 1 << 22


def joined(
    a: Values, b: Values, left_a: Sequence[str], left_b: Sequence[str], links: Links, roles: Roles,
    *,
    expected: float = 0.0,
) -> list[Match]:  # fmt: skip
    """Matches of one left-over matrix with all left-over matrices of one module on the other side.

    Parameters
    ----------
    expected : the correlation that values show elsewhere, 0 where the weights share none
    """
    order = load_order()
    how: How = "values" if expected else "structure"
    found = []
    for whole, parts, axis in _fillings(b, a, left_b, left_a, links, roles, order, turned=False):
        if expected:
            parts = _told(b, a, whole, parts, axis, expected)
            if not parts:
                continue
        sizes = tuple(a.checkpoint.specs[n].shape[axis] for n in parts)
        concat = Concat(axis, None if len(set(sizes)) == 1 else sizes)
        found.append(Match(targets=(whole,), sources=parts, ops=(concat,), how=how))
    taken = {n for m in found for n in m.sources}
    rest = [n for n in left_a if n not in taken]
    made = {t for m in found for t in m.targets}
    for whole, parts, axis in _fillings(
        a, b, rest, [n for n in left_b if n not in made], links, roles, order, turned=True
    ):
        if expected:
            parts = _told(a, b, whole, parts, axis, expected)
            if not parts:
                continue
        sizes = tuple(b.checkpoint.specs[n].shape[axis] for n in parts)
        equal = len(set(sizes)) == 1
        split = Split(axis, len(sizes) if equal else None, None if equal else sizes)
        found.append(Match(targets=parts, sources=(whole,), ops=(split,), how=how))
    return found


def _fillings(
    wholes: Values, others: Values, left: Sequence[str], parts: Sequence[str], links: Links, roles: Roles,
    order: Sequence[str], *, turned: bool,
) -> Iterable[tuple[str, tuple[str, ...], int]]:  # fmt: skip
    """(whole, parts, axis) where the parts' lengths along the axis add up and their module is close to the whole."""
    shapes = {n: others.checkpoint.specs[n].shape for n in parts}
    modules: dict[str, list[str]] = defaultdict(list)
    for name in parts:
        for above in ancestors(name)[:3]:
            if above and len(shapes[name]) > 1:
                modules[above].append(name)

    def score(whole: str, fits: Sequence[str]) -> float:
        near = [links.closeness(whole, n) if turned else links.closeness(n, whole) for n in fits]
        like = [roles.likeness(n, whole) - (CLASH if roles.clash(n, whole) else 0) for n in fits]
        same = [NUMBERS if numbers(n) == numbers(whole) else -NUMBERS for n in fits]
        return (sum(near) + sum(like) + sum(same)) / len(fits)

    by_layer: dict[tuple[int, ...], list[list[str]]] = defaultdict(list)
    for above, members in modules.items():
        if len(members) <= 4 * MOST_PARTS:
            by_layer[numbers(above)[:1]].append(members)
    options: list[tuple[float, str, tuple[str, ...], int]] = []
    for whole in left:
        shape = wholes.checkpoint.specs[whole].shape
        for members in by_layer[numbers(whole)[:1]] if len(shape) > 1 else ():
            for axis in (0, 1):
                fits = [n for n in members if _beside(shapes[n], shape, axis)]
                if 2 <= len(fits) <= MOST_PARTS and sum(shapes[n][axis] for n in fits) == shape[axis]:
                    options.append((score(whole, fits), whole, tuple(fits), axis))
    used: set[str] = set()
    for found, whole, chosen, axis in sorted(options, key=lambda o: (-o[0], o[1:])):
        if found >= LEAST_SCORE and not used & {whole, *chosen}:
            used |= {whole, *chosen}
            yield whole, tuple(sorted(chosen, key=lambda n: _place(n, roles, order))), axis


def _told(
    wholes: Values, others: Values, whole: str, parts: tuple[str, ...], axis: int, expected: float
) -> tuple[str, ...]:
    """The parts in the order in which, joined, they correlate with the whole as expected; none where they do not."""
    if wholes.size(whole) > MOST_ELEMENTS:
        return ()
    mine = wholes.whole(whole).reshape(wholes.checkpoint.specs[whole].shape)
    theirs = {n: others.whole(n).reshape(others.checkpoint.specs[n].shape) for n in parts}
    for option in itertools.permutations(parts):
        at = np.cumsum([theirs[n].shape[axis] for n in option])[:-1]
        pieces = np.split(mine, at, axis=axis)
        told = [agreement(theirs[n].ravel(), x.ravel(), expected) for n, x in zip(option, pieces, strict=True)]
        if all(how == "values" for how, _ in told):
            return option
    return ()


def _beside(shape: tuple[int, ...], whole: tuple[int, ...], axis: int) -> bool:
    """Whether a tensor fits beside others along an axis of the whole."""
    return len(shape) == len(whole) and all(
        n == m for i, (n, m) in enumerate(zip(shape, whole, strict=True)) if i != axis
    )


def _place(name: str, roles: Roles, order: Sequence[str]) -> tuple[int, str]:
    """Where the part stands in the whole: by the first role that its name has."""
    mine = roles.of(name)
    return next((i for i, role in enumerate(order) if role in mine), len(order)), name
