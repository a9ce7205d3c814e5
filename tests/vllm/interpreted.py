"""An engine in a process where Triton's interpreter stands in for a CPU backend: `python interpreted.py REQUEST`, a script of its own.

vLLM believes in Triton then, and runs its newer model runner, the one of GPUs, and where asked its Triton attention. Relies on Triton's inside.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


def believe_in_triton() -> None:
    """Before vLLM is imported."""
    from accel.patches.hosts.vllm.cpu_fixes import apply_cpu_fixes

    apply_cpu_fixes()
    os.environ.update(TRITON_INTERPRET="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_USE_V2_MODEL_RUNNER="1")
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)


def use_backend(path: str) -> None:
    """Puts an attention backend in the place of the CPU's, which vLLM takes whatever it is asked for."""
    from accel.patches.hosts.vllm.compat import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, path)
    # its kernels ask how new the GPU is
    torch.cuda.get_device_capability = lambda device=None: (8, 0)


def main(request: dict[str, Any]) -> dict[str, Any]:
    """The greedy tokens of an engine on these prompts, its report, and the classes that ran."""
    believe_in_triton()
    from tiny_vllm import engine, greedy, report

    from accel.recipe import Recipe

    if request.get("backend"):
        use_backend(request["backend"])
    methods = Recipe.from_dict(request["recipe"], source="the test").methods if request.get("recipe") else ()
    with engine(request["folder"], *methods, **request["options"]) as llm:
        [runner] = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)
        tokens = greedy(llm, request["prompts"], request["n"])
        return {"tokens": tokens, "report": report(llm) if methods else None, "runner": runner}


if __name__ == "__main__":
    found = main(json.loads(sys.argv[1]))
    print("RESULT " + json.dumps(found))
