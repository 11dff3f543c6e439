"""Hypothesis strategies shared by the tests: shapes, patterns, chains of operations, names and matches."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from lineage.layout.axes import Shape
from lineage.layout.induce import Match
from lineage.layout.operations import (
    Concat,
    Each,
    Operation,
    Rearrange,
    Split,
    Stack,
    Take,
    Unstack,
)

Draw = Callable[[st.SearchStrategy[object]], object]

shapes: st.SearchStrategy[Shape] = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


def codes(shape: Shape, seed: int = 0) -> NDArray[np.uint16]:
    """An array whose elements all differ, so that a wrong place shows."""
    return (np.arange(math.prod(shape), dtype=np.uint16) + np.uint16(seed * 1000)).reshape(shape)


@st.composite
def grouped(draw: st.DrawFn, names: list[str]) -> str:
    """One side of a pattern: the names in order, some of them in groups, some axes of length one between."""
    words: list[str] = []
    at = 0
    while at < len(names):
        size = draw(st.integers(1, len(names) - at))
        words += [f"({' '.join(names[at : at + size])})"] if size > 1 else [names[at]]
        at += size
        if draw(st.integers(0, 5)) == 0:
            words.append(draw(st.sampled_from(["1", "()"])))
    return " ".join(words)


@st.composite
def patterns(draw: st.DrawFn) -> tuple[str, dict[str, int], Shape]:
    """An einops pattern, the length of every axis, and a shape that it fits."""
    count = draw(st.integers(1, 4))
    lengths = {name: draw(st.integers(1, 4)) for name in "abcd"[:count]}
    left = draw(grouped(list(lengths)))
    right = draw(grouped(draw(st.permutations(list(lengths)))))
    groups = Rearrange(f"{left} -> {right}").parsed.left
    return f"{left} -> {right}", lengths, tuple(math.prod(lengths[n] for n in group) for group in groups)


@st.composite
def rearranged(draw: st.DrawFn, shape: Shape) -> Rearrange:
    """A pattern with all its sizes that fits the shape: axes in another order, some of them split or merged."""
    names: list[list[str]] = []
    sizes: dict[str, int] = {}
    for k, length in enumerate(shape):
        factor = draw(st.sampled_from([f for f in range(1, max(length, 1) + 1) if length % f == 0]))
        group = [f"x{k}", f"y{k}"] if draw(st.booleans()) else [f"x{k}"]
        sizes |= {group[0]: factor, group[1]: length // factor} if len(group) == 2 else {group[0]: length}
        names.append(group)
    left = " ".join(f"({' '.join(group)})" if len(group) > 1 else group[0] for group in names)
    right = draw(grouped(draw(st.permutations([n for group in names for n in group]))))
    return Rearrange(f"{left} -> {right}", sizes)


@st.composite
def single_steps(draw: st.DrawFn, shape: Shape) -> Operation:
    """An operation on one array that loses nothing."""
    taken = draw(st.booleans())
    if shape and taken:
        axis = draw(st.integers(0, len(shape) - 1))
        return Take(axis - draw(st.sampled_from([0, len(shape)])), draw(st.permutations(range(shape[axis]))))
    return draw(rearranged(shape))


@st.composite
def steps(draw: st.DrawFn, given: list[Shape]) -> Operation:
    """An operation that fits arrays of these shapes and loses nothing."""
    kinds: list[Operation] = []
    if len(given) == 1 and given[0]:
        axis = draw(st.integers(0, len(given[0]) - 1))
        length = given[0][axis]
        cut = draw(st.integers(0, length))
        kinds += [Split(axis, sizes=(cut, length - cut)), *([Unstack(axis)] if length else [])]
        kinds += [Split(axis, parts=p) for p in range(1, length + 1) if length % p == 0]
    if len(set(given)) == 1:
        kinds.append(Stack(draw(st.integers(0, len(given[0])))))
    for axis in range(len(given[0])):
        if (
            len({(*s[:axis], *s[axis + 1 :]) for s in given if len(s) > axis}) == 1
            and len({len(s) for s in given}) == 1
        ):
            kinds.append(Concat(axis, sizes=tuple(s[axis] for s in given)))
    which = draw(st.sets(st.integers(0, len(given) - 1), min_size=1))
    kinds.append(Each({k: draw(single_steps(given[k])) for k in which}))
    if len(given) == 1:
        kinds.append(draw(single_steps(given[0])))
    return draw(st.sampled_from(kinds))


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Shape], tuple[Operation, ...]]:
    """Shapes of one to three arrays, and a chain over them that loses nothing."""
    start = draw(st.lists(shapes, min_size=1, max_size=3))
    if draw(st.booleans()):
        start = [start[0]] * len(start)
    given, ops = start, []
    for _ in range(draw(st.integers(0, 4))):
        op = draw(steps(given))
        ops.append(op)
        given = op.shapes(given)
    return start, tuple(ops)


#: names as files have them, and as nobody wants them
names = st.one_of(
    st.from_regex(r"[a-z]{1,6}(\.([a-z]{1,6}|[0-9]{1,2})){0,3}", fullmatch=True),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=12),
    st.sampled_from(
        ["null", "true", "1e3", "0x1f", "~", "- a", "{i}.weight", "a: b", "#", "12:30", "007.1", "\x85", "=", "<<"]
    ),
)


@st.composite
def correspondences(draw: st.DrawFn) -> tuple[list[Match], list[str], list[str]]:
    """Matches between two families of numbered names, and all names of both sides (some without a match)."""
    pairs = draw(
        st.lists(
            st.tuples(st.integers(0, 6), st.integers(0, 3), st.sampled_from(["q", "k"]), st.booleans()),
            max_size=24,
            unique=True,
        )
    )
    make = draw(
        st.sampled_from(
            [
                lambda i, j, w: (f"layers.{i}.{w}.{j}", f"h.{i}.{j}.{w}"),
                lambda i, j, w: (f"b.{4 * i + j + 1}.{w}", f"down.{i}.res.{j}.{w}"),
                lambda i, j, w: (f"down.{i}.res.{j}.{w}", f"b.{4 * i + j}.{w}"),
                lambda i, j, w: (f"x.{(5 * i + 3 * j) % 29}.{w}.{j}.{i * j}", f"y.{i}.{j}.{w}1"),
                lambda i, j, w: (f"x.{10 - i}.{w}{j}", f"y.{i + 1}.{w}{j}"),
            ]
        )
    )
    turned = Rearrange("a b -> b a")
    matches: list[Match] = []
    sources: list[str] = []
    targets: list[str] = []
    for i, j, word, matched in pairs:
        target, source = make(i, j, word)
        targets.append(target)
        sources.append(source)
        if matched and target not in {m.targets[0] for m in matches}:
            matches.append(Match((target,), (source,), (turned,) if word == "q" else ()))
    return matches, sources, targets
