"""A stored layout held against a pair of weights: alone, both ways, bit by bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from lineage.checkpoint import open_checkpoint
from lineage.filling import apply
from lineage.match.pairs import pairs
from lineage.match.stored import map_headers, stored
from lineage.match.values import Values
from tests.match.models import Tensors, save
from tests.match.test_layouts import differing

#: sizes that shapes do not tell
Sizes = Mapping[str, int]


def prove(
    tmp_path: Path, pair: str, a: Tensors, b: Tensors, *, sizes: Sizes | None = None, silent: Collection[str] = ()
) -> None:
    """The stored layout says of every tensor of both what the two files hold.

    Names and shapes give the mapping, without any search; it is applied forwards and backwards. The same layout is
    certified by the values in both directions, without being told a size; lone numbers are `silent`.
    """
    known = [one for one in pairs() if one.name == pair]
    one, two = save(tmp_path / "a.safetensors", a), save(tmp_path / "b.safetensors", b)
    found = map_headers(open_checkpoint(one), open_checkpoint(two), sizes=sizes or {}, known=known)
    assert found is not None
    assert (found.open, found.mapping.unmatched_source, found.mapping.unmatched_target) == ((), (), ())
    apply(found.mapping, open_checkpoint(one), str(tmp_path / "forth.safetensors"))
    apply(found.mapping, open_checkpoint(two), str(tmp_path / "back.safetensors"), inverse=True)
    assert differing(tmp_path / "forth.safetensors", b) == []
    assert differing(tmp_path / "back.safetensors", a) == []
    for x, y in ((one, two), (two, one)):
        source, target = open_checkpoint(x), open_checkpoint(y)
        told = stored(Values(source), Values(target), threads=1)
        assert told is not None
        assert told.name == pair
        shown = [c.match for c in told.certified if not set(c.match.targets) <= set(silent)]
        assert all(match.certified and match.cosine == 1.0 for match in shown)
        given = {n for c in told.certified for e in c.match.targets for n in ((e,) if isinstance(e, str) else e)}
        assert given == set(target.specs)
