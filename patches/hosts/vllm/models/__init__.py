"""Vision-language models of vLLM whose visual tokens can leave: by architecture, the class of ours that takes its place. Imports no model."""

from __future__ import annotations

from typing import NamedTuple


class Replacement(NamedTuple):
    """name: of the architecture under which vLLM knows our class; path: where it is imported from."""

    name: str
    path: str


def _ours(architecture: str, module: str) -> Replacement:
    return Replacement(f"Accel{architecture}", f"accel.patches.hosts.vllm.models.{module}:Accel{architecture}")


ARCHITECTURES: dict[str, Replacement] = {
    "LlavaForConditionalGeneration": _ours("LlavaForConditionalGeneration", "llava"),
    "LlavaNextForConditionalGeneration": _ours("LlavaNextForConditionalGeneration", "llava_next"),
    "Qwen2_5_VLForConditionalGeneration": _ours("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
}
