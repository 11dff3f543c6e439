"""What a mapping and a verdict say of adapters: whether one that was made for A fits B, and what it needs for it."""

from __future__ import annotations

from typing import Literal

from lineage.layout.mapping import Mapping, Rule

__all__ = ["Grade", "grade_of"]

Grade = Literal["remap", "reshape", "retrain", "none"]
#: cosine from which on a rule's values speak for one set of weights
SAME_VALUES = 0.5


def grade_of(mapping: Mapping, class_: str | None = None) -> Grade:
    """What an adapter of A needs on B.

    Parameters
    ----------
    class_ : of the verdict on the pair; None or `undetermined`, where nobody could tell: the rules' own evidence
        decides

    Returns
    -------
    `remap` (keys are renamed), `reshape` (factors are cut and joined, exactly), `retrain` (it finds its places, the
    weights there are others) or `none` (no map of matrices, or two architectures that share some shapes)
    """
    rules = [rule for rule in mapping.rules if not all(target.endswith("bias") for target in rule.to)]
    if not rules or class_ == "unrelated":
        return "none"
    judged = class_ not in (None, "undetermined")
    if class_ == "retrained" or (not judged and not any(_by_values(rule) for rule in rules)):
        return "retrain"
    return "reshape" if any(rule.ops for rule in rules) else "remap"


def _by_values(rule: Rule) -> bool:
    if rule.how not in ("values", "given"):
        return False
    cosine = rule.evidence.cosine if rule.evidence is not None else None
    return cosine is None or cosine >= SAME_VALUES
