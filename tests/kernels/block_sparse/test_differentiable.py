"""Attention with gradients: the same outputs as the definition, gradients as finite differences have them, and FlexAttention's block mask."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, ImplicitPlan, ListPlan, PagedKeys, Ragged, VerticalSlashPlan
from accel.kernels.block_sparse.differentiable import (
    differentiable_attention,
    flex_block_mask,
    flex_sequence,
    masked_sequence,
    takes_flex,
    token_mask,
)
from accel.kernels.block_sparse.naive import naive_attention

BLOCK = 16


def random_lists(lens: Ragged, n_heads: int, block: int) -> ListPlan:
    """About half of the causal tiles, the diagonal not forced: some rows list nothing."""
    generator = torch.Generator().manual_seed(3)
    masks = []
    for rows in lens.rows():
        nq, nk = rows.query_blocks(block), rows.key_blocks(block)
        causal = torch.arange(nk) <= torch.arange(nq)[:, None] + rows.first_block(block)
        masks.append((torch.rand(n_heads, nq, nk, generator=generator) < 0.5) & causal)
    return ListPlan.from_mask(masks, lens, block)


def lines(lens: Ragged, n_heads: int, block: int) -> VerticalSlashPlan:
    generator = torch.Generator().manual_seed(4)
    nk = -(-lens.max_kv // block)
    vertical, slash = (torch.rand(lens.batch, n_heads, nk, generator=generator) < 0.3 for _ in range(2))
    slash[..., 0] = True
    return VerticalSlashPlan(block, vertical, slash)


PLANS = {
    "power": lambda lens, n_heads, block: ImplicitPlan(block, 2, 1),
    "dense": lambda lens, n_heads, block: ImplicitPlan.dense(block),
    "lines": lines,
    "lists with empty rows": random_lists,
}
# query lengths and key lengths of a batch; odd numbers, a cached prefix off the grid, a single row, a sequence without queries
SHAPES = {
    "whole": ([45], [45]),
    "prefix off the grid": ([33], [83]),
    "one row": ([1], [83]),
    "ragged": ([20, 0, 64], [20, 10, 100]),
}


def problem(shape: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Ragged]:
    """q (T, 4, 8), k and v (keys, 2, 8), key starts; the queries lie apart, with rows of no sequence between them."""
    q_len, kv_len = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    starts = [3 + sum(q_len[:b]) + 2 * b for b in range(len(q_len))]
    q, k, v = (
        torch.randn(n, h, 8, dtype=torch.float64, generator=generator).to(dtype)
        for n, h in ((starts[-1] + q_len[-1] + 2, 4), (sum(kv_len), 2), (sum(kv_len), 2))
    )
    key_start = torch.tensor([sum(kv_len[:b]) for b in range(len(kv_len))])
    return q, k, v, key_start, Ragged.of(q_len, kv_len, q_start=starts)


def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lens: Ragged, plan: BlockPlan, softcap: float | None) -> Tensor:
    return differentiable_attention(q, ContiguousKeys(k, v, starts, lens.kv_len), plan, lens, scale=0.4, softcap=softcap)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_equal_the_definition(shape: str, plan_name: str, softcap: float | None) -> None:
    q, k, v, starts, lens = problem(shape)
    plan = PLANS[plan_name](lens, 4, BLOCK)
    want, _ = naive_attention(q, ContiguousKeys(k, v, starts, lens.kv_len), plan, lens, scale=0.4, softcap=softcap)
    torch.testing.assert_close(run(q, k, v, starts, lens, plan, softcap), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("plan_name", PLANS)
def test_gradients_equal_those_of_a_masked_softmax(plan_name: str, softcap: float | None) -> None:
    q, k, v, starts, lens = problem("ragged")
    plan = PLANS[plan_name](lens, 4, BLOCK)
    weight = torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(9))
    got = [t.clone().requires_grad_() for t in (q, k, v)]
    (run(*got, starts, lens, plan, softcap) * weight).sum().backward()
    want = [t.clone().requires_grad_() for t in (q, k, v)]
    loss = torch.zeros((), dtype=q.dtype)
    for rows in lens.rows():
        own = slice(rows.q_start, rows.q_start + rows.q_len)
        keys = slice(int(starts[rows.index]), int(starts[rows.index]) + rows.kv_len)
        scores = torch.einsum("qhd,khd->hqk", want[0][own], want[1][keys].repeat_interleave(2, 1)) * 0.4
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        # exp over visible keys, by hand; rows of zeros divide by one
        seen = scores.exp() * token_mask(plan, rows)
        total = seen.sum(-1, keepdim=True)
        probs = seen / torch.where(total > 0, total, 1.0)
        loss = loss + (torch.einsum("hqk,khd->qhd", probs, want[2][keys].repeat_interleave(2, 1)) * weight[own]).sum()
    loss.backward()
    for a, b in zip(got, want, strict=True):
        assert a.grad.abs().max() > 0.01
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("plan_name", PLANS)
def test_gradients_equal_finite_differences_of_the_definition(plan_name: str, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 3, dtype=torch.float64, generator=generator) for n, h in ((5, 2), (9, 1), (9, 1)))
    starts, lens = torch.tensor([0]), Ragged.of([5], [9])
    plan = PLANS[plan_name](lens, 2, 2)
    assert torch.autograd.gradcheck(lambda *t: run(*t, starts, lens, plan, softcap), tuple(t.clone().requires_grad_() for t in (q, k, v)))

    # gradcheck compares with differences of the same function; these come from the naive definition
    def naive_sum(*tensors: Tensor) -> float:
        out, _ = naive_attention(tensors[0], ContiguousKeys(*tensors[1:], starts, lens.kv_len), plan, lens, scale=0.4, softcap=softcap)
        return float(out.pow(2).sum())

    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    run(*leaves, starts, lens, plan, softcap).pow(2).sum().backward()
    for which, leaf in enumerate(leaves):
        for flat in range(0, leaf.numel(), 7):
            moved = []
            for shift in (1e-6, -1e-6):
                tensors = [t.clone() for t in (q, k, v)]
                tensors[which].view(-1)[flat] += shift
                moved.append(naive_sum(*tensors))
            assert leaf.grad.view(-1)[flat].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "soft-capped"])
def test_bf16_gradients_follow_fp64(softcap: float | None) -> None:
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        q, k, v, starts, lens = problem("ragged", torch.bfloat16)
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        run(*leaves, starts, lens, ImplicitPlan(BLOCK, 2, 1), softcap).float().pow(2).sum().backward()
        grads.append([leaf.grad.double() for leaf in leaves])
    for low, exact in zip(*grads, strict=True):
        # measured 0.0018 to 0.0037, half a unit of bf16
        assert (low - exact).norm() / exact.norm() <= 0.008


def test_rows_of_no_sequence_are_zero_and_get_no_gradient() -> None:
    q, k, v, starts, lens = problem("ragged")
    q = q.requires_grad_()
    out = run(q, k, v, starts, lens, ImplicitPlan(BLOCK, 2, 1), None)
    is_gap = torch.ones(q.shape[0], dtype=torch.bool)
    for rows in lens.rows():
        is_gap[rows.q_start : rows.q_start + rows.q_len] = False
    assert (out[is_gap] == 0).all()
    out.sum().backward()
    assert (q.grad[is_gap] == 0).all()
    assert (q.grad[~is_gap].abs().sum((1, 2)) > 0).sum() > 50


def test_paged_keys_are_refused() -> None:
    keys = PagedKeys(torch.zeros(2, 16, 2, 8), torch.zeros(2, 16, 2, 8), torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([20]))
    with pytest.raises(UnsupportedError, match="contiguous"):
        differentiable_attention(torch.zeros(20, 4, 8), keys, ImplicitPlan(16, 2, 1), Ragged.of([20], [20]), scale=1.0)


# --- FlexAttention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_block_mask_for_flexattention_is_the_token_mask(shape: str, plan_name: str) -> None:
    *_, lens = problem(shape)
    plan = PLANS[plan_name](lens, 4, BLOCK)
    for rows in lens.rows():
        if not rows.q_len:
            continue
        mask = flex_block_mask(plan, rows, device="cpu")
        n_front = rows.offset % BLOCK
        assert mask.seq_lengths == (rows.q_len + n_front, rows.kv_len)
        # every list token by token: masked blocks by causality, full blocks whole, cut at the end of the keys
        shown = torch.zeros(mask.kv_num_blocks.shape[1], rows.q_len + n_front, rows.kv_len, dtype=torch.bool)
        query, key = torch.arange(shown.shape[1])[:, None], torch.arange(rows.kv_len)
        causal = query + rows.offset - n_front >= key
        for count, index, allowed in (
            (mask.kv_num_blocks, mask.kv_indices, causal),
            (mask.full_kv_num_blocks, mask.full_kv_indices, torch.ones_like(causal)),
        ):
            for head in range(shown.shape[0]):
                for i in range(count.shape[2]):
                    for j in index[0, head, i, : int(count[0, head, i])].tolist():
                        tile = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                        shown[head][tile] |= allowed[tile]
        assert torch.equal(shown[:, n_front:], token_mask(plan, rows))
        head = torch.arange(shown.shape[0])[:, None, None]
        assert torch.equal(mask.mask_mod(torch.tensor(0), head, query, key).expand_as(shown), shown)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_the_mask_lies_where_the_queries_do(softcap: float | None) -> None:
    # plans of patterns and of the host have their masks on the CPU; a device without values shows what would not reach a GPU
    q, k, v = (torch.empty(heads, 45, 8, device="meta") for heads in (4, 2, 2))
    rows = next(Ragged.of([45], [45]).rows())
    assert masked_sequence(q, k, v, ImplicitPlan(BLOCK, 2), rows, scale=0.3, softcap=softcap).device.type == "meta"


def test_flexattention_takes_large_blocks_on_cuda_alone() -> None:
    cuda = torch.device("cuda", 0)
    assert [takes_flex(cuda, block) for block in (16, 64, 128, 192, 256)] == [False, False, True, False, True]
    assert not takes_flex(torch.device("cpu"), 128)


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "soft-capped"])
@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("shape", SHAPES)
def test_uncompiled_flexattention_equals_masked_attention(shape: str, plan_name: str, softcap: float | None) -> None:
    q, k, v, starts, lens = problem(shape, torch.float32)
    plan = PLANS[plan_name](lens, 4, BLOCK)
    for rows in lens.rows():
        if not rows.q_len:
            continue
        sequence = q[rows.q_start : rows.q_start + rows.q_len].transpose(0, 1)
        key, value = ContiguousKeys(k, v, starts, lens.kv_len).tokens(rows.index)
        got = flex_sequence(sequence, key, value, plan, rows, scale=0.4, softcap=softcap, attention=flex_attention)
        want = masked_sequence(sequence, key, value, plan, rows, scale=0.4, softcap=softcap)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_flexattention_reads_the_block_lists() -> None:
    # the compiled kernel skips what the lists leave out, the uncompiled function above does not read them
    compiled = torch.compile(flex_attention, dynamic=False)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(h, n, 64, generator=generator) for h, n in ((4, 300), (2, 812), (2, 812)))
    lens = Ragged.of([300], [812])
    [rows] = lens.rows()
    plan = random_lists(lens, 4, 128)
    with torch.no_grad():
        got = flex_sequence(q, k, v, plan, rows, scale=0.1, softcap=None, attention=compiled)
    torch.testing.assert_close(got, masked_sequence(q, k, v, plan, rows, scale=0.1, softcap=None), rtol=1e-4, atol=1e-5)
