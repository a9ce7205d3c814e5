"""What is refused before any weight is loaded, and the options of the engine where nothing is."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from accel.errors import UnsupportedError
from accel.patches.hosts.vllm import compat
from accel.patches.hosts.vllm.engine import describe
from accel.patches.hosts.vllm.host import refusals
from accel.patches.hosts.vllm.models import ARCHITECTURES
from accel.patches.hosts.vllm.options import engine_options
from accel.patching import check_together
from accel.protocols import Method, ModelInfo, SparseAttention, TokenPruning

logger = logging.getLogger("accel")

HOST = "vllm"
# in the order in which they are chosen where the user named none; vLLM takes one that we do not stand in front of on some GPUs
CUDA_BACKENDS = ("FLASH_ATTN", "TRITON_ATTN")


def prepare(model: str, methods: Sequence[Method], given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a vLLM engine that runs these methods on `model`, on top of those `given` (names of vLLM's EngineArgs), which stay.

    Reads the configuration of the model, no weights. UnsupportedError, with all reasons, for what cannot work in vLLM, with this model or with these
    options; OptionError for options that stand in the way.
    """
    check_methods(methods)
    compat.require_vllm()
    names = ", ".join(m.method_name() for m in methods)
    config = model_config(model, given)
    info = describe(config)
    architecture = str(config.hf_config.architectures[0])
    reasons = [_of(m, reason) for m in methods for reason in m.supports(info, HOST, [o for o in methods if o is not m])]
    reasons += [*_layer_reasons(methods, info), *_attention_reasons(methods, config, given), *_picture_reasons(methods, config, given)]
    reasons += connector_reasons(methods, given)
    _refuse(f"cannot serve {model} with {names}:", reasons)
    replacement = ARCHITECTURES.get(architecture) if any(isinstance(m, TokenPruning) for m in methods) else None
    own = {**_chosen_backend(methods, config, given), **_validated(methods, config, given)}
    return engine_options(methods, {**given, **own}, replacement.name if replacement else None)


def check_methods(methods: Sequence[Method]) -> None:
    """Raises UnsupportedError for methods that vLLM runs in no model, or in none beside each other. Needs no vLLM."""
    check_together(methods)
    _refuse(f"vLLM cannot run {', '.join(m.method_name() for m in methods)}:", [_of(m, reason) for m in methods for reason in refusals(m)])


def model_config(model: str, given: Mapping[str, Any]) -> Any:
    """vLLM's `ModelConfig`: sizes, architecture and dtype as the engine will have them. UnsupportedError where vLLM does not take the model."""
    known = {f.name for f in fields(compat.EngineArgs)}
    # options of other parts, in shapes that `LLM` takes and EngineArgs does not, say nothing of the model
    about_model = {name: value for name, value in given.items() if name in known and value is not None and not name.endswith("_config")}
    try:
        return compat.EngineArgs(**{**about_model, "model": model}).create_model_config()
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"vLLM cannot take the model {model!r}:", [_first_line(error)]) from error


def connector_reasons(methods: Sequence[Method], given: Mapping[str, Any]) -> Iterable[str]:
    """Why these options would share with other servers what a recipe has changed. What is shared is found by hashes that do not know the recipe."""
    # the name of an option, where one is given; LMCache is a server of its own, which others may ask too
    has_lmcache = given.get("kv_offloading_size") and given.get("kv_offloading_backend") == "lmcache"
    if name := "kv_transfer_config" if given.get("kv_transfer_config") else "kv_offloading_backend" if has_lmcache else None:
        yield (
            f"{name} is given: keys and values are handed on under hashes of tokens and pictures, and a server without this recipe has others under "
            "the same hashes; leave it out"
        )
    if given.get("ec_transfer_config") and any(isinstance(m, TokenPruning) for m in methods):
        yield (
            "ec_transfer_config is given: encoded pictures are handed on under hashes of their pixels, and a server without this recipe has other "
            "rows under the same hashes; leave it out"
        )


def _layer_reasons(methods: Sequence[Method], info: ModelInfo) -> Iterable[str]:
    for method in methods:
        if isinstance(method, SparseAttention) and (missing := sorted(i for i in method.dense_layers if i >= info.n_layers)):
            yield f"dense_layers names {', '.join(map(str, missing))}, but the model has {info.n_layers} layers"


def _attention_reasons(methods: Sequence[Method], config: Any, given: Mapping[str, Any]) -> Iterable[str]:
    """Why sparse attention would run in no layer of this engine."""
    if not any(isinstance(m, SparseAttention) for m in methods):
        return
    if config.use_mla:
        yield "the model has multi-head latent attention, whose compressed keys have no blocks to choose from"
    cache, dtype = str(given.get("kv_cache_dtype") or "auto"), str(config.dtype).removeprefix("torch.")
    if cache not in ("auto", dtype):
        yield f"kv_cache_dtype is {cache}: the sparse kernels read keys in the model's {dtype}, neither quantised nor cast; leave it at auto"
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (given.get(name) or 1) > 1:
            yield f"{name} is {given[name]}: keys of one prompt would lie on several devices"
    platform = compat.current_platform
    if not (platform.is_cpu() or platform.is_cuda()):
        yield f"sparse attention runs in vLLM on CPUs and on CUDA, not on {platform.device_name}"
    elif (reason := _backend_reason(config, _asked_backend(given))) is not None:
        yield reason


def _backend_reason(config: Any, asked: str | None) -> str | None:
    """Why no attention backend of ours fits: the one asked for is a stranger, or none takes heads of this size."""
    size = config.get_head_size()
    if compat.current_platform.is_cpu():
        # vLLM has one backend there and does not look at --attention-backend
        sizes = compat.CPUAttentionBackend.get_supported_head_sizes()
        return None if size in sizes else f"heads of {size} do not fit vLLM's attention on CPUs, which takes {', '.join(map(str, sizes))}"
    if asked is not None and asked not in CUDA_BACKENDS:
        return f"attention_backend is {asked}, and accel stands in front of {' and '.join(CUDA_BACKENDS)}; leave it out to have one chosen"
    candidates = CUDA_BACKENDS if asked is None else (asked,)
    spans = ", with pictures whose tokens see each other," if config.is_mm_prefix_lm else ""
    return None if _fitting(candidates, config) else f"heads of {size} in {config.dtype}{spans} fit none of {', '.join(candidates)} on this GPU"


def _fitting(candidates: Sequence[str], config: Any) -> list[str]:
    """Those of the backends that take this model's heads, dtype and spans without a causal mask on this GPU: vLLM does not start with another one."""
    capability = compat.current_platform.get_device_capability()
    backends = {name: compat.AttentionBackendEnum[name].get_class() for name in candidates}
    size, dtype = config.get_head_size(), config.dtype
    return [
        name for name, backend in backends.items()
        if backend.supports_head_size(size) and backend.supports_dtype(dtype) and backend.supports_compute_capability(capability)
        and (backend.supports_mm_prefix() or not config.is_mm_prefix_lm)
    ]  # fmt: skip


def _asked_backend(given: Mapping[str, Any]) -> str | None:
    """The name of the attention backend in the user's options, or None."""
    inside = given.get("attention_config") or {}
    asked = given.get("attention_backend") or (inside.get("backend") if isinstance(inside, Mapping) else getattr(inside, "backend", None))
    return None if asked is None else str(getattr(asked, "name", asked)).upper()


def _chosen_backend(methods: Sequence[Method], config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The option that names our backend on CUDA, where the user named none: vLLM's own choice may be one that we do not stand in front of."""
    is_asked = any(isinstance(m, SparseAttention) for m in methods)
    if not is_asked or not compat.current_platform.is_cuda() or _asked_backend(given) is not None:
        return {}
    [chosen, *_] = _fitting(CUDA_BACKENDS, config)
    logger.info("accel: attention backend %s", chosen)
    return {"attention_backend": chosen}


def _validated(methods: Sequence[Method], config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """The option that has vLLM refuse requests that an exit inside the model cannot answer."""
    from accel.patches.hosts.vllm.models.exit_checks import exit_layer

    info = describe(config)
    # pooling models sample nothing, and take no processors
    if config.runner_type != "generate" or exit_layer([m.bind(info) for m in methods], info) is None:
        return {}
    from accel.patches.hosts.vllm.models.exit_requests import PATH

    return {"logits_processors": [*(given.get("logits_processors") or []), PATH]}


def _picture_reasons(methods: Sequence[Method], config: Any, given: Mapping[str, Any]) -> Iterable[str]:
    """Why visual tokens cannot leave this model, in front of its decoder or inside it."""
    if not any(isinstance(m, TokenPruning) for m in methods):
        return []
    architecture = config.hf_config.architectures[0]
    if architecture not in ARCHITECTURES:
        return [f"visual tokens can leave {', '.join(ARCHITECTURES)} in vLLM; the model is a {architecture}"]
    from accel.patches.hosts.vllm.models import counts, exit_checks

    info = describe(config)
    bound = [m.bind(info) for m in methods]
    return [*counts.why_not(config.hf_config, info, bound), *exit_checks.why_not(bound, info, given)]


def _of(method: Method, reason: str) -> str:
    return f"{method.method_name()}: {reason}"


def _refuse(message: str, reasons: Sequence[str]) -> None:
    if reasons:
        raise UnsupportedError(message, list(reasons))


def _first_line(error: Exception) -> str:
    """What an error of vLLM or pydantic says in one line: the latter's first line only counts errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = lines[1:] if len(lines) > 1 and "validation error" in lines[0] else lines
    return told[0] if told else type(error).__name__
