"""Combinations that users ask about, and how far each was tried. `accel ls --notes` prints this."""

from __future__ import annotations

HOST_NOTES = {
    "generate": "tested: batches with padding, beams, static cache, chunked prefill, prompt lookup, assistant decoding, second turn",
    "torch.compile": "tested with fullgraph=True on the eager and aot_eager backends, forward only; inductor and CUDA graphs untried",
    "PEFT": "tested with LoRA",
    "pipelines": "tested with text-generation",
    "accelerate": "tested with cpu_offload; device maps over several GPUs untried",
    "autocast": "tested on CPU with bfloat16 and float16",
    "vision-language models": "sparse attention: the text decoder, where its mask is plain causal. Token pruning: twelve families, with batches, "
    "padding, beams, static cache, chunked prefill (from transformers 5.24 on), prompt lookup, second turns, labels; image encoders are watched",
    "cache compression": "dynamic caches of layers with full attention; sliding and linear layers stay as they are. Tested: padding, beams, chunked "
    "prefill, second turns, pictures, beside sparse prefill and token pruning. Static, quantised and offloaded caches, assistant decoding and prompt "
    "lookup raise: they write, or take back, entries that are gone. A compressed layer leaves torch.compile's graph",
    "cache compression in vLLM": "not possible per head: vLLM has one block table for all heads of a layer, so that entries dropped of one head free "
    "no memory (vLLM issues 5751, 10646 and 12254 asked for it)",
    "CUDA": "the kernels, and their calls in CUDA graphs, are checked on an H200 by scripts/gpu_check.sh (evals/results/gpu). Whole models were "
    "tried there by hand, tiny ones: sparse attention, pruning and caches, padding, generation, static caches, a full graph of torch.compile",
    "quantised weights": "bitsandbytes and torchao untried; attention sees ordinary tensors there",
    "FSDP, tensor parallel": "untried",
    "continuous batching": "generate_batch refuses a patched model with an error that names accel: undo() first",
}
