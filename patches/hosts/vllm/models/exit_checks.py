"""Whether visual tokens can leave inside the decoder of an engine: read from its options, before anything is loaded. Needs neither vLLM nor torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.protocols import Method, ModelInfo, SparseAttention, TokenPruning, Unit

_ANY = Unit(0, 4, 2, 2)
# what must be 1: the rows or the entries of a request would lie in several places
_ONE = {
    "pipeline_parallel_size": "a later stage does not know which rows are missing",
    "decode_context_parallel_size": "entries that move up would belong to another rank",
    "prefill_context_parallel_size": "entries that move up would belong to another rank",
    "ubatch_size": "parts of a batch run at a time, and the exit keeps one step in mind",
}
_IN_USE = {
    "kv_transfer_config": "a connector would hand on entries that no longer stand where their tokens do",
    "kv_offloading_size": "offloaded entries are found by their tokens, and no longer stand where their tokens do",
    "speculative_config": "a draft model is given the rows of tokens that have left; drop it",
    "enable_lora": "adapters are chosen row by row for all rows of a step, and fewer reach the layers behind the exit",
    "enable_dbo": "halves of a batch run at a time, and the exit keeps one step in mind",
    "kv_sharing_fast_prefill": "it drops rows of its own",
    "enable_prompt_embeds": "in a prompt with a picture embedded text is marked as visual tokens are, and would leave with them; drop it",
}


def exit_layer(methods: Sequence[Method], info: ModelInfo) -> int | None:
    """The first decoder layer that no visual token reaches, where that is known before anything runs; None where they stay. Methods are bound."""
    layers = [
        stage.layer for method in methods if isinstance(method, TokenPruning) for stage in method.stages(info)
        if stage.layer is not None and stage.is_known_ahead and method.count(stage, [_ANY]) == [0]
    ]  # fmt: skip
    return min(layers, default=None)


def why_not(methods: Sequence[Method], info: ModelInfo, options: Mapping[str, Any]) -> list[str]:
    """Why an engine with these options cannot let visual tokens leave behind a layer; empty where it can, or where none leave there.

    methods: bound. options: of the engine, by the names of vLLM's `EngineArgs`; what is missing has vLLM's default.
    """
    if exit_layer(methods, info) is None:
        return []
    found = []
    # on unless it is turned off
    if options.get("enable_prefix_caching") is not False:
        found.append(
            "prefix caching is on: behind the exit a block no longer holds the tokens that it is found by; "
            "give enable_prefix_caching=False (--no-enable-prefix-caching)"
        )
    if not options.get("enforce_eager"):
        found.append("rows leave inside the model, and compiled code and CUDA graphs fix their number: give enforce_eager=True (--enforce-eager)")
    found += [f"{name}={options[name]}: {why}; give 1" for name, why in _ONE.items() if (options.get(name) or 1) > 1]
    found += [f"{name} is given: {why}" for name, why in _IN_USE.items() if options.get(name)]
    found += [
        f"{method.method_name()} beside it: block patterns are planned for all tokens of a step, not for those that are left behind the exit"
        for method in methods if isinstance(method, SparseAttention)
    ]  # fmt: skip
    others = sorted({kind for kind in info.layer_types if kind != "full_attention"})
    if others:
        found.append(f"the model has layers with {', '.join(others)}, whose entries cannot move up; all must be full_attention")
    return found


def resolved_options(vllm_config: Any) -> dict[str, Any]:
    """Those options that `why_not` reads, as an engine that is being built has them (`VllmConfig`)."""
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    cache = vllm_config.cache_config
    return {
        "enable_prefix_caching": cache.enable_prefix_caching,
        "enforce_eager": compilation.mode.name == "NONE" and compilation.cudagraph_mode.name == "NONE",
        "kv_transfer_config": vllm_config.kv_transfer_config,
        "kv_offloading_size": cache.kv_offloading_size,
        "speculative_config": vllm_config.speculative_config,
        "enable_lora": vllm_config.lora_config is not None,
        "enable_dbo": parallel.enable_dbo,
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "enable_prompt_embeds": vllm_config.model_config.enable_prompt_embeds,
        **{name: getattr(parallel, name) for name in _ONE},
    }
