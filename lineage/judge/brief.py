"""The verdict from samples alone: few layers, few units of each, a few hundred values of every tensor."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.metered import Meter, Spent
from lineage.filling import Filled
from lineage.judge.common import common_layout
from lineage.judge.material import Material, Pair, Sample
from lineage.judge.relations import Finding, shapes
from lineage.judge.significance import significance
from lineage.judge.verdict import Verdict, bound_names, decide
from lineage.layout.mapping import Mapping

__all__ = ["judge_briefly"]

Floats = NDArray[np.floating[Any]]

#: units of a layer, and layers, that are compared: 4 × 64 neurons at their places reach log10_p = -356; where that
#: tells too little, as many as there is room for
ROWS, LAYERS, ALL_LAYERS = 64, 4, 32
#: values of a tensor that are compared, in runs
RUNS, RUN = 4, 64
#: bytes that one tensor's values may cost: more, and it would have to be computed as a whole
DEAR = 1 << 15
#: cosine of the search's places from which on such a tensor counts as equal: rounding in float32
SAME = 1 - 1e-6
#: relations that names, shapes and the mapping show; what kind of change it is takes all values
LOOKS = (
    shapes.identical,
    shapes.renamed,
    shapes.fused,
    shapes.transposed,
    shapes.permuted,
    shapes.cast,
    shapes.depth_pruned,
    shapes.depth_grown,
    shapes.width_pruned,
    shapes.width_grown,
    shapes.vocabulary_extended,
    shapes.layers_reordered,
)


def judge_briefly(
    a: Checkpoint,
    b: Checkpoint,
    mapping: Mapping,
    meter: Meter,
    *,
    unsettled: int = 0,
    seed: int = 0,
    rows: int | None = None,
) -> Verdict:
    """Whether B's weights come from A's, from as many bytes as the meter allows.

    Parameters
    ----------
    a, b : `Metered`, or parts of such
    mapping : as `lineage.match.budget.search` found it
    meter : theirs
    rows : units a layer that are compared; None: `ROWS`
    unsettled : B's matrices that the search could not look up; with such, nothing is ever called unrelated

    Notes
    -----
    The p-value is exact, as in a full run, over fewer units. Equality is that of the values looked at, and no
    direction is given.
    """
    before = meter.stopped
    options = {"seed": seed, "rows": rows or ROWS}
    verdict = _judged(a, b, mapping, meter, layers=LAYERS, **options)
    if verdict.related is None and meter.left:
        verdict = _judged(a, b, mapping, meter, layers=ALL_LAYERS, **options)
    if verdict.related or not (unsettled or meter.stopped > before):
        return verdict
    if unsettled:
        told = f"{unsettled} of B's matrices could not be looked up within the limit of bytes; a larger one may tell."
    else:
        told = "The limit of bytes was reached before every test was made; a larger one may tell."
    return msgspec.structs.replace(verdict, class_="undetermined", related=None, reasons=(told, *verdict.reasons[1:]))


def _judged(
    a: Checkpoint, b: Checkpoint, mapping: Mapping, meter: Meter, *, layers: int, seed: int, rows: int
) -> Verdict:
    common = common_layout(a, b, mapping)
    tested = significance(common, bound_names(), seed=seed, rows=rows, units=rows * layers, blocks=layers)
    material = _Glimpse(a, b, mapping, Filled(mapping, a), common, None, tested, seed, meter)
    return decide(material, look=_found, towards=lambda material, findings: None, hold=lambda material: None)


def _found(material: Material) -> list[Finding]:
    found = (material.asked(look) for look in LOOKS)
    return [finding for finding in found if finding is not None]


class _Glimpse(Material, frozen=True, dict=True):
    """Material whose samples are a few runs of values."""

    meter: Meter

    def sample(self, name: str, **_: Any) -> Sample:
        """Some runs of values, shape (1, values).

        Raises
        ------
        Spent : they cost too much
        """
        kept: dict[str, Sample] = self.__dict__.setdefault("_samples", {})
        if name not in kept:
            kept[name] = Sample.of(name, self._runs(self.filled, name), self._runs(self.b, name))
        return kept[name]

    def _runs(self, checkpoint: Checkpoint, name: str) -> Floats:
        size = self.b.specs[name].size
        length = min(RUN, size)
        rng = np.random.default_rng([self.seed, size % (1 << 31)])
        edges = np.linspace(0, size - length, RUNS + 1).astype(np.int64)
        starts = [0] if size <= RUN else rng.integers(edges[:-1], edges[1:] + 1).tolist()
        with self.meter.at_most(DEAR):
            return np.concatenate([checkpoint.read(name, s, s + length) for s in starts])[None]

    def _sampled_pair(self, given: dict[str, Any]) -> Pair:
        try:
            return super()._sampled_pair(given)
        except Spent:
            return self._searched_pair(given)

    def _searched_pair(self, given: dict[str, Any]) -> Pair:
        """A pair that would have to be computed as a whole, judged by what the search saw of it."""
        name, cosine = given["name"], self._cosines.get(given["name"])
        equal = cosine is not None and cosine >= SAME
        if equal:
            try:
                values = self._runs(self.b, name)
            except Spent:
                equal = False
            else:
                self.__dict__.setdefault("_samples", {})[name] = Sample.of(name, values, values)
        return Pair(equal=equal, cosine=cosine, **given)

    @property
    def _cosines(self) -> dict[str, float | None]:
        """The cosines that the search found, by B's names."""
        known: dict[str, float | None] = self.__dict__.setdefault("_known", {})
        if not known:
            known.update((n, i.rule.evidence.cosine) for i in self.instances if i.rule.evidence for n in i.target_names)
        return known
