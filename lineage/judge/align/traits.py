"""Relations that an alignment shows, in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.judge.align.heads import KEY_FAMILIES, VALUE_FAMILIES, Heads
from lineage.judge.align.records import Fitted, Trait
from lineage.judge.align.stack import StackFit
from lineage.judge.align.turns import Turn
from lineage.judge.align.weights import Weights

__all__ = ["fitted", "traits"]

Floats = NDArray[np.floating[Any]]

#: units that must have moved or flipped for it to be said
FEWEST = 2
#: deviation of log scales, and mean turn of a basis (0 to 1), from which they are called so. Training leaves 0.01 to
#: 0.03 where it is read as a scale at all; disguises start at 0.2
SCALED, TURNED = 0.08, 0.1


def traits(fit: StackFit, weights: Weights) -> tuple[Trait, ...]:
    """Tags with a sentence each; none where nothing holds."""
    if not fit.holds:
        return ()
    return tuple(_all(fit, weights))


def _all(fit: StackFit, weights: Weights) -> Iterator[Trait]:
    shown = f"what took no part in the fit agrees at cosine {fit.cosine:.3f}, mispaired layers at {fit.floor:.3f}"
    yield from _residual(fit, shown)
    yield from _norms(fit, weights, shown)
    yield from _hidden(fit)
    yield from _heads(fit)


def _residual(fit: StackFit, shown: str) -> Iterator[Trait]:
    turn = fit.residual
    where = f"residual channels of {fit.anatomy.stack.replace('#', '{i}')}"
    if fit.family == "rotation":
        yield Trait("rotated", f"{turn.units} {where} are A's turned by an orthogonal matrix: {shown}")
    if turn.units < turn.length:
        yield Trait("width-pruned", f"{turn.units} of A's {turn.length} {where} are left: {shown}")
    elif turn.moved >= FEWEST:
        yield Trait("permuted", f"{turn.moved} of {turn.units} {where} stand in another order: {shown}")
    flipped = 0 if turn.scale is None else int(np.count_nonzero(turn.scale < 0))
    if flipped >= FEWEST:
        yield Trait("sign-flipped", f"{flipped} of {turn.units} {where} have the other sign: {shown}")


def _norms(fit: StackFit, weights: Weights, shown: str) -> Iterator[Trait]:
    if not fit.folded:
        return
    spreads = []
    for layer in fit.anatomy.layers:
        for weight, _ in layer.gains:
            one, two = (weights.tensor(side, weight).reshape(-1) for side in (0, 1))
            if fit.residual.blocks:
                spreads.append(_spread(two))
            else:
                take = fit.residual.take
                spreads.append(_spread(two / _apart(one if take is None else one[take])))
    if spreads and float(np.median(spreads)) > SCALED:
        yield Trait("rescaled", f"norms and the matrices that read through them are scaled against each other: {shown}")


def _hidden(fit: StackFit) -> Iterator[Trait]:
    fits = [h for layer in fit.layers for h in layer.mlps if h.holds]
    if not fits:
        return
    cosine = f"what they write agrees at cosine {np.mean([h.shown for h in fits]):.3f}"
    units, moved, flipped = (sum(x) for x in zip(*((h.writer.units, h.moved, h.flipped) for h in fits), strict=True))
    length = sum(h.writer.length for h in fits)
    if units < length:
        yield Trait("width-pruned", f"{units} of A's {length} MLP neurons are left, found by what they read; {cosine}")
    elif moved >= FEWEST:
        yield Trait(
            "permuted", f"{moved} of {units} MLP neurons stand in another order, found by what they read; {cosine}"
        )
    if flipped >= FEWEST:
        yield Trait(
            "sign-flipped",
            f"{flipped} of {units} MLP neurons have the other sign between reading and writing; {cosine}",
        )
    spread = float(np.median([h.spread for h in fits]))
    if any(h.family == "scales" for h in fits) and spread > SCALED:
        yield Trait("rescaled", f"MLP neurons are scaled between reading and writing (spread {spread:.0%}); {cosine}")


def _heads(fit: StackFit) -> Iterator[Trait]:
    fits = [h for layer in fit.layers for h in layer.attentions if h.holds]
    if not fits:
        return
    query, out = (float(np.mean(x)) for x in zip(*((h.shown_query, h.shown_out) for h in fits), strict=True))
    cosine = f"fitted on keys and values, it gives queries at cosine {query:.3f} and outputs at {out:.3f}"
    moved, count = sum(h.moved for h in fits), sum(h.count for h in fits)
    if any(h.value.units < h.value.length or h.query.units < h.query.length for h in fits):
        yield Trait("width-pruned", f"heads were cut away; {cosine}")
    elif moved >= FEWEST:
        yield Trait("permuted", f"{moved} of {count} heads and key/value groups stand in another order; {cosine}")
    flipped = sum(int(np.count_nonzero(t.scale < 0)) for h in fits for t in (h.key, h.value) if t.scale is not None)
    if flipped >= FEWEST:
        yield Trait("sign-flipped", f"{flipped} dimensions inside heads have the other sign; {cosine}")
    turned, spread = (max(float(np.median([f(t) for t in ts])) for ts in _both(fits)) for f in (_turned, _stretched))
    if turned > TURNED:
        yield Trait("rotated", f"heads have new bases inside, which cancel in their products; {cosine}")
    if spread > SCALED:
        yield Trait("rescaled", f"dimensions inside heads are scaled against each other; {cosine}")


def _both(fits: list[Heads]) -> tuple[list[Turn], list[Turn]]:
    return [h.key for h in fits], [h.value for h in fits]


def _turned(turn: Turn) -> float:
    """How far the blocks' orthogonal parts are from doing nothing, 0 to 1."""
    found = []
    for block in turn.blocks:
        u, _, v = np.linalg.svd(block)
        found.append(float(np.linalg.norm(u @ v - np.eye(len(block)))) / np.sqrt(2 * len(block)))
    return float(np.mean(found)) if found else 0.0


def _stretched(turn: Turn) -> float:
    """Deviation of the logarithms of scales, or of the blocks' singular values."""
    if turn.scale is not None:
        return _spread(turn.scale)
    return float(np.mean([_spread(np.linalg.svd(block)[1]) for block in turn.blocks])) if turn.blocks else 0.0


def _spread(values: Floats) -> float:
    return float(np.std(np.log(np.maximum(np.abs(values.astype(np.float64)), 1e-12))))


def _apart(values: Floats) -> Floats:
    return np.where(np.abs(values) > 1e-12, values, 1.0)


def fitted(fit: StackFit) -> tuple[Fitted, ...]:
    """Every index space in which something was fitted."""
    found = [Fitted("residual channels", fit.family, fit.residual.units, fit.residual.moved, fit.fitted_on)]
    for layer in fit.layers:
        for mlp, hidden in zip(layer.layer.mlps, layer.mlps, strict=False):
            tensors = tuple(dict.fromkeys(p.name for p in mlp.readers))
            found.append(Fitted(f"neurons of {mlp.path}", hidden.family, hidden.writer.units, hidden.moved, tensors))
        for block, heads in zip(layer.layer.attentions, layer.attentions, strict=False):
            families = fit.families or (0, 0)
            for kind, table, at, part, turn in (
                ("keys", KEY_FAMILIES, families[0], block.key, heads.key),
                ("values", VALUE_FAMILIES, families[1], block.value, heads.value),
            ):
                space = f"{kind} of {block.path}"
                found.append(Fitted(space, table[at][0], turn.units, turn.moved, (part.name,)))
    return tuple(found)
