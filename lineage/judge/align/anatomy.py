"""The index spaces of a transformer: which axis of which tensor belongs to which of them."""

from __future__ import annotations

import msgspec

__all__ = ["Anatomy", "Attention", "Layer", "Mlp", "Pair", "Part"]

#: a length in A and in B
Pair = tuple[int, int]


class Part(msgspec.Struct, frozen=True):
    """A matrix, or some of its units, between the residual space and other units.

    Attributes
    ----------
    name : the tensor
    axis : the residual axis of the tensor; all other axes together are the units
    residual, units : lengths in A and in B
    start : first unit of this part (A's, B's), where the tensor holds several parts
    reads : whether it reads from the residual stream (and writes into the units) or the other way round
    bias : the vector that shares its stem, "" where there is none
    whole : units of the whole tensor in A and in B
    """

    name: str
    axis: int
    residual: Pair
    units: Pair
    start: Pair
    reads: bool
    whole: Pair
    bias: str = ""


class Mlp(msgspec.Struct, frozen=True):
    """Readers and writers that share hidden units."""

    path: str
    readers: tuple[Part, ...]
    writers: tuple[Part, ...]
    units: Pair


class Attention(msgspec.Struct, frozen=True):
    """The four matrices of an attention block."""

    path: str
    query: Part
    key: Part
    value: Part
    out: Part


class Layer(msgspec.Struct, frozen=True):
    """One layer.

    Attributes
    ----------
    number : its place in the stack
    rest : matrices beside the residual space of which no more is known (routers, …)
    gains : vectors over the residual space that share their stem with no matrix: weight and shift (or "") of norms
    """

    number: int
    mlps: tuple[Mlp, ...]
    attentions: tuple[Attention, ...]
    rest: tuple[Part, ...]
    gains: tuple[tuple[str, str], ...]


class Anatomy(msgspec.Struct, frozen=True):
    """A stack of layers over one residual space.

    Attributes
    ----------
    stack : the name up to the layer's number
    residual : its length in A and in B
    outside : matrices outside the layers; their units are bound to their index
    gains : norms outside the layers
    vectors : every other vector over the residual space: biases of writers, a class token
    """

    stack: str
    residual: Pair
    layers: tuple[Layer, ...]
    outside: tuple[Part, ...]
    gains: tuple[tuple[str, str], ...]
    vectors: tuple[str, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every matrix beside the residual space."""
        found = list(self.outside)
        for layer in self.layers:
            found += layer.rest
            for mlp in layer.mlps:
                found += (*mlp.readers, *mlp.writers)
            for block in layer.attentions:
                found += (block.query, block.key, block.value, block.out)
        return tuple(found)
