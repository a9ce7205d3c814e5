"""What our subclasses of vLLM's metadata builders and attention implementations share. Without a sparse method they do what vLLM's do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from accel.patches.hosts.vllm.attention.eligible import group_of
from accel.patches.hosts.vllm.attention.group import Group
from accel.patches.hosts.vllm.compat import AttentionCGSupport, get_current_vllm_config_or_none, set_current_vllm_config
from accel.patches.hosts.vllm.options import read_options
from accel.protocols import SparseAttention

if TYPE_CHECKING:
    from accel.kernels.block_sparse import KeyView
    from accel.patches.hosts.vllm.attention.layer import SparseLayer

# where a step's work lies in vLLM's metadata
WORK = "accel_work"
_REPLACED = "metadata that another part replaced"
_FUSED = "output quantised inside attention"


def is_asked(vllm_config: Any) -> bool:
    """Whether this configuration, or that of the model under construction where None is given, asks for a sparse method."""
    config = get_current_vllm_config_or_none() if vllm_config is None else vllm_config
    return config is not None and any(isinstance(m, SparseAttention) for m in read_options(config.additional_config))


class SparseBuilder:
    """In front of one of vLLM's metadata builders, `plain`: adds to its metadata what every layer does in the step."""

    plain: ClassVar[type]

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)     # type: ignore[call-arg]
        self._arguments = (kv_cache_spec, layer_names, vllm_config, device)
        self._more: dict[str, Any] = kwargs
        self._context = get_current_vllm_config_or_none()
        self._builders: dict[Any, Any] = {}
        self._is_real = True
        self.group: Group | None = group_of(self, is_ours=type(self) in SparseBuilder.__subclasses__())
        if self.group is not None:
            # vLLM would put another table under ours
            self.supports_update_block_table = False

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> Any:
        """At most graphs of decoding steps: prompts are planned by Python."""
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)     # type: ignore[misc]
        most = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return most if is_asked(vllm_config) and support.value > most.value else support

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        """vLLM's metadata of a step, with the work of our layers."""
        whole = super().build(common_prefix_len, common_attn_metadata, fast_build)      # type: ignore[misc]
        if self.group is None:
            return whole

        def build(key: Any, common: Any) -> Any:
            return self._builder(key).build(common_prefix_len, common, fast_build)

        setattr(whole, WORK, self.group.work(common_attn_metadata, whole, build, counts=self._is_real))
        return whole

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """The same for a graph that is being captured: nothing is counted, and all tables lie where they will lie."""
        self._is_real = False
        try:
            whole = super().build_for_cudagraph_capture(common_attn_metadata)           # type: ignore[misc]
        finally:
            self._is_real = True
        for work in getattr(whole, WORK, {}).values():
            if work.rest is not None and work.rest is not whole:
                # some backends capture with short sequences, which ours must not exceed
                work.rest.seq_lens.copy_(torch.minimum(work.rest.seq_lens, whole.seq_lens))
        return whole

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> Any:
        """vLLM's own: drafts run densely."""
        group, self.group = self.group, None
        try:
            return super().build_for_drafting(common_attn_metadata, draft_index)    # type: ignore[misc]
        finally:
            self.group = group

    def _builder(self, key: Any) -> Any:
        """A builder of vLLM's for one set of metadata: each writes into buffers of its own."""
        if key not in self._builders:
            # a builder reads the configuration in force while it is made
            with set_current_vllm_config(self._context):
                self._builders[key] = self.plain(*self._arguments, **self._more)
        return self._builders[key]


class SparseImpl:
    """In front of one of vLLM's attention implementations: runs a step's work. Its builder hands it its layer."""

    accel: SparseLayer | None = None

    def forward(
        self, layer: Any, query: Tensor, key: Tensor | None, value: Tensor | None, kv_cache: Tensor, attn_metadata: Any, output: Tensor,
        output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of all requests of a step, into `output`; vLLM's own for those that stay dense."""
        mine = self.accel

        def stock(q: Tensor, metadata: Any, out: Tensor) -> Tensor:
            return super(SparseImpl, self).forward(    # type: ignore[misc,no-any-return]
                layer, q, key, value, kv_cache, metadata, out, output_scale, output_block_scale
            )

        steps = None if mine is None else getattr(attn_metadata, WORK, None)
        if mine is None or attn_metadata is None:
            return stock(query, attn_metadata, output)
        if steps is None or output_scale is not None or output_block_scale is not None:
            mine.stats.dense_calls[_REPLACED if steps is None else _FUSED] += 1
            return stock(query, attn_metadata, output)
        work = steps.get(mine.rule.layer)
        if work is None:
            return stock(query, attn_metadata, output)
        mine.attend(query, lambda table, lens: self.keys(layer, kv_cache, table, lens), work, output, stock=stock)
        return output

    def keys(self, layer: Any, kv_cache: Tensor, table: Tensor, kv_len: Tensor) -> KeyView:
        """The keys and values of some requests in vLLM's cache."""
        raise NotImplementedError

    def why_no_keys(self, layer: Any) -> str | None:
        """Why `keys` cannot read the cache of a layer, or None."""
        return None

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """Never: our kernels write what they compute."""
        return False
