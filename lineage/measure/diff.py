"""The question behind `lineage diff`: two checkpoints, tensor by tensor, matched first where no name agrees."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from lineage.checkpoint import Checkpoint
from lineage.errors import InputError
from lineage.measure.compare import SAMPLE, Comparison, TensorRow, compare, compare_mapped, same_names
from lineage.measure.groups import Groups
from lineage.measure.metrics import FIGURES
from lineage.measure.spectrum import Spectrum, spectrum

if TYPE_CHECKING:
    from lineage.layout.mapping import Mapping

__all__ = ["Described", "Diff", "describe", "diff", "top_rows"]

#: figures whose small values mean a large change
_FALLING = {"cosine", "pearson", "spearman"}
#: figures that say "the same" at one
_RATIOS = {"norm_ratio", "mean_ratio", "std_ratio"}


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint is, in numbers.

    Attributes
    ----------
    path, format : as opened
    tensors, parameters, bytes : of its data
    dtypes : how many tensors have each dtype
    """

    path: str
    format: str
    tensors: int
    parameters: int
    bytes: int
    dtypes: dict[str, int]


def describe(checkpoint: Checkpoint) -> Described:
    """The numbers of a checkpoint; reads no tensor data."""
    return Described(
        path=checkpoint.path,
        format=checkpoint.format,
        tensors=len(checkpoint),
        parameters=checkpoint.parameters,
        bytes=checkpoint.nbytes,
        dtypes=dict(sorted(Counter(spec.dtype for spec in checkpoint).items())),
    )


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """What `lineage diff` answers.

    Attributes
    ----------
    a, b : the two sides
    matched_by : `name` (equal names), `values` (no name agreed: a mapping was found first), `mapping` (one was given)
        or `nothing` (no name agreed and nothing corresponds)
    comparison : rows, summaries, insights
    """

    a: Described
    b: Described
    matched_by: Literal["name", "values", "mapping", "nothing"]
    comparison: Comparison

    def summary(self) -> dict[str, Any]:
        """All but the rows: counts by status, figures of the whole, of groups and of layers, pattern, insights."""
        c = self.comparison
        return {
            "matched_by": self.matched_by,
            "status": c.statuses,
            "overall": c.overall,
            "groups": c.groups,
            "layers": c.layers,
            "change": msgspec.to_builtins(c.change),
            "insights": msgspec.to_builtins(c.insights),
            "warnings": list(c.warnings),
            "seed": c.seed,
            "sample": c.sample,
        }

    def to_dict(self) -> dict[str, Any]:
        """The document of `lineage diff --json` as plain Python objects."""
        tensors = msgspec.to_builtins(self.comparison.rows)
        return {"a": msgspec.to_builtins(self.a), "b": msgspec.to_builtins(self.b), "summary": self.summary(),
                "tensors": tensors}  # fmt: skip

    def to_pandas(self) -> Any:
        """A data frame with one row by tensor, figures as columns; needs pandas.

        Raises
        ------
        InputError : pandas is not installed
        """
        try:
            import pandas
        except ImportError as exc:
            raise InputError("to_pandas", "pandas is missing", "install weight-lineage[pandas]") from exc

        columns = [name for name in TensorRow.__struct_fields__ if name not in ("metrics", "spectrum")]
        spectral = [name for name in Spectrum.__struct_fields__ if self.spectral]
        records = []
        for row in self.comparison.rows:
            figures = {name: getattr(row.metrics, name, None) for name in FIGURES}
            figures |= {name: getattr(row.spectrum, name, None) for name in spectral}
            records.append({name: getattr(row, name) for name in columns} | figures)
        return pandas.DataFrame.from_records(records, columns=[*columns, *FIGURES, *spectral])

    @property
    def spectral(self) -> bool:
        """True where singular values were asked for."""
        return any(row.spectrum is not msgspec.UNSET for row in self.comparison.rows)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in self.comparison.statuses.items() if n)
        return f"<Diff of {self.a.path!r} and {self.b.path!r}: {counts or 'no tensors'}>"


def diff(
    a: Checkpoint,
    b: Checkpoint,
    *,
    mapping: Mapping | None = None,
    threads: int = 2,
    seed: int = 0,
    sample: int = SAMPLE,
    device: str = "cpu",
    threshold: float | None = None,
    groups: Groups | None = None,
    wanted: Callable[[str], bool] | None = None,
    spectra: bool = False,
    progress: Callable[[int, int], None] | None = None,
    matching: Callable[[], None] | None = None,
) -> Diff:
    """Two checkpoints compared tensor by tensor; where no name occurs in both, by the mapping that their values show.

    Parameters
    ----------
    mapping : how B's tensors are laid out in A; None looks at the names
    spectra : also the singular values of every matrix that differs; reads both files once more or, of matrices that
        are too large to be held, many times
    matching : called before values are matched, which takes a while
    other options : as in `compare`

    Raises
    ------
    InputError : a file changed or cannot be read, or `mapping` does not fit A
    """
    options: dict[str, Any] = {
        "threads": threads, "seed": seed, "sample": sample, "device": device, "threshold": threshold,
        "groups": groups, "wanted": wanted, "progress": progress,
    }  # fmt: skip
    word: Literal["name", "values", "mapping", "nothing"] = "name" if mapping is None else "mapping"
    if mapping is None and a.specs and b.specs and not same_names(a, b):
        if matching is not None:
            matching()
        from lineage.match import find_mapping

        mapping = find_mapping(a, b, seed=seed, threads=threads)
        word = "values" if mapping.rules else "nothing"
    if mapping is not None and mapping.rules:
        comparison = compare_mapped(mapping, a, b, **options)
    else:
        comparison = compare(a, b, **options)
    if spectra:
        comparison = _with_spectra(comparison, mapping, a, b, threads=threads, seed=seed, progress=progress)
    return Diff(a=describe(a), b=describe(b), matched_by=word, comparison=comparison)


def _with_spectra(
    comparison: Comparison,
    mapping: Mapping | None,
    a: Checkpoint,
    b: Checkpoint,
    *,
    threads: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
) -> Comparison:
    """The comparison with the singular values of every difference."""
    one = a
    if mapping is not None and mapping.rules:
        from lineage.filling import Filled

        one = Filled(mapping, a)
    total, done = sum(row.size for row in comparison.rows if row.metrics is not None), 0

    def found(row: TensorRow) -> Spectrum | None:
        if row.b_name is None or row.metrics is None or not row.metrics.max_abs:
            return None
        return spectrum(one, b, row.name if one is a else row.b_name, row.b_name, seed=seed)

    rows = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            for row, values in zip(comparison.rows, pool.map(found, comparison.rows), strict=True):
                rows.append(msgspec.structs.replace(row, spectrum=values))
                done += row.size if row.metrics is not None else 0
                if progress is not None:
                    progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # who interrupts does not wait for the rest
            raise
    return msgspec.structs.replace(comparison, rows=tuple(rows))


def top_rows(comparison: Comparison, by: str, limit: int) -> list[TensorRow]:
    """Changed rows, those with the largest change by the figure `by` first; equal ones in the order of the file.

    Raises
    ------
    ValueError : `by` is no figure
    """
    if by not in FIGURES:
        raise ValueError(f"no figure {by!r}")
    listed = []
    for at, row in enumerate(comparison.rows):
        value = None if row.metrics is None else getattr(row.metrics, by)
        if row.status in ("changed", "shape-changed") and value is not None:
            distance = abs(value - 1) if by in _RATIOS else -value if by in _FALLING else value
            listed.append((-distance, at, row))
    return [row for _, _, row in sorted(listed, key=lambda entry: entry[:2])[:limit]]
