"""lm-eval with methods on its model, offline: whole runs on tasks of our own, and the requests that its tasks are made of."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'accel-inference[lm-eval]'")

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.adapters.lm_harness import AccelHF, main
from accel.evals.adapters.ruler_qa import rescore_folder
from accel.evals.prompt_cache import cache_argument

# sparse in short prompts of tiny heads, and far from dense
SPARSE = "flexprefill:gamma=0.5,min_seq_len=1,block_size=16,min_budget=16,min_q=16"
GREEDY = {"until": [], "max_gen_toks": 8, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer of bytes, one of which ends a text, as lm-eval wants."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": tokenizer.convert_ids_to_tokens(tokenizer("\0").input_ids)[0]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of two choices and one of free answers, three questions each and prompts of different lengths, for `--include_path`."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"input": text(n), "choices": [" abc", " bad cab"], "gold": 0} for n in (300, 420, 350)]
    write_task(folder, "tiny_choices", rows, output_type="multiple_choice", doc_to_choice="choices", doc_to_target="gold")
    write_task(folder, "tiny_answers", rows, output_type="generate_until", doc_to_target="{{choices[0]}}", generation_kwargs=GREEDY)
    return folder


def text(n: int) -> str:
    """n letters, the same for the same n."""
    rng = random.Random(n)
    return "".join(rng.choice("abcdefgh ") for _ in range(n))


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """A task for lm-eval and its data. JSON is YAML, but for lm-eval's `!function`, which a text that begins so stands for."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", "doc_to_text": "{{input}}", **more}
    lines = [f"{key}: {value if str(value).startswith('!function') else json.dumps(value)}\n" for key, value in task.items()]
    (folder / f"{name}.yaml").write_text("".join(lines))


def evaluate(folder: Path, tasks: Path, **model_args: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model="accel-hf", model_args={"pretrained": str(folder), "device": "cpu", **model_args}, tasks=["tiny_choices", "tiny_answers"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    assert results is not None
    return dict(results)


def answers(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["filtered_resps"] for sample in results["samples"][task]]


def requests_of(kind: str) -> list[Instance]:
    """Prompts of lengths that no two requests of a batch share, but for two."""
    lengths = (300, 420, 350, 351, 20)
    if kind == "generate_until":
        return [Instance(kind, {}, (text(n), dict(GREEDY)), i) for i, n in enumerate(lengths)]
    continuations = (" abc", " bad cab", "f", " ", " face")
    return [Instance(kind, {}, (text(n), c), i) for i, (n, c) in enumerate(zip(lengths, continuations, strict=True))]


def results_of(model: HFLM) -> tuple[list[float], list[str]]:
    """Log-probabilities and answers."""
    scores = model.loglikelihood(requests_of("loglikelihood"), disable_tqdm=True)
    return [score for score, _ in scores], model.generate_until(requests_of("generate_until"), disable_tqdm=True)


def harness(folder: Path, **options: Any) -> AccelHF:
    return AccelHF(str(folder), **options)


# --- whole runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_reports_what_was_sparse_beside_its_scores(folder: Path, tasks: Path, tmp_path: Path) -> None:
    path = accel.Recipe.of(accel.Streaming(min_seq_len=1, block_size=16, window_blocks=2)).save(tmp_path / "recipe.yaml")
    dense, sparse = evaluate(folder, tasks), evaluate(folder, tasks, recipe=str(path))
    assert dense["config"]["accel"] == {"methods": []}
    report = json.loads(json.dumps(sparse["config"]["accel"]))
    assert report["methods"] == [{"streaming": {"min_seq_len": 1, "block_size": 16, "window_blocks": 2}}]
    assert report["patched_layers"] == [0, 1, 2]
    by_kind = {call["kind"]: call for call in report["calls"]}
    assert {kind: call["requests"] for kind, call in by_kind.items()} == {"loglikelihood": 6, "generate_until": 3}
    # three layers: every request is a pass of its own; an answer of eight tokens is a prompt and seven steps
    assert by_kind["loglikelihood"]["sparse_calls"] == 18
    assert by_kind["generate_until"]["sparse_calls"] == 9
    assert by_kind["generate_until"]["dense_calls"] == {"decode": 63}
    assert all(0 < call["density"] < 0.5 for call in by_kind.values())
    assert answers(sparse, "tiny_choices") != answers(dense, "tiny_choices")
    assert answers(sparse, "tiny_answers") != answers(dense, "tiny_answers")


def test_the_command_leaves_counters_and_samples_to_rescore_ruler_qa_from(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, results = tmp_path / "tasks", tmp_path / "results"
    tasks.mkdir()
    accepted = ruler_qa_task(tasks, folder)
    monkeypatch.setattr(sys, "argv", [
        "accel-lm-eval", "--model", "accel-hf", "--model_args", json.dumps({"pretrained": str(folder), "method": SPARSE}), "--device", "cpu",
        "--tasks", "ruler_qa_ours", "--include_path", str(tasks), "--log_samples", "--output_path", str(results),
    ])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    [path] = results.rglob("results_*.json")
    written = json.loads(path.read_text())
    [call] = written["config"]["accel"]["calls"]
    assert (call["kind"], call["requests"], call["sparse_calls"]) == ("generate_until", 2, 6)
    [[row]] = [list(lengths.values()) for lengths in rescore_folder(results).values()]
    # one of two answers is right, and lm-eval gives it a third of a point
    assert (row.n, row.score) == (2, 0.5), accepted
    assert row.reported == pytest.approx(1 / 6) == written["results"]["ruler_qa_ours"]["4096,none"]


def ruler_qa_task(tasks: Path, folder: Path) -> list[list[str]]:
    """A task with lm-eval's own scorer of RULER's QA. Of two questions the model answers the first with one of three accepted answers."""
    asked = [text(300), text(350)]
    given = harness(folder, method=SPARSE).generate_until([Instance("generate_until", {}, (t, dict(GREEDY)), i) for i, t in enumerate(asked)])
    # random weights write control characters too, which count as line ends
    line = max(re.split(r"[\x00-\x1f]", given[0]), key=len)
    assert line
    accepted = [[line.upper(), "no such answer", "nor this"], ["nor that", "nor this"]]
    (tasks / "ours.py").write_text("from lm_eval.tasks.ruler.common_utils import process_results_part\n")
    rows = [{"input": t, "outputs": o, "max_length": 4096} for t, o in zip(asked, accepted, strict=True)]
    write_task(
        tasks, "ruler_qa_ours", rows, output_type="generate_until", doc_to_target="{{outputs}}", generation_kwargs=GREEDY,
        process_results="!function ours.process_results_part", metric_list=[{"metric": "4096", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    return accepted


def test_the_command_is_an_entry_point() -> None:
    [point] = importlib.metadata.entry_points(group="console_scripts", name="accel-lm-eval")
    assert point.load() is main


def test_what_is_refused_is_told_without_a_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "accel-hf", "--model_args", f"pretrained={folder},method=flexprefil", "--device", "cpu", "--tasks", "lambada_openai"]
    monkeypatch.setattr(sys, "argv", ["accel-lm-eval", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("accel: ")]
    assert "did you mean 'flexprefill'" in line


def test_a_tokenizer_that_ends_no_text_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"no token that ends a text; set `eos_token`"):
        AccelHF(str(folder), tokenizer=byte_tokenizer())


# --- requests -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "dense", "flexprefill:gamma=1.0", "random_blocks:density=1.0,min_seq_len=1,block_size=16"])
def test_keeping_everything_gives_the_scores_of_the_stock_model(folder: Path, method: str | None) -> None:
    assert results_of(harness(folder, method=method)) == results_of(HFLM(str(folder), device="cpu"))


def test_keeping_the_whole_cache_gives_the_scores_of_the_stock_model(folder: Path) -> None:
    """But for rounding: the continuation is read token by token."""
    (scores, texts), (stock_scores, stock_texts) = results_of(harness(folder, method="snapkv:keep=1.0")), results_of(HFLM(str(folder), device="cpu"))
    assert scores == pytest.approx(stock_scores, abs=1e-4)
    assert texts == stock_texts


@pytest.mark.parametrize("method", [SPARSE, "snapkv:keep=0.3"])
def test_batches_change_neither_scores_nor_answers(folder: Path, method: str) -> None:
    alone, together = harness(folder, method=method), harness(folder, method=method, batch_size=4)
    (scores, texts), (batched_scores, batched_texts) = results_of(alone), results_of(together)
    assert batched_scores == pytest.approx(scores, abs=1e-5)
    assert batched_texts == texts
    stock_scores, stock_texts = results_of(HFLM(str(folder), device="cpu"))
    assert scores != pytest.approx(stock_scores, abs=1e-3), "the method has to do something, or this compares dense with dense"
    assert texts != stock_texts


def test_requests_of_one_length_share_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = harness(folder, method=SPARSE, batch_size=4)
    shapes: list[tuple[int, ...]] = []
    call = HFLM._model_call
    monkeypatch.setattr(HFLM, "_model_call", lambda self, inps, **more: shapes.append(tuple(inps.shape)) or call(self, inps, **more))
    pairs = [(60, " a"), (61, "b"), (70, "c"), (59, " dd")]
    model.loglikelihood([Instance("loglikelihood", {}, (text(n)[:-1] + "a", c), i) for i, (n, c) in enumerate(pairs)], disable_tqdm=True)
    # the last token is only predicted
    assert shapes == [(1, 70), (3, 61)]


def test_cache_methods_compress_the_context_before_its_continuation_is_scored(folder: Path) -> None:
    model, [request, *_] = harness(folder, method="snapkv:keep=0.3"), requests_of("loglikelihood")
    [(score, _), *_] = model.loglikelihood(requests_of("loglikelihood"), disable_tqdm=True)
    [call] = model.accel.calls
    assert call["cache"]["generations"] == 5
    assert 0 < call["cache"]["peak_cache_bytes"] < 0.5 * call["cache"]["whole_cache_bytes"]
    # one pass over both would compress too, behind the last score
    name = cache_argument(model.model)
    prompt, continuation = (torch.tensor([model.tok_encode(part)]) for part in request.args)
    with torch.no_grad():
        first = model.model(prompt, use_cache=True)
        rest = model.model(continuation[:, :-1], **{name: getattr(first, name)})
    log_probs = torch.cat([first.logits[0, -1:], rest.logits[0]]).log_softmax(-1)
    assert score == pytest.approx(float(log_probs.gather(1, continuation.T).sum()), abs=1e-3)
    assert score != pytest.approx(results_of(HFLM(str(folder), device="cpu"))[0][0], abs=1e-2)


def test_contexts_that_the_model_cannot_hold_lose_their_beginning_as_in_the_stock_model(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    requests = requests_of("loglikelihood")
    stock = HFLM(str(folder), device="cpu", max_length=128).loglikelihood(requests, disable_tqdm=True)
    for method in ("snapkv:keep=1.0", "dense"):
        with caplog.at_level(logging.WARNING, logger="accel"):
            found = harness(folder, method=method, max_length=128).loglikelihood(requests, disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in stock], abs=1e-4)
    assert "of a context of 300 its last" in caplog.text


def test_whole_texts_have_no_prompt_behind_which_entries_could_be_dropped(folder: Path) -> None:
    request = [Instance("loglikelihood_rolling", {}, (text(300),), 0)]
    with pytest.raises(UnsupportedError, match="without a prompt"):
        harness(folder, method="snapkv:keep=0.3").loglikelihood_rolling(request)
    sparse = harness(folder, method=SPARSE)
    assert sparse.loglikelihood_rolling(request, disable_tqdm=True) != HFLM(str(folder), device="cpu").loglikelihood_rolling(request)
    assert sparse.accel.calls[0]["kind"] == "loglikelihood_rolling"


# --- what it says when nothing ran sparse, and when it is asked for the impossible -------------------------------------------------


def test_a_run_that_stayed_dense_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = harness(folder, method="flexprefill:min_seq_len=4096")
    with caplog.at_level(logging.WARNING, logger="accel"):
        model.generate_until(requests_of("generate_until"), disable_tqdm=True)
    assert "flexprefill had no effect in 5 requests of generate_until" in caplog.text
    assert model.get_model_info()["accel"]["calls"][0]["dense_calls"]["shorter than 4096 tokens"] > 0


def test_a_run_can_be_made_to_fail_where_it_stays_dense(folder: Path) -> None:
    model = harness(folder, method="flexprefill:min_seq_len=4096", require_effect=True)
    with pytest.raises(AccelError, match=r"flexprefill had no effect in 5 requests of loglikelihood:\n.*(\n.*)*shorter than 4096"):
        model.loglikelihood(requests_of("loglikelihood"), disable_tqdm=True)
    harness(folder, method=SPARSE, require_effect=True).generate_until(requests_of("generate_until"), disable_tqdm=True)
    with pytest.raises(OptionError, match="neither a method nor a recipe"):
        harness(folder, require_effect=True)


def test_answers_from_lm_evals_cache_are_not_taken_for_sparse_ones(folder: Path) -> None:
    with pytest.raises(AccelError, match="no request reached the model"):
        harness(folder, method=SPARSE, require_effect=True).get_model_info()


def test_an_option_cut_off_at_a_comma_is_explained(folder: Path) -> None:
    with pytest.raises(OptionError, match="block_size: an option of flexprefill, cut off at a comma"):
        AccelHF.create_from_arg_string(f"pretrained={folder},method=flexprefill:gamma=0.9,block_size=64")
    model = AccelHF.create_from_arg_string(f"pretrained={folder},method=flexprefill:gamma=0.9")
    assert model.accel.info()["methods"] == [{"flexprefill": {"gamma": 0.9}}]


def test_models_that_know_no_texts_are_refused_before_they_are_loaded() -> None:
    for name in ("small-vlm", "small-var"):
        with pytest.raises(OptionError, match=f"{name} knows no texts"):
            AccelHF(name)


def test_dummy_batches_would_be_counted(folder: Path) -> None:
    with pytest.raises(OptionError, match="batch_size=auto"):
        harness(folder, method=SPARSE, batch_size="auto")


@pytest.mark.slow
def test_an_embedded_model_is_found_by_its_name() -> None:
    model = AccelHF("smollm2", method="flexprefill:gamma=0.5,min_seq_len=1,block_size=64,min_budget=64", dtype="float32")
    prompt = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 8 + "The capital of France is"
    [[right, _], [wrong, _]] = model.loglikelihood([Instance("loglikelihood", {}, (prompt, c), i) for i, c in enumerate((" Paris", " Peru"))])
    assert right > wrong
    assert model.accel.calls[0]["sparse_calls"] > 0
    assert model.model.dtype is torch.float32
