"""The harness of the GPU visit without a GPU: budget, partial results, bars, tables, what is left of a device that failed, the shell script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

import accel
from accel.crossover import DEFAULT_TOKENS, WIDE_HEAD_TOKENS, crossover_key
from accel.evals.gpu import __main__ as gpu_check
from accel.evals.gpu import bench as gpu_bench
from accel.evals.gpu import contestants as gpu_contestants
from accel.evals.gpu.bars import BARS, DENSE, bars, bars_table, best_dense
from accel.evals.gpu.bench import Bench, Lab, Sizes, benches, run_benches
from accel.evals.gpu.cases import Prompt
from accel.evals.gpu.checks import Check, Profile, Skipped, check_error, checks, run_check
from accel.evals.gpu.crossovers import crossovers, crossovers_section
from accel.evals.gpu.report import Record, markdown, result_path, with_ratios
from accel.evals.gpu.timing import DeviceLostError, HostTimer, Times, compare, host_us
from accel.kernels.block_sparse import block_sparse_attention, flex_executor
from accel.protocols import AttentionStep

ROOT = Path(gpu_check.__file__).resolve().parents[2]
CPU = torch.device("cpu")


class FakeTimer(HostTimer):
    """Every call takes the milliseconds it returns; `settle` raises once the device is lost."""

    def __init__(self) -> None:
        self.is_lost = False
        self.order: list[object] = []

    def ms(self, run):
        ms = run()
        self.order.append(ms)
        return ms

    def settle(self) -> None:
        if self.is_lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def times(ms: float) -> Times:
    return Times(ms, ms, ms, 3)


@pytest.fixture
def record(tmp_path) -> Record:
    return Record(tmp_path / "some-gpu-2026-01-01.json", {"device": "Some GPU", "date": "2026-01-01"}, copies=tmp_path / "out")


def test_contestants_run_in_turn_and_the_warm_up_is_not_counted():
    timer = FakeTimer()
    found = compare(timer, {"a": lambda: 2.0, "b": lambda: 3.0}, seconds=0.02, fewest=1)
    # 20 ms hold four rounds of 5 ms, behind one round of warming up
    assert timer.order == [2.0, 3.0] * 5
    assert found.times == {"a": Times(2.0, 2.0, 2.0, 4), "b": Times(3.0, 3.0, 3.0, 4)}


def test_a_contestant_that_raises_is_left_out_with_its_reason():
    def broken():
        raise ImportError("no such module\nlong trace")

    found = compare(FakeTimer(), {"a": broken, "b": lambda: 1.0}, seconds=1, most=2)
    assert found.failed == {"a": "ImportError: no such module"}
    assert list(found.times) == ["b"]


def test_percentiles():
    assert Times.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == Times(3.5, 2.0, 5.0, 6)


def test_calls_on_the_host_are_timed_in_turn_and_warm():
    order = []
    timer = HostTimer()
    timer.settle = lambda: order.append("|")

    def broken():
        raise ImportError("no such module")

    found = host_us({"a": lambda: order.append("a"), "c": broken, "b": lambda: order.append("b")}, timer, calls=20)
    turns = [turn[0] * (len(set(turn)) == 1) + str(len(turn)) for turn in "".join(order).split("|") if turn]
    # the device is waited for behind every turn, so that its queue does not fill up
    assert turns == ["a16"] * 4 + ["b16"] * 4 + ["a16"] * 2 + ["b16"] * 2 + ["a16", "a4", "b16", "b4"]
    assert {name: times.n for name, times in found.times.items()} == {"a": 20, "b": 20}
    assert found.failed == {"c": "ImportError: no such module"}


def test_benchmarks_are_skipped_when_time_runs_out_and_saved_one_by_one(record):
    seen = []

    def quick(lab, name):
        lab.record.add(name, "a", times(1.0), density=0.5)
        lab.about = "what it is"

    def breaks(lab, name):
        # the file on disk holds what came before
        seen.append(json.loads(record.path.read_text())["benches"][0]["bench"])
        raise ValueError("wrong shape")

    lab = Lab(CPU, HostTimer(), record, Sizes(), deadline=float("inf"))
    run_benches(lab, [Bench("one", 1, quick), Bench("two", 1, breaks)], say=lambda _: None)
    lab.deadline = 0.0
    run_benches(lab, [Bench("one", 1, quick), Bench("three", 1, quick)], say=lambda _: None)
    assert seen == ["one"]
    assert [(b["bench"], b["state"]) for b in record.benches] == [("one", "measured"), ("two", "failed"), ("three", "skipped")]
    data = json.loads(record.path.read_text())
    assert data["status"] == "complete"
    assert data["rows"] == [{"bench": "one", "what": "a", "density": 0.5, "ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0, "n": 3}]
    page = record.path.with_suffix(".md").read_text()
    assert "what it is" in page
    assert "failed: ValueError: wrong shape" in page
    assert "it may take 1 s" in page
    for suffix in (".json", ".md"):
        name = record.path.with_suffix(suffix).name
        assert (record.copies / name).read_text() == (record.path.parent / name).read_text()
    assert not list(record.path.parent.glob("*.part"))


def test_a_lost_device_is_remembered_and_the_next_process_leaves_out_what_broke_it(record):
    timer = FakeTimer()

    def breaks():
        timer.is_lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def bench(lab, name):
        found = lab.compare({"good": lambda: 1.0, "bad": breaks})
        for what, t in found.times.items():
            lab.record.add(name, what, t)

    wanted = [Bench("first", 1, bench)]
    with pytest.raises(DeviceLostError, match="bad: RuntimeError: CUDA error"):
        run_benches(Lab(CPU, timer, record, Sizes()), wanted, say=lambda _: None)
    again = Record.resumed(record.path, None)
    assert not again.is_complete
    assert again.poisonous == [["first", "bad"]]
    run_benches(Lab(CPU, FakeTimer(), again, Sizes()), wanted, say=lambda _: None)
    assert [r["what"] for r in again.rows] == ["good"]
    assert again.benches[0]["failed"] == {"bad": "it made the device unusable"}


def rows_that_meet_every_bar() -> list[dict[str, object]]:
    rows = []

    def add(bench, what, ms, **facts):
        rows.append({"bench": bench, "what": what, "ms": ms, **facts})

    add("prefill 32K D128", "lists 25 %", 5.0, tflops=400.0)
    add("prefill 32K D64", "lists 25 %", 5.0, tflops=290.0)
    for bench, power in (("prefill 128K D128", 10.0),):
        add(bench, "sdpa flash", 160.0)
        add(bench, "sdpa cudnn", 130.0)
        add(bench, "power", power)
    for bench in ("flexprefill 32K D128", "flexprefill 128K D128"):
        add(bench, "sdpa flash", 100.0)
        add(bench, "flash-attn 3", 80.0)
        add(bench, "kernel", 25.0, density=0.2)
        add(bench, "selection", 1.5)
    for batch in (16, 64):
        add(f"decode {batch}", "power", 1.0, of_copy=0.75)
    rows.append({"bench": "launch", "what": "prefill, lists", "host_us": 80.0, "is_layer": True})
    rows.append({"bench": "launch", "what": "selection", "host_us": 300.0, "is_layer": False})
    return rows


def test_bars_say_wanted_reached_and_met():
    judged = {bar["bar"]: bar for bar in bars(rows_that_meet_every_bar())}
    assert all(bar["met"] is True for bar in judged.values())
    assert judged["PowerAttention at 128K against SDPA flash"]["reached"] == 16.0
    assert judged["PowerAttention at 128K against the best dense"]["reached"] == 13.0
    # 100 ms / 25 ms · 0.2, and 80 ms / 25 ms · 0.2
    assert judged["FlexPrefill's kernel at 32K, speed-up × density, against SDPA flash"]["reached"] == pytest.approx(0.8)
    assert judged["FlexPrefill's kernel at 32K, speed-up × density, against the best dense"]["reached"] == pytest.approx(0.64)
    assert judged["selection at 128K, share of the best dense"]["reached"] == pytest.approx(1.5 / 80)
    assert judged["launch of one layer on the host"]["reached"] == 80.0


def test_a_bar_can_be_missed_and_a_missing_number_is_not_measured():
    rows = [r for r in rows_that_meet_every_bar() if r["what"] not in ("sdpa flash", "sdpa cudnn")]
    rows[0]["tflops"] = 379.0
    judged = {bar["bar"]: bar["met"] for bar in bars(rows)}
    assert judged["kernel, lists at 25 %, 32K, D 128"] is False
    assert judged["PowerAttention at 128K against SDPA flash"] is None
    assert judged["PowerAttention at 128K against the best dense"] is None
    lines = bars_table(bars([]))
    assert len(lines) == len(BARS) + 2
    assert all("not measured | – |" in line for line in lines[2:])


def test_bars_name_benchmarks_and_contestants_that_exist():
    names = {bench.name for bench in benches(Sizes())}
    assert {r["bench"] for r in rows_that_meet_every_bar()} <= names


def whole_method(bench: str, method: str, ms: float, dense_ms: float, *, tokens: int, head_dim: int = 128) -> list[dict[str, object]]:
    facts = {"bench": bench, "tokens": tokens, "head_dim": head_dim}
    return [{**facts, "what": "sdpa flash", "ms": dense_ms}, {**facts, "what": "power", "ms": ms, "method": method, "dtype": "bfloat16"}]


@pytest.mark.parametrize(
    ("ms", "tokens"),
    [((8, 8, 8), 4), ((11, 8, 8), 8), ((8, 11, 8), 16), ((11, 11, 11), DEFAULT_TOKENS["cuda"]), ((9, 8, 8), 8)],
    ids=["always", "from_the_second", "not_before_it_stays", "never", "too_little_to_tell"],
)
def test_lengths_from_which_a_method_pays_are_read_from_a_visit(ms, tokens):
    rows = [row for n, mine in zip((8, 16, 4), (ms[1], ms[2], ms[0]), strict=True) for row in whole_method(f"{n}", "m", mine, 10, tokens=n)]
    assert crossovers(rows, sm="9.0") == {"m/sm_90/bfloat16/d128": tokens}
    assert crossovers(rows, sm="") == {}
    assert crossovers(rows[:4], sm="9.0") == {}, "two lengths tell nothing"


def test_a_method_that_loses_with_wide_heads_gets_their_default():
    rows = [row for n in (8, 16, 32768) for row in whole_method(f"{n}", "m", 11, 10, tokens=n, head_dim=256)]
    assert crossovers(rows, sm="9.0") == {"m/sm_90/bfloat16/d256": WIDE_HEAD_TOKENS}


def test_benchmarks_of_whole_methods_run_them_with_the_options_that_users_get():
    sizes = Sizes()
    assert sizes.power == accel.PowerAttention().static_pattern(None)
    step = AttentionStep(0, 2, 1, 99, 99, 8, 2, 128, "cuda", "bfloat16")
    for gamma, label in ((0.95, "flexprefill"), *((gamma, f"flexprefill:gamma={gamma}") for gamma in sizes.other_gammas)):
        method = accel.FlexPrefill(gamma=gamma)
        here = replace(method.rule(step), min_q=0, min_kv=0)
        assert here == replace(sizes.rule, gamma=gamma)
        assert crossover_key(method, device="sm_90", dtype="bfloat16", head_dim=128) == f"{label}/sm_90/bfloat16/d128"


@pytest.mark.parametrize("spoil", [None, "partial", "failed", "unchecked", "lost", "cpu"])
def test_lengths_of_a_whole_visit_are_shipped_and_no_others(record, tmp_path, spoil):
    record.env |= {} if spoil == "cpu" else {"sm": "9.0"}
    record.rows = [row for n in (8192, 16384, 32768) for row in whole_method(f"{n}", "flexprefill", 5, 10, tokens=n)]
    record.checks = [{"name": "a", "state": "failed" if spoil == "failed" else "passed", "detail": "", "took_s": 1.0}]
    record.checks = [] if spoil == "unchecked" else record.checks
    record.poisonous = [["one", "kernel"]] if spoil == "lost" else []
    record.is_complete = spoil != "partial"
    record.save()
    shipped = tmp_path / "crossovers.json"
    shipped.write_text('{"flexprefill/sm_80/bfloat16/d64": 7}')
    command = [sys.executable, str(ROOT / "scripts" / "ship_crossovers.py"), str(record.path), "--file", str(shipped)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    new = {"flexprefill/sm_90/bfloat16/d128": 8192} if spoil is None else {}
    assert json.loads(shipped.read_text()) == {"flexprefill/sm_80/bfloat16/d64": 7, **new}
    assert done.returncode == (0 if spoil is None else 2), done.stderr
    assert ("| flexprefill/sm_90/bfloat16/d128 | 8192 |" in record.path.with_suffix(".md").read_text()) is (spoil != "cpu")


def test_readme_beside_the_results_shows_what_the_last_visit_found():
    folder = ROOT / "evals" / "results" / "gpu"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    last = max(folder.glob("*.json"), key=lambda path: path.stem[-10:])
    found = json.loads(last.read_text(encoding="utf-8"))
    assert last.with_suffix(".md").name in readme
    assert "\n".join(bars_table(bars(found["rows"]))) in readme
    lengths = crossovers(found["rows"], sm=found["env"]["sm"])
    assert all(line in readme for line in crossovers_section(lengths) if line.startswith("| "))
    shipped = json.loads((ROOT / "accel" / "crossovers.json").read_text(encoding="utf-8"))
    assert shipped.items() >= lengths.items() == found["crossovers"].items()


def test_the_page_has_ratios_to_dense_and_only_columns_that_hold_something(record):
    record.rows = rows_that_meet_every_bar()
    left_out, clocks = {"flash-attn 2": "ImportError: a | b"}, {"clocks.sm": "1755"}
    record.benches = [{"bench": "prefill 128K D128", "state": "measured", "failed": left_out, "clocks": clocks}]
    record.checks = [{"name": "prefill: lists", "state": "failed", "detail": "rows 0..127\nare wrong", "took_s": 1.0}]
    page = markdown(record.as_dict())
    assert "| what | ms | SDPA flash ÷ this | best dense ÷ this |" in page
    assert "| power | 10 | 16 | 13 |" in page
    assert "- flash-attn 2: not measured, ImportError: a / b" in page
    assert "- failed: prefill: lists: rows 0..127 are wrong" in page
    assert "clocks.sm 1755" in page
    assert best_dense(record.rows, "flexprefill 32K D128") == 80.0
    assert "to_best" not in with_ratios({"bench": "decode 16", "what": "power", "ms": 1.0}, record.rows)


def test_result_files_are_named_by_device_and_day_and_never_overwritten(tmp_path):
    env = {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02"}
    first = result_path(tmp_path, env)
    assert first.name == "nvidia-h100-80gb-hbm3-2026-01-02.json"
    first.touch()
    assert result_path(tmp_path, env).name == "nvidia-h100-80gb-hbm3-2026-01-02-2.json"


def test_checks_of_another_process_are_taken_over(visit, tmp_path):
    assert gpu_check.main(["--check", "--folder", str(tmp_path / "checks")]) == 0
    assert gpu_check.main(["--bench", "--tests", str(tmp_path / "checks"), "--folder", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "some-gpu-2026-01-01.json").read_text())
    assert [(c["name"], c["state"], c["detail"]) for c in data["checks"]] == [("a", "passed", "fine")]


def test_checks_that_were_cut_short_fail_the_visit(record):
    assert "before the first one" in gpu_check.read_checks(record.path.parent)[0]["detail"]
    record.checks = [{"name": "a", "state": "passed", "detail": "", "took_s": 1.0}]
    record.save()
    assert [(c["name"], c["state"]) for c in gpu_check.read_checks(record.path.parent)] == [("a", "passed"), ("all checks", "failed")]


def test_checks_report_and_stop_at_their_time(record, monkeypatch):
    def skipped():
        raise Skipped("too small")

    def wrong():
        raise AssertionError("NaN")

    monkeypatch.setattr(gpu_check, "checks", lambda _: [Check("a", lambda: "fine"), Check("b", skipped), Check("c", wrong)])
    gpu_check.run_checks(record, Profile(CPU), until=float("inf"), say=lambda _: None)
    assert [(c["state"], c["detail"]) for c in record.checks] == [("passed", "fine"), ("skipped", "too small"), ("failed", "AssertionError: NaN")]
    record.checks.clear()
    gpu_check.run_checks(record, Profile(CPU), until=0.0, say=lambda _: None)
    assert {c["detail"] for c in record.checks} == {"no time left"}


def test_fp32_is_checked_more_closely_than_tf32():
    call = small().ragged()

    def rounded(call, plan, out, lse):
        cpu_executor(call, plan, out, lse)
        # the ten bits of a mantissa that tf32 keeps
        out.mul_(1 + 2**-11)

    assert check_error(cpu_executor, call, "power", 16)
    with pytest.raises(AssertionError, match="query block"):
        check_error(rounded, call, "power", 16)


def test_a_contestant_that_does_not_compile_does_not_end_the_launch_benchmark(record, monkeypatch):
    class CompilationError(Exception):
        """As Triton's, which is no RuntimeError."""

    def fails(*_, **__):
        raise CompilationError("at 1:2")

    for name in ("prefill", "decode", "_select", "block_sparse_attention"):
        monkeypatch.setattr(gpu_bench, name, fails)
    monkeypatch.setattr(gpu_bench.GroupCall, "run", lambda self: None)
    lab = Lab(CPU, FakeTimer(), record, Sizes(heads=(2, 1), head_dims=(16,), block=16, launch_tokens=32, launch_calls=1))
    gpu_bench.bench_launch(lab, "launch")
    assert lab.failed["prefill, power"] == "CompilationError: at 1:2"
    assert [row["what"] for row in record.rows] == ["public function, head groups", "for comparison: PyTorch's in-place addition"]


def small() -> Profile:
    return Profile(CPU, dtype=torch.float32, block=16, head_dim=16, heads=(4, 2), q_len=(37, 20), kv_len=(37, 53))


def cpu_executor(call, plan, out, lse):
    found = block_sparse_attention(call.q, call.keys, plan, call.lens, scale=call.scale, softcap=call.softcap, out=out, return_lse=True, impl="cpu")
    lse.copy_(found[1])


@pytest.mark.parametrize("kind", ["power", "window", "dense", "lists", "lines", "lines+tiles"])
@pytest.mark.parametrize("page_size", [0, 16], ids=["contiguous", "pages"])
def test_the_error_check_passes_what_is_right(kind, page_size):
    assert "allowed error" in check_error(cpu_executor, small().ragged(page_size=page_size), kind, 16)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda out, lse: out[30:38, 1].zero_(), "query block"),
        (lambda out, lse: out[10].fill_(torch.nan), "query block"),
        (lambda out, lse: out[0].fill_(1.0), "rows of no sequence"),
        (lambda out, lse: lse[0, 10].fill_(3.0), "not close"),
    ],
    ids=["a head's block lost", "a row unwritten", "a gap written", "a wrong LSE"],
)
def test_the_error_check_fails_what_is_wrong(damage, message):
    def attend(call, plan, out, lse):
        cpu_executor(call, plan, out, lse)
        damage(out, lse)

    state, detail = run_check(Check("x", lambda: check_error(attend, small().ragged(), "power", 16)))
    assert state == "failed"
    assert message in detail


def test_checks_have_names_of_their_own_and_cover_the_issue():
    names = [check.name for check in checks(Profile(torch.device("cuda")))]
    assert len(set(names)) == len(names)
    # a capture that fails can take the process with it
    assert names == sorted(names, key=lambda name: name.startswith("graph"))
    wanted = ["prefill: lists, fp32", "decode: power, fp32", "head groups: rows, fp32"]
    wanted += ["lines+tiles", "head_dim 256", "pages of 64", "batch 16", "graph: selection", "no sync: decode", "1048576 tokens", "public function"]
    for words in wanted:
        assert any(words in name for name in names), words


@pytest.fixture
def visit(monkeypatch, tmp_path):
    """`gpu_check.main` as it runs where there is a GPU, but for the device: returns what it did."""
    done: dict[str, object] = {}

    def run(lab, wanted):
        done["benches"] = [bench.name for bench in wanted]
        if "lost" in done:
            raise DeviceLostError("lists 25 %", RuntimeError("illegal access"))
        lab.record.is_complete = True
        lab.record.save()

    for name, value in (("is_available", lambda: True), ("current_device", lambda: 0)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_check, "CudaTimer", lambda device: HostTimer())
    monkeypatch.setattr(gpu_check, "environment", lambda device, root: {"device": "Some GPU", "date": "2026-01-01"})
    monkeypatch.setattr(gpu_check, "checks", lambda profile: [Check("a", lambda: "fine")])
    monkeypatch.setattr(gpu_check, "run_benches", run)
    monkeypatch.setattr(os, "execv", lambda path, command: done.update(command=command))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    return done


def test_a_visit_writes_its_results_and_copies(visit, tmp_path, capsys):
    assert gpu_check.main(["--check", "--bench", "--only", "decode", "--folder", str(tmp_path)]) == 0
    assert visit["benches"] == ["decode 16", "decode 64", "decode 1"]
    data = json.loads((tmp_path / "out" / "some-gpu-2026-01-01.json").read_text())
    assert data["status"] == "complete"
    assert [c["state"] for c in data["checks"]] == ["passed"]
    assert "not measured" in capsys.readouterr().out


def test_failed_tests_fail_the_visit(visit, tmp_path):
    missing = ["--tests", str(tmp_path / "none"), "--folder", str(tmp_path)]
    assert gpu_check.main(["--bench", *missing]) == 1


def test_a_lost_device_starts_a_fresh_process_that_goes_on(visit, tmp_path):
    visit["lost"] = True
    assert gpu_check.main(["--bench", "--no-flex", "--only", "a b", "--folder", str(tmp_path), "--budget-s", "100"]) == 1
    command = visit["command"]
    assert command[1:3] == ["-m", "accel.evals.gpu"]
    args = gpu_check._parser().parse_args(command[3:])
    assert args.resume == tmp_path / "some-gpu-2026-01-01.json"
    assert (args.bench, args.check, args.no_flex, args.only, args.restarts) == (True, False, True, ["a b"], 1)
    assert 90 <= args.budget_s <= 100
    # and not for ever
    visit.pop("command")
    gpu_check.main([*command[3:], "--restarts", "5"])
    assert "command" not in visit


def test_benchmarks_run_in_a_fresh_process_after_a_check_that_broke_the_device(visit, tmp_path, monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu_check, "CudaTimer", lost)
    assert gpu_check.main(["--check", "--bench", "--folder", str(tmp_path)]) == 1
    args = gpu_check._parser().parse_args(visit["command"][3:])
    assert [check["name"] for check in Record.resumed(args.resume, None).checks] == ["a"]
    assert args.bench
    # there is nothing left of the checks
    monkeypatch.setattr(gpu_check, "checks", lambda _: [Check("a", lambda: pytest.fail("run twice"))])
    gpu_check.run_checks(Record.resumed(args.resume, None), Profile(CPU), until=float("inf"))


def test_a_check_that_breaks_the_device_does_not_fail_those_behind_it(visit, tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(gpu_check, "checks", lambda _: [Check("a", broken), Check("b", lambda: "fine")])
    assert gpu_check.main(["--check", "--folder", str(tmp_path)]) == 1
    args = gpu_check._parser().parse_args(visit["command"][3:])
    assert (args.check, args.bench, args.restarts) == (True, False, 1)
    # the fresh process goes on behind it
    gpu_check.main(visit["command"][3:])
    assert [(c["name"], c["state"]) for c in Record.resumed(args.resume, None).checks] == [("a", "failed"), ("b", "passed")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    assert gpu_check.main(["--check", "--bench", "--folder", str(tmp_path)]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    script = subprocess.run(
        ["sh", str(ROOT / "scripts" / "gpu_check.sh")], env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert script.returncode == 2
    assert "no CUDA device" in script.stderr


@pytest.mark.parametrize("are_checks_killed", [True, False])
def test_the_script_checks_first_and_measures_in_the_time_that_is_left(tmp_path, are_checks_killed):
    python = tmp_path / "python"
    # torch and a GPU are there, as far as the script can see
    killed = "kill -ABRT $$" if are_checks_killed else "exit 0"
    python.write_text(f'#!/bin/sh\ncase "$*" in *--check*) echo "run $*"; {killed};; -m*) echo "run $*";; esac\n')
    python.chmod(0o755)
    script = [str(ROOT / "scripts" / "gpu_check.sh"), "--budget-s", "300", "--only", "two words"]
    done = subprocess.run(["sh", *script], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True)
    assert done.returncode == are_checks_killed, done.stderr
    checks_run, benches_run = (line for line in done.stdout.splitlines() if line.startswith("run"))
    assert "-m accel.evals.gpu --check --budget-s 120 --folder /" in checks_run
    assert "-m accel.evals.gpu --bench --budget-s " in benches_run
    assert checks_run.split()[-1] == benches_run.split("--tests ")[1].split()[0]
    assert benches_run.endswith("--only two words")


def test_torch_is_the_only_package_the_visit_imports():
    packages = ("transformers", "accelerate", "safetensors", "yaml", "tqdm", "datasets", "jinja2", "matplotlib", "packaging")
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {packages!r}:\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "import accel.evals.gpu.__main__, accel.evals.gpu.checks\n"
        "from accel.kernels.block_sparse import cute_executor, flex_executor, triton_launch, triton_decode\n"
        "from accel.kernels.flex_index import triton_select\n"
    )
    # a bare checkout: found by the path alone
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, cwd="/")


def test_the_dense_baseline_of_flex_attention_is_causal_attention(monkeypatch):
    monkeypatch.setattr(flex_executor, "compiled_flex_attention", lambda: flex_attention)
    prompt = Prompt.random(300, (4, 2), 16, torch.float32, CPU)
    found = gpu_contestants._compiled_flex(prompt)()
    want = gpu_contestants._sdpa(prompt, SDPBackend.MATH)()
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
    # the bars know every dense contestant by its name
    assert set(gpu_contestants.dense_runs(prompt, wants_flex=True)) == set(DENSE)


def test_a_backend_without_grouped_heads_gets_repeated_ones(monkeypatch):
    given = []

    def sdpa(q, k, v, *, is_causal, scale, enable_gqa=False):
        given.append(k.shape[1])
        if enable_gqa:
            raise RuntimeError("no kernel for grouped heads")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)

    monkeypatch.setattr(gpu_contestants, "scaled_dot_product_attention", sdpa)
    run = gpu_contestants._sdpa(Prompt.random(32, (4, 2), 16, torch.float32, CPU), SDPBackend.MATH)
    run()
    run()
    assert given == [2, 4, 4]
