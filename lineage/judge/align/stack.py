"""One stack of layers aligned: the residual space first, then what lives inside each layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.anatomy import Anatomy, Attention, Layer, Mlp, Part
from lineage.judge.align.choice import better, holds, simplest
from lineage.judge.align.gate import first_look
from lineage.judge.align.heads import Block, Heads, agreement, choose_families, fit_heads, head_sizes, likely_size
from lineage.judge.align.neurons import Hidden, fit_hidden, match_units
from lineage.judge.align.records import Shown
from lineage.judge.align.residual import Frame, candidates, frame, order_of, rotation_of
from lineage.judge.align.turns import Turn
from lineage.judge.align.weights import Weights, cosine, moments, unit_cosines
from lineage.match.spread import spread

__all__ = ["LayerFit", "StackFit", "fit_stack"]

Floats = NDArray[np.floating[Any]]
Sides = tuple[Floats, Floats]

#: layers that choose the families of transforms (fewer of large models); pairs of different layers for the floor
PROBES, FEW_PROBES, MISPAIRED = 4, 2, 3
#: channels from which decompositions cost seconds: there a first look comes before, and what explains half is enough
LARGE = 512
#: units of B from which on every second, third, ... one chooses the norm that it reads through
SAMPLED = 1024
#: cosine of a first look below which nothing is fitted. Strangers reach 0.01 to 0.36, a base trained on for three times
#: its own steps 0.38 and 0.40, other relatives 0.8 and more (zoo)
LEAST_LOOK = 0.3
#: cosine on what took no part from which no freer family is tried, and the same for large models
ENOUGH, ENOUGH_LARGE = 0.99, 0.5


class LayerFit(msgspec.Struct, frozen=True):
    """What was fitted in one layer: one transform an MLP and an attention block, and cosines by tensor after it."""

    layer: Layer
    mlps: tuple[Hidden, ...]
    attentions: tuple[Heads, ...]
    cosines: dict[str, float]

    @property
    def shown(self) -> list[Shown]:
        """What took no part in the fits."""
        found = []
        for mlp, fit in zip(self.layer.mlps, self.mlps, strict=False):
            found.append(Shown(mlp.writers[0].name, fit.matched, mlp.units[1]))
        for block, heads in zip(self.layer.attentions, self.attentions, strict=False):
            found.append(Shown(block.query.name, heads.shown_query, block.query.units[1]))
            found.append(Shown(block.out.name, heads.shown_out, block.out.units[1]))
        return found


class StackFit(msgspec.Struct, frozen=True, kw_only=True):
    """A stack with everything that was fitted.

    Attributes
    ----------
    residual : the transform of the residual space, and its family
    outside : the same fitted on tensors outside the layers alone
    fitted_on : tensors that it was fitted on
    norms : for `mlp` and `attention`: which of a layer's gains their readers read through, None for none
    folded : whether gains have to be moved between norms and readers
    size, families : of the attention blocks; None where there are none
    layers : their fits; empty where nothing holds
    """

    anatomy: Anatomy
    residual: Turn
    outside: Turn
    family: str
    fitted_on: tuple[str, ...]
    norms: dict[str, int | None]
    folded: bool
    size: int | None
    families: tuple[int, int] | None
    layers: tuple[LayerFit, ...]
    shown: tuple[Shown, ...]
    cosine: float
    floor: float

    @property
    def holds(self) -> bool:
        """Whether what took no part agrees."""
        return holds(self.cosine, self.floor)


def fit_stack(weights: Weights, anatomy: Anatomy, *, seed: int, threads: int = 1) -> StackFit:
    """Everything about one stack.

    Notes
    -----
    A few layers choose the families; if nothing holds there, no other layer is read.
    """
    return _Stack(weights, anatomy, seed, threads).fit()


class _Stack:
    """State of one fit."""

    def __init__(self, weights: Weights, anatomy: Anatomy, seed: int, threads: int) -> None:
        self.weights, self.anatomy, self.seed, self.threads = weights, anatomy, seed, threads
        self.large = max(anatomy.residual) > LARGE
        count, wanted = len(anatomy.layers), FEW_PROBES if self.large else PROBES
        self.probes = [anatomy.layers[k] for k in np.unique(np.linspace(0, count - 1, min(count, wanted)).astype(int))]
        self.residual = self.outside = Turn(length=anatomy.residual[0])
        self.norms: dict[str, int | None] = self._guessed()
        self._fits: dict[tuple[int, int, int | None], list[Hidden]] = {}
        self._fitted_in = self.residual
        self.size: int | None = None
        self.families: tuple[int, int] | None = None

    # -- arrays in B's residual space

    def sides(
        self, part: Part, gains: tuple[str | None, str | None] = (None, None), other: Part | None = None
    ) -> Sides:
        """A's part in B's residual space, and B's (or another part of B)."""
        one = self.weights.part(0, part, gains[0])
        two = self.weights.part(1, other or part, gains[1])
        return self.residual.side(part.reads).over(one, 1), two

    def gains(self, kind: str, one: Layer, two: Layer) -> tuple[str | None, str | None]:
        """The gain that readers of this kind read through, in A and in B."""
        at = self.norms[kind]
        if at is None or at >= len(one.gains) or at >= len(two.gains):
            return None, None
        return one.gains[at][0], two.gains[at][0]

    def readers(self, mlp: Mlp, other: Mlp, one: Layer, two: Layer) -> list[Sides]:
        """What the units of an MLP read."""
        gains = self.gains("mlp", one, two)
        return [self.sides(p, gains, q) for p, q in zip(mlp.readers, other.readers, strict=True)]

    def block(self, one: Layer, two: Layer, a: Attention, b: Attention) -> Block:
        """An attention block of A and one of B."""
        gains = self.gains("attention", one, two)
        lengths = [(x.units[0], y.units[1]) for x, y in ((a.query, b.query), (a.key, b.key))]
        return Block(
            partial(self.sides, a.query, gains, b.query),
            partial(self.sides, a.key, gains, b.key),
            partial(self.sides, a.value, gains, b.value),
            partial(self.sides, a.out, other=b.out),
            lengths,
        )

    # -- steps

    def fit(self) -> StackFit:
        """The fit, as far as it holds."""
        look = first_look(self.weights, self.anatomy, seed=self.seed) if self.large else None
        if look is not None and look[0] < LEAST_LOOK:
            return self._result("identity", None, (), (), *look)
        rows = frame(self.weights, self.anatomy, seed=self.seed)
        family, promising = self._family(rows, ENOUGH_LARGE if self.large else ENOUGH)
        self._norms()
        self._refine(rows, family)
        self._attention(promising)
        floor = self._floor()
        fits = self._layers(self.probes)
        shown = [s for fit in fits for s in fit.shown]
        reached = _mean(s.cosine for s in shown)
        if not holds(reached, floor):
            return self._result(family, rows, (), shown, reached, floor)
        done = {fit.layer.number: fit for fit in fits}
        rest = [layer for layer in self.anatomy.layers if layer.number not in done]
        done |= {fit.layer.number: fit for fit in self._layers(rest)}
        layers = tuple(done[layer.number] for layer in self.anatomy.layers)
        shown = [s for fit in layers for s in fit.shown]
        return self._result(family, rows, layers, shown, _mean(s.cosine for s in shown), floor)

    def _result(
        self, family: str, rows: Frame | None, layers: tuple[LayerFit, ...], shown: Sequence[Shown], reached: float,
        floor: float,
    ) -> StackFit:  # fmt: skip
        return StackFit(
            anatomy=self.anatomy, residual=self.residual, outside=self.outside, family=family,
            fitted_on=self._fitted_on(rows, family),
            norms=self.norms, folded=self._folded(layers), size=self.size, families=self.families,
            layers=layers, shown=tuple(shown), cosine=reached, floor=floor,
        )  # fmt: skip

    def _family(self, rows: Frame | None, enough: float) -> tuple[str, bool]:
        """The residual space's transform, and whether there is anything to it.

        Families freer than one that reaches `enough` are not tried.
        """
        options, believed, matched = [], [], []
        for option in candidates(rows, self.anatomy.residual, seed=self.seed):
            options.append(option)
            self.residual = option[1]
            fits = [fit for layer in self.probes for fit in self._mlps(layer, layer)]
            believed.append(_mean(fit.shown for fit in fits))
            matched.append(_mean(fit.matched for fit in fits))
            if believed[-1] >= enough:
                break
        if not options:
            return "identity", False
        promising = max(matched) >= LEAST_LOOK
        family, self.outside = options[simplest(believed) if promising else int(np.argmax(matched))]
        self.residual = self.outside
        return family, promising

    def _guessed(self) -> dict[str, int | None]:
        """Which norm stands before the MLP: the last one of a layer, until values say otherwise."""
        count = min(len(layer.gains) for layer in self.anatomy.layers)
        return {"mlp": count - 1 if count else None, "attention": 0 if count else None}

    def _mlps(self, one: Layer, two: Layer) -> list[Hidden]:
        """Fits of the MLPs of two layers, made once for a residual transform."""
        if self._fitted_in is not self.residual:
            self._fits, self._fitted_in = {}, self.residual
        key = (one.number, two.number, self.norms["mlp"])
        fits = self._fits.get(key)
        if fits is None:
            fits = self._fits[key] = [self._mlp(a, b, one, two) for a, b in zip(one.mlps, two.mlps, strict=True)]
        return fits

    def _mlp(self, a: Mlp, b: Mlp, one: Layer, two: Layer) -> Hidden:
        writers = [self.sides(p, other=q) for p, q in zip(a.writers, b.writers, strict=True)]
        return fit_hidden(self.readers(a, b, one, two), writers, seed=self.seed)

    def _norms(self) -> None:
        """Lets values choose the norm before each kind of reader."""
        count = min(len(layer.gains) for layer in self.anatomy.layers)
        if count < 2:
            return
        guess = self.norms["mlp"]
        scores: dict[int | None, float] = {}
        for at in range(count):
            self.norms["mlp"] = at
            probes = self.probes[:1] if self.large else self.probes
            found = [self._alike(self.readers(m, m, layer, layer)) for layer in probes for m in layer.mlps]
            scores[at] = float(np.mean(found)) if found else 0.0
        best = max(scores, key=lambda at: scores[at])
        self.norms["mlp"] = best if better(scores[best], scores[guess]) else guess
        rest = [at for at in range(count) if at != self.norms["mlp"]]
        self.norms["attention"] = rest[0]

    def _alike(self, readers: Sequence[Sides]) -> float:
        """Mean likeness of units (of some, where they are many) matched on these readers."""
        step = max(1, len(readers[0][1]) // SAMPLED)
        some = [(a, b[::step]) for a, b in readers]
        take = match_units([a for a, _ in some], [b for _, b in some], seed=self.seed)
        return float(np.mean([np.abs(moments(a, b, take).cosines) for a, b in some]))

    def _refine(self, rows: Frame | None, family: str) -> None:
        """Fits the residual transform again with what the matched units of the probes read."""
        if family == "identity" or rows is None:
            return
        if family == "rotation":  # all rows together would take more memory than both models
            cross = np.zeros(self.anatomy.residual[::-1], np.float32)
            for one, two in self._evidence(rows):
                cross += two.T @ one
            self.residual = rotation_of(cross)
        else:
            one, two = (np.concatenate(side) for side in zip(*self._evidence(rows), strict=True))
            self.residual = order_of(one, two, seed=self.seed)

    def _evidence(self, rows: Frame) -> Iterator[Sides]:
        """Rows over both residual spaces that correspond: of the frame, and what matched units of the probes read."""
        yield rows.a, rows.b
        for layer in self.probes:
            for mlp in layer.mlps:
                gains = self.gains("mlp", layer, layer)
                turned = self.readers(mlp, mlp, layer, layer)
                take = match_units([a for a, _ in turned], [b for _, b in turned], seed=self.seed)
                for part, (one, two) in zip(mlp.readers, turned, strict=True):
                    along = moments(one, two, take)
                    near = np.flatnonzero(np.abs(along.cosines) > 0.5)
                    near = near[:: max(1, len(near) // max(self.anatomy.residual))] if self.large else near
                    size = float(np.sqrt(along.two.sum() / two.size)) or 1.0
                    raw = self.weights.part(0, part, gains[0])[take[near]]
                    yield raw * np.sign(along.dots[near])[:, None].astype(np.float32) / size, two[near] / size

    def _attention(self, promising: bool) -> None:
        """Head size, norm and families of transforms, from the probes; other sizes only where it is worth it."""
        blocks = list(self._blocks(self.probes))
        sizes = head_sizes(blocks[0]) if blocks else []
        if not sizes:
            return
        self.size = likely_size(blocks[:1] if self.large else blocks, sizes)
        guess = self.norms["attention"]
        scores: dict[int | None, float] = {}
        for at in range(min(len(layer.gains) for layer in self.anatomy.layers)):
            self.norms["attention"] = at
            probes = self._blocks(self.probes[:1] if self.large else self.probes)
            scores[at] = float(np.mean([agreement(b, self.size) for b in probes]))
        if scores:
            best = max(scores, key=lambda at: scores[at])
            self.norms["attention"] = best if better(scores[best], scores[guess]) else guess
            blocks = list(self._blocks(self.probes))
        self.families, score = choose_families(blocks, self.size, seed=self.seed)
        for size in sizes if promising and score < ENOUGH else ():
            families, reached = choose_families(blocks, size, seed=self.seed)
            if better(reached, score):
                self.size, self.families, score = size, families, reached

    def _blocks(self, layers: Sequence[Layer]) -> Iterator[Block]:
        for layer in layers:
            for block in layer.attentions:
                yield self.block(layer, layer, block, block)

    def _layers(self, layers: Sequence[Layer]) -> list[LayerFit]:
        """Fits of whole layers, some at the same time."""
        sizes = [sum(math.prod(part.units) for mlp in layer.mlps for part in mlp.readers) for layer in layers]
        return spread(lambda layer: self._layer(layer, layer), layers, sizes, self.threads)

    def _layer(self, one: Layer, two: Layer) -> LayerFit:
        mlps = self._mlps(one, two)
        near: list[tuple[Part, float]] = []
        for mlp, hidden in zip(two.mlps, mlps, strict=False):
            near += [(part, hidden.shown) for part in mlp.writers]
            near += zip(mlp.readers, hidden.read, strict=True)
        heads = []
        if self.size is not None and self.families is not None:
            for a, b in zip(one.attentions, two.attentions, strict=False):
                block = self.block(one, two, a, b)
                fit = fit_heads(block, self.size, self.families, seed=self.seed)
                near += [(b.query, fit.shown_query), (b.out, fit.shown_out)]
                near += [(b.key, cosine(fit.key.over(block.key[0], 0), block.key[1]))]
                near += [(b.value, cosine(fit.value.over(block.value[0], 0), block.value[1]))]
                heads.append(fit)
        cosines: dict[str, float] = {}
        for part, found in near:
            cosines[part.name] = min(found, cosines.get(part.name, 1.0))
        return LayerFit(two, tuple(mlps), tuple(heads), cosines)

    def _floor(self) -> float:
        """What different layers of the two models show of each other, fitted the same way; 0 for a single layer."""
        found = []
        layers = self.anatomy.layers
        for layer in self.probes[:MISPAIRED]:
            at = layers.index(layer)
            other = layers[(at + 1) % len(layers)]
            if other is not layer and _alike(layer, other):
                found.append(_mean(abs(s.cosine) for s in self._layer(layer, other).shown))
        return max(found, default=0.0)

    def _fitted_on(self, rows: Frame | None, family: str) -> tuple[str, ...]:
        if family == "identity" or rows is None:
            return ()
        probes = [p.name for layer in self.probes for mlp in layer.mlps for p in mlp.readers]
        return tuple(dict.fromkeys((*rows.tensors, *probes)))

    def _folded(self, fits: Sequence[LayerFit]) -> bool:
        """Whether readers agree better once the gains of their norms are folded into them."""
        raw: list[float] = []
        folded: list[float] = []
        for fit in fits[:PROBES]:
            for mlp, hidden in zip(fit.layer.mlps, fit.mlps, strict=False):
                for gains, into in (((None, None), raw), (self.gains("mlp", fit.layer, fit.layer), folded)):
                    for part, turn in zip(mlp.readers, hidden.readers, strict=True):
                        one, two = self.sides(part, gains)
                        into.append(float(np.mean(np.abs(unit_cosines(turn.over(one, 0), two)))))
        return bool(raw) and better(float(np.mean(folded)), float(np.mean(raw)))


def _mean(values: Iterable[float]) -> float:
    """The mean, 0 of nothing."""
    found = list(values)
    return float(np.mean(found)) if found else 0.0


def _alike(one: Layer, two: Layer) -> bool:
    """Whether two layers have the same shapes."""
    mlps = [[(m.units, len(m.readers)) for m in layer.mlps] for layer in (one, two)]
    blocks = [[(b.query.units, b.key.units) for b in layer.attentions] for layer in (one, two)]
    return mlps[0] == mlps[1] and blocks[0] == blocks[1]
