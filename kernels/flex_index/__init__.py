"""FlexPrefill's index: which key blocks each query block reads, found from the attention of the last queries."""

from accel.kernels.flex_index.api import flex_index
from accel.kernels.flex_index.result import FlexIndex, HeadDiagnostics
from accel.kernels.flex_index.rule import SelectionRule

__all__ = ["FlexIndex", "HeadDiagnostics", "SelectionRule", "flex_index"]
