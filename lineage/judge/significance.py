"""Exact tests of "A and B were trained independently" on every axis whose units carry no meaning in their index.

Units are matched by what they hold, then counted: how many found their own index, how many kept their order. Every
axis brings its negative control (the same test between mispaired layers); where that fires, the axis is void.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge import laws
from lineage.judge.axes import FEWEST_UNITS, Axis, Block, Member, channel_axes, hidden_axes, matrices, template
from lineage.judge.common import Common, features_of, read_units
from lineage.judge.tables import diagonal, sinusoidal
from lineage.match.units import Assignment, likeness, normalised, pair_units

__all__ = ["AxisTest", "Significance", "Units", "significance"]

Floats = NDArray[np.floating[Any]]

#: units of one block that are compared at most (a matching of 512 units takes 10 ms) and units of all blocks of an
#: axis together; the budget of a caller (`rows`) is a floor under the share of a block
MOST_UNITS, ALL_UNITS = 512, 4096
#: blocks of one axis that are tested at most
MOST_BLOCKS = 32
#: units of a block that take part in its negative controls
CONTROL_UNITS = 128
#: log10 of the chance at which a negative control fires: once in 1,000 axes by accident, while an axis that is bound
#: to its index fires at about the p-value that it would fake
FIRES = -3.0
#: mean cosine of two layers of one model, unit by unit, above which they count as clones of each other (copied when
#: the model was grown): independent layers stay within 0.03
CLONES = 0.2
#: fixed points and order are two tests
TESTS = math.log10(2)


class Units(msgspec.Struct, frozen=True):
    """The sampled units of one block on one side.

    Attributes
    ----------
    parts : (units, features) a member, normalised
    labels : index of each unit; units that are dead or equal to another are left out
    total : indices that were sampled
    """

    parts: tuple[Floats, ...]
    labels: NDArray[np.intp]
    total: int

    def first(self, most: int) -> Units:
        """The units whose labels lie below `most`."""
        kept = self.labels < most
        return Units(tuple(part[kept] for part in self.parts), self.labels[kept], min(self.total, most))


class Counted(msgspec.Struct, frozen=True):
    """What one matching of two blocks gave: matched units, their places, fixed points, longest ordered run."""

    matched: int
    places: int
    fixed: int
    ordered: int
    likeness: float


class AxisTest(msgspec.Struct, frozen=True, kw_only=True):
    """The exact test on one axis.

    Attributes
    ----------
    axis : where the units stand, for people
    kind : `hidden` or `channels`
    blocks : layers tested
    units : units matched
    fixed : units matched to their own index; chance gives about one a block
    ordered : length of the longest runs that kept their order, summed
    likeness : mean likeness of the units that were matched to themselves, 0 to 1
    log10_p : after the correction for the tests and pairings tried on this axis
    control : log10 of the chance of what mispaired layers gave; None where there are none to mispair
    control_fixed, control_units : their count and their units
    void : why the axis counts for nothing, "" where it counts
    each : fixed points and units by block, for reasons
    """

    axis: str
    kind: str
    blocks: int
    units: int
    fixed: int
    ordered: int
    likeness: float
    log10_p: float
    control: float | None = None
    control_fixed: int = 0
    control_units: int = 0
    void: str = ""
    each: tuple[tuple[str, int, int], ...] = ()


class Significance(msgspec.Struct, frozen=True):
    """All tests and what they give together.

    Attributes
    ----------
    tests : the tests, void ones too
    log10_p : corrected for everything tried; None where no axis is left to test
    """

    tests: tuple[AxisTest, ...]
    log10_p: float | None

    @property
    def valid(self) -> list[AxisTest]:
        """The tests that count."""
        return [test for test in self.tests if not test.void]


def significance(common: Common, bound: Callable[[str], bool], *, seed: int, rows: int) -> Significance:
    """The exact p-value of "trained independently", and the tests it is made of.

    Parameters
    ----------
    common : both checkpoints in one layout
    bound : says of a tensor's name whether its axes are bound to an index
    seed : of the sampled units and of the shuffles that break ties
    rows : units a layer that are compared at least

    Notes
    -----
    Hidden axes of all kinds and layers have labels of their own, so their laws are convolved. Channels may share
    labels between tensors: the best of their tests counts, corrected for their number. The better one of the two
    families is the answer, corrected again.
    """
    found, others = matrices(common.shapes)
    names = lambda name: any(bound(side) for side in common.names(name))  # noqa: E731
    hidden = hidden_axes(found, others, names)
    tests: list[AxisTest] = []
    counted: list[tuple[Counted, float]] = []
    for axis in hidden:
        test, counts, tries = _hidden(common, axis, seed=seed, rows=rows)
        tests += [test] if test is not None else []
        if test is not None and not test.void:
            counted += [(count, tries / len(counts)) for count in counts]
    channels = [_channels(common, axis, seed=seed) for axis in channel_axes(found, hidden, names)]
    tests += [test for test in channels if test is not None]
    families = [_together([c for c, _ in counted], sum(t for _, t in counted))] if counted else []
    valid = [test for test in tests if test.kind == "channels" and not test.void]
    if valid:
        families.append(laws.corrected(min(t.log10_p for t in valid), math.log10(len(valid))))
    if not families:
        return Significance(tuple(tests), None)
    return Significance(tuple(tests), laws.corrected(min(families), math.log10(len(families))))


def _hidden(common: Common, axis: Axis, *, seed: int, rows: int) -> tuple[AxisTest | None, list[Counted], float]:
    """The test on a hidden axis, its counts by block, and log10 of the pairings that may have been tried."""
    blocks = _once(common, axis.blocks)[:MOST_BLOCKS]
    share = min(MOST_UNITS, max(rows, ALL_UNITS // max(1, len(blocks))))
    loaded: list[tuple[Block, Units, Units]] = []
    void = ""
    for block in blocks:
        pair = _load(common, block, share, seed)
        if isinstance(pair, str):
            void = void or pair
        elif pair is not None:
            loaded.append((block, *pair))
    kept = _unalike(loaded)
    if not kept:
        return None, [], 0.0
    counts = [_count(one, two, seed + at) for at, (_, one, two) in enumerate(kept)]
    tries = _log10_pairings(common, axis, [block for block, _, _ in kept])
    control, control_fixed, control_units = _control(kept, clones=len(loaded) - len(kept), seed=seed)
    if not void and control is not None and control < FIRES:
        void = f"mispaired layers agree on {control_fixed} of {control_units} units: the index itself carries meaning"
    if not void and control is None and len(kept) < len(loaded):
        void = "all layers are alike, so nothing shows that the index carries no meaning"
    at_home = [c.likeness for c in counts if c.fixed]
    return AxisTest(
        axis=axis.title, kind="hidden", blocks=len(counts),
        units=sum(c.matched for c in counts), fixed=sum(c.fixed for c in counts), ordered=sum(c.ordered for c in counts),
        likeness=float(np.mean(at_home)) if at_home else 0.0, log10_p=_together(counts, tries),
        control=control, control_fixed=control_fixed, control_units=control_units, void=void,
        each=tuple((".".join(block.path), c.fixed, c.matched) for (block, _, _), c in zip(kept, counts, strict=True)),
    ), counts, tries  # fmt: skip


def _channels(common: Common, axis: Axis, *, seed: int) -> AxisTest | None:
    """The best test on channels: one a matrix, since all of them may share their labels."""
    best: tuple[float, Counted, Block] | None = None
    void, tried = "", 0
    for block in axis.blocks:
        loaded = _load(common, block, MOST_UNITS, seed)
        if isinstance(loaded, str):
            void = void or loaded
        elif loaded is not None:
            tried += 1
            count = _count(*loaded, seed)
            grouped = block.members[0].matrix.kernel > 1
            p = laws.log10_fixed_points_in_groups(count.fixed) if grouped else _together([count], 0.0)
            if best is None or p < best[0]:
                best = p, count, block
    if best is None:
        return None
    p, count, block = best
    return AxisTest(
        axis=f"{axis.title} in {template(block.path)}", kind="channels", blocks=1, units=count.matched,
        fixed=count.fixed, ordered=count.ordered, likeness=count.likeness, log10_p=laws.corrected(p, math.log10(tried)),
        void=void, each=((".".join(block.path), count.fixed, count.matched),),
    )  # fmt: skip


def _together(counts: Sequence[Counted], log10_tries: float) -> float:
    """log10 p of independent blocks: the better one of fixed points and order, corrected."""
    fixed = laws.log10_fixed_points_together([(c.matched, c.places) for c in counts], sum(c.fixed for c in counts))
    order = laws.log10_orders_kept_together([c.matched for c in counts], sum(c.ordered for c in counts))
    return laws.corrected(min(fixed, order), log10_tries + TESTS)


def _count(a: Units, b: Units, seed: int) -> Counted:
    """Matches two blocks and counts."""
    if not len(a.labels) or not len(b.labels):
        return Counted(0, 0, 0, 0, 0.0)
    found: Assignment = pair_units(likeness(a.parts, b.parts), seed=seed)
    labels_a, labels_b = a.labels[found.a], b.labels[found.b]
    home = labels_a == labels_b
    run = laws.longest_increasing(labels_b[np.argsort(labels_a)])
    alike = float(found.likeness[home].mean()) if home.any() else 0.0
    return Counted(len(home), max(a.total, b.total, len(home)), int(home.sum()), run, alike)


def _control(
    kept: Sequence[tuple[Block, Units, Units]], *, clones: int, seed: int
) -> tuple[float | None, int, int]:
    """What layers of A give with the next layer of B, and with the next of A: log10 p, fixed points, units."""
    if len(kept) < 2:
        return None, 0, 0
    results: list[tuple[float, int, int]] = []
    for inside in (False, True):
        counts = []
        for at, (_, one, _) in enumerate(kept):
            _, next_a, next_b = kept[(at + 1) % len(kept)]
            other = next_a if inside else next_b
            if [p.shape[1] for p in one.parts] == [p.shape[1] for p in other.parts]:
                counts.append(_count(one.first(CONTROL_UNITS), other.first(CONTROL_UNITS), seed + at))
        counts = [c for c in counts if c.matched >= FEWEST_UNITS]
        if counts:
            results.append((_together(counts, TESTS), sum(c.fixed for c in counts), sum(c.matched for c in counts)))
    return min(results) if results else (None, 0, 0)


def _load(common: Common, block: Block, share: int, seed: int) -> tuple[Units, Units] | str | None:
    """The sampled units of a block on both sides; why the block is void; or None where nothing can be compared."""
    rng = np.random.default_rng([seed, block.a, block.b])
    window = _window(block, share, rng)
    sides: tuple[list[Floats], list[Floats]] = ([], [])
    for member in sorted(block.members, key=lambda m: (m.side, template(m.matrix.path))):
        lengths = (member.matrix.a[1 - member.side], member.matrix.b[1 - member.side])
        if lengths[0] != lengths[1] and any(part.isdigit() for part in member.matrix.path):
            continue  # channels were cut: nothing says which feature is which
        shared = min(lengths)
        features = features_of(member, {1 - member.side: shared, member.side: block.b}, rng)
        if features is None and lengths[0] != lengths[1]:
            features = np.arange(shared)
        for side, parts, length in ((common.a, sides[0], block.a), (common.b, sides[1], block.b)):
            units = read_units(side, member, window, length=length, features=features)
            if _bound_table(units, member, whole=window.stop - window.start == length and features is None):
                return f"{member.matrix.name} holds a table that anyone computes alike"
            parts.append(units)
    if not sides[0]:
        return None
    one, two = (_alive(parts, window.stop - window.start) for parts in sides)
    if min(len(one.labels), len(two.labels)) < FEWEST_UNITS:
        return None
    return one, two


def _bound_table(units: Floats, member: Member, *, whole: bool) -> bool:
    """True where the units are written by rule, not by training."""
    if whole and units.ndim == 2 and diagonal(units):
        return True
    return member.matrix.kernel == 1 and not any(p.isdigit() for p in member.matrix.path) and sinusoidal(units.T)


def _window(block: Block, share: int, rng: np.random.Generator) -> slice:
    """Neighbouring units that are sampled on both sides; all of them where the sides' lengths differ."""
    if block.a != block.b:
        return slice(0, max(block.a, block.b))
    wanted = min(block.a, share)
    start = int(rng.integers(0, block.a - wanted + 1))
    return slice(start, start + wanted)


def _alive(parts: Sequence[Floats], total: int) -> Units:
    """Normalised units without those that are dead or equal to another one."""
    length = len(parts[0])
    made = [normalised(part) for part in parts]
    alive = np.ones(length, bool)
    rng = np.random.default_rng(0)
    prints = np.zeros(length)
    for part, raw in zip(made, parts, strict=True):
        alive &= np.abs(part).max(axis=1, initial=0.0) > 0
        prints += np.nan_to_num(raw).astype(np.float64) @ rng.standard_normal(raw.shape[1])
    _, inverse, times = np.unique(prints, return_inverse=True, return_counts=True)
    alive &= times[inverse] == 1
    return Units(tuple(part[alive] for part in made), np.flatnonzero(alive), max(total, length))


def _once(common: Common, blocks: Iterable[Block]) -> list[Block]:
    """Each block of A and of B at most once: a layer that was copied twice proves its origin once."""
    seen_a: set[tuple[str, ...]] = set()
    seen_b: set[tuple[str, ...]] = set()
    kept = []
    for block in blocks:
        names = [common.names(m.matrix.name) for m in block.members]
        places = [str(m.matrix.index) for m in block.members]
        key_a, key_b = (tuple(sorted(n[side] + p for n, p in zip(names, places, strict=True))) for side in (0, 1))
        if key_a not in seen_a and key_b not in seen_b:
            kept.append(block)
            seen_a.add(key_a)
            seen_b.add(key_b)
    return kept


def _unalike(loaded: Sequence[tuple[Block, Units, Units]]) -> list[tuple[Block, Units, Units]]:
    """One block of each family of clones, on both sides: the others' labels are not independent."""
    if len(loaded) < 2:
        return list(loaded)
    alike = np.maximum(_cosines([one for _, one, _ in loaded]), _cosines([two for _, _, two in loaded]))
    kept: list[int] = []
    for at in range(len(loaded)):
        if all(alike[at, other] < CLONES for other in kept):
            kept.append(at)
    return [loaded[at] for at in kept]


def _cosines(blocks: Sequence[Units]) -> Floats:
    """Mean cosine of every two blocks of one side, unit by unit; 0 where they cannot be compared."""
    prints = []
    widths = {tuple(part.shape[1] for part in block.parts) for block in blocks}
    total = max(block.total for block in blocks)
    if len(widths) != 1:
        return np.zeros((len(blocks), len(blocks)))
    for block in blocks:
        whole = np.zeros((min(total, 64), sum(min(w, 64) for w in next(iter(widths)))), np.float32)
        few = block.labels < len(whole)
        whole[block.labels[few]] = np.concatenate([part[few, :64] for part in block.parts], axis=1)
        flat = whole.reshape(-1)
        prints.append(flat / max(float(np.linalg.norm(flat)), 1e-30))
    stacked = np.stack(prints)
    return np.asarray(stacked @ stacked.T)


def _log10_pairings(common: Common, axis: Axis, blocks: Sequence[Block]) -> float:
    """log10 of how many ways of pairing layers, and tensors inside a layer, the mapping may have chosen from."""
    swaps = 0.0
    for block in blocks:
        alike: dict[tuple[int, ...], int] = {}
        for member in block.members:
            key = (member.side, *member.matrix.b)
            alike[key] = alike.get(key, 0) + 1
        swaps += sum(math.lgamma(n + 1) for n in alike.values()) / laws.LN10
    shifts = set()
    for block in blocks:
        first_a, first_b = (_numbers(name) for name in common.names(block.members[0].matrix.name))
        shifts |= {one - two for one, two in zip(first_a[:1], first_b[:1], strict=False)}
    layers = {_numbers(common.names(block.members[0].matrix.name)[0])[:1] for block in axis.blocks}
    moved = len(blocks) * math.log10(max(2, len(layers))) if len(shifts) > 1 else 0.0
    return swaps + moved


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.replace("/", ".").split(".") if part.isdigit())
