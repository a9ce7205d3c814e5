"""Buffers of the decode kernels that outlive a call: allocated once for each stream, so that CUDA graphs can go on reading them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.kernels.block_sparse.triton_launch import power_of_two


class Workspace:
    """Buffers that outlive a call, by name, size class, device and stream: calls of one stream run one after the other and may share.

    Sizes are rounded up to a power of two, and nothing is ever freed: a CUDA graph keeps reading where it was captured. Warm up on the stream
    of the capture: what a capture must allocate itself lives in its graph, and each such call clears its arrivals by a launch more.
    Graphs of one stream share, too: they must not be replayed at the same time.
    Parts take about WAVES · multiprocessors · block_m · (Dv + 2) · 4 bytes, before rounding 3.3 MB for 16 rows of 128 on an H100, twice that
    for lists of several query rows; the lists of a `VerticalSlashPlan` B · heads · nk · 4 bytes per query block.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.device, int], dict[tuple[str, int, torch.dtype], Tensor]] = {}

    def on_stream_of(self, device: torch.device) -> Buffers:
        """The buffers of the stream that is current on this device."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return Buffers(device, self._kept.setdefault((device, stream), {}))


@dataclass(frozen=True)
class Buffers:
    """Those of one stream."""

    device: torch.device
    kept: dict[tuple[str, int, torch.dtype], Tensor]

    def take(self, name: str, size: int, dtype: torch.dtype, *, is_zero: bool = False) -> Tensor:
        """A flat buffer of at least `size` elements, as the last call left it; a new one holds anything, or zeros where asked."""
        key = (name, power_of_two(size), dtype)
        found = self.kept.get(key)
        if found is None:
            found = (torch.zeros if is_zero else torch.empty)(key[1], dtype=dtype, device=self.device)
            if not (self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
                self.kept[key] = found
        return found


workspace = Workspace()
