"""Attention backends: the platform's own ones, with prompts, and static patterns of decoding, handed to our kernels (vllm-integration.md §3, §4).

`plugin.BACKENDS` names the subclasses (cpu.py, triton_backend.py, flash.py); mixins.py is what they share. When vLLM builds the metadata of a step,
group.py divides its requests for every layer (rows.py), and layer.py runs them. A worker stands in front of vLLM's where its engine has options of
ours; beside it in one process, an engine without has vLLM's implementation, and a builder that passes everything on.

- Every request is judged as if it were alone in its step, and counted as one call: results and counters are those of the transformers host. All
  sparse requests of a layer then go through one plan and one call of our kernels; vLLM's attention is given only those that stay dense.
- Keys and values are read from the paged cache, prefixes written by other requests included.
- A prompt in chunks is planned chunk by chunk. Static patterns lie on absolute blocks, so that chunks change nothing but the requests that count
  as too short; but where a window is as wide as a density asks for, each chunk has one of its own. A pattern found from the
  keys follows the last queries of each chunk. The scheduler cuts wherever the budget of a step ends; `enable_chunked_prefill=False` plans every
  prompt whole. The report has a notice where this makes a difference.
- Decoding by a static pattern needs no kernel: pages.py leaves the pattern's pages in the block table, in memory that captured graphs go on
  reading. Layers that stay dense have the whole table beside it. Blocks that are not whole pages go through our kernels on CPUs and in eager mode,
  and stay dense where decoding is replayed from a graph.
- eligible.py lists the layers that never run sparse here, with their reasons.
"""
