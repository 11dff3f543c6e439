"""Networks in which every unit is an output of a layer: chains of linear layers, recurrent ones, long convolutions.

Trained many at a time on the same data in the same order, so that only their initialisations differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lineage.judge import laws
from tests.judge.networks import Arrays, exact

#: widths of a chain, from input to classes
CHAIN = (12, 24, 20, 16, 6)
#: symbols, their width and hidden units of a recurrent network, and its gates
SYMBOLS, WIDTH, UNITS, GATES = 24, 10, 24, 3
#: channels of a network of convolutions, and their kernels
CHANNELS, LONG = (1, 24, 16, 20, 6), (28, 18, 22, 3)
WORDS = ("weight", "bias")
STEPS, EACH, RATE = 100, 32, 0.01


class Open(NamedTuple):
    """log10 p of the first test's fixed points before any correction, and p as the verdict reports it."""

    raw: float
    final: float | None


def chains(count: int, *, seed: int) -> list[Arrays]:
    """So many chains of linear layers that learnt from one teacher."""
    import torch

    rng, start = _started(count, seed)
    layers = [(start(m, n), start(m)) for n, m in pairwise(CHAIN)]
    centres = rng.standard_normal((CHAIN[-1], CHAIN[0]))

    def loss() -> Any:
        y = rng.integers(0, CHAIN[-1], EACH)
        x = torch.from_numpy(centres[y] + rng.standard_normal((EACH, CHAIN[0]))).float().expand(count, -1, -1)
        for at, (weight, bias) in enumerate(layers):
            x = x @ weight.transpose(1, 2) + bias[:, None]
            x = torch.relu(x) if at < len(layers) - 1 else x
        return _missed(x, y)

    names = {f"net.{2 * at}.{word}": pair[k] for at, pair in enumerate(layers) for k, word in enumerate(WORDS)}
    return _trained(count, names, loss)


def recurrent(count: int, *, seed: int) -> list[Arrays]:
    """So many gated recurrent networks that read one text."""
    import torch

    rng, start = _started(count, seed)
    read, own, bias = start(GATES * UNITS, WIDTH), start(GATES * UNITS, UNITS), start(GATES * UNITS)
    embed, head = start(SYMBOLS, WIDTH), start(SYMBOLS, UNITS)
    chain = rng.dirichlet(np.full(SYMBOLS, 0.1), SYMBOLS)

    def loss() -> Any:
        now = rng.integers(0, SYMBOLS, EACH)
        state, total = torch.zeros(count, EACH, UNITS), torch.zeros(())
        for _ in range(4):
            mine = (embed[:, now] @ read.transpose(1, 2) + bias[:, None]).chunk(GATES, -1)
            its = (state @ own.transpose(1, 2)).chunk(GATES, -1)
            reset, kept = torch.sigmoid(mine[0] + its[0]), torch.sigmoid(mine[1] + its[1])
            state = kept * state + (1 - kept) * torch.tanh(mine[2] + reset * its[2])
            now = np.array([rng.choice(SYMBOLS, p=chain[t]) for t in now])
            total = total + _missed(state @ head.transpose(1, 2), now)
        return total

    names = {"rnn.weight_ih_l0": read, "rnn.weight_hh_l0": own, "rnn.bias_ih_l0": bias}
    return _trained(count, names | {"embed.weight": embed, "out.weight": head}, loss)


def convolutions(count: int, *, seed: int) -> list[Arrays]:
    """So many networks of convolutions with long kernels that heard the same waves."""
    import torch

    rng, start = _started(count, seed)
    sizes = [(m, n, k) for (n, m), k in zip(pairwise(CHANNELS), LONG, strict=True)]
    layers = [(start(*size), start(size[0])) for size in sizes]

    def loss() -> Any:
        y = rng.integers(0, CHANNELS[-1], EACH // 4)
        angle = np.arange(120) * 0.2 * 1.3 ** y[:, None] + rng.uniform(0, 6.28, (len(y), 1))
        x = (
            torch.from_numpy(np.sin(angle) + 0.5 * rng.standard_normal(angle.shape))
            .float()[:, None]
            .expand(-1, count, -1)
        )
        for at, ((weight, bias), (m, n, k)) in enumerate(zip(layers, sizes, strict=True)):
            x = torch.conv1d(
                x, weight.reshape(count * m, n, k), bias.reshape(-1), stride=2 - at % 2, padding=k // 2, groups=count
            )
            x = torch.relu(x) if at < len(layers) - 1 else x
        return _missed(x.mean(-1).reshape(len(y), count, -1).transpose(0, 1), y)

    names = {f"conv{at}.{word}": pair[k] for at, pair in enumerate(layers) for k, word in enumerate(WORDS)}
    return _trained(count, names, loss)


KINDS: dict[str, Callable[..., list[Arrays]]] = {
    "chains": chains, "recurrent": recurrent, "convolutions": convolutions
}  # fmt: skip


def open_pairs(kind: str, count: int, *, seed: int = 0, batch: int = 125) -> Iterator[Open]:
    """Null pairs of freshly trained networks; no network is used twice."""
    done = 0
    while done < count:
        size = min(batch, count - done)
        networks = KINDS[kind](2 * size, seed=seed + done)
        for at in range(size):
            found = exact(networks[2 * at], networks[2 * at + 1], seed=at)
            first = next((t for t in found.tests if t.units), None)
            yield Open(laws.log10_fixed_points(first.units, first.fixed) if first else 0.0, found.log10_p)
        done += size


def _started(count: int, seed: int) -> tuple[np.random.Generator, Callable[..., Any]]:
    """Random numbers for the data, and what makes a parameter of all networks."""
    import torch

    torch.set_num_threads(1)
    make = torch.Generator().manual_seed(seed)

    def start(*shape: int) -> Any:
        return torch.nn.Parameter(torch.randn(count, *shape, generator=make) / np.prod(shape[1:] or (16,)) ** 0.5)

    return np.random.default_rng([seed, 3]), start


def _missed(logits: Any, goal: Any) -> Any:
    """Cross-entropy of all networks, logits of shape (networks, examples, classes), summed over the networks."""
    import torch

    wanted = torch.from_numpy(goal).expand(len(logits), -1).reshape(-1)
    return torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted) * len(logits)


def _trained(count: int, parameters: dict[str, Any], loss: Callable[[], Any]) -> list[Arrays]:
    import torch

    optimiser = torch.optim.AdamW(list(parameters.values()), lr=RATE)
    for _ in range(STEPS):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return [{name: value[at].detach().numpy().copy() for name, value in parameters.items()} for at in range(count)]
