"""Combinations that users ask about, and how far each was tried. `accel ls` prints this."""

from __future__ import annotations

HOST_NOTES = {
    "models": "VAR and Infinity, tested on tiny random ones; official weights untried",
    "generate": "tested: guidance on and off, batches, interleaved and aborted generations, schedules given per call; a teacher-forced pass raises",
    "autocast": "tested on CPU with bfloat16",
    "PEFT": "tested with LoRA",
    "memory": "cache bytes are measured between attention calls; while one layer attends, its old and new entries are there twice",
    "CUDA": "untried",
    "torch.compile": "tested with compiled blocks on the eager backend: the cache stays outside the graphs, so fullgraph=True cannot work",
}
