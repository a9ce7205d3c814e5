"""Which model a host was given: the one inside PEFT's wrapper, of which kind, with which weights. Loads nothing that is not loaded already."""

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


def is_next_scale(base: Any) -> bool:
    """Whether an unwrapped model generates scale by scale: a transformers model by its class, whose attention is none of transformers'."""
    models = sys.modules.get("accel.models.base")
    return models is not None and isinstance(base, models.NextScaleModel)


def fingerprint(model: nn.Module) -> str:
    """Hash of the kind of model and of a few values of every parameter: tells one set of weights from another, quickly.

    Values count in bf16 and the configuration not at all, which names the dtype and the version of transformers: the same weights give the same
    hash in fp32, in bf16, and, but for weights with more digits than fp16 has, in fp16.
    """
    digest = hashlib.sha256(str(model.config.model_type).encode())  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        digest.update(f"{name}{tuple(p.shape)}{p.detach().flatten()[:8].bfloat16().tolist()}".encode())
    return digest.hexdigest()[:16]
