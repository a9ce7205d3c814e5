"""lmms-eval with methods on its model, offline: a task of drawn scenes, asked of the small vision-language model. Run by `make test-lmms`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmms_eval", reason="needs lmms-eval, in an environment of its own: make test-lmms")

from lmms_eval import evaluator
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

import accel
from accel.errors import AccelError, OptionError
from accel.evals.adapters.lmms_harness import AccelHF, AccelHFSimple, base_for, build
from accel.evals.models.small_vlm.load import WEIGHTS
from accel.evals.tasks import load_task

N = 4
# one text for what the model is asked with a chat template and what it was taught: the picture, then the question
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
FUNCTIONS = '''
def visual(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def right(doc, results):
    return {"exact": float(results[0].strip() == doc["answer"])}
'''


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions about colours in drawn scenes, as a task for `--include_path`."""
    from datasets import Dataset, DatasetDict, Image

    folder = tmp_path_factory.mktemp("tasks")
    samples: Any = load_task("scene_color").samples(N, 0)
    rows = {"image": [s.image for s in samples], "question": [s.question for s in samples], "answer": [s.answers[0] for s in samples]}
    DatasetDict({"test": Dataset.from_dict(rows).cast_column("image", Image())}).save_to_disk(folder / "data")
    (folder / "ours.py").write_text(FUNCTIONS)
    (folder / "tiny_scenes.yaml").write_text(
        f"""
task: tiny_scenes
dataset_path: {folder / "data"}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: generate_until
doc_to_visual: !function ours.visual
doc_to_text: !function ours.text
doc_to_target: answer
process_results: !function ours.right
generation_kwargs: {{max_new_tokens: 4, temperature: 0}}
metric_list:
  - metric: exact
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with a chat template, as most models have."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path_factory.mktemp("chatty")
    AutoModelForImageTextToText.from_pretrained(WEIGHTS).save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    processor.chat_template = CHAT
    processor.save_pretrained(folder)
    return folder


def evaluate(tasks: Path, *, model: str = "accel_hf", **model_args: Any) -> dict[str, Any]:
    results = evaluator.simple_evaluate(
        model=model, model_args=",".join(f"{name}={value}" for name, value in model_args.items()), tasks=["tiny_scenes"], batch_size=1, device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    assert results is not None
    return dict(results)


def answers(results: dict[str, Any]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in results["samples"]["tiny_scenes"]]


@pytest.mark.slow
def test_a_run_reports_kept_tokens_beside_its_scores(tasks: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = accel.Recipe.of(accel.FasterVLM(keep=0.25)).save(tmp_path / "recipe.yaml")
    dense, pruned = evaluate(tasks, pretrained="small-vlm"), evaluate(tasks, pretrained="small-vlm", recipe=path)
    assert dense["results"]["tiny_scenes"]["exact,none"] == 1.0
    assert "throughput" not in dense or "avg_accel_kept_share" not in dense["throughput"]
    found = json.loads(json.dumps(pruned["throughput"]))
    assert found["avg_accel_requests"] == N
    assert found["avg_accel_kept_share"] == pytest.approx(0.25, abs=0.01)
    assert 0 < found["avg_accel_kept_tokens"] < found["avg_accel_visual_tokens"]


@pytest.mark.slow
def test_keeping_everything_gives_the_answers_of_the_stock_model(tasks: Path, chatty: Path) -> None:
    stock = answers(evaluate(tasks, model="llava_hf", pretrained=chatty, device_map="cpu"))
    assert all(answer.strip() for answer in stock)
    assert answers(evaluate(tasks, pretrained=chatty, method="fastervlm:keep=1.0")) == stock
    assert answers(evaluate(tasks, pretrained="small-vlm")) == stock
    assert answers(evaluate(tasks, pretrained=chatty, method="random_tokens:keep=2")) != stock


@pytest.mark.slow
def test_a_run_can_be_made_to_fail_where_every_token_is_kept(tasks: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluate(tasks, pretrained="small-vlm", method="fastervlm:keep=1.0")
    assert f"fastervlm had no effect in {N} requests of generate_until" in caplog.text
    with pytest.raises(AccelError, match="fastervlm had no effect"):
        evaluate(tasks, pretrained="small-vlm", method="fastervlm:keep=1.0", require_effect=True)


@pytest.mark.slow
def test_a_failed_answer_is_not_an_empty_one(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval's class would log the error and answer with nothing."""
    from transformers import LlavaForConditionalGeneration

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", fails)
    # of dense too, which a method is compared with
    for methods in ({}, {"method": "fastervlm:keep=0.25"}):
        with pytest.raises(AccelError, match=f"{N} calls of generate failed.*RuntimeError: out of luck"):
            evaluate(tasks, pretrained="small-vlm", **methods)


def test_the_name_comes_through_the_entry_point() -> None:
    assert get_model("accel_hf") is AccelHF
    assert get_model("accel_hf", force_simple=True) is AccelHFSimple


@pytest.mark.parametrize(("kind", "base"), [("llava_next", "llava_hf"), ("llava_onevision", "llava_hf"), ("qwen2_5_vl", "qwen2_5_vl")])
def test_the_class_to_build_on_follows_the_kind_of_model(kind: str, base: str) -> None:
    assert base_for(kind) == base


def test_what_cannot_be_built_is_explained() -> None:
    with pytest.raises(OptionError, match=r"lmms-eval has no model named perceiver; name one .* with base="):
        base_for("perceiver")
    with pytest.raises(OptionError, match="smollm2 reads no pictures"):
        build("smollm2")
    with pytest.raises(OptionError, match="important_ratio: an option of fastervlm, cut off at a comma"):
        AccelHF.create_from_arg_string("pretrained=small-vlm,method=fastervlm:keep=0.25,important_ratio=0.5")


@pytest.mark.slow
def test_the_methods_are_off_when_lmms_eval_is_through(chatty: Path) -> None:
    model = build(str(chatty), method="fastervlm:keep=0.25", device="cpu")
    assert not model.is_simple
    assert model.accel.handle.is_active
    model.clean()
    assert not model.accel.handle.is_active
    assert not hasattr(model, "_model")
