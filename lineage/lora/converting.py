"""An adapter of one model written for another: read, carried through a mapping, written, and verified by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from lineage.checkpoint.base import Checkpoint
from lineage.errors import InputError
from lineage.filling import Filled
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.lora.carry import Carried, carried
from lineage.lora.delta import Delta
from lineage.lora.grammar import Grammar, grammar
from lineage.lora.held import Target
from lineage.lora.peft_writing import write_peft
from lineage.lora.reading import Adapter, read_adapter
from lineage.lora.shrink import shrunk_all
from lineage.lora.source import Base, Source, open_adapter
from lineage.lora.split_qkv import row_blocks, split_parts, strengthened
from lineage.lora.storing import store
from lineage.lora.verify import verify
from lineage.lora.wanted import Known, Ruled
from lineage.lora.writing import Written, write_keys

__all__ = ["Conversion", "KeyFate", "convert", "written_for"]


class KeyFate(msgspec.Struct, frozen=True):
    """What became of one key.

    Attributes
    ----------
    key : in the source
    tensor : the base's tensor that it changes, "" where it changes none
    to : keys of the output that hold its difference
    reason : why it was left over, "" where it was not
    """

    key: str
    tensor: str = ""
    to: tuple[str, ...] = ()
    reason: str = ""


class Conversion(msgspec.Struct, kw_only=True):
    """What a conversion did.

    Attributes
    ----------
    out : what was written
    source_formats, format : grammars of the source's keys, grammar of the output's
    keys : fate of every key of the source
    tensors : target tensors that changed
    verified : of them, those whose stored difference was compared with the carried one
    largest_error : the largest relative distance found
    grown : target tensors whose pair has a higher rank than its sources' pairs together, with both ranks
    lost : share of a difference's squared norm that a cut to fewer ranks left out
    notes : what a user should know
    """

    out: str
    source_formats: tuple[str, ...]
    format: str
    keys: tuple[KeyFate, ...]
    tensors: int
    verified: int = 0
    largest_error: float = 0.0
    grown: dict[str, tuple[int, int]] = {}
    lost: dict[str, float] = {}
    notes: tuple[str, ...] = ()

    @property
    def left(self) -> tuple[KeyFate, ...]:
        """Keys that went nowhere."""
        return tuple(k for k in self.keys if k.reason)


def convert(
    path: str | os.PathLike[str],
    mapping: LayoutMapping,
    to: str,
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    base: Checkpoint | None = None,
    target: Checkpoint | None = None,
    scale: float | None = None,
    prefix: str | None = None,
    architecture: str | None = None,
    rank: int | None = None,
    trained_strength: bool = False,
    inputs: Iterable[str | Path] = (),
) -> Conversion:
    """Writes for the mapping's target what the adapter is for its source.

    Parameters
    ----------
    path : the adapter
    mapping : from the adapter's base to the model it is wanted for
    to : format to write
    format : format of the adapter, None: found out key by key
    base, target : weights of the two models; needed where a name, a shape or a value cannot be told otherwise
    scale : for formats that keep their scale outside the file
    prefix : beginning of all keys, in place of the format's own
    architecture : `general.architecture` of a GGUF adapter
    rank : cut every pair to this rank by singular values; the only step that loses anything
    trained_strength : undo what sd-scripts' split_qkv leaves wrong: alpha times the number of parts
    inputs : further paths that must not be replaced

    Raises
    ------
    InputError : the adapter cannot be read, or nothing of it can be converted
    VerificationError : a difference that was written is not the one that was carried over
    """
    source = open_adapter(path)
    own = Base.of(base) if base is not None else Base.named(mapping, source.keys)
    adapter = read_adapter(source, own, format=format, scale=scale)
    adapter = _strengthened(source, adapter, trained_strength)
    carry = carried(adapter.deltas, mapping, own)
    cut = shrunk_all(carry.deltas, rank=rank) if rank is not None else {}
    deltas = {name: cut[name].delta if name in cut else delta for name, delta in carry.deltas.items()}
    goal = target if target is not None else Filled(mapping, base) if base is not None else None
    place = Target.of(goal) if goal is not None else _named(carry)
    g = _grammar(to, prefix)
    written = written_for(g, deltas, place, _dtypes(adapter, carry), origin=adapter.config)
    if not written.entries:
        raise InputError(path, *_nothing(adapter, carry, written))
    _provenance(written, adapter, goal, architecture)
    result = Conversion(
        out=str(out),
        source_formats=adapter.formats,
        format=to,
        keys=_fates(adapter, carry, written),
        tensors=len({e.tensor for e in written.entries.values()}),
        grown=_grown(adapter, carry, written),
        lost={name: s.lost for name, s in cut.items() if s.lost},
        notes=(*adapter.notes, *written.notes),
    )

    wanted = Ruled(carry, adapter.deltas, own) if rank is None else Known(deltas)
    again = Base.of(goal) if goal is not None else Base(place.shapes)

    def check(part: Path) -> None:
        result.verified, result.largest_error = verify(part, g, again, deltas, wanted, refused=written.refused)

    store(written, out, check, inputs=[Path(path), *map(Path, inputs)])
    return result


def _strengthened(source: Source, adapter: Adapter, wanted: bool) -> Adapter:
    """T26 of the format notes: warned of, and undone where the user asks for it."""
    parts = split_parts(source, adapter)
    if parts < 2:
        return adapter
    if not wanted:
        note = (
            f"trained with split_qkv: its alphas give 1/{parts} of the trained strength; --trained-strength undoes that"
        )
        return msgspec.structs.replace(adapter, notes=(*adapter.notes, note))
    deltas = {n: strengthened(d, row_blocks(d)) for n, d in adapter.deltas.items()}
    return msgspec.structs.replace(adapter, deltas=deltas)


def written_for(
    g: Grammar,
    deltas: Mapping[str, Delta],
    place: Target,
    dtypes: Mapping[str, str],
    *,
    origin: Mapping[str, Any] | None = None,
) -> Written:
    """Deltas of a model's tensors as keys of a format."""
    if g.format == "peft":
        return write_peft(deltas, place, dtypes, origin=origin)
    return write_keys(g, deltas, place, dtypes)


def _grammar(name: str, prefix: str | None) -> Grammar:
    found = grammar(name)
    return found if prefix is None else msgspec.structs.replace(found, prefixes={"default": prefix})


def _named(carry: Carried) -> Target:
    """The target as far as the mapping tells it."""
    shapes = dict.fromkeys(sorted(carry.targets), ()) | {name: d.shape for name, d in carry.deltas.items()}
    return Target(shapes, lambda name: None)


def _dtypes(adapter: Adapter, carry: Carried) -> dict[str, str]:
    """Stored dtype of each target's factors: that of its sources where they agree."""
    found = {}
    for name, sources in carry.sources.items():
        words = {adapter.dtypes[s] for s in sources if s in adapter.dtypes}
        found[name] = words.pop() if len(words) == 1 else "F32"
    return found


def _nothing(adapter: Adapter, carry: Carried, written: Written) -> tuple[str, str | None]:
    """Cause and remedy where no tensor of the target would change."""
    reasons = list(written.refused.values()) or list(carry.reasons.values()) or [f.reason for f in adapter.left]
    return f"none of its {len(adapter.fates)} keys can be converted: {reasons[0] if reasons else 'it is empty'}", None


def _fates(adapter: Adapter, carry: Carried, written: Written) -> tuple[KeyFate, ...]:
    """Every key of the source with the keys that it went into."""
    goes: dict[str, list[str]] = {}
    for target, sources in carry.sources.items():
        for name in sources:
            goes.setdefault(name, []).append(target)
    by_tensor: dict[str, list[str]] = {}
    for key, entry in written.entries.items():
        by_tensor.setdefault(entry.tensor, []).append(key)
    fates = []
    for fate in adapter.fates:
        if fate.status == "left":
            fates.append(KeyFate(fate.key, reason=fate.reason))
            continue
        targets = goes.get(fate.tensor, [])
        to = tuple(key for t in targets for key in by_tensor.get(t, ()))
        refused = [written.refused[t] for t in targets if t in written.refused]
        zero = targets and not any(t in by_tensor for t in targets)
        reason = carry.reasons.get(fate.tensor) or (refused[0] if refused else "")
        if not reason and zero:
            reason = "its difference is zero everywhere the target has it"
        fates.append(KeyFate(fate.key, fate.tensor, to, reason))
    return tuple(fates)


def _grown(adapter: Adapter, carry: Carried, written: Written) -> dict[str, tuple[int, int]]:
    """Pairs whose rank is above the sum of their sources' ranks."""
    found = {}
    for name, rank in written.ranks.items():
        before = sum(_rank(adapter.deltas[s]) for s in carry.sources.get(name, ()) if s in adapter.deltas)
        if before and rank > before:
            found[name] = (before, rank)
    return found


def _rank(delta: Delta) -> int:
    """Length of the longest summed axis of a delta's terms, added up."""
    return sum(max((t.sizes[n] for n in t.inner), default=0) for t in delta.terms)


def _provenance(written: Written, adapter: Adapter, goal: Checkpoint | None, architecture: str | None) -> None:
    """Metadata kept, hashes that no longer hold dropped, and what this file was made of."""
    from lineage.lora.metadata import carried_over

    if written.format == "gguf":
        known = architecture or (goal.metadata.get("general.architecture") if goal is not None else None)
        if known:
            written.header["general.architecture"] = known
        else:
            written.notes.append(
                "llama.cpp wants general.architecture; give --architecture, or a GGUF file as --target"
            )
        return
    written.header = {**carried_over(adapter.metadata, written), **written.header}
