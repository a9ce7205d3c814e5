"""The general plugin of vLLM: makes our classes known by name. It runs in every process of every vLLM of an installation, often twice."""

from __future__ import annotations

import logging

logger = logging.getLogger("accel")

# the stock backends that we stand in front of; ours are they where an engine did not ask for a method
BACKENDS = {
    "CPU_ATTN": "accel.patches.hosts.vllm.attention.cpu.AccelCPUAttention",
    "TRITON_ATTN": "accel.patches.hosts.vllm.attention.triton_backend.AccelTritonAttention",
    "FLASH_ATTN": "accel.patches.hosts.vllm.attention.flash.AccelFlashAttention",
}


def register() -> None:
    """Registers backends and models by name, and imports none of them. Never raises: vLLM would not start for people who never asked for us.

    A worker without us is found out when it is asked (`launch.py`), and nothing is served then.
    """
    try:
        from accel.patches.hosts.vllm.compat import AttentionBackendEnum, ModelRegistry, register_backend, why_unsupported

        if reason := why_unsupported():
            logger.warning("accel: its vLLM plugin stays off: %s", reason)
            return
        for member, path in BACKENDS.items():
            backend = AttentionBackendEnum[member]
            # somebody else's stays
            if not backend.is_overridden():
                register_backend(backend, path)
        from accel.patches.hosts.vllm.models import ARCHITECTURES

        for ours in ARCHITECTURES.values():
            if ours.name not in ModelRegistry.models:
                ModelRegistry.register_model(ours.name, ours.path)
    except Exception:   # whatever it is, it must not keep vLLM from starting
        logger.exception("accel: its vLLM plugin could not be loaded; engines that ask for it will refuse to serve")
