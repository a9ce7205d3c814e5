"""Interleaving, ratios and notes of the latency measurement, on a two-layer Llama with random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from accel.errors import OptionError
from accel.evals import latency
from accel.evals.latency import OWN_DENSE, Pass, Spread, dense_note, measure_decode, measure_ttft, rows_from_passes
from accel.evals.prompt_cache import cache_argument
from accel.stats import Stats


class Named:
    """A method as far as the measurement looks at it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def method_name(self) -> str:
        return self.name

    def options(self) -> dict[str, object]:
        return {"strength": 1}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order in which they were applied; nothing is patched."""
    order: list[str] = []

    @contextmanager
    def record(_model: object, *methods: Named):
        order.append("+".join(m.method_name() for m in methods))
        stats = Stats()
        stats.layer(0).dense_calls["shorter than 4096 tokens"] += 1
        yield SimpleNamespace(stats=stats)

    monkeypatch.setattr(latency.accel, "apply", record, raising=False)
    monkeypatch.setattr(latency, "build", lambda name, options: Named(name))
    return order


def test_variants_take_turns_in_every_round(model: LlamaForCausalLM, applied: list[str]) -> None:
    seen: list[str] = []
    variants = {"A": [Named("a")], "B": [Named("b")]}
    rows = measure_ttft(model, torch.ones(1, 16, dtype=torch.long), variants, repeats=3, warmup=1, progress=seen.append)
    assert applied == ["dense", "a", "b"] * 4
    assert [line.split(",")[0] for line in seen] == ["dense (sdpa)", OWN_DENSE, "A", "B"] * 4
    assert [row.ms.n for row in rows] == [3] * 4


def test_both_baselines_lead_and_every_row_has_both_ratios(model: LlamaForCausalLM, applied: list[str]) -> None:
    rows = measure_ttft(model, torch.ones(1, 16, dtype=torch.long), {"A": [Named("a")]}, repeats=1, warmup=1)
    assert [(row.label, row.is_baseline) for row in rows] == [("dense (sdpa)", True), (OWN_DENSE, True), ("A", False)]
    assert all(set(row.speedup) == {"dense (sdpa)", OWN_DENSE} for row in rows)
    assert rows[0].speedup["dense (sdpa)"] == 1.0
    assert rows[1].speedup[OWN_DENSE] == 1.0
    assert all(row.peak_bytes is not None and row.peak_bytes >= 0 for row in rows)


def test_a_row_whose_methods_stayed_dense_says_so(model: LlamaForCausalLM, applied: list[str]) -> None:
    row = measure_ttft(model, torch.ones(1, 16, dtype=torch.long), {"A": [Named("a")]}, repeats=1, warmup=0)[-1]
    assert row.note.startswith("dense: shorter than")
    assert row.density is None
    assert row.selection_share is None
    assert row.peak_bytes is None


def test_ratios_are_taken_round_by_round() -> None:
    # the machine is three times slower in the last round: medians of the columns would give 2/1, 2/4 and 6/3 mixed up
    passes = {"dense (sdpa)": [Pass(2.0), Pass(2.0), Pass(6.0)], "A": [Pass(1.0), Pass(4.0), Pass(1.5)]}
    rows = rows_from_passes("ttft_ms", 16, {"dense (sdpa)": [], "A": [Named("a")]}, ["dense (sdpa)"], passes, {})
    # 2.0, 0.5, 4.0
    assert rows[1].speedup == {"dense (sdpa)": 2.0}
    assert rows[1].ms.median == 1500.0
    assert rows[1].methods == [{"method": "a", "strength": 1}]


def test_selection_share_is_relative_to_its_own_pass() -> None:
    passes = {"A": [Pass(1.0, 0.1, 0.3, 5), Pass(2.0, 0.6, 0.3, 5), Pass(4.0, 0.8, 0.3, 5)]}
    [row] = rows_from_passes("ttft_ms", 16, {"A": [Named("a")]}, [], passes, {"A": 7})
    assert row.selection_share == pytest.approx(0.2)
    assert (row.density, row.sparse_calls, row.peak_bytes) == (0.3, 5, 7)


@pytest.mark.parametrize(
    "done, note",
    [
        pytest.param(Pass(1.0, sparse_calls=30), "", id="all-sparse"),
        pytest.param(Pass(1.0, dense_calls={"shorter than 4096 tokens": 30}), "dense: shorter than 4096 tokens", id="short"),
        pytest.param(Pass(1.0, dense_calls={"dense layer": 20, "shorter than 9 tokens": 10}), "dense: shorter than 9 tokens", id="beside-layers"),
        pytest.param(Pass(1.0, dense_calls={"dense layer": 20, "decode": 10}), "dense: decode", id="decode-beside-dense-layers"),
        pytest.param(Pass(1.0, dense_calls={"unsupported mask": 30}), "dense: unsupported mask", id="unsupported"),
        pytest.param(Pass(1.0, sparse_calls=20, dense_calls={"dense layer": 10}), "10 of 30 calls dense (dense layer)", id="mixed"),
    ],
)
def test_note_names_the_dense_calls(done: Pass, note: str) -> None:
    assert dense_note(done) == note


def test_spread_of_known_values() -> None:
    assert Spread.of([float(i) for i in range(11)]) == Spread(median=5.0, p20=2.0, p80=8.0, n=11)
    assert Spread.of([3.0]) == Spread(median=3.0, p20=3.0, p80=3.0, n=1)


def test_budget_ends_after_a_whole_round(model: LlamaForCausalLM, applied: list[str]) -> None:
    rows = measure_ttft(model, torch.ones(1, 16, dtype=torch.long), {"A": [Named("a")]}, repeats=50, warmup=0, budget_s=0.0)
    assert [row.ms.n for row in rows] == [1, 1, 1]


def test_decode_gives_every_variant_the_same_cache(model: LlamaForCausalLM, applied: list[str]) -> None:
    lengths: Counter[int] = Counter()

    def note_length(_model: object, _args: object, kwargs: dict) -> None:
        cache = kwargs.get(cache_argument(model))
        lengths[0 if cache is None else cache.get_seq_length()] += 1

    hook = model.register_forward_pre_hook(note_length, with_kwargs=True)
    rows = measure_decode(model, torch.ones(1, 20, dtype=torch.long), {"A": [Named("a")]}, steps=4, repeats=2, warmup=1)
    hook.remove()
    # the cache is filled once; then 3 rounds of 3 variants, each from 16 cached tokens on
    assert lengths == {0: 1, 16: 9, 17: 9, 18: 9, 19: 9}
    assert {row.metric for row in rows} == {"tpot_ms"}
    assert {row.tokens for row in rows} == {20}


# no cut undoes either: a window that has forgotten, and a recurrent state
LOSING: dict[str, Callable[..., Any]] = {
    "window": lambda **shared: MistralForCausalLM(MistralConfig(**shared, sliding_window=8)),
    "recurrent": lambda **shared: Qwen3NextForCausalLM(Qwen3NextConfig(
        **shared, layer_types=["linear_attention", "full_attention"], head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSING)
def test_every_pass_of_decoding_goes_on_from_the_prompt_alone(name: str, applied: list[str]) -> None:
    torch.manual_seed(0)
    shared = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2}  # fmt: skip
    losing = LOSING[name](**shared).eval()
    answers: list[torch.Tensor] = []
    hook = losing.lm_head.register_forward_hook(lambda _m, _args, out: answers.append(out[0, -1]))
    measure_decode(losing, torch.randint(0, 64, (1, 20)), {}, steps=2, repeats=2, warmup=0)
    hook.remove()
    # the prompt, then 2 rounds of 2 variants
    assert len(answers) == 1 + 4 * 2
    assert all(torch.equal(answers[i], answers[i - 2]) for i in range(3, len(answers)))


@pytest.mark.parametrize("repeats, warmup", [pytest.param(0, 1, id="no-repeat"), pytest.param(1, -1, id="negative-warmup")])
def test_counts_out_of_range_raise(model: LlamaForCausalLM, repeats: int, warmup: int) -> None:
    with pytest.raises(OptionError, match="at least"):
        measure_ttft(model, torch.ones(1, 8, dtype=torch.long), {}, repeats=repeats, warmup=warmup)


def test_a_variant_may_not_take_the_name_of_a_baseline(model: LlamaForCausalLM, applied: list[str]) -> None:
    with pytest.raises(OptionError, match=r"dense \(accel\)"):
        measure_ttft(model, torch.ones(1, 8, dtype=torch.long), {OWN_DENSE: [Named("a")]}, repeats=1)
