"""Which methods vLLM runs at all, and why not the others; told without vLLM."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import accel
from accel.errors import UnsupportedError
from accel.patches.hosts.vllm import host
from accel.patches.hosts.vllm.checks import check_methods
from accel.patches.hosts.vllm.compat import vllm_version
from accel.protocols import Stage, TokenPruning
from accel.registry import build, method_names

COMPRESSION = [name for name in method_names() if build(name).kind == "kv_compression"]
ROUTERS = Path(accel.__file__).parent / "evals" / "models" / "small_vlm" / "routers.safetensors"
SPARSE = [name for name in method_names() if build(name).kind == "sparse_attention"]


@pytest.mark.parametrize("name", COMPRESSION)
def test_compression_by_head_is_refused_because_of_the_block_table(name: str) -> None:
    [reason] = host.refusals(build(name))
    assert "one block table for all heads" in reason


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_attention_is_not_refused(name: str) -> None:
    assert host.refusals(build(name)) == []


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (accel.FasterVLM(keep=0.25), None),
        (accel.VFlowOpt(keep=0.25), None),
        (accel.DyVTE(exit_layer=8), None),
        (accel.VFlowOpt(r1=0.5, r2=0.5, r3=0.2), "in the middle of the model"),
        (accel.FastV(keep=0.5), "in the middle of the model"),
        (accel.DyVTE(), "exit_layer=N"),
    ],
    ids=["fastervlm", "vflowopt_in_front", "dyvte_fixed", "vflowopt_layers", "fastv", "dyvte_untrained"],
)
def test_pruning_is_refused_by_where_tokens_leave(method: Any, word: str | None) -> None:
    reasons = host.refusals(method)
    assert bool(reasons) == (word is not None)
    assert word is None or word in reasons[0]


def test_trained_exits_are_refused_because_they_are_learned_whatever_model_they_are_for() -> None:
    reasons = host.refusals(accel.DyVTE(routers=str(ROUTERS)))
    assert "request by request" in reasons[-1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned(TokenPruning):
    def stages(self, model: Any) -> list[Stage]:
        return [Stage("layer", 4, needs_learned_choice=True)]

    def select(self, ctx: Any) -> None:
        return None


def test_a_learned_exit_is_refused_because_counts_are_fixed_ahead() -> None:
    [reason] = host.refusals(Learned())
    assert "fixes row counts before the model runs" in reason


def test_all_reasons_of_a_recipe_come_at_once_with_the_method_s_name() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_methods([accel.FastV(keep=0.5), build("hack"), accel.Streaming()])
    assert [reason.split(":")[0] for reason in caught.value.reasons] == ["fastv", "hack"]


def test_two_sparse_methods_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="at most one sparse-attention method"):
        check_methods([accel.Streaming(), accel.FlexPrefill()])


def test_an_engine_that_stands_is_not_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    class LLM:
        pass

    fake = types.ModuleType("vllm")
    fake.LLM = LLM      # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    with pytest.raises(UnsupportedError, match=r"accel\.vllm\.LLM"):
        accel.apply(LLM(), "flexprefill")


@pytest.mark.skipif(vllm_version() is not None, reason="vLLM is installed")
def test_the_python_class_tells_what_to_install() -> None:
    with pytest.raises(UnsupportedError, match="pip install 'vllm"):
        _ = accel.vllm.LLM
