"""The seam: what a cache holds, when, and that a host can replace it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import OptionError, PatchError
from accel.models.cache import ScaleCache, Schedule, TeacherForced
from accel.models.var import VAR


def test_schedule_counts_tokens_and_spans() -> None:
    schedule = Schedule.of([1, (3, 2), 4])
    assert schedule.tokens == (1, 6, 16)
    assert schedule.total == 23
    assert schedule.span(2) == (7, 23)
    assert schedule.scale_of_tokens().tolist() == [0] + [1] * 6 + [2] * 16


@pytest.mark.parametrize("sizes", [[], [0], [(1, 2, 3)], [(2, -1)]], ids=str)
def test_impossible_schedules_raise(sizes: Any) -> None:
    with pytest.raises(OptionError, match="schedule"):
        Schedule(tuple((s, s) if isinstance(s, int) else tuple(s) for s in sizes))


@pytest.mark.parametrize("sizes", [[(1, 1, 1), (1, 2, 2)], [(1, 1), (2,)], [1, 2.5], [(1, 1), (2.5, 2)], "0.06M", 5, [None]], ids=str)
def test_sizes_that_are_no_pairs_of_whole_numbers_raise(sizes: Any) -> None:
    with pytest.raises(OptionError, match="side lengths or"):
        Schedule.of(sizes)


def run(cache: ScaleCache, *, layers: int = 2, rows: int = 2, heads: int = 3, dim: int = 4, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Feeds numbered entries through all scales; per scale the keys that layer 0 would attend to, and at each scale what the cache holds."""
    seen = []
    for scale, n in enumerate(cache.schedule.tokens):
        cache.begin(scale)
        for layer in range(layers):
            start = cache.schedule.span(scale)[0]
            k = torch.arange(start, start + n, dtype=dtype)[:, None].expand(rows, heads, n, dim) + 1000 * layer
            got_k, got_v, mask = cache.update(layer, k, -k, query=k)
            assert mask is None
            assert torch.equal(got_k, -got_v)
            if layer == 0:
                seen.append([got_k[0, 0, :, 0].clone(), torch.tensor(cache.cache_bytes())])
    return seen


def test_every_scale_sees_all_earlier_ones_and_itself_in_order() -> None:
    schedule = Schedule.of([1, 2, 3])
    for scale, (keys, _) in enumerate(run(ScaleCache(schedule))):
        assert keys.tolist() == list(range(schedule.span(scale)[1]))


def test_the_last_scale_is_not_stored_and_memory_is_the_closed_form() -> None:
    cache = ScaleCache(Schedule.of([1, 2, 4]))
    sizes = [int(size) for _, size in run(cache, dtype=torch.float16)]
    # T_{K−1} = 5 tokens × 2 rows × 3 heads × 4 channels × (K and V) × 2 bytes, one layer at first, then two, then layer 0 is released
    one_layer = 5 * 2 * 3 * 4 * 2 * 2
    assert sizes == [one_layer, 2 * one_layer, one_layer]
    assert cache.cache_bytes() == 0


def test_entries_name_scale_and_position() -> None:
    cache = ScaleCache(Schedule.of([1, 2, 3]))
    for scale in (0, 1):
        cache.begin(scale)
        part = torch.zeros(1, 1, cache.schedule.tokens[scale], 2)
        cache.update(0, part, part)
    scales, positions = cache.entries(0)
    assert scales.tolist() == [0, 1, 1, 1, 1]
    assert positions.tolist() == [0, 1, 2, 3, 4]
    assert cache.entries(1)[0].numel() == 0


def test_scales_out_of_order_and_a_second_generation_raise() -> None:
    cache = ScaleCache(Schedule.of([1, 2]))
    with pytest.raises(PatchError, match="in order"):
        cache.begin(1)
    run(cache)
    with pytest.raises(PatchError, match="one generation"):
        cache.begin(2)
    skipped = ScaleCache(Schedule.of([1, 2]))
    skipped.begin(0)
    skipped.begin(1)
    with pytest.raises(PatchError, match="layer 0 holds 0 of the 1"):
        skipped.update(0, torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))


def test_block_mask_lets_a_token_see_its_own_and_coarser_scales() -> None:
    x = torch.zeros(1, 1, 5, 2)
    mask = TeacherForced(Schedule.of([1, 2])).update(0, x, x)[2]
    assert mask is not None
    assert mask.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]


class Recording(ScaleCache):
    """Notes what passes, and keeps the dtype of keys."""

    def __init__(self, schedule: Schedule) -> None:
        super().__init__(schedule)
        self.calls: list[tuple[int, int, tuple[int, ...], torch.dtype]] = []

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.calls.append((self.scale, layer, tuple(q.shape), k.dtype))
        return super().attend(layer, q, k, v)


def test_every_layer_at_every_scale_attends_through_the_cache(tiny_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_var(), []

    def new_cache(schedule: Schedule, **kwargs: bool) -> ScaleCache:
        made.append((TeacherForced(schedule) if kwargs.get("teacher_forced") else Recording(schedule), kwargs))
        return made[-1][0]

    plain, _ = model.generate_codes([1], seed=0)
    monkeypatch.setattr(model, "new_cache", new_cache)
    recorded, _ = model.generate_codes([1], seed=0)
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    cache, kwargs = made[0]
    assert kwargs == {"is_guided": True}
    # 2 rows (guidance), 4 heads, d = 8
    assert [call[:3] for call in cache.calls] == [(k, layer, (2, 4, n, 8)) for k, n in enumerate((1, 4, 9, 16)) for layer in (0, 1)]
    model.forward(torch.tensor([1]), recorded)
    assert made[1][1] == {"teacher_forced": True}


def test_keys_are_cached_in_the_dtype_that_attention_computes_in(tiny_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> None:
    model, made = tiny_var(), []
    monkeypatch.setattr(model, "new_cache", lambda schedule, **_: made.append(Recording(schedule)) or made[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate_codes([1], seed=0)
    model.to(torch.bfloat16).generate_codes([1], seed=0)
    assert {call[3] for cache in made for call in cache.calls} == {torch.bfloat16}


def test_casting_keys_before_they_are_stored_is_exact_under_autocast() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        late = F.scaled_dot_product_attention(q, k, v.bfloat16(), scale=1.0)
        early = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=1.0)
    assert torch.equal(late, early)


def test_a_teacher_forced_pass_through_a_host_that_does_not_know_it_raises(tiny_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    codes, _ = model.generate_codes([1], seed=0)
    monkeypatch.setattr(model, "new_cache", lambda schedule, **_: ScaleCache(schedule))
    with pytest.raises(PatchError, match="teacher-forced"):
        model.forward(torch.tensor([1]), codes)


class HalfPerHead(ScaleCache):
    """Each head attends to its own better half of the entries."""

    def update(self, layer: int, k: Tensor, v: Tensor, *, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, _ = super().update(layer, k, v, query=query)
        assert query is not None
        score = (query @ k.transpose(2, 3)).softmax(-1).sum(2)
        index = score.topk((k.shape[2] + 1) // 2).indices.sort(-1).values[..., None].expand(-1, -1, -1, k.shape[3])
        return k.gather(2, index), v.gather(2, index), None


def test_a_host_may_return_fewer_entries_per_head_and_leaves_no_trace(tiny_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    before = model.generate([1, 2], seed=0, output="tensor")
    with monkeypatch.context() as patched:
        patched.setattr(model, "new_cache", lambda schedule, **_: HalfPerHead(schedule))
        assert not torch.equal(model.generate([1, 2], seed=0, output="tensor"), before)
    assert torch.equal(model.generate([1, 2], seed=0, output="tensor"), before)


class Failing(Recording):
    """Breaks in the middle of scale 2."""

    def update(self, layer: int, k: Tensor, v: Tensor, *, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        if (self.scale, layer) == (2, 1):
            raise RuntimeError("broken")
        return super().update(layer, k, v, query=query)


def test_an_exception_between_scales_releases_the_cache_and_leaves_the_model_usable(
    tiny_var: Callable[..., VAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = tiny_var(), []
    before = model.generate([1], seed=0, output="tensor")
    with monkeypatch.context() as patched:
        patched.setattr(model, "new_cache", lambda schedule, **_: made.append(Failing(schedule)) or made[-1])
        with pytest.raises(RuntimeError, match="broken"):
            model.generate([1], seed=0)
    assert made[0].cache_bytes() == 0
    assert torch.equal(model.generate([1], seed=0, output="tensor"), before)
