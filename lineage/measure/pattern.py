"""Where the change sits: by layer, by group, in few tensors or few elements, and what that says in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np

from lineage.errors import printable
from lineage.measure.groups import Groups
from lineage.measure.metrics import AT, figures, merge

if TYPE_CHECKING:
    from lineage.measure.compare import TensorRow
    from lineage.measure.summary import Part

__all__ = ["PATTERNS", "Change", "Insight", "read_insights", "read_pattern"]

Severity = Literal["info", "notice", "warning"]
PATTERNS = ("uniform", "early-heavy", "late-heavy", "focused", "sparse",
            "attention-heavy", "mlp-heavy", "embedding-heavy")  # fmt: skip
#: the last third of the layers against the first, and a group against all the rest: how many times the relative L2
HEAVY = 1.5
#: largest spread of the layers' relative L2 (standard deviation over mean) that still reads as uniform
EVEN = 0.25
#: part of the layers that must have changed at all for that
MOST = 0.75
#: share of the elements of the changed tensors at or below which the change is sparse
SPARSE = 0.05
#: the change is focused where this share of its energy sits in `FOCUS_TENSORS` of the elements or less
FOCUS_ENERGY, FOCUS_TENSORS = 0.9, 0.25
#: fewest layers that can show a trend
LAYERS = 4
#: cosine below which a pair of tensors deserves a warning
FAR = 0.9
#: norms of B below and above these parts of A's have collapsed or exploded
COLLAPSED, EXPLODED = 0.1, 10.0
#: names in one sentence
NAMED = 3


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Where the change sits.

    Attributes
    ----------
    patterns : words of `PATTERNS`, plainest first; empty where nothing changed
    frozen_layers : stack and number of the layers in which no tensor changed though others did
    changed_layers : layers with a change
    late_over_early : relative L2 of the last third of the layers over that of the first third
    by_group : relative L2 of each group's content weights
    """

    patterns: tuple[str, ...] = ()
    frozen_layers: tuple[tuple[str, int], ...] = ()
    changed_layers: int = 0
    late_over_early: float | None = None
    by_group: dict[str, float] = {}


class Insight(msgspec.Struct, frozen=True):
    """One sentence about the comparison, and how much it matters."""

    severity: Severity
    text: str


def read_pattern(parts: Sequence[Part], groups: Groups) -> Change:
    """The pattern of change of the content weights (of all tensors where only vectors changed)."""
    layers: dict[tuple[str, int], list[Part]] = {}
    for part in parts:
        if part[0].layer is not None:
            layers.setdefault((part[0].stack, part[0].layer), []).append(part)
    moved = [p for p in parts if p[0].status == "changed"]
    if not moved:
        return Change()
    content = [p for p in parts if not groups.apart(p[0].group, p[0].shape)]
    content = content if any(row.status == "changed" for row, _ in content) else list(parts)
    frozen = [at for at, some in layers.items() if all(row.status == "unchanged" for row, _ in some)]
    profile = _profile(layers, content)
    late = _late_over_early(profile)
    by_group = {}
    for group in dict.fromkeys(row.group for row, _ in content):
        value = _relative(p for p in content if p[0].group == group)
        if value is not None:
            by_group[group] = value
    words = [*_trend(profile, late), *_concentration(content), *_heavy_groups(content)]
    return Change(
        patterns=tuple(word for word in PATTERNS if word in words),
        frozen_layers=tuple(sorted(frozen)),
        changed_layers=len(layers) - len(frozen),
        late_over_early=late,
        by_group=by_group,
    )


def _relative(parts: Iterable[Part]) -> float | None:
    """Pooled relative L2."""
    return figures(merge(sums for _, sums in parts)).rel_l2


def _profile(layers: dict[tuple[str, int], list[Part]], content: Sequence[Part]) -> list[float]:
    """Relative L2 by layer of the stack with most layers, content weights only."""
    stacks: dict[str, list[int]] = {}
    for stack, layer in layers:
        stacks.setdefault(stack, []).append(layer)
    if not stacks:
        return []
    widest = max(stacks, key=lambda stack: len(stacks[stack]))
    chosen = {id(part[1]) for part in content}
    values = [_relative(p for p in layers[widest, at] if id(p[1]) in chosen) for at in sorted(stacks[widest])]
    return [v for v in values if v is not None]


def _late_over_early(profile: Sequence[float]) -> float | None:
    """Mean of the last third over mean of the first, None where either is missing or zero."""
    third = len(profile) // 3
    if len(profile) < LAYERS or not third:
        return None
    early, late = float(np.mean(profile[:third])), float(np.mean(profile[-third:]))
    return late / early if early > 0 else None


def _trend(profile: Sequence[float], late: float | None) -> list[str]:
    """Words for the course of the change over the layers."""
    if len(profile) < LAYERS or not max(profile):
        return []
    third = len(profile) // 3
    if not any(profile[:third]) or (late is not None and late >= HEAVY):
        return ["late-heavy"]
    if late is not None and late <= 1 / HEAVY:
        return ["early-heavy"]
    moved = [value for value in profile if value]
    even = float(np.std(moved)) <= EVEN * float(np.mean(moved))
    return ["uniform"] if even and len(moved) >= MOST * len(profile) else []


def _concentration(content: Sequence[Part]) -> list[str]:
    """Words for change that sits in few tensors or in few elements."""
    words = []
    moved = [sums for row, sums in content if row.status == "changed"]
    pooled = figures(merge(moved))
    if pooled.changed is not None and pooled.changed <= SPARSE:
        words.append("sparse")
    total = sum(sums[AT["dd"]] for sums in moved)
    elements, energy = 0.0, 0.0
    for sums in sorted(moved, key=lambda s: -s[AT["dd"]] / max(s[AT["n"]], 1.0)):
        elements, energy = elements + sums[AT["n"]], energy + sums[AT["dd"]]
        if energy >= FOCUS_ENERGY * total:
            break
    if len(content) > 1 and elements <= FOCUS_TENSORS * sum(sums[AT["n"]] for _, sums in content):
        words.append("focused")
    return words


def _heavy_groups(content: Sequence[Part]) -> list[str]:
    """Words for a group whose relative change stands out from all the rest."""
    words = []
    for group in ("attention", "mlp", "embedding"):
        own = _relative(p for p in content if p[0].group == group)
        rest = _relative(p for p in content if p[0].group != group)
        if own is not None and rest is not None and own > 0 and own >= HEAVY * rest:
            words.append(f"{group}-heavy")
    return words


def read_insights(rows: Sequence[TensorRow], change: Change) -> tuple[Insight, ...]:
    """What a reader should know, warnings first."""
    found = [*_dangers(rows), *_structure(rows), *_course(rows, change)]
    rank = {"warning": 0, "notice": 1, "info": 2}
    return tuple(sorted(found, key=lambda insight: rank[insight.severity]))


def _dangers(rows: Sequence[TensorRow]) -> list[Insight]:
    """Warnings: tensors that no longer agree, broken values, norms that collapsed."""
    out = []
    both = [(row, row.metrics) for row in rows if row.metrics is not None]
    far = [(m.cosine, r) for r, m in both if m.cosine is not None and m.cosine < FAR and r.group != "norm"]
    if far:
        worst = [r for _, r in sorted(far, key=lambda pair: pair[0])]
        out.append(_warn(worst, f"cosine below {FAR} (lowest {min(c for c, _ in far):.3f})"))
    for side in ("a", "b"):
        broken = [r for r, m in both if getattr(m, f"nan_{side}")]
        if broken:
            out.append(_warn(broken, f"NaN or infinities in {side.upper()}"))
    scaled = [(m.norm_ratio, r) for r, m in both if m.norm_ratio is not None]
    collapsed = [r for ratio, r in scaled if ratio < COLLAPSED]
    exploded = [r for ratio, r in scaled if ratio > EXPLODED]
    if collapsed:
        out.append(_warn(collapsed, f"norms below {COLLAPSED:g} of A's"))
    if exploded:
        out.append(_warn(exploded, f"norms above {EXPLODED:g} times A's"))
    return out


def _warn(rows: Sequence[TensorRow], what: str) -> Insight:
    return Insight("warning", f"{_count(len(rows), 'tensor')} with {what}: {_named(rows)}.")


def _structure(rows: Sequence[TensorRow]) -> list[Insight]:
    """Notices about tensors that only one side has, reshaped ones and casts."""
    out = []
    for status, text in (("removed", "only in A"), ("added", "only in B"), ("shape-changed", "of another shape in B")):
        some = [row for row in rows if row.status == status]
        if some:
            out.append(Insight("notice", f"{_count(len(some), 'tensor')} {text}: {_named(some)}."))
    casts: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.dtype_a and row.dtype_b and row.dtype_a != row.dtype_b:
            casts[row.dtype_a, row.dtype_b] = casts.get((row.dtype_a, row.dtype_b), 0) + 1
    for (one, two), count in casts.items():
        out.append(Insight("notice", f"{_count(count, 'tensor')} stored as {two} in B, {one} in A."))
    return out


def _course(rows: Sequence[TensorRow], change: Change) -> list[Insight]:
    """Where the change sits, in sentences."""
    both = [row for row in rows if row.metrics is not None]
    moved = sum(row.status == "changed" for row in both)
    if not both:
        return []
    if not moved:
        return [
            Insight("info", f"No value differs in {_count(len(both), 'compared tensor')} beyond what is tolerated.")
        ]
    out = [Insight("info", f"{moved} of {_count(len(both), 'compared tensor')} changed.")]
    if change.frozen_layers:
        names = ", ".join(f"{stack}.{layer}" for stack, layer in change.frozen_layers[:8])
        more = f" and {len(change.frozen_layers) - 8} more" if len(change.frozen_layers) > 8 else ""
        frozen = _count(len(change.frozen_layers), "layer")
        out.append(Insight("notice", f"{frozen} frozen, every tensor unchanged: {printable(names)}{more}."))
    said = {
        "uniform": "The change is about equally large in all layers that changed.",
        "early-heavy": "The change is concentrated in the early layers.",
        "late-heavy": "The change is concentrated in the late layers.",
        "focused": f"At least {FOCUS_ENERGY:.0%} of the change sits in {FOCUS_TENSORS:.0%} of the weights or less.",
        "sparse": f"At most {SPARSE:.0%} of the elements of the changed tensors differ.",
    }
    for word in change.patterns:
        group = word.removesuffix("-heavy")
        text = said.get(word) or f"The {group} tensors changed most: relative L2 {change.by_group[group]:.3g}."
        out.append(Insight("info", text))
    return out


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _named(rows: Sequence[TensorRow]) -> str:
    """The first few names, safe to print."""
    names = ", ".join(printable(row.name, 120) for row in rows[:NAMED])
    return names + (f" and {len(rows) - NAMED} more" if len(rows) > NAMED else "")
