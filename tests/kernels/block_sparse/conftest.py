"""Inputs that the tests of the attention kernel share, and every implementation of it behind one signature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, KeyView, ListPlan, Ragged
from accel.kernels.block_sparse.cpu import cpu_attention
from accel.kernels.block_sparse.cpu_probe import NATIVE, Route
from accel.kernels.block_sparse.naive import naive_attention, naive_dense

FP32, BF16 = torch.float32, torch.bfloat16

# every path of the CPU executor, whichever of them this machine would choose
ROUTES = {
    "fp32": Route("gemm", FP32, FP32),
    "routed": Route("gemm", FP32, FP32, is_routed=True),
    "hybrid": Route("gemm", FP32, BF16),
    "bf16": Route("gemm", BF16, BF16),
    "native": NATIVE,
}


@dataclass(frozen=True)
class Case:
    """Sequences of a batch in one contiguous tensor each for q (T, Hq, D), k and v (tokens, Hkv, D)."""

    q: Tensor
    keys: KeyView
    lens: Ragged
    scale: float
    softcap: float | None = None

    @classmethod
    def random(
        cls, q_len: Sequence[int], kv_len: Sequence[int] | None = None, *, Hq: int = 2, Hkv: int = 1, D: int = 16, Dv: int | None = None,
        gap: int = 0, dtype: torch.dtype = FP32, sharpness: float = 2.0, softcap: float | None = None, seed: int = 0,
    ) -> Case:
        """gap: rows of padding in front of every sequence, in q and in the keys; they hold NaN."""
        g = torch.Generator().manual_seed(seed)
        kv_len = q_len if kv_len is None else kv_len

        def spread(lengths: Sequence[int], heads: int, dim: int, size: float) -> tuple[Tensor, list[int]]:
            whole = torch.full((sum(lengths) + gap * len(lengths), heads, dim), torch.nan)
            starts, at = [], 0
            for n in lengths:
                starts.append(at + gap)
                whole[at + gap : at + gap + n] = torch.randn(n, heads, dim, generator=g) * size
                at += gap + n
            return whole.to(dtype), starts

        q, q_start = spread(q_len, Hq, D, sharpness)
        k, k_start = spread(kv_len, Hkv, D, 1.0)
        v, _ = spread(kv_len, Hkv, Dv or D, 1.0)
        lens = Ragged.of(list(q_len), list(kv_len), q_start=q_start)
        return cls(q, ContiguousKeys(k, v, torch.tensor(k_start), lens.kv_len), lens, D**-0.5, softcap)

    def doubled(self) -> Case:
        """The same numbers in fp64."""
        keys = self.keys
        assert isinstance(keys, ContiguousKeys)
        return replace(self, q=self.q.double(), keys=replace(keys, k=keys.k.double(), v=keys.v.double()))

    def random_plan(self, block_size: int, density: float = 0.4, *, heads: int | None = None, diagonal: bool = True, seed: int = 1) -> BlockPlan:
        """Lists of random tiles, sink kept; without `diagonal` rows may miss their own block or everything."""
        g = torch.Generator().manual_seed(seed)
        masks = []
        for rows in self.lens.rows():
            nq, nk = rows.query_blocks(block_size), rows.key_blocks(block_size)
            keep = torch.rand(heads or self.q.shape[1], nq, nk, generator=g) < density
            below = torch.ones(nq, nk, dtype=torch.bool).tril(rows.first_block(block_size))
            if diagonal:
                keep |= below & ~below.tril(rows.first_block(block_size) - 1)
                keep[:, :, :1] = True
            masks.append(keep & below)
        return ListPlan.from_mask(masks, self.lens, block_size)

    def exact(self, plan: BlockPlan | None = None) -> tuple[Tensor, Tensor]:
        """Output and LSE in fp64; without a plan the dense ones."""
        double = self.doubled()
        if plan is None:
            return naive_dense(double.q, double.keys, self.lens, scale=self.scale, softcap=self.softcap)
        return naive_attention(double.q, double.keys, plan, self.lens, scale=self.scale, softcap=self.softcap)

    def naive(self, plan: BlockPlan) -> Tensor:
        return naive_attention(self.q, self.keys, plan, self.lens, scale=self.scale, softcap=self.softcap)[0]

    def run(self, plan: BlockPlan | None, route: Route | str = "fp32", *, wants_lse: bool = True) -> tuple[Tensor, Tensor]:
        """The CPU executor on one route, into buffers full of NaN."""
        out = torch.full((*self.q.shape[:2], self.keys.value_dim), torch.nan, dtype=self.q.dtype)
        lse = torch.full((self.q.shape[1], self.q.shape[0]), torch.nan)
        chosen = route if isinstance(route, Route) else ROUTES[route]
        cpu_attention(
            self.q, self.keys, plan, self.lens, scale=self.scale, softcap=self.softcap, out=out, lse=lse if wants_lse else None, route=chosen
        )
        return out, lse

    def real_rows(self) -> Tensor:
        """Rows of q that belong to a sequence, (T,) bool."""
        real = torch.zeros(self.q.shape[0], dtype=torch.bool)
        for rows in self.lens.rows():
            real[rows.q_start : rows.q_start + rows.q_len] = True
        return real


@pytest.fixture(scope="session")
def case() -> Callable[..., Case]:
    return Case.random


@pytest.fixture(scope="session")
def routes() -> dict[str, Route]:
    return ROUTES


@pytest.fixture(autouse=True, scope="session")
def _probe_results_stay_out_of_the_users_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCEL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
