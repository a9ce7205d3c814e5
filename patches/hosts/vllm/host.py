"""vLLM as a place for methods: what runs in it. The way on is `accel serve` and `accel.vllm.LLM`; an engine that stands cannot be patched."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.protocols import KVCompression, Method, ModelInfo, SparseAttention, Stage, TokenPruning, Unit

ACCEPTS = "for vLLM: accel.vllm.LLM(…) or `accel serve`, which build a patched engine"

_NO_HEADS = (
    "vLLM has one block table for all heads of a layer: entries dropped of single heads free no memory there; compress in transformers instead"
)
_LEARNED = "it decides from hidden states, request by request, how many tokens stay, and vLLM fixes row counts before the model runs"
_LAYERS = "tokens that leave in the middle of the model leave all together or not at all in vLLM; stages in front of the model run"


def matches(model: Any) -> bool:
    """Whether `model` is an engine of vLLM."""
    vllm = sys.modules.get("vllm")
    return vllm is not None and isinstance(model, vllm.LLM)


def describe(model: Any) -> ModelInfo:
    """Raises UnsupportedError: an engine has its workers elsewhere, and its graphs captured."""
    raise UnsupportedError("a vLLM engine is patched while it is built: use accel.vllm.LLM(model, method=…), or `accel serve`")


def attach(model: Any, methods: Sequence[Method], info: ModelInfo, handle: Handle) -> None:
    """See `describe`."""
    describe(model)


def refusals(method: Method) -> list[str]:
    """Why vLLM cannot run a method at all; of options that decide it, those it has."""
    if isinstance(method, KVCompression):
        return [_NO_HEADS]
    if isinstance(method, SparseAttention):
        return []
    if not isinstance(method, TokenPruning):
        return [f"vLLM does not run {method.kind.replace('_', ' ')} methods"]
    try:
        bound = method.bind(plain_vlm())
        stages = bound.stages(plain_vlm())
    except UnsupportedError as error:
        return [*(list(error.reasons) or [str(error)]), f"what is learned does not run in vLLM: {_LEARNED}"]
    return list(dict.fromkeys(reason for stage in stages if (reason := _why_not(bound, stage)) is not None))


def _why_not(method: TokenPruning, stage: Stage) -> str | None:
    if stage.needs_learned_choice:
        return _LEARNED
    if stage.boundary == "layer":
        return None if method.count(stage, [Unit(0, 4, 2, 2)]) == [0] else _LAYERS
    return None


def plain_vlm() -> ModelInfo:
    """A vision-language model without any speciality."""
    return ModelInfo("llava", 32, 32, 8, 128, ("full_attention",) * 32, "cpu", "bfloat16", 131072, has_vision=True, has_cls=True)
