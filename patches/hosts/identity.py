"""Which model a host was given: the one inside its wrappers, of which kind, with which weights. Loads nothing that is not loaded already."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING, Any

from accel.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn


# values of a parameter whose signs count
N_SIGNS = 256


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
    """Hash of the kind of model (`family`, else the configuration's), and of names, shapes and signs of values spread over every parameter.

    The configuration, which names the dtype and the version of transformers, does not count, and signs are what every floating type keeps: the same
    weights give the same hash in fp32, bf16 and fp16. Training turns signs over, of many small values; weights that differ in size alone are not told
    apart.
    """
    digest = hashlib.sha256((family or str(model.config.model_type)).encode())  # type: ignore[union-attr]
    for name, p in model.named_parameters():
        step = max(1, p.numel() // N_SIGNS)
        digest.update(f"{name}{tuple(p.shape)}".encode() + bytes(_values(model, name, p).flatten()[::step].signbit().tolist()))
    return digest.hexdigest()[:16]


def _values(model: nn.Module, name: str, parameter: Tensor) -> Tensor:
    """The values of a parameter, fetched where accelerate has offloaded them."""
    if not parameter.is_meta:
        return parameter.detach()
    from accelerate.utils import align_module_device

    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    with align_module_device(module):
        found: Tensor = getattr(module, own).detach()
    if found.is_meta:
        raise UnsupportedError(f"the weights of {type(model).__name__} are not loaded ({name} is on the meta device): they cannot be told apart")
    return found
