"""How deep visual tokens reach: counted from what the handle reports, kept with each sample, turned into savings, and drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.families import FAMILIES
from conformance.vision_families import IMAGE

import accel
from accel.evals.models import LoadedModel, load_model
from accel.evals.models.small_vlm import exits
from accel.evals.report.page import render_html, render_markdown
from accel.evals.report.pictures import attention_table, exit_table, savings_table
from accel.evals.results import RunFolder, SampleRecord
from accel.evals.runner import run_accuracy
from accel.evals.summary.pictures import summarise_pictures
from accel.evals.summary.visual_layers import Prices, exit_row, layer_tokens, savings
from accel.evals.visual_bench.cost import DecoderShape, prefill_flops
from accel.protocols import Stage
from accel.recipe import Recipe
from accel.stats import PruningEvent

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
SHAPE = DecoderShape(4, 32, 4, 4, 8, 64, 64)
CONFIG = {"model": "small-vlm"}


def record(layers: list[int] | None, **changes: Any) -> SampleRecord:
    made = SampleRecord(
        task="scene_color", label="a", options=[], tokens=0, sample=0, seed=0, n_tokens=16, prompt_hash="abc", log_prob=None, exact=1.0, log_probs=[],
        hits=[1.0], questions=["x"], expected=["1"], answers=["1"], density=None, sparse_calls=0, dense_calls={}, prefill_ms=12.0,
        picture_hash="p", visual_tokens=10, layer_tokens=layers,
    )  # fmt: skip
    return replace(made, **changes)


def event(stage: Stage, n_kept: int) -> PruningEvent:
    none = torch.full((1, 10), -1)
    return PruningEvent("any", stage, [], none, none, none, torch.arange(10)[None] < n_kept, none)


# --- counting -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages, expected, last",
    [
        ([], [10, 10, 10, 10], 3),
        ([(Stage("projector"), 4)], [4, 4, 4, 4], 3),
        ([(Stage("encoder"), 6), (Stage("layer", 2), 3)], [6, 6, 3, 3], 3),
        ([(Stage("projector"), 4), (Stage("layer", 1), 2), (Stage("layer", 3), 0)], [4, 2, 2, 0], 2),
        ([(Stage("layer", 0), 0)], [0, 0, 0, 0], -1),
        ([(Stage("projector"), 0)], [0, 0, 0, 0], -1),
    ],
    ids=["nothing", "projector", "two", "three", "layer_0", "all_in_front"],
)
def test_each_layer_sees_what_the_stages_before_it_left(stages: list[tuple[Stage, int]], expected: list[int], last: int) -> None:
    found = layer_tokens([event(stage, n) for stage, n in stages], 10, 4)
    assert found == expected
    assert record(found).last_visual_layer == last


@pytest.mark.parametrize(
    "methods",
    [[accel.FastV(keep=0.25, layer=1)], [accel.DyVTE(exit_layer=1)], [accel.FasterVLM(keep=0.5), accel.DyVTE(exit_layer=0)]],
    ids=["fastv", "dyvte", "both"],
)
def test_counts_are_those_of_the_cache_with_row_ends_too(methods: Any) -> None:
    model, inputs = FAMILIES["llava next"].build()
    inputs = {name: value[:1] for name, value in inputs.items()}
    events: list[PruningEvent] = []
    with torch.no_grad(), accel.apply(model, *methods) as handle, handle.observe_pruning(events.append):
        cache = model(**inputs, use_cache=True).past_key_values
        tokens = handle.stats.tokens
    assert (tokens.patches, tokens.structural, int((inputs["input_ids"] == IMAGE).sum())) == (80, 8, 88)
    n_text = inputs["input_ids"].shape[1] - 88
    assert layer_tokens(events, 88, len(cache.layers)) == [layer.keys.shape[2] - n_text for layer in cache.layers]
    assert tokens.all_layer_tokens // tokens.patches == len(cache.layers)


def test_a_row_of_exits_needs_a_sample_that_left_between_two_layers() -> None:
    assert exit_row([]) is None
    assert exit_row([record(None)]) is None, "an older run"
    assert exit_row([record([10, 4, 4, 4]), record([10] * 4)]) is None
    assert exit_row([record([0] * 4)]) is None, "left in front of the decoder"
    found = exit_row([record([9, 9, 0, 0]), record([9] * 4), record(None), record([9, 9, 0, 0], task="scene_word")])
    assert found == {"label": "a", "n_layers": 4, "counts": {"scene_color": [0, 1, 0, 1], "scene_word": [0, 1, 0, 0]}, "mean": pytest.approx(5 / 3)}


def test_savings_are_those_of_the_tokens_that_did_not_come() -> None:
    prices = Prices(SHAPE, 2)
    full, text = (prefill_flops(SHAPE, [n] * 4) for n in (16, 6))
    half = savings([record([10, 10, 0, 0]), record([10] * 4), record(None)], prices)
    assert half["flops_saved"] == pytest.approx(0.25), "two of four layers in one of two prompts"
    # keys and values of 4 heads of 8 numbers of 2 bytes
    assert half["kv_bytes_saved"] == 10 * 2 * (2 * 4 * 8 * 2) / 2
    some = savings([record([5] * 4)], prices)["flops_saved"]
    assert some == pytest.approx((full - prefill_flops(SHAPE, [11] * 4)) / (full - text))
    assert savings([record([0] * 4)], prices)["flops_saved"] == 1
    assert savings([record([12] * 4, n_tokens=18, structural_tokens=2)], prices) == {"flops_saved": 0, "kv_bytes_saved": 0}, "row ends are visual"
    assert savings([record(None)], prices) == savings([record([5] * 4)], None) == {"flops_saved": None, "kv_bytes_saved": None}


def test_samples_of_older_runs_are_read(tmp_path: Path) -> None:
    line = {name: value for name, value in asdict(record(None)).items() if name not in ("layer_tokens", "structural_tokens")}
    RunFolder.create(tmp_path / "r", CONFIG)
    (tmp_path / "r" / "samples.jsonl").write_text(json.dumps(line) + "\n")
    [old] = RunFolder.create(tmp_path / "r", CONFIG, resume=True).records
    assert (old.layer_tokens, old.last_visual_layer) == (None, None)


# --- runs ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model("small-vlm")


@pytest.fixture(scope="module")
def records(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> list[SampleRecord]:
    methods: dict[str, Any] = {
        "fixed": [accel.DyVTE(exit_layer=4)], "routed": Recipe.load(exits.RECIPE).methods, "fastv": [accel.FastV(keep=0.25, layer=2)],
        "fastervlm": [accel.FasterVLM(keep=0.25)], "both": [accel.FasterVLM(keep=0.5), accel.DyVTE(exit_layer=3)],
    }  # fmt: skip
    folder = RunFolder.create(tmp_path_factory.mktemp("run") / "r", CONFIG)
    run_accuracy(loaded, methods, ["scene_color", "scene_exist"], [], n=6, seed=0, folder=folder, progress=False)
    return RunFolder.create(folder.path, CONFIG, resume=True).records


def of(records: list[SampleRecord], label: str) -> list[SampleRecord]:
    return [r for r in records if r.label == label]


@pytest.mark.parametrize(
    "label, expected",
    [("fixed", [144] * 5 + [0] * 3), ("fastv", [144] * 2 + [36] * 6), ("fastervlm", [36] * 8), ("both", [72] * 4 + [0] * 4), ("dense", None)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_sample_knows_what_its_layers_saw(records: list[SampleRecord], label: str, expected: list[int] | None) -> None:
    assert [r.layer_tokens for r in of(records, label)] == [expected] * 12


def test_the_counts_are_those_of_the_share_kept(records: list[SampleRecord]) -> None:
    for r in records:
        if r.label != "dense":
            assert r.layer_tokens is not None
            assert r.kept_share == pytest.approx(sum(r.layer_tokens) / (8 * 144))


def test_routers_send_samples_away_behind_different_layers(loaded: LoadedModel, records: list[SampleRecord]) -> None:
    prices = Prices(DecoderShape.from_config(loaded.model.config), 2)
    found = summarise_pictures(records, ["fixed", "routed", "fastv", "fastervlm", "both"], [], prices)
    rows = {row["label"]: row for row in found["exits"]}
    assert list(rows) == ["fixed", "routed", "both"]
    assert rows["fixed"]["counts"] == {task: [0, 0, 0, 0, 6, 0, 0, 0] for task in ("scene_color", "scene_exist")}
    routed = [sum(counts) for counts in zip(*rows["routed"]["counts"].values(), strict=True)]
    assert sum(routed) == 12
    assert sum(map(bool, routed)) > 1
    means = {mean["label"]: mean for mean in found["means"]}
    assert means["fixed"]["last_visual_layer"] == 4
    assert means["fixed"]["flops_saved"] == pytest.approx(3 / 8)
    # what fastervlm leaves out is 108 of 144 tokens in every layer, each of 2 · 4 heads · 32 numbers of 2 bytes
    assert means["fastervlm"]["kv_bytes_saved"] == 108 * 8 * 512
    assert (means["dense"]["last_visual_layer"], means["dense"]["flops_saved"]) == (None, None)


# --- the report ---------------------------------------------------------------------------------------------------------------


def exit_of(label: str, color: list[int], word: list[int]) -> dict[str, Any]:
    return {"label": label, "n_layers": 4, "counts": {"scene_color": color, "scene_word": word}, "mean": 1.5}


def mean(label: str, keep: float | None, share: float | None, **more: Any) -> dict[str, Any]:
    score = {"value": 0.9, "stderr": 0.02, "n": 100}
    return {"label": label, "series": label, "keep": keep, "is_baseline": label == "dense", "score": score, "kept_share": share, "kept_tokens": None,
            "visual_tokens": 144, **more}  # fmt: skip


def test_only_exits_at_several_layers_are_drawn() -> None:
    # the first leaves behind a fixed layer, whatever the task
    found = [exit_of("fixed", [0, 3, 0, 0], [0, 2, 0, 0]), exit_of("routed", [0, 3, 0, 1], [0] * 4)]
    found.append(exit_of("later", [0, 0, 1, 0], [0, 1, 0, 0]))
    result = {"command": "run", "exits": found}
    html, text = render_html(result), render_markdown(result)
    assert html.count("last layer with visual tokens</text>") == 2
    assert html.count("Mean: layer 1.50 of 0–3.") == 2
    assert "| routed | color | 1.50 | 1 (75%), 3 (25%) | 4 |" in text
    assert "| routed | word | – |  | 0 |" in text
    assert "| fixed | color" not in text
    assert exit_table(found).group_starts == {2, 4}
    assert "The last layer" not in render_markdown({**result, "exits": found[:1]})


def test_what_was_saved_has_a_table_where_it_is_known() -> None:
    # the first two as an older run wrote them
    dense, old = mean("dense", None, None), mean("old", 0.25, 0.25)
    routed = mean("routed", None, 0.4375, last_visual_layer=3.516, flops_saved=0.4354, kv_bytes_saved=257126.4)
    priceless = mean("priceless", 0.25, 0.25, last_visual_layer=7.0, flops_saved=None, kv_bytes_saved=None)
    table = savings_table([dense, old, priceless, routed])
    assert table.rows == [["routed", "43.8 %", "3.52", "43.5 %", "251 KiB"], ["priceless", "25.0 %", "7.00", "–", "–"]]
    assert savings_table([dense, old]).rows == []
    assert "FLOPs saved" not in render_markdown({"means": [dense, old]})
    assert "251 KiB" in render_markdown({"means": [dense, routed]})


def test_attention_has_three_curves_and_no_boundaries() -> None:
    rows = [{"layer": i, "text_to_visual": 0.25, "text_to_text": 0.75, "visual_to_visual": 0.5 + i / 10} for i in range(3)]
    attention = {"n_visual": 16, "n_text": 5, "layers": rows}
    assert attention_table(attention).rows[1] == ["1", "25.0 %", "75.0 %", "60.0 %"]
    html = render_html({"command": "inspect", "attention": attention})
    assert [html.count(f">{name}</text>") for name in ("text → picture", "text → text", "picture → picture")] == [1, 1, 1]
    assert "fusion → intra-modality → multimodal" in html
    assert "16 visual tokens, 5 text tokens behind them." in html
