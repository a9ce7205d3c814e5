"""Attention over KV heads that hold different numbers of entries, in a few dense groups: caches compressed by head type."""

from accel.kernels.head_grouped.api import dispatches, grouped_attention
from accel.kernels.head_grouped.groups import KVGroup

__all__ = ["KVGroup", "dispatches", "grouped_attention"]
