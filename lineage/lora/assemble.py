"""One module's arrays as deltas of its weight and its bias: LoRA, LoHa, LoKr, full differences, DoRA magnitudes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lineage.layout.axes import Shape
from lineage.lora.delta import Delta, Magnitude, Refused
from lineage.lora.network import Term

__all__ = ["Arrays", "einsum_pair", "full", "has_pair", "magnitude", "pair", "rank_of", "term_of"]

Arrays = Mapping[str, NDArray[Any]]
_KERNEL = "hwdt"


def has_pair(roles: Arrays) -> bool:
    """Whether the arrays hold factors at all (not only full differences)."""
    return any(r in ("down", "up", "mid") or r.startswith(("up_piece", "table_", "hada_", "lokr_")) for r in roles)


def rank_of(roles: Arrays) -> int:
    """The rank that alpha is divided by; 0 where no factor is a product (LoKr with both factors whole).

    Raises
    ------
    Refused : a factor lacks its other half
    """
    if "hada_w1_b" in roles:
        return int(roles["hada_w1_b"].shape[0])
    if any(r.startswith("lokr_w") for r in roles):
        second = roles.get("lokr_w2_b", roles.get("lokr_w1_b"))
        return 0 if second is None else int(second.shape[0])
    _both(roles, "down", "up")
    return int(roles["down"].shape[0])


def term_of(roles: Arrays, shape: Shape | None, *, first_rows: bool = False) -> Term:
    """The module's network, without its scale.

    Parameters
    ----------
    roles : arrays by role, factors in torch's order (rank, in) and (out, rank)
    shape : of the base's weight, None where it is not known
    first_rows : an up factor that is too short fills the first rows

    Raises
    ------
    Refused : half of a pair is missing, or the shapes do not fit
    """
    if any(r.startswith("hada") for r in roles):
        return _loha(roles, shape)
    if any(r.startswith("lokr") for r in roles):
        return _lokr(roles, shape)
    _both(roles, "down", "up")
    return pair(roles["down"], roles["up"], roles.get("mid"), shape, first_rows=first_rows)


def _both(roles: Arrays, *names: str) -> None:
    missing = [n for n in names if n not in roles]
    if missing:
        raise Refused(f"the other half of the pair ({missing[0]}) is missing")


def pair(
    down: NDArray[Any], up: NDArray[Any], mid: NDArray[Any] | None, shape: Shape | None, *, first_rows: bool = False
) -> Term:
    """up (out, rank, 1…) · down (rank, in, kernel…), with a Tucker core between them where there is one."""
    rank = down.shape[0] if mid is None else mid.shape[0]
    up = up.reshape(up.shape[0], -1)
    if up.shape[1] != rank or (mid is not None and mid.shape[1] != down.shape[0]):
        raise Refused(f"factors of rank {up.shape[1]} and {rank} do not fit each other")
    out, columns = up.shape[0], math.prod(down.shape[1:])
    if mid is not None:
        flat = down.reshape(down.shape[0], -1)
        letters = _KERNEL[: mid.ndim - 2]
        found = (out, flat.shape[1], *mid.shape[2:])
        if shape not in (None, found):
            raise _unfit(found, shape)
        return Term.of([(up, "ok"), (mid, "kl" + letters), (flat, "li")], ["o", "i", *letters])
    if shape is None:
        shape = (out, *down.shape[1:])
    if first_rows and len(shape) == 2 and out < shape[0] and columns == shape[1]:
        return Term.of([(up, "ok"), (down, "ki")], ["o", "i"]).padded(0, 0, shape[0] - out)
    if shape and out == shape[0] and columns == math.prod(shape[1:]):
        letters = "i" + _KERNEL[: len(shape) - 2]
        letters = letters[: len(shape) - 1]
        return Term.of([(up, "ok"), (down.reshape(rank, *shape[1:]), "k" + letters)], ["o", *letters])
    if len(shape) == 2 and (columns, out) == shape:
        # the base holds this weight transposed: (in, out)
        return Term.of([(up, "ok"), (down.reshape(rank, -1), "ki")], ["i", "o"])
    raise _unfit((out, *down.shape[1:]), shape)


def _unfit(found: Shape, shape: Shape | None) -> Refused:
    return Refused(f"factors for {list(found)} do not fit a tensor of {list(shape or ())}")


def einsum_pair(a: NDArray[Any], b: NDArray[Any], shape: Shape | None, *, shared: bool) -> Term:
    """a (…, in, rank) · b (…, rank, out) beside an einsum kernel (…, in, out).

    `shared`: b counts summed over its axis before the last two.
    """
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        raise Refused(f"factors of {list(a.shape)} and {list(b.shape)} do not fit each other")
    found = (*a.shape[:-1], b.shape[-1])
    if shape is not None and shape != found:
        raise _unfit(found, shape)
    batch = "abcdefgh"[: a.ndim - 2]
    letters = batch
    if shared and a.ndim > 2:
        b, letters = b.sum(axis=-3, dtype=np.float64), batch[:-1]
    return Term.of([(a, batch + "ik"), (b, letters + "ko")], [*batch, "i", "o"])


def _loha(roles: Arrays, shape: Shape | None) -> Term:
    """(w1_a · w1_b) ∘ (w2_a · w2_b), each with a Tucker core where it has one (LyCORIS `modules/loha.py`)."""
    _both(roles, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    parts: list[tuple[NDArray[Any], str]] = []
    if ("hada_t1" in roles) != ("hada_t2" in roles):
        raise Refused("one of the two cores (hada_t1, hada_t2) is missing")
    if "hada_t1" in roles:
        kernel = _KERNEL[: roles["hada_t1"].ndim - 2]
        for n, (k, m) in (("1", "pq"), ("2", "rs")):
            parts += [
                (roles[f"hada_t{n}"], k + m + kernel),
                (roles[f"hada_w{n}_a"], k + "o"),
                (roles[f"hada_w{n}_b"], m + "i"),
            ]
        found = (roles["hada_w1_a"].shape[1], roles["hada_w1_b"].shape[1], *roles["hada_t1"].shape[2:])
        if shape not in (None, found):
            raise _unfit(found, shape)
        return _term(parts, ["o", "i", *kernel])
    out, columns = roles["hada_w1_a"].shape[0], math.prod(roles["hada_w1_b"].shape[1:])
    inside = (columns,) if shape is None else shape[1:]
    if shape is not None and (out != shape[0] or columns != math.prod(inside)):
        raise _unfit((out, columns), shape)
    letters = ("i" + _KERNEL)[: len(inside)]
    for n, k in (("1", "p"), ("2", "q")):
        b = roles[f"hada_w{n}_b"]
        if math.prod(b.shape[1:]) != columns:
            raise Refused("the two products of LoHa have different shapes")
        parts += [(roles[f"hada_w{n}_a"], "o" + k), (b.reshape(b.shape[0], *inside), k + letters)]
    return _term(parts, ["o", *letters])


def _term(parts: list[tuple[NDArray[Any], str]], layout: list[str]) -> Term:
    try:
        return Term.of(parts, layout)
    except ValueError as exc:
        raise Refused(f"the factors do not fit each other: {exc}") from exc


def _lokr(roles: Arrays, shape: Shape | None) -> Term:
    """kron(w1, w2), each whole or a product, w2 with a Tucker core where it has one (LyCORIS `modules/lokr.py`)."""
    parts: list[tuple[NDArray[Any], str]] = []
    if "lokr_w1" in roles:
        parts.append((roles["lokr_w1"], "ab"))
    else:
        _both(roles, "lokr_w1_a", "lokr_w1_b")
        parts += [(roles["lokr_w1_a"], "ak"), (roles["lokr_w1_b"], "kb")]
    rows, columns = (next(p.shape[s.index(x)] for p, s in parts if x in s) for x in "ab")
    kernel = () if shape is None else shape[2:]
    letters = _KERNEL[: len(kernel)]
    if "lokr_w2" in roles:
        w2 = roles["lokr_w2"]
        kernel = w2.shape[2:] if w2.ndim > 2 else kernel if w2.ndim == 2 and math.prod(kernel) == 1 else ()
        letters = _KERNEL[: len(kernel)]
        parts.append((w2.reshape(*w2.shape[:2], *kernel), "cd" + letters))
    else:
        _both(roles, "lokr_w2_a", "lokr_w2_b")
        a, b = roles["lokr_w2_a"], roles["lokr_w2_b"]
        if "lokr_t2" in roles:
            kernel = roles["lokr_t2"].shape[2:]
            letters = _KERNEL[: len(kernel)]
            parts += [(roles["lokr_t2"], "pq" + letters), (a, "pc"), (b, "qd")]
        else:
            if math.prod(b.shape[1:]) % math.prod(kernel):
                raise _unfit((rows * a.shape[0], columns * math.prod(b.shape[1:])), shape)
            parts += [(a.reshape(a.shape[0], -1), "cq"), (b.reshape(b.shape[0], -1, *kernel), "qd" + letters)]
    term = _term(parts, ["ac", "bd", *letters])
    if shape is not None and term.shape != shape:
        raise _unfit(term.shape, shape)
    return term


def full(array: NDArray[Any], shape: Shape | None) -> Term:
    """A whole difference of a tensor."""
    if shape is not None:
        if array.size != math.prod(shape):
            raise Refused(f"a difference of {list(array.shape)} does not fit a tensor of {list(shape)}")
        array = array.reshape(shape)
    letters = "abcdefgh"[: array.ndim]
    return Term.of([(array, letters)], list(letters))


def magnitude(vector: NDArray[Any], delta: Delta, *, rows_only: bool, transposed: bool) -> Magnitude:
    """DoRA's vector of a weight: one value for each output, or for each input where its shape says so.

    Parameters
    ----------
    rows_only : the format knows magnitudes of outputs only
    transposed : the base holds the weight as (in, out)
    """
    shape = delta.shape
    if len(shape) < 2:
        raise Refused("a DoRA magnitude needs a matrix")
    out = 1 if transposed else 0
    by_rows = rows_only or vector.ndim < 2 or vector.shape[0] == shape[out]
    axis = out if by_rows else 1 - out
    if vector.size != shape[axis]:
        raise Refused(f"{vector.size} magnitudes do not fit a tensor of {list(shape)}")
    if not vector.all():
        raise Refused("a DoRA magnitude is zero")
    letters = "abcdefgh"[: len(shape)]
    sizes = {x: n for x, n in zip(letters, shape, strict=True) if x != letters[axis]}
    term = Term.of([(vector.reshape(-1), letters[axis])], list(letters), **sizes)
    return Magnitude(term, math.prod(shape) // shape[axis])
