"""Inputs that the tests of the selection share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accel.kernels.block_sparse import ContiguousKeys, Ragged, Rows
from accel.kernels.flex_index import FlexIndex, HeadDiagnostics, SelectionRule, flex_index


class Case:
    """One sequence: L queries that are the last of N keys. q: (L, Hq, D), k, v: (N, Hkv, D)."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor | None = None, scale: float | None = None, softcap: float | None = None) -> None:
        self.q, self.k, self.v = q, k, torch.zeros_like(k) if v is None else v
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.softcap = softcap
        self.lens = Ragged.of([q.shape[0]], [k.shape[0]])
        self.rows: Rows = next(self.lens.rows())
        self.keys = ContiguousKeys(self.k, self.v, torch.zeros(1, dtype=torch.int64), torch.tensor([k.shape[0]]))

    @classmethod
    def random(
        cls, L: int, N: int, *, Hq: int = 2, Hkv: int = 1, D: int = 16, sharpness: float = 3.0, seed: int = 0, softcap: float | None = None
    ) -> Case:
        """Heads with a few heavy columns each, so that plans are neither dense nor empty. sharpness: about the spread of the logits."""
        g = torch.Generator().manual_seed(seed)
        q, k, v, u = (torch.randn(rows, heads, D, generator=g) for rows, heads in ((L, Hq), (N, Hkv), (N, Hkv), (1, Hq)))
        return cls((0.3 * q + u) * sharpness, k, v, softcap=softcap)

    @classmethod
    def uniform(cls, N: int) -> Case:
        """All-zero queries: every visible key gets the same attention."""
        return cls(torch.zeros(N, 1, 8), torch.randn(N, 1, 8, generator=torch.Generator().manual_seed(0)))

    def index(self, rule: SelectionRule, impl: str = "auto") -> FlexIndex:
        return flex_index(self.q, self.keys, self.lens, rule=rule, scale=self.scale, softcap=self.softcap, impl=impl, diagnostics=True)

    def mask(self, rule: SelectionRule, impl: str = "auto") -> Tensor:
        """Tiles (Hq, nq, nk) bool."""
        return self.index(rule, impl).plan.block_mask(self.rows)

    def heads(self, rule: SelectionRule, impl: str = "auto") -> HeadDiagnostics:
        found = self.index(rule, impl).diagnostics
        assert found is not None
        assert found[0] is not None
        return found[0]

    def dense_probabilities(self) -> Tensor:
        """Attention of every row in fp64, (Hq, L, N)."""
        k = self.k.double().repeat_interleave(self.q.shape[1] // self.k.shape[1], 1)
        logits = torch.einsum("lhd,nhd->hln", self.q.double(), k) * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        position = torch.arange(self.rows.offset, self.rows.kv_len)
        return logits.masked_fill(torch.arange(self.rows.kv_len) > position[:, None], -torch.inf).softmax(-1)

    def token_mask(self, tiles: Tensor, block_size: int) -> Tensor:
        """Tiles (Hq, nq, nk) as keys visible to each row, (Hq, L, N); causality left to the caller."""
        i = torch.arange(self.rows.offset, self.rows.kv_len) // block_size - self.rows.first_block(block_size)
        j = torch.arange(self.rows.kv_len) // block_size
        return tiles[:, i][:, :, j]


@pytest.fixture(scope="session")
def case() -> type[Case]:
    return Case


@pytest.fixture(scope="session")
def rule() -> Callable[..., SelectionRule]:
    """A rule with blocks small enough for tests; any option by name."""

    def build(**options: object) -> SelectionRule:
        return SelectionRule(**{"block_size": 16, "min_budget": 16, "gamma": 0.9, **options})  # type: ignore[arg-type]

    return build
