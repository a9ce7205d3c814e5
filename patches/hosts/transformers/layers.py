"""What a patched attention layer knows. The model itself carries only a numbered slot per layer."""

from __future__ import annotations

import inspect
import itertools
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from accel.handle import Handle
from accel.protocols import ModelInfo, SparseAttention
from accel.stats import LayerStats

SLOT = "_accel_slot"
UNPATCHED = -1


class Slot:
    """The mark on an attention module: which entry of `LAYERS` is its state. Copies of a model get an empty slot, hence run dense.

    ticks: a one-element tensor that the counting operator pretends to change, so that compilers keep it.
    """

    def __init__(self, key: int, handle: Handle | None = None) -> None:
        self.key = key
        # keeps the handle alive as long as the model; `LAYERS` must not, or a model thrown away while patched would stay
        self.handle = handle
        self.is_on = True
        self.ticks = torch.zeros((), dtype=torch.int64, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        return Slot(UNPATCHED)

    def __reduce__(self) -> tuple[type[Slot], tuple[int]]:
        return Slot, (UNPATCHED,)


@dataclass
class LayerState:
    """One patched attention layer: its method, its original attention, its counters."""

    method: SparseAttention
    module: weakref.ref[nn.Module]
    layer: int
    info: ModelInfo
    original: str
    original_function: Callable[..., Any]
    handle_ref: weakref.ref[Handle]
    skip_reason: str | None = None      # the whole layer stays dense

    @property
    def handle(self) -> Handle:
        handle = self.handle_ref()
        assert handle is not None  # the module's slot holds it
        return handle

    @property
    def stats(self) -> LayerStats:
        # looked up at every call: `stats.reset()` starts new counters
        return self.handle.stats.layer(self.layer)


LAYERS: dict[int, LayerState] = {}
_keys = itertools.count()


def add_layer(state: LayerState) -> int:
    """Registers a layer's state and returns its key."""
    key = next(_keys)
    LAYERS[key] = state
    return key


def remove_layer(key: int) -> None:
    """Forgets a layer's state; its slot then means nothing."""
    LAYERS.pop(key, None)


def attention_modules(decoder: nn.Module) -> list[nn.Module]:
    """Self-attention modules of a text decoder that go through transformers' attention interface, in order of layers."""
    found = [
        m
        for m in decoder.modules()
        if isinstance(getattr(m, "layer_idx", None), int)
        and hasattr(getattr(m, "config", None), "_attn_implementation")
        and "Attention" in type(m).__name__
        and "Cross" not in type(m).__name__
        and uses_interface(m)
    ]
    # decoders with cross-attention hold two modules per layer, of which only the causal one is self-attention
    causal = [m for m in found if getattr(m, "is_causal", True)]
    return sorted(causal or found, key=lambda m: int(m.layer_idx))  # type: ignore[arg-type]


def uses_interface(module: nn.Module) -> bool:
    """Whether the module's code asks the attention interface which function to call; linear-attention layers do not."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(module).forward).__code__.co_names


def original_attention(module: nn.Module, implementation: str) -> Callable[..., Any] | None:
    """The function that `module` called before: a registered one, or the eager function of its modeling file. None if there is none."""
    if implementation in ALL_ATTENTION_FUNCTIONS:
        registered: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
        return registered
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def call_original(
    function: Callable[..., Any], module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any,
    *, scaling: float | None, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention, called as transformers calls it. q (B, Hq, L, D) → (B, L, Hq, Dv)."""
    if isinstance(mask, Tensor) and mask.device != q.device:
        mask = mask.to(q.device)
    result: tuple[Tensor, Tensor | None] = function(module, q, k, v, mask, scaling=scaling, **kwargs)
    return result
