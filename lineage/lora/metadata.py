"""What a converted file says about itself: the source's words kept, hashes that no longer hold dropped, provenance."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from lineage.lora.source import HEADER
from lineage.lora.writing import Written

__all__ = ["carried_over", "content_hash"]

#: entries that describe the bytes of one file and are wrong in any other
_OF_BYTES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
#: entries of one format that mean nothing in another
_OF_FORMAT = (HEADER, "scale", "rank", "format")


def carried_over(metadata: Mapping[str, str], written: Written) -> dict[str, str]:
    """The source's header for the new file, its hashes computed again."""
    kept = {k: v for k, v in metadata.items() if k not in (*_OF_BYTES, *_OF_FORMAT)}
    kept.setdefault("format", "pt")
    digest = content_hash(written)
    for key in _OF_BYTES:
        if key in metadata:
            kept[key] = (
                digest[:8] if key == "sshs_legacy_hash" else "0x" + digest if key.startswith("modelspec") else digest
            )
    history = {"made_by": "lineage lora", "format": written.format, "content_sha256": digest}
    kept["lineage"] = json.dumps(history, sort_keys=True)
    return kept


def content_hash(written: Written) -> str:
    """SHA-256 of the arrays in the order of their keys: what a file of them holds, without its header."""
    digest = hashlib.sha256()
    for key in sorted(written.entries):
        digest.update(written.entries[key].codes.tobytes())
    return digest.hexdigest()
