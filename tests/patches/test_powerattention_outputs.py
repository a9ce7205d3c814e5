"""Attention under PowerAttention's mask, on the definition and on the CPU executor: sparse-attention.md §3.8 items 3, 6, 7, 8, 10."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from support import assert_error_bounded
from torch import Tensor

from accel.kernels.block_sparse import ContiguousKeys, ImplicitPlan, Ragged, Rows, block_sparse_attention
from accel.kernels.block_sparse.differentiable import token_mask
from accel.kernels.block_sparse.naive import naive_attention, naive_dense
from accel.patches.powerattention import PowerAttention
from accel.protocols import AttentionContext, AttentionStep

BLOCK = 16
METHOD = PowerAttention(block_size=BLOCK, min_seq_len=0, is_adapted=True)
SCALE = 0.25


class Case(NamedTuple):
    """One sequence: q (N, 4, 16), k and v (N, 2, 16)."""

    q: Tensor
    k: Tensor
    v: Tensor

    def prefix(self, n: int) -> Case:
        return Case(*(t[:n].clone() for t in self))


def case(n: int, dtype: torch.dtype = torch.float32) -> Case:
    generator = torch.Generator().manual_seed(n)
    return Case(*(torch.randn(n, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2)))


def attend(c: Case, impl: str, *, start: int = 0, end: int | None = None, plan: ImplicitPlan | None = None) -> Tensor:
    """Output rows start … end − 1 of a call that holds just these queries and all keys before `end`."""
    n = c.k.shape[0] if end is None else end
    q, lens = c.q[start:n], Ragged.of([n - start], [n])
    keys = ContiguousKeys(c.k[:n], c.v[:n], torch.tensor([0]), torch.tensor([n]))
    chosen = planned(q, keys, lens, n) if plan is None else plan
    out = torch.full_like(q, math.nan)
    return block_sparse_attention(q, keys, chosen, lens, scale=SCALE, out=out, impl=impl)  # type: ignore[call-overload]


def planned(q: Tensor, keys: ContiguousKeys, lens: Ragged, n: int) -> ImplicitPlan:
    step = AttentionStep(
        layer=0, n_layers=1, batch=1, q_len=q.shape[0], kv_len=n, n_heads=4, n_kv_heads=2, head_dim=16, device="cpu", dtype="float32"
    )
    return METHOD.plan(q, keys, AttentionContext(step=step, lens=lens, scale=SCALE))


@pytest.fixture(params=["naive", "cpu"])
def impl(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("n", [1, 15, 95, 96], ids=lambda n: f"N{n}")
def test_output_is_dense_up_to_six_blocks(impl: str, n: int) -> None:
    c = case(n)
    torch.testing.assert_close(attend(c, impl), attend(c, impl, plan=ImplicitPlan.dense(BLOCK)), rtol=1e-5, atol=1e-6)


def test_one_token_more_differs_from_dense_in_its_last_row_only(impl: str) -> None:
    c = case(97)
    gap = (attend(c, impl) - attend(c, impl, plan=ImplicitPlan.dense(BLOCK))).abs().amax((1, 2))
    assert gap[:96].max() <= 1e-6
    assert gap[96] > 1e-3


def test_a_key_changes_no_output_before_it(impl: str) -> None:
    c = case(333)
    before = attend(c, impl)
    for t in (0, 15, 16, 200, 332):
        k, v = c.k.clone(), c.v.clone()
        k[t] += 1
        v[t] -= 1
        after = attend(Case(c.q, k, v), impl)
        assert torch.equal(after[:t], before[:t])
        assert not torch.equal(after[t], before[t])


def test_a_key_outside_every_visible_block_leaves_the_output_bit_identical(impl: str) -> None:
    c = case(333)
    visible = token_mask(METHOD.static_pattern(None), Rows(0, 0, 333, 333))[0]  # type: ignore[arg-type]
    before = attend(c, impl)
    n_hidden = 0
    for t in (20, 77, 150):
        k, v = c.k.clone(), c.v.clone()
        k[t] += 1
        v[t] -= 1
        after = attend(Case(c.q, k, v), impl)
        changed = (after != before).any(-1).any(-1)
        assert torch.equal(changed, visible[:, t])
        n_hidden += int((~visible[t:, t]).sum())
    assert n_hidden > 100


SPLITS = [[0, 333], [0, 1, 333], [0, 100, 200, 333], [0, 160, 320, 333], [0, 7, 8, 250, 251, 333]]


@pytest.mark.parametrize("cuts", SPLITS, ids=lambda cuts: "-".join(map(str, cuts[1:])))
def test_a_prompt_in_chunks_gives_the_same_rows(impl: str, cuts: list[int]) -> None:
    c = case(333)
    pieces = [attend(c, impl, start=a, end=b) for a, b in pairwise(cuts)]
    torch.testing.assert_close(torch.cat(pieces), attend(c, impl), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0, 15, 16, 95, 96, 159, 160, 300, 332])
def test_a_decoding_step_equals_its_row_of_the_prefill(impl: str, t: int) -> None:
    c = case(333)
    torch.testing.assert_close(attend(c, impl, start=t, end=t + 1)[0], attend(c, impl)[t], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [95, 96, 97, 160, 300], ids=lambda n: f"N{n}")
def test_growing_changes_no_earlier_row(impl: str, n: int) -> None:
    c = case(333)
    torch.testing.assert_close(attend(c.prefix(n), impl), attend(c, impl)[:n], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_executor_stays_within_twice_the_error_of_the_definition(dtype: torch.dtype) -> None:
    c = case(333, dtype)
    exact = attend(Case(*(t.double() for t in c)), "naive")
    assert_error_bounded(attend(c, "cpu"), exact, attend(c, "naive"), block=BLOCK)


def test_the_distance_to_dense_attention_obeys_the_bound_of_the_lost_mass() -> None:
    c = Case(*(t.double() for t in case(333)))
    lens = Ragged.of([333], [333])
    keys = ContiguousKeys(c.k, c.v, torch.tensor([0]), torch.tensor([333]))
    sparse, lse = naive_attention(c.q, keys, METHOD.static_pattern(None), lens, scale=SCALE)  # type: ignore[arg-type]
    dense, dense_lse = naive_dense(c.q, keys, lens, scale=SCALE)
    # (Hq, N) -> (N, Hq): dense mass of the selected keys
    mass = (lse - dense_lse).exp().T
    assert mass.max() <= 1 + 1e-12
    assert mass.min() < 0.95
    largest_value = c.v.norm(dim=-1).amax(0).repeat_interleave(2)
    assert ((sparse - dense).norm(dim=-1) <= 2 * (1 - mass) * largest_value + 1e-12).all()
