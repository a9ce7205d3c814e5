"""Where a fast executor exists, for hosts that must decide before they call."""

from __future__ import annotations

import torch

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_no_executor(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no fast executor takes tensors of this device and dtype, or None. Without one, dense attention is the faster choice."""
    if device.type != "cpu":
        return f"no sparse kernel for {device.type} in this release"
    return None if dtype in CPU_DTYPES else f"no sparse kernel for {dtype}"
