"""Every path of the CPU executor against the definition in fp64, query block by query block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import assert_error_bounded

from accel.kernels.block_sparse import ImplicitPlan, ListPlan, VerticalSlashPlan
from accel.kernels.block_sparse.cpu_common import workspace
from accel.kernels.block_sparse.cpu_probe import Route

BLOCK = 32


def check(one, plan, route, *, floor=1e-5, dtype_floor=None):
    """Output per query block and LSE against fp64; returns the output."""
    exact, exact_lse = one.exact(plan)
    out, lse = one.run(plan, route)
    reference = one.naive(plan if plan is not None else ImplicitPlan.dense(BLOCK))
    assert_error_bounded(out, exact, reference, block=BLOCK, floor=floor if dtype_floor is None else dtype_floor)
    seen = torch.isfinite(exact_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert (lse[seen] - exact_lse[seen]).abs().max() <= (2e-5 if dtype_floor is None else 0.1)
    return out


@pytest.mark.parametrize("L", [1, 63, 129, 1009])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_any_number_of_rows(case, L, heads):
    one = case([L], Hq=3, Hkv=1)
    check(one, one.random_plan(BLOCK, heads=1 if heads == "shared" else None), "fp32")


@pytest.mark.parametrize("D", [64, 80, 128, 256])
def test_any_head_dim(case, D):
    one = case([129], D=D)
    check(one, one.random_plan(BLOCK), "fp32")


@pytest.mark.parametrize("Hq, Hkv", [(2, 2), (3, 1), (8, 1), (16, 2)], ids=["G1", "G3", "G8", "two_groups_of_8"])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_any_group_size(case, Hq, Hkv, heads):
    one = case([200], Hq=Hq, Hkv=Hkv)
    check(one, one.random_plan(BLOCK, heads=1 if heads == "shared" else None), "fp32")


@pytest.mark.parametrize("L, N", [(1, 300), (5, 69), (16, 100), (17, 100), (40, 257), (64, 320), (129, 1009)])
@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_a_cached_prefix_of_any_length(case, L, N, heads):
    one = case([L], [N], Hq=4, Hkv=2)
    check(one, one.random_plan(BLOCK, heads=1 if heads == "shared" else None), "fp32")


@pytest.mark.parametrize("L, N", [(7, 100), (70, 170)], ids=["decode", "prefill"])
def test_rows_without_their_own_block_and_rows_without_any(case, L, N):
    one = case([L], [N], Hq=4, Hkv=2)
    plan = one.random_plan(16, 0.15, diagonal=False)
    empty = plan.block_mask(next(one.lens.rows())).sum(-1) == 0
    assert empty.any(), "the plan must hold a row of nothing"
    out = check(one, plan, "fp32")
    _, lse = one.run(plan)
    assert torch.isneginf(lse).any()
    assert (out.transpose(0, 1)[torch.isneginf(lse)] == 0).all()


@pytest.mark.parametrize("route", ["hybrid", "bf16", "fp32", "routed"])
@pytest.mark.parametrize("L, N", [(3, 150), (150, 201)], ids=["decode", "prefill"])
def test_bf16_on_every_route(case, route, L, N):
    # scores rounded to bf16 are what "fast" trades: measured 5e-3 to 2e-2 relative at this sharpness (kernels.md §2.3)
    floor = 3e-2 if route == "bf16" else 1e-3
    one = case([L], [N], Hq=4, Hkv=2, D=64, dtype=torch.bfloat16)
    check(one, one.random_plan(BLOCK), route, dtype_floor=floor)


@pytest.mark.parametrize("L, N", [(3, 150), (150, 201)], ids=["decode", "prefill"])
def test_accurate_routes_keep_the_scores_of_sharp_heads(case, routes, L, N):
    # logits of spread ~12: scores in bf16 would be off by 3e-2 there, which the bound of the definition does not allow
    one = case([L], [N], Hq=2, Hkv=1, D=64, dtype=torch.bfloat16, sharpness=12.0)
    for route in ("hybrid", "fp32"):
        check(one, one.random_plan(BLOCK), route, dtype_floor=1e-3)


def test_fp16_is_computed_in_fp32(case):
    one = case([150], Hq=4, Hkv=2, D=64, dtype=torch.float16)
    check(one, one.random_plan(BLOCK), "fp32", dtype_floor=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("L, N", [(200, 200), (33, 100)], ids=["whole", "prefix"])
def test_torch_route(case, routes, dtype, L, N):
    from accel.kernels.block_sparse.cpu_probe import Route

    one = case([L], [N], Hq=4, Hkv=2, D=32, dtype=dtype)
    for plan in (one.random_plan(BLOCK), one.random_plan(BLOCK, heads=1)):
        out, _ = one.run(plan, Route("sdpa", dtype, dtype), wants_lse=False)
        assert_error_bounded(out, one.exact(plan)[0], one.naive(plan), block=BLOCK, floor=1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("L, N", [(4, 90), (150, 201)], ids=["decode", "prefill"])
@pytest.mark.parametrize("kernel", ["gemm", "sdpa"])
def test_softcap(case, L, N, kernel):
    from accel.kernels.block_sparse.cpu_probe import Route

    one = case([L], [N], Hq=4, Hkv=2, softcap=1.5, sharpness=4.0)
    plan = one.random_plan(BLOCK)
    check(one, plan, Route(kernel))
    uncapped = case([L], [N], Hq=4, Hkv=2, sharpness=4.0).run(plan)[0]
    assert (one.run(plan)[0] - uncapped).abs().max() > 0.05


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("kernel", ["fp32", "routed", "hybrid", "bf16", "sdpa"])
def test_any_scale(case, routes, kernel, scale):
    # oneDNN does not write a product with the factor 0, and torch's own causal attention gives NaN for such scales
    dtype = torch.float32 if kernel in ("fp32", "routed") else torch.bfloat16
    one = replace(case([100], dtype=dtype), scale=scale)
    route = Route("sdpa", dtype, dtype) if kernel == "sdpa" else routes[kernel]
    for score_dtype in (torch.float32, torch.bfloat16):
        workspace.take("scores", (1 << 16,), score_dtype).fill_(torch.nan)
    for plan in (one.random_plan(BLOCK), None):
        out, _ = one.run(plan, route, wants_lse=False)
        reference = one.naive(plan if plan is not None else ImplicitPlan.dense(BLOCK))
        assert_error_bounded(out, one.exact(plan)[0], reference, block=BLOCK, floor=2e-2 if kernel == "bf16" else 1e-5)


@pytest.mark.parametrize("L, N", [(4, 90), (150, 201)], ids=["decode", "prefill"])
def test_values_may_be_narrower_than_keys(case, L, N):
    one = case([L], [N], D=32, Dv=16)
    check(one, one.random_plan(BLOCK), "fp32")


@pytest.mark.parametrize("max_blocks", [1, 4])
def test_long_lists_computed_in_parts_give_the_same(case, monkeypatch, max_blocks):
    from accel.kernels.block_sparse import cpu_tiles

    one = case([400], Hq=4, Hkv=2)
    for plan in (one.random_plan(BLOCK, 0.8, heads=1), one.random_plan(BLOCK, 0.8), None):
        whole = one.run(plan)[0]
        monkeypatch.setattr(cpu_tiles, "BLOCKS_PER_THREAD", max_blocks)
        parts = check(one, plan, "fp32")
        monkeypatch.undo()
        assert (parts - whole).abs().max() <= 1e-5


@pytest.mark.parametrize("heads", ["shared", "per_head"])
def test_many_kv_heads_are_packed_in_turn(case, monkeypatch, heads):
    from accel.kernels.block_sparse import cpu_tiles

    one = case([150], Hq=10, Hkv=5)
    monkeypatch.setattr(cpu_tiles, "PACK_BYTES", 2 * 160 * 16 * 4)
    check(one, one.random_plan(BLOCK, heads=1 if heads == "shared" else None), "fp32")


def test_every_encoding_of_the_same_tiles_gives_the_same(case):
    one = case([150], [230], Hq=4, Hkv=2)
    rows = next(one.lens.rows())
    nk = rows.key_blocks(BLOCK)
    g = torch.Generator().manual_seed(3)
    vertical, slash = (torch.rand(1, 4, nk, generator=g) < 0.4 for _ in range(2))
    slash[..., 0] = True
    lines = VerticalSlashPlan(BLOCK, vertical, slash)
    listed = ListPlan.from_mask([lines.block_mask(rows)], one.lens, BLOCK)
    assert torch.equal(one.run(lines)[0], one.run(listed)[0])
    check(one, lines, "fp32")


@pytest.mark.parametrize("L, N", [(1, 500), (16, 16), (129, 129), (100, 301)])
def test_dense_equals_sdpa(case, L, N):
    one = case([L], [N], Hq=6, Hkv=2)
    q, k, v = (t.transpose(0, 1)[None] for t in (one.q, one.keys.k, one.keys.v))
    visible = torch.ones(L, N, dtype=torch.bool).tril(N - L)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)[0].transpose(0, 1)
    everything = ImplicitPlan.dense(BLOCK)
    for out in (one.run(None)[0], one.run(everything)[0], one.run(None, "routed")[0]):
        assert (out - want).abs().max() <= 1e-5


def test_dense_torch_route_falls_back_behind_a_prefix(case):
    from accel.kernels.block_sparse.cpu_probe import Route

    for L, N in ((129, 129), (100, 301)):
        one = case([L], [N], Hq=6, Hkv=2)
        out, _ = one.run(None, Route("sdpa"), wants_lse=False)
        assert (out - one.exact()[0]).abs().max() <= 1e-5


def test_dropping_blocks_moves_a_row_by_at_most_twice_the_dropped_mass(case):
    # sparse-attention.md §1.3: ‖o_sparse − o_dense‖ ≤ 2 (1 − c) max ‖v‖, c the dense mass of the kept keys: exp(LSE_sparse − LSE_dense)
    one = case([300], Hq=4, Hkv=2)
    plan = one.random_plan(BLOCK, 0.3)
    (sparse, sparse_lse), (dense, dense_lse) = one.run(plan), one.run(None)
    kept = (sparse_lse - dense_lse).exp().T
    longest = one.keys.v.norm(dim=-1).max()
    moved = (sparse - dense).norm(dim=-1)
    assert (moved <= 2 * (1 - kept) * longest + 1e-4).all()
    assert moved.max() > 0.1
