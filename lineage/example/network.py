"""A decoder of 0.2 million parameters, just large enough to learn something in seconds: forward pass and training.

Parameters are one flat vector and the tensors are views of it, so that an optimiser's step is a few vector operations.
Layout and names are those of the usual decoder with rotary positions, grouped queries, gated MLP and RMS norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Adapter", "Sizes", "Weights", "new_adapter", "new_network", "train"]

Tensors = Mapping[str, Tensor]


class Sizes(NamedTuple):
    """The network's dimensions.

    Attributes
    ----------
    layers, hidden, units : blocks, width of the residual stream, hidden units of each MLP
    heads, kv_heads : query heads, and key and value heads, all of width hidden / heads
    vocabulary : one token a byte
    """

    layers: int = 3
    hidden: int = 64
    units: int = 160
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 256

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor."""
        width, narrow = self.hidden, self.hidden * self.kv_heads // self.heads
        yield "model.embed_tokens.weight", (self.vocabulary, width)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            yield at + "input_layernorm.weight", (width,)
            for name, rows in (("q", width), ("k", narrow), ("v", narrow), ("o", width)):
                yield at + f"self_attn.{name}_proj.weight", (rows, width)
            yield at + "post_attention_layernorm.weight", (width,)
            yield at + "mlp.gate_proj.weight", (self.units, width)
            yield at + "mlp.up_proj.weight", (self.units, width)
            yield at + "mlp.down_proj.weight", (width, self.units)
        yield "model.norm.weight", (width,)
        yield "lm_head.weight", (self.vocabulary, width)


class Weights(NamedTuple):
    """Tensors packed into one flat vector.

    Attributes
    ----------
    shapes : by name, in the vector's order
    flat : all values, a leaf that gradients are taken for
    """

    shapes: dict[str, tuple[int, ...]]
    flat: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Views of the vector by name."""
        parts = torch.split(self.flat, [math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


class Adapter(NamedTuple):
    """Low-rank factors of some matrices: up @ down · alpha / rank is added to each."""

    weights: Weights
    rank: int
    alpha: int

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Down (rank, columns) and up (rows, rank) by name of the matrix that they change."""
        tensors = self.weights.tensors()
        names = [name.removesuffix("/down") for name in tensors if name.endswith("/down")]
        return {name: (tensors[name + "/down"], tensors[name + "/up"]) for name in names}


def new_network(sizes: Sizes, *, seed: int) -> Weights:
    """Norms of one, everything else normal with variance 1 / (4 · width)."""
    chance = torch.Generator().manual_seed(seed)
    return _packed({
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=chance) / (4 * sizes.hidden) ** 0.5
        for name, shape in sizes.shapes()
    })  # fmt: skip


def new_adapter(network: Weights, ends: tuple[str, ...], *, rank: int, alpha: int, seed: int) -> Adapter:
    """Factors for every matrix whose name ends so; the up factors are zero, as is usual before training."""
    chance = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in network.shapes.items():
        if name.endswith(ends):
            values[name + "/down"] = torch.randn(rank, shape[1], generator=chance) / shape[1] ** 0.5
            values[name + "/up"] = torch.zeros(shape[0], rank)
    return Adapter(_packed(values), rank, alpha)


def _packed(values: Tensors) -> Weights:
    flat = torch.cat([value.reshape(-1) for value in values.values()]).requires_grad_()
    return Weights({name: tuple(value.shape) for name, value in values.items()}, flat)


def _adapted(tensors: Tensors, adapter: Adapter) -> Tensors:
    """The tensors with the adapter's differences added."""
    scale = adapter.alpha / adapter.rank
    changed = {name: tensors[name] + scale * (up @ down) for name, (down, up) in adapter.factors().items()}
    return {**tensors, **changed}


def _loss(sizes: Sizes, tensors: Tensors, tokens: Tensor) -> Tensor:
    """Mean surprise, in nats a byte, of tokens (batch, length) given those before them."""
    heads, width = sizes.heads, sizes.hidden // sizes.heads
    batch, length = tokens.shape[0], tokens.shape[1] - 1
    turn = _rotary(length, width)
    x = tensors["model.embed_tokens.weight"][tokens[:, :-1]] * math.sqrt(sizes.hidden)
    for i in range(sizes.layers):
        at = f"model.layers.{i}."
        y = _normed(x, tensors[at + "input_layernorm.weight"])
        q, k, v = (
            (y @ tensors[at + f"self_attn.{name}_proj.weight"].T).view(batch, length, -1, width).transpose(1, 2)
            for name in "qkv"
        )
        k, v = (t.repeat_interleave(heads // sizes.kv_heads, dim=1) for t in (_turned(k, turn), v))
        y = functional.scaled_dot_product_attention(_turned(q, turn), k, v, is_causal=True)
        x = x + y.transpose(1, 2).reshape(batch, length, -1) @ tensors[at + "self_attn.o_proj.weight"].T
        y = _normed(x, tensors[at + "post_attention_layernorm.weight"])
        y = functional.silu(y @ tensors[at + "mlp.gate_proj.weight"].T) * (y @ tensors[at + "mlp.up_proj.weight"].T)
        x = x + y @ tensors[at + "mlp.down_proj.weight"].T
    logits = _normed(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def _normed(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


def _rotary(length: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, width) of rotary positions, halves swapped."""
    angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat((-two, one), dim=-1) * turn[1]


def train(
    sizes: Sizes,
    network: Weights,
    text: bytes,
    *,
    steps: int,
    rate: float,
    seed: int,
    adapter: Adapter | None = None,
    batch: int = 12,
    length: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Trains the network in place, or the adapter where there is one, and returns the mean loss of the last steps.

    Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), a short
    warm-up, then a cosine schedule.
    """
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    chance = torch.Generator().manual_seed(seed)
    flat = (adapter.weights if adapter else network).flat
    first, second = torch.zeros_like(flat), torch.zeros_like(flat)
    losses = []
    for step in range(steps):
        start = torch.randint(len(data) - length - 1, (batch, 1), generator=chance)
        tokens = data[start + torch.arange(length + 1)].long()
        tensors = network.tensors()
        loss = _loss(sizes, _adapted(tensors, adapter) if adapter else tensors, tokens)
        (slope,) = torch.autograd.grad(loss, flat)
        pace = rate * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.no_grad():
            first.lerp_(slope, 0.1)
            second.lerp_(slope.square(), 0.05)
            size = (second / (1 - 0.95 ** (step + 1))).sqrt_().add_(1e-8)
            flat.mul_(1 - 0.01 * pace).addcdiv_(first, size, value=-pace / (1 - 0.9 ** (step + 1)))
        losses.append(float(loss.detach()))
        if progress:
            progress(step + 1, steps)
    last = losses[-20:]
    return sum(last) / len(last)
