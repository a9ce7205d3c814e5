"""Random blocks: what they are drawn from, what a draw depends on, and which calls stay dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_llama
from torch import Tensor

import accel
from accel.kernels.block_sparse import ContiguousKeys, ListPlan, Ragged, Rows
from accel.patches.random_blocks import RandomBlocks
from accel.protocols import AttentionContext, AttentionStep


def step(q_len: int, kv_len: int, *, layer: int = 0, batch: int = 1, heads: int = 4) -> AttentionStep:
    return AttentionStep(
        layer=layer, n_layers=2, batch=batch, q_len=q_len, kv_len=kv_len, n_heads=heads, n_kv_heads=2, head_dim=8, device="cpu", dtype="float32"
    )


def masks(method: RandomBlocks, q_len: list[int], kv_len: list[int], *, layer: int = 0, heads: int = 4) -> list[Tensor]:
    """The chosen tiles of each sequence, (heads, nq, nk)."""
    lens = Ragged.of(q_len, kv_len)
    here = step(max(q_len), max(kv_len), layer=layer, batch=len(q_len), heads=heads)
    keys = ContiguousKeys(torch.zeros(sum(kv_len), 2, 8), torch.zeros(sum(kv_len), 2, 8), torch.zeros(len(kv_len)).long(), lens.kv_len)
    plan = method.plan(torch.zeros(sum(q_len), heads, 8), keys, AttentionContext(step=here, lens=lens, scale=1.0))
    assert isinstance(plan, ListPlan)
    return [plan.block_mask(rows) for rows in lens.rows()]


def test_a_draw_depends_on_seed_layer_and_lengths_only() -> None:
    method = RandomBlocks(block_size=16, density=0.4)
    [first] = masks(method, [600], [600])
    assert torch.equal(masks(method, [600], [600])[0], first)
    assert torch.equal(masks(method, [100, 600, 0, 600], [300, 600, 20, 600])[1], first)
    others = {
        "seed": masks(RandomBlocks(block_size=16, density=0.4, seed=1), [600], [600])[0],
        "layer": masks(method, [600], [600], layer=1)[0],
        "length": masks(method, [601], [601])[0],
    }
    for name, other in others.items():
        # 38 blocks a side: two independent draws agree on about half of the tiles
        assert 0.2 < (other == first)[torch.ones_like(first).tril() > 0].float().mean() < 0.8, name


@settings(max_examples=60)
@given(n=st.integers(1, 700), data=st.data(), density=st.floats(0.01, 1.0), block=st.sampled_from([1, 16, 64]))
def test_each_head_reaches_the_density_to_the_nearest_tile(n: int, data: st.DataObject, density: float, block: int) -> None:
    q_len = data.draw(st.integers(1, n))
    [mask] = masks(RandomBlocks(block_size=block, density=density), [q_len], [n])
    rows = Rows(0, 0, q_len, n)
    own = torch.arange(rows.query_blocks(block)) + rows.first_block(block)
    # the own block and the first one, which row 0 has in one
    n_forced = 2 * len(own) - int((own == 0).sum())
    for head in mask:
        assert head[torch.arange(len(own)), own].all()
        assert head[:, 0].all()
        assert int(head.sum()) == n_forced or abs(int(head.sum()) - density * rows.causal_tiles(block)) <= 0.5
        assert int(head.sum()) >= n_forced


def test_every_tile_that_is_not_forced_is_equally_likely() -> None:
    n_blocks, heads = 12, 4000
    [mask] = masks(RandomBlocks(block_size=16, density=0.6), [192], [192], heads=heads)
    share = mask.float().mean(0)
    forced = torch.eye(n_blocks, dtype=torch.bool)
    forced[:, 0] = True
    free = torch.ones(n_blocks, n_blocks, dtype=torch.bool).tril() & ~forced
    expected = (round(0.6 * 78) - 23) / int(free.sum())
    assert (share[forced.tril()] == 1).all()
    # five standard deviations of a share of 4000 draws
    assert (share[free] - expected).abs().max() < 5 * (expected * (1 - expected) / heads) ** 0.5
    assert (share[~free & ~forced.tril()] == 0).all()


def test_a_sequence_without_queries_gets_no_tiles() -> None:
    found = masks(RandomBlocks(block_size=16), [0, 100], [40, 100])
    assert found[0].shape[1] == 0
    assert found[1].any()


@pytest.mark.parametrize(
    ("options", "q_len", "kv_len", "reason"),
    [
        ({}, 257, 257, None),
        ({}, 256, 256, "shorter than 257 tokens"),
        ({}, 1, 4096, "decode"),
        ({}, 8, 4096, "few query rows"),
        ({"density": 1}, 4096, 4096, "density 1 keeps everything"),
    ],
    ids=lambda value: repr(value),
)
def test_which_calls_stay_dense(options: dict, q_len: int, kv_len: int, reason: str | None) -> None:
    assert RandomBlocks(**{"min_seq_len": 0, **options}).dense_reason(step(q_len, kv_len)) == reason


@pytest.mark.parametrize("options", [{"seed": 0.5}, {"seed": True}, {"density": float("nan")}, {"density": 0}, {"block_size": 16.0}], ids=repr)
def test_values_of_a_wrong_kind_are_refused_by_name(options: dict) -> None:
    with pytest.raises(accel.OptionError, match=f"random_blocks: {next(iter(options))} must"):
        RandomBlocks(**options)


@torch.no_grad()
def test_a_padded_row_equals_the_same_row_alone_and_the_density_is_reported() -> None:
    model = tiny_llama()
    ids = torch.randint(2, 64, (2, 120), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    with accel.apply(model, RandomBlocks(block_size=16, density=0.7, min_seq_len=0)) as handle:
        together = model(ids, attention_mask=mask).logits[0, 37:]
        handle.stats.reset()
        alone = model(ids[:1, 37:]).logits[0]
        # 83 tokens, six blocks: 15 of 21 tiles
        assert handle.stats.density == 15 / 21
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
