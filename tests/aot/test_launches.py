"""Every launch of the host code, through Triton's own argument binding for sm_90: wrong names, types and options show before there is a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from accel.evals.gpu.cases import Call, random_plan
from accel.evals.gpu.checks import Profile, decode, prefill
from accel.evals.gpu.head_groups import GroupCall
from accel.kernels.block_sparse.triton_launch import choose_config
from accel.kernels.flex_index import SelectionRule, triton_select
from accel.kernels.head_grouped.triton_launch import triton_grouped
from accel.kernels.probe import triton_launch as probe_launch
from accel.kernels.probe.request import Request, RowSet

# CPU tensors stand in for those of a GPU: fp16, for which no kernel is told of the interpreter but by the selection's host code
PROFILE = Profile(torch.device("cpu"), dtype=torch.float16)
CONFIG = choose_config(128, torch.float16, shared_bytes=232_448, major=9)


class Hopper:
    """What a launch asks of the driver before it compiles."""

    def get_current_device(self) -> int:
        # kernels are remembered by device, and there may be a real one
        return 1000

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were bound and compiled; none is run."""
    names: list[str] = []

    def launch(kernel, grid):
        def run(*args, **options):
            names.append(kernel.__name__)
            # unset it warns: the default will change
            assert options["enable_fp_fusion"]
            if "UPCAST" in options:
                options["UPCAST"] = False
            return kernel.run(*args, grid=grid, warmup=True, **options)

        return run

    monkeypatch.setattr(driver, "_active", Hopper())
    monkeypatch.setattr(JITFunction, "__getitem__", launch)
    return names


@pytest.fixture
def variants(launched, monkeypatch):
    """The kernels that would be compiled, by name and by what they are specialised on; none is."""
    found: set[tuple[str, str]] = set()

    def note(*, key, fn, **_):
        found.add((fn.name.split(".")[-1], key))
        return True

    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", note)
    # nothing that other tests compiled is remembered there
    monkeypatch.setattr(Hopper, "get_current_device", lambda self: 1001)
    return found


@pytest.mark.parametrize(
    "kind, page_size, kernels",
    [
        ("power", 16, ["clear_gaps_kernel", "block_sparse_fwd_kernel"]),
        ("lists", 0, ["clear_gaps_kernel", "block_sparse_fwd_kernel"]),
        ("lines+tiles", 0, ["clear_gaps_kernel", "vertical_slash_lists_kernel", "block_sparse_fwd_kernel"]),
    ],
)
def test_prefill(launched, kind, page_size, kernels):
    call = PROFILE.ragged(page_size=page_size)
    out, lse = call.buffers()
    prefill(call, random_plan(kind, call, PROFILE.block), out, lse, CONFIG)
    assert launched == kernels


@pytest.mark.parametrize("n_more", [0, 1], ids=["gapless", "a row more"])
def test_prefill_clears_no_gaps_where_the_host_knows_that_there_are_none(launched, n_more):
    call = Call.random([40, 0, 24], [40, 0, 88], heads=(4, 2), head_dim=128, dtype=torch.float16, device=PROFILE.device)
    assert call.lens.n_gapless == 64
    call = replace(call, q=call.q.new_zeros(64 + n_more, 4, 128))
    prefill(call, random_plan("power", call, PROFILE.block), call.buffers()[0], None, CONFIG)
    assert launched == ["clear_gaps_kernel"] * n_more + ["block_sparse_fwd_kernel"]


@pytest.mark.parametrize(
    "kind, page_size, wants_lse, kernels",
    [
        ("power", 16, False, ["block_sparse_decode_kernel"]),
        ("lists", 0, True, ["block_sparse_decode_kernel"]),
        ("lines+tiles", 0, True, ["decode_lists_kernel", "block_sparse_decode_kernel"]),
    ],
)
def test_decode(launched, kind, page_size, wants_lse, kernels):
    call = PROFILE.decoding(4, page_size=page_size)
    out, lse = call.buffers()
    decode(call, random_plan(kind, call, PROFILE.block), out, lse if wants_lse else None)
    assert launched == kernels


@pytest.mark.parametrize(("page_size", "qa_scope", "n_launches"), [(0, "global", 6), (16, "row", 5)])
def test_selection(launched, page_size, qa_scope, n_launches):
    call = PROFILE.ragged(page_size=page_size)
    rule = SelectionRule(block_size=PROFILE.block, min_budget=2 * PROFILE.block, tau=0.1, qa_scope=qa_scope)
    triton_select.select(call.q, call.keys, call.lens, rule=rule, scale=call.scale, softcap=None)
    assert len(set(launched)) == len(launched) == n_launches


@pytest.mark.parametrize(("n_rows", "kernel"), [(1, "head_grouped_decode_kernel"), (40, "head_grouped_fwd_kernel")])
@pytest.mark.parametrize("has_lengths", [False, True], ids=["dense", "lengths"])
def test_head_groups(launched, has_lengths, n_rows, kernel):
    call = GroupCall.random((90, 30, 7), n_rows=n_rows, each=2, head_dim=128, dtype=torch.float16, has_lengths=has_lengths)
    out, lse = torch.empty_like(call.q), torch.empty(call.q.shape[:3])
    config = CONFIG if n_rows > 1 else None
    triton_grouped(call.q, call.groups, scale=call.scale, softcap=None, n_causal=0, out=out, lse=lse if has_lengths else None, config=config)
    # three groups in two launches
    assert launched == [kernel] * 2


def test_prompts_of_all_lengths_share_their_kernels(variants):
    """A compilation takes seconds, in the middle of a request: nothing is specialised on strides of lists, or on numbers of blocks."""
    # heads and blocks that are multiples of 16 together, apart and not at all
    for n_blocks in (66, 67, 68, 80):
        n = 128 * n_blocks
        call = Call.random([n], [n], heads=(14, 2), head_dim=16, dtype=torch.float16, device=PROFILE.device)
        rule = SelectionRule(min_budget=256)
        plan = triton_select.select(call.q, call.keys, call.lens, rule=rule, scale=call.scale, softcap=None).plan
        prefill(call, plan, torch.empty_like(call.q), None, CONFIG)
    counts = Counter(name for name, _ in variants)
    # their rows of blocks are worth aligned loads
    assert {name: n for name, n in counts.items() if n > 1} == {"pooled_map_fwd_kernel": 2, "map_cover_fwd_kernel": 2}
    assert counts["block_sparse_fwd_kernel"] == counts["probe_masses_fwd_kernel"] == 1


def test_pictures_of_all_sizes_share_their_kernels(variants):
    for n in (256, 577, 729, 1369):
        call = Call.random([n], [n], heads=(16, 16), head_dim=16, dtype=torch.float16, device=PROFILE.device)
        rows = RowSet.all_of(call.lens)
        probe_launch.probe(Request(call.q, call.keys, call.lens, rows, None, scale=1.0, softcap=None, is_causal=False, wants_spread=False))
    assert Counter(name for name, _ in variants) == {"probe_fwd_kernel_stats": 1, "probe_fwd_kernel_columns": 1}
