"""Head profiles that say which head is which, a tiny VAR whose heads really are so, and the real calibration in small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from next_scale import INFO, tiny_var
from torch import Tensor

from accel.evals.models import LoadedImageModel, LoadedModel
from accel.models.var import VAR
from accel.patches._hack_calibration import profile_heads
from accel.patches._head_profile import HeadProfile, ProfileHeader
from accel.patches.hack import HACK
from accel.patching import host_for
from accel.protocols import ModelInfo


def info_of(model: Any) -> ModelInfo:
    """The model as methods see it."""
    found: ModelInfo = host_for(model).describe(model)
    return found


def profile_of(rows: list[str], model: ModelInfo = INFO, *, scale_use: Tensor | None = None, **changes: Any) -> HeadProfile:
    """A profile of `model` after which the heads are of the kinds in words such as "CCSS", one per layer; C is contextual."""
    shapes = model.scale_shapes
    assert shapes is not None
    is_contextual = torch.tensor([[letter == "C" for letter in row] for row in rows])
    places = torch.arange(is_contextual.numel()).view(is_contextual.shape)
    sigma = torch.where(is_contextual, 0.01, 0.8) + 1e-4 * places
    weights = "abc" if model.fingerprint is None else model.fingerprint()
    header = ProfileHeader("toy", weights, model.n_layers, model.n_kv_heads, shapes, model.dtype, 3, None, "made up")
    use = torch.full((*sigma.shape, len(shapes), len(shapes)), 1 / len(shapes)) if scale_use is None else scale_use
    return HeadProfile(sigma, torch.full_like(sigma, 0.5), use, replace(header, **changes))


def saved(folder: Path, rows: list[str], model: ModelInfo = INFO, **changes: Any) -> str:
    """The path of such a profile."""
    return str(profile_of(rows, model, **changes).save(folder / "profile.safetensors"))


# of planted heads. Contextual ones read these entries with all queries; structural ones one of these, by the quarter of the map the query lies in
STRIPES = (2, 7, 20)
CORNERS = (5, 7, 11, 13)
# where structural heads keep 25 entries: the first five, the sixteen of the last scale, and what is between
PLANTED = {"keep": 14, "contextual_share": 3 / 14, "alpha": "auto"}


def planted_var(rows: list[str]) -> VAR:
    """A VAR of four heads per layer, of the kinds in `rows`; scales of 1, 4, 9 and 16 tokens.

    The position embedding says where a token lies, and the heads read it: contextual ones have a constant query, structural ones a query and keys
    that are alike in the same quarter of the map, at the highest temperature. All else is random, and small enough not to disturb that.
    """
    model: Any = tiny_var(num_hidden_layers=len(rows))
    position = torch.zeros(30, 32)
    for scale, (start, side) in enumerate(((0, 1), (1, 2), (5, 3), (14, 4))):
        for i in range(side * side):
            row, column = divmod(i, side)
            quarter = 2 * (2 * row >= side) + (2 * column >= side)
            position[start + i, quarter] = 1
            if scale == 2 and start + i in CORNERS:
                position[start + i, 4 + CORNERS.index(start + i)] = 1
    is_corner, is_stripe = torch.zeros(30), torch.zeros(30)
    is_corner[list(CORNERS)], is_stripe[list(STRIPES)] = 1, 1
    position[:, 8], position[:, 9], position[:, 10] = 1 - is_corner, is_stripe, 1 - is_stripe
    with torch.no_grad():
        for name, p in model.embed.named_parameters():
            p.copy_(3 * position) if name == "position" else p.mul_(0.02)
        model.class_embed.weight.mul_(0.02)
        for block, kinds in zip(model.blocks, rows, strict=True):
            # gamma1, gamma2, scale1, scale2, shift1, shift2: attention reaches the output, and hardly the next layer
            block.ada.linear.weight.zero_()
            block.ada.linear.bias.zero_()
            block.ada.linear.bias[:32] = 0.02
            # (3, H, d, C)
            weight, bias = block.attn.qkv.weight.view(3, 4, 8, 32), block.attn.qkv.q_bias.view(4, 8)
            weight[:2].zero_()
            bias.zero_()
            block.attn.log_scale.fill_(5.0)
            for head, kind in enumerate(kinds):
                reads = [9] if kind == "C" else [4, 5, 6, 7]
                for channel, source in enumerate(reads):
                    weight[1, head, channel, source] = 1
                weight[1, head, 5, 10 if kind == "C" else 8] = 1
                if kind == "C":
                    bias[head, 0] = 1
                else:
                    weight[0, head, range(4), range(4)] = 1
            # layer norm takes the mean of all channels away: back with it, by a channel that is 0 before
            weight[:2, :, :, 31] = -weight[:2].sum(-1)
    return model  # type: ignore[no-any-return]


# what was drawn: subjects and seeds
Drawn = list[tuple[Any, int]]


def drawing(model: Any, drawn: Drawn | None = None, *, on_picture: Callable[[int], None] = lambda number: None, **options: Any) -> LoadedImageModel:
    """The model as a loaded one that draws; `drawn` lists what it drew, and `on_picture` is called with the number of each picture, behind it."""
    record: Drawn = [] if drawn is None else drawn

    def draw(subjects: Any, *, seed: Any = None) -> Tensor:
        found: Tensor = model.generate(subjects, seed=seed, output="tensor", **options)
        record.extend(zip(subjects, seed, strict=True))
        on_picture(len(record))
        return found

    return LoadedImageModel(model, None, "toy", draw=draw)


def calibrate(found: LoadedModel, folder: Path, *, data: Any = "classes", n_samples: int = 3, **options: Any) -> HACK:
    """The real calibration, of a few pictures."""
    fixed = {"keep": 0.8, **options.pop("fixed", {})}
    return profile_heads(found, data, folder, fixed=fixed, n_samples=n_samples, show_progress=False, **options)
