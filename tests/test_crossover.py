"""Measured crossovers survive damage, wrong values and several writers, and decide when a method runs dense."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from accel import FlexPrefill, PowerAttention, crossover
from accel.crossover import (
    DEFAULT_TOKENS,
    WIDE_HEAD_TOKENS,
    crossover_file,
    crossover_key,
    crossover_tokens,
    measured_crossovers,
    record_crossover,
)
from accel.errors import AccelError, OptionError
from accel.protocols import AttentionStep

KEY = crossover_key(FlexPrefill(), device="cpu", dtype="float32", head_dim=64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "cache"))
    # keys name the architecture, which tests change
    for known in (measured_crossovers, crossover._keys):
        known.cache_clear()
    yield tmp_path / "cache"
    for known in (measured_crossovers, crossover._keys):
        known.cache_clear()


def step(kv_len: int, device: str = "cpu", head_dim: int = 64) -> AttentionStep:
    return AttentionStep(0, 2, 1, kv_len, kv_len, 8, 2, head_dim, device, "float32")


def test_folder_is_the_users_cache_unless_accel_cache_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert crossover_file() == tmp_path / "cache" / "crossover.json"
    monkeypatch.delenv("ACCEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert crossover_file() == tmp_path / "xdg" / "accel" / "crossover.json"


def test_default_applies_where_nothing_was_measured() -> None:
    assert crossover_tokens(FlexPrefill(), step(9)) == DEFAULT_TOKENS["cpu"]
    assert crossover_tokens(FlexPrefill(), step(9, device="cuda")) == DEFAULT_TOKENS["cuda"]
    assert crossover_tokens(FlexPrefill(), step(9, device="xpu")) == DEFAULT_TOKENS["cuda"]


def test_wide_heads_of_a_gpu_wait_longer_where_blocks_are_chosen_by_the_prompt() -> None:
    wide = step(9, device="cuda", head_dim=256)
    assert crossover_tokens(FlexPrefill(), wide) == WIDE_HEAD_TOKENS > DEFAULT_TOKENS["cuda"]
    assert crossover_tokens(PowerAttention(), wide) == DEFAULT_TOKENS["cuda"]
    assert crossover_tokens(FlexPrefill(), step(9, head_dim=256)) == DEFAULT_TOKENS["cpu"]
    record_crossover(crossover_key(FlexPrefill(), device="cuda", dtype="float32", head_dim=256), 300)
    assert crossover_tokens(FlexPrefill(), wide) == 300


def test_a_method_whose_options_cannot_be_hashed_has_its_length() -> None:
    @dataclass(frozen=True)
    class Listed(FlexPrefill):
        heads: list[int] = field(default_factory=list)

    record_crossover(crossover_key(Listed(heads=[3]), device="cpu", dtype="float32", head_dim=64), 300)
    assert crossover_tokens(Listed(heads=[3]), step(9)) == 300


def test_recorded_length_decides_for_its_own_head_size_only() -> None:
    record_crossover(KEY, 300)
    assert crossover_tokens(FlexPrefill(), step(9)) == 300
    assert crossover_tokens(FlexPrefill(), step(9, head_dim=128)) == DEFAULT_TOKENS["cpu"]


def test_recorded_length_holds_for_the_options_it_was_measured_with() -> None:
    fast = FlexPrefill(gamma=0.8)
    record_crossover(crossover_key(fast, device="cpu", dtype="float32", head_dim=64), 300)
    assert crossover_tokens(fast, step(9)) == 300
    assert crossover_tokens(FlexPrefill(gamma=0.8, dense_layers=(0,), dense_kernel="accel", min_q=64), step(9)) == 300
    assert crossover_tokens(FlexPrefill(), step(9)) == DEFAULT_TOKENS["cpu"]
    assert crossover_tokens(FlexPrefill(gamma=0.8, precision="fast"), step(9)) == DEFAULT_TOKENS["cpu"]


@pytest.mark.parametrize(("measured", "expected"), [(300, DEFAULT_TOKENS["cpu"]), (9000, 9000)], ids=["shorter", "longer"])
def test_what_was_measured_with_the_default_options_can_only_make_others_more_cautious(measured: int, expected: int) -> None:
    record_crossover(KEY, measured)
    assert crossover_tokens(FlexPrefill(gamma=0.99), step(9)) == expected


def test_options_that_say_which_calls_run_sparse_do_not_tell_lengths_apart() -> None:
    where = {"device": "cpu", "dtype": "float32", "head_dim": 64}
    adapted = PowerAttention(is_adapted=True, apply_to="prefill", full_layers="none", min_seq_len=0)
    assert crossover_key(adapted, **where) == "powerattention/cpu/float32/d64"  # type: ignore[arg-type]
    wide = PowerAttention(window_blocks=9, block_size=128)
    assert crossover_key(wide, **where) == "powerattention:block_size=128,window_blocks=9/cpu/float32/d64"  # type: ignore[arg-type]


@pytest.fixture
def some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = {"flexprefill/sm_90/float32/d64": 8192, "flexprefill:gamma=0.9/sm_90/float32/d64": 5000, "flexprefill/sm_80/float32/d64": 7}
    monkeypatch.setattr(crossover, "architecture", lambda device: "sm_90" if device == "cuda" else device)
    monkeypatch.setattr(crossover, "shipped_crossovers", lambda: shipped)


@pytest.mark.usefixtures("some_gpu")
def test_a_length_that_comes_with_accel_holds_for_its_architecture_until_this_machine_was_measured() -> None:
    assert crossover_tokens(FlexPrefill(), step(9, device="cuda")) == 8192
    assert crossover_tokens(FlexPrefill(gamma=0.9), step(9, device="cuda")) == 5000
    assert crossover_tokens(FlexPrefill(gamma=0.8), step(9, device="cuda")) == DEFAULT_TOKENS["cuda"]
    assert crossover_tokens(FlexPrefill(), step(9)) == DEFAULT_TOKENS["cpu"]
    record_crossover("flexprefill/sm_90/float32/d64", 3000)
    assert crossover_tokens(FlexPrefill(), step(9, device="cuda")) == 3000


def test_the_table_that_comes_with_accel_can_be_read(recwarn: pytest.WarningsRecorder) -> None:
    crossover.shipped_crossovers.cache_clear()
    assert crossover.SHIPPED_FILE.is_file()
    shipped = crossover.shipped_crossovers()
    assert all(re.fullmatch(r"\w+(:[^/]+)?/sm_\d+/\w+/d\d+", key) for key in shipped)
    assert shipped["flexprefill/sm_90/float16/d128"] == shipped["flexprefill/sm_90/bfloat16/d128"] > DEFAULT_TOKENS["cuda"]
    assert not recwarn.list


def test_an_architecture_is_asked_of_torch_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    crossover.architecture.cache_clear()
    assert crossover.architecture("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert crossover.architecture("cuda") == "cuda"
    crossover.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert crossover.architecture("cuda") == "sm_100"
    crossover.architecture.cache_clear()


def test_method_runs_dense_below_the_measured_crossover_and_a_number_overrides_it() -> None:
    record_crossover(KEY, 3000)
    assert FlexPrefill().dense_reason(step(2999)) == "shorter than 3000 tokens"
    assert FlexPrefill().dense_reason(step(3000)) is None
    assert FlexPrefill(min_seq_len=4000).dense_reason(step(3999)) == "shorter than 4000 tokens"
    assert FlexPrefill(min_seq_len=2000).dense_reason(step(2000)) is None


def test_other_entries_are_kept() -> None:
    record_crossover("a/cpu/float32/d64", 1)
    record_crossover("b/cpu/float32/d64", 2)
    record_crossover("a/cpu/float32/d64", 3)
    assert measured_crossovers() == {"a/cpu/float32/d64": 3, "b/cpu/float32/d64": 2}
    assert [path.name for path in crossover_file().parent.glob("*.new")] == []


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe", b""], ids=["cut_short", "list", "not_text", "empty"])
def test_damaged_file_is_ignored_with_a_warning_and_set_aside_when_written(content: bytes) -> None:
    crossover_file().parent.mkdir(parents=True)
    crossover_file().write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged; using the default"):
        assert crossover_tokens(FlexPrefill(), step(9)) == DEFAULT_TOKENS["cpu"]
    record_crossover(KEY, 512)
    assert measured_crossovers() == {KEY: 512}
    assert crossover_file().with_name("crossover.json.damaged").read_bytes() == content


@pytest.mark.parametrize("wrong", ["100", 12.5, -1, None, True, [4]], ids=repr)
def test_wrong_entry_is_ignored_with_a_warning_and_the_others_count(wrong: object) -> None:
    crossover_file().parent.mkdir(parents=True)
    crossover_file().write_text(json.dumps({KEY: wrong, "other": 7}))
    with pytest.warns(UserWarning, match=KEY):
        assert measured_crossovers() == {"other": 7}


@pytest.mark.parametrize("wrong", ["100", 12.5, -1, True], ids=repr)
def test_wrong_value_is_never_written(wrong: object) -> None:
    with pytest.raises(OptionError, match="whole number of tokens"):
        record_crossover(KEY, wrong)  # type: ignore[arg-type]
    assert not crossover_file().exists()


def test_folder_that_cannot_be_written_is_an_error_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.raises(AccelError, match="ACCEL_CACHE names another folder"):
        record_crossover(KEY, 5)


def test_processes_that_record_at_the_same_time_keep_each_others_entries() -> None:
    code = "import sys; from accel.crossover import record_crossover\nfor i in range(25): record_crossover(f'{sys.argv[1]}-{i}', i)"
    writers = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b", "c")]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0, 0]
    assert measured_crossovers() == {f"{name}-{i}": i for name in ("a", "b", "c") for i in range(25)}
