"""Words of tensor names: stems, roles, numbers. A tie-breaker between tensors that values cannot tell apart."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache

__all__ = [
    "Roles",
    "ancestors",
    "families",
    "leaf",
    "load_order",
    "load_roles",
    "numbers",
    "skeleton",
    "stem",
    "tokens",
]

_CUT = re.compile(r"[./_]")
_SEPARATOR = re.compile(r"[./_\s\[\]'-]+")


def stem(name: str) -> str:
    """The name without its last word: what a weight and its bias share.

    Examples
    --------
    >>> stem("layers.0.attn.in_proj_bias"), stem("mlp/wi_0/kernel")
    ('layers.0.attn.in_proj', 'mlp/wi_0')
    """
    cut = max(name.rfind(c) for c in "./_")
    return name[:cut] if cut > 0 else ""


def leaf(name: str) -> str:
    """The last word of a name."""
    cut = max(name.rfind(c) for c in "./_")
    return name[cut + 1 :]


def ancestors(name: str) -> list[str]:
    """All stems of a name, the nearest first, the empty one last."""
    cuts = [hit.start() for hit in _CUT.finditer(name)]
    return [*(name[:cut] for cut in reversed(cuts) if cut), *([""] if name else [])]


@lru_cache(1 << 16)
def tokens(name: str) -> tuple[str, ...]:
    """Words of a name, lower case, numbers left out."""
    return tuple(t for t in _SEPARATOR.split(name.lower()) if t and not t.isdigit())


@lru_cache(1 << 16)
def _words(name: str) -> frozenset[str]:
    """Tokens, path components, and neighbouring tokens joined: what a table of roles may list."""
    parts = [p for p in re.split(r"[./\s-]+", name.lower()) if p and not p.isdigit()]
    stripped = [re.sub(r"_?\d+$", "", p) for p in parts]
    return frozenset(parts) | frozenset(stripped) | frozenset(tokens(name))


#: roles that many tensors of a layer share
_VAGUE = frozenset({"attention", "cross", "final", "post", "pre", "weight"})


class Roles:
    """Roles by word, from `mappings/names`."""

    def __init__(self, table: dict[str, list[str]]) -> None:
        self.by_word: dict[str, set[str]] = defaultdict(set)
        for role, words in table.items():
            for word in words:
                self.by_word[word].add(role)

    def of(self, name: str) -> frozenset[str]:
        """Roles that words of a name may have."""
        return frozenset(r for w in _words(name) for r in self.by_word.get(w, ()))

    def clash(self, a: str, b: str) -> bool:
        """Whether both names say what they are, and say different things."""
        mine, theirs = self.of(a) - _VAGUE, self.of(b) - _VAGUE
        return bool(mine) and bool(theirs) and not mine & theirs

    def likeness(self, a: str, b: str) -> float:
        """0 to 1: shared roles and shared words of two names."""
        if a == b:
            return 1.0
        roles_a, roles_b = self.of(a), self.of(b)
        words_a, words_b = set(tokens(a)), set(tokens(b))
        role = len(roles_a & roles_b) / max(1, len(roles_a | roles_b))
        word = len(words_a & words_b) / max(1, len(words_a | words_b))
        return 0.65 * role + 0.35 * word


def numbers(name: str) -> tuple[int, ...]:
    """Integers that are words of a name."""
    return tuple(int(t) for t in _SEPARATOR.split(name) if t.isdigit())


_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


def skeleton(name: str) -> str:
    """The name with every number that is a word of its own blotted out.

    Examples
    --------
    >>> skeleton("layers.10.w1")
    'layers.#.w1'
    """
    return _NUMBER.sub("#", name)


def families(names: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Up to three representatives of every family of names that differ in numbers only, and the family of each."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[skeleton(name)].append(name)
    first, family = [], {}
    for members in groups.values():
        for name in dict.fromkeys((members[0], members[len(members) // 2], members[-1])):
            first.append(name)
            family[name] = members
    return first, family


@lru_cache(1)
def load_roles() -> Roles:
    """The roles that ship in `mappings/names`."""
    import yaml

    from lineage.data import mapping_file

    return Roles(yaml.safe_load(mapping_file("names/roles.yaml").read_text(encoding="utf-8")))


def load_order() -> list[str]:
    """Roles in the order in which fused tensors hold them."""
    import yaml

    from lineage.data import mapping_file

    return list(yaml.safe_load(mapping_file("names/order.yaml").read_text(encoding="utf-8")))
