"""Arguments are checked, the asked executor runs or says why not, and what it needs in memory stays bounded."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from accel.errors import UnsupportedError
from accel.kernels.block_sparse import (
    ContiguousKeys,
    ImplicitPlan,
    ListPlan,
    Ragged,
    api,
    block_sparse_attention,
    dense_attention,
    dispatches,
    executors,
)
from accel.kernels.block_sparse.cpu_common import workspace

DENSE = ImplicitPlan.dense(16)


def run(one, plan=DENSE, **options):
    return block_sparse_attention(one.q, one.keys, plan, one.lens, scale=one.scale, **options)


def test_auto_runs_the_cpu_executor_and_counts_it(case):
    one = case([20])
    before = dispatches.copy()
    run(one)
    dense_attention(one.q, one.keys, one.lens, scale=one.scale)
    assert dispatches - before == {"cpu": 1, "dense-cpu": 1}


def test_auto_falls_back_for_fp64_counted_and_logged_once(case, caplog):
    one = case([20]).doubled()
    api._log_fallback.cache_clear()
    before = dispatches.copy()
    with caplog.at_level(logging.WARNING):
        out = run(one)
        run(one)
    assert out.dtype == torch.float64
    assert dispatches - before == {"naive": 2, "auto->naive": 2}
    assert len(caplog.records) == 1
    assert "float64" in caplog.text


def test_a_named_executor_runs_or_raises_with_the_reason(case):
    one = case([20])
    with pytest.raises(UnsupportedError, match="the tensors are on cpu, the kernels need CUDA") as caught:
        run(replace(one, q=one.q.double(), keys=one.doubled().keys), impl="triton")
    # every reason at once
    assert len(caught.value.reasons) >= 2
    assert "float64" in str(caught.value)
    with pytest.raises(UnsupportedError, match="float64"):
        run(one.doubled(), impl="cpu")
    for impl, reason in (("flex", "CUDA"), ("cute", "flash_attn.cute")):
        with pytest.raises(UnsupportedError, match=reason):
            run(one, impl=impl)
    with pytest.raises(ValueError, match="impl must be one of auto, triton, cpu, naive, flex, cute"):
        run(one, impl="cuda")


@pytest.mark.parametrize(
    "capability, is_installed, dtype, reason",
    [
        ((9, 0), True, torch.bfloat16, None),
        ((8, 0), True, torch.float32, None),
        ((7, 5), True, torch.float16, "compute capability 7.5, the kernels need 8.0"),
        ((9, 0), False, torch.float16, "triton is not installed"),
        ((9, 0), True, torch.float64, "no sparse kernel for torch.float64"),
    ],
    ids=["hopper", "ampere", "turing", "no_triton", "fp64"],
)
def test_hosts_are_told_where_cuda_has_a_kernel(monkeypatch, capability, is_installed, dtype, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(executors, "find_spec", lambda name: object() if is_installed else None)
    executors.triton_obstacles.cache_clear()
    found = executors.why_no_executor(torch.device("cuda"), dtype)
    executors.triton_obstacles.cache_clear()
    assert found is None if reason is None else found is not None and reason in found


def test_other_devices_have_none():
    assert "mps" in str(executors.why_no_executor(torch.device("mps"), torch.float16))


def test_the_interface_loads_without_triton():
    code = "import sys; sys.modules['triton'] = None; from accel.kernels import block_sparse; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("impl", ["cpu", "naive"])
def test_out_is_written_whole_and_returned(case, impl):
    one = case([20, 9], gap=3, Hq=4, Hkv=2)
    out = torch.full((one.q.shape[0], 4, 16), torch.nan)
    result, lse = run(one, out=out, impl=impl, return_lse=True)
    assert result is out
    assert not out.isnan().any()
    assert lse.shape == (4, one.q.shape[0])
    assert lse.dtype == torch.float32


def with_keys(one, **changes):
    return replace(one, keys=replace(one.keys, **changes))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_wherever_they_begin(case, name):
    one = case([20], Hq=4, Hkv=2)
    {"q": one.q, "k": one.keys.k, "v": one.keys.v}[name].requires_grad_()
    with pytest.raises(UnsupportedError, match="no backward pass"):
        run(one)
    with torch.no_grad():
        run(one)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda one: replace(one, q=one.q.transpose(0, 2)), "last stride 1"),
        (lambda one: replace(one, q=one.q[:, :3]), "3 query heads cannot share 2"),
        (lambda one: replace(one, q=one.q[..., :8]), "head_dim 8, the keys have 16"),
        (lambda one: replace(one, q=one.q.bfloat16()), "bfloat16, the keys are torch.float32"),
        (lambda one: replace(one, lens=Ragged.of([20], [19])), "differs from keys.kv_len"),
        (lambda one: replace(one, lens=Ragged.of([20, 1], [20, 20])), "describes 2 sequences, the keys hold 1"),
        (lambda one: replace(one, lens=Ragged.of([20], [20], q_start=[1])), "outside the 20 rows of q"),
        (lambda one: replace(one, lens=Ragged.of([21], [20])), "21 query rows, but 20 keys"),
        (lambda one: replace(one, softcap=-1.0), "softcap must be positive"),
        (lambda one: with_keys(one, v=one.keys.v[:5]), "k and v must agree"),
        (lambda one: with_keys(one, v=one.keys.v[:, :1]), "k and v must agree"),
        (lambda one: with_keys(one, v=one.keys.v.double()), "k and v must agree"),
        (lambda one: with_keys(one, start=torch.tensor([5])), r"sequence 0: keys 5\.\.24 lie outside the 20 tokens of k"),
    ],
    ids=[
        "strides", "gqa", "head_dim", "dtype", "kv_len", "batch", "rows", "more_rows_than_keys", "softcap", "tokens_of_v", "heads_of_v", "dtype_of_v",
        "start",
    ],
)
def test_a_wrong_argument_explains_itself(case, change, message):
    one = change(case([20], Hq=4, Hkv=2))
    with pytest.raises(ValueError, match=message):
        run(one, softcap=one.softcap)
    with pytest.raises(ValueError, match=message):
        dense_attention(one.q, one.keys, one.lens, scale=one.scale, softcap=one.softcap)


def test_a_wrong_out_or_plan_explains_itself(case):
    one = case([40], Hq=4, Hkv=2)
    with pytest.raises(ValueError, match="out must be"):
        run(one, out=torch.empty(40, 4, 8))
    three_heads = ListPlan.from_mask([torch.ones(3, 3, 3, dtype=torch.bool).tril()], one.lens, 16)
    for impl in ("cpu", "naive"):
        with pytest.raises(ValueError, match="the plan describes 3 heads, q has 4"):
            run(one, three_heads, impl=impl)
    with pytest.raises(ValueError, match="block_size must be positive"):
        run(one, ImplicitPlan(block_size=0, window_blocks=1))


def test_gradients_are_refused_not_lost(case):
    one = case([20])
    for asks in (replace(one, q=one.q.clone().requires_grad_()), replace(one, keys=replace(one.keys, k=one.keys.k.clone().requires_grad_()))):
        with pytest.raises(UnsupportedError, match="no backward pass"):
            run(asks)
        with torch.no_grad():
            assert torch.equal(run(asks), run(one))


def test_an_empty_batch_and_empty_sequences_work():
    keys = ContiguousKeys(torch.zeros(0, 1, 8), torch.zeros(0, 1, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    out = block_sparse_attention(torch.full((3, 2, 8), torch.nan), keys, DENSE, Ragged.of([0, 0], [0, 0]), scale=1.0)
    assert torch.equal(out, torch.zeros(3, 2, 8))


def peak_bytes(run_once, path):
    """Most memory that torch held at one time for `run_once`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run_once()
    recorded.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most


@pytest.mark.parametrize("heads", [1, 8], ids=["shared_lists", "per_head_lists"])
def test_workspace_stays_below_64_mb_at_16k(case, tmp_path, heads):
    n = 16384
    one = case([n], Hq=8, Hkv=2, D=128, dtype=torch.bfloat16)
    plan = one.random_plan(128, 0.015, heads=heads)
    out = torch.empty_like(one.q)
    workspace.trim(0)
    most = peak_bytes(lambda: run(one, plan, out=out, impl="cpu"), tmp_path / "trace.json")
    # the packed keys and values of one head alone are 8 or 16 MB: less would mean that the measurement failed
    assert 8 << 20 < most <= 64 << 20
