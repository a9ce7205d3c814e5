"""The kernels on keys in the layout of vLLM's GPU backends: K and V side by side in one cache, pages in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accel.kernels.block_sparse import ImplicitPlan, KeyView, PagedKeys, Ragged, block_sparse_attention
from accel.kernels.block_sparse.naive import naive_attention
from accel.kernels.flex_index import flex_index
from accel.kernels.flex_index.rule import SelectionRule
from accel.patches.hosts.vllm.attention.layouts import joint_keys

HQ, HKV, D, PAGE = 4, 2, 32, 16
PLAN = ImplicitPlan(block_size=32, window_blocks=1)


def cached(kv_len: list[int], *, by_head: bool) -> KeyView:
    """Random keys; NaN where no key lies. by_head: heads outermost in a page, as vLLM prefers it, or tokens."""
    g = torch.Generator().manual_seed(1)
    width = max(-(-n // PAGE) for n in kv_len)
    table = torch.randperm(len(kv_len) * width, generator=g).view(-1, width).to(torch.int32)
    shape = (table.numel(), HKV, PAGE, 2 * D) if by_head else (table.numel(), PAGE, HKV, 2 * D)
    cache = torch.full(shape, torch.nan)
    cache = cache if by_head else cache.transpose(1, 2)
    for row, n in enumerate(kv_len):
        for at in range(n):
            cache[table[row, at // PAGE], :, at % PAGE] = torch.randn(HKV, 2 * D, generator=g)
    return joint_keys(cache, D, table, torch.tensor(kv_len))


def queries(q_len: list[int]) -> Tensor:
    return torch.randn(sum(q_len), HQ, D, generator=torch.Generator().manual_seed(2))


def gathered(keys: KeyView) -> PagedKeys:
    """The same keys in pages of their own, K apart from V, in order."""
    assert isinstance(keys, PagedKeys)
    k, v = (t.index_select(0, keys.page_table.flatten().long()).contiguous() for t in (keys.k_pages, keys.v_pages))
    table = torch.arange(keys.page_table.numel(), dtype=torch.int32).view(keys.page_table.shape)
    return PagedKeys(k, v, table, keys.kv_len)


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize(("q_len", "kv_len"), [([40, 70], [110, 70]), ([1, 1, 1], [130, 33, 5])], ids=["prompts", "decoding"])
def test_attention_over_vllms_pages(q_len: list[int], kv_len: list[int], by_head: bool) -> None:
    q, keys, lens = queries(q_len), cached(kv_len, by_head=by_head), Ragged.of(q_len, kv_len)
    found = block_sparse_attention(q, keys, PLAN, lens, scale=D**-0.5, impl="triton")
    wanted, _ = naive_attention(q, gathered(keys), PLAN, lens, scale=D**-0.5, softcap=None)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_selection_over_vllms_pages() -> None:
    q, keys, lens = queries([64, 40]), cached([112, 90], by_head=True), Ragged.of([64, 40], [112, 90])
    rule = SelectionRule(block_size=32, gamma=0.6, tau=0.3, min_budget=32, min_q=1, min_kv=1)
    found, wanted = (flex_index(q, k, lens, rule=rule, scale=D**-0.5, impl=impl).plan for k, impl in ((keys, "triton"), (gathered(keys), "naive")))
    for rows in lens.rows():
        assert torch.equal(found.block_mask(rows), wanted.block_mask(rows))
        assert not bool(found.block_mask(rows).all())
