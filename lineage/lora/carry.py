"""An adapter of one model written for another: read, carried through the mapping, written, and verified by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.chain import Entry, Level, apply_chain, mapped
from lineage.layout.mapping import Instance
from lineage.layout.mapping import Mapping as LayoutMapping
from lineage.layout.operations import Each, Operation
from lineage.lora.delta import Delta, Refused
from lineage.lora.network import Term
from lineage.lora.source import Base
from lineage.lora.transport import transported

__all__ = ["Carried", "carried", "known", "paired"]


class Carried(msgspec.Struct, kw_only=True):
    """Deltas of the target's tensors.

    Attributes
    ----------
    deltas : by tensor of the target
    shapes : of all target tensors that the mapping gives, by name
    sources : tensors of the base that each delta comes from
    instances : the mapping's instances that gave each delta, in order
    reasons : tensors of the base whose difference went nowhere, with the reason
    """

    deltas: dict[str, Delta] = {}
    sources: dict[str, tuple[str, ...]] = {}
    instances: dict[str, list[tuple[Instance, int]]] = {}
    reasons: dict[str, str] = {}
    targets: set[str] = set()


def carried(deltas: Mapping[str, Delta], mapping: LayoutMapping, base: Base) -> Carried:
    """The deltas of the mapping's targets.

    Raises
    ------
    InputError : the mapping does not fit, or a tensor's shape is needed that only the base can tell
    """
    shapes: dict[str, Any] = {
        n: s if s is not None else deltas[n].shape if n in deltas else None for n, s in base.shapes.items()
    }
    result = Carried()
    reached: set[str] = set()
    partial: dict[str, NDArray[np.bool_]] = {}
    try:
        for instance in mapping.instances(shapes):
            result.targets.update(instance.target_names)
            touched = [n for n in instance.source_names if n in deltas]
            if not touched:
                continue
            try:
                found = _one(instance, deltas, shapes)
            except Refused as exc:
                result.reasons.update(dict.fromkeys(touched, str(exc)))
                continue
            reached.update(touched)
            mask = known(instance, shapes)
            for place, (name, delta) in enumerate(found):
                _keep(result, partial, name, delta, mask[place] if mask else None, instance, place)
    except LayoutError as exc:
        raise InputError("mapping", str(exc), "is it a mapping from the adapter's base?") from exc
    for name in [n for n, d in result.deltas.items() if not d.terms and not d.magnitudes]:
        del result.deltas[name]
    for name in deltas:
        if name not in reached and name not in result.reasons:
            result.reasons[name] = f"the mapping gives {name} no counterpart"
    return result


def _one(
    instance: Instance, deltas: Mapping[str, Delta], shapes: Mapping[str, Shape | None]
) -> list[tuple[str, Delta]]:
    """Target names of one instance with their deltas."""

    def delta(name: str) -> Delta:
        if name in deltas:
            return deltas[name]
        shape = shapes[name]
        if shape is None:
            raise InputError(
                name, "the adapter does not touch it, but its shape is needed", "give the base with --base"
            )
        return Delta(shape=shape)

    entries = [mapped(entry, delta) for entry in instance.sources]
    return list(paired(instance.targets, transported(instance.rule.ops, entries)))


def paired(targets: Iterable[Entry], results: Iterable[Entry]) -> Iterable[tuple[str, Any]]:
    for target, result in zip(targets, results, strict=True):
        if isinstance(target, Level):
            yield from paired(target.items, result.items)
        else:
            yield target, result


def _leaves_gaps(ops: Iterable[Operation]) -> bool:
    return any(_leaves_gaps(c) for op in ops if isinstance(op, Each) for _, c in op.chains) or any(
        op.partial for op in ops
    )


def known(instance: Instance, shapes: Mapping[str, Any]) -> list[NDArray[np.bool_]] | None:
    """Which elements of the targets the instance knows; None where it knows all."""
    if not _leaves_gaps(instance.rule.ops):
        return None
    ones = [mapped(entry, lambda n: np.ones(shapes[n], np.bool_)) for entry in instance.sources]
    return [mask for _, mask in paired(instance.targets, apply_chain(instance.rule.ops, ones))]


def _keep(
    result: Carried, partial: dict[str, NDArray[np.bool_]], name: str, delta: Delta, mask: NDArray[np.bool_] | None,
    instance: Instance, place: int,
) -> None:  # fmt: skip
    """Takes a target's delta in; a target that several rules give in parts is put together."""
    if name not in result.deltas:
        if mask is not None:
            partial[name] = mask
        result.deltas[name], result.sources[name] = delta, instance.source_names
        result.instances[name] = [(instance, place)]
        return
    if name not in partial:
        return
    held = partial[name]
    new = ~held if mask is None else mask & ~held
    if new.any():
        old = result.deltas[name]
        more = delta if not (held & (True if mask is None else mask)).any() else _only(delta, new)
        result.deltas[name] = msgspec.structs.replace(
            old, terms=old.terms + more.terms, magnitudes=old.magnitudes + more.magnitudes
        )
        result.sources[name] += tuple(n for n in instance.source_names if n not in result.sources[name])
        result.instances[name].append((instance, place))
        partial[name] = held | new


def _only(delta: Delta, mask: NDArray[np.bool_]) -> Delta:
    """The delta at some elements alone, dense."""
    if delta.magnitudes:
        raise Refused("DoRA: two rules give parts of one tensor")
    letters = "abcdefgh"[: len(delta.shape)]
    return msgspec.structs.replace(
        delta, terms=(Term.of([(np.where(mask, delta.dense(), 0), letters)], list(letters)),)
    )
