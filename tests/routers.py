"""Routers for tests whose decisions are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accel.patches._routers import Router


def linear_router(direction: Tensor) -> Router:
    """Its exit logit lies above the other by direction · feature: GELU(x) − GELU(−x) is x."""
    half = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
    return Router(torch.stack([direction, -direction]), half)


def sign_router(features: Tensor, leaves: Sequence[bool]) -> Router:
    """Fires for those of the features (B, 2D), linearly independent, that are marked."""
    wanted = torch.tensor([4.0 if leave else -4.0 for leave in leaves], dtype=torch.float64)
    return linear_router((torch.linalg.pinv(features.double()) @ wanted).float())
