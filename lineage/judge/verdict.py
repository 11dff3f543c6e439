"""The verdict: class, p-value, coverage, relations and reasons. Every threshold that accuses or acquits stands here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.filling import Filled
from lineage.judge.axes import FEWEST_UNITS
from lineage.judge.common import common_layout
from lineage.judge.direction import find_direction
from lineage.judge.likeness import Likeness, matched_likeness
from lineage.judge.material import Material, Pair
from lineage.judge.relations import Finding, find_relations
from lineage.judge.relations.shapes import cut
from lineage.judge.significance import AxisTest, Significance, significance
from lineage.layout.mapping import Mapping
from lineage.match.words import load_roles
from lineage.measure.compare import Comparison

__all__ = ["Class", "Verdict", "bound_names", "decide", "judge"]

Class = Literal["copied", "transformed", "retrained", "unrelated", "undetermined"]
RELATED: dict[str, bool | None] = {
    "copied": True, "transformed": True, "retrained": False, "unrelated": False, "undetermined": None,
}  # fmt: skip

#: corrected log10 p below which the pair is related. Calibration (reports/calibration.md): of 2,000 pairs of
#: strangers none came below -4
SIGNIFICANT = -6.0
#: above this nothing speaks for a relation; in between there is too little evidence either way
SUSPICIOUS = -3.0
#: power: the tests must be able to reach this, or their silence says nothing
POWER = -8.0
#: share of B's parameters in matched tensors, and of A's that they use, for a copy; the rest are buffers
COPY_COVERAGE = 0.98
#: share of B's parameters that matches A's structure, from which two networks count as one architecture
SAME_ARCHITECTURE = 0.8
#: or else: relative difference of the numbers of parameters, and share of axis lengths that both have (fused and
#: split tensors differ in a few)
SAME_SIZE, SAME_WIDTHS = 0.005, 0.5
#: share of the matched content that must be equal bit by bit (after a cast) to speak for itself where no axis can
#: be tested, and the elements it must have: 4,096 equal values of more than 64 kinds do not happen by chance
EQUAL_SHARE, EQUAL_ELEMENTS, KINDS = 0.5, 4096, 64
#: ... or else the matrices that must be equal and bear the marks of training, and their share of B's parameters. Marked
#: is a matrix whose greatest singular value passes that of noise of its size by this (eleven untrained networks: 0.91
#: to 1.02; trained: medians of 1.02 to 2.9), so that an initialisation that both kept is no copy
EQUAL_MATRICES, EQUAL_PART, MARKED = 4, 0.05, 1.1
#: cosine of a matrix with A's from which its channels count as inherited, not as learnt from A's features (students
#: of features reach 0.67 in their heads and 0.1 elsewhere; an embedding that was tuned for long stays above 0.97)
INHERITED = 0.95
#: ... or the share of the content that must have this cosine (such students: 0.03; a base trained on for three times
#: its own steps: all of it)
AKIN, AKIN_SHARE = 0.35, 0.3
#: the same where no unit is hidden, so that a teacher may show all of its features (convolutions, recurrent layers,
#: chains of linear ones): students of every layer's features reach 0.97 in the first matrix and 0.45 to 0.7 in half of
#: the others, a base trained on for twice its own steps 0.82 to 0.96
ALL_SHOWN, ALL_SHOWN_SHARE = 0.75, 0.5
#: ... or else, where either side was pruned, the relative difference of the values that both have: of a pruned copy 0,
#: tuned 0.3 at most, of a pruned student of all features 0.55
BOTH_HAVE = 0.35
#: share of the way from mispaired matrices to equality beyond which matched ones agree for another reason than shared
#: statistics. Zoo: strangers below 0, siblings of one initialisation 0.1, relatives that nothing disguises 0.6 to 1
FAR_ABOVE = 0.5
#: units a layer that are compared at least where nobody said how many
ROWS = 64
#: roles of tensors whose axes are bound to an index: heads and rotary planes
BOUND = frozenset({"attention", "cross", "query", "key", "value"})
#: kinds of axes that a student learns from its teacher's features, and that bring no negative control
OPEN = frozenset({"channels", "outputs"})


#: relations that no copy has
NO_COPY = frozenset({
    "permuted", "depth-pruned", "depth-grown", "width-pruned", "width-grown", "vocabulary-extended", "expert-upcycled",
    "layers-reordered", "quantized",
})  # fmt: skip


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What the weights say.

    Attributes
    ----------
    class_ : JSON name `class`: `copied` the same weights, `transformed` derived from A's or from a common ancestor's,
        `retrained` one architecture with independent weights, `unrelated` neither, `undetermined` too little evidence
    related : true for the first two, false for the next two, None for the last
    log10_p : of "trained independently", exact and corrected for everything tried; None where no axis could be tested
    coverage : share of B's parameters in matched tensors
    relations : tags of the contract
    direction : `a-to-b`, `b-to-a`, or None when the weights do not show it
    reasons : sentences, most important first
    findings, tests : what relations and p-value rest on
    """

    class_: Class = msgspec.field(name="class")
    related: bool | None
    log10_p: float | None
    coverage: float
    relations: tuple[str, ...] = ()
    direction: Literal["a-to-b", "b-to-a"] | None = None
    reasons: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    tests: tuple[AxisTest, ...] = ()


def judge(
    a: Checkpoint,
    b: Checkpoint,
    mapping: Mapping,
    comparison: Comparison | None = None,
    *,
    seed: int = 0,
    threads: int = 2,
    rows: int | None = None,
) -> Verdict:
    """Whether B's weights come from A's.

    Parameters
    ----------
    a, b : the claimed ancestor and the suspect
    mapping : from A's layout to B's, as found or given
    comparison : of `Filled(mapping, a)` against `b`; None: figures come from samples
    seed : of the samples and of the shuffles that break ties
    threads : kept for callers that share their settings; one thread is enough here
    rows : units a layer that are compared at most; None: as many as are quick, 64 or more

    Notes
    -----
    Reads samples of rows, never whole files: about 50 MB of two checkpoints of 1 GB.
    """
    common = common_layout(a, b, mapping)
    given = {"rows": ROWS} if rows is None else {"rows": rows, "units": rows}
    tested = significance(common, bound_names(), seed=seed, **given)
    material = Material(a, b, mapping, Filled(mapping, a), common, comparison, tested, seed)
    return decide(material)


def bound_names() -> Callable[[str], bool]:
    """Says of a tensor's name whether its axes are bound to an index."""
    roles = load_roles()
    return lambda name: not BOUND.isdisjoint(roles.of(name))


def decide(
    material: Material,
    *,
    look: Callable[[Material], list[Finding]] = find_relations,
    towards: Callable[[Material, list[Finding]], Literal["a-to-b", "b-to-a"] | None] = find_direction,
    hold: Callable[[Material], Likeness | None] = matched_likeness,
) -> Verdict:
    """The verdict on what was gathered.

    Parameters
    ----------
    look, towards : find relations and direction
    hold : holds matched matrices against mispaired ones, where no exact test speaks
    """
    tested = material.significance
    equal, stands = _equal_by_itself(material), [t for t in tested.tests if t.stands_out and not t.void]
    taught = _taught(material, stands)
    if taught:
        tested = _without_channels(tested)
        read = {k: v for k, v in material.__dict__.items() if k != "_asked"}  # what was read stays read
        material = msgspec.structs.replace(material, significance=tested)
        material.__dict__.update(read)
    p = tested.log10_p
    exact = p is not None and p < SIGNIFICANT
    equal = equal or (not exact and _equal_parts(material))
    alike = None if exact or equal or stands or taught else hold(material)  # what sets the order makes matrices alike
    if alike is not None and not (material.coverage >= EQUAL_SHARE and alike.stands_out(FAR_ABOVE)):
        alike = None
    related = exact or equal or bool(stands) or alike is not None
    findings = look(material) if related else []
    class_ = _class(material, related, findings)
    if related and not exact:
        p = None  # there is no axis for an exact test, or each was reordered: effect sizes and equality decide
    reasons = _reasons(material, class_, findings, exact=exact, equal=equal, stands=stands, alike=alike)
    return Verdict(
        class_=class_, related=RELATED[class_], log10_p=None if p is None else round(p, 4) + 0.0,
        coverage=round(material.coverage, 6), relations=tuple(f.tag for f in findings),
        direction=towards(material, findings) if related else None, reasons=tuple(reasons),
        findings=tuple(findings), tests=tested.tests,
    )  # fmt: skip


def _class(material: Material, related: bool, findings: list[Finding]) -> Class:
    if related:
        return "copied" if _copied(material, findings) else "transformed"
    tested, p = material.significance, material.significance.log10_p
    if p is not None and p < SUSPICIOUS:
        return "undetermined"
    if not _one_architecture(material):
        return "unrelated"
    if p is None or not _powerful(tested):
        return "undetermined"
    return "retrained"


def _one_architecture(material: Material) -> bool:
    """True where most of both sides corresponds, or both have as many parameters in axes of the same lengths."""
    if min(material.covered, material.used) >= SAME_ARCHITECTURE:
        return True
    sizes = material.a.parameters, material.b.parameters
    widths_a, widths_b = ({n for s in c for n in s.shape if n >= FEWEST_UNITS} for c in (material.a, material.b))
    alike = len(widths_a & widths_b) / max(1, len(widths_a | widths_b))
    return abs(sizes[0] - sizes[1]) <= SAME_SIZE * max(sizes) and alike >= SAME_WIDTHS


def _copied(material: Material, findings: list[Finding]) -> bool:
    """True where nothing but names, layout and dtypes differs, and nothing is missing on either side."""
    if any(f.tag in NO_COPY for f in findings) or min(material.covered, material.used) < COPY_COVERAGE:
        return False
    if sum(material.asked(cut).values()) > (1 - COPY_COVERAGE) * material.a.parameters:
        return False
    return bool(material.pairs) and all(pair.equal for pair in material.pairs)


def _taught(material: Material, stands: list[AxisTest]) -> bool:
    """True where channels agree and nothing else does: their order may have come by the outputs.

    A student that is trained on its teacher's features gets the teacher's channels without any of its weights. Channels
    that were inherited come with weights that are A's: units inside the layers, a matrix that is equal or nearly so, or
    a good part of the matrices at least akin. Where no unit is hidden all features may be taught, and the matrices
    between them become alike by themselves: then most must be nearly A's.
    """
    p, hidden = material.significance.log10_p, [t for t in material.significance.valid if t.kind == "hidden"]
    if p is None or p > SUSPICIOUS or stands or any(t.log10_p <= SUSPICIOUS for t in hidden):
        return False
    if hidden and not _powerful(Significance(tuple(hidden), None)):
        return False
    content = material.content
    if any(_inherited(material, p) for p in content if p.equal or (hidden and (p.cosine or 0.0) >= INHERITED)):
        return False
    cosine, share = (AKIN, AKIN_SHARE) if hidden else (ALL_SHOWN, ALL_SHOWN_SHARE)
    akin = sum(p.size for p in content if (p.cosine or 0.0) >= cosine or _left_of_it(material, p))
    return akin < share * sum(p.size for p in content)


def _left_of_it(material: Material, pair: Pair) -> bool:
    """True where one side has exact zeros in place of values, and the others are nearly the same."""
    from lineage.judge.relations.values import SPARSE

    if pair.zero_a is None or pair.zero_b is None or abs(pair.zero_b - pair.zero_a) <= SPARSE:
        return False
    sample = material.sample(pair.name)
    both = (sample.a != 0) & (sample.b != 0)
    a, b = sample.a[both].astype(float), sample.b[both].astype(float)
    return len(b) >= FEWEST_UNITS and float(((a - b) ** 2).sum()) <= BOTH_HAVE**2 * float((b**2).sum())


def _inherited(material: Material, pair: Pair) -> bool:
    """True where a matrix agrees beyond a common mean: the norms of strangers, stacked to a matrix, do not."""
    from numpy import corrcoef

    sample = material.sample(pair.name)
    if not (sample.a.std() > 0 and sample.b.std() > 0):
        return False
    return bool(corrcoef(sample.a.ravel(), sample.b.ravel())[0, 1] >= INHERITED)


def _without_channels(tested: Significance) -> Significance:
    """The tests with those on channels void, and the p-value of the others: the least, corrected for their number."""
    from math import log10

    from lineage.judge.laws import corrected

    why = "nothing hidden agrees and no matrix is A's, so that training on A's features may have set their order"
    tests = tuple(msgspec.structs.replace(t, void=why) if t.kind in OPEN and not t.void else t for t in tested.tests)
    left = [t.log10_p for t in tests if not t.void]
    return Significance(tests, corrected(min(left), log10(len(tests))) if left else None)


def _equal_by_itself(material: Material) -> bool:
    """True where so much content is equal, value by value, that chance is out of the question."""
    if material.equal_share < EQUAL_SHARE or material.coverage < EQUAL_SHARE:
        return False
    from numpy import unique

    sizes = [p.size for p in material.content if p.equal and len(unique(material.sample(p.name).b)) > KINDS]
    return sum(sizes) >= EQUAL_ELEMENTS


def _equal_parts(material: Material) -> bool:
    """True where several matrices that were trained are equal, however little else is."""
    from numpy import unique

    from lineage.judge.relations.values import edge
    from lineage.judge.tables import sinusoidal

    marked: dict[bytes, int] = {}
    for pair in material.content:
        values = material.sample(pair.name).b if pair.equal else None
        if values is None or min(values.shape) < FEWEST_UNITS or (values == 0).mean() > 0.5:
            continue
        table = len(unique(values)) <= KINDS or sinusoidal(values) or sinusoidal(values.T)
        if not table and edge(values) > MARKED:
            marked[values.tobytes()] = pair.size  # one matrix that stands in many places proves its origin once
    size = sum(marked.values())
    return len(marked) >= EQUAL_MATRICES and size >= max(EQUAL_ELEMENTS, EQUAL_PART * material.b.parameters)


def _powerful(tested: Significance) -> bool:
    """True where a copy would have shown: the tests could reach far beyond significance."""
    from lineage.judge.laws import log10_fixed_points

    return any(log10_fixed_points(test.units, test.units) < POWER for test in tested.valid if test.units)


def _reasons(
    material: Material,
    class_: Class,
    findings: list[Finding],
    *,
    exact: bool,
    equal: bool,
    stands: list[AxisTest],
    alike: Likeness | None,
) -> list[str]:
    """Sentences, most important first."""
    tested = material.significance
    best = sorted(tested.valid, key=lambda t: t.log10_p)
    reasons: list[str] = []
    if class_ == "copied":
        what = f"{len(material.pairs)} tensors, {material.coverage:.1%} of B's parameters"
        seen = "matched value" if material.comparison is not None else "value that was looked at"
        reasons.append(f"Every {seen} is equal{_after(findings)}: {what}.")
    if exact:
        reasons += [_agreement(t) for t in best if t.log10_p < SIGNIFICANT][:2]
    if stands and not exact:
        reasons.append(_effect(stands[0]) + " No exact test is left, so there is no p-value.")
    if alike is not None:
        reasons.append(
            f"Three quarters of {alike.matrices} matrices correlate with A's at {alike.shown:.3f} or more, value by "
            f"value; matrices that do not belong together reach {alike.floor:.3f}. No exact test applies, so there is "
            "no p-value."
        )
    if equal and not exact and class_ != "copied":
        reasons.append(f"{material.equal_share:.1%} of the matched weights are equal value by value.")
    if class_ == "retrained":
        reasons.append("Both have one architecture, but no unit of B is one of A's: the weights are independent.")
    elif class_ == "unrelated":
        share = f"{min(material.coverage, material.used):.1%} of the parameters"
        reasons.append(f"Only {share} have a counterpart on the other side: the two are built differently.")
    elif class_ == "undetermined":
        reasons.append(_undecided(tested))
    if not exact:
        reasons += [_agreement(t) for t in best[:1]]
    reasons += [t_.sentence[0].upper() + t_.sentence[1:] + "." for t_ in findings]
    reasons += [_controlled(t) for t in best[:1] if t.control is not None]
    reasons += [_UNCONTROLLED for t in best[:1] if exact and t.kind in OPEN]
    reasons += [f"Not counted: {test.axis}: {test.void}." for test in tested.tests if test.void]
    return reasons


def _after(findings: list[Finding]) -> str:
    tags = [f.tag for f in findings if f.tag in ("renamed", "fused", "transposed", "cast")]
    return f" once {' and '.join(tags)}" if tags else ""


def _agreement(test: AxisTest) -> str:
    seen = ", seen through the embeddings" if test.frame else ""
    blocks = "groups" if test.axis.endswith("in each group)") else "layers"
    where = f"{test.axis}, {test.blocks} {blocks}" if test.blocks > 1 else test.axis
    kept = f"{test.fixed} stand at the place of A's (chance: about {test.blocks})"
    if test.ordered > 2 * test.fixed and test.log10_p < SUSPICIOUS:
        kept = f"{test.ordered} stand in the order of A's"
    return f"{where}: of {test.units} units matched by their weights{seen}, {kept}; log10 p = {test.log10_p:.1f}."


def _effect(test: AxisTest) -> str:
    return (
        f"{test.axis}: units matched by one tensor agree to {test.shown:.2f} in the others, which took no part; "
        f"mispaired layers of the two reach {test.floor:.2f}."
    )


def _controlled(test: AxisTest) -> str:
    found = f"{test.control_fixed} of {test.control_units} units"
    return f"Negative control: the same test between different layers finds {found} at their place, as chance does."


_UNCONTROLLED = (
    "No negative control exists for channels, since the matrices of a network share them; tables that anyone computes "
    "alike were looked for and not found."
)


def _undecided(tested: Significance) -> str:
    if tested.log10_p is None:
        return "No axis was found on which an exact test is possible: nothing speaks for or against a relation."
    if tested.log10_p < SUSPICIOUS:
        return f"The agreement (log10 p = {tested.log10_p:.1f}) is too much for chance and too little to accuse."
    return "There are too few units for a test: a copy would not have shown."
