"""Which model a host was given: the one inside its wrappers, of which kind, with which weights. Loads nothing that is not loaded already."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def unwrapped(model: Any) -> Any:
    """The transformers model inside PEFT's wrapper, or the model itself."""
    peft = sys.modules.get("peft")
    return model.get_base_model() if peft is not None and isinstance(model, peft.PeftModel) else model


def bare(model: Any) -> Any:
    """The model inside the wrappers of PEFT, torch.compile and data parallelism, however they are nested."""
    while (inner := _inside(model)) is not model:
        model = inner
    return model


def _inside(model: Any) -> Any:
    """What the outermost wrapper holds."""
    torch, compiler = sys.modules.get("torch"), sys.modules.get("torch._dynamo.eval_frame")
    if torch is not None and isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
        return model.module
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        return model._orig_mod
    return unwrapped(model)


def is_next_scale(base: Any) -> bool:
    """Whether an unwrapped model is one of our next-scale models: a transformers model by its class, whose attention is none of transformers'."""
    models = sys.modules.get("accel.models.base")
    return models is not None and isinstance(base, models.NextScaleModel)


def fingerprint(model: nn.Module, family: str | None = None) -> str:
    """Hash of the kind of model (`family`, else the configuration's) and of a few values of every parameter: quick, and tells weights apart.

    Values count in bf16 and the configuration not at all, which names the dtype and the version of transformers: the same weights give the same
    hash in fp32, in bf16, and, but for weights with more digits than fp16 has, in fp16.
    """
    digest = hashlib.sha256((family or str(model.config.model_type)).encode())  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        digest.update(f"{name}{tuple(p.shape)}{p.detach().flatten()[:8].bfloat16().tolist()}".encode())
    return digest.hexdigest()[:16]
