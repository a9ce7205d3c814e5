"""Combinations that users ask about, and how far each was tried. `accel ls --notes` prints this."""

from __future__ import annotations

HOST_NOTES = {
    "models": "VAR and Infinity, tested on tiny random ones; official weights untried",
    "generate": "tested: guidance on and off, batches, interleaved and aborted generations, schedules given per call; a teacher-forced pass raises",
    "FoundationVision's VAR class": (
        "known by its attributes; tested on a double of it, and tried once, tiny and random, on the class as of November 2025. While a method is on, "
        "flash-attention and xformers in its attention give way to torch's own, rounding included; its fused feed-forward stays. A loop of one's own "
        "that calls kv_caching as the class does is a generation too; aborted, its cache is held until the next one begins"
    ),
    "autocast": "tested on CPU with bfloat16, on the published class also with float16",
    "PEFT": "tested with LoRA",
    "wrapped": "tested: DataParallel, DistributedDataParallel of one process, torch.compile around the model; FSDP is not taken",
    "memory": "cache bytes are measured between attention calls; while one layer attends, its old and new entries are there twice",
    "CUDA": "untried",
    "torch.compile": "tested with compiled blocks on the eager backend: the cache stays outside the graphs, so fullgraph=True cannot work",
}
