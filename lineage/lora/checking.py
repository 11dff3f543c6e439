"""Whether an adapter of A should work on B: how far the two differ where the adapter reads and writes."""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint
from lineage.filling import Filled
from lineage.judge import judge
from lineage.layout.mapping import Mapping
from lineage.lora.carry import carried
from lineage.lora.forms import low_rank
from lineage.lora.reading import read_adapter
from lineage.lora.source import Base, open_adapter

__all__ = ["Checked", "ModuleCheck", "check"]

#: A module carries over where the bases differ by less than this share of A inside the adapter's subspace, and does
#: not above the second; between unrelated matrices of one size the share is √2. A convention, not a calibration.
CARRIES, LOST = 0.35, 1.0

Answer = Literal["carries over", "doubtful", "does not"]


class ModuleCheck(msgspec.Struct, frozen=True, kw_only=True):
    """One adapted tensor of B.

    Attributes
    ----------
    tensor : its name
    answer : in words
    whole : |B − A| / |A| of the tensor, A laid out as B
    reads : the same for what the adapter reads: rows of both projected on its down factor
    writes : the same for what it writes: columns projected on its up factor
    strength : |ΔW| / |W|
    """

    tensor: str
    answer: Answer
    whole: float
    reads: float
    writes: float
    strength: float


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """The whole answer.

    Attributes
    ----------
    weights : `same weights`, `related`, `unrelated` or `undetermined`
    works : whether most of the adapter's change lands where B is still A; None where it cannot be told
    class_, log10_p, coverage : the verdict's figures (class in JSON)
    modules : each adapted tensor
    left : tensors of A that the adapter changes and B lacks, with the reason
    """

    weights: Literal["same weights", "related", "unrelated", "undetermined"]
    works: bool | None
    class_: str = msgspec.field(name="class")
    log10_p: float | None
    coverage: float
    modules: tuple[ModuleCheck, ...]
    left: dict[str, str]


def check(
    adapter: str | os.PathLike[str],
    a: Checkpoint,
    b: Checkpoint,
    mapping: Mapping,
    *,
    format: str | None = None,
    seed: int = 0,
    threads: int = 2,
) -> Checked:
    """Whether an adapter that was trained on `a` should work on `b`.

    Raises
    ------
    InputError : the adapter cannot be read on A, or the mapping does not fit
    """
    base = Base.of(a)
    read = read_adapter(open_adapter(adapter), base, format=format)
    carry = carried(read.deltas, mapping, base)
    filled = Filled(mapping, a)
    modules = []
    for name, delta in carry.deltas.items():
        if name in b.specs and name in filled.specs and len(delta.shape) > 1 and delta.terms:
            rows = filled.tensor(name).astype(np.float64).reshape(delta.shape[0], -1)
            found = b.tensor(name).astype(np.float64).reshape(delta.shape[0], -1)
            pair = low_rank(delta)
            modules.append(_module(name, rows, found, pair.up * pair.scale, pair.down))
    verdict = judge(a, b, mapping, seed=seed, threads=threads)
    words: dict[bool | None, Any] = {True: "related", False: "unrelated", None: "undetermined"}
    carrying = sum(m.strength**2 for m in modules if m.answer == "carries over")
    total = sum(m.strength**2 for m in modules)
    return Checked(
        weights="same weights" if verdict.class_ == "copied" else words[verdict.related],
        works=None if not total else carrying / total > 0.5,
        class_=verdict.class_,
        log10_p=verdict.log10_p,
        coverage=verdict.coverage,
        modules=tuple(modules),
        left={f.key: f.reason for f in read.left} | carry.reasons,
    )


def _module(name: str, a: NDArray[Any], b: NDArray[Any], up: NDArray[Any], down: NDArray[Any]) -> ModuleCheck:
    """The figures of one tensor."""
    apart = b - a
    reads = np.linalg.qr(down.astype(np.float64).T)[0]
    writes = np.linalg.qr(up.astype(np.float64))[0]
    shares = (
        _share(apart, a),
        _share(apart @ reads, a @ reads),
        _share(writes.T @ apart, writes.T @ a),
    )
    inside = max(shares[1:])
    answer: Answer = "carries over" if inside <= CARRIES else "doubtful" if inside < LOST else "does not"
    return ModuleCheck(
        tensor=name, answer=answer, whole=shares[0], reads=shares[1], writes=shares[2],
        strength=_share(up @ down, a),
    )  # fmt: skip


def _share(part: NDArray[Any], whole: NDArray[Any]) -> float:
    size = float(np.linalg.norm(whole))
    return float(np.linalg.norm(part)) / size if size else 0.0
