"""Which attention layers of a vLLM model a method may thin out, and what is known of each before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from accel.kernels.block_sparse.executors import TRITON_MAX_HEAD_DIM, why_no_executor
from accel.patches.hosts.vllm.attention.group import Group
from accel.patches.hosts.vllm.attention.layer import SparseLayer
from accel.patches.hosts.vllm.attention.rows import Decoding, LayerRule, decoding_of
from accel.patches.hosts.vllm.engine import Engine, engine_of
from accel.protocols import SparseAttention


def group_of(builder: Any, *, is_ours: bool) -> Group | None:
    """The layers of one of vLLM's metadata builders, or None where its engine did not ask for a sparse method. Tells the engine of them.

    is_ours: whether vLLM uses our builder as it is; it derives others from it that cut requests up in their own way.
    """
    from accel.patches.hosts.vllm.compat import Attention, get_layers_from_vllm_config

    config = builder.vllm_config
    engine = engine_of(config)
    if engine is None or engine.attention is None:
        return None
    layers = []
    for name, layer in get_layers_from_vllm_config(config, Attention, builder.layer_names).items():
        index = layer_index(name)
        why = None if is_ours else f"metadata of its own kind ({type(builder).__name__})"
        found = _layer(engine, engine.attention, layer, index, builder, why)
        engine.backends.add(layer.attn_backend.get_name())
        note(engine, index, found.rule.reason)
        layers.append(found)
        if found.rule.reason is None:
            layer.impl.accel = found
            note_chunks(engine, found.rule, config)
    note_never_sparse(engine, [layer.rule for layer in layers if layer.rule.reason is None], config.model_config.max_model_len)
    scheduler, compilation = config.scheduler_config, config.compilation_config
    most = max(scheduler.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
    return Group(layers, builder.device, most_rows=most, is_speculative=config.speculative_config is not None)


def note(engine: Engine, index: int, reason: str | None) -> None:
    """Tells the engine whether a layer runs the method, or why not. A layer with several attentions counts as patched where one is."""
    if reason is None:
        engine.patched.add(index)
        engine.skipped.pop(index, None)
    elif index not in engine.patched:
        engine.skipped[index] = reason


def note_chunks(engine: Engine, rule: LayerRule, config: Any) -> None:
    """Tells the engine where prompts are planned chunk by chunk though whole ones would be planned otherwise."""
    longest, scheduler = config.model_config.max_model_len, config.scheduler_config
    if scheduler.enable_chunked_prefill and follows_chunks(rule, longest) and rule.why_dense(longest, longest) is None:
        engine.notices.add(
            f"{rule.method.method_name()} plans the chunks that the scheduler cuts, up to {scheduler.max_num_batched_tokens} tokens and fewer beside "
            "other requests; enable_chunked_prefill=False (--no-enable-chunked-prefill) plans prompts whole"
        )


def follows_chunks(rule: LayerRule, longest: int) -> bool:
    """Whether a prompt in chunks is planned otherwise than a whole one: from its keys, or by a pattern that depends on how many queries come."""
    method, n = rule.method, max(1, longest // 2)
    whole = method.static_pattern(rule.step(longest, longest))
    return whole is None or whole != method.static_pattern(rule.step(n, longest))


def note_never_sparse(engine: Engine, rules: Sequence[LayerRule], longest: int) -> None:
    """Tells the engine where no request of up to `longest` tokens would run sparse in layers that could."""
    reasons = {(q_len, rule.why_dense(q_len, longest)) for rule in rules for q_len in (longest, 1)}
    if reasons and all(reason is not None for _, reason in reasons):
        whole = ", ".join(sorted(reason for q_len, reason in reasons if q_len > 1 and reason is not None))
        engine.notices.add(
            f"{rules[0].method.method_name()} runs nothing sparse here: even a prompt of max_model_len, {longest} tokens, stays dense ({whole}); "
            "min_seq_len sets the length from which it does not"
        )


def is_static(rule: LayerRule, config: Any) -> bool:
    """Whether the method plans from lengths alone."""
    longest = config.model_config.max_model_len
    return rule.method.static_pattern(rule.step(longest, longest)) is not None


def note_foreign_layers(config: Any, engine: Engine) -> None:
    """Tells the engine of attention layers that run on a backend none of ours stands in front of."""
    from accel.patches.hosts.vllm.compat import AttentionLayerBase, get_layers_from_vllm_config

    if engine.attention is None:
        return
    for name, layer in get_layers_from_vllm_config(config, AttentionLayerBase).items():
        index = layer_index(name)
        if index not in engine.patched and index not in engine.skipped:
            engine.skipped[index] = f"runs on {layer.get_attn_backend().get_name()}, which accel does not stand in front of"


def layer_index(name: str) -> int:
    """The number of the decoder layer in the name of an attention layer; −1 where there is none, as in drafts, which number their own layers."""
    if is_draft(name):
        return -1
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def is_draft(name: str) -> bool:
    """Whether an attention layer belongs to what drafts tokens: a model of its own, or heads for several tokens (multi-token prediction)."""
    return name.startswith("draft") or any(part.startswith("mtp") for part in name.split("."))


def _layer(engine: Engine, method: SparseAttention, layer: Any, index: int, builder: Any, why: str | None) -> SparseLayer:
    config, impl = builder.vllm_config, layer.impl
    info, device = engine.info, builder.device
    rule = LayerRule(
        method, index, info.n_layers, n_heads=layer.num_heads, n_kv_heads=layer.num_kv_heads, head_dim=layer.head_size,
        device=device.type, dtype=str(config.model_config.dtype).removeprefix("torch."), max_positions=info.max_positions,
        reason=why or why_never(layer, index, config, engine.info.n_layers, device) or impl.why_no_keys(layer),
        runs_dense_itself=method.dense_kernel == "accel" and device.type == "cpu",
    )  # fmt: skip
    if rule.reason is None:
        rule = replace(rule, decoding=_decoding(rule, builder))
    # pages that come from elsewhere, or from another layer, are written without this layer being told
    is_alone = config.kv_transfer_config is None and layer.kv_sharing_target_layer_name is None
    return SparseLayer(rule, float(impl.scale), engine.stats, keeps_means=is_alone and not is_static(rule, config))


def _decoding(rule: LayerRule, builder: Any) -> Decoding:
    config = builder.vllm_config
    if config.speculative_config is not None:
        return Decoding(reason="speculative decoding")
    if rule.runs_dense_itself:
        return Decoding()
    has_graphs = rule.device != "cpu" and config.compilation_config.cudagraph_mode.has_full_cudagraphs()
    return decoding_of(rule, longest=config.model_config.max_model_len, page_size=builder.kv_cache_spec.block_size, has_graphs=has_graphs)


def why_never(layer: Any, index: int, config: Any, n_layers: int, device: torch.device) -> str | None:
    """Why a layer never runs sparse here, or None (vllm-integration.md §4)."""
    from accel.patches.hosts.vllm.compat import Attention, AttentionType, is_quantized_kv_cache

    impl, model_config = layer.impl, config.model_config
    dtype, cached = model_config.dtype, layer.kv_cache_torch_dtype
    found: list[tuple[Any, str]] = [
        (not hasattr(impl, "why_no_keys"), f"attention by {type(impl).__name__}, which accel does not stand in front of"),
        (type(layer) is not Attention, f"{type(layer).__name__} sees its own part of the keys"),
        (impl.attn_type != AttentionType.DECODER, "no causal self-attention"),
        (layer.sliding_window is not None, "sliding window"),
        (model_config.rswa_window is not None, "sliding window behind the prompt"),
        (impl.sinks is not None, "attention sinks"),
        (impl.alibi_slopes is not None, "ALiBi"),
        (impl.logits_soft_cap, "soft cap"),
        (getattr(impl, "chunk_lookback", -1) > -1, "attention within chunks"),
        (is_quantized_kv_cache(layer.kv_cache_dtype), f"keys in {layer.kv_cache_dtype}"),
        (cached != dtype, f"keys in {cached}, queries in {dtype}"),
        (layer.head_size_v != layer.head_size, "values of another size than keys"),
        (impl.dcp_world_size > 1 or impl.pcp_world_size > 1, "context parallelism"),
        (is_draft(layer.layer_name), "draft model"),
        (not 0 <= index < n_layers, "no layer of the model: a draft, or of another tower"),
    ]
    no_executor = why_no_executor(device, dtype)
    is_wide = device.type == "cuda" and layer.head_size > TRITON_MAX_HEAD_DIM
    found += [(no_executor, str(no_executor)), (is_wide, f"head_dim {layer.head_size} is more than {TRITON_MAX_HEAD_DIM}")]
    return next((reason for holds, reason in found if holds), None)
