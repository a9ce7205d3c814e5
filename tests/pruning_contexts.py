"""Contexts of token pruning for tests of methods: sequences of images, as a host hands them over in front of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from accel.protocols import Keep, ModelInfo, PruningContext, Stage, Unit

INFO = ModelInfo("llava", 12, 4, 4, 8, ("full_attention",) * 12, "cpu", "float32", has_vision=True, has_cls=True, hidden_size=8)
PROJECTOR = Stage("projector", is_known_ahead=True)


@dataclass(frozen=True)
class Grid:
    """One unit on a map of its own: rows of patches, each with a newline behind it or not, and perhaps a structural token in front."""

    height: int
    width: int
    has_newline: bool = False
    has_cls: bool = False
    modality: Literal["image", "video"] = "image"
    picture: int = 0

    @property
    def n(self) -> int:
        return self.height * self.width


def context(*sequences: Sequence[Grid], observed: dict[str, Tensor] | None = None, stage: Stage = PROJECTOR, **changes: Any) -> PruningContext:
    """A batch of these sequences, right-padded; features are random, the same for the same sizes."""
    units, rows = [], []
    for b, grids in enumerate(sequences):
        tokens: list[tuple[int, int, int, int]] = []    # unit, map, row, column; column −1: ends no row; = width: newline
        for number, grid in enumerate(grids):
            u = len(units)
            tokens += [(u, number, 0, -1)] * grid.has_cls
            for r in range(grid.height):
                tokens += [(u, number, r, c) for c in range(grid.width + grid.has_newline)]
            n_structural = grid.has_cls + grid.has_newline * grid.height
            units.append(Unit(b, grid.n, grid.height, grid.width, modality=grid.modality, n_structural=n_structural, picture=grid.picture))
        rows.append(tokens)
    table = torch.full((len(rows), max(map(len, rows)), 4), -1)
    for b, tokens in enumerate(rows):
        if tokens:
            table[b, : len(tokens)] = torch.tensor(tokens)
    unit, place = table[..., 0], table[..., 1:]
    widths = torch.tensor([u.width for u in units] + [0])   # the last is for padding, whose unit is −1
    is_visual = (unit >= 0) & (place[..., 2] >= 0) & (place[..., 2] < widths[unit])
    return PruningContext(
        stage,
        units,
        torch.randn(*unit.shape, 8, generator=torch.Generator().manual_seed(0)),
        is_visual=is_visual,
        is_structural=(unit >= 0) & ~is_visual,
        is_text=torch.zeros_like(is_visual),
        unit=unit,
        place=place,
        observed=observed or {},
        state={},
        **changes,
    )


def maps(*rows: Tensor | Sequence[float]) -> Tensor:
    """(U, n) fp32 of one row per unit, zeros behind shorter ones."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(row, dtype=torch.float32) for row in rows], batch_first=True)


def random_maps(*lens: int, seed: int = 0) -> Tensor:
    """`maps` of distinct random scores, each row of sum 1."""
    generator = torch.Generator().manual_seed(seed)
    return maps(*(torch.rand(n, generator=generator).softmax(0) for n in lens))


def places(keep: Keep, b: int) -> list[int]:
    """What stays of one sequence."""
    return keep.index[b, keep.ok[b]].tolist()


def kept_of(keep: Keep, ctx: PruningContext) -> list[list[int]]:
    """For each unit, which of its patch tokens stay, numbered within the unit."""
    found = []
    for u, unit in enumerate(ctx.units):
        own = (ctx.is_visual[unit.sequence] & (ctx.unit[unit.sequence] == u)).nonzero().flatten().tolist()
        stays = set(places(keep, unit.sequence))
        found.append([i for i, place in enumerate(own) if place in stays])
    return found


def assert_well_formed(keep: Keep, ctx: PruningContext) -> None:
    """Indices strictly ascend, pads come last, and only visual and structural tokens are named."""
    image = ctx.is_visual | ctx.is_structural
    for b in range(len(image)):
        index = keep.index[b, keep.ok[b]]
        assert (index.diff() > 0).all()
        assert image[b, index].all()
        n = int(keep.ok[b].sum())
        assert keep.ok[b, :n].all()
    if keep.index.shape[1]:
        assert keep.ok[:, -1].any(), "no column is padding in every row"
