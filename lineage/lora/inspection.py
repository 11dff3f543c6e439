"""What an adapter is, what it says of its base, and what ails it."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np

from lineage.checkpoint.base import Checkpoint
from lineage.errors import InputError
from lineage.lora.alone import read_alone
from lineage.lora.delta import Delta
from lineage.lora.forms import loha, lokr
from lineage.lora.grammar import grammars
from lineage.lora.modules import split_name
from lineage.lora.reading import Adapter, read_adapter
from lineage.lora.source import Base, Source, open_adapter
from lineage.lora.split_qkv import split_parts

__all__ = ["Fit", "Inspection", "ModuleInfo", "inspect"]

#: entries of headers and configurations that name a base
_CLAIMS = (
    "base_model_name_or_path", "ss_sd_model_name", "ss_base_model_version", "ss_sd_model_hash", "ss_new_sd_model_hash",
    "modelspec.architecture", "modelspec.implementation", "general.architecture", "general.base_model.0.name",
)  # fmt: skip
#: bytes of a base up to which its hash is computed without being asked for
HASHED_BYTES = 1 << 30


class ModuleInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One adapted tensor: its rank, its scale, the kind of its factors and the norm of its difference."""

    tensor: str
    kind: str
    rank: int
    scale: float
    norm: float | None


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """How an adapter fits a base.

    Attributes
    ----------
    path : the base
    fitting, keys : keys whose module the base has, in the right shape, and all
    reason : why the first of the others does not fit
    hash : True where the adapter's training hash is the base's, False where it is another one, None: not known
    """

    path: str
    fitting: int
    keys: int
    reason: str = ""
    hash: bool | None = None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What `lora inspect` shows.

    Attributes
    ----------
    path, formats : the file and the grammars of its keys
    keys, tensors : numbers
    ranks, alphas : histograms
    modules : each tensor, by its name on the base or as the keys spell it
    targets : last words of the modules and how often they stand
    claims : what it says of its base
    fits : how it fits the given bases
    ailments : what is wrong or worth knowing, one sentence each
    left : keys that mean nothing, with the reason
    """

    path: str
    formats: tuple[str, ...]
    keys: int
    tensors: int
    dtypes: dict[str, int]
    ranks: dict[int, int]
    scales: dict[str, int]
    modules: tuple[ModuleInfo, ...]
    targets: dict[str, int]
    claims: dict[str, str]
    fits: tuple[Fit, ...]
    ailments: tuple[str, ...]
    left: dict[str, str]


def inspect(
    path: str | os.PathLike[str], bases: Sequence[Checkpoint] = (), *, format: str | None = None, norms: bool = True
) -> Inspection:
    """Reads the adapter on its best base, or without one, and looks for what usually goes wrong.

    Raises
    ------
    InputError : it cannot be read at all
    """
    source = open_adapter(path)
    found = [(_fit(source, b, format), b) for b in bases]
    best = max(found, key=lambda f: f[0].fitting, default=None)
    ailments: list[str] = []
    if best is not None and best[0].fitting:
        adapter = read_adapter(source, Base.of(best[1]), format=format)
    else:
        if best is not None:
            ailments.append(f"wrong base: none of its keys fits {best[1].path} ({best[0].reason})")
        adapter, _ = read_alone(source, format=format)
    ailments += [*_in_keys(source, adapter), *_in_values(source, adapter), *_in_scales(source, adapter)]
    if best is not None and 0 < best[0].fitting < best[0].keys:
        ailments.append(f"{best[0].keys - best[0].fitting} of its keys do not fit {best[1].path}: {best[0].reason}")
    modules = tuple(_info(name, delta, norms=norms) for name, delta in adapter.deltas.items())
    return Inspection(
        path=str(path), formats=adapter.formats, keys=len(source.keys), tensors=len(adapter.deltas),
        dtypes=dict(Counter(s.dtype for s in source.arrays)),
        ranks=dict(sorted(Counter(m.rank for m in modules if m.rank).items())),
        scales=dict(Counter(f"{m.scale:g}" for m in modules if m.rank)),
        modules=modules,
        targets=dict(Counter(split_name(m.tensor)[0].rpartition(".")[2] for m in modules).most_common()),
        claims=_claims(source), fits=tuple(f for f, _ in found), ailments=tuple(dict.fromkeys(ailments)),
        left={f.key: f.reason for f in adapter.left},
    )  # fmt: skip


def _fit(source: Source, base: Checkpoint, format: str | None) -> Fit:
    """How many of the keys a base has modules for."""
    matches = _hash_matches(source, base)
    try:
        adapter = read_adapter(source, Base.of(base), format=format)
    except InputError as exc:
        return Fit(path=base.path, fitting=0, keys=len(source.keys), reason=str(exc), hash=matches)
    reason = adapter.left[0].reason if adapter.left else ""
    return Fit(
        path=base.path, fitting=len(source.keys) - len(adapter.left), keys=len(source.keys), reason=reason, hash=matches
    )


def _hash_matches(source: Source, base: Checkpoint) -> bool | None:
    """Whether the hash that the trainer noted is that of the base's file (sd-scripts `calculate_sha256`)."""
    noted = source.metadata.get("ss_new_sd_model_hash", "").lower()
    if not noted or not os.path.isfile(base.path) or os.path.getsize(base.path) > HASHED_BYTES:
        return None
    with open(base.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return digest == noted or (len(noted) < 64 and digest.startswith(noted))


def _info(name: str, delta: Delta, *, norms: bool) -> ModuleInfo:
    rank = max((t.sizes[n] for t in delta.terms for n in t.inner), default=0)
    kind = "full" if not rank else "LoRA"
    if len(delta.shape) > 1 and rank:
        kind = "LoHa" if loha(delta) else "LoKr" if lokr(delta) else "LoRA"
    if delta.magnitudes:
        kind = f"DoRA ({kind})" if kind != "LoRA" else "DoRA"
    norm = float(np.linalg.norm(delta.dense())) if norms else None
    return ModuleInfo(tensor=name, kind=kind, rank=rank, scale=delta.terms[0].scale if delta.terms else 0.0, norm=norm)


def _claims(source: Source) -> dict[str, str]:
    """What the header and the configuration say of the base."""
    found = {k: source.metadata[k] for k in _CLAIMS if source.metadata.get(k)}
    for key in _CLAIMS:
        value = (source.config or {}).get(key)
        if isinstance(value, str) and value:
            found[key] = value
    return found


def _in_keys(source: Source, adapter: Adapter) -> list[str]:
    """Missing halves, several grammars, keys of nobody."""
    found = []
    halves = [f for f in adapter.left if "missing" in f.reason]
    if halves:
        found.append(f"{len(halves)} keys lack their other half, such as {halves[0].key}")
    if len(adapter.formats) > 1:
        found.append(f"keys of {len(adapter.formats)} formats in one file: {', '.join(adapter.formats)}")
    strange = [f.key for f in adapter.left if "no adapter format" in f.reason]
    if strange:
        others = sorted({g.format for g in grammars().values() for k in strange if g.ends(k)})
        found.append(
            f"{len(strange)} keys of no known format, such as {strange[0]}"
            + (f" ({', '.join(others)}?)" if others else "")
        )
    swapped = [f for f in adapter.left if "do not fit" in f.reason]
    for fate in swapped[:1]:
        found.append(f"{len(swapped)} keys have factors that do not fit, swapped or of another base: {fate.reason}")
    return found


def _in_values(source: Source, adapter: Adapter) -> list[str]:
    """NaN, zeros."""
    found = [f"{f.key}: {f.reason}" for f in adapter.left if "NaN" in f.reason][:1]
    zero = [n for n, d in adapter.deltas.items() if d.terms and not d.compact().terms]
    if zero and len(zero) == len(adapter.deltas):
        found.append("every difference is zero: it was not trained, or one factor was lost")
    elif zero:
        found.append(f"{len(zero)} differences are zero, such as that of {zero[0]}")
    return found


def _in_scales(source: Source, adapter: Adapter) -> list[str]:
    """Alphas that are missing or zero, ranks that differ without one, kohya's split qkv (T26)."""
    found = list(adapter.notes)
    zero = [k for k in source.keys if k.endswith(".alpha") and not source.array(k).any()]
    if zero:
        found.append(
            f"{len(zero)} alphas are 0, which kohya, LyCORIS and ai-toolkit read as the rank; so it is read here"
        )
    ranks = {max((t.sizes[n] for t in d.terms for n in t.inner), default=0) for d in adapter.deltas.values()} - {0}
    if len(ranks) > 1 and any(d.assumed for d in adapter.deltas.values()):
        found.append(
            f"ranks from {min(ranks)} to {max(ranks)} and no alpha: older diffusers take the first rank for all"
        )
    if (count := split_parts(source, adapter)) > 1:
        found.append(
            f"trained with split_qkv: fused factors are block-diagonal and alpha was not multiplied by {count}, so "
            f"every reader shows 1/{count} of the trained strength; convert with --trained-strength to have it"
        )
    return found
