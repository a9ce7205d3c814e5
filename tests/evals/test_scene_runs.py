"""Runs on drawn scenes: what is kept is counted, controls keep as much, the gate holds back what the model cannot do, and differences are paired."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import byte_tokenizer, tiny_model

import accel
from accel.errors import AccelError, OptionError
from accel.evals.controls import build_control, keep_of, plan_controls, swept
from accel.evals.models import LoadedModel, LoadedVisionModel, load_model
from accel.evals.pictures.gallery import run_gallery
from accel.evals.pictures.questions import ask, is_right, prompt_of
from accel.evals.results import MEASURED, RunFolder, SampleRecord
from accel.evals.runner import model_info, run_accuracy, wanted_samples
from accel.evals.summary.pictures import (
    FEW,
    FEWEST_PICTURES,
    bootstrap,
    clustered,
    gate_rows,
    left_out,
    paired_row,
    series_of,
    summarise_pictures,
    unfinished,
)
from accel.evals.summary.scores import summarise
from accel.evals.tasks import PictureTask, load_task
from accel.registry import build

pytest.importorskip("PIL")
CONFIG = {"model": "small-vlm"}
N = 6
TASKS = ("scene_color", "scene_relation", "scene_word")
CONTROLS = ("random_tokens", "downsample")
LABEL = "fastervlm(keep=0.25)"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("small-vlm")


def variants() -> dict[str, list[Any]]:
    return swept({"fastervlm": [build("fastervlm")]}, [1.0, 0.25])


def run(loaded: LoadedModel, folder: RunFolder, **changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {"n": N, "seed": 0, "controls": CONTROLS, "progress": False, **changes}
    methods, tasks, lengths = (settings.pop(name, usual) for name, usual in (("methods", variants()), ("tasks", TASKS), ("lengths", [4096])))
    return run_accuracy(loaded, methods, tasks, lengths, folder=folder, **settings)


@pytest.fixture(scope="module")
def finished(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[dict[str, Any]]]:
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "r", CONFIG)
    return folder, run(loaded, folder)


@pytest.fixture(scope="module")
def records(finished: tuple[RunFolder, list[dict[str, Any]]]) -> list[SampleRecord]:
    return finished[0].records


def of(records: list[SampleRecord], label: str, task: str = "scene_color") -> list[SampleRecord]:
    return [r for r in records if r.label == label and r.task == task]


# --- samples ------------------------------------------------------------------------------------------------------------------


def test_dense_the_methods_and_controls_of_each_budget_have_a_row(finished: tuple[RunFolder, list[dict[str, Any]]]) -> None:
    labels = ["dense", "fastervlm(keep=1.0)", LABEL, *(f"{name} (keep {keep})" for name in CONTROLS for keep in (1.0, 0.25))]
    assert [(row["task"], row["label"]) for row in finished[1]] == [(task, label) for task in TASKS for label in labels]
    assert {row["n"] for row in finished[1]} == {N}
    assert {row["tokens"] for row in finished[1]} == {0}, "a length means nothing here"
    assert {row["kind"] for row in finished[1]} == {"picture"}
    assert len({(row["task"], tuple(row["hash"]["prompts"])) for row in finished[1]}) == len(TASKS)


def test_what_was_kept_is_counted_and_shown_beside_what_was_asked(records: list[SampleRecord]) -> None:
    for record in of(records, LABEL):
        assert (record.keep, record.visual_tokens, record.kept_tokens, record.kept_share) == (0.25, 144, 36, 0.25)
    for record in of(records, "dense"):
        assert (record.keep, record.visual_tokens, record.kept_tokens, record.kept_share) == (None, 144, None, None)


def test_the_share_kept_is_a_mean_over_layers(loaded: LoadedModel, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    run(loaded, folder, methods={"fastv": [accel.FastV(keep=0.25, layer=2)]}, controls=(), tasks=["scene_color"], n=1)
    [record] = of(folder.records, "fastv")
    assert record.kept_tokens == 36
    # two of eight layers see everything
    assert record.kept_share == pytest.approx((2 + 6 * 0.25) / 8)


def test_keeping_everything_answers_as_dense_does(records: list[SampleRecord]) -> None:
    for task in TASKS:
        answers = [[r.answers for r in of(records, label, task)] for label in ("dense", "fastervlm(keep=1.0)", "random_tokens (keep 1.0)")]
        assert answers[0] == answers[1] == answers[2]


def test_random_tokens_draw_anew_for_every_picture(records: list[SampleRecord]) -> None:
    options = [r.options[0]["random_tokens"] for r in of(records, "random_tokens (keep 0.25)")]
    seeds = [o["seed"] for o in options]
    assert len(set(seeds)) == N
    [record] = [r for r in of(records, LABEL) if r.sample == 0]
    [control] = plan_controls(["random_tokens"], {LABEL: variants()[LABEL]})
    other = build_control(control, variants()[LABEL], replace(record, seed=1))
    assert other.options()["seed"] not in seeds, "a run of another seed draws other tokens"
    assert build_control(control, variants()[LABEL], record).options()["seed"] == seeds[0]


def test_the_answers_are_those_of_generate(loaded: LoadedModel, records: list[SampleRecord]) -> None:
    from PIL import Image

    assert isinstance(loaded, LoadedVisionModel)
    task = load_task("scene_word")
    assert isinstance(task, PictureTask)
    for sample, record in zip(task.samples(2, 0), of(records, "dense", "scene_word"), strict=False):
        inputs = loaded.processor(images=Image.fromarray(sample.image), text=f"<image> {sample.question}", return_tensors="pt")
        ids = loaded.model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert record.answers == [loaded.tokenizer.decode(ids, skip_special_tokens=True)]
        assert record.exact == float(record.answers == record.expected)


def test_the_model_is_given_back_unpatched(loaded: LoadedModel, tmp_path: Path) -> None:
    assert isinstance(loaded, LoadedVisionModel)
    pixels, ids = torch.zeros(1, 3, 192, 192), torch.tensor([[1, *[3] * 144, 9]])
    with torch.no_grad():
        before = loaded.model(input_ids=ids, pixel_values=pixels).logits
        run(loaded, RunFolder.create(tmp_path, CONFIG), tasks=["scene_color"], n=1)
        assert torch.equal(loaded.model(input_ids=ids, pixel_values=pixels).logits, before)


def test_a_stopped_run_goes_on_where_it_stopped(
    loaded: LoadedModel, finished: tuple[RunFolder, list[dict[str, Any]]], tmp_path: Path
) -> None:
    partial = run(loaded, RunFolder.create(tmp_path, CONFIG), tasks=["scene_color"], limit=10)
    assert sum(row["n_prompts"] for row in partial) == 10
    before = (tmp_path / "samples.jsonl").read_text()
    resumed = run(loaded, RunFolder.create(tmp_path, CONFIG, resume=True), tasks=["scene_color"])
    assert (tmp_path / "samples.jsonl").read_text().startswith(before)
    unstable = (*MEASURED, "selection_share")
    assert [{k: v for k, v in row.items() if k not in unstable} for row in resumed] == [
        {k: v for k, v in row.items() if k not in unstable} for row in finished[1] if row["task"] == "scene_color"
    ]


def test_other_pictures_under_the_same_settings_stop_a_resumed_run(loaded: LoadedModel, tmp_path: Path) -> None:
    run(loaded, RunFolder.create(tmp_path, CONFIG), tasks=["scene_color"], limit=1)
    with pytest.raises(AccelError, match="prompt 0 of scene_color is not the one"):
        run(loaded, RunFolder.create(tmp_path, CONFIG, resume=True), tasks=["scene_color"], seed=1)


def test_models_and_tasks_that_do_not_fit_are_told_apart(loaded: LoadedModel, tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, CONFIG)
    with pytest.raises(OptionError, match="knows only questions about pictures, asked for the text tasks needle: try --tasks scenes"):
        run(loaded, folder, tasks=["scene_color", "needle"])
    with pytest.raises(OptionError, match="tiny cannot be asked about pictures: it is a text model"):
        run(LoadedModel(tiny_model(), byte_tokenizer(), "tiny"), folder, controls=(), methods={})
    assert isinstance(loaded, LoadedVisionModel)
    with pytest.raises(OptionError, match="came without a processor"):
        run(replace(loaded, processor=None), folder)
    assert folder.done() == set()


def test_logits_that_are_no_numbers_fail_the_run(tmp_path: Path) -> None:
    broken = load_model("small-vlm")
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(AccelError, match="not finite"):
        run(broken, RunFolder.create(tmp_path, CONFIG), n=1)


@pytest.mark.parametrize(
    "reply, answers, is_hit",
    [("Red.", ("red",), True), ("the red", ("red",), False), ("7 3  2", ("7 3 2",), True), ("732", ("7 3 2", "732"), True), ("", ("no",), False)],
    ids=["punctuation", "part", "spaces", "other_spelling", "nothing"],
)
def test_the_whole_answer_must_match(reply: str, answers: tuple[str, ...], is_hit: bool) -> None:
    assert is_right(reply, answers) is is_hit


def test_prompts_follow_the_template_then_the_model_then_the_placeholder(loaded: LoadedModel) -> None:
    assert isinstance(loaded, LoadedVisionModel)
    assert prompt_of(loaded, "what ?", "One word.") == "<image> what ?", "a model with a form of its own knows no instruction"
    assert prompt_of(replace(loaded, prompt_text=None), "what ?", "One word.") == "<image> what ? One word."

    class Chatting:
        chat_template = "…"

        def apply_chat_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
            return f"{messages[0]['content'][0]['type']}: {messages[0]['content'][1]['text']} {add_generation_prompt}"

    assert prompt_of(replace(loaded, processor=Chatting()), "what ?", "One word.") == "image: what ? One word. True"


def test_a_begin_token_that_the_template_wrote_is_not_doubled(loaded: LoadedModel) -> None:
    from PIL import Image

    from accel.evals.pictures.questions import inputs_of

    assert isinstance(loaded, LoadedVisionModel)
    picture = Image.new("RGB", (192, 192))
    ids = [inputs_of(loaded, picture, text)["input_ids"] for text in ("<image> what ?", "<bos> <image> what ?")]
    assert ids[0].tolist() == ids[1].tolist()


def test_a_sample_of_another_seed_is_another_picture() -> None:
    task = load_task("scene_color")
    assert isinstance(task, PictureTask)
    one, same, other = task.samples(2, 0), task.samples(1, 0), task.samples(1, 1)
    assert one[0].prompt_hash == same[0].prompt_hash
    assert len({one[0].picture_hash, one[1].picture_hash, other[0].picture_hash}) == 3


# --- summary ------------------------------------------------------------------------------------------------------------------


def test_the_gate_leaves_out_what_the_model_cannot_do(records: list[SampleRecord]) -> None:
    found = summarise_pictures(records, list(variants()), plan_controls(CONTROLS, variants()))
    gates = {gate["task"]: gate for gate in found["gates"]}
    assert {task: gate["passes"] for task, gate in gates.items()} == {"scene_color": True, "scene_relation": False, "scene_word": True}
    assert gates["scene_color"]["dense"]["n"] == N
    assert set(gates["scene_color"]["baselines"]) == {"no image", "among present"}
    assert {mean["score"]["n"] for mean in found["means"]} == {2 * N}
    lines = left_out(found["gates"])
    assert "scene_relation is left out of every table" in lines[0]
    assert f"decided on {N} questions" in lines[1]
    assert N < FEW


def test_the_gate_asks_for_twenty_points_above_the_better_baseline(records: list[SampleRecord]) -> None:
    dense = of(records, "dense")
    [gate] = gate_rows(dense)
    best = max(gate["baselines"].values())
    # as many right answers as just do not reach the gate
    n_right = int((best + 0.2) * N - 1e-9)
    below = [replace(r, exact=float(i < n_right)) for i, r in enumerate(dense)]
    above = [replace(r, exact=float(i <= n_right)) for i, r in enumerate(dense)]
    assert [gate_rows(rows)[0]["passes"] for rows in (below, above)] == [False, True]


def test_the_baselines_are_those_of_the_questions_that_were_asked() -> None:
    task = load_task("scene_exist")
    assert isinstance(task, PictureTask)
    assert task.baselines([0, 1, 2, 3], 0) != task.baselines([0], 0)
    assert task.baselines([0], 0)["no image"] in (0.0, 1.0)


def test_pairs_are_compared_on_the_same_questions(records: list[SampleRecord]) -> None:
    methods = variants()
    found = summarise_pictures(records, list(methods), plan_controls(CONTROLS, methods))
    pairs = [(row["label"], row["other"]) for row in found["paired"]]
    assert pairs[3:] == [(LABEL, "dense"), (LABEL, "random_tokens (keep 0.25)"), (LABEL, "downsample (keep 0.25)")]
    row = found["paired"][4]
    both = [
        (a.exact, b.exact)
        for task in ("scene_color", "scene_word")
        for a, b in zip(of(records, LABEL, task), of(records, row["other"], task), strict=True)
    ]
    assert row["difference"] == pytest.approx(statistics.fmean(a - b for a, b in both))
    assert (row["only_method"], row["only_other"]) == (both.count((1.0, 0.0)), both.count((0.0, 1.0)))
    assert (row["n"], row["n_pictures"]) == (2 * N, N), "both tasks ask about the same pictures"
    assert row["difference"] > 0.3
    assert row["interval"] is None, "too few pictures"
    many = [[replace(r, sample=i, picture_hash=str(i)) for i, r in enumerate(of(records, label) * 4)][:FEWEST_PICTURES] for label in (LABEL, "dense")]
    for rows, has_interval in ((many, True), ([rows[1:] for rows in many], False)):
        found_row = paired_row(rows[0], rows[1])
        assert found_row is not None
        assert (found_row["interval"] is not None) is has_interval


def test_a_prompt_left_whole_counts_as_all_kept(records: list[SampleRecord]) -> None:
    mine = of(records, LABEL)
    half = [replace(r, kept_share=None, kept_tokens=None, not_pruned={"padding": 1}) if r.sample % 2 else r for r in mine]
    assert summarise(half, "exact")["kept_share"] == pytest.approx(0.625)
    found = summarise_pictures([*of(records, "dense"), *half], [LABEL], [])
    assert [(mean["kept_share"], mean["kept_tokens"]) for mean in found["means"]] == [(None, None), (0.625, 90)]
    assert summarise([replace(r, kept_share=None, kept_tokens=None, not_pruned={"padding": 1}) for r in mine], "exact")["kept_share"] == 1.0


def test_a_label_that_has_not_answered_all_questions_has_no_mean(records: list[SampleRecord]) -> None:
    mine = [r for r in records if r.label == "dense" or (r.label == LABEL and r.task == "scene_color")]
    means = summarise_pictures(mine, [LABEL], [])["means"]
    assert [mean["score"] is None for mean in means] == [False, True]
    assert unfinished(means) == [f"{LABEL}: no mean yet, {N} of {2 * N} questions answered"]


def test_the_gate_is_passed_at_twenty_points(records: list[SampleRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("scene_color")
    assert isinstance(task, PictureTask)
    # 0.1 + 0.2 is a rounding above 0.3
    found = replace(task, baselines=lambda numbers, seed: {"no image": 0.1})
    monkeypatch.setattr("accel.evals.summary.pictures.load_task", lambda name: found)
    dense = [replace(of(records, "dense")[0], sample=i, exact=float(i < 3)) for i in range(10)]
    assert gate_rows(dense)[0]["passes"]
    assert "decided on 1 question per task" in left_out(gate_rows(dense[:1]))[-1]


def test_the_only_label_of_a_series_names_it(records: list[SampleRecord]) -> None:
    both = summarise_pictures(records, list(variants()), [])["means"]
    assert [mean["series"] for mean in both] == ["dense", "fastervlm", "fastervlm"]
    one = summarise_pictures([r for r in records if r.label in ("dense", LABEL)], [LABEL], [])["means"]
    assert [mean["series"] for mean in one] == ["dense", LABEL]


def test_questions_that_only_one_of_them_answered_are_no_pairs(records: list[SampleRecord]) -> None:
    method, other = of(records, LABEL), of(records, "dense")
    row = paired_row(method[:4], other[2:])
    assert row is not None
    assert row["n"] == 2
    assert paired_row(method[:2], other[2:]) is None


def test_answers_about_one_picture_are_not_counted_as_independent() -> None:
    values, groups = [1.0, 0.0, 1.0, 1.0], ["a", "b", "c", "d"]
    alone = clustered(values, groups)
    assert alone.stderr == pytest.approx(statistics.stdev(values) / 2)
    doubled = clustered([v for v in values for _ in range(3)], [g for g in groups for _ in range(3)])
    assert (doubled.value, doubled.n) == (alone.value, 12)
    assert doubled.stderr == pytest.approx(alone.stderr), "three times the same answer is no more evidence"
    assert clustered([1.0, 0.0], ["a", "a"]).stderr is None


def test_the_interval_draws_whole_pictures() -> None:
    spread = bootstrap([1.0] * 10 + [0.0] * 10, [str(i) for i in range(20)])
    joined = bootstrap([1.0] * 10 + [0.0] * 10, [str(i // 5) for i in range(20)])
    assert spread is not None
    assert joined is not None
    assert spread[0] < 0.5 < spread[1]
    assert joined[1] - joined[0] > spread[1] - spread[0]
    # twenty coins: ± 1.96 · 0.112
    assert spread == pytest.approx([0.28, 0.72], abs=0.06)
    assert bootstrap([1.0], ["a"]) is None
    assert bootstrap([0.5, 0.5], ["a", "b"]) == [0.5, 0.5]


def test_a_series_is_the_method_without_its_budget(records: list[SampleRecord]) -> None:
    assert series_of(of(records, LABEL)[0]) == "fastervlm"
    assert series_of(of(records, "random_tokens (keep 0.25)")[3]) == "random_tokens"
    assert series_of(of(records, "dense")[0]) == "dense"
    compact = replace(of(records, LABEL)[0], options=[{"fastervlm": {"keep": 0.1, "position_mode": "compact"}}])
    assert series_of(compact) == "fastervlm(position_mode=compact)"


def test_records_without_pictures_have_no_sections() -> None:
    assert summarise_pictures([], ["a"], []) == {}


# --- controls -----------------------------------------------------------------------------------------------------------------


def test_a_control_is_planned_once_per_budget_and_shared_options() -> None:
    methods = {
        "a": [accel.FasterVLM(keep=0.5)], "b": [accel.FasterVLM(keep=0.5, score="received")],
        "c": [accel.FasterVLM(keep=0.5, position_mode="compact")], "d": [accel.FasterVLM(keep=36)],
        "e": [accel.RandomTokens(keep=0.1)],
    }  # fmt: skip
    found = plan_controls(["random_tokens"], methods)
    assert [(c.label, c.references) for c in found] == [
        ("random_tokens (keep 0.5)", ("a", "b")),
        ("random_tokens (keep 0.5, position_mode compact)", ("c",)),
        ("random_tokens (keep 36)", ("d",)),
    ]


def test_several_pruning_methods_are_controlled_at_the_share_that_they_reached(loaded: LoadedModel, tmp_path: Path) -> None:
    methods = {"both": [accel.FasterVLM(keep=0.5), accel.FastV(keep=0.25, layer=2)]}
    assert keep_of(methods["both"]) is None
    [control] = plan_controls(["random_tokens"], methods)
    assert (control.label, control.keep) == ("random_tokens (share kept by both)", None)
    folder = RunFolder.create(tmp_path, CONFIG)
    run(loaded, folder, methods=methods, controls=["random_tokens"], tasks=["scene_color"], n=1)
    [both], [random] = of(folder.records, "both"), of(folder.records, control.label)
    assert both.kept_share is not None
    assert both.kept_share < 0.5
    assert random.kept_share == pytest.approx(both.kept_share, abs=0.5 / 144)
    assert random.keep == both.kept_share
    with pytest.raises(OptionError, match="keeps are tried"):
        swept(methods, [0.5])


def test_a_method_that_drops_inside_the_decoder_is_controlled_at_the_mean_over_layers(loaded: LoadedModel, tmp_path: Path) -> None:
    methods = {"front": [accel.FasterVLM(keep=0.25)], "inside": [accel.FastV(keep=0.25, layer=2)], "exit": [build("dyvte", {"exit_layer": 3})],
               "mean": [build("vflowopt", {"keep": 0.25})]}  # fmt: skip
    planned = plan_controls(["random_tokens"], methods, model_info(loaded))
    assert [(c.label, c.references) for c in planned] == [
        ("random_tokens (keep 0.25)", ("front", "mean")),
        ("random_tokens (share kept by inside)", ("inside",)),
        ("random_tokens (share kept by exit)", ("exit",)),
    ]
    folder = RunFolder.create(tmp_path, CONFIG)
    run(loaded, folder, methods=methods, controls=["random_tokens"], tasks=["scene_color"], n=1)
    for control in planned:
        [method], [random] = of(folder.records, control.references[0]), of(folder.records, control.label)
        assert random.kept_share == pytest.approx(method.kept_share, abs=0.5 / 144)
    shown = {row["title"]: row["caption"] for row in run_gallery(loaded, folder, methods, planned, ["scene_color"])}
    assert list(shown) == ["scene_color", *methods, *(c.label for c in planned)]
    assert shown["inside"].startswith("36 of 144 patches kept in the end, 43.8 % as a mean over the layers")
    assert shown[planned[1].label].startswith("63 of 144 patches kept. ")


def test_a_prompt_that_was_left_whole_is_no_budget_to_be_beaten_at(records: list[SampleRecord]) -> None:
    methods = variants()[LABEL]
    [control] = plan_controls(["random_tokens"], {LABEL: methods})
    whole = replace(of(records, LABEL)[0], kept_share=None, kept_tokens=None, not_pruned={"padding": 1})
    assert build_control(control, methods, whole).options()["keep"] == 1.0


def test_a_sweep_replaces_shares_and_counts_and_leaves_other_methods_alone() -> None:
    methods = {"f": [accel.FasterVLM(keep=36, score="received")], "s": [accel.Streaming()]}
    found = swept(methods, [0.5, 7])
    assert list(found) == ["fastervlm(keep=0.5, score=received)", "fastervlm(keep=7, score=received)", "s"]
    assert [found[label][0].options()["keep"] for label in list(found)[:2]] == [0.5, 7]
    with pytest.raises(OptionError, match="keeps are tried on methods that prune tokens"):
        swept({"s": [accel.Streaming()]}, [0.5])


@pytest.mark.parametrize(
    "names, methods, message",
    [
        (["random_tokens"], {"s": "streaming"}, "runs at the budget of a token-pruning method"),
        (["random_blocks"], {"f": "fastervlm"}, "runs at the density of a sparse-attention method"),
        (["flexprefill"], {"s": "streaming"}, "no option 'density'"),
    ],
    ids=["no_pruning", "no_sparse", "no_budget"],
)
def test_controls_without_something_to_control_are_refused(names: list[str], methods: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan_controls(names, {label: [build(name)] for label, name in methods.items()})


def test_pictures_run_once_whatever_the_lengths() -> None:
    wanted = wanted_samples({}, ["scene_color", "needle"], [1024, 2048], n=1)
    assert [(key.task, key.tokens) for key in wanted] == [("scene_color", 0), ("needle", 1024), ("needle", 2048)]


def test_the_prefill_is_timed_and_counted_before_the_answer_is_written(loaded: LoadedModel) -> None:
    assert isinstance(loaded, LoadedVisionModel)
    task = load_task("scene_word")
    assert isinstance(task, PictureTask)
    seen: list[int] = []
    with accel.apply(loaded.model, accel.FasterVLM()) as handle:
        reply = ask(loaded, task.samples(1, 0)[0], on_prefill=lambda: seen.append(handle.stats.tokens.kept_patches))
    assert seen == [36]
    assert reply.prefill_ms > 0
    assert (reply.n_prompt, reply.n_visual) == (151, 144)


def test_an_overlay_lies_on_what_the_encoder_saw(loaded: LoadedModel) -> None:
    import numpy as np
    from PIL import Image

    from accel.evals.pictures.questions import inputs_of, picture_of, seen_picture

    assert isinstance(loaded, LoadedVisionModel)
    task = load_task("scene_color")
    assert isinstance(task, PictureTask)
    image = task.samples(1, 0)[0].image
    wide = Image.fromarray(np.concatenate([image, image], axis=1))
    inputs = inputs_of(loaded, picture_of(image), "<image> what ?")
    # the other picture is only there to show that it is not taken
    assert np.abs(np.asarray(seen_picture(loaded, inputs, wide)).astype(int) - image).max() <= 1
    tiles = {**inputs, "pixel_values": inputs["pixel_values"][None]}
    assert seen_picture(loaded, tiles, wide) is wide
