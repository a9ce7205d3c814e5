"""Downsampling: the control that several published pruning methods lose to (VTC-Bench, arXiv 2510.07143)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accel.patches._tokens import ProjectorPruning, Recycled, answer, budget, structural_kept, unit_tokens
from accel.protocols import Keep, PruningContext, Stage, Unit


@dataclass(frozen=True, kw_only=True)
class Downsample(ProjectorPruning):
    """Averages the visual features of each unit over a coarser grid, in front of the language model.

    It averages features behind the projector; the encoder still sees the picture in full, so this is not the same as a smaller picture.
    No grid has any number of cells: the one closest to the budget of a unit (tile, image or frame) from below that keeps its shape is used, and never
    less than one cell per frame, so that `min_tokens` has no effect below 1.
    Each cell's mean takes the place, and the position, of the token nearest to its centre.
    """

    def unit_count(self, unit: Unit) -> int:
        """Cells of a unit."""
        height, width = self._grid(unit.height, unit.width, unit.n_tokens, unit.frames)
        return height * width * unit.frames

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Cells of each unit; None where the number of newlines depends on the rows of the cells' centres, or a unit is no full grid."""
        if any(unit.n_tokens != unit.height * unit.width * unit.frames for unit in units):
            return None
        return super().count(stage, units)

    def _grid(self, height: int, width: int, n: int, frames: int) -> tuple[int, int]:
        """Cells down and across, of a frame of a unit with n tokens."""
        return coarser_grid(height, width, max(1, budget(n, self.keep, self.min_tokens) // frames))

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """The cells' means and the newlines of their centres' rows; None where no sequence has an image."""
        if not ctx.units:
            return None
        kept = torch.zeros_like(ctx.is_visual)
        merges: list[list[Recycled]] = [[] for _ in kept]
        for unit, own in zip(ctx.units, unit_tokens(ctx), strict=True):
            if not len(own):
                continue
            cell, anchor = self._cells(ctx.place[unit.sequence, own])
            kept[unit.sequence, own[anchor]] = True
            size = torch.bincount(cell)
            merges[unit.sequence].append((own[anchor][cell], own, 1 / size[cell].float()))
        return answer(kept | structural_kept(ctx, kept, self.newline), merges=merges)

    def _cells(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each token, (n,) int64 numbered from 0, and of each cell the token nearest to its centre. place: (n, 3)."""
        frame, at = place[:, 0], place[:, 1:] - place[:, 1:].amin(0)
        height, width = (at.amax(0) + 1).tolist()
        rows, columns = self._grid(height, width, len(place), len(torch.unique(frame)))
        grid = torch.stack([frame, at[:, 0] * rows // height, at[:, 1] * columns // width], 1)
        cells, cell = torch.unique(grid, dim=0, return_inverse=True)
        size = torch.bincount(cell)
        centre = torch.zeros(len(cells), 2, dtype=torch.float64, device=place.device).index_add(0, cell, at.double()) / size[:, None]
        distance = (at - centre[cell]).square().sum(-1)
        # by cell, then by distance; both sorts are stable, so that ties go to the lower index
        order = distance.argsort(stable=True)
        order = order[cell[order].argsort(stable=True)]
        return cell, order[size.cumsum(0) - size]


def coarser_grid(height: int, width: int, n: int) -> tuple[int, int]:
    """Cells down and across: at most n, as many as can be while the shape stays that of height × width; at least (1, 1)."""
    scale = math.sqrt(min(1.0, n / (height * width)))
    found = []
    for round_ in (math.floor, math.ceil):
        # 1e-9: 24 · sqrt(144 / 576) must not miss 12
        down = min(max(1, round_(height * scale - 1e-9 if round_ is math.ceil else height * scale + 1e-9)), height, n)
        across = min(max(1, round_(width * scale - 1e-9 if round_ is math.ceil else width * scale + 1e-9)), width, n)
        found += [(down, min(width, n // down)), (min(height, n // across), across)]
    return max(found, key=lambda grid: (grid[0] * grid[1], -abs(math.log(grid[0] * width / (grid[1] * height)))))
