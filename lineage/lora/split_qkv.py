"""Fused pairs that sd-scripts trained apart (`split_qkv`) and saved with the alpha of one part.

Saved ranks are multiplied with the number of parts and alpha is not, so that alpha / rank in any other reader is a
third (a quarter) of the trained strength: sd-scripts issue 2204, `networks/lora_flux.py` l.1095-1127.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise

import msgspec
import numpy as np

from lineage.lora.delta import Delta
from lineage.lora.forms import low_rank
from lineage.lora.network import Term
from lineage.lora.reading import Adapter
from lineage.lora.source import Source

__all__ = ["row_blocks", "split_parts", "strengthened"]


def split_parts(source: Source, adapter: Adapter) -> int:
    """The largest number of parts that a fused pair was trained in, 1 where none was.

    Told by `split_qkv` in the training arguments and by up factors that are block-diagonal without exception.
    """
    try:
        arguments = json.loads(source.metadata.get("ss_network_args", "{}"))
    except ValueError:
        return 1
    if not isinstance(arguments, Mapping) or str(arguments.get("split_qkv", "")).lower() not in ("true", "1"):
        return 1
    return max((row_blocks(d) for d in adapter.deltas.values()), default=1)


def row_blocks(delta: Delta) -> int:
    """Into how many blocks of rows, each with ranks of its own, a plain pair falls apart: 4, 3, or 1."""
    if len(delta.terms) != 1 or len(delta.terms[0].parts) != 2 or len(delta.shape) != 2:
        return 1
    filled = low_rank(delta).up != 0
    for count in (4, 3):
        if filled.shape[1] % count:
            continue
        width = filled.shape[1] // count
        spans = [np.flatnonzero(filled[:, k * width : (k + 1) * width].any(axis=1)) for k in range(count)]
        if all(len(s) for s in spans) and all(a[-1] < b[0] for a, b in pairwise(spans)):
            return count
    return 1


def strengthened(delta: Delta, parts: int) -> Delta:
    """The delta at so many times its strength."""
    terms = tuple(Term(t.parts, t.layout, t.sizes, t.scale * parts) for t in delta.terms)
    return msgspec.structs.replace(delta, terms=terms)
