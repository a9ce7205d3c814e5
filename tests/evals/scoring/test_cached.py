"""Scores behind a compressed cache: every question by itself behind one context, and dense the same way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.evals.scoring.cached import TAIL, can_share, n_context, questions, score_behind_cache, shared_prefix
from accel.evals.scoring.single import score
from accel.evals.tasks import Answer, Sample
from accel.registry import build

CONTEXT = 300
IDS = tuple(torch.randint(0, 256, (CONTEXT + 60,), generator=torch.Generator().manual_seed(3)).tolist())
# two questions of 20 and 25 tokens, whose answers are their last 3 and 5
ASKED = (Answer("a", "", CONTEXT + 17, CONTEXT + 20, lead=CONTEXT), Answer("b", "", CONTEXT + 40, CONTEXT + 45, lead=CONTEXT + 20))


def sample_of(*answers: Answer, n_prompt: int | None = None, stop: int = CONTEXT + 45, max_new_tokens: int = 0) -> Sample:
    return Sample(0, 0, IDS[:stop], answers, n_prompt=n_prompt, max_new_tokens=max_new_tokens)


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


def log_probs(model: Any, ids: tuple[int, ...], n: int) -> float:
    """Of the last n tokens."""
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(rows[i - 1, ids[i]].item() for i in range(len(ids) - n, len(ids)))


def test_a_question_does_not_see_the_one_before(model: Any) -> None:
    scored = score_behind_cache(model, byte_tokenizer(), sample_of(*ASKED))
    first, second = IDS[: CONTEXT + 20], IDS[:CONTEXT] + IDS[CONTEXT + 20 : CONTEXT + 45]
    assert scored.log_probs == pytest.approx([log_probs(model, first, 3), log_probs(model, second, 5)], abs=1e-4)
    assert len(scored.hits) == len(scored.texts) == 2


@pytest.mark.parametrize("name", ["snapkv", "h2o", "streaming_kv", "random_kv", "hack"])
def test_questions_behind_one_eviction_do_not_depend_on_each_other(model: Any, name: str) -> None:
    with accel.apply(model, name, keep=0.3, min_entries=8):
        both = score_behind_cache(model, byte_tokenizer(), sample_of(*ASKED)).log_probs
        swapped = score_behind_cache(model, byte_tokenizer(), sample_of(*reversed(ASKED))).log_probs
    assert both == pytest.approx(swapped[::-1], abs=1e-5)
    dense = score_behind_cache(model, byte_tokenizer(), sample_of(*ASKED)).log_probs
    assert both != pytest.approx(dense, abs=1e-4)


def test_answers_without_a_lead_are_one_pass_behind_what_predicts_the_first(model: Any) -> None:
    plain = [Answer("a", "", a.start, a.stop) for a in ASKED]
    sample = sample_of(*plain)
    assert (n_context(sample), len(questions(sample))) == (CONTEXT + 16, 1)
    want = score(model, byte_tokenizer(), sample)
    assert score_behind_cache(model, byte_tokenizer(), sample).log_probs == pytest.approx(want.log_probs, abs=1e-4)


def test_a_written_reply_and_a_scored_answer_share_no_cache(model: Any) -> None:
    sample = sample_of(Answer("q", "x", CONTEXT + 1, CONTEXT + 4), n_prompt=CONTEXT, stop=CONTEXT + 6, max_new_tokens=5)
    want, found = (scorer(model, byte_tokenizer(), sample) for scorer in (score, score_behind_cache))
    assert found.log_probs == pytest.approx(want.log_probs, abs=1e-4)
    assert (found.texts, found.hits) == (want.texts, want.hits)
    with accel.apply(model, "streaming_kv", keep=0.2, min_entries=8):
        compressed = score_behind_cache(model, byte_tokenizer(), sample)
        # the reply is what the model writes behind the prompt alone
        again = score_behind_cache(model, byte_tokenizer(), Sample(0, 0, (*IDS[:CONTEXT], 1, 2), sample.answers[:0], CONTEXT, 5))
    assert again.texts == []
    assert compressed.log_probs != pytest.approx(want.log_probs, abs=1e-4)


@pytest.mark.parametrize("name", ["snapkv", "streaming_kv", "random_kv", "hack"])
def test_a_shared_prefill_changes_no_score_and_is_not_written_to(model: Any, name: str) -> None:
    sample = sample_of(*ASKED)
    prefix = shared_prefix(model, sample)
    assert prefix is not None
    assert prefix.n_tokens == CONTEXT - TAIL
    with accel.apply(model, name, keep=0.3, min_entries=8) as handle:
        whole = score_behind_cache(model, byte_tokenizer(), sample).log_probs
        held = handle.stats.cache.most_held
        handle.stats.reset()
        shared = [score_behind_cache(model, byte_tokenizer(), sample, prefix=prefix).log_probs for _ in range(2)]
        assert handle.stats.cache.most_held == held
    assert shared[0] == shared[1]
    assert shared[0] == pytest.approx(whole, abs=1e-3)
    assert prefix.cache.get_seq_length() == CONTEXT - TAIL


def test_a_prefix_of_another_prompt_is_refused(model: Any) -> None:
    prefix = shared_prefix(model, sample_of(*ASKED))
    with pytest.raises(ValueError, match="another prompt"):
        score_behind_cache(model, byte_tokenizer(), sample_of(ASKED[0], stop=CONTEXT + 20), prefix=prefix)


def test_methods_that_need_the_whole_prompt_do_not_share_a_prefill() -> None:
    shares = {name: can_share([build(name)]) for name in ("snapkv", "h2o", "streaming_kv", "random_kv", "flexprefill")}
    assert shares == {"snapkv": True, "h2o": False, "streaming_kv": True, "random_kv": True, "flexprefill": False}
    assert not can_share([build("snapkv", {"window": TAIL + 1})])
    assert can_share([])


def test_a_short_context_has_nothing_to_share(model: Any) -> None:
    assert shared_prefix(model, Sample(0, 0, IDS[:70], (Answer("q", "", 65, 66, lead=TAIL),))) is None


def test_counters_are_read_between_context_and_questions(model: Any) -> None:
    lengths: list[int] = []
    seen: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, args, _out: lengths.append(args[0].shape[1]))
    score_behind_cache(model, byte_tokenizer(), sample_of(*ASKED), on_prefill=lambda: seen.extend(lengths))
    hook.remove()
    assert seen == [CONTEXT]
    assert lengths == [CONTEXT, 19, 24]


def test_the_head_runs_on_the_scored_rows_alone(model: Any) -> None:
    heads: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _m, args, _out: heads.append(args[0].shape[1]))
    score_behind_cache(model, byte_tokenizer(), sample_of(*ASKED))
    hook.remove()
    assert heads == [1, 3, 5]
