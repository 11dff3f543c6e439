"""Relations that training leaves: fine-tuned, in parts, by a merged low-rank adapter, from a shared beginning."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.judge.material import Material, Sample
from lineage.judge.relations import values
from lineage.judge.relations.finding import Finding
from lineage.judge.significance import AxisTest

__all__ = [
    "continued_pretraining",
    "fine_tuned",
    "lora_merged",
    "low_rank",
    "partially_shared",
    "partially_tuned",
    "shared_initialisation",
]

Floats = NDArray[np.floating[Any]]

#: mean cosine of changed content: from here on it was tuned, below trained on for long (zoo: ft 0.994 to 0.998,
#: ft-long 0.95, 600 steps at twice the rate; cont 0.5 to 0.75, three times the base's own steps. Eleven families of
#: other recipes: a fifth of the steps at a tenth of the rate 0.997 and more, half at a quarter 0.958 to 0.999, twice
#: the steps at the full rate 0.845 to 0.919; strangers 0.05 at most)
TUNED, TRAINED_ON = 0.9, 0.35
#: share of the changed content that may not agree at all where the rest was tuned (routers of reordered experts: 0.012)
STRAY = 0.02
#: the first singular value left out must be this far below the last one kept; kept are those above the rounding's
#: greatest one, times a margin for its own chance
GAP, FLOOR = 1.8, 1.3
#: a rank is low up to this part of the shorter side; smaller matrices have no room to show it
ROOM = 4
#: relative change of a vector that counts as tuned: more than rounding to bf16, less than a vector of another network
#: (norms that were tuned alone move by 0.01 to 0.3), and the share of the vectors that must have moved
VECTORS, LEAST_VECTORS = (4e-3, 1.0), 0.3
#: spacing of a format's numbers over their binade
STEP = {"BF16": 2.0**-7, "F16": 2.0**-10, "F32": 2.0**-23, "F64": 2.0**-52}
#: share of a block's units at home from which it counts as the same block, and up to which as a stranger's
HOME, STRANGE = 0.8, 0.06
#: mean likeness of units at home up to which only a beginning is shared (zoo: siblings 0.45, cont 0.65). Siblings that
#: were trained less have 0.54 to 0.99 and cannot be told from tuned relatives
BEGINNING = 0.6


def fine_tuned(material: Material) -> Finding | None:
    """Content changed a little, and nothing else explains it."""
    mean = material.asked(_tuned)
    if mean is None:
        return _small_ones(material)
    if mean < TUNED:
        return None
    count = f"{len(material.changed)} of {len(material.content)} matrices"
    return Finding("fine-tuned", 1.0, f"{count} differ a little: mean cosine {mean:.4f}")


def _small_ones(material: Material) -> Finding | None:
    """All matrices are equal, and the vectors beside them (norms, biases) are not."""
    if not material.content or material.changed or material.asked(values.quantized) is not None:
        return None
    vectors = [p for p in material.pairs if not p.content and p.size > 1 and p.rel_l2 is not None]
    moved = [p for p in vectors if not p.equal and VECTORS[0] < (p.rel_l2 or 0.0) < VECTORS[1]]
    if len(moved) < LEAST_VECTORS * len(vectors) or not moved:
        return None
    text = f"all matrices are equal, and {len(moved)} of {len(vectors)} vectors (norms, biases) were tuned"
    return Finding("fine-tuned", 1.0, text)


def continued_pretraining(material: Material) -> Finding | None:
    """Content changed a lot and is still recognisably the same."""
    mean = material.asked(_tuned)
    if mean is None or not TRAINED_ON <= mean < TUNED or material.asked(shared_initialisation) is not None:
        return None
    text = f"{len(material.changed)} matrices were trained far on: mean cosine {mean:.3f}"
    return Finding("continued-pretraining", 1.0, text)


def partially_tuned(material: Material) -> Finding | None:
    """Some content is equal and the rest was tuned."""
    if material.asked(_small_ones) is not None:
        return Finding("partially-tuned", 0.0, "only norms and biases were tuned")
    if material.asked(_tuned) is None or not 0.01 < material.equal_share < 0.99:
        return None
    same = [p for p in material.content if p.equal]
    text = f"{len(same)} of {len(material.content)} matrices are equal, such as {same[0].name}; the others were tuned"
    return Finding("partially-tuned", 1 - material.equal_share, text)


def lora_merged(material: Material) -> Finding | None:
    """The difference has a low rank above the rounding of the storage."""
    words = {p.name: p.dtype_b if p.dtype_b in STEP else "F32" for p in material.content}
    ranks = {sample.name: low_rank(sample, words[sample.name]) for sample in material.samples}
    found = [rank for rank in ranks.values() if rank]
    room = {s.name for s in material.samples if min(s.a.shape) >= max(ROOM * max(found, default=0), 16)}
    told = [rank for name, rank in ranks.items() if rank or name in room]
    if not found or len(found) < values.MOST * len(told):
        return None
    names = sorted({_role(name) for name, rank in ranks.items() if rank})
    text = f"the difference has rank {int(np.median(found))} above the rounding, in {', '.join(names)}"
    return Finding("lora-merged", len(found) / len(told), text)


def low_rank(sample: Sample, word: str) -> int:
    """Rank of B - A above the rounding of the storage, 0 where it is not low.

    Parameters
    ----------
    word : dtype of the coarser side
    """
    delta = sample.b.astype(np.float64) - sample.a
    short = min(delta.shape)
    if short < 16:
        return 0
    sizes = np.linalg.svd(delta, compute_uv=False)
    edge = float(np.linalg.norm(_rounding(sample, STEP[word]), 2))
    above = int(np.count_nonzero(sizes > FLOOR * edge))
    if not 0 < above <= short // ROOM:
        return 0
    return above if sizes[above - 1] > GAP * sizes[above] else 0


def _rounding(sample: Sample, step: float) -> Floats:
    """Errors as rounding both sides leaves them: uniform in one step of each value's binade (a few large weights
    carry most of it, so that no formula for random matrices gives its greatest singular value)."""
    rng = np.random.default_rng(0)
    total = np.zeros(sample.b.shape)
    for side in (sample.a, sample.b):
        size = np.abs(side.astype(np.float64))
        binade = np.exp2(np.floor(np.log2(np.where(size > 0, size, 1.0)))) * (size > 0)
        total += step * binade * (rng.random(size.shape) - 0.5)
    return total


def partially_shared(material: Material) -> Finding | None:
    """Some blocks are A's and others are strangers; or the embeddings are A's and no block is."""
    if any(t.stands_out and t.fixed < STRANGE * t.units for t in material.significance.tests if t.kind == "hidden"):
        return None  # units in another order are no strangers
    for test in material.significance.tests:
        if test.kind == "hidden" and not test.frame and not test.void:
            home = [b for b in test.each if b[1] >= HOME * b[2]]
            strange = [b for b in test.each if b[1] <= STRANGE * b[2]]
            if home and strange:
                same_blocks, others = (_listed([block[0] for block in blocks]) for blocks in (home, strange))
                text = f"the units of {same_blocks} agree with A unit by unit, {others} do not"
                return Finding("partially-shared", len(home) / len(test.each), text)
    same = [p for p in material.content if p.equal]
    strange_pairs = [p for p in material.content if not p.equal and abs(p.cosine or 0.0) < TRAINED_ON]
    hidden = [t for t in material.significance.tests if t.kind == "hidden" and not t.frame]
    if same and strange_pairs and hidden and all(_at_chance(t) for t in hidden):
        text = f"of the tensors, {_listed([p.name for p in same])} equal A's, and no hidden unit in the layers does"
        return Finding("partially-shared", material.equal_share, text)
    return None


def shared_initialisation(material: Material) -> Finding | None:
    """Every block kept some of its units' places, most of them not: trained apart from one beginning."""
    tests = [t for t in material.significance.tests if t.kind == "hidden" and not t.frame and not t.void]
    shares = [fixed / units for t in tests for _, fixed, units in t.each if units]
    if not shares or max(shares) > HOME or min(shares) < STRANGE or max(t.likeness for t in tests) > BEGINNING:
        return None
    share = float(np.mean(shares))
    text = (
        f"{share:.0%} of the hidden units kept their place while their weights hardly agree: "
        "two trainings from one beginning look like that"
    )
    return Finding("shared-initialisation", share, text)


def _tuned(material: Material) -> float | None:
    """Mean cosine of changed content where training explains the change, else None."""
    changed = [p for p in material.changed if p.cosine is not None]
    if not changed or len(changed) < len(material.changed):
        return None
    strange = [p.size for p in changed if (p.cosine or 0.0) < TRAINED_ON]
    if sum(strange) > STRAY * sum(p.size for p in changed):
        return None
    if any(material.asked(other) is not None for other in OTHER_CAUSES):
        return None
    return float(np.average([p.cosine or 0.0 for p in changed], weights=[p.size for p in changed]))


#: what else may make values differ
OTHER_CAUSES = (
    values.quantized,
    values.sparsified,
    values.noised,
    values.rescaled,
    values.sign_flipped,
    lora_merged,
)


def _at_chance(test: AxisTest) -> bool:
    return test.fixed <= STRANGE * test.units and test.ordered < 0.5 * test.units


def _role(name: str) -> str:
    """The last words of a name that are no weight and no number."""
    words = [w for w in name.replace("/", ".").split(".") if not w.isdigit()]
    return words[-2] if len(words) > 1 else words[-1]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
