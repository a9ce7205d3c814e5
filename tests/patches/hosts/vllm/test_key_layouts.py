"""Keys in the layouts of vLLM's backends, read as any other keys; and the mean keys of pages, kept until a page is written to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import accel
from accel.kernels.block_sparse import ContiguousKeys, KeyView, PagedKeys, Ragged
from accel.kernels.flex_index import flex_index
from accel.patches.hosts.vllm.attention.layouts import TiledKeys, joint_keys, plain_pages, sides
from accel.patches.hosts.vllm.attention.pooled import PageMeans, PooledKeys
from accel.protocols import AttentionStep

PAGES, PAGE, HKV, D = 9, 32, 2, 64
TABLE = torch.tensor([[7, 2, 5, 1], [3, 8, 0, 0]], dtype=torch.int32)
KV_LEN = torch.tensor([110, 40])


def tokens(seed: int = 0) -> tuple[Tensor, Tensor]:
    """K and V of all pages, (pages, page, Hkv, D)."""
    g = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(PAGES, PAGE, HKV, D, generator=g) for _ in range(2))
    return k, v


def joint(k: Tensor, v: Tensor) -> KeyView:
    """As the GPU backends keep them: (pages, Hkv, page, 2·D)."""
    return joint_keys(torch.cat([k, v], -1).transpose(1, 2).contiguous(), D, TABLE, KV_LEN)


def plain(k: Tensor, v: Tensor) -> KeyView:
    """As the vector kernels of CPUs keep them: K transposed inside its page, and V behind it."""
    inside = [k.permute(0, 2, 3, 1).flatten(2), v.transpose(1, 2).flatten(2)]
    cache = torch.cat(inside, -1).view(PAGES, HKV, PAGE, 2 * D)
    return PooledKeys(*plain_pages(cache), TABLE, KV_LEN)


def tiled(k: Tensor, v: Tensor, pool: PageMeans | None = None) -> TiledKeys:
    """As the AMX kernels keep them, element by element."""
    cache = torch.zeros(PAGES, HKV, PAGE, 2 * D)
    packed_k, packed_v = (side.flatten(2) for side in sides(cache))
    token, dim = torch.arange(PAGE)[:, None], torch.arange(D)
    at_k = token // 16 * 16 * D + dim // 2 * 32 + token % 16 * 2 + dim % 2
    at_v = dim // 16 * 16 * PAGE + token // 2 * 32 + dim % 16 * 2 + token % 2
    k_in, v_in = torch.zeros_like(packed_k), torch.zeros_like(packed_v)
    k_in[..., at_k.flatten()] = k.transpose(1, 2).flatten(2)
    v_in[..., at_v.flatten()] = v.transpose(1, 2).flatten(2)
    for side, filled in zip(sides(cache), (k_in, v_in), strict=True):
        side.copy_(filled.view(side.shape))
    return TiledKeys(*sides(cache), TABLE, KV_LEN, pool)


@pytest.mark.parametrize("layout", [joint, plain, tiled], ids=lambda f: f.__name__)
def test_every_layout_holds_the_same_keys(layout: Any) -> None:
    k, v = tokens()
    plainly, found = PagedKeys(k, v, TABLE, KV_LEN), layout(k, v)
    assert (found.n_kv_heads, found.head_dim, found.value_dim, found.dtype) == (HKV, D, D, torch.float32)
    for b in (0, 1):
        for got, wanted in zip(found.tokens(b), plainly.tokens(b), strict=True):
            assert torch.equal(got, wanted)
        for got, wanted in zip(found.head_tokens(b, range(1, 2)), plainly.head_tokens(b, range(1, 2)), strict=True):
            assert torch.equal(got, wanted)
    # whole pages, parts of pages, and blocks behind the end
    for blocks, block_size in (([0, 1], 64), ([1, 6], 16), ([2, 0], 48)):
        index = torch.tensor(blocks)
        for got, wanted in zip(found.gather(0, index, block_size), plainly.gather(0, index, block_size), strict=True):
            assert torch.equal(got, wanted)


def pooled(k: Tensor, v: Tensor, pool: PageMeans, table: Tensor = TABLE, kv_len: Tensor = KV_LEN) -> PooledKeys:
    return PooledKeys(k, v, table, kv_len, pool)


@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize("kind", ["plain", "tiled"])
def test_kept_means_are_the_means(block_size: int, kind: str) -> None:
    k, v = tokens()
    pool = PageMeans.empty(PAGES, HKV, D)
    view = pooled(k, v, pool) if kind == "plain" else tiled(k, v, pool)
    plainly = PagedKeys(k, v, TABLE, KV_LEN)
    assert view.keeps_means(block_size)
    for _ in range(2):
        for b in (0, 1):
            torch.testing.assert_close(view.block_mean(b, block_size), plainly.block_mean(b, block_size))


def test_means_are_computed_once_and_again_after_a_write() -> None:
    k, v = tokens()
    pool = PageMeans.empty(PAGES, HKV, D)
    view = pooled(k, v, pool)
    first = view.block_mean(0, 32)
    # pages 7, 2 and 5 are full; page 1 holds the last 14 tokens
    assert pool.known.nonzero()[:, 0].tolist() == [2, 5, 7]
    k.fill_(100.0)
    assert torch.equal(view.block_mean(0, 32)[:, :3], first[:, :3])
    # the last token of page 2, and padding
    pool.forget(torch.tensor([2 * PAGE + 31, -1]), PAGE)
    again = view.block_mean(0, 32)
    assert torch.equal(again[:, [0, 2]], first[:, [0, 2]])
    assert (again[:, 1] == 100).all()


def test_a_prefix_written_by_one_request_serves_another() -> None:
    k, v = tokens()
    pool = PageMeans.empty(PAGES, HKV, D)
    pooled(k, v, pool).block_mean(0, 32)
    # shares pages 7 and 2, then goes its own way into page 4
    table, kv_len = torch.tensor([[7, 2, 4, 0]], dtype=torch.int32), torch.tensor([96])
    found = pooled(k, v, pool, table, kv_len).block_mean(0, 32)
    torch.testing.assert_close(found, PagedKeys(k, v, table, kv_len).block_mean(0, 32))


def test_without_a_pool_or_whole_pages_nothing_is_kept() -> None:
    k, v = tokens()
    pool = PageMeans.empty(PAGES, HKV, D)
    assert not pooled(k, v, pool).keeps_means(16)
    assert not PooledKeys(k, v, TABLE, KV_LEN).keeps_means(32)
    torch.testing.assert_close(pooled(k, v, pool).block_mean(0, 16), PagedKeys(k, v, TABLE, KV_LEN).block_mean(0, 16))
    assert not pool.known.any()


def test_the_selection_reads_kept_means() -> None:
    k, v = tokens()
    pool = PageMeans.empty(PAGES, HKV, D)
    q = 2 * torch.randn(70, 4, D, generator=torch.Generator().manual_seed(3))
    lens = Ragged.of([70], [110])
    # every head follows the pooled estimate
    method = accel.FlexPrefill(block_size=32, min_budget=32, gamma=0.5, tau=1.0, min_seq_len=0)
    step = AttentionStep(0, 1, 1, 70, 110, 4, HKV, D, "cpu", "float32")

    def select(keys: KeyView) -> Tensor:
        found = flex_index(q, keys, lens, rule=method.rule(step), scale=D**-0.5)
        assert found.plan.extra is not None
        return found.plan.block_mask(next(iter(lens.rows())))

    table, kv_len = TABLE[:1], KV_LEN[:1]
    contiguous = ContiguousKeys(*(t.transpose(0, 1) for t in PagedKeys(k, v, table, kv_len).tokens(0)), torch.tensor([0]), kv_len)
    wanted = select(contiguous)
    assert torch.equal(select(pooled(k, v, pool, table, kv_len)), wanted)
    assert pool.known.sum() == 3
    # and not the keys: wrong means select otherwise
    pool.means[TABLE[0, :3].long()] = torch.randn(3, HKV, D, generator=torch.Generator().manual_seed(5)) * 9
    assert not torch.equal(select(pooled(k, v, pool, table, kv_len)), wanted)
