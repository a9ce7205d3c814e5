"""The worker extension that engines with our options name, and the only module here that changes something by being imported.

vLLM imports it for the workers of such an engine, before they build their model, and calls nothing else that early.
"""

from __future__ import annotations

from accel.patches.hosts.vllm.plugin import stand_in_front
from accel.patches.hosts.vllm.worker import AccelWorker

__all__ = ["AccelWorker"]

stand_in_front()
