"""The order of the steps that find a mapping: exact before near, values before structure, certified at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec
import numpy as np

from lineage.checkpoint import Checkpoint
from lineage.layout.induce import Match, induce
from lineage.layout.mapping import How, Mapping, Side, settled
from lineage.layout.operations import Operation
from lineage.match.anew import Anew
from lineage.match.certify import Certified, certify
from lineage.match.chains import Names, reordered
from lineage.match.fuse import components
from lineage.match.fuse import matches as explained
from lineage.match.joined import joined
from lineage.match.rows import Provenance, exact_rows, near_rows
from lineage.match.siblings import siblings
from lineage.match.stacked import stacked
from lineage.match.stored import by_names, stored
from lineage.match.structure import LEAST_SCORE, Links, Structure
from lineage.match.values import PLACES, Values, coarsest
from lineage.match.whole import Whole, exact, near
from lineage.match.words import Roles, load_roles, skeleton

__all__ = ["Finder", "find_mapping"]

#: correlation from which on two tensors are taken for one without looking at their rows first
UNDOUBTED = 0.95
#: share of the usual cosine that a tensor must show which agrees in some rows only
MOSTLY = 0.75
#: likeness of two names from which on a constant of a layer is taken for that of its copy
LIKE = 0.6
#: share of the families of each side (names that differ in numbers only) that guesses must cover to be a map at all:
#: the least of the retrained pairs of 70 public layouts shows 0.46, an encoder beside a state-space model of one width
#: 0.3 (both counted by hand)
MOST_FAMILIES = 0.4

Progress = Callable[[str], None]
_Kind = tuple[str, str, tuple[int, ...], tuple[int, ...]]


def find_mapping(
    a: Checkpoint, b: Checkpoint, *, seed: int = 0, threads: int = 2, progress: Progress | None = None
) -> Mapping:
    """How the tensors of B are laid out in A, found from shapes and values.

    Parameters
    ----------
    a, b : the claimed ancestor and the suspect
    seed : of the sampled places and of the shuffles that break ties
    threads : readers that certify at the same time
    progress : called with the name of each step

    Returns
    -------
    a mapping whose rules carry their evidence; what corresponds to nothing is listed in it, never forced
    """
    finder = Finder(a, b, seed=seed, threads=threads, progress=progress or (lambda step: None))
    finder.run()
    return finder.mapping()


class Finder:
    """State of one search: what is matched, what is left.

    Parameters
    ----------
    places : values of a tensor behind a guess from structure
    """

    def __init__(
        self, a: Checkpoint, b: Checkpoint, *, seed: int, threads: int, progress: Progress, places: int = PLACES
    ) -> None:
        self.a, self.b = Values(a, places=places), Values(b, places=places)
        self.seed, self.threads, self.progress = seed, threads, progress
        self.level = coarsest(a, b)
        self.names = Names()
        self.links = Links()
        self.turn: bool | None = None
        self.roles: Roles = load_roles()
        self.found: dict[str, Match] = {}
        self.told: dict[str, Provenance] = {}
        #: targets that equal rows tell in part only: the rest may be new, or parts that were trained further
        self.rests: list[Match] = []
        self.extra: list[Match] = []
        self.used_a: set[str] = set()
        self.certified: list[Certified] = []
        self.pair: str | None = None

    # -- what is left

    def left_a(self) -> list[str]:
        """A's tensors that no match uses yet."""
        return [s.name for s in self.a.checkpoint if s.name not in self.used_a and s.size]

    def left_b(self) -> list[str]:
        """B's tensors without a match."""
        return [s.name for s in self.b.checkpoint if s.name not in self.found and s.size]

    def keep(self, match: Match) -> None:
        """Takes a match in, unless one of its targets has one already."""
        targets, sources = _flat(match.targets), _flat(match.sources)
        if any(t in self.found for t in targets):
            return
        for target in targets:
            self.found[target] = match
        self.used_a.update(sources)
        for target in targets:
            for source in sources:
                self.links.add(source, target)

    # -- the steps

    def run(self) -> None:
        """All steps, each on what the ones before left over."""
        self.stored()
        self.progress("whole tensors")
        self.wholes(exact(self.a, self.b, self.everything(self.a), self.left_b(), level=self.level, seed=self.seed))
        alike = near(self.a, self.b, self.everything(self.a), self.left_b(), seed=self.seed)
        self.wholes([w for w in alike if w.even and w.cosine >= UNDOUBTED])
        self.by_rows(alike)
        self.by_place()
        self.progress("certifying")
        sure = {c.match for c in self.certified}
        rest = [match for match in self.matches() if match not in sure]
        self.certified += certify(self.a, self.b, [*rest, *self.extra], threads=self.threads)

    def stored(self) -> None:
        """Takes in what a stored layout says and values certify; the rest is found as ever."""
        self.progress("stored layouts")
        found = stored(self.a, self.b, threads=self.threads)
        if found is not None:
            self.pair, self.certified = found.name, found.certified
            for one in found.certified:
                self.keep(one.match)

    def by_rows(self, alike: Sequence[Whole] = ()) -> None:
        """Fusions, splits and permutations: by equal rows first, then by near ones.

        Parameters
        ----------
        alike : whole tensors that nearly correspond, taken in where no equal rows were found
        """
        self.progress("rows")
        self.rows(
            exact_rows(
                self.a, self.b, self.left_a(), self.left_b(), level=self.level, seed=self.seed, threads=self.threads
            ),
            exactly=True,
        )
        if self.left_b():
            self.progress("near copies")
            self.wholes([w for w in alike if w.even and w.b not in self.found])
            self._near(matrices=True)
            for match in self.rests:
                self.keep(match)
            self.siblings()  # before vectors are compared by themselves: the way of their matrix says more
            self._near(matrices=False)
            expected = self._expected()
            self.wholes([w for w in alike if w.b not in self.found and w.cosine >= MOSTLY * expected])

    def by_place(self) -> None:
        """What the matches so far, and structure, say of the rest."""
        self.progress("biases and gains")
        self.siblings()
        self.progress("structure")
        before = len(self.found)
        expected = self._expected()
        if not expected:
            self.by_names()
            self.anew()
        self._stacks(expected)
        if not expected:
            self.anew()
        self.structure()
        for match in joined(self.a, self.b, self.left_a(), self.left_b(), self.links, self.roles, expected=expected):
            self.keep(match)
        if len(self.found) > before:
            self.siblings()
        if not expected:
            self._unpadded()
        self.ties()

    def _near(self, *, matrices: bool) -> None:
        """Takes in what rows nearly tell of the matrices, or of the vectors, that are left."""
        left = [n for n in self.left_b() if (len(self.b.shape(n)) > 1) is matrices]
        spare = self._spare() if left else []
        found = near_rows(self.a, self.b, [*self.left_a(), *spare], left, seed=self.seed, threads=self.threads)
        shared = {name for p in found for name, _ in p.sources}.intersection(spare)
        # parts that were found before tell where the whole goes, and what stands beside it
        beside = [p for p in self.told.values() if shared.intersection(name for name, _ in p.sources)]
        self.rows([*found, *beside], exactly=False)

    def _spare(self) -> list[str]:
        """A's tensors that matches use in part: what lies beside that part may have been trained further."""
        taken: dict[str, float] = {}
        for match in self.matches():
            sources = _flat(match.sources)
            share = sum(self.b.size(t) for t in _flat(match.targets)) / len(sources)
            for source in sources:
                taken[source] = taken.get(source, 0.0) + share
        return [s for s in self.everything(self.a) if s in self.used_a and taken.get(s, 0.0) < self.a.size(s)]

    def siblings(self) -> None:
        """Takes in biases and gains that go the way of the matrix beside them."""
        for match in siblings(self.a, self.b, list(self.matches()), self.left_a(), self.left_b(), self.names):
            self.keep(match)

    def _stacks(self, expected: float) -> None:
        left = (self.left_a(), self.left_b(), self.links, self.roles, self.names)
        for match in stacked(self.a, self.b, *left, expected=expected, seed=self.seed, turn=bool(self.turn)):
            self.keep(match)

    def _expected(self) -> float:
        """The cosine that values show where they tell, 0 where they tell for less than a third of B."""
        valued = [(t, m.cosine) for t, m in self.found.items() if m.how == "values"]
        share = sum(self.b.size(t) for t, _ in valued) / max(1, self.b.checkpoint.parameters)
        return float(np.median([1.0 if c is None else c for _, c in valued])) if share > 1 / 3 else 0.0

    def everything(self, values: Values) -> list[str]:
        """All tensors of one side that hold anything."""
        return [s.name for s in values.checkpoint if s.size]

    def matches(self) -> Iterable[Match]:
        """What was taken in, each match once."""
        return dict.fromkeys(self.found.values())

    def wholes(self, found: Sequence[Whole]) -> None:
        """Takes whole tensors in: the undoubted ones first, then ties by closeness and names."""
        for whole in found:
            if not whole.ties:
                self._whole(whole, whole.a)
        for whole in found:
            if whole.ties:
                options = (whole.a, *whole.ties)
                self._whole(whole, max(options, key=lambda n: self._fit(n, whole.b)))

    def _fit(self, a: str, b: str) -> tuple[float, bool, float]:
        return (round(self.links.closeness(a, b), 3), a not in self.used_a, self.roles.likeness(a, b))

    def _whole(self, whole: Whole, a: str) -> None:
        shape, target = self.a.checkpoint.specs[a].shape, self.b.checkpoint.specs[whole.b].shape
        order = whole.order if len(whole.order) == len(self.a.shape(a)) else tuple(range(len(self.a.shape(a))))
        ops = reordered(shape, order, target, self.names)
        self.keep(
            Match(targets=(whole.b,), sources=(a,), ops=ops, how="values", cosine=whole.cosine, margin=whole.margin)
        )

    def rows(self, found: Sequence[Provenance], *, exactly: bool) -> None:
        """Takes fusions, splits and permutations in."""
        for component in components(found, self.a, exact=exactly):
            for match in explained(component, self.a, self.b, self.names, exact=exactly):
                if exactly and any(op.partial for op in match.ops):
                    self.rests.append(match)
                else:
                    self._widen(match)
        spare = set(self._spare())  # of all others nothing more will be asked, and rows are many
        self.told |= {p.name: p for p in found if p.name in self.found and any(n in spare for n, _ in p.sources)}

    def _widen(self, match: Match) -> None:
        """Takes a match in, in place of those of single parts of it where it tells of more."""
        targets = set(_flat(match.targets))
        before = {t: self.found[t] for t in targets if t in self.found}
        if len(before) < len(targets) and all(targets.issuperset(_flat(m.targets)) for m in before.values()):
            for target in before:
                del self.found[target]
        self.keep(match)

    def by_names(self) -> None:
        """Takes in what a stored layout says of models that share no values, where nothing else was found."""
        found = by_names(self.a.checkpoint, self.b.checkpoint)
        if found is None:
            return
        self.pair = self.pair or found[0]
        for match in found[1]:
            if self.used_a.isdisjoint(_flat(match.sources)):
                self.keep(match)

    def anew(self) -> None:
        """Takes in families of tensors that correspond though their values do not."""
        pairs = [(s, t, m.how) for m in self.matches() for s in _flat(m.sources) for t in _flat(m.targets)]
        links, guessed = Links((s, t) for s, t, _ in pairs), [(s, t) for s, t, how in pairs if how != "values"]
        anew = Anew(self.a, self.b, links, self.roles, guessed=guessed, turn=self.turn, seed=self.seed)
        found = anew.pairs(self.left_a(), self.left_b())
        self.turn = anew.turn
        for pair in found:
            shape, target = self.a.checkpoint.specs[pair.a].shape, self.b.checkpoint.specs[pair.b].shape
            ops = reordered(shape, pair.order, target, self.names)
            how: How = "name" if pair.a == pair.b else "structure"
            self.keep(Match(targets=(pair.b,), sources=(pair.a,), ops=ops, how=how))

    def _unpadded(self) -> None:
        """Gives up guesses under other names where most families of a side have none: a few shapes that two
        architectures share are no map. What stands beside tensors that values told (constants of a copy) stays."""
        guessed = [m for m in self.matches() if m.how != "values"]
        valued = {n for m in self.matches() if m.how == "values" for n in (*_flat(m.sources), *_flat(m.targets))}
        shares = []
        for values, sides in ((self.a, [m.sources for m in guessed]), (self.b, [m.targets for m in guessed])):
            every = {skeleton(n) for n in self.everything(values) if n not in valued}
            shares.append(len({skeleton(n) for side in sides for n in _flat(side)}) / max(1, len(every)))
        if min(shares) >= MOST_FAMILIES:
            return
        told = [m for m in self.matches() if m.how == "values"]
        beside = Links((s, t) for m in told for s in _flat(m.sources) for t in _flat(m.targets))
        for match in guessed:
            pairs = [(s, t) for s in _flat(match.sources) for t in _flat(match.targets)]
            if match.how != "name" and max(beside.closeness(s, t) for s, t in pairs) < LEAST_SCORE:
                for target in _flat(match.targets):
                    del self.found[target]
        self.used_a = {s for m in self.matches() for s in _flat(m.sources)}

    def structure(self) -> None:
        """Takes in what only structure tells."""
        expected = self._expected()
        structure = Structure(self.a, self.b, self.links, self.roles, expected=expected, seed=self.seed)
        guesses = structure.matches(self.left_a(), self.left_b(), self.names)
        chains = self._chains() if guesses else {}
        for match in guesses:
            self.keep(self._like_others(match, chains))
        left = self.left_b()
        while expected and left:
            # what B holds twice (doubled layers): only where values say so
            found = structure.matches(self.everything(self.a), left, self.names)
            for match in found:
                if match.how == "values" or self._one_layer(match):
                    self.keep(match)
            left, before = self.left_b(), left
            if len(left) == len(before):
                break

    def _chains(self) -> dict[_Kind, list[tuple[Operation, ...]]]:
        """How the tensors of each kind that are matched one to one are laid out."""
        found: dict[_Kind, list[tuple[Operation, ...]]] = {}
        for match in self.matches():
            kind = self._kind(match)
            if kind is not None and match.ops not in (chains := found.setdefault(kind, [])):
                chains.append(match.ops)
        return found

    def _kind(self, match: Match) -> _Kind | None:
        """What a match of one tensor with one says but for the numbers in names; None for any other."""
        x, y = _flat(match.sources), _flat(match.targets)
        if len(x) > 1 or len(y) > 1:
            return None
        return skeleton(x[0]), skeleton(y[0]), self.a.checkpoint.specs[x[0]].shape, self.b.checkpoint.specs[y[0]].shape

    def _like_others(self, match: Match, known: dict[_Kind, list[tuple[Operation, ...]]]) -> Match:
        """A guess laid out as its kind is in other layers, where those agree: an order of rows that values told there
        is not the one that equal shapes suggest."""
        kind = self._kind(match)
        chains = known.get(kind, []) if match.how != "values" and kind is not None else []
        return msgspec.structs.replace(match, ops=chains[0]) if len(chains) == 1 else match

    def _one_layer(self, match: Match) -> bool:
        """Whether two tensors that values say nothing of stand in one layer, under like names."""
        x, y = match.sources[0], match.targets[0]
        return self.links.one_layer(x, y) is True and self.roles.likeness(x, y) >= LIKE

    def ties(self) -> None:
        """A's tensors that equal a matched one (tied weights stored twice) get a rule of their own for the way back."""
        left = self.left_a()
        if not left:
            return
        matched = [s for m in self.matches() if len(m.sources) == len(m.targets) == 1 for s in _flat(m.sources)]
        by_source = {m.sources[0]: m for m in self.matches() if len(m.sources) == len(m.targets) == 1}
        for whole in exact(self.a, self.a, matched, left, level="F32", seed=self.seed):
            twin = by_source[whole.a]
            if self.a.checkpoint.specs[whole.a].shape == self.a.checkpoint.specs[whole.b].shape:
                self.extra.append(msgspec.structs.replace(twin, sources=(whole.b,)))
                self.used_a.add(whole.b)

    # -- the result

    def mapping(self) -> Mapping:
        """The rules of all certified matches, and what is left over."""
        kept = [c.match for c in self.certified if c.holds]
        targets = {t for m in kept for t in _flat(m.targets)}
        sources = {s for m in kept for s in _flat(m.sources)}
        names_a, names_b = list(self.a.checkpoint.specs), list(self.b.checkpoint.specs)
        rules, sizes = settled(induce(kept, names_a, names_b))
        return Mapping(
            source=Side(name=self.a.checkpoint.path, tensors=len(self.a.checkpoint)),
            target=Side(name=self.b.checkpoint.path, tensors=len(self.b.checkpoint)),
            sizes=sizes,
            rules=rules,
            unmatched_source=tuple(s.name for s in self.a.checkpoint if s.name not in sources),
            unmatched_target=tuple(s.name for s in self.b.checkpoint if s.name not in targets),
            pair=() if self.pair is None else (self.pair,),
        )


def _flat(entries: Sequence[str | tuple[str, ...]]) -> list[str]:
    return [n for e in entries for n in ((e,) if isinstance(e, str) else e)]
