"""The FlashAttention backend of vLLM with our kernels for what a method makes sparse."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accel.kernels.block_sparse import KeyView
from accel.patches.hosts.vllm.attention.layouts import joint_keys
from accel.patches.hosts.vllm.attention.mixins import SparseBuilder, SparseImpl, is_asked
from accel.patches.hosts.vllm.compat import FlashAttentionBackend, FlashAttentionImpl, FlashAttentionMetadataBuilder


class SparseFlashBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """vLLM's FlashAttention metadata, with the work of our layers."""

    plain = FlashAttentionMetadataBuilder


class SparseFlashImpl(SparseImpl, FlashAttentionImpl):
    """vLLM's FlashAttention, with our kernels in front."""

    head_size: int

    def keys(self, layer: Any, kv_cache: Tensor, table: Tensor, kv_len: Tensor) -> KeyView:
        return joint_keys(kv_cache, self.head_size, table, kv_len)


class AccelFlashAttention(FlashAttentionBackend):
    """vLLM's FlashAttention backend; where an engine asks for a sparse method, its implementation and metadata are ours."""

    @staticmethod
    def get_impl_cls() -> Any:
        return SparseFlashImpl if is_asked(None) else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return SparseFlashBuilder
