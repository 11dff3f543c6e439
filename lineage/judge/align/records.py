"""What an alignment says: the refined mapping, what was fitted on what, and what was shown on what took no part."""

from __future__ import annotations

import msgspec

from lineage.layout.mapping import Mapping

__all__ = ["Aligned", "Fitted", "Shown", "Trait"]


class Fitted(msgspec.Struct, frozen=True):
    """One index space and what was fitted in it.

    Attributes
    ----------
    space : where the units stand, for people
    family : the simplest family of transforms that explains what took no part: `identity`, `order`, `signs`,
        `scales`, `rotation`, `planes`, `basis`
    units, moved : units of B, and how many of them stand elsewhere in A
    tensors : tensors that the transform was fitted on, in the common layout
    """

    space: str
    family: str
    units: int
    moved: int
    tensors: tuple[str, ...]


class Shown(msgspec.Struct, frozen=True):
    """A tensor that took no part in the fit of the transform that it is held against.

    Attributes
    ----------
    tensor : its name in the common layout
    cosine : of all its elements, after the transform
    units : rows or columns that were compared
    """

    tensor: str
    cosine: float
    units: int


class Trait(msgspec.Struct, frozen=True):
    """A relation that the alignment shows, with one sentence for people.

    Attributes
    ----------
    tag : `permuted`, `sign-flipped`, `rotated`, `rescaled`, `width-pruned` or `width-grown`
    """

    tag: str
    sentence: str


class Aligned(msgspec.Struct, frozen=True, kw_only=True):
    """Two checkpoints after the transforms between them were fitted.

    Attributes
    ----------
    mapping : the given mapping with the transforms as operations; the given one itself where nothing holds
    exact_mapping : only the transform of the residual space, fitted on tensors outside the layers alone, so that the
        labels of units inside layers are still exchangeable; None where nothing holds, or for convolutions
    fitted : every space in which something was fitted
    shown : tensors that took no part
    cosine : mean cosine of what took no part, weighted by layer
    floor : the greatest such mean between different layers of the same two models, fitted the same way
    holds : whether `cosine` stands clear of strangers' values and of the floor
    traits : tags with their sentences; empty where it does not hold
    note : one sentence that sums up what was done and what came of it
    """

    mapping: Mapping
    exact_mapping: Mapping | None
    fitted: tuple[Fitted, ...]
    shown: tuple[Shown, ...]
    cosine: float
    floor: float
    holds: bool
    traits: tuple[Trait, ...]
    note: str

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags, each once."""
        return tuple(dict.fromkeys(trait.tag for trait in self.traits))
