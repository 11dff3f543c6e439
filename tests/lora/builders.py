"""Small bases, mappings and adapters for the tests, and the plain formulas that are their oracle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from lineage.checkpoint import Checkpoint, open_checkpoint
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.mapping import Rule
from lineage.layout.operations import Operation
from lineage.lora.delta import Delta, Magnitude
from lineage.lora.network import Term

Arrays = dict[str, NDArray[Any]]
KINDS = ("lora", "dora", "loha", "lokr")


def whole_numbers(generator: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Small whole numbers, whose sums and products are exact."""
    return generator.integers(-4, 5, shape).astype(np.float32)


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    """Normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def delta_of(kind: str, shape: Shape, seed: int = 0, rank: int = 2, scale: float = 0.5) -> Delta:
    """A delta of one kind for a tensor of any shape; LoKr with the largest factor below each length."""
    generator = np.random.default_rng(seed)

    def numbers(*sizes: int) -> NDArray[np.float32]:
        return whole_numbers(generator, *sizes)

    if len(shape) < 2:
        letters = "a"[: len(shape)]
        return Delta(shape=shape, terms=(Term.of([(numbers(*shape), letters)], list(letters)),))
    letters = "oijl"[: len(shape)]
    down = letters[1:]
    if kind == "lokr":
        outs, ins = ([f for f in range(1, n + 1) if n % f == 0][-2:][0] for n in shape[:2])
        w1, w2 = numbers(outs, ins), numbers(shape[0] // outs, shape[1] // ins, *shape[2:])
        layout = ["ac", "bd", *down[1:]]
        return Delta(shape=shape, terms=(Term.of([(w1, "ab"), (w2, "cd" + down[1:])], layout, scale=scale),))
    parts = [(numbers(shape[0], rank), "ok"), (numbers(rank, *shape[1:]), "k" + down)]
    if kind == "loha":
        parts += [(numbers(shape[0], rank), "om"), (numbers(rank, *shape[1:]), "m" + down)]
    delta = Delta(shape=shape, terms=(Term.of(parts, list(letters), scale=scale),))
    if kind != "dora":
        return delta
    vector = np.abs(numbers(shape[0])) + 1
    sizes = dict(zip(letters[1:], shape[1:], strict=True))
    carrier = Term.of([(vector, "o")], list(letters), **sizes)
    return Delta(shape=shape, terms=delta.terms, magnitudes=(Magnitude(carrier, int(np.prod(shape[1:]))),))


def base(folder: Path, name: str, tensors: Mapping[str, Shape], seed: int = 0) -> Checkpoint:
    """A model of random weights in a file."""
    path = folder / f"{name}.safetensors"
    save_file({n: random(seed + k, *shape) for k, (n, shape) in enumerate(tensors.items())}, path)
    return open_checkpoint(path)


def mapping(*rules: tuple[tuple[str, ...], tuple[str, ...], tuple[Operation, ...]]) -> LayoutMapping:
    """A mapping of (targets, sources, operations)."""
    return LayoutMapping(rules=tuple(Rule(to=to, source=source, ops=ops) for to, source, ops in rules))


def renaming(names: Mapping[str, str]) -> LayoutMapping:
    """A mapping that only renames."""
    return mapping(*(((new,), (old,), ()) for old, new in names.items()))


def save(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str] | None = None) -> Path:
    """An adapter file."""
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, path, metadata=metadata)
    return path


def peft(folder: Path, arrays: Mapping[str, NDArray[Any]], **config: Any) -> Path:
    """A PEFT folder; keys without their beginning."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{k}": np.asarray(v, order="C") for k, v in arrays.items()},
        folder / "adapter_model.safetensors",
    )
    document = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": "all-linear", **config}
    (folder / "adapter_config.json").write_text(json.dumps(document))
    return folder


def read(path: Path) -> Arrays:
    """All arrays of a safetensors file, or of a PEFT folder."""
    return dict(load_file(path / "adapter_model.safetensors" if path.is_dir() else path))


def kohya_dense(path: Path, module: str) -> NDArray[Any]:
    """The difference of a module in a kohya file, by the formula of sd-scripts."""
    found = read(path)
    down, up = found[f"{module}.lora_down.weight"], found[f"{module}.lora_up.weight"]
    scale = float(found[f"{module}.alpha"]) / len(down) if f"{module}.alpha" in found else 1.0
    return scale * up.astype(np.float64) @ down.astype(np.float64)
