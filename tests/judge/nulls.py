"""Pairs of networks that have nothing to do with each other, for calibration: trained many at a time, and adversarial.

All networks of a batch see the same data in the same order and learn from the same teacher; only their
initialisations differ. That is the hardest honest null: everything but the origin is shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from lineage.judge.laws import (
    log10_fixed_points_in_equal_groups,
    log10_fixed_points_together,
    log10_orders_kept_together,
)
from lineage.judge.significance import Significance
from tests.judge.networks import Arrays, changed, decoder, exact

VOCABULARY, WIDTH, HIDDEN, LAYERS = 32, 16, 24, 2
#: size of a head, experts of a layer, neurons of each and words of a sentence in networks that have them
HEAD, EXPERTS, NEURONS, SPAN = 2, 6, 12, 24
#: steps, tokens a step and learning rate of the training
STEPS, TOKENS, RATE = 120, 64, 0.02


class Null(NamedTuple):
    """What one null pair gave.

    Attributes
    ----------
    fixed, order : log10 p of the two hidden tests by themselves, before any correction
    final : log10 p as the verdict reports it, None where every axis was void
    """

    fixed: float
    order: float
    final: float | None


def trained(count: int, *, seed: int) -> list[Arrays]:
    """So many small language models of one recipe: the same data in the same order, other initialisations."""
    import torch

    torch.set_num_threads(1)
    make = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    chain = rng.dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY)

    def start(*shape: int) -> torch.Tensor:
        return torch.nn.Parameter(torch.randn(count, *shape, generator=make) / shape[-1] ** 0.5)

    embed, head = start(VOCABULARY, WIDTH), start(VOCABULARY, WIDTH)
    ups = [start(HIDDEN, WIDTH) for _ in range(LAYERS)]
    downs = [start(WIDTH, HIDDEN) for _ in range(LAYERS)]
    optimiser = torch.optim.AdamW([embed, head, *ups, *downs], lr=RATE)
    for _ in range(STEPS):
        now = rng.integers(0, VOCABULARY, TOKENS)
        then = np.array([rng.choice(VOCABULARY, p=chain[t]) for t in now])
        x = embed[:, now]
        for up, down in zip(ups, downs, strict=True):
            x = x + torch.relu(x @ up.transpose(1, 2)) @ down.transpose(1, 2)
        logits = x @ head.transpose(1, 2)
        goal = torch.from_numpy(then).expand(count, -1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), goal.reshape(-1)) * count
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    result = []
    for at in range(count):
        tensors = {"embed.weight": embed[at], "head.weight": head[at]}
        for i in range(LAYERS):
            tensors |= {f"layers.{i}.up.weight": ups[i][at], f"layers.{i}.down.weight": downs[i][at]}
        result.append({name: value.detach().numpy().copy() for name, value in tensors.items()})
    return result


def trained_mixtures(count: int, *, seed: int) -> list[Arrays]:
    """So many small language models with attention and experts, of one recipe: only their initialisations differ."""
    import torch

    torch.set_num_threads(1)
    make = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng([seed, 2])
    chain = rng.dirichlet(np.full(VOCABULARY, 0.1), VOCABULARY)

    def start(*shape: int) -> torch.Tensor:
        return torch.nn.Parameter(torch.randn(count, *shape, generator=make) / shape[-1] ** 0.5)

    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (VOCABULARY, WIDTH), "head.weight": (VOCABULARY, WIDTH)}
    for at in (f"layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{at}attn.{x}.weight": (WIDTH, WIDTH) for x in "qkvo"}
        shapes[at + "router.weight"] = (EXPERTS, WIDTH)
        for e in range(EXPERTS):
            shapes |= {f"{at}experts.{e}.up.weight": (NEURONS, WIDTH), f"{at}experts.{e}.down.weight": (WIDTH, NEURONS)}
    w = {name: start(*shape) for name, shape in shapes.items()}
    optimiser = torch.optim.AdamW(list(w.values()), lr=RATE)
    future = torch.full((SPAN, SPAN), -torch.inf).triu(1)
    for _ in range(STEPS // 2):
        words = [int(rng.integers(VOCABULARY))]
        for _ in range(SPAN):
            words.append(int(rng.choice(VOCABULARY, p=chain[words[-1]])))
        x = w["embed.weight"][:, words[:-1]]
        for at in (f"layers.{i}." for i in range(LAYERS)):
            q, k, v = (
                (x @ w[f"{at}attn.{n}.weight"].transpose(1, 2)).reshape(count, SPAN, -1, HEAD).transpose(1, 2)
                for n in "qkv"
            )
            mixed = torch.softmax(q @ k.transpose(2, 3) / HEAD**0.5 + future, -1) @ v
            x = x + mixed.transpose(1, 2).flatten(2) @ w[at + "attn.o.weight"].transpose(1, 2)
            share = torch.softmax(x @ w[at + "router.weight"].transpose(1, 2), -1)
            for e in range(EXPERTS):
                up, down = (w[f"{at}experts.{e}.{n}.weight"].transpose(1, 2) for n in ("up", "down"))
                x = x + share[..., e : e + 1] * (torch.relu(x @ up) @ down)
        logits = x @ w["head.weight"].transpose(1, 2)
        goal = torch.tensor(words[1:]).expand(count, -1)
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), goal.reshape(-1)) * count
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    norms = {f"layers.{i}.attn.{x}_norm.weight": np.ones(HEAD, np.float32) for i in range(LAYERS) for x in "qk"}
    return [{name: value[at].detach().numpy().copy() for name, value in w.items()} | norms for at in range(count)]


class Kinds(NamedTuple):
    """log10 p of the tests on heads and on experts before any correction, and p as the verdict reports it."""

    heads: float
    experts: float
    final: float | None


def mixture_pairs(count: int, *, seed: int = 0, batch: int = 125) -> Iterator[Kinds]:
    """Null pairs of freshly trained networks with heads and experts; no network is used twice."""
    done = 0
    while done < count:
        size = min(batch, count - done)
        networks = trained_mixtures(2 * size, seed=seed + done)
        for at in range(size):
            found = exact(networks[2 * at], networks[2 * at + 1], seed=at)
            heads = [t for t in found.tests if t.kind == "heads"]
            routed = [t for t in found.tests if t.kind == "experts"]
            blocks = [(n, n) for t in heads for _, _, n in t.each]
            places = [n for t in routed for _, _, n in t.each]
            yield Kinds(
                log10_fixed_points_together(blocks, sum(t.fixed for t in heads)),
                log10_fixed_points_in_equal_groups(places, sum(t.fixed for t in routed)),
                found.log10_p,
            )
        done += size


def measured(found: Significance) -> Null:
    """The p-values of one pair."""
    plain = [t for t in found.tests if t.kind == "hidden" and not t.frame and not t.void]
    blocks = [(units, units) for t in plain for _, _, units in t.each]
    fixed = log10_fixed_points_together(blocks, sum(t.fixed for t in plain)) if blocks else 0.0
    order = log10_orders_kept_together([n for n, _ in blocks], sum(t.ordered for t in plain)) if blocks else 0.0
    return Null(fixed, order, found.log10_p)


def trained_pairs(count: int, *, seed: int = 0, batch: int = 250) -> Iterator[Null]:
    """Null pairs of freshly trained networks; no network is used twice."""
    done = 0
    while done < count:
        size = min(batch, count - done)
        networks = trained(2 * size, seed=seed + done)
        for at in range(size):
            yield measured(exact(networks[2 * at], networks[2 * at + 1], seed=at))
        done += size


def resampled_pairs(count: int, *, seed: int = 0) -> Iterator[Null]:
    """Null pairs of unlike statistics: heavy channels, outliers, common directions."""
    for at in range(count):
        one, two = (decoder(seed + 2 * at + k, layers=3, width=24, hidden=32) for k in (1, 2))
        yield measured(exact(one, two, seed=at))


def _sorted(tensors: Arrays) -> Arrays:
    result = dict(tensors)
    for i in range(4):
        at = f"layers.{i}.mlp."
        order = np.argsort(np.linalg.norm(tensors[at + "gate.weight"], axis=1))
        for name in ("gate.weight", "up.weight"):
            result[at + name] = tensors[at + name][order]
        result[at + "down.weight"] = tensors[at + "down.weight"][:, order]
    return result


def _identity(tensors: Arrays) -> Arrays:
    eye = np.eye(48, 32)
    return changed(tensors, lambda n, v: v + 0.5 * (eye.T if "down" in n else eye) if "mlp" in n else v)


def _normed_alike(tensors: Arrays) -> Arrays:
    lengths = np.linspace(0.5, 2, 48)

    def scale(name: str, values: Any) -> Any:
        if "mlp" not in name:
            return values
        return values / np.linalg.norm(values, axis=1, keepdims=True) * lengths[: len(values), None]

    return changed(tensors, scale)


def _doubled(tensors: Arrays) -> Arrays:
    def double(name: str, values: Any) -> Any:
        axis = 1 if "down" in name else 0
        return np.take(values, np.arange(48) // 2, axis=axis) if "mlp" in name else values

    return changed(tensors, double)


def _channels_sorted(tensors: Arrays) -> Arrays:
    order = np.argsort(np.linalg.norm(tensors["embed.weight"], axis=0))

    def move(name: str, values: Any) -> Any:
        if values.ndim < 2:
            return values[order]
        return values[order] if "down" in name or ".o." in name else values[:, order]

    return changed(tensors, move)


def _spectra_alike(tensors: Arrays) -> Arrays:
    def scale(name: str, values: Any) -> Any:
        if values.ndim < 2:
            return values
        u, s, v = np.linalg.svd(values, full_matrices=False)
        return (u * np.geomspace(1, 0.01, len(s))) @ v

    return changed(tensors, scale)


def _spread_alike(tensors: Arrays) -> Arrays:
    """Norms and standard deviations that agree by layer, as those of unrelated public models do."""
    rng = np.random.default_rng(0)
    profile = {name: (rng.uniform(0.02, 0.2), 1 + 0.5 * rng.standard_normal(v.shape)) for name, v in tensors.items()}

    def scale(name: str, values: Any) -> Any:
        size, gain = profile[name]
        return gain + 0.1 * (values - 1) if values.ndim < 2 else values / values.std() * size

    return changed(tensors, scale)


def _words_alike(tensors: Arrays) -> Arrays:
    """Rows of the vocabulary that grow with the frequency of their word, which strangers share."""
    often = 1 / np.arange(1, 1 + len(tensors["embed.weight"]))[:, None] ** 0.5
    common = np.linalg.norm(tensors["head.weight"], axis=0)
    return changed(tensors, lambda n, v: v * often + 0.2 * often * common if n[:4] in ("embe", "head") else v)


def _with_table(make: Callable[[], Any]) -> Callable[[Arrays], Arrays]:
    """A table beside the embeddings that anyone computes alike."""
    return lambda tensors: tensors | {"table": np.asarray(make(), np.float32)}


def _sinusoids() -> Any:
    angle = np.arange(64)[:, None] / 10_000 ** (np.arange(16) / 16)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _signs() -> Any:
    from scipy.linalg import hadamard

    # random signs before it, as rotations for quantised models have them, from a seed that everyone uses
    return (hadamard(64) * np.random.default_rng(0).choice([-1.0, 1.0], 64)[:, None])[:, :32]


def _filters() -> Any:
    """Bands along a growing scale, as in the filter banks of speech models."""
    return np.exp(-(np.subtract.outer(np.arange(201), np.geomspace(4, 200, 32)) ** 2) / 30)


def _sinusoids_inside(tensors: Arrays) -> Arrays:
    table = np.resize(_sinusoids(), (80, 32))
    return tensors | {"embed.weight": np.asarray(tensors["embed.weight"] * 0.02 + table, np.float32)}


def _identity_outside(tensors: Arrays) -> Arrays:
    eye = np.tile(np.eye(32), (2, 1))
    return tensors | {"project.weight": np.asarray(0.3 * tensors["embed.weight"][:64] + eye, np.float32)}


def _dirac(tensors: Arrays) -> Arrays:
    kernels = np.zeros((64, 32, 3))
    kernels[np.arange(64), np.arange(64) % 32, 1] = 1
    noise = tensors["embed.weight"][:64, :, None] * np.ones(3)
    return tensors | {"stem.weight": np.asarray(kernels + 0.3 * noise, np.float32)}


#: what might make strangers look related, by what it does to both of them
ADVERSARIES: dict[str, Callable[[Arrays], Arrays]] = {
    "neurons sorted by size": _sorted,
    "identity initialisation": _identity,
    "equal norms of all neurons": _normed_alike,
    "every neuron twice": _doubled,
    "one coarse grid": lambda tensors: changed(tensors, lambda n, v: np.sign(v)),
    "channels sorted by size": _channels_sorted,
    "equal spectra": _spectra_alike,
    "equal norms and deviations by layer": _spread_alike,
    "a vocabulary's statistics": _words_alike,
    "a table of sinusoids": _with_table(_sinusoids),
    "a Hadamard matrix": _with_table(_signs),
    "a bank of filters": _with_table(_filters),
    "sinusoids in the embeddings": _sinusoids_inside,
    "an identity outside the layers": _identity_outside,
    "a Dirac initialisation": _dirac,
    "non-negative weights": lambda tensors: changed(tensors, lambda n, v: np.abs(v)),
}


def adversarial_pairs(change: Callable[[Arrays], Arrays], count: int) -> Iterator[Null]:
    """Null pairs of which both sides went through the same change."""
    for at in range(count):
        yield measured(exact(change(decoder(2 * at)), change(decoder(2 * at + 1)), seed=at))
