"""Where a fast executor exists, for hosts that must decide before they call, and the counts of what ran."""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from importlib.util import find_spec

import torch

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TRITON_MAX_HEAD_DIM = 256

# Calls of this process by executor: "triton", "cpu", "naive", "flex", "cute"; dense ones as "dense-triton" and so on; where "auto" had to fall
# back also under "auto->naive". Tensors that the Triton executor had to copy first: "copied-q", "copied-k", "copied-v".
dispatches: Counter[str] = Counter()


def why_no_executor(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no fast executor takes tensors of this device and dtype, or None. Without one, dense attention is the faster choice."""
    if device.type == "cuda":
        return "; ".join(triton_obstacles(device, dtype)) or None
    if device.type != "cpu":
        return f"no sparse kernel for {device.type} in this release"
    return None if dtype in CPU_DTYPES else f"no sparse kernel for {dtype}"


@cache
def triton_obstacles(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Everything that keeps the Triton kernels from tensors of this device and dtype. CPU tensors run in Triton's interpreter only."""
    found = []
    if find_spec("triton") is None:
        found.append("triton is not installed")
    if device.type == "cuda":
        if torch.version.hip is not None:
            found.append("the kernels are not tested on AMD GPUs")
        elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
            found.append(f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0")
    elif device.type != "cpu" or not is_interpreting():
        found.append(f"the tensors are on {device.type}, the kernels need CUDA")
    if dtype not in TRITON_DTYPES:
        found.append(f"no sparse kernel for {dtype}")
    return tuple(found)


def is_interpreting() -> bool:
    """Whether Triton was told to run kernels on CPU tensors, by its own variable: tests and debugging."""
    return os.environ.get("TRITON_INTERPRET") == "1"
