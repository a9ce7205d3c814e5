"""The CPU backend of vLLM with our kernels for what a method makes sparse."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from accel.kernels.block_sparse import KeyView
from accel.patches.hosts.vllm.attention.layouts import TiledKeys, plain_pages, sides
from accel.patches.hosts.vllm.attention.mixins import SparseBuilder, SparseImpl, is_asked
from accel.patches.hosts.vllm.attention.pooled import PageMeans, PooledKeys
from accel.patches.hosts.vllm.compat import CPUAttentionBackend, CPUAttentionBackendImpl, CPUAttentionMetadataBuilder

# instruction sets under which keys lie transposed in their page, and values as they are
_PLAIN = ("vec", "vec16")
_TILED = "amx"


class SparseCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """vLLM's CPU metadata, with the work of our layers."""

    plain = CPUAttentionMetadataBuilder


class SparseCPUImpl(SparseImpl, CPUAttentionBackendImpl):
    """vLLM's CPU attention, with our kernels in front."""

    pool: PageMeans | None = None

    def keys(self, layer: Any, kv_cache: Tensor, table: Tensor, kv_len: Tensor) -> KeyView:
        if self.pool is None and self.accel is not None and self.accel.keeps_means:
            n_pages, n_heads, _, twice = kv_cache.shape
            self.pool = PageMeans.empty(n_pages, n_heads, twice // 2)
        if layer.isa == _TILED:
            return TiledKeys(*sides(kv_cache), table, kv_len, self.pool)
        return PooledKeys(*plain_pages(kv_cache), table, kv_len, self.pool)

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """vLLM's own; the means of pages that are written to are forgotten."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        if self.pool is not None:
            self.pool.forget(slot_mapping, kv_cache.shape[2])

    def why_no_keys(self, layer: Any) -> str | None:
        # vLLM's builder has chosen it when this is asked
        return None if layer.isa in (*_PLAIN, _TILED) else f"keys laid out for {layer.isa}"


class AccelCPUAttention(CPUAttentionBackend):
    """vLLM's CPU backend; where an engine asks for a sparse method, its implementation and metadata are ours."""

    @staticmethod
    def get_impl_cls() -> Any:
        return SparseCPUImpl if is_asked(None) else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> Any:
        return SparseCPUBuilder
