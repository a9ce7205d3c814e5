"""Every check and every benchmark of the GPU visit, once, in the interpreter and with small sizes: none of them may die of a typo there."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from accel.evals.gpu import checks as gpu_checks
from accel.evals.gpu import contestants as gpu_contestants
from accel.evals.gpu import head_groups
from accel.evals.gpu.bench import Lab, Sizes, benches, run_benches
from accel.evals.gpu.checks import Profile, checks
from accel.evals.gpu.head_groups import LastScale
from accel.evals.gpu.report import Record
from accel.evals.gpu.timing import HostTimer
from accel.kernels.block_sparse import ImplicitPlan
from accel.kernels.flex_index import SelectionRule

PROFILE = Profile(
    torch.device("cpu"), dtype=torch.float32, other_dtype=torch.float16, block=16, other_blocks=(32,), head_dim=16, other_dims=(24,),
    heads=(2, 1), other_heads=((3, 3),), pages=(16, 32), q_len=(37, 20, 1), kv_len=(37, 53, 18), batches=(1, 2), decode_kv=70, prompt=96,
    most_tokens=256,
)  # fmt: skip
SIZES = Sizes(
    dtype=torch.float16, heads=(2, 1), few_heads=(2, 1), block=32, power=ImplicitPlan(32, 1), densities=(0.25,), main_tokens=64,
    long_tokens=96, other_tokens=(), crossover_tokens=(64,), head_dims=(16, 32), batches=(2,), decode_tokens=64, pages=(32,),
    launch_tokens=32, launch_calls=1, copy_bytes=1024, product=16, seconds=0.0, fewest=1, wants_flex=False,
    rule=SelectionRule(block_size=32, min_budget=32),
    last_scale=LastScale(batch=1, n_heads=2, head_dim=16, n_rows=18, n_entries=40, budgets=(8, 30), n_observed=4),
)  # fmt: skip


@pytest.fixture
def cuda_only(monkeypatch):
    """Graphs and the ban on waiting, as far as a CPU has them: inside neither are numbers sent to the device."""

    @contextmanager
    def nothing_is_sent():
        def refuse(*_, **__):
            raise RuntimeError("a copy to the device inside a capture")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "tensor", refuse)
            yield

    def captured(run):
        run()
        with nothing_is_sent():
            run()
        return SimpleNamespace(replay=run)

    for module in (gpu_checks, head_groups):
        monkeypatch.setattr(module, "_needs_cuda", lambda p: None)
        monkeypatch.setattr(module, "captured", captured)
        monkeypatch.setattr(module, "forbidden_sync", nothing_is_sent)


@pytest.mark.parametrize("check", checks(PROFILE), ids=lambda check: check.name)
@pytest.mark.usefixtures("cuda_only")
def test_the_checks_run(check):
    assert check.run()


@pytest.mark.slow
def test_every_benchmark_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_contestants, "PREFILL_TILES", {16: ((16, 16, 4, 1, None),), 32: ((32, 16, 4, 1, None),)})
    monkeypatch.setattr(gpu_contestants, "DECODE_TILES", ((16, 4, 1),))
    record = Record(tmp_path / "cpu.json", {"device": "cpu", "date": "today"})
    lab = Lab(torch.device("cpu"), HostTimer(), record, SIZES)
    # the other lengths and head sizes run the same code
    wanted = [bench for bench in benches(SIZES) if bench.name not in ("flexprefill 0.0625K D16", "flexprefill 0.0625K D32")]
    with torch.no_grad():
        run_benches(lab, wanted)
    assert [entry["bench"] for entry in record.benches] == [bench.name for bench in wanted]
    assert len({bench.name for bench in wanted}) == len(wanted)
    assert [entry for entry in record.benches if entry["state"] != "measured"] == []
    # what a CPU does not have falls out, with its reason; everything of ours is measured
    not_here = {"sdpa cudnn", "flash-attn 2", "flash-attn 3", "flash_attn.cute", "flex", "cute"}
    assert {(entry["bench"], name): why for entry in record.benches for name, why in entry["failed"].items() if name not in not_here} == {}
    whats = {(row["bench"], row["what"]) for row in record.rows}
    assert {("ceilings", "copy"), ("prefill 0.0625K D16", "power"), ("flexprefill 0.09375K D16", "selection and kernel")} <= whats
    assert {("decode 2", "power, in a graph"), ("launch", "selection"), ("pages", "pages of 32")} <= whats
    assert {("head groups, last scale", "all with two groups"), ("head groups, one token", "two groups with lengths")} <= whats
    assert {("tiles of decoding", "16 keys, 4 warps, 1 stages"), ("tiles 0.0625K D32", "32×16, 4 warps, 1 stages")} <= whats
    methods = {row["method"]: row["what"] for row in record.rows if "method" in row}
    assert methods == {"powerattention": "power", "flexprefill": "selection and kernel", "flexprefill:gamma=0.9": "selection and kernel"}
    assert record.is_complete
    page = record.path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| lists 25 % |" in page
