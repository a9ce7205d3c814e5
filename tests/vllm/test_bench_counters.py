"""What `accel bench serve` reads from `/metrics`. Here because the parser of the text comes with vLLM; no engine is started."""

from __future__ import annotations

import pytest

from accel.patches.hosts.vllm.bench import counters

# two workers of one engine: each has its own heads, and sees every picture
TWO = """
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{worker="0"} 900.0
# TYPE accel_sparse_calls counter
accel_sparse_calls_total{worker="0"} 6.0
accel_sparse_calls_total{worker="1"} 2.0
# TYPE accel_attention_density gauge
accel_attention_density{worker="0"} 0.3
accel_attention_density{worker="1"} 0.7
# TYPE accel_dense_calls counter
accel_dense_calls_total{worker="0",reason="decode"} 4.0
accel_dense_calls_total{worker="1",reason="decode"} 1.0
accel_dense_calls_total{worker="1",reason="sliding window"} 3.0
# TYPE accel_visual_tokens counter
accel_visual_tokens_total{worker="0"} 400.0
accel_visual_tokens_total{worker="1"} 300.0
# TYPE accel_visual_tokens_kept counter
accel_visual_tokens_kept_total{worker="0"} 100.0
accel_visual_tokens_kept_total{worker="1"} 120.0
"""


def test_calls_of_workers_add_up_and_pictures_are_those_of_one() -> None:
    found = counters(TWO)
    assert (found["workers"], found["sparse_calls"]) == (2, 8)
    assert found["dense_calls"] == {"decode": 5, "sliding window": 3}
    # of the worker that saw most, both
    assert (found["visual_tokens"], found["kept_tokens"]) == (400, 100)


def test_density_is_weighted_by_the_calls_that_ran_sparse() -> None:
    assert counters(TWO)["density"] == pytest.approx((6 * 0.3 + 2 * 0.7) / 8)
    without = TWO.replace('accel_sparse_calls_total{worker="1"} 2.0', 'accel_sparse_calls_total{worker="1"} 0.0')
    without = without.replace('accel_attention_density{worker="1"} 0.7\n', "")
    assert counters(without)["density"] == pytest.approx(0.3)


def test_without_a_worker_that_answered_nothing_is_known() -> None:
    assert counters('# TYPE accel_workers gauge\naccel_workers 0.0\n') == {
        "workers": 0, "sparse_calls": 0, "dense_calls": {}, "density": None, "visual_tokens": 0, "kept_tokens": 0,
    }  # fmt: skip
