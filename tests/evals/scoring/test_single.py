"""Scores against models whose answers are known: one with made-up logits, and tiny ones scored the long way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_model
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from accel.evals.scoring import single as scoring
from accel.evals.scoring.batched import score_batch
from accel.evals.scoring.cached import score_behind_cache
from accel.evals.scoring.single import score, token_log_probs
from accel.evals.tasks import Answer, Sample
from accel.evals.tasks._rules import RULES

VOCABULARY = 256


class Successor(nn.Module):
    """After token t comes t + 1 with logit log(9), anything else with logit 0: probability 9 / (9 + 255)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls: list[Any] = []

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int | Tensor = 0) -> SimpleNamespace:
        self.calls.append(logits_to_keep)
        assert isinstance(logits_to_keep, Tensor)
        rows = input_ids[:, logits_to_keep]
        return SimpleNamespace(logits=math.log(9.0) * nn.functional.one_hot((rows + 1) % VOCABULARY, VOCABULARY).float())


def sample_of(ids: list[int], *spans: tuple[int, int], n_prompt: int | None = None, max_new_tokens: int = 0) -> Sample:
    answers = tuple(Answer(f"q{i}", bytes(ids[a:b]).decode("latin-1"), a, b) for i, (a, b) in enumerate(spans))
    return Sample(0, 0, tuple(ids), answers, n_prompt=n_prompt, max_new_tokens=max_new_tokens)


def random_ids(n: int) -> list[int]:
    return torch.randint(0, VOCABULARY, (n,), generator=torch.Generator().manual_seed(3)).tolist()


def test_known_logits_give_known_scores() -> None:
    # 66 67 follow their tokens; 80 does not follow 70
    scored = score(Successor(), byte_tokenizer(), sample_of([65, 66, 67, 70, 80], (1, 3), (4, 5)))
    right, wrong = math.log(9 / 264), math.log(1 / 264)
    assert scored.log_probs == pytest.approx([2 * right, wrong], rel=1e-5)
    assert scored.hits == [1.0, 0.0]
    assert len(scored.texts) == 2
    assert scored.prefill_ms > 0


def test_an_answer_is_right_only_as_a_whole() -> None:
    scored = score(Successor(), byte_tokenizer(), sample_of([65, 66, 70], (1, 3)))
    assert scored.hits == [0.0]


def test_the_head_runs_on_the_scored_rows_alone() -> None:
    model = Successor()
    score(model, byte_tokenizer(), sample_of(random_ids(50), (20, 22), (40, 41)))
    assert [call.tolist() for call in model.calls] == [[19, 20, 39]]


def test_a_real_model_scores_as_its_full_logits_say() -> None:
    model, ids = tiny_model(), random_ids(97)
    scored = score(model, byte_tokenizer(), sample_of(ids, (30, 33), (90, 97)))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    for got, (a, b) in zip(scored.log_probs, [(30, 33), (90, 97)], strict=True):
        assert got == pytest.approx(sum(log_probs[i - 1, ids[i]].item() for i in range(a, b)), abs=1e-4)


def test_a_model_that_cannot_choose_rows_scores_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = tiny_model(), sample_of(random_ids(97), (30, 33))
    want = score(model, byte_tokenizer(), sample).log_probs
    monkeypatch.setattr(scoring, "keeps_rows", lambda _model: False)
    assert score(model, byte_tokenizer(), sample).log_probs == pytest.approx(want, abs=1e-5)


def test_log_probs_of_half_precision_logits_are_computed_in_full() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.arange(5)
    want = torch.log_softmax(logits.double(), -1)[torch.arange(5), targets]
    torch.testing.assert_close(token_log_probs(logits, targets).double(), want, atol=1e-5, rtol=0)


def greedy(model: Any, ids: list[int], n: int) -> list[int]:
    """The likeliest continuation, every token from a forward over everything before it."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(n):
            found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return found[len(ids) :]


SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def recurrent_model() -> Any:
    """A layer with a recurrent state, which no cut can undo, before one with attention."""
    config = Qwen3NextConfig(
        **SMALL, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], head_dim=16, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
        linear_value_head_dim=16,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


MODELS: dict[str, Callable[[], Any]] = {
    "full cache": tiny_model,
    # forgets what lies before its window
    "sliding cache": lambda: MistralForCausalLM(MistralConfig(**SMALL, num_hidden_layers=2, sliding_window=16)),
    "recurrent states": recurrent_model,
}


@pytest.fixture(params=MODELS)
def generator(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("scorer", [lambda *args: [score(*args)], lambda *args: score_batch(*args[:2], [args[2]])], ids=["alone", "in a batch"])
def test_one_prefill_serves_the_answer_and_the_reply(generator: Any, scorer: Any) -> None:
    generator.generation_config.eos_token_id = None
    lengths: list[int] = []
    generator.get_input_embeddings().register_forward_hook(lambda _m, args, _out: lengths.append(args[0].shape[1]))
    [scored] = scorer(generator, byte_tokenizer(), sample_of(random_ids(48), (41, 44), n_prompt=40, max_new_tokens=6))
    assert lengths == [40, *[1] * 7, *[1] * 5]
    assert scored.texts == [byte_tokenizer().decode(greedy(generator, random_ids(48)[:40], 6))]


def test_the_reply_is_greedy_and_does_not_see_the_right_answer(generator: Any) -> None:
    generator.generation_config.eos_token_id = None
    ids = random_ids(48)
    prompt, target = ids[:40], ids[40:]
    want = greedy(generator, prompt, 6)
    scored = score(generator, byte_tokenizer(), sample_of(ids, (41, 44), (46, 48), n_prompt=40, max_new_tokens=6))
    assert scored.texts == [byte_tokenizer().decode(want)] * 2
    with torch.no_grad():
        log_probs = torch.log_softmax(generator(torch.tensor([ids])).logits[0], -1)
    forced = [log_probs[39 + i, token].item() for i, token in enumerate(target)]
    assert scored.log_probs == pytest.approx([sum(forced[1:4]), sum(forced[6:8])], abs=1e-4)


def test_the_reply_ends_at_the_end_token() -> None:
    model, prompt = tiny_model(), random_ids(40)
    natural = greedy(model, prompt, 6)
    model.generation_config.eos_token_id = [natural[3], 999]
    scored = score(model, byte_tokenizer(), sample_of([*prompt, 1], (40, 41), n_prompt=40, max_new_tokens=6))
    assert scored.texts == [byte_tokenizer().decode(natural[: natural.index(natural[3])])]


def test_an_answer_inside_the_reply_counts() -> None:
    model, prompt = tiny_model(), random_ids(40)
    model.generation_config.eos_token_id = None
    natural = greedy(model, prompt, 6)
    sample = sample_of([*prompt, *natural[2:4]], (40, 42), n_prompt=40, max_new_tokens=6)
    inside = Sample(0, 0, sample.input_ids, (Answer("q", byte_tokenizer().decode(natural[2:4]), 40, 42),), n_prompt=40, max_new_tokens=6)
    elsewhere = Sample(0, 0, sample.input_ids, (Answer("q", "nowhere", 40, 42),), n_prompt=40, max_new_tokens=6)
    assert score(model, byte_tokenizer(), inside).hits == [1.0]
    assert score(model, byte_tokenizer(), elsewhere).hits == [0.0]


@pytest.mark.parametrize("scorer", [score, score_behind_cache], ids=["whole", "behind a cache"])
def test_replies_are_compared_by_the_rule_of_their_sample(scorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setitem(RULES, "half", lambda answer, reply: asked.append((answer, reply)) or 0.5)  # type: ignore[func-returns-value]
    sample = replace(sample_of(random_ids(48), (41, 44), n_prompt=40, max_new_tokens=4), rule="half")
    scored = scorer(tiny_model(), byte_tokenizer(), sample)
    assert scored.hits == [0.5]
    assert asked == [(sample.answers[0].text, scored.texts[0])]


@pytest.mark.parametrize("n_prompt", [None, 40], ids=["forced", "generated"])
def test_counters_can_be_read_between_prompt_and_decoding(n_prompt: int | None) -> None:
    model, seen = tiny_model(), []
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: lengths.append(args[0].shape[1]))
    score(model, byte_tokenizer(), sample_of(random_ids(48), (41, 44), n_prompt=n_prompt, max_new_tokens=4), on_prefill=lambda: seen.extend(lengths))
    assert seen == [n_prompt or 48]
