"""What B's weights are to A's, tag by tag: the table `RELATIONS`, and `find_relations` that asks all of it.

Tags are claims about a related pair; each rests on figures that a person can check and says so in one sentence.
"""

from __future__ import annotations

from collections.abc import Callable

from lineage.judge.material import Material
from lineage.judge.relations import shapes, training, values
from lineage.judge.relations.finding import Finding

__all__ = ["RELATIONS", "Finding", "find_relations"]

#: every tag, in the order in which they are printed, with the function that looks for it
RELATIONS: dict[str, Callable[[Material], Finding | None]] = {
    "identical": shapes.identical,
    "renamed": shapes.renamed,
    "fused": shapes.fused,
    "transposed": shapes.transposed,
    "permuted": shapes.permuted,
    "cast": shapes.cast,
    "quantized": values.quantized,
    "noised": values.noised,
    "sparsified": values.sparsified,
    "fine-tuned": training.fine_tuned,
    "partially-tuned": training.partially_tuned,
    "lora-merged": training.lora_merged,
    "continued-pretraining": training.continued_pretraining,
    "depth-pruned": shapes.depth_pruned,
    "depth-grown": shapes.depth_grown,
    "width-pruned": shapes.width_pruned,
    "width-grown": shapes.width_grown,
    "vocabulary-extended": shapes.vocabulary_extended,
    "expert-upcycled": shapes.expert_upcycled,
    "layers-reordered": shapes.layers_reordered,
    "rotated": values.rotated,
    "rescaled": values.rescaled,
    "sign-flipped": values.sign_flipped,
    "partially-shared": training.partially_shared,
    "shared-initialisation": training.shared_initialisation,
}


def find_relations(material: Material) -> list[Finding]:
    """The findings of all relations, in the table's order."""
    found = (material.asked(look) for look in RELATIONS.values())
    return [finding for finding in found if finding is not None]
