"""What the CPU paths share: one sequence's problem, buffers that outlive a call, the causal corner of a tile."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from accel.kernels.block_sparse.cpu_probe import Route
from accel.kernels.block_sparse.keys import KeyView
from accel.kernels.block_sparse.ragged import Rows

# larger buffers are freed after the call
KEPT_BYTES = 16 << 20


@dataclass(frozen=True)
class Problem:
    """One sequence of a call, and how it is computed.

    q: (T, Hq, D); out: (T, Hq, Dv), written; lse: (Hq, T) fp32, written, or None. mask: (Hq or 1, nq, nk) bool; None lists every block.
    """

    q: Tensor
    keys: KeyView
    rows: Rows
    mask: Tensor | None
    block_size: int
    scale: float
    softcap: float | None
    out: Tensor
    lse: Tensor | None
    route: Route

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.q.shape[1] // self.keys.n_kv_heads


class Workspace(threading.local):
    """Buffers by name, one set per thread, kept between calls: fresh memory costs a page fault per 4 KB, up to 5 % of a call."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous buffer with arbitrary content. The next `take` of the same name overwrites it."""
        size = prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.shape[0] < size:
            # a tensor born in inference mode could not be written outside it
            with torch.inference_mode(False):
                flat = torch.empty(size, dtype=dtype, device="cpu")
            self._flat[name, dtype] = flat
        return flat[:size].view(shape)

    def trim(self, limit_bytes: int = KEPT_BYTES) -> None:
        """Frees the buffers larger than `limit_bytes`; 0 frees all."""
        self._flat = {key: flat for key, flat in self._flat.items() if flat.nbytes <= limit_bytes}


workspace = Workspace()


def without_autocast() -> AbstractContextManager[object]:
    """A context in which tensors are computed as they are, whatever the caller's region says."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else nullcontext()


def finish_scores(scores: Tensor, softcap: float | None) -> None:
    """Soft-caps scores in place: cap · tanh(score / cap)."""
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)


def softmax_with_lse(scores: Tensor, *, wants_lse: bool) -> Tensor | None:
    """Turns scores (..., n) into probabilities in place; returns log Σ exp(score), (...) fp32, where wanted.

    At the largest score s of a row its probability is exp(s − LSE), so two maxima give the LSE without another pass of exponentials.
    """
    largest = scores.amax(-1) if wants_lse else None
    torch.softmax(scores, -1, out=scores)
    return largest.float() - scores.amax(-1).float().log() if largest is not None else None
