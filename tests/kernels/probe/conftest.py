"""Inputs and the dense answer that the tests of the probe share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from accel.kernels.probe import AttentionMoments, attention_moments, mean_attention


class Case:
    """A padded batch: q (B, Hq, L, D), k (B, Hkv, N, D), and what is asked of it."""

    def __init__(
        self, *, B: int = 2, Hq: int = 4, Hkv: int = 2, L: int = 37, N: int | None = None, D: int = 16, is_causal: bool = False,
        softcap: float | None = None, scale: float = 0.4, seed: int = 0, dtype: torch.dtype = torch.float32,
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        N = L if N is None else N
        self.q = torch.randn(B, Hq, L, D, generator=g).to(dtype)
        self.k = torch.randn(B, Hkv, N, D, generator=g).to(dtype)
        self.options: dict[str, Any] = {"scale": scale, "softcap": softcap, "is_causal": is_causal}
        self.key_mask: Tensor | None = None
        self.rows: Tensor | None = None

    def mean(self, impl: str = "auto", **options: Any) -> Tensor:
        return mean_attention(self.q, self.k, rows=self.rows, key_mask=self.key_mask, impl=impl, **self.options, **options)

    def moments(self, impl: str = "auto") -> AttentionMoments:
        return attention_moments(self.q, self.k, rows=self.rows, key_mask=self.key_mask, impl=impl, **self.options)

    def attention(self) -> Tensor:
        """The whole matrix in fp64, (B, Hq, L, N); rows that see nothing are 0."""
        k = self.k.double().repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        logits = self.q.double() @ k.mT * self.options["scale"]
        if (cap := self.options["softcap"]) is not None:
            logits = cap * torch.tanh(logits / cap)
        L, N = logits.shape[-2:]
        visible = torch.ones(len(k), 1, L, N, dtype=torch.bool)
        if self.options["is_causal"]:
            visible = visible & torch.ones(L, N, dtype=torch.bool).tril(N - L)
        if self.key_mask is not None:
            visible = visible & self.key_mask[:, None, None]
        return logits.masked_fill(~visible, -torch.inf).softmax(-1).masked_fill(~visible, 0)

    def reference(self, counted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and entropy over the rows in `counted` (B, L) bool, sequence by sequence from the whole matrix."""
        found = []
        for attention, rows in zip(self.attention(), counted, strict=True):
            some = attention[:, rows]
            entropy = -(some * some.clamp_min(1e-300).log()).sum(-1)
            found.append((some.mean(1), ((some - some.mean(1, keepdim=True)) ** 2).mean(1), entropy.mean(1)))
        mean, variance, entropy = (torch.stack(part) for part in zip(*found, strict=True))
        return mean, variance, entropy


@pytest.fixture(scope="session")
def case() -> type[Case]:
    return Case
