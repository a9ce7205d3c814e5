"""The plugin that every vLLM of an installation loads: it may run twice, leaves others' backends, and never raises."""

from __future__ import annotations

import logging
from collections.abc import Iterator

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
    plugin.register()


def test_every_name_that_we_take_has_its_home_in_this_vllm() -> None:
    assert [name for name in compat._HOMES if getattr(compat, name, None) is None] == []


def paths() -> dict[str, str]:
    return {name: AttentionBackendEnum[name].get_path() for name in plugin.BACKENDS}


@pytest.mark.usefixtures("_clean")
def test_backends_and_models_are_known_by_name_and_a_second_time_changes_nothing() -> None:
    before = paths()
    plugin.register()
    assert before.keys() == plugin.BACKENDS.keys()
    assert not set(before.values()) & set(plugin.BACKENDS.values())
    assert paths() == plugin.BACKENDS
    assert all(ours.name in ModelRegistry.models for ours in models.ARCHITECTURES.values())
    known = dict(ModelRegistry.models)
    plugin.register()
    assert (paths(), ModelRegistry.models) == (plugin.BACKENDS, known)


@pytest.mark.usefixtures("_clean")
def test_somebody_else_s_backend_stays() -> None:
    compat.register_backend(AttentionBackendEnum.CPU_ATTN, "other.Backend")
    plugin.register()
    assert AttentionBackendEnum.CPU_ATTN.get_path() == "other.Backend"
    assert AttentionBackendEnum.FLASH_ATTN.get_path() == plugin.BACKENDS["FLASH_ATTN"]


@pytest.mark.usefixtures("_clean")
def test_another_version_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.31.0")
    plugin.register()
    assert not set(paths().values()) & set(plugin.BACKENDS.values())
    assert "vLLM 0.31.0 is installed" in caplog.text


@pytest.mark.usefixtures("_clean")
def test_whatever_fails_vllm_starts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(plugin, "BACKENDS", {"NO_SUCH_BACKEND": "accel.Nothing"})
    with caplog.at_level(logging.ERROR, logger="accel"):
        plugin.register()
    assert "will refuse to serve" in caplog.text
