"""What PEFT keeps in adapter_config.json: ranks, alphas and patterns; and its nested wrappers.

Source: peft 0.21.2 `tuners/lora/layer.py` (scaling, ParamWrapper, MultiheadAttention), `utils/other.py`
get_pattern_key, `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lineage.errors import InputError
from lineage.lora.delta import Refused

__all__ = ["Config", "escaped", "plain_path"]

_WRAPPER = re.compile(r"\.base_layer(?=\.|$)")


class Config:
    """An adapter_config.json.

    Parameters
    ----------
    document : the JSON object
    place : file that errors name
    """

    def __init__(self, document: Mapping[str, Any], place: str) -> None:
        self.document, self.place = document, place
        self.rank = self._number("r", 8)
        self.alpha = self._number("lora_alpha" if "lora_alpha" in document else "alpha", 8)
        self.kind = str(document.get("peft_type") or "LORA").upper()
        self.rslora = bool(document.get("use_rslora"))

    def _number(self, key: str, default: float) -> float:
        value = self.document.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(self.place, f"{key} is {value!r}, not a number", "save the adapter again")
        return float(value)

    def pattern(self, word: str, path: str, default: float) -> float:
        """The value of `rank_pattern` or `alpha_pattern` for a module."""
        table = self.document.get(word) or {}
        if not isinstance(table, Mapping):
            raise InputError(self.place, f"{word} is no object", "save the adapter again")
        for key, value in table.items():
            try:
                hit = re.match(rf"(.*\.)?({key})$", path)
            except re.error as exc:
                raise InputError(self.place, f"{word}: {key!r} is no regular expression") from exc
            if hit:
                return float(value)
        return default

    def scale(self, path: str, rank: int) -> float:
        """The factor on up · down of a module, as PEFT computes it.

        Raises
        ------
        Refused : the factors' rank is not the one that the configuration gives, so that PEFT could not load them
        """
        own = self.pattern("rank_pattern", path, self.rank)
        if rank and own != rank:
            raise Refused(f"its factors have rank {rank}, the configuration says {own:g}")
        alpha = self.pattern("alpha_pattern", path, self.alpha)
        return alpha / math.sqrt(own) if self.rslora and self.kind == "LORA" else alpha / own

    @property
    def saved(self) -> tuple[str, ...]:
        """Modules that are stored whole."""
        return tuple(self.document.get("modules_to_save") or ())

    @property
    def parameters(self) -> tuple[str, ...]:
        """Stacked parameters that the factors belong to."""
        return tuple(self.document.get("target_parameters") or ())


def plain_path(stem: str) -> tuple[str, int, str]:
    """A path without PEFT's wrappers, how many there were, and the path that its patterns see.

    Examples
    --------
    >>> plain_path("attn.base_layer.out_proj")
    ('attn.out_proj', 1, 'attn')
    """
    plain = _WRAPPER.sub("", stem)
    seen = stem.split(".base_layer.")[0] if ".base_layer." in stem else plain
    return plain, len(_WRAPPER.findall(stem)), seen


def escaped(path: str, others: Sequence[str]) -> str:
    """A pattern key that means this module and none of the others."""
    text = path.replace(".", r"\.")
    return f"^{text}" if any(o != path and o.endswith("." + path) for o in others) else text
