"""Positions with several axes in vLLM's newer model runner, the one of GPUs: an engine in a process where Triton's interpreter stands in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def served(folder: str) -> dict[str, Any]:
    """What the newer runner gives for the prompts of the other test."""
    from interpreted import believe_in_triton

    believe_in_triton()
    from tiny_vllm import engine, report
    from vlm_twins import ENGINE, PROMPTS, asking, greedy

    import accel

    with engine(folder, accel.FasterVLM(keep=0.25), architecture="AccelQwen2_5_VLForConditionalGeneration", **ENGINE) as llm:
        [runner] = llm.collective_rpc(lambda worker: [cls.__module__ for cls in type(worker.model_runner).__mro__])
        return {"pruned": greedy(llm, PROMPTS)[0], "whole": greedy(llm, asking(PROMPTS, 1.0))[0], "report": report(llm), "runner": runner}


@pytest.mark.slow
def test_the_newer_runner_gives_the_same_tokens(tmp_path: Path) -> None:
    import tiny_vlms
    from vlm_twins import PROMPTS, Twin

    import accel

    twin = Twin(tiny_vlms.save_qwen2_5_vl(tmp_path))
    run = subprocess.run([sys.executable, __file__, twin.folder], capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.split("RESULT ")[-1])
    assert any(module.startswith("vllm.v1.worker.gpu.") for module in found["runner"]), found["runner"]
    assert found["report"]["tokens"]["prompts"] == 4
    assert found["pruned"] == twin.transformers(PROMPTS, accel.FasterVLM(keep=0.25))
    assert found["whole"] == twin.transformers(PROMPTS)


if __name__ == "__main__":
    print("RESULT " + json.dumps(served(sys.argv[1])))
