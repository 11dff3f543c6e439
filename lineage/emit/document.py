"""A mapping as JSON: the keys of the YAML document, read back by the same reader."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping as Dict

from lineage.emit.emitted import Emitted
from lineage.layout.axes import Shape
from lineage.layout.document import document_of, mapping_data
from lineage.layout.mapping import Mapping

__all__ = ["emit_json"]

#: what YAML does not take as it stands, or another reader might not: JSON escapes it
_UNPRINTABLE = re.compile(
    "[\x7f-\xa0\u00ad\u0600-\u0605\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\uf8ff\ufeff\ufff0-\uffff]"
)


def emit_json(mapping: Mapping, *, name: str, beside: str, shapes: Dict[str, Shape] | None = None) -> Emitted:
    """The document; `lineage apply`, `map --check` and `lora convert` read it like the YAML file.

    Parameters
    ----------
    name : of the mapping, which the document does not hold
    beside : name of the file with the arrays that are too long for it
    shapes : not needed
    """
    del name, shapes
    arrays = mapping_data(mapping)
    text = json.dumps(document_of(mapping, data=beside if arrays else None), ensure_ascii=False, indent=2)
    return Emitted(text=_UNPRINTABLE.sub(lambda m: f"\\u{ord(m[0]):04x}", text) + "\n", arrays=arrays)
