"""What the compressed cache of a decoder held, and what its budgets say that it should hold (kv-compression.md §5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from accel.evals.cache_bench.cost import POSITION_BYTES
from accel.protocols import KVCompression, Method

if TYPE_CHECKING:
    from accel.protocols import ModelInfo
    from accel.stats import CacheStats


def is_compressing(methods: Sequence[Method]) -> bool:
    """Whether one of them drops cache entries."""
    return any(isinstance(m, KVCompression) for m in methods)


def held_now(stats: CacheStats) -> dict[str, int]:
    """`held` and `whole` bytes behind the newest pass; no numbers before the first."""
    return {"held": sum(stats.held_by_layer.values()), "whole": stats.whole_bytes} if stats.held_by_layer else {}


def held_figures(stats: CacheStats, at_prompt: dict[str, int], n_prompt: int) -> dict[str, Any] | None:
    """What the cache held over one prompt and its answers, ready for JSON; None where none was compressed.

    at_prompt: `held_now` behind the prompt, of `n_prompt` tokens. prompt_bytes, kept_share: of what was left behind the prompt, the share of a whole
    cache's bytes. peak_bytes: the most held behind any pass, whole_bytes: keys and values of all tokens so far, as a whole cache holds them;
    peak_share: of the two. What one attention call reads beside the cache is not in them, and neither is the memory of the process.
    """
    if not at_prompt or not stats.whole_bytes:
        return None
    return {
        "kept_share": at_prompt["held"] / at_prompt["whole"], "whole": [n_prompt], "prompt_bytes": at_prompt["held"],
        "peak_bytes": stats.peak_bytes, "whole_bytes": stats.whole_bytes, "peak_share": stats.peak_bytes / stats.whole_bytes,
    }  # fmt: skip


def whole_cache_bytes(info: ModelInfo, n_tokens: int, *, itemsize: int, batch: int = 1) -> int:
    """Bytes of the keys and values of a decoder's whole cache."""
    return 2 * batch * info.n_layers * info.n_kv_heads * n_tokens * info.head_dim * itemsize


def predicted_bytes(methods: Sequence[Method], info: ModelInfo, n_tokens: int, *, itemsize: int, batch: int = 1) -> int:
    """Bytes that budgets leave of a prompt: keys, values, and the place of each entry. Whole where no method drops entries.

    What a method records of its own, such as the attention that each entry received, is not in it, nor is a layer whose cache cannot be compressed.
    """
    method = next((m for m in methods if isinstance(m, KVCompression)), None)
    if method is None:
        return whole_cache_bytes(info, n_tokens, itemsize=itemsize, batch=batch)
    bound, total = method.bind(info), 0
    for layer in range(info.n_layers):
        groups = bound.groups(info, layer, step=0, n_entries=n_tokens)
        # a layer in which every head fits stays as it is, and needs no places
        place = POSITION_BYTES if any(group.budget < n_tokens for group in groups) else 0
        kept = sum(len(group.heads) * min(group.budget, n_tokens) for group in groups)
        total += batch * kept * (2 * info.head_dim * itemsize + place)
    return total
