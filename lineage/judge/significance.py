"""Exact tests of "A and B were trained independently" on every axis whose units carry no meaning in their index.

Units are matched by what they hold, then counted: how many found their own index, how many kept their order. Every
axis brings its negative control (the same test between mispaired layers); where that fires, the axis is void.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge import laws
from lineage.judge.axes import FEWEST_UNITS, Axis, Block, channel_axes, hidden_axes, matrices, template
from lineage.judge.common import Common
from lineage.judge.groups import expert_axes, head_axes, reordered
from lineage.judge.outputs import chain_axes, recurrent_axes
from lineage.judge.sampling import Frame, Units, load_groups, load_units, token_frames
from lineage.match.units import Assignment, likeness, pair_units

__all__ = ["AxisTest", "Significance", "significance"]

Floats = NDArray[np.floating[Any]]
#: log10 p of what was counted in independent blocks, corrected for so many tries (log10)
Law = Callable[[Sequence["Counted"], float], float]

#: units of one block that are compared at most (a matching of 512 units takes 10 ms) and units of all blocks of an
#: axis together; the budget of a caller (`rows`) is a floor under the share of a block
MOST_UNITS, ALL_UNITS = 512, 2048
#: blocks of one axis that are tested at most
MOST_BLOCKS = 32
#: units of a block that take part in its negative controls
CONTROL_UNITS = 96
#: log10 of the chance at which a negative control fires: once in 1,000 axes by accident, while an axis that is bound
#: to its index fires at about the p-value that it would fake
FIRES = -3.0
#: mean cosine of two layers of one model, unit by unit, above which they count as clones of each other (copied when
#: the model was grown): independent layers stay within 0.03
CLONES = 0.2
#: fixed points and order are two tests
TESTS = math.log10(2)
#: effect size: where likeness stands between its floor (0, mispaired layers) and equality (1), units agree for
#: another reason than shared statistics. Zoo: strangers -0.1 to 0.05, disguised copies 0.79 to 1, siblings of one
#: initialisation 0.12
STANDS_OUT = 0.5
#: where neurons or channels already show this much, heads and experts are not read, and neurons not seen through the
#: token frame; the correction counts them anyway
ENOUGH = -12.0
#: families of tests of which the best one counts: neurons, channels, neurons through the token frame, heads, experts,
#: neurons of experts that the router pairs
FAMILIES = math.log10(6)


class Counted(msgspec.Struct, frozen=True):
    """What one matching of two blocks gave.

    Attributes
    ----------
    matched, places : units matched, and indices in all
    fixed, ordered : units at their own index, and the longest run that kept its order
    likeness : mean likeness of the units at their own index
    paired : mean likeness of all matched units
    shown : mean likeness, in what took no part in the matching, of units matched by their first part; None where
        there is one part only
    """

    matched: int
    places: int
    fixed: int
    ordered: int
    likeness: float
    paired: float
    shown: float | None = None


class AxisTest(msgspec.Struct, frozen=True, kw_only=True):
    """The exact test on one axis.

    Attributes
    ----------
    axis : where the units stand, for people
    kind : `hidden`, `channels`, `outputs`, `heads` or `experts`
    frame : `""` as the features stand, `tokens` seen through the embeddings
    blocks : layers tested
    units : units matched
    fixed : units matched to their own index; chance gives about one a block
    ordered : length of the longest runs that kept their order, summed
    likeness : mean likeness of the units that were matched to themselves, 0 to 1
    log10_p : after the correction for the tests and pairings tried on this axis
    control : log10 of the chance of what mispaired layers gave; None where there are none to mispair
    control_fixed, control_units : their count and their units
    shown, floor : effect size: likeness of matched units in what took no part in their matching, and the greatest
        one between mispaired layers; None where it cannot be had. Never a p-value
    paired : mean likeness of all matched units
    void : why the axis counts for nothing, "" where it counts
    each : fixed points and units by block, for reasons
    """

    axis: str
    kind: str
    frame: str = ""
    blocks: int
    units: int
    fixed: int
    ordered: int
    likeness: float
    log10_p: float
    control: float | None = None
    control_fixed: int = 0
    control_units: int = 0
    shown: float | None = None
    floor: float | None = None
    paired: float = 0.0
    void: str = ""
    each: tuple[tuple[str, int, int], ...] = ()

    @property
    def stands_out(self) -> bool:
        """True where units agree, in what took no part in matching them, far beyond mispaired layers."""
        if self.shown is None or self.floor is None:
            return False
        return self.shown - self.floor > STANDS_OUT * (1 - self.floor)


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


def significance(
    common: Common,
    bound: Callable[[str], bool],
    *,
    seed: int,
    rows: int,
    units: int = ALL_UNITS,
    blocks: int = MOST_BLOCKS,
) -> Significance:
    """The exact p-value of "trained independently", and the tests it is made of.

    Parameters
    ----------
    common : both checkpoints in one layout
    bound : says of a tensor's name whether its axes are bound to an index
    seed : of the sampled units and of the shuffles that break ties
    rows : units a layer that are compared at least
    units, blocks : units of all layers of an axis together, and layers, that are compared

    Notes
    -----
    Hidden axes of all kinds and layers have labels of their own, so their laws are convolved; where features as
    they stand show nothing, the same units are seen through the embeddings (channels may have been permuted,
    flipped, rotated or cut). Channels, and what a layer puts out, may share labels between tensors: the best of
    their tests counts, corrected for their number. Heads and experts have labels of their own in every layer, too,
    but a disguise moves one kind and leaves the other, so they are families of their own and not summed with
    neurons, which would drown them. The best one of all families is the answer, corrected for their number
    (Bonferroni holds however they depend).

    Heads of strangers are exchangeable unless slopes or windows go by their index, or one table of biases names the
    heads of all layers: there, mispaired layers agree as well, and the axis is void.
    """
    found, others = matrices(common.shapes)
    names = lambda name: any(bound(side) for side in common.names(name))  # noqa: E731
    hidden = hidden_axes(found, others, names)
    share = {"rows": rows, "units": units, "blocks": blocks}
    tests, plain = _family(common, hidden, None, seed=seed, **share)
    open_axes = [*channel_axes(found, hidden, names), *recurrent_axes(found, names)]
    if not hidden:  # chains stand where nothing else does
        open_axes += chain_axes(found, others, names)
    shown = [test for axis in open_axes if (test := _channels(common, axis, seed=seed)) is not None]
    tests += _void_together(shown)
    families = [] if plain is None else [plain]
    valid = [test for test in tests if test.kind in ("channels", "outputs") and not test.void]
    if valid:
        families.append(laws.corrected(min(t.log10_p for t in valid), math.log10(len(valid))))
    if hidden and (plain is None or plain > ENOUGH):
        frames = token_frames(common, found, seed=seed)
        seen, through = _family(common, hidden, frames, seed=seed, **share) if frames else ([], None)
        tests += seen
        families += [] if through is None else [through]
    if min(families, default=0.0) > ENOUGH:
        experts = expert_axes(found, hidden)
        few = {"seed": seed, "blocks": blocks}
        for axes in (head_axes(common.shapes, names), experts):
            seen, through = _family(common, axes, None, rows=1, units=1, **few)
            tests += seen
            families += [] if through is None else [through]
        moved = reordered(hidden, _orders(common, experts, seed=seed))
        seen, through = _family(common, moved, None, seed=seed, **share)
        tests += seen
        families += [] if through is None else [through]
    if not families:
        return Significance(tuple(tests), None)
    return Significance(tuple(tests), laws.corrected(min(families), FAMILIES))


def _orders(common: Common, experts: Sequence[Axis], *, seed: int) -> dict[tuple[str, ...], dict[int, int]]:
    """A's expert for each of B's, as the routers pair them, by layer; layers where none moved are left out.

    No neuron takes part, so the neurons' labels in the experts paired stay what chance dealt.
    """
    orders = {}
    for block in (block for axis in experts for block in axis.blocks):
        loaded = load_groups(common, block, seed=seed)
        if loaded is None:
            continue
        one, two = loaded
        found = pair_units(likeness(one.parts, two.parts)[0], seed=seed)
        order = dict(zip(two.labels[found.b].tolist(), one.labels[found.a].tolist(), strict=True))
        if any(its != mine for its, mine in order.items()):
            first = next(at for at, part in enumerate(block.path) if any(ch.isdigit() for ch in part))
            orders[block.path[: first + 1]] = order
    return orders


def _family(
    common: Common,
    axes: Sequence[Axis],
    frames: Mapping[tuple[int, int], Frame] | None,
    *,
    seed: int,
    **share: int,
) -> tuple[list[AxisTest], float | None]:
    """The tests on hidden axes in one frame, and the p-value of all their blocks together."""
    tests: list[AxisTest] = []
    counted: list[Counted] = []
    tries = 0.0
    for axis in axes:
        found = _hidden(common, axis, frames, seed=seed, **share)
        if found is not None:
            test, counts, log10_pairings = found
            tests.append(test)
            if not test.void:
                counted += counts
                tries += log10_pairings
    law = _grouped_together if axes and axes[0].kind == "experts" else _together
    return tests, law(counted, tries) if counted else None


def _hidden(
    common: Common,
    axis: Axis,
    frames: Mapping[tuple[int, int], Frame] | None,
    *,
    seed: int,
    rows: int,
    units: int,
    blocks: int,
) -> tuple[AxisTest, list[Counted], float] | None:
    """The test on an axis of blocks, its counts by block, and log10 of the pairings that may have been tried."""
    grouped = axis.kind in ("heads", "experts")
    chosen = _once(common, axis.blocks)[: len(axis.blocks) if grouped else blocks]
    share = min(MOST_UNITS, max(rows, units // max(1, len(chosen))))
    loaded: list[tuple[Block, Units, Units]] = []
    void = ""
    for block in chosen:
        pair: tuple[Units, Units] | str | None
        if grouped:
            pair = load_groups(common, block, seed=seed)
        else:
            pair = load_units(common, block, share, seed=seed, frames=frames)
        if isinstance(pair, str):
            void = void or pair
        elif pair is not None:
            loaded.append((block, *pair))
    kept = _unalike(loaded)
    if not kept:
        return _nothing(axis, void, frames is not None) if void else None
    counts = [_count(one, two, seed + at) for at, (_, one, two) in enumerate(kept)]
    tries = _log10_pairings(common, axis, [block for block, _, _ in kept])
    law = _grouped_together if axis.kind == "experts" else _together
    control, mispaired = _control(kept, law, seed=seed, fewest=2 if grouped else FEWEST_UNITS)
    fixed, mismatched = sum(c.fixed for c in mispaired), sum(c.matched for c in mispaired)
    if not void and control is not None and control < FIRES:
        void = f"mispaired layers agree on {fixed} of {mismatched} units: the index itself carries meaning"
    if not void and control is None and len(kept) < len(loaded):
        void = "all layers are alike, so nothing shows that the index carries no meaning"
    at_home = [c.likeness for c in counts if c.fixed]
    shown = [c.shown for c in counts if c.shown is not None]
    floor = [c.shown for c in mispaired if c.shown is not None]
    return AxisTest(
        axis=axis.title, kind=axis.kind, frame="" if frames is None else "tokens", blocks=len(counts),
        units=sum(c.matched for c in counts), fixed=sum(c.fixed for c in counts),
        ordered=sum(c.ordered for c in counts),
        likeness=float(np.mean(at_home)) if at_home else 0.0, log10_p=law(counts, tries),
        control=control, control_fixed=fixed, control_units=mismatched,
        shown=float(np.mean(shown)) if shown else None, floor=max(floor) if floor else None,
        paired=float(np.mean([c.paired for c in counts])), void=void,
        each=tuple((".".join(block.path), c.fixed, c.matched) for (block, _, _), c in zip(kept, counts, strict=True)),
    ), counts, tries  # fmt: skip


def _nothing(axis: Axis, void: str, through: bool) -> tuple[AxisTest, list[Counted], float]:
    """The record of an axis of which nothing could be tested."""
    test = AxisTest(
        axis=axis.title, kind=axis.kind, frame="tokens" if through else "", blocks=0, units=0, fixed=0, ordered=0,
        likeness=0.0, log10_p=0.0, void=void,
    )  # fmt: skip
    return test, [], 0.0


def _channels(common: Common, axis: Axis, *, seed: int) -> AxisTest | None:
    """The best test on channels, or on what a layer puts out: one a matrix, since all of them may share their labels.

    There is no negative control: every matrix of a network shares the labels of its channels, so no two of A and B
    could be mispaired whose labels must not agree; a layer's outputs are seen in two matrices. Instead the matrices
    are searched for what binds channels to their index: an identity, sinusoids, banks of filters, signs; any one
    voids the axis. Sizes of channels need no guard: likeness does not see them.
    """
    best: tuple[float, Counted, Block] | None = None
    void, tried = "", 0
    for block in axis.blocks:
        loaded = load_units(common, block, MOST_UNITS, seed=seed, controlled=False)
        if isinstance(loaded, str):
            void = void or loaded
        elif loaded is not None:
            tried += 1
            count = _count(*loaded, seed)
            if axis.gates > 1:
                p = laws.log10_fixed_points_in_parts(count.fixed, axis.gates)
            elif block.members[0].matrix.kernel > 1:
                p = laws.log10_fixed_points_in_groups(count.fixed)
            else:
                p = _together([count], 0.0)
            if best is None or p < best[0]:
                best = p, count, block
    if best is None:
        return _nothing(axis, void, False)[0] if void else None
    p, count, block = best
    return AxisTest(
        axis=f"{axis.title} in {template(block.path)}", kind=axis.kind, blocks=1, units=count.matched,
        fixed=count.fixed, ordered=count.ordered, likeness=count.likeness, log10_p=laws.corrected(p, math.log10(tried)),
        paired=count.paired, void=void, each=((".".join(block.path), count.fixed, count.matched),),
    )  # fmt: skip


def _void_together(tests: Sequence[AxisTest]) -> list[AxisTest]:
    """The tests; one table in a chain of layers binds what all of them put out."""
    why = next((t.void for t in tests if t.kind == "outputs" and t.void), "")
    return [msgspec.structs.replace(t, void=why) if why and t.kind == "outputs" else t for t in tests]


def _together(counts: Sequence[Counted], log10_tries: float) -> float:
    """log10 p of independent blocks: the better one of fixed points and order, corrected."""
    fixed = laws.log10_fixed_points_together([(c.matched, c.places) for c in counts], sum(c.fixed for c in counts))
    order = laws.log10_orders_kept_together([c.matched for c in counts], sum(c.ordered for c in counts))
    return laws.corrected(min(fixed, order), log10_tries + TESTS)


def _grouped_together(counts: Sequence[Counted], log10_tries: float) -> float:
    """log10 p of independent blocks of experts: fixed points only, since experts may be routed by groups."""
    bound = laws.log10_fixed_points_in_equal_groups([c.places for c in counts], sum(c.fixed for c in counts))
    return laws.corrected(bound, log10_tries)


def _count(a: Units, b: Units, seed: int) -> Counted:
    """Matches two blocks and counts."""
    parts = likeness(a.parts, b.parts)
    found: Assignment = pair_units(sum(parts[1:], parts[0]) / len(parts), seed=seed)
    labels_a, labels_b = a.labels[found.a], b.labels[found.b]
    home = labels_a == labels_b
    run = laws.longest_increasing(labels_b[np.argsort(labels_a)])
    alike = float(found.likeness[home].mean()) if home.any() else 0.0
    shown = None
    if len(parts) > 1:
        by_first = pair_units(parts[0], seed=seed)
        shown = float(np.mean([part[by_first.a, by_first.b].mean() for part in parts[1:]]))
    places = max(a.total, b.total, len(home))
    return Counted(len(home), places, int(home.sum()), run, alike, float(found.likeness.mean()), shown)


def _control(
    kept: Sequence[tuple[Block, Units, Units]], law: Law, *, seed: int, fewest: int
) -> tuple[float | None, list[Counted]]:
    """What layers of A give with the next layer of B, and with the next of A: the smaller log10 p, and its counts."""
    results: list[tuple[float, list[Counted]]] = []
    for inside in (False, True) if len(kept) > 1 else ():
        counts = []
        for at, (_, one, _) in enumerate(kept):
            _, next_a, next_b = kept[(at + 1) % len(kept)]
            pair = one.first(CONTROL_UNITS), (next_a if inside else next_b).first(CONTROL_UNITS)
            widths = [[part.shape[1] for part in units.parts] for units in pair]
            if widths[0] == widths[1] and min(len(units.labels) for units in pair) >= fewest:
                counts.append(_count(*pair, seed + at))
        if counts:
            results.append((law(counts, TESTS), counts))
    return min(results, key=lambda result: result[0]) if results else (None, [])


def _once(common: Common, blocks: Iterable[Block]) -> list[Block]:
    """Each block of A and of B at most once: a layer that was copied twice proves its origin once."""
    seen_a: set[tuple[str, ...]] = set()
    seen_b: set[tuple[str, ...]] = set()
    kept = []
    for block in blocks:
        key_a, key_b = (
            tuple(sorted(f"{common.place(m.of(side), side)} {m.start}" for m in block.members)) for side in (0, 1)
        )
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
    shifts: dict[int, set[int]] = defaultdict(set)
    values: dict[int, set[int]] = defaultdict(set)
    for block in axis.blocks:
        one, two = (_numbers(name) for name in common.names(block.members[0].matrix.name))
        for place, (mine, its) in enumerate(zip(one, two, strict=False)):
            values[place].add(mine)
            shifts[place].add(mine - its)
    # layers, or experts, that do not all move alike were paired one by one
    moved = sum(math.log10(max(2, len(values[place]))) for place, found in shifts.items() if len(found) > 1)
    return swaps + len(blocks) * moved


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.replace("/", ".").split(".") if part.isdigit())
