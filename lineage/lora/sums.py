"""Adapters of one base added up, and adapters made smaller."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from lineage.checkpoint.base import Checkpoint
from lineage.errors import InputError
from lineage.lora.alone import read_alone
from lineage.lora.converting import written_for
from lineage.lora.delta import Delta
from lineage.lora.grammar import Grammar, grammar
from lineage.lora.held import Target
from lineage.lora.metadata import carried_over
from lineage.lora.network import Term
from lineage.lora.reading import Adapter, read_adapter
from lineage.lora.shrink import shrunk_all
from lineage.lora.source import Base, open_adapter
from lineage.lora.storing import store
from lineage.lora.verify import verify
from lineage.lora.wanted import Known

__all__ = ["Change", "Made", "add", "resize"]

StrPath = str | os.PathLike[str]


class Change(msgspec.Struct, frozen=True):
    """What became of one tensor's pair.

    Attributes
    ----------
    tensor : its name, or its module as the keys spell it
    before, rank : ranks, the sum of all adapters' before
    lost : share of the squared norm that is gone
    """

    tensor: str
    before: int
    rank: int
    lost: float = 0.0


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What `add` or `resize` wrote.

    Attributes
    ----------
    out, format : what was written
    tensors : every tensor's ranks
    left : keys that could not be read or written, with the reason
    notes : what a user should know
    """

    out: str
    format: str
    tensors: tuple[Change, ...]
    left: dict[str, str] = {}
    notes: tuple[str, ...] = ()


def resize(
    path: StrPath,
    out: StrPath,
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: Checkpoint | None = None,
    to: str | None = None,
) -> Made:
    """The adapter with every pair cut to a rank, or to the ranks that hold a share of its squared norm.

    Parameters
    ----------
    base : the adapter's base, needed where the keys alone do not tell the modules
    to : format to write, None: the adapter's own

    Raises
    ------
    InputError : neither `rank` nor `energy` is given, or the adapter cannot be read
    """
    if rank is None and energy is None:
        raise InputError("resize", "how small it should be is missing", "give --rank or --energy")
    (adapter,), g, target, known = _read([path], base, to)
    found = shrunk_all(adapter.deltas, rank=rank, energy=energy)
    deltas = {n: found[n].delta if n in found else d for n, d in adapter.deltas.items()}
    changes = tuple(Change(n, s.before, s.rank, s.lost) for n, s in found.items())
    return _write(deltas, [adapter], g, target, known, out, changes, [path])


def add(
    paths: Sequence[StrPath],
    out: StrPath,
    *,
    weights: Sequence[float] | None = None,
    base: Checkpoint | None = None,
    to: str | None = None,
) -> Made:
    """The weighted sum of adapters, exact: their pairs stand side by side, ranks add.

    Raises
    ------
    InputError : an adapter cannot be read, holds DoRA, or they are of different formats and no base is given
    """
    factors = list(weights) if weights else [1.0] * len(paths)
    if len(factors) != len(paths):
        raise InputError("add", f"{len(factors)} weights for {len(paths)} adapters", "give one weight for each")
    adapters, g, target, known = _read(paths, base, to)
    deltas: dict[str, Delta] = {}
    for adapter, factor, path in zip(adapters, factors, paths, strict=True):
        for name, delta in adapter.deltas.items():
            if delta.magnitudes:
                raise InputError(
                    path, f"{name} has DoRA magnitudes, which do not add", "merge it into the base instead"
                )
            terms = tuple(Term(t.parts, t.layout, t.sizes, t.scale * factor) for t in delta.terms)
            if name in deltas and deltas[name].shape != delta.shape:
                raise InputError(
                    path, f"{name} has the shape {list(delta.shape)} here, {list(deltas[name].shape)} before"
                )
            before = deltas[name].terms if name in deltas else ()
            deltas[name] = msgspec.structs.replace(delta, terms=before + terms)
    return _write(deltas, adapters, g, target, known, out, (), paths)


def _read(
    paths: Sequence[StrPath], base: Checkpoint | None, to: str | None
) -> tuple[list[Adapter], Grammar, Target, Base | None]:
    """The adapters by tensors of one base, or by names that their keys share."""
    sources = [open_adapter(p) for p in paths]
    if base is not None:
        known = Base.of(base)
        adapters = [read_adapter(s, known) for s in sources]
        return adapters, grammar(to or adapters[0].formats[0]), Target.of(base), known
    found = [read_alone(s) for s in sources]
    formats = list(dict.fromkeys(g.format for _, g in found))
    if len(formats) > 1 or (to is not None and to != formats[0]):
        raise InputError(
            paths[0], f"formats {' and '.join(formats + [to] if to else formats)}", "give the base with --base"
        )
    shapes = {n: d.shape for a, _ in found for n, d in a.deltas.items()}
    return [a for a, _ in found], found[0][1], Target(shapes, verbatim=True), None


def _write(
    deltas: dict[str, Delta], adapters: Sequence[Adapter], g: Grammar, target: Target, known: Base | None, out: StrPath,
    changes: tuple[Change, ...], paths: Sequence[StrPath],
) -> Made:  # fmt: skip
    """Stores the deltas and says what was done."""
    words = {n: {a.dtypes[n] for a in adapters if n in a.dtypes} for n in deltas}
    dtypes = {n: next(iter(w)) if len(w) == 1 else "F32" for n, w in words.items()}
    written = written_for(g, deltas, target, dtypes, origin=adapters[0].config)
    if g.container != "gguf":
        written.header = {**carried_over(adapters[0].metadata, written), **written.header}
    elif architecture := adapters[0].metadata.get("general.architecture"):
        written.header["general.architecture"] = architecture
    again = known if known is not None else Base(dict.fromkeys(target.shapes))

    def check(part: Path) -> None:
        verify(part, g, again, deltas, Known(deltas), refused=written.refused)

    store(written, out, check, inputs=[Path(p) for p in paths])
    left = {f.key: f.reason for a in adapters for f in a.left} | written.refused
    return Made(
        out=str(out),
        format=g.format,
        tensors=changes or tuple(Change(n, r, r) for n, r in written.ranks.items()),
        left=left,
        notes=tuple(n for a in adapters for n in a.notes),
    )
