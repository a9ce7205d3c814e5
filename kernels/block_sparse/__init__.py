"""Attention over chosen blocks of keys: the plan types, the key views and the functions that run them."""

from accel.kernels.block_sparse.api import block_sparse_attention, dense_attention, dispatches
from accel.kernels.block_sparse.keys import ContiguousKeys, KeyView, PagedKeys
from accel.kernels.block_sparse.plan import BlockPlan, ImplicitPlan, ListPlan, VerticalSlashPlan
from accel.kernels.block_sparse.ragged import Ragged, Rows

__all__ = [
    "BlockPlan",
    "ContiguousKeys",
    "ImplicitPlan",
    "KeyView",
    "ListPlan",
    "PagedKeys",
    "Ragged",
    "Rows",
    "VerticalSlashPlan",
    "block_sparse_attention",
    "dense_attention",
    "dispatches",
]
