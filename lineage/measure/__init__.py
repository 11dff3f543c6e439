"""Measuring: the figures of tensor pairs, of groups, layers and whole checkpoints (`compare`)."""

from lineage.measure.compare import Comparison, TensorRow, compare, compare_mapped
from lineage.measure.metrics import Metrics

__all__ = ["Comparison", "Metrics", "TensorRow", "compare", "compare_mapped"]
