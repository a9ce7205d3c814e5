"""The models of the matrix, each built once per process, with what they do when nobody has touched them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import conformance.vision_families  # noqa: F401 - adds its rows to FAMILIES
from conformance.families import FAMILIES, Family
from conformance.reference import Run, run
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Subject:
    """A model of a family, its inputs, and its dense run."""

    family: Family
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    dense: Run


@cache
def subject(name: str) -> Subject:
    """The subject of a family. Tests leave it as they found it."""
    family = FAMILIES[name]
    model, inputs = family.build()
    return Subject(family, model, inputs, run(model, inputs))


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that undo must give back: by identity where objects are concerned.

    Plain tensors are left out: Qwen-VL models keep a number of their last prompt (`rope_deltas`) on themselves.
    """
    configs = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation")}
    return {
        "implementations": configs,
        "attributes": [{key: id(value) for key, value in vars(m).items() if not isinstance(value, Tensor)} for m in model.modules()],
        "parameters": {name: (id(p), p._version) for name, p in model.named_parameters()},
        "state_dict": list(model.state_dict()),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()],
    }
