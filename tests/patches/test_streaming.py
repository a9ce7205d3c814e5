"""Sink and window: the pattern, the window chosen by density, and which calls stay dense."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_llama
from torch import Tensor

import accel
from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, Ragged, Rows
from accel.patches.streaming import Streaming
from accel.protocols import AttentionContext, AttentionStep


def step(q_len: int, kv_len: int, *, batch: int = 1) -> AttentionStep:
    return AttentionStep(
        layer=0, n_layers=2, batch=batch, q_len=q_len, kv_len=kv_len, n_heads=4, n_kv_heads=2, head_dim=8, device="cpu", dtype="float32"
    )


def answer(method: Streaming, q_len: list[int], kv_len: list[int]) -> tuple[BlockPlan, Ragged]:
    """The plan as a host gets it: static where there is one, else from `plan`."""
    lens = Ragged.of(q_len, kv_len)
    here = step(max(q_len), max(kv_len), batch=len(q_len))
    static = method.static_pattern(here)
    if static is not None:
        return static, lens
    keys = ContiguousKeys(torch.zeros(sum(kv_len), 2, 8), torch.zeros(sum(kv_len), 2, 8), torch.zeros(len(kv_len)).long(), lens.kv_len)
    return method.plan(torch.zeros(sum(q_len), 4, 8), keys, AttentionContext(step=here, lens=lens, scale=1.0)), lens


@settings(max_examples=60)
@given(
    n=st.integers(1, 600), data=st.data(), sink=st.integers(0, 3), block=st.sampled_from([1, 4, 16]), density=st.floats(0.01, 1.0, exclude_min=True)
)
def test_no_other_window_comes_closer_to_the_density(n: int, data: st.DataObject, sink: int, block: int, density: float) -> None:
    q_len = data.draw(st.integers(1, n))
    rows = Rows(0, 0, q_len, n)

    def error(window: int) -> float:
        tiles = Streaming(block_size=block, window_blocks=window, sink_blocks=sink).static_pattern(step(q_len, n)).block_mask(rows).sum()
        return abs(int(tiles) - density * rows.causal_tiles(block))

    chosen = Streaming(block_size=block, sink_blocks=sink, density=density).window_at(q_len, n)
    assert chosen >= 1
    assert error(chosen) == min(error(window) for window in range(1, rows.key_blocks(block) + 1))


def test_the_window_at_a_million_tokens_is_found_without_walking_all_of_them() -> None:
    plan, _ = answer(Streaming(density=0.05), [2**20], [2**20])
    window = plan.window_blocks  # type: ignore[attr-defined]
    # 8192 blocks: all rows but the first few list window + 1, of a mean of 4096.5
    assert (window + 1) / 4096.5 == pytest.approx(0.05, rel=0.03)


def test_each_sequence_of_a_batch_gets_the_window_it_would_get_alone() -> None:
    method = Streaming(block_size=16, density=0.3)
    q_len, kv_len = [700, 330, 0, 100], [700, 330, 40, 500]
    together, lens = answer(method, q_len, kv_len)
    for rows in lens.rows():
        alone, _ = answer(method, [rows.q_len], [rows.kv_len])
        assert torch.equal(together.block_mask(rows), alone.block_mask(rows))
    masks = [together.block_mask(rows) for rows in lens.rows()]
    assert masks[0][0, -1].sum() > masks[1][0, -1].sum()


@pytest.mark.parametrize(
    ("options", "q_len", "kv_len", "reason"),
    [
        ({}, 4096, 4096, None),
        ({}, 1152, 1152, "shorter than 1153 tokens"),
        ({}, 1153, 1153, None),
        ({}, 1, 4096, "decode"),
        ({}, 5, 4096, "few query rows"),
        ({}, 256, 4096, None),
        ({"density": 1.0}, 4096, 4096, "density 1 keeps everything"),
        ({"density": 0.5}, 257, 257, None),
        ({"density": 0.5}, 256, 256, "shorter than 257 tokens"),
        ({"min_seq_len": 5000}, 4096, 4096, "shorter than 5000 tokens"),
        ({"dense_layers": (0,)}, 4096, 4096, "dense layer"),
    ],
    ids=lambda value: repr(value),
)
def test_which_calls_stay_dense(options: dict, q_len: int, kv_len: int, reason: str | None) -> None:
    assert Streaming(**{"min_seq_len": 0, **options}).dense_reason(step(q_len, kv_len)) == reason


@pytest.mark.parametrize(("window", "sink"), [(1, 0), (1, 1), (3, 2), (8, 1)])
def test_the_shortest_useful_length_is_the_first_with_a_hidden_tile(window: int, sink: int) -> None:
    method = Streaming(block_size=16, window_blocks=window, sink_blocks=sink)
    n = method.min_useful_len
    assert answer(method, [n - 1], [n - 1])[0].density(Ragged.of([n - 1], [n - 1]), 4) == 1.0
    assert answer(method, [n], [n])[0].density(Ragged.of([n], [n]), 4) < 1.0


@pytest.mark.parametrize(
    "options",
    [{"block_size": True}, {"window_blocks": 2.0}, {"sink_blocks": "1"}, {"density": float("nan")}, {"density": "half"}, {"density": True}],
    ids=lambda options: repr(options),
)
def test_values_of_a_wrong_kind_are_refused_by_name(options: dict) -> None:
    with pytest.raises(accel.OptionError, match=f"streaming: {next(iter(options))} must"):
        Streaming(**options)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(2, 64, (2, 120), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_padded_row_equals_the_same_row_alone_also_with_a_density(ids: Tensor) -> None:
    model = tiny_llama()
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    with accel.apply(model, Streaming(block_size=16, density=0.6, min_seq_len=0)) as handle:
        together = model(ids, attention_mask=mask).logits[0, 37:]
        alone = model(ids[:1, 37:]).logits[0]
        assert handle.stats.total.sparse_calls == 6
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_it_trains(ids: Tensor) -> None:
    model = tiny_llama()
    with accel.apply(model, Streaming(block_size=16, window_blocks=1, min_seq_len=0)):
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
