"""A verdict on weights whose disguise was undone: what the alignment showed joins what the tests found.

What else was done to the weights (training, quantising, noise) shows only once the disguise is off, so the relations
that values tell are asked again of the aligned pair. Undoing rounds every value anew: a difference of that size is
nobody's training.
"""

from __future__ import annotations

from functools import cached_property

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.filling import Filled
from lineage.judge.align.records import Aligned
from lineage.judge.common import common_layout
from lineage.judge.material import Material, Pair
from lineage.judge.relations import RELATIONS
from lineage.judge.relations.finding import Finding
from lineage.judge.significance import Significance
from lineage.judge.verdict import Verdict
from lineage.measure.compare import Comparison

__all__ = ["left_over", "with_alignment"]

#: relative difference that undoing leaves of a pure disguise: rounding to bf16 before and after each transform leaves
#: 0.001 to 0.004 (all disguises, alone and together, of two recipes), the lightest training 0.02 and more
WORN = 0.01
#: relations that tell what happened to values, or which ones are A's, which a disguise hides or imitates
VALUES = (
    "quantized", "noised", "sparsified", "fine-tuned", "partially-tuned", "lora-merged", "continued-pretraining",
    "shared-initialisation", "partially-shared",
)  # fmt: skip


def left_over(
    a: Checkpoint, b: Checkpoint, aligned: Aligned, comparison: Comparison, *, seed: int = 0
) -> list[Finding]:
    """What happened to the values beside the disguise, from the aligned pair.

    Parameters
    ----------
    comparison : of A under the alignment's mapping with B
    seed : of samples
    """
    mapping = aligned.mapping
    common = common_layout(a, b, mapping)
    given = (a, b, mapping, Filled(mapping, a), common, comparison, Significance((), None), seed)
    gridded = Material(*given).asked(RELATIONS["quantized"])
    if gridded is not None:  # rounding to 8 bits is no more than undoing leaves, but a grid is a grid
        return [gridded]
    material = _Settled(*given)
    found = (material.asked(RELATIONS[tag]) for tag in VALUES)
    return [finding for finding in found if finding is not None]


class _Settled(Material, frozen=True, dict=True):
    """Material in which a difference that undoing makes counts as none."""

    @cached_property
    def pairs(self) -> list[Pair]:
        """All matched tensors."""
        return [
            msgspec.structs.replace(pair, equal=pair.equal or (pair.rel_l2 is not None and pair.rel_l2 < WORN))
            for pair in super().pairs
        ]


def with_alignment(verdict: Verdict, aligned: Aligned, left: list[Finding] | None = None) -> Verdict:
    """The verdict with the transforms that were undone.

    Parameters
    ----------
    left : what happened to the values beside (`left_over`); it takes the place of what was read off them while they
        were disguised. None: that stays

    Notes
    -----
    What an alignment shows is an effect size with its floor, not a probability: where the exact tests found nothing
    the p-value is left out (null), and the first reason says what the verdict rests on.
    """
    # units that agree only through the embeddings look turned; the alignment knows whether an order explains them
    undone = {"rotated"} - set(aligned.tags)
    before = [f for f in verdict.findings if f.tag not in undone and (left is None or f.tag not in VALUES)]
    known = {f.tag for f in before}
    new = [Finding(t.tag, aligned.cosine, t.sentence) for t in aligned.traits if t.tag not in known]
    new += left or []
    findings = (*before, *new)
    gone = {_sentence(f.sentence) for f in verdict.findings if f not in before}
    kept = tuple(reason for reason in verdict.reasons if reason not in gone)
    sentences = [_sentence(f.sentence) for f in new]
    note = _sentence(f"the disguise was undone: {aligned.note}")
    if verdict.related is True:
        verdict = msgspec.structs.replace(verdict, reasons=(*kept[:1], note, *kept[1:], *sentences))
    else:
        resting = (
            "No exact test is left after this disguise; the verdict rests on tensors that took no part in undoing it."
        )
        verdict = msgspec.structs.replace(
            verdict, class_="transformed", related=True, log10_p=None, reasons=(note, resting, *sentences)
        )
    return msgspec.structs.replace(verdict, findings=findings, relations=tuple(dict.fromkeys(f.tag for f in findings)))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
