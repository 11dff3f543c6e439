"""The package's data files (`mappings/`), and YAML from strangers read without their tricks."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import yaml

from lineage.data import mapping_file

__all__ = ["plain_yaml", "read_data"]

Record = TypeVar("Record")


def read_data(name: str, kind: type[Record]) -> Record:
    """A data file of `mappings/` as a record of type `kind`; a file that does not fit is our mistake, and raises."""
    document = yaml.load(mapping_file(name).read_text("utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return msgspec.convert(document, kind)


class _Plain(yaml.SafeLoader):
    """YAML without aliases, which can grow without bound."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.composer.ComposerError(problem="aliases are not read")
        return super().compose_node(parent, index)


def plain_yaml(text: str) -> Any:
    """The document in `text`, which nobody vouches for.

    Raises
    ------
    ValueError : not YAML, nested too deep, or made of aliases
    """
    try:
        return yaml.load(text, _Plain)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc
    except yaml.YAMLError as exc:
        raise ValueError(getattr(exc, "problem", None) or "not YAML") from exc
