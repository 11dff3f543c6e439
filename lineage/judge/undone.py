"""A verdict on weights whose disguise was undone: what the alignment showed joins what the tests found."""

from __future__ import annotations

import msgspec

from lineage.judge.align.records import Aligned
from lineage.judge.relations.finding import Finding
from lineage.judge.verdict import Verdict

__all__ = ["with_alignment"]


def with_alignment(verdict: Verdict, aligned: Aligned) -> Verdict:
    """The verdict with the transforms that were undone.

    Notes
    -----
    What an alignment shows is an effect size with its floor, not a probability: where the exact tests found nothing
    the p-value is left out (null), and the first reason says what the verdict rests on.
    """
    known = {f.tag for f in verdict.findings}
    new = [Finding(t.tag, aligned.cosine, t.sentence) for t in aligned.traits if t.tag not in known]
    findings = (*verdict.findings, *new)
    sentences = [_sentence(f.sentence) for f in new]
    note = _sentence(f"the disguise was undone: {aligned.note}")
    if verdict.related is True:
        verdict = msgspec.structs.replace(
            verdict, reasons=(*verdict.reasons[:1], note, *verdict.reasons[1:], *sentences)
        )
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
