"""Run by Python at start where this folder is on PYTHONPATH: the processes that vLLM spawns need the fix before they load anything."""

from __future__ import annotations

import importlib.abc
import sys
from typing import Any


class _DefinesOperators(importlib.abc.MetaPathFinder):
    """Defines the two operators that torchvision registers kernels for, before torchvision is imported beside a torch without CUDA.

    PyPI's torchvision is built for CUDA: its library does not load there, and its import dies of the missing operators, and with it transformers'.
    Its transforms are plain Python and work; the operators themselves stay without a kernel.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name != "torchvision":
            return
        import torch

        if torch.version.cuda is None and not hasattr(torch, "_accel_vision_operators"):
            library: Any = torch.library.Library("torchvision", "FRAGMENT")     # type: ignore[no-untyped-call]
            for operator in ("nms", "qnms"):
                library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            # the definitions live as long as this object
            torch._accel_vision_operators = library     # type: ignore[attr-defined]


if not any(type(finder).__name__ == _DefinesOperators.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _DefinesOperators())
