"""`accel.vllm.LLM(model, method=…)`: vLLM's own class with methods in its engine. vLLM is imported when `LLM` is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel.patches.hosts.vllm.llm import LLM as LLM

__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    if name != "LLM":
        raise AttributeError(f"module 'accel.vllm' has no attribute {name!r}")
    from accel.patches.hosts.vllm.llm import LLM

    globals()[name] = LLM
    return LLM
