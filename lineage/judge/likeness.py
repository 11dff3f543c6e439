"""How alike matched matrices are, element by element, held against mispaired ones: an effect size, never a p-value.

It speaks where no axis is left for an exact test: networks whose widths are all equal, recurrent ones.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.judge.material import Material, spread_names
from lineage.judge.tables import sinusoidal

__all__ = ["Likeness", "matched_likeness"]

Floats = NDArray[np.floating[Any]]

#: matrices that must be looked at, and mispaired ones that each is held against at most
FEWEST, OTHERS = 3, 4
#: up to so many matrices all are looked at, of more some of each kind
MOST = 24
#: most of the matrices must reach what is reported
QUANTILE = 0.25


class Likeness(msgspec.Struct, frozen=True):
    """Correlations of matched and of mispaired matrices.

    Attributes
    ----------
    matrices : that were looked at
    shown : correlation that three quarters of them reach
    floor : greatest size of a correlation between matrices of one shape that do not belong together
    """

    matrices: int
    shown: float
    floor: float

    def stands_out(self, share: float) -> bool:
        """True where matched matrices are beyond `share` (0 to 1) of the way from the floor to equality."""
        return self.shown - self.floor > share * (1 - self.floor)


def matched_likeness(material: Material) -> Likeness | None:
    """Correlations of matched matrices about their rows' and columns' means; None without enough to hold against.

    Notes
    -----
    Means of rows and columns go first: strangers of one recipe share them. What an index alone makes alike
    (identities, tables, kernels of one window) is alike between layers too, and so is in the floor.
    """
    names = [pair.name for pair in material.content]
    chosen = names if len(names) <= MOST else spread_names(names)
    pairs: dict[tuple[int, ...], list[tuple[Floats, Floats]]] = defaultdict(list)
    for sample in map(material.sample, chosen):
        if not sinusoidal(sample.a):
            one, two = _centred(sample.a), _centred(sample.b)
            if one is not None and two is not None:
                pairs[one.shape].append((one, two))
    shown = [float(np.vdot(one, two)) for group in pairs.values() for one, two in group]
    floor = [
        abs(float(np.vdot(one, group[(at + step) % len(group)][1])))
        for group in pairs.values()
        for at, (one, _) in enumerate(group)
        for step in range(1, min(len(group), OTHERS + 1))
    ]
    if len(shown) < FEWEST or len(floor) < FEWEST - 1:
        return None
    return Likeness(len(shown), float(np.quantile(shown, QUANTILE)), max(floor))


def _centred(values: Floats) -> Floats | None:
    """Unit length, without the means of rows and columns; None where nothing is left."""
    x = values.astype(np.float64)
    x = x - x.mean(axis=0, keepdims=True) - (x.mean(axis=1, keepdims=True) - x.mean())
    length = float(np.linalg.norm(x))
    return x / length if min(x.shape) > 1 and length > 1e-9 * float(np.linalg.norm(values)) else None
