"""A mapping written in another form: the text, and beside it the arrays that are too long for it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from collections.abc import Mapping as Dict
from pathlib import Path

from lineage.checkpoint.write import atomic
from lineage.emit.emitted import Emitted
from lineage.errors import InputError
from lineage.layout.axes import LayoutError, Shape
from lineage.layout.document import beside_of, write_arrays
from lineage.layout.mapping import Mapping

__all__ = ["emit"]


def emit(
    mapping: Mapping,
    emitter: Callable[..., Emitted],
    *,
    name: str,
    out: str | os.PathLike[str] | None = None,
    shapes: Dict[str, Shape] | None = None,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> Emitted:
    """The mapping in another form, written to `out` where that is given.

    Parameters
    ----------
    emitter : one of `EMITTERS`
    name : what the text and errors call the mapping
    shapes : of the source's tensors, where the checkpoint is at hand
    inputs : files that the output must not replace

    Raises
    ------
    InputError : the form cannot hold the mapping, it needs a file for its arrays, or the output cannot be written
    """
    file, inputs = Path(out) if out is not None else None, list(inputs)
    # under the whole name: the mapping of the same stem may have arrays of its own
    beside = beside_of(file.parent, file.name) if file is not None else None
    try:
        emitted = emitter(mapping, name=name, beside=beside.name if beside is not None else "", shapes=shapes)
    except LayoutError as exc:
        raise InputError(name, str(exc)) from exc
    if file is None or beside is None:
        if emitted.arrays:
            raise InputError(name, "it holds arrays too long for the text", "name a file with -o, they go beside it")
        return emitted
    with atomic(file, inputs=inputs) as part:
        part.write_text(emitted.text, encoding="utf-8")
        write_arrays(emitted.arrays, beside, inputs=inputs)
    return emitted
