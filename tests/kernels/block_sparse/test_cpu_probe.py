"""The probe's decision follows its timings, survives a damaged cache and gives torch's precision setting back."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

from accel.kernels.block_sparse import cpu_probe
from accel.kernels.block_sparse.cpu_probe import (
    NATIVE,
    Route,
    Timings,
    choose_dense_route,
    choose_route,
    fp32_products_routed,
    machine_timings,
    read_timings,
    write_timings,
)

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

# kinds of CPU, after kernels.md §2.1, §2.5 and measurements of an AVX2 machine
AVX512_BF16 = Timings(
    fp32_ms=1.5, routed_ms=0.7, routed_error=5.7e-7, bf16_ms=0.33, softmax_ms=0.24,
    sdpa_fp32_ms=3.2, sdpa_bf16_ms=3.2, dense_fp32_ms=3.1, dense_bf16_ms=3.1, native_ms=float("inf"),
)  # fmt: skip
AVX512 = replace(AVX512_BF16, bf16_ms=4.0)
AVX2 = Timings(
    fp32_ms=1.9, routed_ms=1.9, routed_error=2e-7, bf16_ms=23.0, softmax_ms=0.65,
    sdpa_fp32_ms=4.7, sdpa_bf16_ms=5.0, dense_fp32_ms=3.7, dense_bf16_ms=4.0, native_ms=float("inf"),
)  # fmt: skip
# torch's own attention clearly ahead of unrouted products: 1.1 · 2.9 < 2 · 1.5 + 0.24
SLOW_PRODUCTS = replace(AVX512_BF16, routed_ms=1.45, sdpa_fp32_ms=2.9)
# "medium" is bf16 there, and torch's own attention uses the tiles
AMX = replace(AVX512_BF16, routed_ms=0.2, routed_error=3e-3, bf16_ms=0.2, sdpa_bf16_ms=0.6, dense_bf16_ms=0.5)

# the same with a C++ compiler
COMPILED = replace(AVX512_BF16, native_ms=0.9)

HYBRID = Route("gemm", FP32, BF16, is_routed=True)


@pytest.mark.parametrize(
    "machine, dtype, precision, route",
    [
        (AVX512_BF16, BF16, "accurate", HYBRID),
        (AVX512_BF16, BF16, "fast", Route("gemm", BF16, BF16)),
        (AVX512_BF16, FP32, "accurate", Route("gemm", FP32, FP32, is_routed=True)),
        (AVX512_BF16, FP32, "fast", Route("gemm", FP32, FP32, is_routed=True)),
        (AVX512_BF16, FP16, "fast", Route("gemm", FP32, FP32, is_routed=True)),
        (AVX512, BF16, "fast", Route("gemm", FP32, FP32, is_routed=True)),
        (AVX2, BF16, "accurate", Route("gemm", FP32, FP32)),
        (AVX2, BF16, "fast", Route("gemm", FP32, FP32)),
        (AVX2, FP32, "accurate", Route("gemm", FP32, FP32)),
        (replace(AVX2, sdpa_bf16_ms=3.0), BF16, "accurate", Route("sdpa", BF16, BF16)),
        (AMX, BF16, "accurate", Route("sdpa", BF16, BF16)),
        (AMX, BF16, "fast", Route("gemm", BF16, BF16)),
        (AMX, FP32, "accurate", Route("gemm", FP32, FP32)),
        (SLOW_PRODUCTS, FP32, "accurate", Route("sdpa", FP32, FP32)),
        (COMPILED, BF16, "accurate", NATIVE),
        (replace(COMPILED, native_ms=0.95), BF16, "fast", Route("gemm", BF16, BF16)),
        (COMPILED, FP32, "accurate", Route("gemm", FP32, FP32, is_routed=True)),
        (COMPILED, FP16, "accurate", Route("gemm", FP32, FP32, is_routed=True)),
    ],
    ids=lambda value: None if isinstance(value, Timings) else str(value),
)
def test_the_fastest_accurate_route_is_chosen(machine, dtype, precision, route):
    assert choose_route(machine, dtype, precision) == route


def test_routing_needs_both_accuracy_and_a_gain():
    assert choose_route(replace(AVX512_BF16, routed_error=2.1e-6), FP32, "accurate").is_routed is False
    assert choose_route(replace(AVX512_BF16, routed_ms=1.4), FP32, "accurate").is_routed is False
    assert choose_route(AVX512_BF16, FP32, "accurate").is_routed is True


@pytest.mark.parametrize(
    "machine, dtype, kernel",
    [
        (AVX512_BF16, BF16, "gemm"), (AVX512_BF16, FP32, "gemm"), (AVX2, BF16, "sdpa"), (AVX2, FP32, "sdpa"), (AVX2, FP16, "gemm"),
        (AMX, BF16, "sdpa"), (COMPILED, BF16, "native"), (replace(COMPILED, dense_bf16_ms=0.95), BF16, "sdpa"),
    ],
)
def test_dense_prefill_uses_products_only_where_they_beat_torch(machine, dtype, kernel):
    assert choose_dense_route(machine, dtype, "accurate").kernel == kernel


@pytest.fixture
def probe_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "deep" / "cache"))
    machine_timings.cache_clear()
    yield tmp_path / "deep" / "cache" / "cpu_probe.json"
    machine_timings.cache_clear()


def test_a_probe_is_measured_in_a_few_processes_per_machine_and_thread_count(probe_file, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu_probe, "measure", lambda: calls.append(1) or AVX2)
    for process in (1, 2, 3, 3, 3):
        assert machine_timings(2) == machine_timings(2) == replace(AVX2, probes=process)
        assert len(calls) == process
        machine_timings.cache_clear()
    machine_timings(1)
    assert len(calls) == 4
    assert len(read_timings(probe_file)) == 2
    assert all(torch.__version__ in key and "threads" in key for key in read_timings(probe_file))


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": 3}', '{"key": {"fp32_ms": 1}}', "\udcff"])
def test_a_damaged_cache_is_ignored_and_rewritten(probe_file, monkeypatch, damage):
    probe_file.parent.mkdir(parents=True)
    probe_file.write_bytes(damage.encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(cpu_probe, "measure", lambda: AVX512)
    assert machine_timings(2) == AVX512
    assert list(read_timings(probe_file).values()) == [AVX512]


@pytest.mark.parametrize("value", ["fast", None, True, -1.0, 0])
def test_an_entry_that_is_no_measurement_is_left_out(tmp_path, value):
    path = tmp_path / "cpu_probe.json"
    path.write_text(json.dumps({"good": asdict(AVX2), "bad": {**asdict(AVX2), "fp32_ms": value}}))
    assert read_timings(path) == {"good": AVX2}


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path):
    (tmp_path / "file").write_text("")
    write_timings(tmp_path / "file" / "cpu_probe.json", {"key": AVX2})
    assert (tmp_path / "file").read_text() == ""


def test_the_measurement_itself_is_plausible():
    found = cpu_probe.measure()
    assert all(value > 0 for value in asdict(found).values())
    # fp32 products of this size are exact to 1e-6; with 2e-2 the routed one would be bf16
    assert found.routed_error < 2e-2


def test_a_probe_in_a_busy_moment_is_mended_by_the_next_process(probe_file, monkeypatch):
    busy = replace(COMPILED, fp32_ms=15.0, bf16_ms=1022.0, native_ms=6.1)
    quiet = replace(COMPILED, softmax_ms=9.0, routed_error=7e-7)
    moments = iter([busy, quiet])
    monkeypatch.setattr(cpu_probe, "measure", lambda: next(moments))
    machine_timings(2)
    machine_timings.cache_clear()
    assert machine_timings(2) == replace(COMPILED, routed_error=7e-7, probes=2)


def test_a_main_thread_tied_to_a_core_is_measured_apart(probe_file, monkeypatch):
    # OMP_PROC_BIND ties it, and the compiled kernel's threads with it; products run on OpenMP's own threads
    monkeypatch.setattr(cpu_probe, "measure", lambda: COMPILED)
    machine_timings(2)
    machine_timings.cache_clear()
    monkeypatch.setattr(cpu_probe, "usable_cores", lambda: 1000)
    machine_timings(2)
    assert len(read_timings(probe_file)) == 2


def test_defaults_of_torch_do_not_change_what_is_measured(monkeypatch):
    seen = []

    def once(runs):
        seen.extend(result.dtype for run in runs.values() if isinstance(result := run(), torch.Tensor))
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(cpu_probe, "_best_ms", once)
    monkeypatch.setattr(cpu_probe.cpu_native, "why_unavailable", lambda: "not today")
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
            cpu_probe.measure()
    finally:
        torch.set_default_dtype(torch.float32)
    # two products, the softmax, torch's attention twice in each precision, a bf16 product
    assert seen == [FP32, FP32, FP32, FP32, FP32, BF16, BF16, BF16]


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_the_precision_setting_comes_back(before):
    was = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with fp32_products_routed(True):
            assert torch.get_float32_matmul_precision() == "medium"
            with fp32_products_routed(True):
                pass
            assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(ZeroDivisionError), fp32_products_routed(True):
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == before
        with fp32_products_routed(False):
            assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(was)


def test_two_threads_inside_do_not_leak_the_setting():
    was = torch.get_float32_matmul_precision()
    first, second = fp32_products_routed(True), fp32_products_routed(True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == "medium"
    second.__exit__(None, None, None)
    assert torch.get_float32_matmul_precision() == was


def test_somebodys_newer_setting_is_left_alone(monkeypatch):
    def mixed() -> str:
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda value: pytest.fail("set although it is not ours"))
    with fp32_products_routed(True):
        pass


def test_routing_gives_back_the_backends_own_settings() -> None:
    def settings() -> tuple[str, str, str]:
        matmul = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        return (torch.get_float32_matmul_precision(), *matmul)

    before = settings()
    with fp32_products_routed(True):
        assert torch.get_float32_matmul_precision() == "medium"
    assert settings() == before
