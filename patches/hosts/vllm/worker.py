"""What every worker of an engine can be asked (`collective_rpc`), mixed into vLLM's own worker class."""

from __future__ import annotations

from typing import Any

from accel.patches.hosts.vllm.attention.eligible import note_foreign_layers
from accel.patches.hosts.vllm.engine import engine_of


class AccelWorker:
    """Methods added to a vLLM worker; `self` is that worker."""

    vllm_config: Any

    def accel_report(self) -> dict[str, Any] | None:
        """What runs in this worker (`Engine.report`), or None where its engine did not ask for us."""
        engine = engine_of(self.vllm_config)
        if engine is None:
            return None
        note_foreign_layers(self.vllm_config, engine)
        return engine.report()

    def accel_ready(self) -> dict[str, Any] | None:
        """The same, asked before the first request: what was counted until then was vLLM warming up. Another server of this engine may ask again."""
        if (engine := engine_of(self.vllm_config)) is not None:
            engine.forget_warm_up()
        return self.accel_report()
