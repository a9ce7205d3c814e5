"""The general plugin of vLLM: makes our classes known by name. It runs in every process of every vLLM of an installation, often twice."""

from __future__ import annotations

import logging

logger = logging.getLogger("accel")

# the stock backends that we stand in front of in workers whose engine asked
BACKENDS = {
    "CPU_ATTN": "accel.patches.hosts.vllm.attention.cpu.AccelCPUAttention",
    "TRITON_ATTN": "accel.patches.hosts.vllm.attention.triton_backend.AccelTritonAttention",
    "FLASH_ATTN": "accel.patches.hosts.vllm.attention.flash.AccelFlashAttention",
}


def register() -> None:
    """Registers our models under names of their own, and imports none of them. Never raises: vLLM would not start for people who never asked for us.

    An engine without our options runs nothing of ours; a worker without us is found out when it is asked (`launch.py`), and nothing is served then.
    """
    try:
        from accel.patches.hosts.vllm.compat import ModelRegistry, why_unsupported

        if reason := why_unsupported():
            logger.warning("accel: its vLLM plugin stays off: %s", reason)
            return
        from accel.patches.hosts.vllm.models import ARCHITECTURES

        for ours in ARCHITECTURES.values():
            if ours.name not in ModelRegistry.models:
                ModelRegistry.register_model(ours.name, ours.path)
    except Exception:   # whatever it is, it must not keep vLLM from starting
        logger.exception("accel: its vLLM plugin could not be loaded; engines that ask for it will refuse to serve")


def stand_in_front() -> None:
    """Puts our attention backends in front of vLLM's in this process, by name. Somebody else's stay."""
    from accel.patches.hosts.vllm.compat import AttentionBackendEnum, cached_attention_backend, register_backend

    for member, path in BACKENDS.items():
        backend = AttentionBackendEnum[member]
        if not backend.is_overridden():
            register_backend(backend, path)
    # an engine that did not ask may have been built in this process before
    cached_attention_backend.cache_clear()
