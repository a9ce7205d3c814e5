"""The Triton backend of vLLM with our kernels for what a method makes sparse."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accel.kernels.block_sparse import KeyView
from accel.patches.hosts.vllm.attention.layouts import joint_keys
from accel.patches.hosts.vllm.attention.mixins import SparseBuilder, SparseImpl, is_asked
from accel.patches.hosts.vllm.compat import TritonAttentionBackend, TritonAttentionImpl, TritonAttentionMetadataBuilder


class SparseTritonBuilder(SparseBuilder, TritonAttentionMetadataBuilder):
    """vLLM's Triton metadata, with the work of our layers."""

    plain = TritonAttentionMetadataBuilder


class SparseTritonImpl(SparseImpl, TritonAttentionImpl):
    """vLLM's Triton attention, with our kernels in front."""

    head_size: int

    def keys(self, layer: Any, kv_cache: Tensor, table: Tensor, kv_len: Tensor) -> KeyView:
        return joint_keys(kv_cache, self.head_size, table, kv_len)


class AccelTritonAttention(TritonAttentionBackend):
    """vLLM's Triton backend; where an engine asks for a sparse method, its implementation and metadata are ours."""

    @staticmethod
    def get_impl_cls() -> Any:
        return SparseTritonImpl if is_asked(None) else TritonAttentionImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return SparseTritonBuilder
