"""What is refused from options and configurations alone, before any weight is loaded. Backends and configurations are stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

import accel
from accel.patches.hosts.vllm import checks, compat
from accel.patches.hosts.vllm.checks import connector_reasons
from accel.protocols import Method

STREAMING = accel.Streaming(min_seq_len=0)


# --- what servers would share ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [STREAMING, accel.FasterVLM(keep=0.25), accel.DyVTE(exit_layer=4)], ids=["sparse", "in_front", "exit"])
def test_keys_and_values_of_a_recipe_are_not_handed_to_other_servers(method: Method) -> None:
    [reason] = connector_reasons([method], {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}})
    assert reason.startswith("kv_transfer_config is given: keys and values are handed on under hashes")
    assert list(connector_reasons([method], {"kv_transfer_config": None, "ec_transfer_config": None})) == []


def test_offloading_is_refused_where_it_goes_to_a_server_of_its_own() -> None:
    [reason] = connector_reasons([STREAMING], {"kv_offloading_size": 4.0, "kv_offloading_backend": "lmcache"})
    assert reason.startswith("kv_offloading_backend is given")
    assert list(connector_reasons([STREAMING], {"kv_offloading_size": 4.0, "kv_offloading_backend": "native"})) == []
    assert list(connector_reasons([STREAMING], {"kv_offloading_size": None, "kv_offloading_backend": "lmcache"})) == []


@pytest.mark.parametrize(
    ("methods", "is_refused"),
    [([STREAMING], False), ([accel.FasterVLM(keep=0.25)], True), ([accel.DyVTE(exit_layer=4)], True), ([STREAMING, accel.FasterVLM()], True)],
    ids=["sparse", "in_front", "exit", "both"],
)
def test_encoded_pictures_are_not_handed_to_other_servers_where_a_recipe_prunes(methods: Sequence[Method], *, is_refused: bool) -> None:
    found = list(connector_reasons(methods, {"ec_transfer_config": {"ec_connector": "ECExampleConnector", "ec_role": "ec_producer"}}))
    assert [reason.startswith("ec_transfer_config is given: encoded pictures") for reason in found] == [True] * is_refused


# --- attention backends on CUDA ----------------------------------------------------------------------------------------------------


class Triton:
    """Takes pictures whose tokens see each other."""

    @staticmethod
    def supports_head_size(size: int) -> bool:
        return size <= 256

    @staticmethod
    def supports_dtype(dtype: str) -> bool:
        return True

    @staticmethod
    def supports_compute_capability(capability: Any) -> bool:
        return True

    @staticmethod
    def supports_mm_prefix() -> bool:
        return True


class Flash(Triton):
    """Takes them only in a version that is not here."""

    @staticmethod
    def supports_mm_prefix() -> bool:
        return False


@pytest.fixture
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(is_cpu=lambda: False, is_cuda=lambda: True, get_device_capability=lambda: (9, 0))
    backends = {"FLASH_ATTN": SimpleNamespace(get_class=lambda: Flash), "TRITON_ATTN": SimpleNamespace(get_class=lambda: Triton)}
    # not by setattr, which would ask for the old value, and import vLLM
    monkeypatch.setitem(vars(compat), "current_platform", platform)
    monkeypatch.setitem(vars(compat), "AttentionBackendEnum", backends)


def config(*, is_mm_prefix_lm: bool, head_size: int = 128) -> Any:
    return SimpleNamespace(is_mm_prefix_lm=is_mm_prefix_lm, dtype="bfloat16", get_head_size=lambda: head_size)


@pytest.mark.usefixtures("_on_cuda")
@pytest.mark.parametrize(("is_mm_prefix_lm", "chosen"), [(False, "FLASH_ATTN"), (True, "TRITON_ATTN")], ids=["causal", "gemma3"])
def test_a_backend_is_chosen_that_vllm_starts_with(chosen: str, *, is_mm_prefix_lm: bool) -> None:
    model = config(is_mm_prefix_lm=is_mm_prefix_lm)
    assert checks._chosen_backend([STREAMING], model, {}) == {"attention_backend": chosen}
    assert checks._backend_reason(model, None) is None


@pytest.mark.usefixtures("_on_cuda")
def test_a_backend_that_was_asked_for_and_does_not_fit_is_refused() -> None:
    assert checks._backend_reason(config(is_mm_prefix_lm=False), "FLASH_ATTN") is None
    reason = checks._backend_reason(config(is_mm_prefix_lm=True), "FLASH_ATTN")
    assert reason is not None
    assert "with pictures whose tokens see each other, fit none of FLASH_ATTN on this GPU" in reason
    wide = checks._backend_reason(config(is_mm_prefix_lm=False, head_size=512), None)
    assert wide == "heads of 512 in bfloat16 fit none of FLASH_ATTN, TRITON_ATTN on this GPU"
