"""Tiny random models on disk, and engines of vLLM on them, for `tests/vllm`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

VOCAB = 512
# fp32: greedy tokens are strong evidence only there. `skip_tokenizer_init`: prompts are token ids.
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 4, "seed": 0, "disable_log_stats": True}


def save_llama(folder: Path, *, layers: int = 4, heads: int = 4, kv_heads: int = 2, head_dim: int = 32, positions: int = 4096) -> str:
    """Writes a Llama whose weights are wide enough that its greedy tokens differ from each other; returns the folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=heads * head_dim, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, vocab_size=VOCAB, max_position_embeddings=positions, initializer_range=0.12, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return str(folder)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, one prompt per length."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=rng).tolist() for n in lengths]


@contextmanager
def engine(folder: str, *methods: Any, architecture: str | None = None, **options: Any) -> Iterator[Any]:
    """A vLLM engine with these methods; without any, vLLM as it is."""
    from vllm import LLM

    from accel.patches.hosts.vllm.options import engine_options

    given = {**ENGINE, **options}
    llm = LLM(model=folder, **(engine_options(methods, given, architecture) if methods else given))
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()


def greedy(llm: Any, batch: Sequence[Sequence[int]], n: int = 8) -> list[list[int]]:
    """The greedy continuations of prompts of token ids."""
    from vllm import SamplingParams

    wanted = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": list(p)} for p in batch], wanted, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def report(llm: Any) -> dict[str, Any]:
    """What the only worker says of itself."""
    [found] = llm.collective_rpc("accel_report")
    return dict(found)
