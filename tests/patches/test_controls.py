"""The controls of every table: dense, streaming and random blocks."""

from __future__ import annotations

import accel
import pytest
import torch
from accel.errors import OptionError
from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, Ragged
from accel.patches.dense import Dense
from accel.patches.random_blocks import RandomBlocks
from accel.patches.streaming import Streaming
from accel.protocols import AttentionContext, AttentionStep, SparseAttention
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_llama


def plan_of(method: SparseAttention, kv_len: int, q_len: int | None = None, *, layer: int = 0, heads: int = 4) -> tuple[BlockPlan, Ragged]:
    q_len = kv_len if q_len is None else q_len
    shape = AttentionStep(
        layer=layer, n_layers=2, batch=1, q_len=q_len, kv_len=kv_len, n_heads=heads, n_kv_heads=1, head_dim=8, device="cpu", dtype="float32"
    )  # fmt: skip
    lens = Ragged.of([q_len], [kv_len])
    k = torch.zeros(kv_len, 1, 8)
    keys = ContiguousKeys(k=k, v=k, start=torch.zeros(1, dtype=torch.int64), kv_len=lens.kv_len)
    plan = method.plan(torch.zeros(q_len, heads, 8), keys, AttentionContext(step=shape, lens=lens, scale=1.0))
    assert isinstance(plan, BlockPlan)
    return plan, lens


@settings(max_examples=50, deadline=None)
@given(kv_len=st.integers(1, 2000), data=st.data(), density=st.floats(0.01, 1.0), seed=st.integers(0, 5))
def test_random_blocks_hit_their_density_to_the_tile(kv_len: int, data: st.DataObject, density: float, seed: int) -> None:
    q_len = data.draw(st.integers(1, kv_len))
    plan, lens = plan_of(RandomBlocks(block_size=64, density=density, seed=seed), kv_len, q_len)
    (rows,) = lens.rows()
    mask = plan.block_mask(rows)
    causal = rows.causal_tiles(64)
    first = rows.first_block(64)
    forced = sum(1 if i == 0 else 2 for i in range(first, rows.key_blocks(64)))
    assert mask.sum((1, 2)).tolist() == [max(round(density * causal), forced)] * 4
    assert mask[:, :, 0].all()
    assert all(mask[:, i, first + i].all() for i in range(mask.shape[1]))


def test_random_blocks_repeat_for_a_seed_and_differ_between_layers_and_heads() -> None:
    method = RandomBlocks(density=0.4)
    masks = [plan.block_mask(next(lens.rows())) for plan, lens in (plan_of(method, 4096, layer=layer) for layer in (0, 0, 1))]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


@settings(max_examples=40, deadline=None)
@given(kv_len=st.integers(1024, 8192), density=st.floats(0.1, 1.0))
def test_a_streaming_window_chosen_by_density_is_the_closest_one(kv_len: int, density: float) -> None:
    def reached(**options: object) -> float:
        plan, lens = plan_of(Streaming(**options), kv_len)  # type: ignore[arg-type]
        return plan.density(lens, 4)

    error = abs(reached(density=density) - density)
    every_window = [abs(reached(window_blocks=w) - density) for w in range(1, -(-kv_len // 128) + 1)]
    assert error <= min(every_window) + 1e-9


def test_streaming_reads_sink_and_window_only() -> None:
    plan, lens = plan_of(Streaming(block_size=16, window_blocks=2, sink_blocks=1), 100)
    rows = plan.block_mask(next(lens.rows()))[0]
    assert torch.nonzero(rows[6]).flatten().tolist() == [0, 5, 6]


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["original", "gemm"])
def test_the_dense_control_counts_every_call_and_changes_nothing(kernel: str) -> None:
    model = tiny_llama()
    ids = torch.randint(2, 64, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    dense = model(ids, attention_mask=mask).logits
    with accel.apply(model, Dense(dense_kernel=kernel)) as handle:  # type: ignore[arg-type]
        out = model(ids, attention_mask=mask).logits
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    real = mask.bool()
    torch.testing.assert_close(out[real], dense[real], atol=1e-6 if kernel == "gemm" else 0, rtol=1e-5 if kernel == "gemm" else 0)
    assert torch.equal(tokens, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False))
    # one prefill, then a prefill and three decoding steps in generate
    assert handle.stats.total.dense_calls == {"dense control": 15}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (Streaming, {"window_blocks": 0}),
        (Streaming, {"sink_blocks": -1}),
        (Streaming, {"density": 0.0}),
        (RandomBlocks, {"density": 1.5}),
        (RandomBlocks, {"block_size": 0}),
        (Dense, {"dense_kernel": "fast"}),
        (Dense, {"precision": "low"}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else next(iter(value)),
)
def test_options_out_of_range_raise(method: type[SparseAttention], options: dict) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        method(**options)
