"""Visual tokens that leave in front of a decoder layer, on real engines: the same greedy tokens as transformers gives with the same method."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_vllm import ENGINE, VOCAB, engine, report
from tiny_vlms import IMAGE, VISION_END, VISION_START, for_transformers, picture, save_llava, save_llava_next, save_qwen2_5_vl

import accel
from accel.errors import UnsupportedError

LLAVA, NEXT, QWEN = "AccelLlavaForConditionalGeneration", "AccelLlavaNextForConditionalGeneration", "AccelQwen2_5_VLForConditionalGeneration"
FIT = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0, "limit_mm_per_prompt": {"image": 2}}
N_NEW = 8
N_LAYERS = 3


def words(n: int, seed: int) -> list[int]:
    return torch.randint(9, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def asked(*parts: int | tuple[int, int], seed: int = 0) -> dict[str, Any]:
    """A prompt of parts: so many words, or a picture of this size."""
    ids: list[int] = []
    pictures = []
    for i, part in enumerate(parts):
        if isinstance(part, tuple):
            ids += [VISION_START, IMAGE, VISION_END]
            pictures.append(picture(*part, seed=seed + i))
        else:
            ids += words(part, seed + i)
    return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": pictures}} if pictures else {})}


SQUARE = (64, 64)
# words and pictures beside each other in a step; two pictures; a picture first; blocks half full
MIXED = [
    asked(3, seed=1), asked(20, SQUARE, 50, seed=2), asked(500, seed=3), asked(70, SQUARE, 9, (80, 96), 12, seed=4), asked(SQUARE, 2, seed=5),
    asked(333, (96, 64), 1, seed=6),
]  # fmt: skip


def answers(llm: Any, batch: Sequence[dict[str, Any]], n: int = N_NEW) -> tuple[list[list[int]], list[list[int]]]:
    """Greedy continuations, and the prompts with a placeholder for every visual token."""
    from vllm import SamplingParams

    wanted = SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
    found = llm.generate([dict(given) for given in batch], wanted, use_tqdm=False)
    return [list(f.outputs[0].token_ids) for f in found], [list(f.prompt_token_ids) for f in found]


class Oracle:
    """A model in transformers."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def answers(self, batch: Sequence[dict[str, Any]], whole: Sequence[Sequence[int]], *methods: Any, n: int = N_NEW) -> list[list[int]]:
        """whole: the prompts as vLLM lays them out."""
        handle = accel.apply(self.model, *methods) if methods else None
        found = []
        for given, ids in zip(batch, whole, strict=True):
            n_tokens = [len(list(run)) for token, run in groupby(ids) if token == IMAGE]
            inputs = for_transformers(self.processor, given, n_tokens)
            out = self.model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0, eos_token_id=None)
            found.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        if handle is not None:
            handle.undo()
        return found


def check(llm: Any, oracle: Oracle, batch: Sequence[dict[str, Any]], *methods: Any) -> None:
    """The engine answers as transformers does with the methods, otherwise than without, and the rows of its pictures left."""
    before = report(llm)["exit_rows"]
    got, whole = answers(llm, batch)
    want = oracle.answers(batch, whole, *methods)
    assert got == want
    assert want != oracle.answers(batch, whole), "the method makes no difference to these prompts: nothing is tested"
    found = report(llm)
    assert found["problems"] == []
    came, went = (found["exit_rows"][at] - before.get(at, 0) for at in ("before", "behind"))
    # the newest token of a request is never fed
    assert came == sum(len(ids) + N_NEW - 1 for ids in whole)
    assert came - went == sum(ids.count(IMAGE) for ids in whole)


# --- LLaVA --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def oracle(llava: str) -> Oracle:
    return Oracle(llava)


@pytest.fixture(scope="module")
def early(llava: str) -> Iterator[Any]:
    """An engine in which pictures leave behind the first layer."""
    with engine(llava, accel.DyVTE(exit_layer=0), architecture=LLAVA, **FIT) as llm:
        yield llm


def test_llava_answers_as_transformers_does_and_again_on_the_same_blocks(early: Any, oracle: Oracle) -> None:
    check(early, oracle, MIXED, accel.DyVTE(exit_layer=0))
    check(early, oracle, MIXED[::-1], accel.DyVTE(exit_layer=0))


def test_an_answer_begins_at_a_picture_that_ends_the_prompt(early: Any, oracle: Oracle) -> None:
    given = [{"prompt_token_ids": [*words(30, 8), IMAGE], "multi_modal_data": {"image": [picture(*SQUARE)]}}]
    got, whole = answers(early, given, n=1)
    assert got == oracle.answers(given, whole, accel.DyVTE(exit_layer=0), n=1)


def test_counters_tell_what_each_layer_saw(early: Any) -> None:
    before = report(early)["tokens"]
    answers(early, [asked(20, SQUARE, 5, seed=30)], n=2)
    after = report(early)["tokens"]
    gained = {name: after[name] - before[name] for name in after}
    assert gained == {"prompts": 0, "visual": 256, "kept": 0, "kept_by_layer": 256, "whole_by_layer": N_LAYERS * 256}


def test_a_request_has_no_say_where_nothing_leaves_in_front(early: Any) -> None:
    with pytest.raises(ValueError, match=r"keep=0\.5 of a request has no say"):
        answers(early, [{**asked(6, SQUARE, 4, seed=41), "mm_processor_kwargs": {"keep": 0.5}}], n=1)
    assert answers(early, [asked(6, SQUARE, 4, seed=41)], n=1)[1][0].count(IMAGE) == 256


def test_positions_that_left_have_no_scores(early: Any) -> None:
    """A score of a token behind a visual one would be made up."""
    from vllm import SamplingParams

    wanted = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    # vLLM compiles a helper for these scores, which would take half a minute
    with torch.compiler.set_stance("force_eager"):
        [found] = early.generate([dict(asked(6, SQUARE, 4, seed=40))], wanted, use_tqdm=False)
    ids = found.prompt_token_ids
    for i in range(1, len(ids)):
        score = found.prompt_logprobs[i][ids[i]].logprob
        assert (score != score) == (ids[i - 1] == IMAGE), f"token {i}: {score}"


def refusal(llm: Any, **wanted: Any) -> str:
    """What a request with a picture that asks for scores of its prompt is told."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError) as caught:
        llm.generate([dict(asked(6, SQUARE, 4, seed=40))], SamplingParams(max_tokens=1, detokenize=False, **wanted), use_tqdm=False)
    return str(caught.value)


def test_scores_of_a_prompt_are_refused_and_other_requests_answered(llava: str, oracle: Oracle) -> None:
    """They would hold NaN, which a server cannot write as JSON: it answered by HTTP 500."""
    from accel.vllm import LLM

    method = accel.DyVTE(exit_layer=0)
    llm = LLM(llava, method, **{**ENGINE, **FIT})
    try:
        for n in (0, 1):
            assert "prompt_logprobs (echo with logprobs, too) cannot be had" in refusal(llm, prompt_logprobs=n)
        got, whole = answers(llm, FEW)
        assert got == oracle.answers(FEW, whole, method)
    finally:
        llm.llm_engine.engine_core.shutdown()


# --- steps --------------------------------------------------------------------------------------------------------------------


def test_chunks_and_preemption_change_nothing(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A decoder of Qwen2; chunks of nothing but picture, decoding beside prefill, and requests that start over."""
    folder = save_llava(tmp_path_factory.mktemp("qwen2"), text="Qwen2Config")
    method, whole_prompts = accel.DyVTE(exit_layer=1), Oracle(folder)
    # 9 blocks of 128 tokens hold two of the longer requests, and not while they answer
    tight = {"max_num_batched_tokens": 96, "num_gpu_blocks_override": 9, "max_model_len": 1024}
    with engine(folder, method, architecture=LLAVA, **{**FIT, **tight}) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        preempt, preempted = scheduler._preempt_request, []
        scheduler._preempt_request = lambda request, *args, **kwargs: (preempted.append(request.request_id), preempt(request, *args, **kwargs))[1]
        n = 40
        batch = [*MIXED, asked(80, SQUARE, 40, seed=50), asked(100, SQUARE, 20, seed=51)]
        got, whole = answers(llm, batch, n=n)
        assert got == whole_prompts.answers(batch, whole, method, n=n)
        assert preempted, "nothing was preempted: the cache is not tight enough"
        rows = report(llm)["exit_rows"]
        n_visual = sum(ids.count(IMAGE) for ids in whole)
        # every chunk that ends in a picture keeps its last row, and what starts over leaves again
        assert rows["before"] > sum(len(ids) + n - 1 for ids in whole)
        assert rows["before"] - rows["behind"] > 0.9 * n_visual


def test_an_exit_behind_the_last_layer_is_the_stock_model(llava: str) -> None:
    def run(**options: Any) -> tuple[list[Any], dict[str, Any] | None]:
        from vllm import SamplingParams

        with engine(llava, **{**FIT, "enable_prefix_caching": True, **options}) as llm:
            wanted = SamplingParams(max_tokens=N_NEW, temperature=0, ignore_eos=True, logprobs=5, detokenize=False)
            found = llm.generate([dict(given) for given in MIXED], wanted, use_tqdm=False)
            scores = [[sorted((i, s.logprob) for i, s in step.items()) for step in f.outputs[0].logprobs] for f in found]
            return [(list(f.outputs[0].token_ids), s) for f, s in zip(found, scores, strict=True)], options and report(llm)

    from accel.patches.hosts.vllm.options import engine_options

    stock, _ = run()
    ours, found = run(**engine_options([accel.DyVTE(exit_layer=N_LAYERS - 1)], {}, LLAVA))
    assert ours == stock
    assert found is not None
    assert found["problems"] == []
    assert found["exit_rows"] == {}


# --- other models -------------------------------------------------------------------------------------------------------------


def test_llava_next_answers_as_transformers_does(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, method = save_llava_next(tmp_path_factory.mktemp("next")), accel.DyVTE(exit_layer=1)
    batch = [asked(70, seed=60), asked(20, (128, 64), 30, seed=61), asked(5, (64, 120), 9, (128, 128), 40, seed=62)]
    with engine(folder, method, architecture=NEXT, **FIT) as llm:
        check(llm, Oracle(folder), batch, method)


def test_positions_with_three_axes_stay_behind_the_exit(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, method = save_qwen2_5_vl(tmp_path_factory.mktemp("qwen")), accel.DyVTE(exit_layer=0)
    batch = [asked(70, seed=70), asked(20, (128, 64), 30, seed=71), asked(5, (64, 120), 9, (96, 96), 40, seed=72)]
    with engine(folder, method, architecture=QWEN, **FIT) as llm:
        check(llm, Oracle(folder), batch, method)


def test_tokens_leave_in_front_of_the_model_and_inside_it(llava: str, oracle: Oracle) -> None:
    methods = accel.FasterVLM(keep=0.25, position_mode="compact"), accel.DyVTE(exit_layer=0, position_mode="compact")
    with engine(llava, *methods, architecture=LLAVA, **FIT) as llm:
        got, short = answers(llm, MIXED)
        assert [ids.count(IMAGE) for ids in short] == [0, 64, 0, 128, 64, 64]
        whole = [[t for i in given["prompt_token_ids"] for t in ([IMAGE] * 256 if i == IMAGE else [i])] for given in MIXED]
        assert got == oracle.answers(MIXED, whole, *methods)
        found = report(llm)
        assert found["problems"] == []
        assert found["exit_rows"]["before"] - found["exit_rows"]["behind"] == 5 * 64
        # 64 of 256 tokens of each picture reach one layer of three
        assert found["kept_share"] == pytest.approx(64 / (256 * N_LAYERS))


# --- refusals -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "word"), [({"enable_prefix_caching": True}, "prefix caching"), ({"enforce_eager": False}, "enforce_eager")])
def test_an_engine_that_cannot_do_it_loads_no_weights(llava: str, options: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    loaded: list[Any] = []
    monkeypatch.setattr(LlavaForConditionalGeneration, "load_weights", lambda self, weights: loaded.append(weights))
    with pytest.raises(UnsupportedError, match=word), engine(llava, accel.DyVTE(exit_layer=0), architecture=LLAVA, **{**FIT, **options}):
        pass
    assert loaded == []


def decoder_of(cls: Any, **attention: Any) -> Any:
    """A decoder with one layer, and what is asked of it."""
    found = cls.__new__(cls)
    torch.nn.Module.__init__(found)
    backend = SimpleNamespace(get_name=lambda: attention.get("backend", "FLASH_ATTN"))
    attn = SimpleNamespace(attn_backend=backend, sliding_window=attention.get("window"))
    found.layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=attn))]
    return found


def test_decoders_that_are_not_known_are_refused_by_name() -> None:
    from vllm.model_executor.models.gemma2 import Gemma2Model
    from vllm.model_executor.models.llama import LlamaModel
    from vllm.model_executor.models.qwen3 import Qwen3Model

    from accel.patches.hosts.vllm.models.exit import why_unfit

    # runs the forward of Qwen2's
    assert why_unfit(decoder_of(LlamaModel)) == why_unfit(decoder_of(Qwen3Model)) == []
    assert "Gemma2Model" in why_unfit(decoder_of(Gemma2Model))[0]
    assert "FLASHINFER" in why_unfit(decoder_of(LlamaModel, backend="FLASHINFER"))[0]
    assert "window" in why_unfit(decoder_of(LlamaModel, window=64))[0]


def test_a_pass_that_nobody_embedded_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could leave from it: a runner that embeds elsewhere would be seen."""
    from collections import Counter

    from accel.patches.hosts.vllm import compat
    from accel.patches.hosts.vllm.models.exit import Exit

    found = Exit.__new__(Exit)
    found._engine = SimpleNamespace(steps=Counter())     # type: ignore[assignment]
    for metadata, n in ((None, 0), ({"layer": 1}, 1)):
        monkeypatch.setattr(compat, "get_forward_context", lambda metadata=metadata: SimpleNamespace(attn_metadata=metadata), raising=False)
        assert found._leave(torch.nn.Identity(), ()) is None
        assert found._engine.steps.total() == n


# --- GPUs' runner and kernels ---------------------------------------------------------------------------------------------------

_SCRIPT = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/vllm"]
import interpreted
interpreted.believe_in_triton()
interpreted.use_backend("vllm.v1.attention.backends.triton_attn.TritonAttentionBackend")
import accel, json, test_exit as t
from accel.patches.hosts.vllm.models.exit_requests import PATH
options = {**t.FIT, "max_num_batched_tokens": 160, "logits_processors": [PATH]}
with t.engine(sys.argv[1], accel.DyVTE(exit_layer=0), architecture=t.LLAVA, **options) as llm:
    assert "cannot be had" in t.refusal(llm, prompt_logprobs=1)
    [runner] = llm.collective_rpc(lambda worker: [c.__module__ for c in type(worker.model_runner).__mro__])
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    backends = sorted({layer.attn_backend.get_name() for name, layer in layers.items() if "language_model" in name})
    got, whole = t.answers(llm, t.FEW)
    print("FOUND", json.dumps([got, whole, t.report(llm)["exit_rows"], runner, backends]))
"""
FEW = MIXED[:2]


def test_the_runner_and_the_kernels_of_gpus_give_the_same(llava: str, oracle: Oracle) -> None:
    """On a CPU they run where vLLM believes in Triton, here in the interpreter (vllm-integration.md §3.4)."""
    asked_of = [sys.executable, "-c", _SCRIPT, llava, str(Path(__file__).parents[1])]
    done = subprocess.run(asked_of, capture_output=True, text=True, timeout=300)
    found = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert found, done.stderr[-3000:]
    got, whole, rows, runner, backends = json.loads(found[0].removeprefix("FOUND "))
    assert "vllm.v1.worker.gpu.model_runner" in runner
    assert backends == ["TRITON_ATTN"]
    assert got == oracle.answers(FEW, whole, accel.DyVTE(exit_layer=0))
    assert rows["before"] == sum(len(ids) + N_NEW - 1 for ids in whole)
    # a chunk that ends in a picture leaves it one row
    assert 0 <= rows["behind"] - (rows["before"] - sum(ids.count(IMAGE) for ids in whole)) < 8
