"""Figures of many tensors together: of a whole checkpoint, of groups and of layers.

Pooled figures come from merged sums, so they weigh every element alike. Norms, biases and other vectors are summed
up apart: they are few, their values sit near one or zero, and their cosines are near 1 between any two models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lineage.measure.groups import Groups
from lineage.measure.metrics import FIGURES, MERGED, figures, merge

if TYPE_CHECKING:
    from lineage.measure.compare import TensorRow

__all__ = ["Part", "pool", "summarise", "summarise_groups", "summarise_layers"]

#: a row and the sums its metrics were made of
Part = tuple["TensorRow", NDArray[np.float64]]
_SPREAD = tuple(f for f in FIGURES if not f.startswith("nan_"))


def pool(parts: Iterable[Part]) -> dict[str, float | None]:
    """The figures that sums give, over all elements of all parts."""
    found = figures(merge(sums for _, sums in parts))
    return {name: getattr(found, name) for name in MERGED}


def summarise(parts: Sequence[Part], groups: Groups) -> dict[str, Any]:
    """Pooled figures and spread of the content weights; under `apart` those of norms, biases and other vectors."""
    content = [p for p in parts if not groups.apart(p[0].group, p[0].shape)]
    vectors = [p for p in parts if groups.apart(p[0].group, p[0].shape)]
    return _summary(content) | {"apart": _summary(vectors)}


def summarise_groups(parts: Sequence[Part]) -> dict[str, dict[str, Any]]:
    """Pooled figures and spread by group, groups sorted by name."""
    return {group: _summary(some) for group, some in sorted(_by(parts, lambda row: row.group).items())}


def summarise_layers(parts: Sequence[Part], groups: Groups) -> list[dict[str, Any]]:
    """One entry by stack and layer: pooled figures of its content weights (of all where it has none), mean relative
    L2 of its tensors, and a few figures by group under `groups`."""
    out = []
    inside = [p for p in parts if p[0].layer is not None]
    for (stack, layer), some in _by(inside, lambda row: (row.stack, row.layer)).items():
        content = [p for p in some if not groups.apart(p[0].group, p[0].shape)] or some
        by_group = {}
        for group, members in sorted(_by(some, lambda row: row.group).items()):
            pooled = pool(members)
            by_group[group] = {name: pooled[name] for name in ("cosine", "rel_l2", "mean_abs", "changed")}
        out.append(
            {"stack": stack, "layer": layer, "tensors": len(some)}
            | {"changed_tensors": sum(row.status == "changed" for row, _ in some)}
            | pool(content)
            | {"mean": _spread(content)["mean"], "groups": by_group}
        )
    order = {stack: at for at, stack in enumerate(dict.fromkeys(row.stack for row, _ in inside))}
    return sorted(out, key=lambda entry: (order[entry["stack"]], entry["layer"]))


def _by(parts: Iterable[Part], key: Any) -> dict[Any, list[Part]]:
    """Parts by a property of their rows, in order of appearance."""
    out: dict[Any, list[Part]] = {}
    for part in parts:
        out.setdefault(key(part[0]), []).append(part)
    return out


def _summary(parts: Sequence[Part]) -> dict[str, Any]:
    """Counts, pooled figures and spread."""
    return (
        {"tensors": len(parts), "elements": sum(row.size for row, _ in parts)}
        | {"changed_tensors": sum(row.status == "changed" for row, _ in parts)}
        | pool(parts)
        | _spread(parts)
    )


def _spread(parts: Iterable[Part]) -> dict[str, dict[str, float | None]]:
    """Mean, standard deviation, least and largest of each figure over the tensors that define it."""
    rows = [[getattr(row.metrics, name) for name in _SPREAD] for row, _ in parts]
    # None becomes NaN here and is masked, so that one pass serves all figures
    values = np.array(rows, np.float64).reshape(-1, len(_SPREAD))
    known = ~np.isnan(values)
    count = known.sum(axis=0)
    with np.errstate(all="ignore"):
        mean = np.where(known, values, 0.0).sum(axis=0) / count
        std = np.sqrt((np.where(known, values - mean, 0.0) ** 2).sum(axis=0) / count)
    least = np.where(known, values, np.inf).min(axis=0, initial=np.inf)
    most = np.where(known, values, -np.inf).max(axis=0, initial=-np.inf)
    columns = {"mean": mean, "std": std, "min": least, "max": most}
    return {
        word: {f: x if np.isfinite(x) else None for f, x in zip(_SPREAD, column.tolist(), strict=True)}
        for word, column in columns.items()
    }
