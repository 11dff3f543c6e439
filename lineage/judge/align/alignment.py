"""`align`: every transform between two checkpoints that keeps what they compute, as far as it can be shown."""

from __future__ import annotations

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.judge.align.anatomy import Anatomy
from lineage.judge.align.chains import Chains, chains
from lineage.judge.align.channels import fit_channels
from lineage.judge.align.dissection import anatomies
from lineage.judge.align.orientation import oriented
from lineage.judge.align.records import Aligned, Trait
from lineage.judge.align.refined import cosines, refined
from lineage.judge.align.stack import StackFit, fit_stack
from lineage.judge.align.traits import fitted, traits
from lineage.judge.align.weights import Weights, cosine
from lineage.judge.axes import hidden_axes, matrices
from lineage.judge.common import Common, common_layout
from lineage.layout.mapping import Mapping

__all__ = ["align"]

#: rows at three places of each tensor, and layers, that are looked at as they stand
ROWS, LAYERS = 48, 8
#: cosine from which such rows agree. Training on leaves 0.95 and more unless it is as long as the training before;
#: scales of a third (`rescaled` in the zoo) leave 0.73 to 0.89
PLAIN = 0.95


def align(a: Checkpoint, b: Checkpoint, mapping: Mapping, *, seed: int = 0, threads: int = 2) -> Aligned | None:
    """What turns A's weights into B's beside the layout, shown on tensors that took no part in finding it.

    Parameters
    ----------
    a, b : the claimed ancestor and the suspect
    mapping : from A's layout to B's, as found; only names and shapes of what it pairs are used
    seed : of samples and of the shuffles that break ties
    threads : that fit layers at the same time

    Returns
    -------
    the alignment, `holds` or not; None where no index space can be told from the shapes, or where nothing was
    disguised
    """
    given, mapping = mapping, oriented(mapping, a)
    common = common_layout(a, b, mapping)
    stacks = anatomies(common.shapes)
    narrower, wider = _compared(stacks)
    if narrower and wider:
        return None
    if narrower:
        turned = align(b, a, mapping.inverse(), seed=seed, threads=threads)
        found = None if turned is None else _inverse(turned)
    elif stacks:
        plain = all(_plain(common, anatomy) for anatomy in stacks)
        found = None if plain else _aligned(a, b, mapping, common, stacks, seed=seed, threads=threads)
    else:
        found = _convolved(a, b, mapping, common, seed=seed)
    if found is None or found.holds:
        return found
    return msgspec.structs.replace(found, mapping=given)


def _compared(stacks: list[Anatomy]) -> tuple[bool, bool]:
    """Whether A has fewer channels or units than B somewhere, and whether it has more somewhere."""
    pairs = [anatomy.residual for anatomy in stacks]
    for layer in (layer for anatomy in stacks for layer in anatomy.layers):
        pairs += [part.units for mlp in layer.mlps for part in mlp.readers]
        pairs += [part.units for block in layer.attentions for part in (block.query, block.key)]
    return any(one < two for one, two in pairs), any(one > two for one, two in pairs)


def _plain(common: Common, anatomy: Anatomy) -> bool:
    """True where sampled rows agree as they stand: nothing was disguised, whatever was trained."""
    step = max(1, len(anatomy.layers) // LAYERS)
    chosen = msgspec.structs.replace(anatomy, layers=anatomy.layers[::step])
    for name in dict.fromkeys(part.name for part in chosen.parts):
        shapes = [side.specs[name].shape for side in (common.a, common.b)]
        if shapes[0][1:] != shapes[1][1:]:
            return False
        shared = min(shapes[0][0], shapes[1][0])
        for start in (0, (shared - ROWS) // 2, shared - ROWS):
            first = max(start, 0)
            one, two = (side.rows(name, first, min(shared, first + ROWS)) for side in (common.a, common.b))
            if (one.any() or two.any()) and not cosine(one, two) >= PLAIN:
                return False
    return True


def _aligned(
    a: Checkpoint, b: Checkpoint, mapping: Mapping, common: Common, stacks: list[Anatomy], *, seed: int, threads: int
) -> Aligned | None:
    weights = Weights(common)
    fits = [fit_stack(weights, anatomy, seed=seed, threads=threads) for anatomy in stacks]
    main = fits[0]
    held = [fit for fit in fits if fit.holds]
    found = tuple(trait for fit in held for trait in traits(fit, weights))
    if main.holds and not found:
        return None
    made: Chains = {}
    only: Chains = {}
    for fit in held:
        made |= chains(fit, weights)
        only |= chains(msgspec.structs.replace(fit, residual=fit.outside), weights, units=False)
    known = {name: value for fit in held for layer in fit.layers for name, value in layer.cosines.items()}
    near = cosines(common, made, known)
    return Aligned(
        mapping=refined(a, b, mapping, common, made, near) if made else mapping,
        exact_mapping=refined(a, b, mapping, common, only, {}) if held else None,
        fitted=tuple(f for fit in fits for f in fitted(fit)),
        shown=tuple(s for fit in fits for s in fit.shown),
        cosine=main.cosine, floor=main.floor, holds=main.holds, traits=found, note=_note(main),
    )  # fmt: skip


def _convolved(a: Checkpoint, b: Checkpoint, mapping: Mapping, common: Common, *, seed: int) -> Aligned | None:
    """The alignment of a stack of convolutions, or of a network whose units are all outputs of a layer."""
    places = any(sum(n > 1 for n in shape) > 2 for _, shape in common.shapes.values())
    if not places and hidden_axes(*matrices(common.shapes), lambda _: False):
        return None  # a network of blocks that nobody could take apart: its axes may be anything
    fit = fit_channels(Weights(common), common.shapes, seed=seed)
    if fit is None or (fit.shown and not fit.disguised):
        return None
    made = fit.chains() if fit.holds else {}
    near = cosines(common, made, {})
    units = sum(f.units for f in fit.fits)
    what = f"order of {units} channels carried through {len(fit.orders)} kernels"
    figures = f"cosine {fit.cosine:.3f} on {len(fit.shown)} kernels that took no part, {fit.floor:.3f} by chance"
    return Aligned(
        mapping=refined(a, b, mapping, common, made, near) if made else mapping, exact_mapping=None,
        fitted=fit.fits, shown=fit.shown, cosine=fit.cosine, floor=fit.floor, holds=fit.holds, traits=fit.traits(),
        note=f"{what}: {figures}" + ("" if fit.holds else "; no more than strangers reach"),
    )  # fmt: skip


def _note(fit: StackFit) -> str:
    what = f"aligned by {fit.family} of {fit.residual.units} residual channels"
    shown = f"cosine {fit.cosine:.3f} on {len(fit.shown)} tensors that took no part"
    figures = f"{shown}, {fit.floor:.3f} between mispaired layers"
    return f"{what}: {figures}" + ("" if fit.holds else "; no more than strangers reach")


def _inverse(turned: Aligned) -> Aligned:
    """An alignment found the other way round: what was cut from B's side was grown from A's."""
    exact = None if turned.exact_mapping is None else turned.exact_mapping.inverse()
    traits = tuple(
        Trait("width-grown" if trait.tag == "width-pruned" else trait.tag, trait.sentence.replace("A's", "B's"))
        for trait in turned.traits
    )
    return msgspec.structs.replace(turned, mapping=turned.mapping.inverse(), exact_mapping=exact, traits=traits)
