"""Small networks in memory: decoders with the statistics of trained ones, their relatives and strangers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.filling import Filled
from lineage.judge import Verdict, judge
from lineage.judge.common import Common, common_layout
from lineage.judge.significance import Significance, significance
from lineage.layout.mapping import Mapping as Layout
from lineage.layout.mapping import Rule
from lineage.measure.compare import compare_mapped
from tests.measure.memory import Memory

Arrays = dict[str, NDArray[Any]]
LAYERS, WIDTH, HIDDEN, VOCABULARY = 4, 32, 48, 80
#: words that bind an axis in these networks
BOUND = ("attn",)


def decoder(
    seed: int, *, layers: int = LAYERS, width: int = WIDTH, hidden: int = HIDDEN, vocabulary: int = VOCABULARY
) -> Arrays:
    """Weights as training leaves them: channels and units of unlike size, a few outliers, a common direction."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> NDArray[Any]:
        values = rng.standard_normal((rows, columns)) * np.exp(0.4 * rng.standard_normal((rows, 1)))
        values *= np.exp(0.4 * rng.standard_normal(columns))
        values += 0.3 * rng.standard_normal(columns)
        values[rng.integers(0, rows, 3), rng.integers(0, columns, 3)] *= 20
        return np.asarray(0.05 * values, np.float32)

    tensors: Arrays = {"embed.weight": matrix(vocabulary, width)}
    for i in range(layers):
        at = f"layers.{i}."
        tensors |= {at + f"attn.{x}.weight": matrix(width, width) for x in "qkvo"}
        tensors |= {at + f"mlp.{x}.weight": matrix(hidden, width) for x in ("gate", "up")}
        tensors[at + "mlp.down.weight"] = matrix(width, hidden)
        tensors[at + "norm.weight"] = np.asarray(1 + 0.1 * rng.standard_normal(width), np.float32)
    return tensors | {"head.weight": matrix(vocabulary, width)}


def attending(seed: int, *, layers: int = LAYERS) -> Arrays:
    """A decoder with 8 groups of two heads of four rows each in every layer, and norms that tell their size."""
    rng = np.random.default_rng([seed, 1])
    tensors = decoder(seed, layers=layers)
    for at in (f"layers.{i}.attn." for i in range(layers)):
        wide = decoder(seed + 1000, layers=layers)[at + "q.weight"]
        mixed = [np.asarray(wide @ rng.standard_normal((WIDTH, WIDTH)) / 6, np.float32) for _ in range(4)]
        tensors[at + "q.weight"] = np.concatenate(mixed[:2])
        tensors[at + "o.weight"] = np.concatenate(mixed[2:]).T
        tensors |= {at + f"{x}_norm.weight": np.ones(4, np.float32) for x in "qk"}
    return tensors


def experts(seed: int, *, count: int = 8) -> Arrays:
    """A network of experts and their routers."""
    tensors: Arrays = {}
    for e in range(count):
        for name, values in decoder(seed * 100 + e).items():
            if "gate" not in name:
                tensors[name.replace("mlp", f"experts.{e}") if "mlp" in name else name] = values
    for i in range(LAYERS):
        router = np.random.default_rng([seed, i]).standard_normal((count, WIDTH))
        tensors[f"layers.{i}.router.weight"] = np.asarray(router, np.float32)
    return tensors


def changed(tensors: Arrays, change: Callable[[str, NDArray[Any]], NDArray[Any]]) -> Arrays:
    """The network with every tensor changed."""
    return {name: np.asarray(change(name, values), np.float32) for name, values in tensors.items()}


def tuned(tensors: Arrays, seed: int, size: float = 0.2) -> Arrays:
    """The network after more training: each matrix moved in a few directions."""
    rng = np.random.default_rng(seed)

    def move(name: str, values: NDArray[Any]) -> NDArray[Any]:
        if values.ndim < 2:
            return values + 0.01 * size * rng.standard_normal(values.shape)
        steps = rng.standard_normal((values.shape[0], 12)) * np.exp(-0.3 * np.arange(12))
        step = steps @ rng.standard_normal((12, values.shape[1])) * np.exp(0.5 * rng.standard_normal())
        return np.asarray(values + size * values.std() * step / step.std())

    return changed(tensors, move)


def memory(tensors: Mapping[str, NDArray[Any]], word: str = "F32") -> Memory:
    """The tensors as a checkpoint."""
    return Memory({name: (word, values) for name, values in tensors.items()})


def by_name(a: Checkpoint, b: Checkpoint) -> Layout:
    """Equal names are equal places."""
    rules = tuple(Rule(to=(n,), source=(n,)) for n in a.specs if n in b.specs and a.specs[n].shape == b.specs[n].shape)
    used = {rule.to[0] for rule in rules}
    return Layout(
        rules=rules,
        unmatched_source=tuple(n for n in a.specs if n not in used),
        unmatched_target=tuple(n for n in b.specs if n not in used),
    )


def together(a: Arrays, b: Arrays, layout: Layout | None = None) -> Common:
    """Both networks in one layout."""
    one, two = memory(a), memory(b)
    return common_layout(one, two, layout or by_name(one, two))


def bound(name: str) -> bool:
    """Axes of attention are bound to heads and planes."""
    return any(word in name for word in BOUND)


def exact(a: Arrays, b: Arrays, layout: Layout | None = None, *, seed: int = 0) -> Significance:
    """The exact tests."""
    return significance(together(a, b, layout), bound, seed=seed, rows=64)


def verdict(
    a: Arrays,
    b: Arrays,
    layout: Layout | None = None,
    *,
    words: tuple[str, str] = ("F32", "F32"),
    measured: bool = True,
) -> Verdict:
    """The whole verdict, with a comparison of all values or with samples only."""
    one, two = memory(a, words[0]), memory(b, words[1])
    layout = layout or by_name(one, two)
    comparison = compare_mapped(layout, one, two, threads=1) if measured and Filled(layout, one).specs else None
    return judge(one, two, layout, comparison)
