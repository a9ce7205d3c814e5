"""Steps without visual tokens, and the options under which they can leave: no vLLM needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from accel import DyVTE, FlexPrefill, RandomTokens
from accel.errors import AccelError
from accel.patches.hosts.vllm.host import plain_vlm
from accel.patches.hosts.vllm.models.compaction import Departed, Step, check_slots, shortened
from accel.patches.hosts.vllm.models.exit_checks import exit_layer, resolved_options, why_not
from accel.protocols import Keep, ModelInfo, PruningContext, Stage, TokenPruning, Unit

BLOCK = 4
TEXT, PICTURE = False, True


class Request:
    """A sequence served chunk by chunk, and a cache behind the exit in which each entry is its token's number."""

    def __init__(self, is_visual: list[bool], blocks: list[int]) -> None:
        self.is_visual, self.blocks, self.done = is_visual, blocks, 0


class Server:
    """Runs steps, and keeps what the layers behind the exit would hold."""

    def __init__(self, n_blocks: int = 32) -> None:
        self.departed = Departed(n_blocks, torch.device("cpu"))
        self.cache = torch.full((n_blocks * BLOCK,), -1)

    def step(self, *work: tuple[Request, int]) -> tuple[list[list[int]], list[list[int]]]:
        """Serves so many tokens of each request. Returns, per request, the tokens whose rows are left, and those that its newest row can see."""
        n = [count for _, count in work]
        start = torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        seq_lens = torch.tensor([r.done + count for r, count in work], dtype=torch.int32)
        width = max(len(r.blocks) for r, _ in work)
        table = torch.tensor([r.blocks + [0] * (width - len(r.blocks)) for r, _ in work], dtype=torch.int32)
        visual = torch.tensor([v for r, count in work for v in r.is_visual[r.done : r.done + count]])
        tokens = torch.tensor([t for r, count in work for t in range(r.done, r.done + count)])
        step = Step(start, seq_lens, table, visual)
        n_gone = self.departed.before(step)
        short = shortened(step, n_gone, BLOCK)
        self.departed.add(step, n_gone, short)
        left = tokens if short.rows is None else tokens[short.rows]
        assert len(short.slots) == len(left) == int(short.query_start[-1])
        assert short.query_start.dtype == short.seq_lens.dtype == torch.int32
        self.cache[short.slots] = left
        rows = [left[a:b].tolist() for a, b in zip(short.query_start[:-1], short.query_start[1:], strict=True)]
        seen = [self._sequence(r, int(length)) for (r, _), length in zip(work, short.seq_lens, strict=True)]
        for r, count in work:
            r.done += count
        return rows, seen

    def _sequence(self, r: Request, length: int) -> list[int]:
        places = torch.arange(length)
        return self._at(torch.tensor(r.blocks)[places // BLOCK] * BLOCK + places % BLOCK)

    def _at(self, slots: Tensor) -> list[int]:
        return self.cache[slots].tolist()


def text_of(r: Request, first: int, end: int) -> list[int]:
    return [t for t in range(first, end) if not r.is_visual[t]]


def test_visual_rows_leave_and_text_moves_up() -> None:
    r = Request([TEXT, PICTURE, PICTURE, PICTURE, PICTURE, PICTURE, TEXT, TEXT], [3, 5])
    rows, seen = Server().step((r, 8))
    assert rows == [[0, 6, 7]]
    assert seen == [[0, 6, 7]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 11])
def test_however_the_prompt_is_cut_the_newest_token_sees_all_text_and_nothing_else(chunk: int) -> None:
    r = Request([PICTURE] * 6 + [TEXT] * 5 + [PICTURE] * 7 + [TEXT] * 9, [9, 2, 7, 4, 1, 30, 11])
    server = Server()
    while r.done < len(r.is_visual):
        n = min(chunk, len(r.is_visual) - r.done)
        _, [seen] = server.step((r, n))
        own = [] if not r.is_visual[r.done - 1] else [r.done - 1]
        assert seen == text_of(r, 0, r.done) + own


def test_requests_of_one_step_do_not_mix() -> None:
    server = Server()
    picture = Request([TEXT] + [PICTURE] * 9 + [TEXT] * 4, [1, 2, 3, 4])
    words = Request([TEXT] * 14, [8, 7, 6, 5])
    both = Request([PICTURE] * 3 + [TEXT] * 9, [20, 10, 15])
    server.step((picture, 11), (words, 5))
    rows, seen = server.step((words, 1), (picture, 1), (both, 7))
    assert rows == [[5], [11], [3, 4, 5, 6]]
    assert seen == [[0, 1, 2, 3, 4, 5], [0, 10, 11], [3, 4, 5, 6]]


def test_decoding_goes_on_behind_the_text() -> None:
    server = Server()
    r = Request([TEXT, PICTURE, PICTURE, TEXT] + [TEXT] * 6, [6, 3, 8])
    server.step((r, 4))
    for n in range(4, 10):
        rows, seen = server.step((r, 1))
        assert rows == [[n]]
        assert seen == [text_of(r, 0, n + 1)]


def test_an_answer_may_begin_at_a_visual_token_which_nobody_sees_later() -> None:
    server = Server()
    r = Request([TEXT, TEXT, PICTURE, PICTURE, TEXT], [6, 3])
    rows, seen = server.step((r, 4))
    assert rows == [[0, 1, 3]]
    assert seen == [[0, 1, 3]]
    assert server.step((r, 1)) == ([[4]], [[0, 1, 4]])


def test_a_chunk_of_nothing_but_visual_tokens_leaves_one_row_to_every_request() -> None:
    r = Request([TEXT] + [PICTURE] * 10, [6, 3, 2])
    server = Server()
    server.step((r, 3))
    rows, seen = server.step((r, 4))
    assert rows == [[6]]
    assert seen == [[0, 6]]


def test_a_request_that_starts_again_forgets_what_it_had_lost() -> None:
    server = Server()
    server.step((Request([TEXT, PICTURE, PICTURE, TEXT], [6, 3]), 4))
    # preempted, or another one that was given the same blocks
    again = Request([TEXT] * 5, [6, 3])
    server.step((again, 4))
    assert server.step((again, 1)) == ([[4]], [[0, 1, 2, 3, 4]])


def test_a_request_that_skips_tokens_is_refused() -> None:
    server = Server()
    r = Request([TEXT, PICTURE, PICTURE, TEXT, TEXT, TEXT], [6, 3])
    server.step((r, 3))
    r.done += 1
    with pytest.raises(RuntimeError, match="never passed the layer"):
        server.step((r, 1))


def test_padding_requests_leave_no_trace() -> None:
    server = Server()
    r = Request([TEXT, PICTURE, TEXT, TEXT], [6])
    server.step((r, 3))
    # a table left over from a request that is elsewhere now
    start, seq_lens = torch.tensor([0, 2, 2], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    step = Step(start, seq_lens, torch.tensor([[9], [6]]), torch.tensor([TEXT, PICTURE]))
    n_gone = server.departed.before(step)
    short = shortened(step, n_gone, BLOCK)
    server.departed.add(step, n_gone, short)
    assert short.query_start.tolist() == [0, 2, 2]
    assert short.seq_lens.tolist() == [2, 0]
    assert server.step((r, 1)) == ([[3]], [[0, 2, 3]])


def test_without_pictures_nothing_is_taken_out() -> None:
    step = Step(torch.tensor([0, 1, 4]), torch.tensor([7, 3]), torch.tensor([[5, 2], [1, 0]]), torch.zeros(4, dtype=torch.bool))
    short = shortened(step, torch.tensor([0, 0]), BLOCK)
    assert short.rows is None
    assert short.seq_lens.tolist() == [7, 3]
    assert short.slots.tolist() == [2 * BLOCK + 2, BLOCK, BLOCK + 1, BLOCK + 2]


def test_another_layout_of_the_cache_is_noticed() -> None:
    step = Step(torch.tensor([0, 1, 4]), torch.tensor([7, 5]), torch.tensor([[5, 2], [1, 3]]), torch.ones(4, dtype=torch.bool))
    # places 6 of the first request, 2 to 4 of the second; one row fills the step up
    slots = torch.tensor([2 * BLOCK + 2, BLOCK + 2, BLOCK + 3, 3 * BLOCK, 77])
    check_slots(step, slots, BLOCK)
    for change, block_size in ((1, BLOCK), (0, 2 * BLOCK)):
        with pytest.raises(AccelError, match="lays out its cache"):
            check_slots(step, slots + torch.tensor([0, 0, 0, change, 0]), block_size)


# --- options ------------------------------------------------------------------------------------------------------------------

VLM = plain_vlm()
FIT = {"enable_prefix_caching": False, "enforce_eager": True}


@dataclass(frozen=True, kw_only=True)
class InsideTheModel(TokenPruning):
    """A stage in front of layer 3 that leaves so many tokens of a picture."""

    left: int
    is_known_ahead: bool

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [Stage("layer", 3, is_known_ahead=self.is_known_ahead)]

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int]:
        return [self.left] * len(units)

    def select(self, ctx: PruningContext) -> Keep | None:
        return None


def test_an_exit_is_known_beforehand_and_leaves_nothing() -> None:
    assert exit_layer([InsideTheModel(left=0, is_known_ahead=True)], VLM) == 3
    assert exit_layer([InsideTheModel(left=1, is_known_ahead=True)], VLM) is None
    assert exit_layer([InsideTheModel(left=0, is_known_ahead=False)], VLM) is None


def test_the_first_exit_counts_and_other_stages_are_none() -> None:
    assert exit_layer([DyVTE(exit_layer=9), DyVTE(exit_layer=4), RandomTokens(keep=0.5)], VLM) == 5
    assert exit_layer([RandomTokens(keep=0.5), FlexPrefill()], VLM) is None
    assert exit_layer([DyVTE(exit_layer=VLM.n_layers - 1)], VLM) is None


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"enable_prefix_caching": None}, "prefix caching"),
        ({"enable_prefix_caching": True}, "prefix caching"),
        ({"enforce_eager": False}, "enforce_eager"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        ({"decode_context_parallel_size": 2}, "decode_context_parallel_size"),
        ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size"),
        ({"ubatch_size": 2}, "ubatch_size"),
        ({"kv_transfer_config": {"kv_connector": "X"}}, "connector"),
        ({"kv_offloading_size": 1.0}, "offload"),
        ({"speculative_config": {"method": "ngram"}}, "draft"),
        ({"enable_lora": True}, "adapters"),
        ({"enable_dbo": True}, "enable_dbo"),
        ({"kv_sharing_fast_prefill": True}, "fast_prefill"),
        ({"enable_prompt_embeds": True}, "embedded text"),
    ],
)  # fmt: skip
def test_options_that_stand_in_the_way_of_an_exit_are_named(change: dict[str, Any], word: str) -> None:
    exit_at = [DyVTE(exit_layer=9)]
    assert why_not(exit_at, VLM, FIT) == []
    [reason] = why_not(exit_at, VLM, {**FIT, **change})
    assert word in reason
    # nobody leaves, nobody minds
    assert why_not([RandomTokens(keep=0.5)], VLM, change) == []


def test_an_engine_that_is_being_built_has_the_options_that_were_asked_for_beforehand() -> None:
    parallel = dict.fromkeys(("pipeline_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size", "ubatch_size"), 1)
    cache = {"enable_prefix_caching": False, "kv_offloading_size": None, "kv_sharing_fast_prefill": False}
    no = SimpleNamespace(name="NONE")

    def built(*, enable_prompt_embeds: bool) -> Any:
        return SimpleNamespace(
            model_config=SimpleNamespace(enable_prompt_embeds=enable_prompt_embeds), cache_config=SimpleNamespace(**cache), lora_config=None,
            parallel_config=SimpleNamespace(enable_dbo=False, **parallel), kv_transfer_config=None, speculative_config=None,
            compilation_config=SimpleNamespace(mode=no, cudagraph_mode=no),
        )  # fmt: skip

    exit_at = [DyVTE(exit_layer=9)]
    assert why_not(exit_at, VLM, resolved_options(built(enable_prompt_embeds=False))) == []
    [reason] = why_not(exit_at, VLM, resolved_options(built(enable_prompt_embeds=True)))
    assert reason.startswith("enable_prompt_embeds is given: ")


def test_sparse_attention_and_windows_stand_in_the_way_of_an_exit() -> None:
    [reason] = why_not([FlexPrefill(), DyVTE(exit_layer=9)], VLM, FIT)
    assert "flexprefill" in reason
    windows = replace(VLM, layer_types=("sliding_attention", *VLM.layer_types[1:]))
    [reason] = why_not([DyVTE(exit_layer=9)], windows, FIT)
    assert "sliding_attention" in reason
