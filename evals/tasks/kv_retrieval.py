"""One value out of many by its key: InfiniteBench's kv_retrieval, a JSON object whose keys and values are UUIDs, one of them asked for.

At a random depth; right where the value is one of the words of the reply; 50 new tokens, or what the value needs. As published but for the wording
and the length, which is the one asked for. `key_value` is the same with words and digits, for small models.
"""

from __future__ import annotations

from typing import Any

from accel.evals.tasks import Sample, Task
from accel.evals.tasks._infinitebench import CAVEAT, GROUP, KV_TOKENS
from accel.evals.tasks._prompts import chat_sample, random_uuid, sample_rng


def samples(tokenizer: Any, n_tokens: int, n: int, seed: int) -> list[Sample]:
    """n prompts, each the longest that leaves the reply of `n_tokens` tokens, with one answer."""
    return [_sample(tokenizer, n_tokens, index, seed) for index in range(n)]


def _sample(tokenizer: Any, n_tokens: int, index: int, seed: int) -> Sample:
    rng = sample_rng("kv_retrieval", seed, index)
    depth, key, value = rng.random(), random_uuid(rng), random_uuid(rng)
    others = [_line(random_uuid(rng), random_uuid(rng)) for _ in range(n_tokens // 8 + 1)]

    def question(n_others: int) -> str:
        lines = others[:n_others]
        lines.insert(int(depth * (n_others + 1)), _line(key, value))
        return f"Find the value of a key in the JSON object below.\n\n{{{', '.join(lines)}}}\n\nWhat is the value of the key \"{key}\"?"

    return chat_sample(
        tokenizer, task="kv_retrieval", n_tokens=n_tokens, most_units=len(others), question=question, prefix=f'The value of the key "{key}" is "',
        answer=value, parts=[value], labels=[f"{key} (at {depth:.0%})"], max_new_tokens=KV_TOKENS, id=index, seed=seed, depths=[depth], rule="word",
    )  # fmt: skip


def _line(key: str, value: str) -> str:
    return f'"{key}": "{value}"'


TASK = Task(samples, group=GROUP, caveat=CAVEAT)
