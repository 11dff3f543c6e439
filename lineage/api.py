"""The steps of the command line as functions: `open map apply diff investigate check`. Commands call these as well.

Paths or open checkpoints go in, typed records come out.
"""

from __future__ import annotations

import builtins
import functools
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import msgspec

from lineage.checkpoint import Checkpoint, open_checkpoint, read_claims
from lineage.components import component_of, matched_components, whole_mapping
from lineage.errors import InputError, nearest
from lineage.layout.mapping import Mapping
from lineage.measure.compare import SAMPLE
from lineage.progress import Progress

if TYPE_CHECKING:
    from lineage.filling import Applied
    from lineage.match.certify import Checked
    from lineage.match.stored import HeaderMap
    from lineage.measure.diff import Diff
    from lineage.report.document import Part, ReadSummary, Report

__all__ = [
    "EXPECTATIONS",
    "Answer",
    "apply",
    "check",
    "check_mapping",
    "diff",
    "investigate",
    "map",
    "map_headers",
    "open",
]

StrPath = str | os.PathLike[str]
#: share of a budget of bytes that the search for a mapping may take; the rest is for the verdict
SEARCHED = 0.6
#: what `check` can be asked for
EXPECTATIONS = ("related", "unrelated", "copied", "transformed", "retrained")


def open(path: StrPath, *, headers: bool = False) -> Checkpoint:
    """The checkpoint at `path`, lazily: a file, a folder of shards, a Hugging Face folder or a pipeline folder.

    Parameters
    ----------
    headers : only headers will be read; files that hold no more are then no error

    Raises
    ------
    InputError : there is nothing that can be read
    """
    return open_checkpoint(path, headers=headers)


def map(
    a: StrPath | Checkpoint,
    b: StrPath | Checkpoint,
    *,
    seed: int = 0,
    threads: int = 2,
    progress: Callable[[str], None] | None = None,
) -> Mapping:
    """How the tensors of B are laid out in A; components of pipelines are matched one by one.

    Raises
    ------
    InputError : one of the two cannot be read
    """
    told = progress or (lambda step: None)
    with _opened(a) as one, _opened(b) as two:
        found = matched_components(one, two, seed=seed, threads=threads, progress=told)
        return whole_mapping(one, two, [(x, y, m) for x, y, m in found if x is not None])


def map_headers(a: StrPath | Checkpoint, b: StrPath | Checkpoint, *, sizes: Dict[str, int] | None = None) -> HeaderMap:
    """How a stored layout of public models lays B's tensors out in A, from names and shapes: no weight is read.

    Parameters
    ----------
    sizes : lengths of axes that shapes do not tell

    Returns
    -------
    the mapping, of which nothing is verified and which has no rules where no stored layout fits; and the sizes that
    are still open: what needs them is left out

    Raises
    ------
    InputError : one of the two has no readable header, or no layout that fits has a size of a given name
    """
    from lineage.match.stored import HeaderMap
    from lineage.match.stored import map_headers as run

    asked: set[str] = set()
    named: set[str] = set()

    def find(x: Checkpoint, y: Checkpoint, progress: Callable[[str], None]) -> Mapping:
        found = run(x, y, sizes=sizes or {})
        if found is None:
            return Mapping()
        asked.update(found.open)
        named.update(found.sizes)
        return found.mapping

    with _opened(a, headers=True) as one, _opened(b, headers=True) as two:
        told = matched_components(one, two, seed=0, threads=1, progress=lambda step: None, find=find)
        mapping = whole_mapping(one, two, [(x, y, m) for x, y, m in told if x is not None])
    for name in sizes or {}:
        if mapping.rules and name not in named:
            near = nearest(name, named)
            cause = f'the stored layout {", ".join(mapping.pair)} has no size "{name}"'
            raise InputError("--size", cause, f'did you mean "{near}"?' if near else "leave it out")
    return HeaderMap(mapping, tuple(sorted(asked)), tuple(sorted(named)))


def check_mapping(
    mapping: StrPath | Mapping, a: StrPath | Checkpoint, b: StrPath | Checkpoint, *, threads: int = 2
) -> list[Checked]:
    """Every place of a mapping verified again from the weights.

    Raises
    ------
    InputError : the mapping or one of the two cannot be read, or the mapping does not fit A
    """
    from lineage.layout.axes import LayoutError
    from lineage.match.certify import check

    rules, place = _rules(mapping)
    with _opened(a) as one, _opened(b) as two:
        try:
            return check(rules, one, two, threads=threads)
        except LayoutError as exc:
            raise InputError(place, str(exc), f"the mapping does not fit {one.path}") from exc


def apply(
    mapping: StrPath | Mapping,
    checkpoint: StrPath | Checkpoint,
    out: StrPath,
    *,
    inverse: bool = False,
    strict: bool = False,
) -> Applied:
    """Writes B's layout filled from A's weights, or with `inverse` A's layout from B's, as safetensors.

    Raises
    ------
    InputError : the mapping does not fit, nothing could be filled, or the output cannot be written
    """
    from lineage.filling import apply as run

    rules, place = _rules(mapping)
    with _opened(checkpoint) as source:
        inputs = () if isinstance(mapping, Mapping) else (os.fspath(mapping),)
        return run(rules, source, os.fspath(out), inverse=inverse, strict=strict, place=place, inputs=inputs)


def diff(a: StrPath | Checkpoint, b: StrPath | Checkpoint, **options: Any) -> Diff:
    """B compared with A tensor by tensor; where no name agrees, tensors are paired by their values first.

    Parameters
    ----------
    options : as in `lineage.measure.diff.diff`

    Raises
    ------
    InputError : one of the two cannot be read
    """
    from lineage.measure.diff import diff as run

    with _opened(a) as one, _opened(b) as two:
        return run(one, two, **options)


def investigate(
    a: StrPath | Checkpoint,
    b: StrPath | Checkpoint,
    *,
    seed: int = 0,
    threads: int = 2,
    sample: int = SAMPLE,
    device: str = "cpu",
    rows: int | None = None,
    budget: int | None = None,
    parents: Sequence[StrPath | Checkpoint] = (),
    progress: Progress | None = None,
) -> Report:
    """Does B come from A, how, and how sure is that?

    Parameters
    ----------
    a, b : the claimed ancestor and the suspect
    seed : of samples and of the shuffles that break ties
    sample : elements behind ranks and quantiles of large tensors
    rows : units a layer that the exact test compares; None: as many as are quick, 64 within a budget
    budget : bytes of both that may be read. The answer then rests on samples of the weights: no figures, nothing
        certified, fewer relations, no direction. None reads both whole
    parents : what B may have been merged from, beside A; each gets its weight
    progress : is told where the job stands

    Raises
    ------
    InputError : one of the checkpoints cannot be read, or there are `parents` and a `budget`: they take more reading
    """
    from lineage.judge.brief import ROWS
    from lineage.report.document import SampleSummary, build

    if parents and budget is not None:
        raise InputError("--parent", "parents cannot be weighed within a budget", "leave out --budget")

    told = progress or Progress()
    read: ReadSummary | None = None
    with _opened(a) as one, _opened(b) as two:
        parts: builtins.list[Part] = []
        if budget is not None:
            parts, read = _glimpsed(one, two, budget, seed=seed, rows=rows, threads=threads, told=told)
        else:
            for x, y, mapping in matched_components(one, two, seed=seed, threads=threads, progress=told.step):
                options: dict[str, Any] = {"seed": seed, "threads": threads, "sample": sample, "device": device}
                options["rows"] = rows
                parts.append(_judged(one, two, x, y, mapping, told=told, **options))
        parts.sort(key=lambda part: -part.parameters)
        if parents:
            parts = _weighed(one, two, parts, parents, seed=seed, threads=threads, told=told)
        claims, notes = read_claims(two)
        found = [(part.a, part.b, part.mapping) for part in parts if part.a is not None]
        units = SampleSummary(rows=rows or (None if budget is None else ROWS), seed=seed)
        return build(one, two, whole_mapping(one, two, found), parts, claims, notes, read=read, units=units)


def _glimpsed(
    a: Checkpoint, b: Checkpoint, budget: int, *, seed: int, rows: int | None, threads: int, told: Progress
) -> tuple[builtins.list[Part], ReadSummary]:
    """Every component judged from samples, and what was read for it."""
    from lineage.checkpoint.metered import Meter, Metered
    from lineage.judge.brief import judge_briefly
    from lineage.match.budget import search
    from lineage.measure.compare import compare
    from lineage.report.document import Part, ReadSummary

    meter = Meter(budget)
    one, two = Metered(a, meter), Metered(b, meter)
    unsettled: dict[int, int] = {}

    def find(x: Checkpoint, y: Checkpoint, progress: Callable[[str], None]) -> Mapping:
        with meter.at_most(int(budget * SEARCHED * y.nbytes / max(1, b.nbytes))):
            found = search(x, y, meter, seed=seed, threads=threads, progress=progress)
        unsettled[id(found.mapping)] = len(found.unsettled)
        return found.mapping

    parts: builtins.list[Part] = []
    for x, y, mapping in matched_components(one, two, seed=seed, threads=threads, progress=told.step, find=find):
        told.step(f"judging {y}".rstrip())
        mine, its = component_of(one, x), component_of(two, y)
        with meter.at_most(int(budget * its.nbytes / max(1, b.nbytes))):
            left = unsettled.get(id(mapping), 0)
            verdict = judge_briefly(mine, its, mapping, meter, unsettled=left, seed=seed, rows=rows)
        nothing = compare(mine, its, [], wanted=lambda name: False)
        parts.append(Part(a=x, b=y, parameters=its.parameters, mapping=mapping, comparison=nothing, verdict=verdict))
    share = meter.read / max(1, a.nbytes + b.nbytes)
    return parts, ReadSummary(bytes=meter.read, share=round(share, 6), budget=budget)


def _judged(
    a: Checkpoint,
    b: Checkpoint,
    a_name: str | None,
    b_name: str,
    mapping: Mapping,
    *,
    seed: int,
    threads: int,
    sample: int,
    device: str,
    rows: int | None,
    told: Progress,
) -> Part:
    """One component, measured and judged."""
    from lineage.judge import judge
    from lineage.judge.align import align
    from lineage.judge.undone import left_over, with_alignment
    from lineage.measure.compare import compare, compare_mapped
    from lineage.report.document import Part

    one, two = component_of(a, a_name), component_of(b, b_name)
    options: dict[str, Any] = {"threads": threads, "seed": seed, "sample": sample, "device": device}
    where = f" {b_name}" if b_name else ""
    told.step(f"measuring{where}")
    if mapping.rules:
        comparison = compare_mapped(mapping, one, two, progress=told.count, **options)
    else:
        comparison = compare(one, two, [], **options)
    told.step(f"judging{where}")
    verdict = judge(one, two, mapping, comparison, seed=seed, threads=threads, rows=rows)
    if mapping.rules and verdict.class_ != "copied":
        aligned = align(one, two, mapping, seed=seed, threads=threads)
        if aligned is not None and aligned.holds:
            told.step(f"measuring what was undone{where}")
            mapping = aligned.mapping
            comparison = compare_mapped(mapping, one, two, progress=told.count, **options)
            verdict = with_alignment(verdict, aligned, left_over(one, two, aligned, comparison, seed=seed))
    return Part(a=a_name, b=b_name, parameters=two.parameters, mapping=mapping, comparison=comparison, verdict=verdict)


def _weighed(
    a: Checkpoint,
    b: Checkpoint,
    parts: Sequence[Part],
    parents: Sequence[StrPath | Checkpoint],
    *,
    seed: int,
    threads: int,
    told: Progress,
) -> builtins.list[Part]:
    """The parts with what each was merged from, largest first; the first one also tells of all together."""
    from lineage.judge.candidates import Candidate, Gathered, gather, labels
    from lineage.judge.merging import weigh, with_merge

    with ExitStack() as stack:
        opened = [stack.enter_context(_opened(parent)) for parent in parents]
        candidates: dict[str, builtins.list[Candidate]] = {part.b: [] for part in parts}
        for label, parent in zip(labels([one.path for one in opened]), opened, strict=True):
            told.step(f"matching {label}")
            for x, y, mapping in matched_components(parent, b, seed=seed, threads=threads, progress=lambda step: None):
                candidates[y] += [Candidate(label, component_of(parent, x), mapping)] if x is not None else []
        told.step("weighing parents")
        result, found = [], builtins.list[Gathered]()
        for part in parts:
            mine, its, related = component_of(a, part.a), component_of(b, part.b), part.verdict.related is True
            products = gather(mine, its, part.mapping, candidates[part.b], related=related, seed=seed)
            merge = None if products is None else weigh(products)
            found += [] if products is None else [products]
            verdict = part.verdict if merge is None else with_merge(part.verdict, merge)
            result.append(msgspec.structs.replace(part, verdict=verdict, merge=merge))
    if len(found) > 1 and len({one.labels for one in found}) == 1:
        whole = weigh(functools.reduce(operator.add, found))
        told_of = () if whole is None else (f"All parts together: {whole.formula}.",)
        main = result[0].verdict
        main = msgspec.structs.replace(main, reasons=(*main.reasons, *told_of))
        result[0] = msgspec.structs.replace(result[0], verdict=main)
    return result


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What `check` answers.

    Attributes
    ----------
    holds : None where it cannot be told
    why : one sentence
    report : what it rests on
    """

    holds: bool | None
    why: str
    report: Any

    def to_dict(self) -> dict[str, Any]:
        """The answer with the report as plain Python objects."""
        return {"holds": self.holds, "why": self.why, "report": self.report.to_dict()}


def check(
    a: StrPath | Checkpoint, b: StrPath | Checkpoint, *, expect: str, claim: str | None = None, **options: Any
) -> Answer:
    """Whether what is expected of B holds, as a gate for scripts.

    Parameters
    ----------
    expect : one of `EXPECTATIONS`. `related` takes copied and transformed, `unrelated` takes everything that shares
        no ancestor with A, also the same architecture trained independently
    claim : a relation, such as `fine-tuned`, that must be among those found
    options : as in `investigate`

    Raises
    ------
    InputError : one of the two cannot be read
    ValueError : `expect` is none of the words
    """
    if expect not in EXPECTATIONS:
        raise ValueError(f"expect {expect!r} is none of {', '.join(EXPECTATIONS)}")
    report = investigate(a, b, **options)
    verdict = report.verdict
    if verdict.related is None:
        return Answer(holds=None, why=f"It cannot be told: {' '.join(verdict.reasons[:1])}".strip(), report=report)
    if expect in ("related", "unrelated"):
        holds = verdict.related is (expect == "related")
    else:
        holds = verdict.class_ == expect
    why = f"{report.document.b.path} is {verdict.class_}, {expect} was expected."
    if holds and claim is not None:
        holds = claim in verdict.relations
        if not holds and report.document.read is not None:
            why = f"Samples do not show {claim}; a run without a budget may."
            return Answer(holds=None, why=why, report=report)
        found = ", ".join(verdict.relations) or "no relation"
        why = f"{report.document.b.path} is {verdict.class_}; found: {found}; {claim} was expected."
    return Answer(holds=holds, why=why, report=report)


# -- checkpoints and mappings


@contextmanager
def _opened(source: StrPath | Checkpoint, *, headers: bool = False) -> Iterator[Checkpoint]:
    """The checkpoint; what was opened here is closed here."""
    with ExitStack() as stack:
        if isinstance(source, Checkpoint):
            yield source
        else:
            yield stack.enter_context(open_checkpoint(source, headers=headers))


def _rules(mapping: StrPath | Mapping) -> tuple[Mapping, str]:
    """The mapping, and what errors call it."""
    if isinstance(mapping, Mapping):
        return mapping, "mapping"
    from lineage.layout.document import read_mapping

    return read_mapping(mapping), os.fspath(mapping)
