"""Attention over head groups: solved by hand, and against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from accel.evals.gpu.head_groups import GroupCall
from accel.kernels.block_sparse import cpu_probe
from accel.kernels.head_grouped import KVGroup, cpu, grouped_attention

IMPLS = pytest.mark.parametrize("impl", ["cpu", "naive"])


@pytest.fixture(params=[None, 200], ids=["whole", "tiles"])
def tile_scores(request, monkeypatch):
    """Once with all scores in one tile, once with a few rows of one head, and products from the first entry on."""
    if request.param is not None:
        monkeypatch.setattr(cpu, "TILE_SCORES", request.param)
        monkeypatch.setattr(cpu, "FEWEST_ENTRIES", 0)


# --- by hand: queries of zeros see the mean of the values -----------------------------------------------------------------------------------


def _numbered(n: int, *, heads: tuple[int, ...] = (0,), lengths: list[list[int]] | None = None) -> KVGroup:
    """One row whose entry i of head h has the value 100 · h + i in every channel; NaN past the lengths."""
    v = (100.0 * torch.tensor(heads)[:, None] + torch.arange(n))[None, :, :, None].repeat(1, 1, 1, 16)
    if lengths is None:
        return KVGroup(heads, torch.ones_like(v), v)
    past = (torch.arange(n) >= torch.tensor(lengths)[..., None])[..., None]
    k, v = (t.masked_fill(past, torch.nan) for t in (torch.ones_like(v), v))
    return KVGroup(heads, k, v, torch.tensor(lengths, dtype=torch.int32))


@IMPLS
@pytest.mark.parametrize("n_rows", [1, 20])
def test_every_row_sees_all_entries_of_its_head(impl, n_rows):
    groups = [_numbered(5, heads=(2, 0)), _numbered(3, heads=(1,))]
    out, lse = grouped_attention(torch.zeros(1, 6, n_rows, 16), groups, scale=1.0, return_lse=True, impl=impl)
    want = torch.tensor([2.0, 2.0, 101.0, 101.0, 202.0, 202.0])[None, :, None, None]
    torch.testing.assert_close(out, want.expand_as(out))
    torch.testing.assert_close(lse, torch.tensor([5.0, 5, 3, 3, 5, 5]).log()[None, :, None].expand_as(lse))


@IMPLS
@pytest.mark.parametrize("wants_lse", [False, True])
@pytest.mark.parametrize(("n_causal", "seen"), [(0, [6, 6, 6, 6]), (1, [5, 5, 5, 6]), (2, [4, 4, 5, 6]), (4, [3, 4, 5, 6])])
def test_the_last_entries_are_hidden_from_earlier_rows(impl, n_causal, seen, wants_lse):
    found = grouped_attention(torch.zeros(1, 1, 4, 16), [_numbered(6)], scale=1.0, n_causal=n_causal, return_lse=wants_lse, impl=impl)
    out = found[0] if wants_lse else found
    torch.testing.assert_close(out[0, 0, :, 0], (torch.tensor(seen) - 1) / 2)


@IMPLS
@pytest.mark.parametrize("wants_lse", [False, True])
@pytest.mark.parametrize("n_rows", [3, 20])
def test_rows_that_see_nothing_are_zero(impl, n_rows, wants_lse):
    # heads of 0, 2 and 4 entries, all of them causal; and a group without any
    groups = [_numbered(4, heads=(0, 1, 2), lengths=[[0, 2, 4]]), _numbered(0, heads=(3,))]
    found = grouped_attention(torch.zeros(1, 4, n_rows, 16), groups, scale=1.0, n_causal=n_rows, return_lse=wants_lse, impl=impl)
    out, lse = found if wants_lse else (found, None)
    n_seen = (torch.tensor([0, 2, 4, 0])[:, None] - torch.arange(n_rows).flip(0)).clamp_min(0)
    want = (100.0 * torch.arange(4)[:, None] + (n_seen - 1) / 2) * (n_seen > 0)
    torch.testing.assert_close(out[0, :, :, 0], want)
    if lse is not None:
        torch.testing.assert_close(lse[0], n_seen.float().log())


# --- against the definition in fp64 ---------------------------------------------------------------------------------------------------------

SHAPES = {
    "decode": {"entries": (300, 5, 40)},
    "decode-G3-D80": {"entries": (300, 5, 40), "each": 3, "head_dim": 80},
    "decode-heads-outermost": {"entries": (300, 5, 40), "is_token_major": False, "each": 2},
    "next-scale": {"entries": (63, 129, 7), "n_rows": 36},
    "next-scale-D80": {"entries": (63, 129, 7), "n_rows": 25, "head_dim": 80, "is_token_major": False},
    "G8": {"entries": (63, 129, 7), "n_rows": 9, "each": 8, "head_dim": 64},
    "second-turn": {"entries": (63, 129, 30), "n_rows": 21, "n_causal": 21, "each": 2},
    "second-turn-part": {"entries": (63, 29, 10), "n_rows": 21, "n_causal": 13},
    "soft-cap": {"entries": (63, 129, 7), "n_rows": 19, "softcap": 3.0, "n_causal": 7},
}


@pytest.mark.parametrize("has_lengths", [False, True], ids=["dense", "lengths"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_output_and_lse(shape, has_lengths, tile_scores):
    call = GroupCall.random(**shape, has_lengths=has_lengths)
    call.check(call.run("cpu"), floor=1e-6)
    # without LSE torch's own attention computes what it can
    plain = grouped_attention(call.q, call.groups, scale=call.scale, softcap=call.softcap, n_causal=call.n_causal)
    call.check((plain, call.exact()[1].float()), floor=1e-6)


@pytest.mark.parametrize("is_fast", [False, True], ids=["bf16-slow", "bf16-fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("n_rows", [1, 23])
def test_other_precisions(n_rows, dtype, is_fast, monkeypatch):
    monkeypatch.setattr(cpu, "_has_fast_bf16", lambda n_threads: is_fast)
    call = GroupCall.random((300, 1100, 7), n_rows=n_rows, dtype=dtype, has_lengths=True, each=2)
    call.check(call.run("cpu"), floor=1e-3)
    plain = grouped_attention(call.q, call.groups, scale=call.scale)
    call.check((plain, call.exact()[1].float()), floor=1e-3)


def test_bf16_products_follow_the_probe(monkeypatch):
    for route in (cpu_probe.NATIVE, cpu_probe.Route("gemm")):
        monkeypatch.setattr(cpu, "route_for", lambda *_, route=route: route)
        assert cpu._has_fast_bf16.__wrapped__(1) == (route.value_dtype == torch.bfloat16)


@st.composite
def calls(draw: st.DrawFn) -> GroupCall:
    heads = draw(st.permutations(range(draw(st.integers(1, 5)))))
    cuts = sorted(draw(st.lists(st.integers(0, len(heads)), max_size=3)))
    parts = [tuple(heads[lo:hi]) for lo, hi in zip([0, *cuts], [*cuts, len(heads)], strict=True)]
    n_rows = draw(st.sampled_from([1, 2, 5, 17, 33]))
    return GroupCall.random(
        [draw(st.integers(0, 40)) for _ in parts], heads=parts, batch=draw(st.integers(1, 3)), each=draw(st.integers(1, 3)), n_rows=n_rows,
        head_dim=draw(st.sampled_from([16, 24])), has_lengths=draw(st.booleans()), is_token_major=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 2.0])), n_causal=draw(st.integers(0, n_rows)), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


@settings(max_examples=60)
@given(call=calls(), wants_lse=st.booleans())
def test_any_call(call, wants_lse):
    exact, exact_lse = call.exact()
    options = {"scale": call.scale, "softcap": call.softcap, "n_causal": call.n_causal}
    if wants_lse:
        out, lse = grouped_attention(call.q, call.groups, return_lse=True, **options)
        torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5, rtol=1e-5)
    else:
        out = grouped_attention(call.q, call.groups, **options)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


# --- what must not matter -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [1, 30])
def test_the_order_of_heads_and_groups_does_not_change_the_result(n_rows):
    call = GroupCall.random((90, 12, 12), heads=((0, 1, 2), (3,), (4,)), n_rows=n_rows, each=2)
    want = grouped_attention(call.q, call.groups, scale=call.scale)
    long, *short = call.groups
    order = [2, 0, 1]
    mixed = KVGroup(tuple(long.heads[i] for i in order), long.k[:, order], long.v[:, order])
    one = KVGroup((4, 3), *(torch.cat([getattr(group, name) for group in reversed(short)], 1) for name in ("k", "v")))
    empty = KVGroup((), long.k[:, :0], long.v[:, :0])
    for groups in ([mixed, *short], [*reversed(call.groups)], [one, mixed], [long, one, empty]):
        torch.testing.assert_close(grouped_attention(call.q, groups, scale=call.scale), want, atol=1e-6, rtol=1e-6)


def test_a_single_group_of_many_rows_is_torch_attention_bit_for_bit():
    call = GroupCall.random((90,), heads=((0, 1, 2),), n_rows=40)
    group = call.groups[0]
    want = scaled_dot_product_attention(call.q, group.k, group.v, scale=call.scale)
    assert torch.equal(grouped_attention(call.q, [group], scale=call.scale), want)


def test_autocast_does_not_reach_the_products():
    call = GroupCall.random((90, 40, 300), n_rows=20, each=2)
    want = grouped_attention(call.q, call.groups, scale=call.scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(grouped_attention(call.q, call.groups, scale=call.scale), want)


@pytest.mark.parametrize("is_token_major", [True, False])
def test_the_result_lies_in_memory_as_the_queries_do(is_token_major):
    call = GroupCall.random((9, 4, 3), n_rows=20, is_token_major=is_token_major)
    out = grouped_attention(call.q, call.groups, scale=call.scale)
    assert out.stride() == call.q.stride()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_batch_of_token_major_queries_with_as_many_key_heads_gets_its_results(softcap):
    # they were written into a flattened copy, and lost
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 5, 3, 16, generator=g).transpose(1, 2), torch.randn(2, 3, 300, 16, generator=g)
    options = {"scale": 0.25, "softcap": softcap, "n_causal": 5}
    out = torch.full_like(q, torch.nan)
    cpu.cpu_grouped(q, [KVGroup((0, 1, 2), k, k)], **options, out=out, lse=None)
    torch.testing.assert_close(out, grouped_attention(q, [KVGroup((0, 1, 2), k, k)], **options, impl="naive"))


def test_inference_mode_leaves_nothing_behind_that_later_calls_cannot_use():
    call = GroupCall.random((9, 4, 3), n_rows=20)
    with torch.inference_mode():
        first = grouped_attention(call.q, call.groups, scale=call.scale)
    assert torch.equal(grouped_attention(call.q, call.groups, scale=call.scale), first)
