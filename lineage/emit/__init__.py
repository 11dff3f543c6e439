"""Mappings in other forms: JSON, plain Python, Transformers' weight conversions. One file a form."""

from __future__ import annotations

from collections.abc import Callable

from lineage.emit.document import emit_json
from lineage.emit.emitted import Emitted
from lineage.emit.python import emit_python
from lineage.emit.transformers import emit_transformers
from lineage.emit.writing import emit

__all__ = ["EMITTERS", "Emitted", "emit"]

#: every form by its word; each takes the mapping, its name, the name of the file for long arrays, and shapes
EMITTERS: dict[str, Callable[..., Emitted]] = {
    "json": emit_json,
    "python": emit_python,
    "transformers": emit_transformers,
}
