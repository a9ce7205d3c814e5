"""Rotary positions in two dimensions for maps of growing size."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.models.cache import Schedule


def grid_coordinates(cells: int, extent: int) -> Tensor:
    """Coordinates of `cells` cells stretched over `extent`: round(i · extent / cells), ties to even; (cells,) fp32."""
    return (torch.arange(cells, device="cpu") * (extent / cells)).round()


def rope_tables(
    schedule: Schedule, extent: tuple[int, int], head_dim: int, *, base: float = 10000.0, device: torch.device | str | None = None
) -> list[tuple[Tensor, Tensor]]:
    """cos and sin per scale, each (n_k, head_dim / 2) fp32. The first half of the pairs turns with the row, the second with the column."""
    quarter = head_dim // 4
    # frequency i of a half with head_dim/2 channels: base^(−2i / (head_dim/2))
    frequency = base ** -(torch.arange(quarter, device="cpu") / quarter)
    tables = []
    for h, w in schedule.sizes:
        rows = torch.outer(grid_coordinates(h, extent[0]), frequency)[:, None].expand(h, w, quarter)
        columns = torch.outer(grid_coordinates(w, extent[1]), frequency)[None].expand(h, w, quarter)
        angles = torch.cat([rows, columns], -1).flatten(0, 1).to(device)
        tables.append((angles.cos(), angles.sin()))
    return tables
