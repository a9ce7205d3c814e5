"""The executors beside our own kernels: FlexAttention against the definition, flash_attn.cute by what it would be given."""

from __future__ import annotations

import sys
from collections import namedtuple
from types import ModuleType

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import ContiguousKeys, ImplicitPlan, PagedKeys, Ragged, VerticalSlashPlan, cute_executor, flex_executor
from accel.kernels.block_sparse.naive import naive_attention

BLOCK = 16


def lines(case, heads: int) -> VerticalSlashPlan:
    g = torch.Generator().manual_seed(3)
    nk = -(-case.lens.max_kv // BLOCK)
    vertical, slash = (torch.rand(case.lens.batch, heads, nk, generator=g) < 0.3 for _ in range(2))
    return VerticalSlashPlan(BLOCK, vertical, slash)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("kind", ["implicit", "lists", "lines"])
@pytest.mark.parametrize(
    "q_len, kv_len", [((33, 17), (33, 17)), ((20, 1), (53, 40))], ids=["whole prompts", "cached prefix off the grid"]
)
def test_flex_is_the_definition(case, q_len, kv_len, kind, softcap):
    given = case(q_len, kv_len, Hq=4, Hkv=2, gap=3, softcap=softcap)
    # torch computes a product with rows of padding, so those hold numbers here
    given.q.nan_to_num_(0.0)
    plan = {
        "implicit": lambda: ImplicitPlan(BLOCK, 1),
        "lists": lambda: given.random_plan(BLOCK, diagonal=False),
        "lines": lambda: lines(given, 4),
    }[kind]()
    out, lse = torch.full_like(given.q, torch.nan), torch.full((4, given.q.shape[0]), torch.nan)
    flex_executor.flex_executor(
        given.q, given.keys, plan, given.lens, scale=given.scale, softcap=softcap, out=out, lse=lse, attention=flex_attention
    )
    want, want_lse = naive_attention(given.q, given.keys, plan, given.lens, scale=given.scale, softcap=softcap)
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(lse, want_lse, atol=1e-5, rtol=1e-5)


def test_flex_refuses_pages():
    pages = PagedKeys(torch.zeros(1, 16, 1, 8), torch.zeros(1, 16, 1, 8), torch.zeros(1, 1, dtype=torch.int32), torch.tensor([16]))
    q = torch.zeros(16, 1, 8)
    with pytest.raises(UnsupportedError, match="contiguous"):
        flex_executor.flex_executor(
            q, pages, ImplicitPlan.dense(16), Ragged.of([16], [16]), scale=1.0, softcap=None, out=torch.empty_like(q), lse=None
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_both_say_why_they_cannot_run_here():
    assert "CUDA" in (flex_executor.available() or "")
    assert cute_executor.available() is not None


Lists = namedtuple("Lists", [*cute_executor.LIST_FIELDS[:4], "cu_total_m_blocks", "block_size"], defaults=[None, None])


@pytest.fixture
def cute(monkeypatch):
    """A `flash_attn.cute` that computes what its documentation says, on the CPU, and remembers what it was given."""
    package, interface, sparsity = ModuleType("flash_attn"), ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.block_sparsity")
    given: list[dict[str, object]] = []

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, softcap=0.0, block_sparse_tensors=None, return_lse=False):
        given.append({"q": q, "k": k, "lists": block_sparse_tensors, "causal": causal})
        assert causal
        rows, columns = q.shape[1], k.shape[1]
        size_q, size_k = block_sparse_tensors.block_size
        tiles = torch.zeros(q.shape[2], -(-rows // size_q), -(-columns // size_k), dtype=torch.bool)
        for count, index in zip(block_sparse_tensors[0:4:2], block_sparse_tensors[1:4:2], strict=True):
            assert count.dtype == index.dtype == torch.int32
            assert index.shape[-1] <= tiles.shape[2]
            assert count.shape[2] == tiles.shape[1]
            for h in range(q.shape[2]):
                for i in range(tiles.shape[1]):
                    head = h % count.shape[1]
                    listed = index[0, head, i, : count[0, head, i]].long()
                    assert not tiles[h, i, listed].any(), "a block is listed twice"
                    tiles[h, i, listed] = True
        visible = tiles.repeat_interleave(size_q, 1)[:, :rows].repeat_interleave(size_k, 2)[:, :, :columns]
        visible &= torch.arange(columns) <= torch.arange(rows)[:, None] + columns - rows
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("lhd,nhd->hln", q[0].float(), k[0].float().repeat_interleave(group, 1)) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        scores = scores.masked_fill(~visible, -torch.inf)
        probs = scores.softmax(-1).nan_to_num(0.0)
        out = torch.einsum("hln,nhd->lhd", probs, v[0].float().repeat_interleave(group, 1)).to(q.dtype)
        return out[None], scores.logsumexp(-1)[None] if return_lse else None

    package.cute = interface
    interface.flash_attn_func, interface.block_sparsity = flash_attn_func, sparsity
    sparsity.BlockSparseTensorsTorch = Lists
    for module in (package, interface, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    cute_executor._modules.cache_clear()
    yield given, interface
    cute_executor._modules.cache_clear()


@pytest.mark.parametrize("block", [64, 128, 256])
@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "softcap"])
def test_cute_gets_the_same_attention_as_lists(cute, case, block, softcap):
    given = case((300, 90), (300, 333), Hq=4, Hkv=2, gap=2, dtype=torch.float16, softcap=softcap)
    for plan in (ImplicitPlan(block, 1), given.random_plan(block, diagonal=False)):
        out, lse = torch.full_like(given.q, torch.nan), torch.full((4, given.q.shape[0]), torch.nan)
        cute_executor.cute_attention(given.q, given.keys, plan, given.lens, scale=given.scale, softcap=softcap, out=out, lse=lse)
        want, want_lse = naive_attention(given.q, given.keys, plan, given.lens, scale=given.scale, softcap=softcap)
        torch.testing.assert_close(out, want, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(lse, want_lse, atol=2e-3, rtol=1e-4)
    # the chunk behind a cached prefix starts on the grid: 333 - 90 = 243 tokens before it
    assert cute[0][1]["q"].shape[1] == 90 + 243 % block


def test_cute_lists_hold_no_piece_behind_the_last_key():
    rows = next(Ragged.of([300], [300]).rows())
    lists = cute_executor.cute_lists(ImplicitPlan.dense(256), rows, torch.device("cpu"))
    assert lists.block_size == (256, 128)
    # two pieces of the first diagonal block, one of the second, whose other piece starts at token 384
    assert lists.mask_block_cnt.tolist() == [[[2, 1]]]
    assert lists.mask_block_idx[0, 0, 1, :1].tolist() == [2]
    assert lists.full_block_cnt.tolist() == [[[0, 2]]]
    assert lists.full_block_idx[0, 0, 1, :2].tolist() == [0, 1]


def test_cute_names_every_obstacle(cute):
    lens = Ragged.of([32], [32])
    q, k = torch.zeros(32, 1, 256), torch.zeros(32, 1, 256)
    keys = ContiguousKeys(k, k, torch.zeros(1, dtype=torch.int64), lens.kv_len)
    with pytest.raises(UnsupportedError) as caught:
        cute_executor.cute_attention(q, keys, ImplicitPlan(32, 1), lens, scale=1.0, softcap=None, out=torch.empty_like(q), lse=None)
    assert [reason.split()[0] for reason in caught.value.reasons] == ["it", "head", "block_size"]


def test_another_release_is_recognised_by_what_it_lacks(cute):
    interface = cute[1]
    interface.flash_attn_func = lambda q, k, v, softmax_scale=None, causal=False: None
    assert cute_executor.available() == "this release of flash_attn.cute lacks softcap, block_sparse_tensors, return_lse"
