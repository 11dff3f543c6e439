"""Disguises undone: what keeps a network's function while it changes its weights, fitted and shown.

Order, signs and scales of units, rotations of the residual stream and bases inside heads are fitted on some tensors
and held against others that took no part. A fit is never evidence; what it was not fitted on is.
"""

from __future__ import annotations

from lineage.judge.align.alignment import align
from lineage.judge.align.records import Aligned, Fitted, Shown, Trait

__all__ = ["Aligned", "Fitted", "Shown", "Trait", "align"]
