"""Stored layouts tried on two checkpoints: certified by values, or read off names and shapes alone.

Nothing here may make a result worse: a stored layout only proposes. What the values do not show is left to the
search, and a layout that most of the values contradict is not used at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.layout.induce import Match, induce
from lineage.layout.mapping import Mapping as Document
from lineage.layout.mapping import Side, settled
from lineage.match.certify import LEAST_COSINE, Certified, certify, compare, flat
from lineage.match.pairs import Fit, Pair, fitting, pairs, prefixes
from lineage.match.resolve import Laid, Layout, Open, first, turned
from lineage.match.values import Values

__all__ = ["HeaderMap", "Stored", "by_names", "map_headers", "stored"]

#: matrices compared before a layout is certified as a whole; of two strangers' matrices none is ever certified, of a
#: copy's all are, also through noise as large as the weights themselves (tests/match/test_stored.py)
PROBED = 8
#: share of the elements whose values tell that must be certified, or the layout is not used; and share of B that a
#: layout must speak of where values tell nothing
LEAST_SHARE = 0.5
#: elements from which on a tensor tells strangers from copies
TELLING = 1 << 10
#: share of the median cosine that a match must show which is not exact: a tensor far below the others may hold the same
#: rows elsewhere (a part of its units permuted), which the search by rows tells and a whole comparison does not
EVEN = 0.9
#: by how much the correlation of the right head width must exceed the next best: wrong widths put most rows elsewhere
CLEAR = 0.1


class Stored(NamedTuple):
    """What a stored layout gives where values certify it.

    Attributes
    ----------
    name : of the layout
    certified : matches that hold; those whose values say nothing, as one side is constant, are marked `name`
    """

    name: str
    certified: list[Certified]


class HeaderMap(NamedTuple):
    """A map from names and shapes alone.

    Attributes
    ----------
    mapping : nothing in it is certified
    open : sizes that shapes do not tell; whatever needs them is left out
    sizes : all that the fitting layouts name
    """

    mapping: Document
    open: tuple[str, ...]
    sizes: tuple[str, ...]


class _Offer(NamedTuple):
    """A fitting layout over two checkpoints."""

    fit: Fit
    layout: Layout

    def matches(self, laid: Laid) -> list[Match]:
        """What is laid, from A to B under the names that the two have."""
        return first(named for match in laid.matches if (named := self.named(match)) is not None)

    def named(self, match: Match) -> Match | None:
        """One match, from A to B."""
        fronts = self.fit.prefixes[::-1] if self.fit.inverse else self.fit.prefixes
        full = msgspec.structs.replace(
            match, sources=_prefixed(match.sources, fronts[0]), targets=_prefixed(match.targets, fronts[1])
        )
        return turned(full) if self.fit.inverse else full


def _prefixed(entries: Sequence[str | tuple[str, ...]], front: str) -> tuple[str | tuple[str, ...], ...]:
    """The names with what stands before them in the checkpoint."""
    return tuple(front + e if isinstance(e, str) else tuple(front + n for n in e) for e in entries)


def _offers(a: Checkpoint, b: Checkpoint, known: Sequence[Pair]) -> Iterator[_Offer]:
    """Every layout whose lead stands in both checkpoints."""
    fronts = [prefixes(side.specs) for side in (a, b)]
    for fit in fitting(a.specs, b.specs, fronts, known):
        shapes = [
            {s.name.removeprefix(front): s.shape for s in side if s.name.startswith(front)}
            for side, front in zip((a, b), fit.prefixes, strict=True)
        ]
        source, target = shapes[::-1] if fit.inverse else shapes
        yield _Offer(fit, Layout(fit.pair.mapping().rules, source, target))


def stored(a: Values, b: Values, *, threads: int, known: Sequence[Pair] | None = None) -> Stored | None:
    """The stored layout that values certify, None where no layout fits or values contradict all that do.

    Parameters
    ----------
    known : the layouts to try; None: those of this installation

    Notes
    -----
    Of several that hold, the one that certifies most elements; of equals, what all of them say.
    """
    found: list[tuple[int, Stored]] = []
    for offer in _offers(a.checkpoint, b.checkpoint, pairs() if known is None else known):
        laid = offer.layout.laid(_told_by_values(offer, a, b))
        kept = _kept(offer.matches(laid), a, b, threads=threads)
        if kept:
            weight = sum(_elements(c.match, b.checkpoint) for c in kept if c.match.certified)
            found.append((weight, Stored(offer.fit.pair.name, kept)))
    most = max((weight for weight, _ in found), default=0)
    best = [one for weight, one in found if weight == most]
    if len(best) < 2:
        return best[0] if best else None
    agreed = _agreed([[c.match for c in one.certified] for one in best])
    return Stored(best[0].name, [c for c in best[0].certified if _said(c.match) in agreed])


def _kept(matches: Sequence[Match], a: Values, b: Values, *, threads: int) -> list[Certified]:
    """The matches that hold, [] where the values contradict the layout as a whole."""
    claims = [msgspec.structs.replace(match, how="values") for match in matches]
    telling = [m for m in claims if _elements(m, b.checkpoint) >= TELLING] or claims
    probes = telling[:: max(1, len(telling) // PROBED)][:PROBED]
    shown = certify(a, b, probes, threads=threads)
    if 2 * sum(c.holds and c.match.certified for c in shown) < len(shown):
        return []
    tried = dict(zip(map(_said, probes), shown, strict=True))
    rest = [m for m in claims if _said(m) not in tried]
    tried.update(zip(map(_said, rest), certify(a, b, rest, threads=threads), strict=True))
    every = [tried[_said(m)] for m in claims]
    proved = _even([c for c in every if c.holds and c.match.certified])
    silent = [c for c in every if c.holds and not c.match.certified and c.match.how == "structure"]
    proof, silence = (sum(_elements(c.match, b.checkpoint) for c in some) for some in (proved, silent))
    if proof < LEAST_SHARE * (sum(_elements(m, b.checkpoint) for m in claims) - silence):
        return []
    return [*proved, *(Certified(msgspec.structs.replace(c.match, how="name"), True) for c in silent)]


def _even(proved: Sequence[Certified]) -> list[Certified]:
    """The matches that agree about as well as the model does as a whole."""
    cosines = sorted(abs(c.match.cosine) for c in proved if c.match.cosine is not None)
    least = EVEN * cosines[len(cosines) // 2] if cosines else 0.0
    return [c for c in proved if c.match.cosine is None or abs(c.match.cosine) >= least]


def _told_by_values(offer: _Offer, a: Values, b: Values) -> dict[str, int]:
    """Sizes that shapes leave open, each taken where one value alone lays A's weights out as B has them."""
    told: dict[str, int] = {}
    hopeless: set[str] = set()
    while True:
        left = [one for one in offer.layout.laid(told).open if not hopeless.issuperset(one.names)]
        counts = Counter(n for one in left for n in one.names if n not in hopeless)
        if not counts:
            return told
        name = min(counts, key=lambda n: (-counts[n], n))
        length = _length(offer, name, [one for one in left if name in one.names], told, a, b)
        if length is None:
            hopeless.add(name)
        else:
            told[name] = length


def _length(
    offer: _Offer, name: str, asking: Sequence[Open], told: Mapping[str, int], a: Values, b: Values
) -> int | None:
    """The length of `name` that the values single out, None where none stands out."""
    shapes = a.checkpoint.specs
    front = offer.fit.prefixes[0]

    def size(one: Open) -> int:
        side = one.place.targets if offer.fit.inverse else one.place.sources
        return sum(shapes[front + n].size for n in side if isinstance(n, str))

    enough = [one for one in asking if size(one) >= TELLING] or list(asking)
    one = min(enough, key=size)
    scores: list[tuple[float, int]] = []
    for length in (n for n in range(1, one.product + 1) if one.product % n == 0):
        match = offer.layout.at(one.place, {**told, name: length})
        named = None if match is None else offer.named(match)
        sums = None if named is None else compare(a.checkpoint, b.checkpoint, named)
        if sums is not None:
            scores.append((1.0 if sums.equal else sums.pearson() or 0.0, length))
    scores.sort(reverse=True)
    second = scores[1][0] if len(scores) > 1 else 0.0
    return scores[0][1] if scores and scores[0][0] >= LEAST_COSINE and scores[0][0] - second >= CLEAR else None


def map_headers(
    a: Checkpoint,
    b: Checkpoint,
    *,
    sizes: Mapping[str, int],
    known: Sequence[Pair] | None = None,
) -> HeaderMap | None:
    """The map that a stored layout gives from names and shapes, without any values; None where none fits as a whole.

    Parameters
    ----------
    sizes : lengths of axes that shapes do not tell
    known : the layouts to try; None: those of this installation

    Notes
    -----
    Of several that fit, the one that speaks of most tensors; of equals, only what all of them say.
    """
    known = pairs() if known is None else known
    whole = _whole(a, b, sizes, known)
    if whole is None:
        return None
    names, kept, asked = whole
    named = set().union(*(offer.layout.names() for offer in _offers(a, b, known)))
    rules, lengths = settled(induce(kept, list(a.specs), list(b.specs)))
    targets = {n for m in kept for n in flat(m.targets)}
    sources = {n for m in kept for n in flat(m.sources)}
    mapping = Document(
        source=Side(a.path, len(a)),
        target=Side(b.path, len(b)),
        sizes=lengths,
        rules=rules,
        unmatched_source=tuple(n for n in a.specs if n not in sources),
        unmatched_target=tuple(n for n in b.specs if n not in targets),
        pair=names,
    )
    return HeaderMap(mapping, tuple(sorted(asked)), tuple(sorted(named)))


def by_names(a: Checkpoint, b: Checkpoint, *, known: Sequence[Pair] | None = None) -> tuple[str, list[Match]] | None:
    """What a stored layout says of two models that share no values: its name and its matches, marked `name`.

    None where no layout fits as a whole, or only layouts that speak of less than half of B.

    Parameters
    ----------
    known : the layouts to try; None: those of this installation
    """
    whole = _whole(a, b, {}, pairs() if known is None else known)
    if whole is None or sum(_elements(m, b) for m in whole[1]) < LEAST_SHARE * b.parameters:
        return None
    return whole[0][0], [msgspec.structs.replace(match, how="name") for match in whole[1]]


def _whole(
    a: Checkpoint, b: Checkpoint, sizes: Mapping[str, int], known: Sequence[Pair]
) -> tuple[tuple[str, ...], list[Match], set[str]] | None:
    """Layouts that fit as a whole by names and shapes, what all of them say, and the sizes that shapes do not tell.

    Of several that fit, those that speak of most tensors.
    """
    found: list[tuple[int, str, list[Match], set[str]]] = []
    for offer in _offers(a, b, known):
        laid = offer.layout.laid(sizes)
        matches = offer.matches(laid)
        asked = {n for one in laid.open for n in one.names}
        if laid.whole and (matches or asked):
            spoken = sum(len(flat(m.targets)) for m in matches) + len(laid.open)
            found.append((spoken, offer.fit.pair.name, matches, asked))
    most = max((one[0] for one in found), default=0)
    best = [one for one in found if one[0] == most]
    if not best:
        return None
    agreed = _agreed([matches for _, _, matches, _ in best])
    kept = [m for m in best[0][2] if _said(m) in agreed]
    return tuple(one[1] for one in best), kept, set().union(*(one[3] for one in best))


def _said(match: Match) -> tuple[object, ...]:
    """What a match says, without its evidence."""
    return match.targets, match.sources


def _agreed(several: Sequence[Iterable[Match]]) -> set[tuple[object, ...]]:
    """What all say, operations included."""
    full = set.intersection(*({(*_said(m), m.ops) for m in matches} for matches in several))
    return {(targets, sources) for targets, sources, _ in full}


def _elements(match: Match, b: Checkpoint) -> int:
    """Elements of B that a match speaks of."""
    return sum(b.specs[n].size for n in flat(match.targets))
