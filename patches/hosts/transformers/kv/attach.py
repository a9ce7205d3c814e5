"""Puts a KV-compression method into a text decoder: its cache layers lose entries behind attention, and attention reads what is left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import Hook, Mark, outside_graph
from accel.patches.hosts.transformers.dispatch import original_of, register
from accel.patches.hosts.transformers.implementation import switch_implementation
from accel.patches.hosts.transformers.kv.layer import CompressedLayer
from accel.patches.hosts.transformers.kv.slot import KV_SLOT, KVSlot, Runtime
from accel.patches.hosts.transformers.pruning.cache import LogicalLayer
from accel.patches.hosts.transformers.pruning.decoder import cache_of
from accel.protocols import UNLIMITED, KVCompression, ModelInfo

MARK = "_accel_cache"
# on a cache object: what its layers share, for methods that divide one budget among them
SHARED = "_accel_shared"


def compress_caches(
    base: Any, modules: list[nn.Module], method: KVCompression, info: ModelInfo, handle: Handle, *,
    why_skipped: Callable[[nn.Module, int], str | None],
) -> None:  # fmt: skip
    """Attaches the method to every layer with a cache that grows. why_skipped: names the reason where a layer's attention is of another kind."""
    runtime = Runtime(method, info, handle)
    if all(group.budget >= UNLIMITED for layer in range(info.n_layers) for group in method.groups(info, layer, step=0, n_entries=1)):
        handle.notices.append(f"{method.method_name()}: keeps every cache entry with these options; nothing was changed for it")
        return
    for module in modules:
        layer: int = module.layer_idx   # type: ignore[assignment]
        if (reason := why_skipped(module, layer) or _why_shared(module)) is not None:
            handle.skipped_layers[layer] = f"cache left whole: {reason}"
            continue
        config: Any = module.config
        original = original_of(config._attn_implementation) or config._attn_implementation
        switch_implementation(config, register(original), handle)
        runtime.first = layer if runtime.first is None else runtime.first
        slot = KVSlot(runtime, layer)
        handle.set_attr(module, KV_SLOT, slot)
        handle.on_undo(module.register_forward_pre_hook(Hook(partial(_begin, slot)), with_kwargs=True).remove)
        handle.on_undo(module.register_forward_hook(Hook(partial(_end, slot)), with_kwargs=True, always_call=True).remove)
        if layer not in handle.patched_layers:
            handle.patched_layers.append(layer)
    for layer in set(range(info.n_layers)).difference(handle.patched_layers, handle.skipped_layers):
        kind = info.layer_types[layer]
        reason = "its attention does not go through transformers' interface" if kind == "full_attention" else kind.replace("_", " ")
        handle.skipped_layers[layer] = f"cache left whole: {reason}"
    handle.set_attr(base, MARK, Mark([method.method_name()]))
    handle.on_pause(partial(setattr, runtime, "is_on"))
    _hook_prompt(base, runtime, handle)


def _why_shared(module: nn.Module) -> str | None:
    """Why other layers would miss what this one drops, or the other way round, or None."""
    if not hasattr(module, "is_kv_shared_layer"):
        is_shared = "shared_kv_states" in inspect.signature(type(module).forward).parameters
    else:
        is_shared = bool(module.is_kv_shared_layer or getattr(module, "store_full_length_kv", False))
    return "layers share its keys and values" if is_shared else None


def _begin(slot: KVSlot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    outside_graph(_bind, slot, module, args, kwargs)


def _end(slot: KVSlot, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    outside_graph(slot.bind, None, None)


def _bind(slot: KVSlot, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes the layer of the call's cache one that can lose entries, and names it to the attention function."""
    slot.bind(None, None)
    runtime, cache = slot.runtime, _cache_among(args, kwargs)
    if runtime is None or not runtime.is_on or cache is None:
        return
    if original_of(module.config._attn_implementation) is None:
        # another attention was set meanwhile, which knows nothing of what is left in a compressed cache
        return
    if (reason := _why_unsupported(cache, slot.layer)) is not None:
        raise UnsupportedError(f"{runtime.method.method_name()} cannot drop entries of {reason}; use DynamicCache, or pause the handle")
    shared = vars(cache).setdefault(SHARED, {})
    layer = _compressed_layer(cache, slot.layer)
    if slot.layer == runtime.first and not layer.is_counted:
        # a new cache, or one that was emptied
        layer.is_counted = True
        shared.clear()
        runtime.stats.begin()
    if runtime.pass_text is not None:
        layer.spare(runtime.pass_text)
    slot.bind(layer, shared)


def _cache_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The cache among an attention module's arguments, whose names differ between families."""
    found = cache_of(kwargs)
    return next((value for value in (*kwargs.values(), *args) if isinstance(value, Cache)), None) if found is None else found


def _compressed_layer(cache: Any, number: int) -> CompressedLayer:
    """The cache's layer as one of ours; a stock layer is replaced, its entries taken over."""
    while len(cache.layers) <= number:
        cache.layers.append((getattr(cache, "layer_class_to_replicate", None) or DynamicLayer)())
    found = cache.layers[number]
    if not isinstance(found, CompressedLayer):
        found = cache.layers[number] = CompressedLayer(found)
    return found


def _why_unsupported(cache: Any, number: int) -> str | None:
    """Why entries cannot be dropped of this layer of a cache, or None."""
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    if not hasattr(cache, "layers"):
        return f"a {type(cache).__name__}"
    # a cache that grows by layers makes the next one of this class
    kind = type(cache.layers[number]) if number < len(cache.layers) else getattr(cache, "layer_class_to_replicate", None) or DynamicLayer
    return None if kind in (DynamicLayer, LogicalLayer, CompressedLayer) else f"a {getattr(kind, '__name__', kind)}"


def _hook_prompt(base: Any, runtime: Runtime, handle: Handle) -> None:
    """Has the text of a prompt with pictures named to methods that spare it."""
    tokens = [getattr(base.config, name, None) for name in ("image_token_id", "image_token_index", "video_token_id", "video_token_index")]
    visual = sorted({token for token in tokens if isinstance(token, int)})
    if not visual:
        return

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        runtime.pass_text = None
        if runtime.is_on and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1:
            runtime.pass_text = torch.isin(ids, torch.tensor(visual, device=ids.device), invert=True)

    def forget(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        runtime.pass_text = None

    def before(*call: Any) -> None:
        outside_graph(note, *call)

    def behind(*call: Any) -> None:
        outside_graph(forget, *call)

    handle.on_undo(base.register_forward_pre_hook(Hook(before), with_kwargs=True).remove)
    handle.on_undo(base.register_forward_hook(Hook(behind), with_kwargs=True, always_call=True).remove)
