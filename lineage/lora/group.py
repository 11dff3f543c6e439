"""The keys of one module on their way to deltas: factors in torch's order, their scale, what is stored whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.errors import InputError
from lineage.lora import assemble
from lineage.lora.delta import Delta, Magnitude, Refused
from lineage.lora.grammar import Found, Grammar
from lineage.lora.modules import Module
from lineage.lora.network import Term
from lineage.lora.peft import Config
from lineage.lora.source import Base, Source

__all__ = ["Context", "Group", "assembled"]

#: roles of arrays that are a difference, or a value, by themselves
_WHOLE = frozenset({"diff", "diff_bias", "set", "set_bias", "up_bias", "norm_weight", "norm_bias"})


class Context(msgspec.Struct, frozen=True):
    """What every module of one file shares.

    Attributes
    ----------
    source, base : the opened adapter and the model that its keys name
    config : its adapter_config.json
    scale : given by the user for formats that keep it outside the file
    notes : sentences for the user, added to
    """

    source: Source
    base: Base
    config: Config | None
    scale: float | None
    notes: list[str]


class Group(msgspec.Struct):
    """The keys of one module.

    Attributes
    ----------
    grammar, module : what the keys are written in and name
    roles : keys by what they hold
    seen : path that PEFT's patterns see
    stacked : the factors belong to a stack of experts
    """

    grammar: Grammar
    module: Module
    roles: dict[str, Found]
    seen: str = ""
    stacked: bool = False


def assembled(context: Context, group: Group) -> dict[str, tuple[Delta, list[str]]]:
    """Tensor names with their deltas and the keys that made them.

    Raises
    ------
    Refused : the arrays do not fit each other, the base or the configuration
    InputError : something is needed that only the user can give
    """
    return _Module(context, group).run()


class _Module:
    """One module's keys on their way to deltas."""

    def __init__(self, context: Context, group: Group) -> None:
        self.context, self.group = context, group
        self.g, self.module = group.grammar, group.module
        self.roles = {role: context.source.array(f.key) for role, f in group.roles.items()}
        self.shape = context.base.shape(self.module.weight)
        self.assumed = False

    def run(self) -> dict[str, tuple[Delta, list[str]]]:
        """Tensor names with their deltas and the keys that made them."""
        for role, array in self.roles.items():
            if not np.isfinite(array).all():
                raise Refused(f"{role} holds NaN or infinity")
        made: dict[str, tuple[Delta, list[str]]] = {}
        scale, beside = 1.0, set(self.roles) - _WHOLE
        if assemble.has_pair(self.roles):
            delta, scale = self._pair()
            made[self._weight()] = (delta, self._keys(beside))
        elif "magnitude" in self.roles or beside == set(self.roles):
            raise Refused("a scale or a magnitude without factors")
        if self.module.bias is None and "up_bias" in self.roles and made and not self.roles["up_bias"].any():
            # PEFT gives every up factor a bias where one has it; zeros beside a layer without bias mean nothing
            made[self._weight()][1].extend(self._keys({"up_bias"}))
            del self.roles["up_bias"]
        for role in sorted(set(self.roles) & _WHOLE):
            name, delta = self._full(role, self.roles[role], scale)
            keys = self._keys({role})
            if name in made:
                first, before = made[name]
                made[name] = (msgspec.structs.replace(first, terms=first.terms + delta.terms), before + keys)
            else:
                # an alpha beside a full difference has no effect, in any reader
                made[name] = (delta, keys + ([] if made else self._keys(beside)))
        return made

    def _keys(self, roles: set[str]) -> list[str]:
        return [f.key for role, f in self.group.roles.items() if role in roles]

    def _weight(self) -> str:
        if self.module.weight is None:
            raise Refused(f"the base has no weight under {self.module.path}")
        return self.module.weight

    def _bias(self) -> str:
        if self.module.bias is None:
            raise Refused(f"the base has no bias under {self.module.path}")
        return self.module.bias

    def _named(self) -> dict[str, NDArray[Any]]:
        """The factors; those of a table of tokens under the names of any pair."""
        renamed = {"table_down": "down", "table_up": "up"}
        return {renamed.get(role, role): array for role, array in self.roles.items()}

    def _pair(self) -> tuple[Delta, float]:
        """The weight's delta and the scale of its factors."""
        roles = self._named()
        if self.g.stacks and self._stacked(roles):
            term, rank = self._stack(roles), roles["down"].shape[1]
        elif self.g.transposed:
            term, rank = self._transposed(roles)
        elif any(r.startswith("up_piece") for r in roles):
            term, rank = self._pieces(roles)
        elif self.group.stacked:
            term, rank = self._experts(roles)
        else:
            rank = assemble.rank_of(roles)
            if self.g.scale == "file":
                rank = roles["up"].shape[1]  # llama.cpp divides by b's ranks; a table of tokens has other rows in a
            term = self._plain(roles)
        scale = self._scale(rank)
        delta = Delta(
            shape=term.shape,
            terms=(Term(term.parts, term.layout, term.sizes, scale),),
            embedding="table_down" in self.roles,
            assumed=self.assumed,
        )
        if "magnitude" in self.roles:
            delta = msgspec.structs.replace(delta, magnitudes=(self._magnitude(delta),))
        return delta, scale

    def _plain(self, roles: Mapping[str, NDArray[Any]]) -> Term:
        """A pair, LoHa or LoKr as torch holds it; the base may hold the weight the other way round."""
        shape, config = self.shape, self.context.config
        swapped = self.g.format == "peft" and config is not None and bool(config.document.get("fan_in_fan_out"))
        table = "table_down" in self.roles
        if self.g.format == "gguf" and shape is not None and len(shape) == 2 and "down" in roles and "up" in roles:
            a, b = roles["down"], roles["up"]
            if a.ndim == b.ndim == 2 and (a.shape[0], b.shape[0]) == shape and a.shape[1] == b.shape[1] != b.shape[0]:
                return Term.of([(a, "vk"), (b, "dk")], ["v", "d"])
        if swapped or table:
            turned = assemble.term_of(roles, None if shape is None else shape[::-1])
            return turned.with_layout(turned.layout[::-1])
        return assemble.term_of(roles, shape, first_rows=any(f.rows == "first" for f in self.group.roles.values()))

    def _stacked(self, roles: Mapping[str, NDArray[Any]]) -> bool:
        """Whether the first axis of both factors numbers matrices; a convolution's rank stands elsewhere."""
        if not all(r in roles and roles[r].ndim == 3 for r in ("down", "up")):
            return False
        return self.g.transposed or (
            len(roles["down"]) == len(roles["up"]) and roles["down"].shape[1] == roles["up"].shape[2]
        )

    def _stack(self, roles: Mapping[str, NDArray[Any]]) -> Term:
        """MLX's and llama.cpp's stacks of matrices: (number, rank, in) and (number, out, rank)."""
        down, up = roles["down"], roles["up"]
        if len(down) != len(up) or down.shape[1] != up.shape[2]:
            raise Refused(f"factors of {list(down.shape)} and {list(up.shape)} do not fit each other")
        term = Term.of([(up, "eok"), (down, "eki")], ["e", "o", "i"])
        if self.shape not in (None, term.shape):
            raise Refused(f"factors for {list(term.shape)} do not fit a tensor of {list(self.shape or ())}")
        return term

    def _transposed(self, roles: Mapping[str, NDArray[Any]]) -> tuple[Term, int]:
        """MLX and JAX: (in, rank) and (rank, out)."""
        if not {"down", "up"} <= set(roles):
            raise Refused("the other half of the pair is missing")
        a, b = roles["down"], roles["up"]
        if self.g.format == "openpi":
            shared = self.module.path.endswith(self.g.shared_up)
            return assemble.einsum_pair(a, b, self.shape, shared=shared), a.shape[-1]
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise Refused(f"factors of {list(a.shape)} and {list(b.shape)} do not fit each other")
        return assemble.pair(a.T, b.T, None, self.shape), a.shape[1]

    def _pieces(self, roles: Mapping[str, NDArray[Any]]) -> tuple[Term, int]:
        """A down factor of n ranks for an up factor in n pieces: block-diagonal, its blocks stored alone."""
        pieces = [roles[f"up_piece.{j}"] for j in range(sum(r.startswith("up_piece") for r in roles))
                  if f"up_piece.{j}" in roles]  # fmt: skip
        count = sum(r.startswith("up_piece") for r in roles)
        if "down" not in roles or len(pieces) < count or len({p.shape[1] for p in pieces}) > 1:
            raise Refused("pieces of the up factor are missing or of different ranks")
        rank = pieces[0].shape[1]
        if rank * count != len(roles["down"]):
            raise Refused(f"{count} pieces of rank {rank} do not fit a down factor of {len(roles['down'])} ranks")
        height = sum(len(p) for p in pieces)
        up = np.zeros((height, rank * count), pieces[0].dtype)
        start = 0
        for j, piece in enumerate(pieces):
            up[start : start + len(piece), j * rank : (j + 1) * rank] = piece
            start += len(piece)
        return assemble.pair(roles["down"], up, None, self.shape), rank

    def _experts(self, roles: Mapping[str, NDArray[Any]]) -> tuple[Term, int]:
        """PEFT's pair of a stacked parameter: the expert index is slowest in A and fastest in B."""
        assert self.shape is not None
        count = self.shape[0]
        rank = len(roles["down"]) // count
        a = roles["down"].reshape(count, rank, -1)
        b = roles["up"].reshape(-1, rank, count)
        layout = ["e", "o", "i"] if (b.shape[0], a.shape[2]) == self.shape[1:] else ["e", "i", "o"]
        return Term.of([(b, "oke"), (a, "eki")], layout), rank

    def _magnitude(self, delta: Delta) -> Magnitude:
        rows_only = self.g.format in ("peft", "diffusers", "mlx", "ai-toolkit")
        config = self.context.config
        swapped = self.g.format == "peft" and config is not None and bool(config.document.get("fan_in_fan_out"))
        return assemble.magnitude(self.roles["magnitude"], delta, rows_only=rows_only, transposed=swapped)

    # -- scales

    def _scale(self, rank: int) -> float:
        """The number on the factors, by the format's rule."""
        context, kind = self.context, self.g.scale
        alpha = self._number("alpha")
        if kind == "config":
            assert context.config is not None
            return context.config.scale(self.group.seen, rank)
        if alpha is not None:
            return alpha / rank if alpha and rank else 1.0
        if kind == "alpha_scale":
            return self._assume(self._number("alpha_scale"), "alpha_scale")
        if kind == "header":
            return self._header_scale(rank)
        if kind == "file":
            value = float(context.source.metadata.get("adapter.lora.alpha", 0) or 0)
            return value / rank if value else 1.0
        if kind == "number":
            return self._given(rank)
        if kind == "alpha":
            return self._assume(None, "alpha")
        return 1.0

    def _assume(self, value: float | None, what: str) -> float:
        if value is not None:
            return value
        self.assumed = True
        self.context.notes.append(f"some modules have no {what}: 1 is taken for their scale, as {self.g.format} does")
        return 1.0

    def _number(self, role: str) -> float | None:
        """A scalar that is stored beside the factors."""
        if role not in self.roles:
            return None
        if self.roles[role].size != 1:
            raise Refused(f"{role} is no single number")
        return float(self.roles[role].reshape(-1)[0])

    def _header_scale(self, rank: int) -> float:
        """diffusers: the configuration of the key's component, else 1."""
        table = self.context.source.header_config
        key = self.group.roles["down"].key
        component = key.partition(".")[0]
        words = {k.partition(".")[2]: v for k, v in table.items() if k.partition(".")[0] == component}
        if not words:
            return self._assume(None, "alpha and the header no configuration")
        path = next(stem for stem, _, _ in self.g.taken_apart(key)).removeprefix(component + ".")
        return Config(words, self.context.source.path).scale(path, rank)

    def _given(self, rank: int) -> float:
        """MLX and openpi: one number outside the factors."""
        context = self.context
        if self.module.path.endswith(self.g.unscaled) and self.g.unscaled:
            return 1.0
        if context.scale is not None:
            return context.scale
        for word in ("scale", "alpha"):
            if (text := context.source.metadata.get(word)) is not None:
                try:
                    value = float(text)
                except ValueError as exc:
                    raise InputError(context.source.path, f"{word} in the header is {text!r}, not a number") from exc
                return value if word == "scale" else value / rank
        if context.config is not None:
            inner = context.config.document.get("lora_parameters")
            found = inner.get("scale") if isinstance(inner, Mapping) else None
            if isinstance(found, int | float):
                return float(found)
        return self._assume(None, "scale")

    # -- full differences

    def _full(self, role: str, array: NDArray[Any], scale: float) -> tuple[str, Delta]:
        """A delta that is stored whole, and the tensor that it is of."""
        base = self.context.base
        name = self._bias() if role.endswith("bias") else self._weight()
        if role in ("set", "set_bias"):
            array = array.reshape(base.shape(name) or array.shape) - base.values(name, "a tensor that is stored whole")
        term = assemble.full(array, base.shape(name))
        if role == "up_bias":
            term = Term(term.parts, term.layout, term.sizes, scale)
        return name, Delta(shape=term.shape, terms=(term,), whole=role in ("set", "set_bias"))
