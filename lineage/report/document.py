"""`report.json` as records, the JSON Schema of it, and how it is put together from what was found.

The order of the fields is the order in the document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.checkpoint.claims import Claim
from lineage.judge.grade import Grade, grade_of
from lineage.layout.mapping import Mapping
from lineage.measure.compare import Comparison, TensorRow
from lineage.measure.diff import Described, Diff, describe
from lineage.version import __version__

if TYPE_CHECKING:
    from lineage.judge import Verdict
    from lineage.judge.merging import Merge

__all__ = ["RELATIONS", "ClaimSummary", "ComponentSummary", "Document", "LoraSummary", "MappingSummary",
           "MergeSummary", "MetricsSummary", "Part", "ReadSummary", "Report", "SampleSummary", "VerdictSummary",
           "build", "schema", "summarise_mapping", "with_keys"]  # fmt: skip

#: version of the document
SCHEMA = 1

Class = Literal["copied", "transformed", "retrained", "unrelated", "undetermined"]
Relation = Literal[
    "identical", "renamed", "fused", "transposed", "permuted", "cast", "quantized", "noised", "sparsified",
    "fine-tuned", "partially-tuned", "lora-merged", "continued-pretraining", "merged", "depth-pruned", "depth-grown",
    "width-pruned", "width-grown", "vocabulary-extended", "expert-upcycled", "layers-reordered", "rotated", "rescaled",
    "sign-flipped", "partially-shared", "shared-initialisation",
]  # fmt: skip

RELATIONS: tuple[str, ...] = get_args(Relation)


class MappingSummary(msgspec.Struct, frozen=True, kw_only=True):
    """How much of both sides the mapping explains.

    Attributes
    ----------
    matched_a, matched_b : tensors that a rule reads, and fills
    certified_b : tensors whose values bear the rule out
    by_structure_b : tensors that only shape, place or name speak for
    unmatched_a, unmatched_b : the names left over
    """

    rules: int
    matched_a: int
    matched_b: int
    certified_b: int
    by_structure_b: int
    unmatched_a: tuple[str, ...]
    unmatched_b: tuple[str, ...]


class VerdictSummary(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; each field as in the contract."""

    class_: Class = msgspec.field(name="class")
    related: bool | None
    log10_p: float | None
    coverage: float
    relations: tuple[Relation, ...]
    direction: Literal["a-to-b", "b-to-a"] | None
    reasons: tuple[str, ...]


class MergeSummary(msgspec.Struct, frozen=True, kw_only=True):
    """B as a sum of the given parents: B = base + Σ weight · (parent - base).

    Attributes
    ----------
    merged : False where B is no such sum
    base : `A`, or the parent that stands in for it where B does not come from A
    weights : by parent
    residual : share of |B - base|² that is left
    rounding : share that rounding to B's dtype leaves
    scale : what all weights come to where that is left free; above 1 after a spherical interpolation
    """

    merged: bool
    base: str
    weights: dict[str, float]
    residual: float
    rounding: float
    scale: float


class ComponentSummary(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One part of a pipeline, or the whole: its names on both sides (None where A has no such part) and its verdict.

    `merge` is there only where parents were given.
    """

    name: str
    a: str | None
    b: str
    verdict: VerdictSummary
    merge: MergeSummary | None = None


class ClaimSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What B says of its origin, and whether the weights agree."""

    source: str
    says: str
    verdict: Literal["supported", "contradicted", "not tested"]


class MetricsSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of all content weights, of groups and of layers; of a pipeline `overall` is that of its main part."""

    overall: dict[str, Any]
    groups: dict[str, dict[str, Any]]
    layers: list[dict[str, Any]]


class LoraSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What a LoRA for A needs to fit B, and the file that holds the key map."""

    grade: Grade
    keys: str | None


class ReadSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What was read where the answer rests on samples.

    Attributes
    ----------
    bytes : of the weights of both
    share : of all their bytes
    budget : bytes that were allowed
    """

    bytes: int
    share: float
    budget: int


class SampleSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the exact test looked at.

    Attributes
    ----------
    rows : units a layer that were compared; None: as many as are quick
    seed : of their choice, and of the shuffles that break ties
    """

    rows: int | None
    seed: int


class Document(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`report.json`; `read` is there only where the answer rests on samples, `units` tells which ones."""

    lineage: str
    schema: int
    a: Described
    b: Described
    mapping: MappingSummary
    verdict: VerdictSummary
    components: tuple[ComponentSummary, ...]
    claims: tuple[ClaimSummary, ...]
    metrics: MetricsSummary
    lora: LoraSummary
    warnings: tuple[str, ...]
    read: ReadSummary | None = None
    units: SampleSummary | None = None


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """What was found about one component.

    Attributes
    ----------
    a, b : its name on both sides, "" where the checkpoint is one network, None for A where it has no such part
    parameters : of B's part
    mapping, comparison : between the parts, names without the component
    merge : what it was merged from, where parents were given
    """

    a: str | None
    b: str
    parameters: int
    mapping: Mapping
    comparison: Comparison
    verdict: Verdict
    merge: Merge | None = None

    @property
    def name(self) -> str:
        """What people call the part."""
        return self.b or self.a or "model"


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What `lineage investigate` answers.

    Attributes
    ----------
    document : `report.json`
    mapping : from A's layout to B's
    diff : tensor by tensor, A laid out as B
    """

    document: Document
    mapping: Mapping
    diff: Diff

    @property
    def verdict(self) -> VerdictSummary:
        """The answer."""
        return self.document.verdict

    def to_dict(self) -> dict[str, Any]:
        """`report.json` as plain Python objects."""
        found: dict[str, Any] = msgspec.to_builtins(self.document)
        return found

    def to_pandas(self) -> Any:
        """A data frame with one row by tensor; needs pandas."""
        return self.diff.to_pandas()

    def _repr_html_(self) -> str:
        from lineage.report.html import fragment

        return fragment(self)

    def __repr__(self) -> str:
        v = self.verdict
        return f"<Report on {self.document.a.path!r} and {self.document.b.path!r}: {v.class_}, log10 p {v.log10_p}>"


def schema() -> dict[str, Any]:
    """JSON Schema of `report.json`, made from the types."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(Document)}


def summarise_mapping(mapping: Mapping, a: Checkpoint, b: Checkpoint) -> MappingSummary:
    """Counts of what the mapping's rules reach in the two checkpoints."""
    used: set[str] = set()
    filled: dict[str, tuple[bool, bool]] = {}
    for instance in mapping.instances({spec.name: spec.shape for spec in a}):
        used.update(instance.source_names)
        certified = instance.rule.evidence is not None and instance.rule.evidence.certified
        for name in instance.target_names:
            filled.setdefault(name, (certified, instance.rule.how in ("structure", "name")))
    return MappingSummary(
        rules=len(mapping.rules),
        matched_a=sum(name in used for name in a.specs),
        matched_b=sum(name in filled for name in b.specs),
        certified_b=sum(certified for name, (certified, _) in filled.items() if name in b.specs),
        by_structure_b=sum(structure for name, (_, structure) in filled.items() if name in b.specs),
        unmatched_a=tuple(name for name in a.specs if name not in used),
        unmatched_b=tuple(name for name in b.specs if name not in filled),
    )


def build(
    a: Checkpoint,
    b: Checkpoint,
    mapping: Mapping,
    parts: Sequence[Part],
    claims: Iterable[Claim],
    notes: Iterable[str],
    *,
    read: ReadSummary | None = None,
    units: SampleSummary | None = None,
) -> Report:
    """Puts the report together.

    Parameters
    ----------
    mapping : between the whole checkpoints
    parts : one or more, B's largest first
    claims : what B says of itself
    notes : what was noticed on the way, for the warnings
    read : what was read, where the answer rests on samples
    units : what the exact test looked at
    """
    main, others = parts[0], parts[1:]
    verdict = _summarise_verdict(main.verdict)
    if others:
        told = tuple(f"This is the verdict on {main.name}; {p.name} is {p.verdict.class_}." for p in others)
        verdict = msgspec.structs.replace(verdict, reasons=(*verdict.reasons, *told))
    if read is not None:
        seen: tuple[str, ...] = (
            f"Only {read.share:.2%} of the bytes were read: equality and the mapping hold for the places looked at, "
            "nothing is certified, and no figures were taken.",
        )
        if verdict.related is False:
            seen += ("Undoing disguises (permuted, rotated, rescaled weights) takes a run without a budget.",)
        verdict = msgspec.structs.replace(verdict, reasons=(*verdict.reasons, *seen))
    comparison = _joined(parts)
    warnings = dict.fromkeys((*a.notes, *b.notes, *notes, *comparison.warnings))
    document = Document(
        lineage=__version__,
        schema=SCHEMA,
        a=describe(a),
        b=describe(b),
        mapping=summarise_mapping(mapping, a, b),
        verdict=verdict,
        components=tuple(
            ComponentSummary(
                name=p.name, a=p.a, b=p.b, verdict=_summarise_verdict(p.verdict), merge=_summarise_merge(p.merge)
            )
            for p in parts
        ),
        claims=tuple(_claim(claim, a.path, verdict.related) for claim in claims),
        metrics=MetricsSummary(overall=comparison.overall, groups=comparison.groups, layers=comparison.layers),
        lora=LoraSummary(grade=grade_of(mapping, verdict.class_), keys=None),
        warnings=tuple(warnings),
        read=read,
        units=units,
    )
    diff = Diff(a=document.a, b=document.b, matched_by="mapping", comparison=comparison)
    return Report(document=document, mapping=mapping, diff=diff)


def _summarise_verdict(found: Verdict) -> VerdictSummary:
    """The judge's answer without its working."""
    return VerdictSummary(
        class_=found.class_, related=found.related, log10_p=found.log10_p, coverage=found.coverage,
        relations=tuple(found.relations), direction=found.direction, reasons=tuple(found.reasons),
    )  # fmt: skip


def _summarise_merge(found: Merge | None) -> MergeSummary | None:
    """The weights without their spread."""
    if found is None:
        return None
    return MergeSummary(
        merged=found.merged, base=found.base, weights={share.name: round(share.weight, 3) for share in found.shares},
        residual=round(found.residual, 5), rounding=round(found.rounding, 5), scale=round(found.scale, 5),
    )  # fmt: skip


def _joined(parts: Sequence[Part]) -> Comparison:
    """The comparisons of all parts as one; names, stacks and groups carry the part's name where there are several."""
    first = parts[0].comparison
    if len(parts) == 1:
        return first
    rows: list[TensorRow] = []
    layers: list[dict[str, Any]] = []
    groups: dict[str, dict[str, Any]] = {}
    statuses: dict[str, int] = {}
    for part in parts:
        found = part.comparison
        for row in found.rows:
            side = part.b if row.status == "added" else part.a or part.b
            sources = " + ".join(f"{side}/{name}" if side else name for name in row.name.split(" + "))
            b_name = row.b_name and (f"{part.b}/{row.b_name}" if part.b else row.b_name)
            stack = f"{part.name}/{row.stack}" if row.stack else ""
            rows.append(msgspec.structs.replace(row, name=sources, b_name=b_name, stack=stack))
        layers += [layer | {"stack": f"{part.name}/{layer['stack']}"} for layer in found.layers]
        groups |= {f"{part.name}/{group}": figures for group, figures in found.groups.items()}
        for status, count in found.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    insights = [
        msgspec.structs.replace(insight, text=f"{part.name}: {insight.text}")
        for part in parts
        for insight in part.comparison.insights
    ]
    return msgspec.structs.replace(
        first, rows=tuple(rows), statuses=statuses, groups=groups, layers=layers, insights=tuple(insights),
        warnings=tuple(i.text for i in insights if i.severity == "warning"),
    )  # fmt: skip


def _claim(claim: Claim, path: str, related: bool | None) -> ClaimSummary:
    """A claim that names A is as true as the verdict; what names something else was not looked at."""
    whole = PurePath(path)
    folder = whole.parent.name if whole.suffix else whole.name
    named = _last(claim.says) in {whole.name.lower(), whole.stem.lower(), folder.lower()} - {""}
    word: Literal["supported", "contradicted", "not tested"] = "not tested"
    if named and related is not None:
        word = "supported" if related else "contradicted"
    return ClaimSummary(source=claim.source, says=claim.says, verdict=word)


def _last(text: str) -> str:
    """Last component of a path or of a model's name without its revision, for comparison."""
    return text.replace("\\", "/").rstrip("/").rpartition("/")[2].partition("@")[0].lower()


def with_keys(report: Report, file: str) -> Report:
    """The report that names the file of the key map."""
    lora = msgspec.structs.replace(report.document.lora, keys=file)
    return msgspec.structs.replace(report, document=msgspec.structs.replace(report.document, lora=lora))
