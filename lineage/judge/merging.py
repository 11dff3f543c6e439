"""Was B merged from given candidates, and with which weights? Least squares over samples of all matrices.

The model is B - A = Σ w (C - A), w not negative, with one weight for each candidate C: linear merges and task
arithmetic are of this kind (Wortsman et al., "Model soups", ICML 2022; Ilharco et al., "Editing Models with Task
Arithmetic", ICLR 2023); merges that pick single values are left to `picking`. Where B does not come from A the nearest
candidate takes A's place. What a fit leaves over is held against what rounding to B's dtype must leave; only a fit
that leaves no more names all parents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.candidates import Gathered
from lineage.judge.picking import Picked, pick
from lineage.judge.relations.finding import Finding
from lineage.judge.verdict import Verdict

__all__ = ["Merge", "Share", "weigh", "with_merge"]

Floats = NDArray[np.floating[Any]]

#: weights below this do not count as a part
PART = 0.02
#: ... nor do those below so many standard errors
SURE = 5.0
#: a part above this has more of a candidate than the candidate itself: rather that one is a merge with B
BEYOND = 1.1
#: candidates whose differences differ by less, as a share of the square, cannot be told apart
TWIN = 0.01
#: a fit is complete where it leaves no more than this share of the distance to the nearest source, or this many times
#: what rounding B leaves: as much again where the parents were rounded after the merge (zoo: merges of all their
#: parents 1.05 times at most; merges that lack a parent 14 and more)
COMPLETE, ROUNDED = 0.01, 2.0
#: ... and with weights of its own for every tensor
EXACT = 1e-4
#: ... of which so many mix two sources; else B is a collection of theirs, or what they come from
MIXED = 0.5
#: where rounding could make so much of the distance to the nearest source, B is that source
NEVER = 0.5
#: several parts make a merge up to this share of the distance where their weights agree between tensors: a parent may
#: be missing (zoo: a third of three 0.11 to 0.15; fine-tunes that are no merges of the candidates 0.46 and more)
PARTIAL, SPREAD = 0.2, 0.5
#: further than this from 1 in all, the weights are no plain average; A has the rest
WHOLE = 0.005
#: times the greatest error of rounding that a single value may be off (the parents may have been rounded as well), and
#: share of its size that arithmetic in float32 may cost
SLACK, EXACTLY = 1.5, 3e-7
#: stands for the error of a weight that nothing determines
UNTOLD = 9.0
#: between these multiples of what a sphere makes the scale counts as that of a spherical interpolation
SPHERE = (0.5, 2.0)


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """What one candidate gives.

    Attributes
    ----------
    name : label of the candidate
    weight : of its difference from the base
    error : standard error of the weight
    low, high : weights of single tensors, 5 % and 95 % quantile
    """

    name: str
    weight: float
    error: float
    low: float
    high: float

    @property
    def counts(self) -> bool:
        """True for a part of the sum, which neither the noise of the fit nor rounding makes."""
        return self.weight >= max(PART, SURE * self.error)

    @property
    def varies(self) -> bool:
        """True where tensors have weights of their own."""
        return self.high - self.low > max(SPREAD * self.weight, PART)


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """B as a sum of candidates.

    Attributes
    ----------
    base : `A`, or the candidate that stands in for it where B does not come from A
    shares : of all other candidates
    residual : share of |B - base|² that the sum does not explain
    rounding : share that rounding to B's dtype leaves, 0 where it is unknown
    nearest, distance : the source that B differs least from, and that difference as a share of |B - base|²
    scale : what all weights, the base's included, come to in a fit that leaves it free: 1 for linear merges
    spherical : the scale is that of a spherical interpolation (slerp)
    complete : nothing is left but rounding
    by_tensor : ... once every tensor has weights of its own
    picked : B's values are single ones of the sources', or sums of their changes (TIES, DARE)
    assembled : ... and every tensor is that of one source, so that B may as well be what they all come from
    merged : two parts at least, and enough is explained
    tensors, elements : sampled
    left_out : candidates whose layout has no place for most of B
    twins : candidates that differ too little from another one, whose share is theirs as well
    """

    base: str
    shares: tuple[Share, ...]
    residual: float
    rounding: float
    nearest: str
    distance: float
    scale: float
    spherical: bool
    complete: bool
    by_tensor: bool
    assembled: bool
    merged: bool
    tensors: int
    elements: int
    left_out: tuple[str, ...] = ()
    twins: tuple[tuple[str, str], ...] = ()
    picked: Picked | None = None

    @property
    def rest(self) -> float:
        """The base's own weight: what is missing to 1."""
        return 1.0 - sum(share.weight for share in self.shares)

    @property
    def formula(self) -> str:
        """B as a sum, with the residual."""
        parts = [f"{share.weight:.2f}·({share.name} − {self.base})" for share in self._parts]
        if self.base == "A":
            total = " + ".join(["A", *parts])
        else:
            own = [f"{self.rest:.2f}·{self.base}"] if abs(self.rest) >= PART else []
            total = " + ".join([*own, *(f"{s.weight:.2f}·{s.name}" for s in self._parts)])
        return f"B = {total}, residual {_percent(self.residual)}"

    @property
    def sentence(self) -> str:
        """What the fit says, for people."""
        if not self.merged:
            return self._not_merged()
        if self.picked is not None:
            return self._picked_sentence(self.picked)
        said = [self.formula]
        if self.base == "A" and abs(self.rest) < WHOLE:
            said.append("A itself takes no part")
        elif self.base == "A" and len(self._parts) == 1 and self.rest > 0:
            said.append(f"that is {self.rest:.2f} of A itself")
        spread = [s for s in self._parts if s.varies or not self.complete]
        said += [f"from tensor to tensor {s.name} has {s.low:.2f} to {s.high:.2f}" for s in spread]
        if self.spherical:
            said.append(f"all weights come to {self.scale:.4f}, not 1, as spherical interpolation (slerp) makes them")
        if self.by_tensor:
            said.append("with weights of its own for every tensor nothing but rounding is left")
        elif self.complete:
            said.append(f"rounding alone leaves {_percent(self.rounding)}" if self.rounding else "nothing else is left")
        else:
            said.append(f"rounding would leave {_percent(self.rounding)}: another parent, or training, has a part")
        return "; ".join(said)

    @property
    def _parts(self) -> list[Share]:
        return [share for share in self.shares if share.counts]

    def _picked_sentence(self, picked: Picked) -> str:
        """What was added to single values."""
        names = [(share.name, factor) for share, factor in zip(self.shares, picked.factors, strict=True) if factor]
        parts = ", ".join(f"{factor:.2f}·({name} − {self.base})" for name, factor in names)
        several = "the mean of several" if picked.averaged else "the sum of several"
        kept = f"{1 - picked.kept:.0%} of the values are {self.base}'s own"
        how = "as TIES merging leaves it" if picked.averaged else "as DARE leaves it"
        return (
            f"B = {self.base} with one of {parts} added to single values, or {several}, {how}: that explains "
            f"{picked.explained:.0%} of what was added, and {kept}"
        )

    def _not_merged(self) -> str:
        """Why this is no merge of the candidates."""
        if self.distance <= self.rounding * ROUNDED / NEVER:
            return f"B is {self.nearest} but for rounding: no merge"
        beyond = next((share for share in self._parts if share.weight > BEYOND), None)
        if beyond and self.complete:
            other = f"{1 / beyond.weight:.2f} of B"
            return (
                f"{self.formula}: {beyond.name} lies between {self.base} and B, so it may hold {other}; B is no merge"
            )
        names = ", ".join(share.name for share in self.shares)
        if self.assembled:
            return f"every matrix of B is one of {names} or {self.base}: put together from them, or what they come from"
        what = f"as a sum of {names} the fit explains {_percent(1 - self.residual)} of B − {self.base}"
        if self.nearest != self.base:
            what += f", {self.nearest} alone {_percent(max(0.0, 1 - self.distance))}"
        return f"{what}: B is no merge of these candidates alone"


def weigh(gathered: Gathered) -> Merge | None:
    """The weights that explain B best, None where B equals A.

    Notes
    -----
    Non-negative least squares: Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23.
    """
    total = gathered.products.sum(axis=0)
    sources = len(gathered.labels)
    base = 0 if gathered.labels[0] == "A" else int(np.argmin(np.diag(total)[:sources]))
    if total[base, base] == 0 and gathered.labels[base] == "A":
        return None
    others, twins = _apart(gathered, total, base)
    turn = _turn(sources, base, others)
    total = turn.T @ total @ turn
    each = np.einsum("ki,tkl,lj->tij", turn, gathered.products, turn)
    weights, residual = _fit(total, len(others))
    free, free_residual = _fit(total, len(others), scaled=True)
    elements, energy = int(gathered.counts.sum()), float(total[-1, -1])
    rounding = float(gathered.rounding.sum()) / energy if energy else 0.0
    far = np.diag(gathered.products.sum(axis=0))[:sources] / energy if energy else np.zeros(sources)
    nearest = int(np.argmin(far))
    limit = max(COMPLETE * float(far[nearest]), ROUNDED * rounding)
    spherical = free_residual <= limit and _spherical(each, weights)
    if spherical:
        weights, residual = free[:-1], free_residual
    shares = _shares(gathered, others, each, total, weights, residual, elements)
    complete = residual <= limit
    alone = max(EXACT * float(far[nearest]), ROUNDED * rounding)
    left, mixed = _each_by_itself(each, len(others))
    apart = not complete and left <= alone
    merge = Merge(
        base=gathered.labels[base], shares=shares, residual=residual, rounding=rounding,
        nearest=gathered.labels[nearest], distance=float(far[nearest]), scale=1.0 + float(free[-1]),
        spherical=spherical, complete=complete, by_tensor=apart and mixed >= MIXED,
        assembled=apart and mixed < MIXED, merged=False, tensors=len(each),
        elements=elements, left_out=gathered.left_out, twins=twins,
    )  # fmt: skip
    if not (complete or merge.by_tensor or merge.assembled):
        picked = _picked(gathered, base, others)
        if picked is not None:
            shares = tuple(
                msgspec.structs.replace(share, weight=factor, error=0.0, low=factor, high=factor)
                for share, factor in zip(shares, picked.factors, strict=True)
            )
            return msgspec.structs.replace(merge, picked=picked, shares=shares, merged=True)
    return msgspec.structs.replace(merge, merged=_merged(merge))


def _picked(gathered: Gathered, base: int, others: Sequence[int]) -> Picked | None:
    """What was added value by value to the base."""
    values, own = gathered.values, gathered.values[base]
    if not len(others):
        return None
    size = np.abs(values[-1]) + np.abs(values[-1] + own)
    errors = gathered.errors * SLACK + EXACTLY * size
    return pick(np.stack([values[k] - own for k in others]), -own, errors)


def with_merge(verdict: Verdict, merge: Merge) -> Verdict:
    """The verdict with what the fit says: the relation `merged` where A is a part of it, and the reason in any case."""
    findings, said = list(verdict.findings), merge.sentence
    if merge.merged and merge.base == "A":
        if merge.complete or merge.picked is not None:  # nothing is left that training would have to explain
            findings = [f for f in findings if f.tag not in ("fine-tuned", "continued-pretraining")]
        gone = {f.sentence[0].upper() + f.sentence[1:] + "." for f in verdict.findings if f not in findings}
        at = next((k for k, f in enumerate(findings) if f.tag in _LATER), len(findings))
        findings.insert(at, Finding("merged", 1.0 - merge.residual, said))
        verdict = msgspec.structs.replace(verdict, reasons=tuple(r for r in verdict.reasons if r not in gone))
    elif merge.merged:
        said = f"B is made of the candidates, not of A: {said}"
    reasons = [*verdict.reasons[:1], said[0].upper() + said[1:] + ".", *verdict.reasons[1:]]
    reasons += [f"{name} has no counterpart for most of B: no parent of it." for name in merge.left_out]
    reasons += [
        f"{one} and {two} differ too little to be told apart: one share stands for both." for one, two in merge.twins
    ]
    return msgspec.structs.replace(
        verdict, findings=tuple(findings), relations=tuple(f.tag for f in findings), reasons=tuple(reasons)
    )


#: relations that are printed after `merged`
_LATER = frozenset({
    "depth-pruned", "depth-grown", "width-pruned", "width-grown", "vocabulary-extended", "expert-upcycled",
    "layers-reordered", "rotated", "rescaled", "sign-flipped", "partially-shared", "shared-initialisation",
})  # fmt: skip


# -- fitting


def _apart(gathered: Gathered, total: Floats, base: int) -> tuple[list[int], tuple[tuple[str, str], ...]]:
    """All sources but the base that can be told apart, and pairs of those that cannot."""
    chosen: list[int] = []
    twins = []
    for k in range(len(gathered.labels)):
        if k == base:
            continue
        turn = _turn(len(gathered.labels), base, [*chosen, k])
        g = turn.T @ total @ turn
        mine = len(chosen)
        apart = [g[mine, mine] + g[at, at] - 2 * g[mine, at] for at in range(mine)]
        twin = next((at for at, d in enumerate(apart) if d < TWIN * max(g[mine, mine], g[at, at])), None)
        if twin is None:
            chosen.append(k)
        else:
            twins.append((gathered.labels[k], gathered.labels[chosen[twin]]))
    return chosen, tuple(twins)


def _turn(sources: int, base: int, others: Sequence[int]) -> Floats:
    """From differences with B to the columns of the fit: candidate - base for each other source, B, B - base."""
    turn = np.zeros((sources + 1, len(others) + 2))
    for at, k in enumerate(others):
        turn[k, at], turn[base, at] = 1.0, -1.0
    turn[sources, -2], turn[base, -1] = 1.0, -1.0
    return turn


def _fit(products: Floats, count: int, *, scaled: bool = False) -> tuple[Floats, float]:
    """Weights that are not negative, and the share of the last column's square that they leave.

    `scaled`: and the weight of B itself, of either sign, as the last one.
    """
    from scipy.optimize import nnls

    columns = list(range(count)) + ([count] if scaled else [])
    g, h, whole = products[np.ix_(columns, columns)], products[columns, -1], float(products[-1, -1])
    if whole <= 0:
        return np.zeros(len(columns)), 0.0
    sizes = np.sqrt(np.maximum(np.diag(g), 0.0))
    sizes[sizes == 0] = np.inf  # a candidate that equals the base: weight 0
    values, vectors = np.linalg.eigh(g / np.outer(sizes, sizes))
    kept = values > 1e-12 * values[-1]
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    aim = (vectors[:, kept].T @ (h / sizes)) / np.sqrt(values[kept])
    if scaled:
        root = np.concatenate([root, -root[:, -1:]], axis=1)
    found, _ = nnls(root, aim)
    if scaled:
        found = np.append(found[:-2], found[-2] - found[-1])
    weights: Floats = found / sizes
    left = whole - 2 * float(weights @ h) + float(weights @ g @ weights)
    return weights, min(max(left / whole, 0.0), 1.0)


def _each_by_itself(each: Floats, count: int) -> tuple[float, float]:
    """What is left where every tensor has weights of its own, and the share of those that mix two sources."""
    whole, left, mixed, changed = float(each[:, -1, -1].sum()), 0.0, 0, 0
    for one in each:
        weights, residual = _fit(one, count)
        left += residual * float(one[-1, -1])
        changed += bool(one[-1, -1] > 0)
        mixed += bool(np.any((weights > PART) & (weights < 1 - PART)))
    return (left / whole if whole else 0.0), mixed / max(1, changed)


def _shares(
    gathered: Gathered, others: Sequence[int], each: Floats, total: Floats, weights: Floats, residual: float,
    elements: int,
) -> tuple[Share, ...]:  # fmt: skip
    """Weights with their errors and their spread between tensors."""
    count = len(others)
    strong = [one for one in each if one[-1, -1] >= 0.01 * each[:, -1, -1].mean()]
    single = np.stack([_fit(one, count)[0] for one in strong]) if strong else weights[None]
    low, high = np.quantile(single, (0.05, 0.95), axis=0)
    g = total[:count, :count]
    values, vectors = np.linalg.eigh(g)
    noise = max(residual, 1e-12) * total[-1, -1] / max(elements, 1)
    ratios = np.full(count, UNTOLD) if values[-1] <= 0 else noise / np.maximum(values, 1e-9 * values[-1])
    errors = np.sqrt((vectors**2) @ ratios)
    return tuple(
        Share(name=gathered.labels[k], weight=w, error=min(e, UNTOLD), low=one, high=two)
        for k, w, e, one, two in zip(others, *(x.round(4).tolist() for x in (weights, errors, low, high)), strict=True)
    )


def _spherical(each: Floats, weights: Floats) -> bool:
    """True where all weights come to more than 1 in (almost) every tensor, by what a sphere makes of them.

    Shoemake, "Animating Rotation with Quaternion Curves" (1985): weights sin((1-t)θ)/sin θ and sin(tθ)/sin θ. Their
    sum is 1 + t(1-t)θ²/2 for a small angle θ, which is the distance of the two over their length.
    """
    parts = [k for k, weight in enumerate(weights) if weight >= PART]
    rest = 1.0 - float(weights.sum())
    if not (len(parts) == 2 and abs(rest) < 10 * WHOLE) and not (len(parts) == 1 and rest >= PART):
        return False
    excess, expected = [], []
    for one in each:
        found, _ = _fit(one, len(weights), scaled=True)
        aside = np.zeros(len(one))
        aside[parts] = (1.0, -1.0)[: len(parts)]
        share = float(weights[parts[0]])
        expected.append(share * (1 - share) * float(aside @ one @ aside) / float(one[-2, -2]) / 2)
        excess.append(float(found[-1]))
    typical = float(np.median(excess))
    return float(np.quantile(excess, 0.1)) > 0 and SPHERE[0] <= typical / float(np.median(expected)) <= SPHERE[1]


def _merged(merge: Merge) -> bool:
    """Two parts at least; all is explained, or most of it by weights that agree between tensors."""
    parts = [share for share in merge.shares if share.counts]
    own = abs(merge.rest) >= PART and (len(parts) == 1 or merge.base != "A")
    same = merge.distance <= merge.rounding * ROUNDED / NEVER
    if same or not parts or len(parts) + own < 2 or any(share.weight > BEYOND for share in parts):
        return False
    if merge.complete or merge.by_tensor:
        return True
    return len(parts) > 1 and merge.residual <= PARTIAL * merge.distance and not any(share.varies for share in parts)


def _percent(share: float) -> str:
    """A share in percent with two digits."""
    return f"{100 * share:.2g} %" if share >= 1e-4 else "0 %"
