"""An adapter's file or folder: its arrays, its configuration, its header; and the base that its keys name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint.base import Checkpoint
from lineage.checkpoint.files import read_json
from lineage.checkpoint.opening import open_checkpoint
from lineage.errors import InputError, printable
from lineage.layout.axes import Shape
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.mapping import Rule
from lineage.layout.templates import Template
from lineage.lora.modules import Modules

__all__ = ["Base", "Source", "open_adapter"]

#: file beside the factors in PEFT's and MLX's folders
CONFIG = "adapter_config.json"
#: diffusers' entry of the safetensors header
HEADER = "lora_adapter_metadata"
#: largest number of names that templates may stand for
MOST_NAMES = 200_000


class Source:
    """An opened adapter: arrays by key, what its configuration and its header say.

    Attributes
    ----------
    path : as the user gave it
    arrays : the checkpoint that holds them
    config : adapter_config.json as a dictionary, None where there is none
    metadata : text pairs of the header
    """

    def __init__(self, path: str, arrays: Checkpoint, config: dict[str, Any] | None) -> None:
        self.path, self.arrays, self.config = path, arrays, config
        self.metadata: dict[str, str] = dict(arrays.metadata)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys in file order."""
        return tuple(self.arrays.specs)

    def array(self, key: str) -> NDArray[Any]:
        """One array, decoded to float32 (float64 and integers become float64)."""
        found = self.arrays.tensor(key)
        return found if found.dtype == np.float32 else found.astype(np.float64)

    def dtype(self, key: str) -> str:
        """Stored dtype of one array."""
        return self.arrays.specs[key].dtype

    @property
    def header_config(self) -> dict[str, Any]:
        """diffusers' configuration in the header, by `component.word`; empty where there is none.

        Raises
        ------
        InputError : it is no JSON object
        """
        text = self.metadata.get(HEADER)
        if text is None:
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise InputError(self.path, f"{HEADER} in the header is no JSON", "write the file again") from exc
        if not isinstance(found, dict):
            raise InputError(self.path, f"{HEADER} in the header is no JSON object", "write the file again")
        return found


def open_adapter(path: str | os.PathLike[str]) -> Source:
    """The adapter at `path`: a file, or a folder with its configuration.

    Raises
    ------
    InputError : it cannot be read, or holds no arrays
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    own = place / "adapters.safetensors"
    arrays = open_checkpoint(own if own.is_file() else place)
    config = None
    if (folder / CONFIG).is_file() and (place.is_dir() or place.name.startswith("adapter")):
        document = read_json(folder / CONFIG)
        if not isinstance(document, dict):
            raise InputError(folder / CONFIG, "this is no JSON object", "save the adapter again")
        config = document
    if not arrays.specs:
        raise InputError(path, "it holds no arrays, so it is no adapter")
    return Source(str(path), arrays, config)


class Base:
    """The model that an adapter's keys name: its tensors' names, shapes where known, and values where given.

    Attributes
    ----------
    modules : names by module
    checkpoint : the weights, None where they were not given
    """

    def __init__(self, shapes: Mapping[str, Shape | None], checkpoint: Checkpoint | None = None) -> None:
        self.shapes, self.checkpoint = shapes, checkpoint
        self.modules = Modules(shapes)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Base:
        """A base whose weights are at hand."""
        return cls({s.name: s.shape for s in checkpoint}, checkpoint)

    @classmethod
    def named(cls, mapping: LayoutMapping, keys: Iterable[str]) -> Base:
        """The names that the mapping's sources may have, for the numbers that stand in an adapter's keys."""
        numbers = sorted({int(n) for key in keys for n in re.findall(r"(?<!\d)\d{1,4}(?!\d)", key)})
        names: dict[str, Shape | None] = {}
        for rule in mapping.rules:
            for template in rule.templates[1]:
                for name in _names(rule, template, numbers):
                    names[name] = None
                if len(names) > MOST_NAMES:
                    raise InputError("mapping", "its templates stand for too many names", "give the base with --base")
        return cls(names)

    def shape(self, name: str | None) -> Shape | None:
        """Shape of a tensor, None where it is not known."""
        return self.shapes.get(name) if name is not None else None

    def values(self, name: str, what: str) -> NDArray[Any]:
        """A tensor's values in float64.

        Raises
        ------
        InputError : the base was not given
        """
        if self.checkpoint is None:
            raise InputError(printable(name), f"{what} needs the base's values", "give the base with --base")
        return self.checkpoint.tensor(name).astype(np.float64)


def _names(rule: Rule, template: Template, numbers: list[int]) -> Iterable[str]:
    """Names of a template: placeholders take the values that the rule lists, or any number of the keys."""
    listed = {**rule.values, **{k: tuple(v) for k, v in (rule.table or {}).items()}}
    simple = all(len(n.terms) <= 1 and n.constant == 0 and all(f == 1 for _, f in n.terms) for n in template.numbers)
    free: Iterable[int] = numbers if simple else range(max(numbers, default=0) + 1)
    values = [listed.get(p, tuple(free)) for p in template.placeholders]
    if np.prod([float(len(v)) for v in values]) > MOST_NAMES:
        raise InputError("mapping", "its templates stand for too many names", "give the base with --base")
    for choice in product(*values):
        yield template.name(dict(zip(template.placeholders, choice, strict=True)))
