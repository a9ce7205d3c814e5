"""The steps of layers that no visual token reaches: which rows are left, and where their keys and values lie. Pure torch.

Behind the exit a request's entries move up: text token j, counted without pictures, lies where token j of the request lies elsewhere, in the same
blocks. A layer there sees a shorter sequence, and needs no other kernel; rows keep the positions that RoPE was given (vllm-integration.md §7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from accel.errors import AccelError


@dataclass(frozen=True)
class Step:
    """One forward pass of R requests whose rows follow each other.

    query_start: (R + 1,) int32; seq_lens: (R,) int32, this step's tokens included; block_table: (R, P) int32. is_visual: (n,) bool, on the CPU.
    """

    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    is_visual: Tensor

    @property
    def query_lens(self) -> Tensor:
        """(R,) rows of each request."""
        return self.query_start.diff()

    @property
    def context_lens(self) -> Tensor:
        """(R,) tokens of earlier steps."""
        return self.seq_lens - self.query_lens

    @property
    def request(self) -> Tensor:
        """(n,) int64, the request of each row."""
        numbers = torch.arange(len(self.seq_lens), device=self.seq_lens.device)
        return numbers.repeat_interleave(self.query_lens, output_size=len(self.is_visual))


@dataclass(frozen=True)
class ShortStep:
    """The same pass behind the exit.

    rows: (m,) int64 ascending, those that are left; None where all are. query_start, seq_lens: as in `Step`, of what is left. slots: (m,) int64,
    where the keys and values of each row go. n_visual: (R,) int32, visual tokens that this pass brought.
    """

    rows: Tensor | None
    query_start: Tensor
    seq_lens: Tensor
    slots: Tensor
    n_visual: Tensor


def shortened(step: Step, n_gone: Tensor, block_size: int) -> ShortStep:
    """The step without visual tokens. n_gone: (R,) int32, visual tokens among those of earlier steps.

    The last row of a request stays even where it is visual, because its answer may begin there; its entry is written over by the next step.
    Waits for a device only where the step holds visual tokens.
    """
    device, request = step.seq_lens.device, step.request
    # nothing to count, and nothing to wait for
    if not bool(step.is_visual.any()):
        seq_lens = step.seq_lens - n_gone
        place = _places(step.query_start, step.context_lens - n_gone, request)
        return ShortStep(None, step.query_start, seq_lens, _slots(step.block_table, request, place, block_size), torch.zeros_like(n_gone))
    is_visual = step.is_visual.to(device)
    stays = ~is_visual
    # of a request without rows this is the last row of the one before it, which stays as well
    stays[(step.query_start[1:].long() - 1).clamp_min(0)] = True
    query_start = _counted(stays)[step.query_start.long()].to(step.query_start.dtype)
    n_visual = _counted(is_visual)[step.query_start.long()].diff().to(n_gone.dtype)
    rows = stays.nonzero().flatten()
    context = step.context_lens - n_gone
    place = _places(query_start, context, request[rows])
    return ShortStep(rows, query_start, context + query_start.diff(), _slots(step.block_table, request[rows], place, block_size), n_visual)


def check_slots(step: Step, slots: Tensor, block_size: int) -> None:
    """Raises AccelError where vLLM lays entries out otherwise than this file does. slots: (n or more,), where it writes those of this step."""
    ours = _slots(step.block_table, step.request, _places(step.query_start, step.context_lens, step.request), block_size)
    if not torch.equal(ours, slots[: len(ours)].long()):
        raise AccelError("this version of vLLM lays out its cache in a way that accel does not know: visual tokens cannot leave inside the model")


def _counted(mask: Tensor) -> Tensor:
    """(n + 1,) int64: how many entries in front of each place are set."""
    return torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))


def _places(query_start: Tensor, context: Tensor, request: Tensor) -> Tensor:
    """(m,) int64: the number of each row in its sequence. context: (R,), tokens in front of this step."""
    return torch.arange(len(request), device=request.device) + (context - query_start[:-1]).long()[request]


def _slots(block_table: Tensor, request: Tensor, place: Tensor, block_size: int) -> Tensor:
    """(m,) int64: where place `place` of each row's request lies in the cache."""
    return block_table[request, place // block_size].long() * block_size + place % block_size


class Departed:
    """Counts, per request, the visual tokens that have left. A request is known by the first block it owns; one without earlier tokens is new.

    n_blocks: of the cache. That holds without prefix caching only, which lets requests share their first block.
    """

    def __init__(self, n_blocks: int, device: torch.device) -> None:
        self._n_gone = torch.zeros(n_blocks, dtype=torch.int32, device=device)
        self._seq_lens = torch.zeros(n_blocks, dtype=torch.int32, device=device)

    def before(self, step: Step) -> Tensor:
        """(R,) int32: visual tokens of earlier steps. Fails where a request does not go on from where it was left."""
        first, context = _first_blocks(step), step.context_lens
        is_new = context == 0
        goes_on = is_new | (self._seq_lens[first] == context) | (step.query_lens == 0)
        # without waiting for a device
        torch._assert_async(goes_on.all(), "accel: a request goes on with tokens that never passed the layer at which visual tokens leave")
        return torch.where(is_new, 0, self._n_gone[first])

    def add(self, step: Step, n_gone: Tensor, short: ShortStep) -> None:
        """Notes what is gone behind this step. n_gone: as `before` said."""
        first = _first_blocks(step)
        self._n_gone[first] = n_gone + short.n_visual
        self._seq_lens[first] = step.seq_lens


def _first_blocks(step: Step) -> Tensor:
    """(R,) int64; block 0, which no request owns, for those without rows, whose tables may be left over from others."""
    return torch.where(step.query_lens > 0, step.block_table[:, 0].long(), 0)
