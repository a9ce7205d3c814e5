"""Positions with several axes for prompts whose pictures have lost tokens: each token that stays has the one of the whole prompt. No vLLM here.

vLLM fixes the positions of a prompt before its pictures are read. Those of text depend on the sizes of the pictures alone; rows of pictures are
given the position where their picture begins, and what each is beyond that travels behind its features, digit by digit.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

AXES = 3            # time, row, column
# digits below this are exact in bf16, whose integers end at 256
_BASE, _DIGITS = 256, 3
CHANNELS = AXES * _DIGITS


def grid_offsets(steps: int, height: int, width: int, seconds: float = 1.0) -> Tensor:
    """(steps · height · width, 3) int64: how far each token of a picture is from where it begins, in time, rows and columns.

    seconds: positions per step, as vLLM counts them, rounded down.
    """
    grid = torch.cartesian_prod(torch.arange(steps), torch.arange(height), torch.arange(width)).view(-1, AXES)
    return torch.stack([(grid[:, 0] * seconds).long(), grid[:, 1], grid[:, 2]], 1)


def with_offsets(rows: Tensor, offsets: Tensor) -> Tensor:
    """(n, D + CHANNELS): features with their offsets behind them, in their dtype. rows: (n, D); offsets: (n, 3) int64, below 256³."""
    digits = torch.stack([offsets // _BASE**i % _BASE for i in range(_DIGITS)], -1).flatten(1)
    return torch.cat([rows, digits.to(rows)], 1)


def split_offsets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Features (n, D) and offsets (n, 3) int64 out of what `with_offsets` made."""
    digits = rows[:, -CHANNELS:].long().view(len(rows), AXES, _DIGITS)
    weight = torch.tensor([_BASE**i for i in range(_DIGITS)], device=rows.device)
    return rows[:, :-CHANNELS], (digits * weight).sum(-1)


def prompt_positions(n_tokens: int, pictures: Iterable[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """(3, n_tokens) int64, and how far the answer's positions are ahead of its places.

    pictures: by place in the prompt: where each starts, how many placeholders it has there, and how many positions it takes up when whole.
    """
    found = torch.empty(n_tokens, dtype=torch.int64)
    place = position = 0
    for start, n, extent in pictures:
        found[place:start] = torch.arange(start - place) + position
        position += start - place
        found[start : start + n] = position
        place, position = start + n, position + extent
    found[place:] = torch.arange(n_tokens - place) + position
    return found.expand(AXES, -1).clone(), position - place
