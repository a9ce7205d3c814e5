"""The bench of visual-token pruning counts what is really there: cache bytes by layer, tokens by stage, parts that add up, variants in turn."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from accel.errors import OptionError
from accel.evals import models
from accel.evals.latency import Spread
from accel.evals.visual_bench import __main__ as visual_bench
from accel.evals.visual_bench import timing as visual_timing
from accel.evals.visual_bench.__main__ import HEADERS, RANDOM, cells, main
from accel.evals.visual_bench.cost import DecoderShape, token_kv_bytes
from accel.evals.visual_bench.shapes import SHAPES, Sizes, random_model, random_prompt
from accel.evals.visual_bench.timing import (
    Held,
    VisualPass,
    cache_bytes,
    inspect_pass,
    measure_visual,
    rotated,
    tokens_by_layer,
    visual_pass,
    visual_rows,
)
from accel.protocols import Stage
from accel.registry import build

N_LAYERS = 6
TINY = Sizes(
    {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32},
    {"vocab_size": 32064, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
    n_tower_layers=3,
    n_layers=N_LAYERS,
)


def tiny(n_patches: int = 16, *, batch: int = 1, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = random_model(TINY, n_patches, n_layers=N_LAYERS, n_tower_layers=3, dtype=dtype, device="cpu")
    return model, random_prompt(TINY, n_patches, n_text=6, batch=batch, dtype=dtype, device="cpu")


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Any]:
    return tiny()


STAGED = {"keep": 0.5, "r1": 0.75, "r2": 0.5, "r3": 0.5, "recycle": False}
CASES = [
    pytest.param("fastervlm", {"keep": 1.0}, [16] * N_LAYERS, id="all"),
    pytest.param("fastervlm", {"keep": 0.25}, [4] * N_LAYERS, id="front"),
    pytest.param("fastv", {"keep": 0.5, "layer": 2}, [16] * 2 + [8] * 4, id="layer"),
    pytest.param("vflowopt", STAGED, [12, 12, 6, 6, 3, 3], id="three stages"),
]


@pytest.mark.parametrize("method, options, kept", CASES)
@pytest.mark.parametrize("batch, dtype", [(1, torch.float32), (2, torch.bfloat16)], ids=["one", "two in bf16"])
def test_the_cache_holds_exactly_the_bytes_of_the_tokens_left(
    method: str, options: dict[str, Any], kept: list[int], batch: int, dtype: torch.dtype
) -> None:
    model, prompt = tiny(batch=batch, dtype=dtype)
    held = inspect_pass(model, prompt, [build(method, options)], decode_steps=1)
    assert held.layer_tokens == [[n] * batch for n in kept]
    # two KV heads of width 8, keys and values
    assert held.layer_bytes == [batch * (n + 6) * 2 * 2 * 8 * dtype.itemsize for n in kept]


def test_newlines_of_a_mosaic_are_visual_tokens_too() -> None:
    model, prompt = tiny(80)
    assert (prompt.n_visual, prompt.n_patches, prompt.n_tiles) == (88, 80, 5)
    held = inspect_pass(model, prompt, [build("fastervlm", {"keep": 0.25, "newline": "all"})], decode_steps=1)
    assert held.layer_tokens == [[20 + 8]] * N_LAYERS
    assert held.layer_bytes == [(28 + 6) * 2 * 2 * 8 * 4] * N_LAYERS


def test_a_view_of_a_larger_cache_counts_what_it_keeps_alive() -> None:
    cache = DynamicCache()
    whole = torch.zeros(1, 2, 10, 4)
    cache.update(whole, whole.clone(), 0)
    cache.layers[0].keys = whole[:, :, 8:]
    cache.layers[0].values = whole[:, :, 8:].clone()
    assert cache_bytes(cache) == [1 * 2 * 10 * 4 * 4 + 1 * 2 * 2 * 4 * 4]


def test_layers_see_what_every_stage_before_them_left() -> None:
    def event(layer: int | None, *rows: str) -> Any:
        is_kept = torch.tensor([[c == "1" for c in row] for row in rows])
        return SimpleNamespace(stage=Stage("projector" if layer is None else "layer", layer), is_kept=is_kept)

    events = [event(2, "1100", "0001"), event(None, "1110", "0011")]
    assert tokens_by_layer(events, 4, [4, 4]) == [[3, 2], [3, 2], [2, 1], [2, 1]]
    assert tokens_by_layer([event(1, "1000", "1000")], 2, [4, 3]) == [[4, 3], [1, 1]]


def test_a_row_sets_measured_ratios_beside_those_of_arithmetic(subject: tuple[Any, Any]) -> None:
    model, prompt = subject
    per_token = token_kv_bytes(DecoderShape.from_config(model.config), 4)
    passes = {"dense": [VisualPass(1, 8, 1, 4), VisualPass(1, 18, 1, 4)], "m": [VisualPass(2, 2, 1, 4), VisualPass(2, 2, 1, 2)]}
    held = {
        "dense": Held([[16]] * N_LAYERS, [22 * per_token] * N_LAYERS, 7),
        "m": Held([[16]] * 3 + [[4]] * 3, [22 * per_token] * 3 + [10 * per_token] * 3, None),
    }
    dense, row = visual_rows(model, prompt, {"dense": [], "m": [build("fastervlm")]}, held, passes)
    assert (dense.is_baseline, row.is_baseline) == (True, False)
    assert row.speedup == {"encoder": 0.5, "prefill": 6.5, "head": 1.0, "ttft": 3.0, "decode": 1.5}
    assert row.ms["ttft"].median == 5000
    assert (row.visual_tokens, row.mean_layer_tokens) == (4, 10)
    assert row.visual_kv_bytes == row.predicted_visual_kv_bytes == 60 * per_token
    assert row.kv_bytes == 96 * per_token
    assert dense.predicted == dict.fromkeys(("prefill", "ttft", "decode", "encoder"), 1.0)
    assert row.predicted["encoder"] == 1.0
    # per token 2 · (2 · 32 · 6 · 8 + 3 · 32 · 40) FLOPs, per pair of tokens 2 · 2 · 32
    n22, n10 = (n * 2 * (3072 + 3840) + n * n * 128 for n in (22, 10))
    assert row.predicted["prefill"] == pytest.approx(2 * n22 / (n22 + n10))
    assert 1 < row.predicted["ttft"] < row.predicted["prefill"]
    assert 1 < row.predicted["decode"] < 22 / 16


def test_holes_of_a_ragged_batch_show_as_bytes_beyond_the_tokens(subject: tuple[Any, Any]) -> None:
    model, _ = subject
    _, prompt = tiny(batch=2)
    per_token = token_kv_bytes(DecoderShape.from_config(model.config), 4)
    held = {"dense": Held([[8, 4]] * N_LAYERS, [2 * (8 + 6) * per_token] * N_LAYERS, None)}
    row = visual_rows(model, prompt, {"dense": []}, held, {"dense": [VisualPass(1, 1, 1, 1)]})[0]
    assert row.visual_kv_bytes - row.predicted_visual_kv_bytes == 4 * N_LAYERS * per_token


def test_variants_take_turns_and_another_one_begins_each_round(subject: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noted(model: Any, prompt: Any, methods: Any, **_: Any) -> VisualPass:
        order.append(str(methods[0].options()["keep"]) if methods else "dense")
        return VisualPass(1, 1, 1, 1)

    monkeypatch.setattr(visual_timing, "visual_pass", noted)
    monkeypatch.setattr(visual_timing, "inspect_pass", lambda *args, **_: noted(*args) and Held([[16]] * N_LAYERS, [0] * N_LAYERS, None))
    rows = measure_visual(*subject, {"a": [build("fastervlm", {"keep": 0.5})], "b": [build("fastervlm", {"keep": 0.25})]}, repeats=2)
    # once each before anything is kept, then the round of peaks, then two timed ones
    assert order == ["dense", "0.5", "0.25", "dense", "0.5", "0.25", "0.5", "0.25", "dense", "0.25", "dense", "0.5"]
    assert [row.ms["prefill"].n for row in rows] == [2, 2, 2]
    assert [row.label for row in rows] == ["dense (sdpa)", "a", "b"]
    assert rotated(["x"], 5) == ["x"]


def test_parts_follow_each_other_and_leave_the_model_as_it_was(subject: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = subject
    ticks = iter(range(100))
    monkeypatch.setattr(visual_timing, "_now", lambda *_: float(next(ticks)))
    before = dict(vars(model.model)), dict(model.model.language_model._forward_hooks)
    done = visual_pass(model, prompt, [build("fastervlm")], decode_steps=4)
    # start, encoder in and out, decoder out, first token; then the begin and end of four steps
    assert done == VisualPass(encoder_s=1, prefill_s=2, head_s=1, decode_s=0.25)
    assert done.seconds("ttft") == 4
    assert before == (dict(vars(model.model)), dict(model.model.language_model._forward_hooks))


def test_processor_time_leaves_out_waiting_and_needs_one_thread(subject: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    begin = visual_timing._now(subject[0], "processor"), visual_timing._now(subject[0], "wall")
    time.sleep(0.1)
    waited = visual_timing._now(subject[0], "processor") - begin[0], visual_timing._now(subject[0], "wall") - begin[1]
    assert waited[0] < 0.05 < 0.1 <= waited[1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(OptionError, match="--threads 1"):
        measure_visual(*subject, {}, clock="processor")


def test_wrong_arguments_explain_themselves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_model", lambda name, **_: models.LoadedModel(None, None, name))
    for arguments, message in (
        (["--shape", "llava-1.5-8b"], "known shapes: llava-1.5-7b"),
        (["--shape", "llava-1.5-7b", "--tokens", "100"], "576 or 2880 patch tokens"),
        (["--shape", "llava-1.5-7b", "--layers", "33"], "1 to 32 decoder layers"),
        (["--method", "flexprefill"], "which these do not: flexprefill"),
        (["--tokens", "576"], "belong to a --shape"),
        (["--model", "words"], "words reads no pictures"),
        (["--keeps", "1.5"], "1.5"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    model, prompt = SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa")), None
    with pytest.raises(OptionError, match="at least 1"):
        measure_visual(model, prompt, {}, repeats=0)        # type: ignore[arg-type]
    with pytest.raises(OptionError, match="dense baseline"):
        measure_visual(model, prompt, {"dense (sdpa)": []})     # type: ignore[arg-type]


def test_main_measures_a_shape_and_writes_what_it_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    out = tmp_path / "found.json"
    shape = ["--shape", "tiny", "--layers", "4", "--tower-layers", "2", "--text-tokens", "6", "--dtype", "float32", "--out", str(out)]
    assert main([*shape, "--method", "fastervlm", "--method", "random_tokens", "--keeps", "1.0,0.25", "--repeats", "1", "--decode-steps", "1"]) == 0
    printed = capsys.readouterr().out
    assert RANDOM in printed
    assert "4 of 6 decoder layers and 2 of 3 tower layers ran" in printed
    assert "16 visual tokens + 6 text" in printed
    found = json.loads(out.read_text())
    labels = [row["label"] for row in found["rows"]]
    assert labels[0] == "dense (sdpa)"
    assert len(labels) == 5
    assert [row["visual_tokens"] for row in found["rows"]] == [16, 16, 4, 16, 4]
    assert all(row["visual_kv_bytes"] == row["predicted_visual_kv_bytes"] > 0 for row in found["rows"])
    assert all(row["ms"]["prefill"]["median"] > 0 and row["ms"]["encoder"]["median"] > 0 for row in found["rows"])
    assert found["config"]["layers"] == 4
    assert any(RANDOM in note for note in found["notes"])


def test_cells_say_where_layers_differ_and_what_is_unknown() -> None:
    ms = dict.fromkeys(("encoder", "prefill", "head", "ttft", "decode"), Spread(812.4, 805.2, 0.01234, 3))
    row = visual_timing.VisualRow(
        "m", [], False, 4, 10, ms, dict.fromkeys(ms, 2.0), {"prefill": 3.0, "decode": 1.0}, 3 << 20, 2 << 20, 1 << 20, None      # type: ignore[arg-type]
    )  # fmt: skip
    found = dict(zip(HEADERS, cells(row), strict=True))
    assert found["visual tokens"] == "4 (mean 10.0)"
    assert found["prefill ms"] == "812 (805–0.0123)"
    assert cells(row)[HEADERS.index("TTFT ms") + 2] == "–"
    assert found["peak MiB"] == "–"
    assert visual_bench.mib(3 << 19) == "1.50"
