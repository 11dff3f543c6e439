"""When a freer family of transforms is believed, and when an alignment is: always by what took no part in the fit."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["CLEAR", "LEAST_BLOCK", "LEAST_SHOWN", "better", "holds", "simplest"]

#: a freer family must leave less than this share of the simpler one's distance to 1. Noise fitted into a freer family
#: leaves 0.9 to 1.1 of it (zoo: fine-tuned, quantised, noised), a real transform less than 0.5
FREER = 0.7
#: distance to 1 that is not worth a freer family: bf16 leaves 1e-5, rounding twice 3e-5
EQUAL = 2e-4
#: least mean cosine on what took no part, and least distance to the floor. Strangers of the zoo reach 0.21 (floor
#: 0.09; one vocabulary, tied embeddings) under a rotation; relatives 0.59 (trained three times as long as the base).
#: Other recipes: disguised strangers, students of features among them, 0.02 (floor 0.03), relatives 0.81 and more
LEAST_SHOWN = 0.38
CLEAR = 0.22
#: the same for a single block of a pair that holds: layers that were trained anew stay below 0.1
LEAST_BLOCK = 0.25


def better(freer: float, simpler: float) -> bool:
    """True where a freer family explains so much more that it is believed.

    Examples
    --------
    >>> better(1.0, 0.88), better(0.996, 0.995), better(0.66, 0.63)
    (True, False, False)
    """
    return 1.0 - freer < FREER * (1.0 - simpler) - EQUAL


def simplest(scores: Sequence[float]) -> int:
    """Which family to believe, the simplest first: cosines of each on what took no part.

    Examples
    --------
    >>> simplest([0.02, 1.0, 1.0]), simplest([0.85, 0.85, 0.86])
    (1, 0)
    """
    chosen = 0
    for at in range(1, len(scores)):
        if better(scores[at], scores[chosen]):
            chosen = at
    return chosen


def holds(shown: float, floor: float) -> bool:
    """Whether agreement on what took no part is more than strangers reach."""
    return shown >= LEAST_SHOWN and shown - floor >= CLEAR
