"""The mapping between two layouts from few bytes: whole tensors by sampled places, fusions by strips of their rows.

Of each family of left-over tensors one is looked up: some rows of A's tensors, a strip of columns wide, among all of
its rows. What is found there is carried over to the rest of the family and held against a few rows of each. Nothing
is compared in full, so nothing is called certified; what the limit does not allow stays unmatched.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.metered import Meter, Spent
from lineage.layout.axes import LayoutError
from lineage.layout.chain import Level, apply_chain, leaves, mapped
from lineage.layout.induce import Match
from lineage.layout.mapping import Mapping
from lineage.match.certify import Certified, flat
from lineage.match.chains import OVER
from lineage.match.finder import Finder
from lineage.match.fuse import components, matches
from lineage.match.nearest import highest
from lineage.match.rows import Provenance, Rows, View, probe_rows, provenance
from lineage.match.strips import (
    Frame,
    correlation,
    count_hits,
    in_columns,
    known_share,
    read_strip,
    row_width,
    strip_views,
)
from lineage.match.values import SMALL, Values
from lineage.match.whole import exact, near
from lineage.match.words import numbers, skeleton

__all__ = ["Searched", "search"]

#: places of a tensor that a cosine is taken over: chance gives 0.06, strangers of 10^5 pairs stay below 0.3
PLACES = 256
#: elements between two wanted ones below which one read serves both: bytes are what counts here
GAP = 24
#: rows of a tensor of A that must be found before it is taken for a source
LEAST_HITS = 2
#: tensors of A that are looked up for one of B, the closest by their neighbours first
MOST_PROBED = 256
#: that many of them at first; share of B's rows that they must explain for the others to be left alone
CLOSEST, ENOUGH = 8, 0.9
#: the same where rows stand in columns, which takes many reads
MOST_TURNED = 24
#: pairs of rows that are compared for one tensor (seconds of work)
MOST_PRODUCTS = 1 << 28
#: families that are looked up where nothing at all corresponds so far
STRANGERS = 3
#: rows of every other member of a family that are held against A's
CHECKED = 12
#: times that small tensors may be read by the full search: one for each way of seeing them as rows
LOOKS = 8
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")


class Searched(NamedTuple):
    """What was found, and B's matrices that stayed unmatched because the limit did not allow to look further."""

    mapping: Mapping
    unsettled: tuple[str, ...]


def search(
    a: Checkpoint,
    b: Checkpoint,
    meter: Meter,
    *,
    seed: int = 0,
    threads: int = 2,
    progress: Callable[[str], None] | None = None,
) -> Searched:
    """How the tensors of B are laid out in A, from as many bytes as the meter allows.

    Parameters
    ----------
    a, b : `Metered`, or parts of such
    meter : theirs
    seed, threads, progress : as in `lineage.match.find_mapping`

    Notes
    -----
    Rules rest on sampled places and rows: their evidence is never certified, their cosines are those of the samples.
    """
    found = _Search(a, b, seed=seed, threads=threads, progress=progress or (lambda step: None), places=PLACES)
    found.meter = meter
    found.run()
    return Searched(found.mapping(), found.unsettled())


class _Search(Finder):
    """A search that reads samples only."""

    meter: Meter

    def run(self) -> None:
        """All steps; one that the limit stops keeps what it found before."""
        self.a.gap = self.b.gap = GAP
        self.refused: set[str] = set()
        self.short = False
        self.kept: dict[tuple[bool, str, View], NDArray[np.float32]] = {}
        for step in (self.sampled, self.small, self.strips, self.by_place):
            try:
                step()
            except Spent:
                self.short = True
        self.certified = [Certified(m, True) for m in [*self.matches(), *self.extra]]

    def unsettled(self) -> tuple[str, ...]:
        """B's matrices that nobody could look up."""
        left = self.matrices(self.b, self.left_b())
        return tuple(name for name in left if self.short or name in self.refused)

    def matrices(self, values: Values, names: Iterable[str]) -> list[str]:
        """Tensors of two axes or more."""
        return [n for n in names if len(values.shape(n)) > 1]

    # -- whole tensors, small tensors

    def sampled(self) -> None:
        """Whole tensors by sampled places; equal ones that several of A's tie for by their keys."""
        self.progress("whole tensors")
        names_a = self.everything(self.a)
        self.wholes(near(self.a, self.b, names_a, self.left_b(), seed=self.seed, places=PLACES))
        self.wholes(exact(self.a, self.b, names_a, self.left_b(), level=self.level, seed=self.seed))

    def small(self) -> None:
        """The search of every row, where what is left is small enough for it."""
        left = [(self.a.checkpoint.specs[n], self.a) for n in self.left_a()]
        left += [(self.b.checkpoint.specs[n], self.b) for n in self.left_b()]
        cost = sum(spec.nbytes * (1 if spec.size <= SMALL else LOOKS) for spec, _ in left)
        if cost <= self.meter.left // 2:
            self.progress("rows")
            self.by_rows()

    # -- fusions

    def strips(self) -> None:
        """One of each family by strips of rows, then the rest of the family like it."""
        self.progress("rows")
        found: dict[str, Provenance] = {}
        with self.meter.at_most(self.meter.left // 2):
            for tried, name in enumerate(self._representatives()):
                if tried >= STRANGERS and not found and not self.found:
                    break  # no tensor of B, alone or in parts, shows anything of A
                try:
                    got = self._look_up(name)
                except Spent:
                    self.refused |= {n for n in self.left_b() if skeleton(n) == skeleton(name)}
                    continue
                if got is not None:
                    found[name] = got
        for component in components(list(found.values()), self.a, exact=False) if found else ():
            for match in matches(component, self.a, self.b, self.names, exact=False):
                rows = {name: found[name] for name in flat(match.targets)}
                held = self._borne_out(match, rows)
                if held is not None:
                    self.keep(held)
                    self._carry_over(held, rows)

    def _representatives(self) -> list[str]:
        """The middle one of each left-over family, so that families of one length show the same layer; large first.

        A tensor that has its name and shape in A, with other values, is no fusion.
        """
        grouped: dict[str, list[str]] = defaultdict(list)
        left = set(self.left_a())
        for name in self.matrices(self.b, self.left_b()):
            if name not in left or self.a.shape(name) != self.b.shape(name):
                grouped[skeleton(name)].append(name)
        families = sorted(grouped.values(), key=lambda members: -len(members) * self.b.size(members[0]))
        return [sorted(members, key=numbers)[len(members) // 2] for members in families]

    def _look_up(self, name: str) -> Provenance | None:
        """Which rows of A's left-over tensors the rows of B's tensor are, under the view that shows most."""
        best: Provenance | None = None
        for turned, most in ((False, MOST_PROBED), (True, MOST_TURNED)):
            for view in strip_views(self.b.shape(name)):
                options = [o for o in self._options(name, view) if (in_columns(view) or in_columns(o[1])) is turned]
                for low, high in ((0, CLOSEST), (CLOSEST, most)):
                    got = self._among(name, view, options[low:high])
                    if got is not None and (best is None or known_share(got) > known_share(best)):
                        best = got
                    if best is not None and known_share(best) >= ENOUGH:
                        return best
            if best is not None:
                return best
        return None

    def _among(self, name: str, view: View, options: list[tuple[str, View]]) -> Provenance | None:
        """Which rows of these tensors of A the rows of B's tensor are, None where they are none."""
        if not options:
            return None
        mine = Frame(self._strip(self.b, name, view))
        sources = [o for o in options if count_hits(self.a, *o, mine, self.seed) >= LEAST_HITS]
        return self._rows_of(name, view, mine, sources) if sources else None

    def _strip(self, values: Values, name: str, view: View) -> NDArray[np.float32]:
        """The strip of all rows of a tensor; kept, for it is looked at twice."""
        key = values is self.a, name, view
        if key not in self.kept:
            self.kept[key] = read_strip(values, name, view, self.seed)
        return self.kept[key]

    def _options(self, name: str, view: View) -> list[tuple[str, View]]:
        """A's left-over tensors, under views with rows as wide, the likeliest by their neighbours first."""
        width = row_width(self.b, name, view)
        left = sorted(self.matrices(self.a, self.left_a()), key=lambda n: -self.links.closeness(n, name))
        return [(n, v) for n in left for v in strip_views(self.a.shape(n)) if row_width(self.a, n, v) == width]

    def _rows_of(self, name: str, view: View, mine: Frame, sources: list[tuple[str, View]]) -> Provenance:
        """The row of a source that each row of B's tensor is."""
        parts = [self._strip(self.a, n, v) for n, v in sources]
        heights = [len(p) for p in parts]
        if len(mine.rows) * sum(heights) > MOST_PRODUCTS:
            raise Spent("too many rows to compare")
        where, value = highest(mine.rows, mine.unit(np.concatenate(parts)))
        rows = Rows(sources, np.repeat(np.arange(len(parts)), heights), np.concatenate([np.arange(h) for h in heights]))
        return provenance(name, view, rows, np.where(value > mine.floor(sum(heights)), where, -1))

    def _borne_out(self, match: Match, rows: dict[str, Provenance]) -> Match | None:
        """The match with the correlation that its operations give on strips of all rows; None where they fail."""
        views_a = {n: v for p in rows.values() for n, v in p.sources}

        def narrow(values: Values, name: str, view: View) -> NDArray[np.float32]:
            spec = values.checkpoint.specs[name]
            full = [i for i, n in enumerate(spec.shape) if n != 1]
            if len(view.columns) != 1:
                raise LayoutError("a strip is cut from one axis")
            strip = self._strip(values, name, view)
            shape = [strip.shape[1] if i == full[view.columns[0]] else n for i, n in enumerate(spec.shape)]
            return (strip.T if in_columns(view) else strip).reshape(shape)

        entries = [Level(OVER, list(e)) if isinstance(e, tuple) else e for e in match.sources]
        try:
            given = [mapped(e, lambda name: narrow(self.a, name, views_a[name])) for e in entries]
            made = [x for m in apply_chain(match.ops, given) for x in leaves(m)]
            wanted = [narrow(self.b, name, rows[name].view) for name in flat(match.targets)]
        except (LayoutError, KeyError):
            return None
        if [x.shape for x in made] != [y.shape for y in wanted]:
            return None
        cosine = correlation([x.ravel() for x in made], [y.ravel() for y in wanted])
        return None if cosine is None else msgspec.structs.replace(match, cosine=cosine)

    def _carry_over(self, match: Match, rows: dict[str, Provenance]) -> None:
        """The rest of a family as its representative was found."""
        first_b, first_a = flat(match.targets)[0], flat(match.sources)[0]
        family_a = [n for n in self.a.checkpoint.specs if skeleton(n) == skeleton(first_a)]
        for name in [n for n in self.left_b() if skeleton(n) == skeleton(first_b)]:
            step = _steps(first_b, name)
            near_by = sorted(family_a, key=lambda n: -self.links.closeness(n, name))[:2]
            options = dict.fromkeys([*(_steps(first_a, n) for n in near_by), step])
            for option in options:
                moved = _moved(match, step, option)
                try:
                    cosine = self._alike(match, moved, rows, step, option)
                except Spent:
                    self.refused.add(name)
                    break
                if cosine is not None:
                    self.keep(msgspec.structs.replace(moved, cosine=cosine))
                    break

    def _alike(
        self, match: Match, moved: Match, rows: dict[str, Provenance], step: Steps, option: Steps
    ) -> float | None:
        """Correlation of some rows of the moved match's tensors, None where they speak against it."""
        for values, old, new in ((self.a, match.sources, moved.sources), (self.b, match.targets, moved.targets)):
            specs = values.checkpoint.specs
            if any(
                y not in specs or specs[y].shape != specs[x].shape for x, y in zip(flat(old), flat(new), strict=True)
            ):
                return None
        ones, twos = [], []
        for name, p in rows.items():
            known = np.flatnonzero(p.source >= 0)
            chosen = known[probe_rows(len(known), CHECKED, self.seed)]
            target = read_strip(self.b, _renumbered(name, step), p.view, self.seed, chosen)
            for number, (source, view) in enumerate(p.sources):
                here = p.source[chosen] == number
                if here.any() and source in flat(match.sources):
                    ones.append(
                        read_strip(self.a, _renumbered(source, option), view, self.seed, p.row[chosen[here]]).ravel()
                    )
                    twos.append(target[here].ravel())
        return correlation(ones, twos)


# -- names

Steps = tuple[int, ...]


def _steps(one: str, two: str) -> Steps:
    """By how much the numbers of two names of a family differ."""
    return tuple(int(y) - int(x) for x, y in zip(_NUMBER.findall(one), _NUMBER.findall(two), strict=True))


def _renumbered(name: str, steps: Steps) -> str:
    """The name with its first numbers moved."""
    moves: Iterator[int] = itertools.chain(steps, itertools.repeat(0))
    return _NUMBER.sub(lambda hit: str(int(hit.group()) + next(moves)), name)


def _moved(match: Match, step: Steps, option: Steps) -> Match:
    """The match for other numbers."""

    def renamed(entries: Sequence[Any], steps: Steps) -> tuple[Any, ...]:
        return tuple(_renumbered(e, steps) if isinstance(e, str) else renamed(e, steps) for e in entries)

    return msgspec.structs.replace(match, targets=renamed(match.targets, step), sources=renamed(match.sources, option))
