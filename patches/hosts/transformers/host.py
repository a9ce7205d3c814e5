"""The way on and off a Hugging Face model (transformers-integration.md §8)."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.errors import PatchError, UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.decoder_config import decoder_sizes
from accel.patches.hosts.identity import fingerprint, is_next_scale, unwrapped
from accel.protocols import KVCompression, Method, ModelInfo, SparseAttention, TokenPruning

if TYPE_CHECKING:
    from torch import nn

ACCEPTS = "a transformers PreTrainedModel, or one wrapped by PEFT"


def matches(model: Any) -> bool:
    """Whether `model` is a transformers model with transformers' attention, bare or inside PEFT. Loads nothing that is not loaded already."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False
    base = unwrapped(model)
    return isinstance(base, transformers.PreTrainedModel) and not is_next_scale(base)


def refusals(method: Method) -> list[str]:
    """Why this host cannot run a method at all."""
    if isinstance(method, SparseAttention | TokenPruning):
        return []
    if isinstance(method, KVCompression) and all(when.moment == "before_attention" for when in method.when):
        return ["it compresses before attention only, which would change what a decoder makes of its prompt"]
    return [] if isinstance(method, KVCompression) else [f"the transformers host does not run {method.kind.replace('_', ' ')} methods"]


def describe(model: Any) -> ModelInfo:
    """The text decoder's sizes as methods see them."""
    from accel.patches.hosts.transformers.layers import attention_modules

    base = unwrapped(model)
    modules = attention_modules(_decoder(base))
    info = ModelInfo(
        **decoder_sizes(base.config),
        device=base.device.type,
        dtype=str(base.dtype).removeprefix("torch."),
        has_cls=_has_cls(base),
        fingerprint=lambda: fingerprint(base),
    )
    # some families keep their heads' width in the layers alone
    head_dim = getattr(modules[0], "head_dim", None) if modules else None
    return replace(info, head_dim=int(head_dim)) if head_dim else info


def attach(model: Any, methods: Sequence[Method], info: ModelInfo, handle: Handle) -> None:
    """Puts a sparse-attention method into every attention layer of the text decoder, and has pruning methods drop visual tokens.

    All changes go through `handle`.
    """
    from accel.patches.hosts.transformers.layers import attention_modules

    base = unwrapped(model)
    decoder = _decoder(base)
    modules = attention_modules(decoder)
    _refuse_unpatchable(base, decoder, modules)
    for method in methods:
        if isinstance(method, SparseAttention):
            _patch_attention(base, modules, method, info, handle)
        if isinstance(method, KVCompression):
            from accel.patches.hosts.transformers.kv.attach import compress_caches

            compress_caches(base, modules, method, replace(info, fingerprint=None), handle, why_skipped=partial(_why_skipped, info))
    pruning = [method for method in methods if isinstance(method, TokenPruning)]
    if pruning:
        from accel.patches.hosts.transformers.pruning.attach import prune_tokens

        prune_tokens(base, decoder, modules, pruning, replace(info, fingerprint=None), handle)


def _patch_attention(base: nn.Module, modules: list[nn.Module], method: SparseAttention, info: ModelInfo, handle: Handle) -> None:
    from accel.patches.hosts.transformers.dispatch import original_of, register
    from accel.patches.hosts.transformers.implementation import switch_implementation
    from accel.patches.hosts.transformers.layers import SLOT, LayerState, Slot, add_layer, original_attention, remove_layer

    # the fingerprint function holds the model, and the layers' states must not
    info = replace(info, fingerprint=None)
    slots = []
    for module in modules:
        current: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
        original = original_of(current) or current
        function = original_attention(module, original)
        if function is None:
            raise UnsupportedError(f"{type(module).__name__} runs {original!r}, which accel cannot call as a fallback")
        layer: int = module.layer_idx  # type: ignore[assignment]
        state = LayerState(
            method=method, module=weakref.ref(module), layer=layer, info=info, original=original,
            original_function=function, handle_ref=weakref.ref(handle), skip_reason=_why_skipped(info, module, layer),
        )  # fmt: skip
        slot = Slot(add_layer(state), handle)
        slots.append(slot)
        # a model thrown away while patched must not leave its state behind
        handle.on_undo(weakref.finalize(module, remove_layer, slot.key))
        handle.set_attr(module, SLOT, slot)
        switch_implementation(module.config, register(original), handle)
        if state.skip_reason is None:
            handle.patched_layers.append(layer)
        else:
            handle.skipped_layers[layer] = state.skip_reason

    for layer in set(range(info.n_layers)).difference(handle.patched_layers, handle.skipped_layers):
        handle.skipped_layers[layer] = _why_no_module(info.layer_types[layer])

    def switch(is_on: bool) -> None:
        for slot in slots:
            slot.is_on = is_on

    handle.on_pause(switch)


def _why_skipped(info: ModelInfo, module: nn.Module, layer: int) -> str | None:
    kind = info.layer_types[layer] if layer < len(info.layer_types) else "full_attention"
    if kind == "sliding_attention" or (getattr(module, "sliding_window", None) is not None and getattr(module, "is_sliding", True)):
        return "sliding window"
    if kind != "full_attention":
        return kind.replace("_", " ")
    return None if getattr(module, "is_causal", True) else "attention is not causal"


def _why_no_module(kind: str) -> str:
    """Why a layer has no attention to patch: it is linear, convolutional, …"""
    return "its attention does not go through transformers' interface" if kind == "full_attention" else kind.replace("_", " ")


def _refuse_unpatchable(base: nn.Module, decoder: nn.Module, modules: list[nn.Module]) -> None:
    from accel.patches.hosts.transformers.kv.attach import MARK as CACHE_MARK
    from accel.patches.hosts.transformers.layers import LAYERS, SLOT
    from accel.patches.hosts.transformers.pruning.attach import MARK as PRUNING_MARK

    if not modules:
        classes = sorted({type(m).__name__ for m in decoder.modules() if "attention" in type(m).__name__.lower()})
        raise UnsupportedError(
            f"{type(base).__name__} does not use transformers' attention interface, so its attention cannot be replaced",
            [f"attention classes found: {', '.join(classes) or 'none'}"],
        )
    names = [name for mark in (PRUNING_MARK, CACHE_MARK) for name in getattr(getattr(base, mark, None), "names", [])]
    for module in modules:
        slot = getattr(module, SLOT, None)
        if slot is not None and slot.key in LAYERS:
            names.append(LAYERS[slot.key].method.method_name())
            break
    if names:
        raise PatchError(f"this {type(base).__name__} is patched already, with {', '.join(names)}; call undo() on its handle first")


def _decoder(base: Any) -> Any:
    """The text decoder; the model itself where transformers names none."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base if decoder is None else decoder


def _has_cls(base: Any) -> bool:
    """Whether the vision encoder has a [CLS] token; False for text models and families without an adapter."""
    if not hasattr(base.config, "vision_config"):
        return False
    from accel.patches.hosts.transformers.pruning.vision import families

    family = families().get(base.config.model_type)
    return family is not None and any(tower.prefix for tower in family.towers(base.base_model).values())
