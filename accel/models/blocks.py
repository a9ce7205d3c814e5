"""Transformer parts that VAR and Infinity share. Notation: b rows (guidance doubles them), n tokens, C width, H heads, d = C/H.

The residual stream is fp32 whatever the weights are, as it is in the published code under autocast; every matrix product runs in the weights' dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.cache import ScaleCache

NORM_EPS = 1e-6
MAX_LOG_SCALE = math.log(100)


def in_weights_dtype(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` with x cast to the dtype of its weights."""
    return linear(x.to(linear.weight.dtype))  # type: ignore[no-any-return]


class FusedQKV(nn.Module):
    """Queries, keys and values from one matrix. Queries and values have a bias, keys have none (it would cancel in the softmax)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * width, width))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, C) -> (b, n, 3C)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (b, H, n, d) turned by the angles of cos and sin (n, d/2). A pair is two neighbouring channels."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([cos * even - sin * odd, sin * even + cos * odd], -1).flatten(-2)


class ScaleAttention(nn.Module):
    """Self-attention on normalised queries and keys with a learned temperature per head. Which keys it sees is the cache's business."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.qkv = FusedQKV(width)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(4)))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cache: ScaleCache, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (b, n, C) modulated and normalised; rope: cos and sin of these n tokens, or None."""
        # (b, n, 3C) -> three of (b, H, n, d)
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        temperature = self.log_scale.float().clamp_max(MAX_LOG_SCALE).exp()[:, None, None]
        q, k = F.normalize(q.float(), dim=-1) * temperature, F.normalize(k.float(), dim=-1)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # keys go to the cache in the dtype of the product: fp32 ones would be cast there anyway, at twice the memory
        out = cache.attend(self.layer, q.to(v.dtype), k.to(v.dtype), v)
        return in_weights_dtype(self.proj, out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, tanh-form GELU, Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, C) -> (b, n, C)."""
        return in_weights_dtype(self.fc2, F.gelu(in_weights_dtype(self.fc1, x), approximate="tanh"))


class ConditionVectors(nn.Module):
    """`count` vectors of width C from SiLU and a Linear of the condition: (b, condition) -> (b, 1, count, C), fp32."""

    def __init__(self, condition: int, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(condition, count * width)

    def forward(self, condition: Tensor) -> Tensor:
        """See the class."""
        return in_weights_dtype(self.linear, F.silu(condition)).float().reshape(condition.shape[0], 1, self.count, -1)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without parameters, then · (1 + scale) + shift, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def six_vectors(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(b, 1, 6, C) -> gamma1, gamma2, scale1, scale2, shift1, shift2: the order of the published weights, each (b, 1, C)."""
    gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(2)
    return gamma1, gamma2, scale1, scale2, shift1, shift2


class ScaleEmbedding(nn.Module):
    """The input of a scale: projected codes (the condition itself at scale 0) plus a vector per scale and, in VAR, one per position."""

    def __init__(self, code_width: int, width: int, *, scales: int, positions: int | None) -> None:
        super().__init__()
        self.word = nn.Linear(code_width, width)
        self.start = nn.Parameter(torch.empty(1, width))
        self.level = nn.Parameter(torch.empty(scales, width))
        self.position = nn.Parameter(torch.empty(positions, width)) if positions is not None else None

    def forward(self, x: Tensor, scale: int, start: int) -> Tensor:
        """x: the condition (b, C) at scale 0, else the codes (b, n, code_width). `start`: position of the first token. Returns (b, n, C) fp32."""
        h = x.float()[:, None] + self.start.float() if scale == 0 else in_weights_dtype(self.word, x).float()
        h = h + self.level[scale].float()
        return h if self.position is None else h + self.position[start : start + h.shape[1]].float()


class LogitsHead(nn.Module):
    """Final modulation, in the order scale, shift, and the projection to logits, fp32."""

    def __init__(self, condition: int, width: int, outputs: int) -> None:
        super().__init__()
        self.ada = ConditionVectors(condition, width, 2)
        self.linear = nn.Linear(width, outputs)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h (b, n, C), condition (b, condition) -> (b, n, outputs)."""
        scale, shift = self.ada(condition).unbind(2)
        return in_weights_dtype(self.linear, modulated(h, scale, shift)).float()
