"""The last word on a match: its rule applied to A, held against B element by element."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint, TensorSpec
from lineage.checkpoint.dtypes import decode, encode
from lineage.layout.axes import LayoutError
from lineage.layout.chain import Level, apply_chain, leaves, mapped
from lineage.layout.induce import Match
from lineage.layout.mapping import Instance, Mapping
from lineage.layout.operations import Add, Operation, Scale
from lineage.match.chains import OVER
from lineage.match.spread import spread
from lineage.match.values import MANTISSA, Values

__all__ = ["Certified", "Checked", "certify", "check", "compare", "flat"]

#: elements compared at a time
BLOCK = 1 << 19
#: once two tensors are known to differ, so many samples, spread evenly, are enough for their correlation
FEW, SAMPLE = 4, 1 << 16
#: cosine below which a match that claims values is dropped
LEAST_COSINE = 0.3
#: deviations above chance that certify a match, and below which one that claims values is dropped
LEAST_Z, WEAK_Z = 6.0, 2.0
#: a factor that training did not make is at least so far from one, and known to so much (relative)
FAR, NEAR, VAGUE = 0.2, 0.02, 0.1
#: by how much a cosine may fall short of what a mapping says of it
SLACK = 0.02


class Certified(NamedTuple):
    """A match with its evidence: the cosine of all its elements, whether bits agree, and whether it holds."""

    match: Match
    holds: bool


class _Sums:
    """Moments of paired values, enough for a correlation and a fit."""

    def __init__(self) -> None:
        self.n, self.x, self.y, self.xx, self.yy, self.xy = 0, 0.0, 0.0, 0.0, 0.0, 0.0
        self.equal = True

    def add(self, x: NDArray[Any], y: NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):
            u, v = x.astype(np.float64), y.astype(np.float64)
        ok = np.isfinite(u) & np.isfinite(v)
        if not ok.all():
            u, v = u[ok], v[ok]
        self.n += len(u)
        self.x += float(u.sum())
        self.y += float(v.sum())
        self.xx += float(u @ u)
        self.yy += float(v @ v)
        self.xy += float(u @ v)

    def same(self, x: NDArray[Any]) -> None:
        """Adds values that both sides hold; a share of them is enough for their moments."""
        u = x[:: max(1, len(x) // 4096)].astype(np.float64)
        ok = np.isfinite(u)
        if not ok.all():
            u = u[ok]
        total, square = float(u.sum()), float(u @ u)
        self.n += len(u)
        self.x += total
        self.y += total
        self.xx += square
        self.yy += square
        self.xy += square

    def merge(self, other: _Sums) -> None:
        for field in ("n", "x", "y", "xx", "yy", "xy"):
            setattr(self, field, getattr(self, field) + getattr(other, field))
        self.equal &= other.equal

    def cosine(self) -> float | None:
        size = math.sqrt(self.xx * self.yy)
        return max(-1.0, min(1.0, self.xy / size)) if size > 0 else None

    def pearson(self) -> float | None:
        if self.n < 2:
            return None
        var_x, var_y = self.xx - self.x**2 / self.n, self.yy - self.y**2 / self.n
        if var_x <= 1e-12 * self.xx or var_y <= 1e-12 * self.yy:
            return None
        return max(-1.0, min(1.0, (self.xy - self.x * self.y / self.n) / math.sqrt(var_x * var_y)))


def certify(a: Values, b: Values, matches: Sequence[Match], *, threads: int) -> list[Certified]:
    """Every match with its evidence; those that claim values but do not show them no longer hold."""
    sizes = [sum(b.size(name) for name in flat(m.targets)) for m in matches]
    return spread(lambda m: _certify(a, b, m), matches, sizes, threads)


def _certify(a: Values, b: Values, match: Match) -> Certified:
    sums = compare(a.checkpoint, b.checkpoint, match)
    if sums is None:
        return Certified(match, False)
    exact = sums.equal
    if not exact and match.how == "values" and _unmoved(a, b, match):
        plain = msgspec.structs.replace(match, ops=())
        still = compare(a.checkpoint, b.checkpoint, plain)
        if still is not None and (still.pearson() or 0.0) >= (sums.pearson() or 0.0):
            match, sums = plain, still
    cosine, pearson = sums.cosine(), sums.pearson()
    match = _affine(match, sums, a, b) if not exact and match.how != "name" else match
    z = -math.inf if pearson is None else pearson * math.sqrt(sums.n)
    strong = pearson is not None and pearson >= LEAST_COSINE and z >= LEAST_Z
    how = match.how
    if how == "values" and not exact and pearson is not None and (pearson < LEAST_COSINE or z < WEAK_Z):
        return Certified(match, False)
    if how != "values" and strong:
        how = "values"
    if how == "values" and pearson is None:
        how = "structure"
    certified = how == "values" and (exact or strong)
    return Certified(
        msgspec.structs.replace(match, how=how, cosine=1.0 if exact else cosine, certified=certified), True
    )


def _unmoved(a: Values, b: Values, match: Match) -> bool:
    """Whether one tensor might as well correspond to the other as it is: few rows tell little of their order."""
    if len(match.sources) > 1 or len(match.targets) > 1 or not match.ops or not all(op.moves for op in match.ops):
        return False
    x, y = match.sources[0], match.targets[0]
    if not isinstance(x, str) or not isinstance(y, str) or a.size(x) > SAMPLE:
        return False
    return a.checkpoint.specs[x].shape == b.checkpoint.specs[y].shape


class Checked(msgspec.Struct, frozen=True):
    """One instance of a rule, held against B again.

    Attributes
    ----------
    rule : its place in the mapping
    targets, sources : the tensors
    cosine : of all elements, None where it is not defined
    exact : equal bit by bit, or after rounding to the coarser dtype
    holds : what the rule says of its values is so
    why : one sentence where it does not hold
    """

    rule: int
    targets: tuple[str, ...]
    sources: tuple[str, ...]
    cosine: float | None
    exact: bool
    holds: bool
    why: str = ""


def check(mapping: Mapping, a: Checkpoint, b: Checkpoint, *, threads: int = 2) -> list[Checked]:
    """Every instance of every rule, verified again from the weights.

    Raises
    ------
    LayoutError : a rule does not fit A's tensors
    """
    shapes = {s.name: s.shape for s in a}
    instances = list(mapping.instances(shapes))
    sizes = [sum(b.specs[name].size for name in i.target_names if name in b.specs) for i in instances]
    return spread(lambda i: _checked(a, b, i), instances, sizes, threads)


def _checked(a: Checkpoint, b: Checkpoint, instance: Instance) -> Checked:
    rule, targets, sources = instance.rule, instance.target_names, instance.source_names

    def answer(cosine: float | None, exact: bool, why: str = "") -> Checked:
        return Checked(instance.number, targets, sources, cosine, exact, not why, why)

    missing = [t for t in targets if t not in b.specs]
    if missing:
        return answer(None, False, f"{missing[0]} is not in the target")
    entries = [mapped(e, lambda name: name) for e in instance.sources]
    sums = _moments(a, b, rule.ops, entries, sources, targets)
    if sums is None:
        return answer(None, False, f"{targets[0]} has another shape than the rule gives")
    cosine, pearson = sums.cosine(), sums.pearson()
    claimed = rule.evidence.cosine if rule.evidence is not None else None
    if sums.equal or rule.how in ("structure", "name"):
        return answer(1.0 if sums.equal else cosine, sums.equal)
    if claimed is not None and cosine is not None and cosine < claimed - SLACK:
        return answer(cosine, False, f"{targets[0]}: the cosine is {cosine:.4f}, the mapping says {claimed:.4f}")
    if pearson is None or pearson < LEAST_COSINE:
        return answer(cosine, False, f"{targets[0]} does not show the values that the rule gives")
    return answer(cosine, False)


def compare(a: Checkpoint, b: Checkpoint, match: Match) -> _Sums | None:
    """Moments of A's values, laid out as the match says, against B's; None where the shapes do not fit."""
    entries = [Level(OVER, e) if isinstance(e, tuple) else e for e in match.sources]
    return _moments(a, b, match.ops, entries, flat(match.sources), flat(match.targets))


def _moments(
    a: Checkpoint,
    b: Checkpoint,
    ops: Sequence[Operation],
    names: Sequence[Any],
    names_a: Sequence[str],
    names_b: Sequence[str],
) -> _Sums | None:
    """Moments of a chain over (nested) source names against the targets."""
    if not ops and len(names_a) == len(names_b) == 1:
        return _direct(a, b, names_a[0], names_b[0])
    dtype = a.specs[names_a[0]]
    plain = all(a.specs[n].plain and a.specs[n].dtype == dtype.dtype for n in names_a)
    try:
        entries = [mapped(e, lambda name: _load(a, name, plain)) for e in names]
        made = apply_chain(ops, entries)
    except LayoutError:
        return None
    known = _known(ops, entries)
    total = _Sums()
    arrays = [x for m in made for x in leaves(m)]
    if len(arrays) != len(names_b):
        return None
    for array, name in zip(arrays, names_b, strict=True):
        spec = b.specs[name]
        if tuple(array.shape) != spec.shape:
            return None
        values = np.ascontiguousarray(array).reshape(-1)
        if known is None:
            total.merge(_against(values, dtype if plain else None, b, spec))
        else:
            total.merge(_partly(decode(values, dtype.dtype) if plain else values, known.pop(0), b, spec))
    return total


def _known(ops: Sequence[Operation], entries: Sequence[Any]) -> list[NDArray[np.bool_]] | None:
    """Which elements of each target a chain gives, None where it gives all."""
    if not any(op.partial for op in ops):
        return None
    ones = [mapped(e, lambda x: np.ones(x.shape, np.uint8)) for e in entries]
    return [np.ascontiguousarray(x).reshape(-1) > 0 for m in apply_chain(ops, ones) for x in leaves(m)]


def _partly(values: NDArray[Any], known: NDArray[np.bool_], b: Checkpoint, spec: TensorSpec) -> _Sums:
    """Moments over the known elements; a tensor that is only partly given is never called equal."""
    sums = _Sums()
    sums.equal = False
    for low in range(0, spec.size, BLOCK):
        part = slice(low, min(spec.size, low + BLOCK))
        mine = known[part]
        sums.add(values[part][mine], b.read(spec.name, part.start, part.stop)[mine])
    return sums


def _load(a: Checkpoint, name: str, plain: bool) -> NDArray[Any]:
    return a.codes(name) if plain else a.tensor(name)


def _against(values: NDArray[Any], source: TensorSpec | None, b: Checkpoint, spec: TensorSpec) -> _Sums:
    sums = _Sums()
    for number, low in enumerate(range(0, spec.size, BLOCK)):
        if not sums.equal and number % max(1, spec.size // (FEW * BLOCK)):
            continue
        high = min(spec.size, low + (BLOCK if sums.equal else SAMPLE))
        _block(sums, values[low:high], source.dtype if source else None, b, spec, low, high)
    return sums


def _direct(a: Checkpoint, b: Checkpoint, name_a: str, name_b: str) -> _Sums | None:
    spec_a, spec_b = a.specs[name_a], b.specs[name_b]
    if spec_a.shape != spec_b.shape:
        return None
    sums = _Sums()
    for number, low in enumerate(range(0, spec_a.size, BLOCK)):
        if not sums.equal and number % max(1, spec_a.size // (FEW * BLOCK)):
            continue
        high = min(spec_a.size, low + (BLOCK if sums.equal else SAMPLE))
        x = a.read_codes(name_a, low, high) if spec_a.plain else a.read(name_a, low, high)
        _block(sums, x, spec_a.dtype if spec_a.plain else None, b, spec_b, low, high)
    return sums


def _block(
    sums: _Sums, x: NDArray[Any], dtype: str | None, b: Checkpoint, spec: TensorSpec, low: int, high: int
) -> None:
    """Adds one block: equal codes are enough to know equality, everything else is decoded."""
    if dtype is not None and spec.plain:
        y = b.read_codes(spec.name, low, high)
        if dtype == spec.dtype and np.array_equal(x, y):
            sums.same(decode(x, dtype))
            return
        u, v = decode(x, dtype), decode(y, spec.dtype)
    else:
        u = x if dtype is None else decode(x, dtype)
        v = b.read(spec.name, low, high)
    if sums.equal:
        sums.equal = _same(u, v, dtype, spec)
    sums.add(u, v)


def _same(u: NDArray[Any], v: NDArray[Any], dtype: str | None, spec: TensorSpec) -> bool:
    """Equal values, or equal once the finer side is rounded as the coarser one is stored."""
    same = (u == v) | (np.isnan(u) & np.isnan(v)) if u.dtype.kind == "f" and v.dtype.kind == "f" else u == v
    if np.all(same):
        return True
    if not spec.plain or u.dtype.kind != "f" or dtype == spec.dtype:
        return False
    rounded = decode(encode(u, spec.dtype), spec.dtype)
    if np.array_equal(rounded, v, equal_nan=True):
        return True
    return dtype is not None and np.array_equal(decode(encode(v, dtype), dtype), u, equal_nan=True)


def flat(entries: Sequence[str | tuple[str, ...]]) -> list[str]:
    """All names of a match's sources or targets."""
    return [n for e in entries for n in ((e,) if isinstance(e, str) else e)]


def _affine(match: Match, sums: _Sums, a: Values, b: Values) -> Match:
    """The match with the whole number that was added to every element, or the factor, where there was one."""
    pearson = sums.pearson()
    if pearson is None or pearson < 0.5 or sums.n < 8:
        return match
    shift = (sums.y - sums.x) / sums.n
    spread = max(0.0, (sums.xx + sums.yy - 2 * sums.xy) / sums.n - shift**2)
    error = math.sqrt(spread / sums.n)
    whole = round(shift)
    var = sums.xx / sums.n - (sums.x / sums.n) ** 2
    if whole and abs(shift - whole) <= 4 * error + 1e-3 and abs(shift) > 2 * math.sqrt(max(var, 0)):
        return msgspec.structs.replace(match, ops=(*match.ops, Add(float(whole))))
    factor = _factor(sums, [*flat(match.sources), *flat(match.targets)], a, b)
    return match if factor is None else msgspec.structs.replace(match, ops=(*match.ops, Scale(factor)))


def _factor(sums: _Sums, names: Sequence[str], a: Values, b: Values) -> float | None:
    """The number that A's values were multiplied with: exactly (gains and scales folded in), or nearly and simple."""
    specs = [ck.specs[n] for ck in (a.checkpoint, b.checkpoint) for n in names if n in ck.specs]
    rounding = sum(0.5 * 2.0 ** -MANTISSA.get(spec.dtype, 0) for spec in specs[:1] + specs[-1:])
    slope = sums.xy / sums.xx
    rest = math.sqrt(max(0.0, sums.yy - sums.xy**2 / sums.xx) / sums.yy)
    error = 4 * rest / math.sqrt(sums.n)
    lengths = {n // k for spec in specs for n in spec.shape for k in (1, 2, 4, 8, 16, 32, 64) if n % k == 0}
    if rest <= rounding and abs(slope - 1) > 4 * rounding:
        # converters multiply in float32: a factor rounded to it gives their bits
        return float(np.float32(_simple(slope, error + 1e-7, lengths) or _decimal(slope, error + 1e-7)))
    if abs(slope - 1) <= FAR or error >= VAGUE:
        return None
    return _simple(slope, error, lengths if error < NEAR else ())


def _simple(slope: float, slack: float, lengths: Iterable[int]) -> float | None:
    """A power of two, or the root of a length or its inverse, within `slack` (relative)."""
    options = [2.0**k for k in range(-10, 11)] + [n**p for n in sorted(lengths) if n > 1 for p in (0.5, -0.5)]
    near = [x for x in options if x != 1 and abs(x / slope - 1) <= slack]
    return min(near, key=lambda x: abs(x / slope - 1), default=None)


def _decimal(slope: float, slack: float) -> float:
    """The number with the fewest digits within `slack` (relative)."""
    return next((x for d in range(1, 17) if abs((x := float(f"{slope:.{d}g}")) / slope - 1) <= slack), slope)
