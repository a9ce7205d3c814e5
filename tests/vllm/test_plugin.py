"""The plugin that every vLLM of an installation loads: it may run twice, leaves engines that did not ask as they are, and never raises."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from accel.patches.hosts.vllm import compat, models, plugin
from accel.patches.hosts.vllm.compat import AttentionBackendEnum, ModelRegistry


@pytest.fixture
def _clean() -> Iterator[None]:
    """No backend registered, and none left behind but ours."""
    for name in plugin.BACKENDS:
        AttentionBackendEnum[name].clear_override()
    yield
    for name in plugin.BACKENDS:
        AttentionBackendEnum[name].clear_override()
    plugin.stand_in_front()


def test_every_name_that_we_take_has_its_home_in_this_vllm() -> None:
    assert [name for name in compat._HOMES if getattr(compat, name, None) is None] == []


def paths() -> dict[str, str]:
    return {name: AttentionBackendEnum[name].get_path() for name in plugin.BACKENDS}


@pytest.mark.usefixtures("_clean")
def test_models_are_known_by_name_and_a_second_time_changes_nothing() -> None:
    before = paths()
    plugin.register()
    assert paths() == before
    assert all(ours.name in ModelRegistry.models for ours in models.ARCHITECTURES.values())
    known = dict(ModelRegistry.models)
    plugin.register()
    assert (paths(), ModelRegistry.models) == (before, known)


@pytest.mark.usefixtures("_clean")
def test_backends_stand_in_front_of_vllm_s_and_a_second_time_changes_nothing() -> None:
    assert not set(paths().values()) & set(plugin.BACKENDS.values())
    plugin.stand_in_front()
    assert paths() == plugin.BACKENDS
    plugin.stand_in_front()
    assert paths() == plugin.BACKENDS


_SCRIPT = """
import json, sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
import conftest
from tiny_vllm import engine
def seen(llm):
    [layer, *_] = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    [groups] = llm.collective_rpc(lambda worker: worker.model_runner.attn_groups)
    builders = [b for group in groups for part in group for b in part.metadata_builders]
    return {
        "classes": [c.__module__ for c in (layer.attn_backend, type(layer.impl), *map(type, builders))],
        "modules": [name for name in sys.modules if name.startswith(("accel.kernels", "accel.patches.hosts.vllm.attention"))],
    }
with engine(sys.argv[1], skip_tokenizer_init=True) as llm:
    plain = seen(llm)
import accel
with engine(sys.argv[1], accel.Streaming(min_seq_len=0), skip_tokenizer_init=True) as llm:
    asked = {**seen(llm), "problems": llm.collective_rpc("accel_report")[0]["problems"]}
print("FOUND", json.dumps([plain, asked, "accel.patches.hosts.vllm.plugin" in sys.modules]))
"""


def test_an_engine_that_did_not_ask_holds_nothing_of_ours_and_one_built_behind_it_does(tiny_llama: str) -> None:
    """In one process, in which vLLM remembers the backend that it chose for heads of this size."""
    folder = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", _SCRIPT, tiny_llama, str(folder)], capture_output=True, text=True, timeout=300, cwd=folder.parent,
    )  # fmt: skip
    [line] = [line for line in found.stdout.splitlines() if line.startswith("FOUND ")] or [found.stderr[-3000:]]
    plain, asked, is_loaded = json.loads(line.removeprefix("FOUND "))
    assert is_loaded
    assert plain["modules"] == []
    assert {name.split(".")[0] for name in plain["classes"]} == {"vllm"}
    assert {name.split(".")[0] for name in asked["classes"]} == {"accel"}
    assert asked["problems"] == []


@pytest.mark.usefixtures("_clean")
def test_somebody_else_s_backend_stays() -> None:
    compat.register_backend(AttentionBackendEnum.CPU_ATTN, "other.Backend")
    plugin.stand_in_front()
    assert AttentionBackendEnum.CPU_ATTN.get_path() == "other.Backend"
    assert AttentionBackendEnum.FLASH_ATTN.get_path() == plugin.BACKENDS["FLASH_ATTN"]


@pytest.mark.usefixtures("_clean")
def test_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    monkeypatch.setattr(ModelRegistry, "models", {})
    plugin.register()
    assert ModelRegistry.models == {}
    assert "vLLM 0.31.0 is installed" in caplog.text


@pytest.mark.usefixtures("_clean")
def test_whatever_fails_vllm_starts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(models, "ARCHITECTURES", {"NoSuchModel": None})
    with caplog.at_level(logging.ERROR, logger="accel"):
        plugin.register()
    assert "will refuse to serve" in caplog.text
