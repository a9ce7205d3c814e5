"""Visual tokens that leave in front of the language model: token for token what vLLM and transformers give, and the blocks that it saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_vlms
import torch
from tiny_vllm import report
from tiny_vlms import picture, prompt
from vlm_twins import PROMPTS, SAVED, Twin, asking, greedy

import accel


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Twin]:
    return cache(lambda name: Twin(SAVED[name](tmp_path_factory.mktemp(name))))


@pytest.fixture(params=list(SAVED))
def twin(request: pytest.FixtureRequest, twins: Callable[[str], Twin]) -> Twin:
    return twins(request.param)


def metric(llm: Any, name: str) -> float:
    """The sum over the engine's own values of a gauge or counter."""
    return float(sum(m.value for m in llm.get_metrics() if m.name == name))


def test_pruned_equals_transformers_and_whole_equals_stock(twin: Twin) -> None:
    """One engine that keeps a quarter: its own share, a request's share and count, and everything, beside stock vLLM and our other host."""
    options: dict[str, Any] = {"newline": "all", "keep": 0.25}
    stock, whole_lens = twin.stock()
    assert len({token for row in stock for token in row}) > 8, "the model says the same all the time: equality would mean little"
    with twin.serve(accel.FasterVLM(**options)) as llm:
        pruned, lens = greedy(llm, PROMPTS)
        counted = report(llm)
        again, _ = greedy(llm, PROMPTS)
        all_kept, all_lens = greedy(llm, asking(PROMPTS, 1.0))
        unchanged = report(llm)["tokens"]
        nine, _ = greedy(llm, asking(PROMPTS, 9))
    assert pruned == twin.transformers(PROMPTS, accel.FasterVLM(**options, **twin.like_vllm))
    assert nine == twin.transformers(PROMPTS, accel.FasterVLM(**{**options, "keep": 9}, **twin.like_vllm))
    assert again == pruned
    assert all_kept == stock == twin.transformers(PROMPTS)
    assert all_lens == whole_lens
    assert pruned[2] == stock[2]
    assert [p == s for p, s in zip(pruned, stock, strict=True)] == [False, False, True, False]
    gone = sum(whole_lens) - sum(lens)
    tokens = counted["tokens"]
    assert counted["problems"] == []
    assert tokens["prompts"] == 4
    assert 0 < tokens["kept"] == tokens["visual"] - gone
    assert tokens["kept"] / tokens["visual"] == pytest.approx(0.25, abs=0.01)
    # cached pictures are not encoded again, and what a request keeps whole is not counted
    assert unchanged == tokens


@pytest.mark.parametrize("twin", ["llava", "llava_next", "qwen2_5_vl"], indirect=True)
def test_a_recipe_that_keeps_all_is_stock_and_serves_requests_that_do_not(twin: Twin) -> None:
    """With the attention of hubs, the pixels, and merged rows, where tiles compete for the budget of their picture."""
    options: dict[str, Any] = {"recycle_multi": True, "alpha": 0.5, "hub_factor": 1.5}
    with twin.serve(accel.VFlowOpt(keep=1.0, **options)) as llm:
        whole, _ = greedy(llm, PROMPTS)
        nothing = report(llm)["tokens"]
        fewer, _ = greedy(llm, asking(PROMPTS, 0.3))
        some = report(llm)["tokens"]
    assert whole == twin.stock()[0]
    assert nothing["visual"] == 0
    assert some["prompts"] == 4
    assert fewer == twin.transformers(PROMPTS, accel.VFlowOpt(keep=0.3, **options, **twin.like_vllm))
    assert fewer != whole


@pytest.fixture(scope="module")
def llava(twins: Callable[[str], Twin]) -> Twin:
    return twins("llava")


@pytest.fixture(scope="module")
def quarter(llava: Twin) -> Iterator[Any]:
    """A LLaVA of which a quarter of the visual tokens stays."""
    with llava.serve(accel.FasterVLM(keep=0.25), enable_mm_embeds=True) as llm:
        yield llm


@pytest.mark.parametrize("keep", [None, 1.0, 100])
def test_blocks_of_the_cache_fall_with_the_tokens(quarter: Any, keep: Any) -> None:
    """Read from vLLM's own gauge while the prompt is held."""
    given = prompt(5, [picture(64, 64, 9)], 7, seed=9)
    given = given if keep is None else asking([given], keep)[0]
    n_tokens = 5 + 7 + 3 + {None: 64, 1.0: 256, 100: 100}[keep]
    quarter.reset_prefix_cache()
    before = metric(quarter, "vllm:prompt_tokens")
    cache = quarter.llm_engine.vllm_config.cache_config
    from vllm import SamplingParams

    quarter.llm_engine.add_request("held", given, SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False))
    used = []
    while quarter.llm_engine.has_unfinished_requests():
        quarter.llm_engine.step()
        # one block stands for none
        used.append(round(metric(quarter, "vllm:kv_cache_usage_perc") * (cache.num_gpu_blocks - 1)))
    assert max(used) == math.ceil((n_tokens + 1) / cache.block_size)
    assert metric(quarter, "vllm:prompt_tokens") - before == n_tokens


def test_one_batch_may_hold_several_shares_of_one_picture(quarter: Any, llava: Twin) -> None:
    one = prompt(5, [picture(64, 64, 9)], 7, seed=9)
    keeps = [0.25, 64, 0.5, 1.0, 16, 0.25]
    tokens, lens = greedy(quarter, [asking([one], keep)[0] for keep in keeps])
    assert [n - 15 for n in lens] == [64, 64, 128, 256, 16, 64]
    assert tokens[0] == tokens[1] == tokens[5]
    assert len({tuple(row) for row in tokens}) == 4
    [half] = llava.transformers([one], accel.FasterVLM(keep=0.5, position_mode="compact"))
    assert tokens[2] == half


def test_memory_is_measured_with_whole_pictures(quarter: Any) -> None:
    """A request may ask for them; vLLM would wait for ever for an item that is larger than what it has set apart."""
    [place] = quarter.llm_engine.renderer.mm_processor.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"]
    assert place.length == 256


@pytest.mark.parametrize("keep", [0, 1.5, "much", 1])
def test_a_wrong_keep_fails_its_request_and_no_other(quarter: Any, keep: Any) -> None:
    one = prompt(5, [picture(64, 64, 9)], 7, seed=9)
    with pytest.raises(ValueError, match="keep must be a share"):
        greedy(quarter, asking([one], keep))
    assert greedy(quarter, [one])[1] == [79]


def test_features_made_elsewhere_stay_whole(quarter: Any) -> None:
    rows = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0))
    one = {**prompt(5, [picture(64, 64)], 7, seed=9), "multi_modal_data": {"image": rows}}
    assert greedy(quarter, [one])[1] == [15 + 40]
    with pytest.raises(ValueError, match="made outside"):
        greedy(quarter, asking([one], 0.5))


def test_the_report_says_what_is_special_here(quarter: Any) -> None:
    told = " ".join(report(quarter)["notices"])
    assert "alone in its prompt" in told
    assert "without gaps" in told


@pytest.mark.parametrize(
    "method", [accel.RandomTokens(keep=0.25), accel.UniformTokens(keep=40), accel.Downsample(keep=0.25)], ids=lambda m: m.method_name()
)
def test_controls_equal_transformers(llava: Twin, method: Any) -> None:
    # a random draw depends on how many pictures a prompt holds: here it is one
    single = [PROMPTS[0], PROMPTS[3]]
    with llava.serve(method) as llm:
        tokens, lens = greedy(llm, single)
        counted = report(llm)
    kept = 40 if method.keep == 40 else 64
    assert lens == [6 + kept, 503 + kept]
    assert counted["tokens"]["kept"] == 2 * kept
    assert counted["problems"] == []
    assert tokens == llava.transformers(single, replace(method, position_mode="compact"))


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        (accel.FasterVLM(scoring_layer=2), {}, "layer 2"),
        (accel.FasterVLM(budget_scope="sample"), {}, "share a budget"),
        (accel.FasterVLM(), {"mm_processor_kwargs": {"keep": 0.5}}, "in the recipe"),
        (accel.FasterVLM(), {"compilation_config": {"compile_mm_encoder": True}}, "compile_mm_encoder"),
    ],
    ids=["a layer that is not built", "a shared budget", "keep of the engine", "a compiled tower"],
)
def test_what_cannot_run_is_refused_at_construction(llava: Twin, method: Any, options: dict[str, Any], reason: str) -> None:
    with pytest.raises((accel.AccelError, ValueError), match=reason), llava.serve(method, **options):
        pass


def test_features_made_elsewhere_stay_whole_where_a_requests_keep_has_no_say(llava: Twin) -> None:
    """An engine of such a recipe did not start: the pictures that memory is measured by asked for keep=1.0."""
    rows = torch.randn(1, 40, 128, generator=torch.Generator().manual_seed(0))
    one = prompt(5, [picture(64, 64, 9)], 7, seed=9)
    with llava.serve(accel.VFlowOpt(r1=0.5, r3=1.0), enable_mm_embeds=True) as llm:
        [place] = llm.llm_engine.renderer.mm_processor.get_dummy_mm_inputs({"image": 1})["mm_placeholders"]["image"]
        assert place.length == 256
        assert greedy(llm, [one, {**one, "multi_modal_data": {"image": rows}}])[1] == [15 + 128, 15 + 40]
        with pytest.raises(ValueError, match="has no say"):
            greedy(llm, asking([one], 0.5))


@pytest.mark.parametrize("is_on", [False, True], ids=["off", "on"])
def test_text_embedded_outside_is_refused_where_pictures_bring_positions(*, is_on: bool) -> None:
    from types import SimpleNamespace

    from accel.patches.hosts.vllm.models.qwen2_5_vl import AccelQwen2_5_VLForConditionalGeneration

    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, enable_dbo=False, ubatch_size=0), speculative_config=None,
        model_config=SimpleNamespace(enable_prompt_embeds=is_on),
        compilation_config=SimpleNamespace(cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False)),
    )  # fmt: skip
    found = AccelQwen2_5_VLForConditionalGeneration.pruning_reasons(None, config)
    assert [reason.split(":")[0] for reason in found] == ["enable_prompt_embeds is on"] * is_on


def test_videos_lose_tokens_frame_by_frame(twins: Callable[[str], Twin]) -> None:
    """Beside a picture in one prompt. Of few frames: vLLM and transformers number what follows long videos differently."""
    qwen = twins("qwen2_5_vl")
    frames = np.stack([np.asarray(picture(80, 64, seed)) for seed in range(4)])
    told = {"fps": 2.0, "frames_indices": list(range(4)), "total_num_frames": 4, "duration": 2.0}
    beside = prompt(5, [picture(90, 64, 1)], 7, seed=1)
    ids = [20, 21, tiny_vlms.VISION_START, tiny_vlms.VIDEO, tiny_vlms.VISION_END, 33, *beside["prompt_token_ids"]]
    given = {"prompt_token_ids": ids, "multi_modal_data": {"video": [(frames, {**told, "do_sample_frames": False})], **beside["multi_modal_data"]}}
    with qwen.serve(accel.FasterVLM(keep=0.3), limit_mm_per_prompt={"image": 1, "video": 1}) as llm:
        pruned, lens = greedy(llm, [given])
        whole, whole_lens = greedy(llm, asking([given], 1.0))
        counted = report(llm)["tokens"]

    processor: Any = qwen.processor
    made = {
        **processor.video_processor([frames], return_tensors="pt", do_sample_frames=False, video_metadata=[told]),
        **processor.image_processor(beside["multi_modal_data"]["image"], return_tensors="pt"),
    }
    made.pop("video_metadata", None)
    n = {tiny_vlms.VIDEO: int(made["video_grid_thw"].prod()) // 4, tiny_vlms.IMAGE: int(made["image_grid_thw"].prod()) // 4}
    row = torch.tensor([[token for i in ids for token in [i] * n.get(i, 1)]])
    inputs = {
        **made, "input_ids": row, "attention_mask": torch.ones_like(row), "second_per_grid_ts": torch.tensor([1.0]),
        "mm_token_type_ids": (row == tiny_vlms.IMAGE).long() + 2 * (row == tiny_vlms.VIDEO).long(),
    }  # fmt: skip

    def generated() -> list[int]:
        return list(qwen.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, row.shape[1] :].tolist())

    assert whole == [generated()]
    with accel.apply(qwen.model, accel.FasterVLM(keep=0.3)):
        assert pruned == [generated()]
    # two steps of 8 × 10 tokens, each of which has a budget
    assert n[tiny_vlms.VIDEO] == 160
    assert counted["kept"] == 2 * 24 + round(0.3 * n[tiny_vlms.IMAGE])
    assert whole_lens[0] - lens[0] == counted["visual"] - counted["kept"]


def test_a_pass_that_was_replayed_without_its_positions_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of decoding are replayed for every step of single tokens, one of a picture among them; the model's own code does not run then."""
    from collections import Counter
    from types import SimpleNamespace

    from accel.patches.hosts.vllm.compat import Qwen2_5_VLForConditionalGeneration
    from accel.patches.hosts.vllm.models.positions import with_offsets
    from accel.patches.hosts.vllm.models.qwen2_5_vl import AccelQwen2_5_VLForConditionalGeneration

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "embed_input_ids", lambda self, ids, *args, **kwargs: ids)
    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "forward", lambda self, ids, positions: positions)
    model = AccelQwen2_5_VLForConditionalGeneration.__new__(AccelQwen2_5_VLForConditionalGeneration)
    torch.nn.Module.__init__(model)
    model._accel_exit, model._accel_pruning = None, object()
    model._accel_engine = SimpleNamespace(steps=Counter(), info=SimpleNamespace(hidden_size=4))
    ids, is_visual = torch.arange(2), torch.tensor([False, True])
    rows = with_offsets(torch.zeros(1, 4), torch.tensor([[0, 5, 300]]))
    model.embed_input_ids(ids, [rows], is_multimodal=is_visual)
    assert model.forward(ids, torch.full((3, 2), 7)).tolist() == [[7, 7], [7, 12], [7, 307]]
    model.embed_input_ids(ids, [rows], is_multimodal=is_visual)
    assert not model._accel_engine.steps
    # nobody called forward
    model.embed_input_ids(ids, None, is_multimodal=None)
    assert list(model._accel_engine.steps.values()) == [1]
    assert model.forward(ids, torch.full((3, 2), 7)).tolist() == [[7, 7]] * 3
