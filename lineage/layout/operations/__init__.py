"""The layout operations, one class each, by their words in a mapping file."""

from lineage.layout.operations.arithmetic import Add, Cast, Matmul, Scale
from lineage.layout.operations.base import Operation
from lineage.layout.operations.data import Data
from lineage.layout.operations.each import Each
from lineage.layout.operations.pieces import Concat, Split, Stack, Unstack
from lineage.layout.operations.rearrange import Rearrange
from lineage.layout.operations.selection import Pad, Slice, Take

__all__ = [
    "OPERATIONS",
    "Add",
    "Cast",
    "Concat",
    "Data",
    "Each",
    "Matmul",
    "Operation",
    "Pad",
    "Rearrange",
    "Scale",
    "Slice",
    "Split",
    "Stack",
    "Take",
    "Unstack",
]

#: every operation by its word; `rearrange` is written as a bare pattern
OPERATIONS: dict[str, type[Operation]] = {
    kind.word: kind
    for kind in (Rearrange, Each, Concat, Split, Slice, Stack, Unstack, Take, Pad, Scale, Add, Cast, Matmul)
}
