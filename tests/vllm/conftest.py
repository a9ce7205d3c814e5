"""Tests on real engines of vLLM, in an environment of their own (`make test-vllm`); elsewhere this folder is left out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from accel.patches.hosts.vllm.compat import vllm_version

# not by its module: this very folder would be found
HAS_VLLM = vllm_version() is not None
if not HAS_VLLM:
    collect_ignore_glob = ["test_*.py"]
else:
    from accel.patches.hosts.vllm.cpu_fixes import apply_cpu_fixes

    apply_cpu_fixes()
    # one process, no compiler: fastest, and what a worker counts can be read directly
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs vLLM."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a random Llama, without a tokenizer."""
    from tiny_vllm import save_llama

    return save_llama(tmp_path_factory.mktemp("llama"))
