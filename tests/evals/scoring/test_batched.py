"""Prompts that are read together: the scores of each alone, dense and sparse, padded on either side; refused where padding is not ignored."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel

import accel
from accel.errors import UnsupportedError
from accel.evals.scoring.batched import require_padding, score_batch
from accel.evals.scoring.single import Scored, greedy, prefill, score
from accel.evals.tasks import Answer, Sample
from accel.protocols import Method

LENGTHS = (300, 449, 380)
TINY: dict[str, Any] = {"block_size": 64, "min_seq_len": 0}
METHODS: dict[str, Method | None] = {
    "dense": None,
    "flexprefill": accel.FlexPrefill(gamma=0.6, min_budget=128, **TINY),
    "streaming": accel.Streaming(window_blocks=2, **TINY),
}


def ids(n: int, seed: int) -> tuple[int, ...]:
    return tuple(torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist())


def forced(seed: int) -> list[Sample]:
    """Prompts of several lengths, two answers each at other places."""
    return [
        Sample(i, 0, ids(n, seed + i), (Answer("a", "", n // 2, n // 2 + 3 + i), Answer("b", "", n - 9, n))) for i, n in enumerate(LENGTHS)
    ]


def written(seed: int) -> list[Sample]:
    """Prompts of several lengths with right answers of 4, 5 and 6 tokens and replies of at most 6, 7 and 8."""
    return [
        Sample(i, 0, ids(n + 4 + i, seed + i), (Answer("a", "x", n + 1, n + 3), Answer("b", "y", n + 3, n + 4 + i)), n_prompt=n, max_new_tokens=6 + i)
        for i, n in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


def assert_same(found: list[Scored], alone: list[Scored]) -> None:
    for one, other in zip(found, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-3)
        assert (one.hits, one.texts) == (other.hits, other.texts)
        assert (one.times.n_output_tokens, one.times.finish_reason) == (other.times.n_output_tokens, other.times.finish_reason)


@pytest.mark.parametrize("make", [forced, written])
@pytest.mark.parametrize("name", METHODS)
def test_a_batch_scores_as_its_prompts_do_alone(model: Any, make: Any, name: str) -> None:
    samples, method, tokenizer = make(3), METHODS[name], byte_tokenizer()
    with accel.apply(model, method) if method is not None else nullcontext() as handle:
        alone = [score(model, tokenizer, sample) for sample in samples]
        counted = handle.stats.as_dict() if handle is not None else None
        if handle is not None:
            handle.stats.reset()
        together = score_batch(model, tokenizer, samples)
        if handle is not None:
            # sparse, and not dense for a reason that has to do with the padding
            assert handle.stats.total.sparse_calls > 0
            assert set(handle.stats.total.dense_calls) <= set(counted["dense_calls"])
            assert handle.stats.density == pytest.approx(counted["density"], rel=1e-6)
    assert_same(together, alone)
    assert {scored.batch for scored in together} == {3}


def test_rows_end_at_their_own_end_token(model: Any) -> None:
    samples, tokenizer = written(3), byte_tokenizer()
    with torch.no_grad():
        natural = greedy(model, *prefill(model, torch.tensor([samples[1].input_ids[: samples[1].n_prompt]])), 7)
    end = natural.tokens[2]
    model.generation_config.eos_token_id = [end, 999]
    try:
        together, alone = score_batch(model, tokenizer, samples), [score(model, tokenizer, sample) for sample in samples]
    finally:
        model.generation_config.eos_token_id = None
    assert_same(together, alone)
    assert {scored.times.finish_reason for scored in together} == {"stop", "length"}


def test_a_model_with_learned_positions_gets_them_behind_the_padding() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=256, n_positions=1200, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
    gpt2, samples, tokenizer = GPT2LMHeadModel(config).eval(), written(5), byte_tokenizer()
    require_padding(gpt2, "gpt2")
    assert_same(score_batch(gpt2, tokenizer, samples), [score(gpt2, tokenizer, sample) for sample in samples])


def test_prompts_of_one_length_are_read_without_a_mask(model: Any) -> None:
    seen: list[Any] = []
    hook = model.register_forward_pre_hook(lambda _m, _args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True)
    samples = [Sample(i, 0, ids(64, i), (Answer("a", "", 60, 64),)) for i in range(2)]
    score_batch(model, byte_tokenizer(), samples)
    hook.remove()
    assert seen == [None]


def test_times_of_a_batch_are_no_times_of_a_sample(model: Any) -> None:
    for samples in (forced(1), written(1)):
        together = score_batch(model, byte_tokenizer(), samples)
        assert len({scored.prefill_ms for scored in together}) == 1
        assert {(s.times.ttft_ms, s.times.tpot_ms, s.times.e2el_ms) for s in together} == {(None, None, None)}


def test_counters_are_read_between_the_prompts_and_what_is_written(model: Any) -> None:
    shapes: list[Any] = []
    seen: list[Any] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: shapes.append(tuple(args[0].shape)))
    score_batch(model, byte_tokenizer(), written(1), on_prefill=lambda: seen.extend(shapes))
    hook.remove()
    assert seen == [(3, max(LENGTHS))]


def test_a_model_that_does_not_ignore_padding_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require_padding(model, "tiny")
    genuine = type(model).forward

    # wrapped: it names the arguments that this release has
    @functools.wraps(genuine)
    def deaf(self: Any, input_ids: Any = None, use_cache: Any = None, logits_to_keep: Any = 0, **_: Any) -> Any:
        return genuine(self, input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(type(model), "forward", deaf)
    with pytest.raises(UnsupportedError, match="padding changes its logits by"):
        require_padding(model, "tiny")

    def maskless(self: Any, input_ids: Any = None, use_cache: Any = None) -> Any:
        return genuine(self, input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(type(model), "forward", maskless)
    with pytest.raises(UnsupportedError, match="takes no attention_mask"):
        require_padding(model, "tiny")
