"""What the next-scale cache hands to a method, and what it makes of the answer: entries, merges, moments, bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from data import method_skeletons as skeletons
from next_scale import INFO, SHAPES, last_logits, tiny_infinity, tiny_var
from torch import Tensor
from torch.nn import functional as F

import accel
from accel.errors import PatchError
from accel.handle import Handle
from accel.models.cache import ScaleCache, Schedule
from accel.models.var import VAR
from accel.patches.hosts.entries import Entries
from accel.patches.hosts.nextscale.cache import CompressedCache
from accel.protocols import CacheNeeds, CompressionContext, HeadGroup, KVCompression, Merge, ModelInfo, Retain, When
from accel.stats import CacheStats

STARTS = [0, 1, 5, 14, 30]


@dataclass(frozen=True, kw_only=True)
class Toy(KVCompression):
    """Keeps what `chosen(ctx, group)` says, the newest entries unless told otherwise, and writes down what it was shown."""

    budgets: tuple[tuple[tuple[int, ...], int], ...] = (((0, 1, 2, 3), 6),)
    moments: tuple[When, ...] = (When("before_attention"),)
    wants: CacheNeeds = field(default_factory=CacheNeeds)
    released: int = 3
    chosen: Callable[[CompressionContext, HeadGroup], Retain] | None = None
    seen: list[tuple[CompressionContext, HeadGroup]] = field(default_factory=list, compare=False)

    @property
    def when(self) -> tuple[When, ...]:
        return self.moments

    def needs(self) -> CacheNeeds:
        return self.wants

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        assert n_entries == STARTS[step + 1]
        return [HeadGroup(heads, budget) for heads, budget in self.budgets]

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        self.seen.append((ctx, group))
        return newest(ctx, group) if self.chosen is None else self.chosen(ctx, group)

    def release(self, model: ModelInfo, layer: int, *, step: int) -> bool:
        return step == self.released


def newest(ctx: CompressionContext, group: HeadGroup, n: int | None = None) -> Retain:
    size = ctx.k.shape[2]
    return Retain(torch.arange(size - (n or group.budget), size).expand(*ctx.k.shape[:2], -1))


def parts(scale: int, *, rows: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (b, 4, n_k, 8) of one scale."""
    generator = torch.Generator().manual_seed(100 * seed + scale)
    q, k, v = torch.randn(3, rows, 4, STARTS[scale + 1] - STARTS[scale], 8, generator=generator)
    return q, k, v


def new_cache(method: KVCompression, *, is_guided: bool = False, counters: CacheStats | None = None) -> CompressedCache:
    found = counters or CacheStats()
    return CompressedCache(Schedule(SHAPES), method, INFO, counters=lambda: found, is_guided=is_guided)


def run(cache: ScaleCache, *, layers: tuple[int, ...] = (0,), until: int = 4) -> list[Tensor]:
    """Outputs of layer 0 at each scale."""
    outs = []
    for scale in range(until):
        cache.begin(scale)
        outs += [out for layer in layers if (out := cache.attend(layer, *parts(scale))) is not None and layer == 0]
    return outs


def every(upto: int) -> tuple[Tensor, Tensor]:
    """All keys and values of the scales before `upto`, (b, 4, T, 8)."""
    every = [parts(scale) for scale in range(upto)]
    return torch.cat([k for _, k, _ in every], 2), torch.cat([v for _, _, v in every], 2)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@contextmanager
def patched(model: VAR, method: KVCompression) -> Iterator[Handle]:
    with accel.apply(model, method) as handle:
        yield handle


# --- entries ------------------------------------------------------------------------------------------------------------------


def test_heads_of_two_budgets_attend_to_their_own_newest_entries() -> None:
    # a group whose heads are not neighbours, and one whose budget bites later
    method = Toy(budgets=(((3, 0), 4), ((1, 2), 11)))
    outs = run(new_cache(method))
    for scale, out in enumerate(outs):
        q = parts(scale)[0]
        k, v = every(scale + 1)
        for head in range(4):
            n = 4 if head in (0, 3) else 11
            expected = attention(q[:, head], k[:, head, -n:], v[:, head, -n:])
            torch.testing.assert_close(out[:, head], expected, rtol=1e-5, atol=1e-6)


def test_dropped_entries_never_come_back_and_the_kept_ones_are_bit_exact() -> None:
    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        # another place for every row and head, so that a mistake in gathering shows
        n = ctx.k.shape[2]
        generator = torch.Generator().manual_seed(n)
        draw = torch.rand(*ctx.k.shape[:3], generator=generator)
        return Retain(draw.argsort(-1)[..., : group.budget].sort(-1).values)

    method = Toy(chosen=chosen)
    cache = new_cache(method)
    run(cache, until=3)
    k, v = every(4)
    scale, position = cache.entries(0)
    assert position.shape == (2, 4, 6)
    assert (position.diff(dim=-1) > 0).all()
    assert torch.equal(scale, torch.tensor([0] + [1] * 4 + [2] * 9)[position])
    cache.begin(3)
    cache.attend(0, *parts(3))
    ctx, _ = method.seen[-1]
    for place, name in ((k, "k"), (v, "v")):
        index = ctx.position[..., None].expand(-1, -1, -1, 8)
        assert torch.equal(getattr(ctx, name), place.gather(2, index)), name
    assert torch.equal(ctx.position[..., :6], position)
    assert (ctx.position[..., 6:] == torch.arange(14, 30)).all()
    assert ctx.entry_scale is not None
    assert (ctx.entry_scale[..., 6:] == 3).all()
    assert ctx.valid.all()


def test_a_method_sees_everything_the_protocol_lists() -> None:
    method = Toy()
    run(new_cache(method, is_guided=True), layers=(0, 1))
    assert [(ctx.layer, ctx.step) for ctx, _ in method.seen] == [(0, 2), (1, 2), (0, 3), (1, 3)]
    ctx, group = method.seen[0]
    assert (group.heads, group.budget) == ((0, 1, 2, 3), 6)
    assert torch.equal(ctx.q, parts(2)[0])
    assert ctx.q_position.tolist() == [list(range(5, 14))] * 2
    assert ctx.scale_shapes == SHAPES
    assert ctx.scale == 1.0
    assert ctx.has_guidance_pairs
    assert ctx.attention_mass is None
    # one dict per layer, alive from scale to scale
    assert method.seen[2][0].state is ctx.state
    assert method.seen[1][0].state is not ctx.state


def test_a_method_is_asked_only_where_there_are_more_entries_than_its_budget() -> None:
    method = Toy(budgets=(((0, 1), 14), ((2, 3), 5)))
    run(new_cache(method))
    assert [(ctx.step, group.heads) for ctx, group in method.seen] == [(2, (2, 3)), (3, (0, 1)), (3, (2, 3))]


def test_two_generations_interleaved_do_not_touch_each_other() -> None:
    method = Toy(wants=CacheNeeds(attention_mass=True, n_queries=3))
    alone = run(new_cache(method))
    caches = [new_cache(method), new_cache(Toy(budgets=(((0, 1, 2, 3), 3),)))]
    mixed: list[list[Tensor]] = [[], []]
    for scale in range(4):
        for cache, outs in zip(caches, mixed, strict=True):
            cache.begin(scale)
            outs.append(cache.attend(0, *parts(scale)))
    assert all(torch.equal(a, b) for a, b in zip(alone, mixed[0], strict=True))
    assert not torch.equal(alone[3], mixed[1][3])


# --- what attention reads -----------------------------------------------------------------------------------------------------


def test_attention_may_read_other_entries_than_those_that_stay() -> None:
    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        first = torch.arange(group.budget).expand(*ctx.k.shape[:2], -1)
        return Retain(first, attend_index=newest(ctx, group, 8).cache_index)

    cache = new_cache(Toy(chosen=chosen))
    outs = run(cache, until=3)
    k, v = every(3)
    torch.testing.assert_close(outs[2], attention(parts(2)[0], k[:, :, -8:], v[:, :, -8:]), rtol=1e-5, atol=1e-6)
    assert cache.entries(0)[1][0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_padding_of_an_answer_is_neither_read_nor_valid_later() -> None:
    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        retain = newest(ctx, group)
        ok = torch.ones_like(retain.cache_index, dtype=torch.bool)
        ok[1, 2, :4] = False
        return Retain(retain.cache_index, ok=ok if ctx.step == 2 else None)

    method = Toy(chosen=chosen)
    cache = new_cache(method)
    outs = run(cache, until=3)
    k, v = every(3)
    torch.testing.assert_close(outs[2][1, 2], attention(parts(2)[0], k[:, :, -2:], v[:, :, -2:])[1, 2], rtol=1e-5, atol=1e-6)
    assert cache.entries(0)[1][1, 2].tolist() == [-1, -1, -1, -1, 12, 13]
    cache.begin(3)
    cache.attend(0, *parts(3))
    assert (~method.seen[-1][0].valid).nonzero().tolist() == [[1, 2, i] for i in range(4)]


def test_a_merge_replaces_its_anchors_by_weighted_sums_and_nothing_else() -> None:
    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        retain = newest(ctx, group)
        # entry 10 becomes ¼ of itself and ¾ of entry 1; entry 12 becomes entry 0; the last row of the merge is padding
        names = [torch.tensor(row).expand(*ctx.k.shape[:2], -1) for row in ([10, 10, 12, 11], [10, 1, 0, 3])]
        weight = torch.tensor([0.25, 0.75, 1.0, 0.0]).expand(*ctx.k.shape[:2], -1)
        return Retain(retain.cache_index, merge=Merge(*names, weight), renorm_keys=True) if ctx.step == 2 else retain

    method = Toy(chosen=chosen)
    outs = run(new_cache(method))
    k, v = every(3)
    k_new, v_new = k.clone(), v.clone()
    k_new[:, :, 10] = F.normalize(k[:, :, 10] / 4 + k[:, :, 1] * 0.75, dim=-1)
    v_new[:, :, 10] = v[:, :, 10] / 4 + v[:, :, 1] * 0.75
    k_new[:, :, 12], v_new[:, :, 12] = F.normalize(k[:, :, 0], dim=-1), v[:, :, 0]
    torch.testing.assert_close(outs[2], attention(parts(2)[0], k_new[:, :, -6:], v_new[:, :, -6:]), rtol=1e-5, atol=1e-6)
    # the merged rows are what the next scale inherits
    ctx, _ = method.seen[-1]
    torch.testing.assert_close(ctx.k[:, :, :6], k_new[:, :, -6:])
    for place in (9, 11, 13):
        assert torch.equal(ctx.k[:, :, place - 8], k[:, :, place]), "rows that are no anchors stay bit for bit"


def test_compression_behind_attention_leaves_this_scale_whole() -> None:
    method = Toy(moments=(When("after_prefill"),))
    cache = new_cache(method)
    outs = run(cache)
    for scale in (0, 1, 2):
        torch.testing.assert_close(outs[scale], attention(parts(scale)[0], *every(scale + 1)), rtol=1e-5, atol=1e-6)
    k, v = every(4)
    torch.testing.assert_close(outs[3], attention(parts(3)[0], k[:, :, 8:], v[:, :, 8:]), rtol=1e-5, atol=1e-6)
    # nothing is kept behind the last scale, so nobody is asked
    assert [ctx.step for ctx, _ in method.seen] == [2]


def test_every_n_steps_counts_scales() -> None:
    method = Toy(moments=(When("every_n_steps", 2),), budgets=(((0, 1, 2, 3), 2),))
    run(new_cache(method))
    assert [ctx.step for ctx, _ in method.seen] == [1]


def test_attend_index_behind_attention_is_an_error() -> None:
    method = Toy(
        moments=(When("after_prefill"),),
        chosen=lambda ctx, group: Retain(newest(ctx, group).cache_index, attend_index=newest(ctx, group).cache_index),
    )
    with pytest.raises(PatchError, match="asked behind attention"):
        run(new_cache(method))


# --- what a host records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 1 << 24], ids=["row by row", "at once"])
def test_attention_mass_is_what_the_entries_have_received(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accel.patches.hosts.entries.MAX_MATRIX_ELEMENTS", chunk)
    method = Toy(wants=CacheNeeds(attention_mass=True))
    run(new_cache(method))
    mass = torch.zeros(2, 4, 30)
    for scale in range(3):
        q, n = parts(scale)[0], STARTS[scale + 1]
        keys, first = every(scale + 1)[0], max(0, n - 6)
        mass[:, :, first:n] += (q @ keys[:, :, first:].mT).softmax(-1).sum(2)
        ctx = next((ctx for ctx, _ in method.seen if ctx.step == scale + 1), None)
        if ctx is not None:
            assert ctx.attention_mass is not None
            torch.testing.assert_close(ctx.attention_mass, mass.gather(2, ctx.position), rtol=1e-5, atol=1e-5)
    # every query hands out one: 1 + 4 before scale 2
    torch.testing.assert_close(method.seen[0][0].attention_mass.sum(-1), torch.full((2, 4), 5.0))  # type: ignore[union-attr]


def test_mass_counts_only_what_attention_read() -> None:
    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        return Retain(newest(ctx, group).cache_index, attend_index=torch.arange(9).expand(*ctx.k.shape[:2], -1))

    method = Toy(wants=CacheNeeds(attention_mass=True), chosen=chosen)
    run(new_cache(method))
    before, after = (method.seen[i][0].attention_mass for i in (0, 1))
    assert before is not None
    assert after is not None
    # scale 2 read entries 0…8 and kept 8…13: of these only entry 8 has received anything
    assert (after[..., 0] > 0).all()
    assert (after[..., 1:] == 0).all()


def test_a_scale_shows_its_own_queries_however_many_a_method_asks_of_decoders() -> None:
    method = Toy(wants=CacheNeeds(n_queries=12))
    run(new_cache(method))
    first, second = (ctx for ctx, _ in method.seen)
    assert torch.equal(first.q, parts(2)[0])
    assert first.q_position[0].tolist() == list(range(5, 14))
    assert torch.equal(second.q, parts(3)[0])


def test_moments_behind_attention_are_for_hosts_that_cannot_ask_before() -> None:
    method = Toy(moments=(When("before_attention"), When("after_prefill"), When("every_n_steps", 1)))
    run(new_cache(method))
    assert [(ctx.step, ctx.k.shape[2]) for ctx, _ in method.seen] == [(2, 14), (3, 22)]


# --- bytes --------------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_kept_entries_and_fall_with_the_budget() -> None:
    counters = CacheStats()
    cache = new_cache(Toy(budgets=(((0, 1), 4), ((2, 3), 7))), counters=counters)
    expected = {0: 0, 1: 0, 2: 0, 3: 0}
    for scale in range(4):
        cache.begin(scale)
        for layer in (0, 1):
            cache.attend(layer, *parts(scale))
        # 2 rows × 2 heads × (K and V) × 8 channels × 4 bytes, and where something was dropped a position of 4 bytes per entry
        per_entry = 2 * 2 * 2 * 8 * 4
        for budget in (4, 7):
            n = min(budget, STARTS[scale + 1])
            is_dropped = STARTS[scale + 1] > budget
            expected[scale] += 2 * n * (per_entry + (2 * 2 * 4 if is_dropped else 0))
        assert cache.cache_bytes() == (expected[scale] if scale < 3 else 0)
    # at the last scale the layers give back their memory one after the other
    assert counters.bytes_by_scale == {**expected, 3: expected[2]}
    assert counters.peak_bytes == expected[2] < counters.whole_bytes == 2 * 2 * 4 * 2 * 8 * 4 * 14
    assert counters.total == {0: 16, 1: 80, 2: 224, 3: 480}
    assert counters.attended == {0: 16, 1: 4 * 2 * (4 + 5), 2: 4 * 2 * 11, 3: 4 * 2 * 11}
    assert counters.cached == {0: 16, 1: 4 * 2 * 9, 2: 4 * 2 * 11, 3: 0}
    assert counters.kept_share == 11 / 60


def test_tensors_in_a_methods_state_count_as_memory() -> None:
    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        ctx.state.update(notes=torch.zeros(25), step=ctx.step)
        return newest(ctx, group)

    caches = [new_cache(Toy(chosen=one)) for one in (None, chosen)]
    for cache in caches:
        run(cache, until=3)
    assert caches[1].cache_bytes() == caches[0].cache_bytes() + 100


def test_padding_stays_padding_whatever_a_later_answer_says() -> None:
    q, k, v = parts(1)
    index = torch.arange(4).expand(2, 4, -1)
    first = Entries(k, v).at(index, ok=index != 2)
    assert first.valid is not None
    for ok in (None, torch.ones_like(index, dtype=torch.bool)):
        assert torch.equal(first.at(index, ok).validity(), first.valid)
    torch.testing.assert_close(first.received(q, 1.0)[..., 2], torch.zeros(2, 4))


def test_attention_mass_is_summed_in_full_precision_under_autocast() -> None:
    q, k, v = parts(3)
    exact = Entries(k, v).received(q, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Entries(k, v).received(q, 1.0), exact)


def test_a_fresh_entry_is_no_view_of_a_larger_tensor() -> None:
    wide = torch.randn(2, 4, 3, 24)
    entries = Entries(wide[..., :8], wide[..., 8:16]).owned()
    assert sum(t.untyped_storage().nbytes() for t in entries.tensors()) == 2 * 2 * 4 * 3 * 8 * 4
    assert torch.equal(entries.v, wide[..., 8:16])
    assert entries.owned().k is entries.k


def test_the_memory_of_dropped_entries_is_free() -> None:
    method = Toy()
    cache = new_cache(method)
    run(cache, until=3)
    whole = [weakref.ref(t) for ctx, _ in method.seen for t in (ctx.k, ctx.v)]
    assert all(t() is not None for t in whole)
    method.seen.clear()
    gc.collect()
    assert not any(t() is not None for t in whole)
    assert cache.entries(0)[1].shape == (2, 4, 6)


def test_layers_with_room_for_everything_are_left_to_the_plain_cache() -> None:
    @dataclass(frozen=True, kw_only=True)
    class SecondLayer(Toy):
        def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
            return [HeadGroup((0, 1), 30), HeadGroup((2, 3), 30 if layer == 0 else 5)]

    method = SecondLayer()
    outs, plain = run(new_cache(method), layers=(0, 1)), run(ScaleCache(Schedule(SHAPES)))
    assert all(torch.equal(a, b) for a, b in zip(outs, plain, strict=True))
    assert {ctx.layer for ctx, _ in method.seen} == {1}


def test_a_method_that_asks_for_every_step_looks_at_those_that_fit_and_shares_what_it_saw_among_layers() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Watcher(Toy):
        looked: list[tuple[int, int, int]] = field(default_factory=list, compare=False)
        handed: list[dict[str, Any] | None] = field(default_factory=list, compare=False)

        def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
            self.handed.append(None if shared is None else dict(shared))
            return super().groups(model, layer, step=step, n_entries=n_entries)

        def observe(self, ctx: CompressionContext, group: HeadGroup) -> None:
            self.looked.append((ctx.layer, ctx.step, ctx.k.shape[2]))
            ctx.shared[str((ctx.layer, ctx.step))] = True

    method = Watcher(wants=CacheNeeds(every_step=True), budgets=(((0, 1, 2, 3), 14),))
    run(new_cache(method), layers=(0, 1))
    assert method.looked == [(layer, step, n) for step, n in enumerate((1, 5, 14)) for layer in (0, 1)]
    # the last scale does not fit: `select` sees it
    assert [(ctx.layer, ctx.step) for ctx, _ in method.seen] == [(0, 3), (1, 3)]
    assert [sorted(shared) for shared in method.handed if shared][:2] == [["(0, 0)"], ["(0, 0)", "(1, 0)"]]
    # another generation knows nothing of this one; one that asks for less is not shown what fits
    for wants, looks in ((CacheNeeds(every_step=True), 6), (CacheNeeds(), 0)):
        other = Watcher(wants=wants, budgets=(((0, 1, 2, 3), 14),))
        run(new_cache(other), layers=(0, 1))
        assert len(other.looked) == looks
        assert next(shared for shared in other.handed if shared is not None) == {}


def test_a_layer_may_be_released_early_and_starts_anew() -> None:
    method = Toy(released=1, budgets=(((0, 1, 2, 3), 20),))
    cache = new_cache(method)
    outs = run(cache, until=2)
    assert cache.cache_bytes() == 0
    cache.begin(2)
    q, k, v = parts(2)
    torch.testing.assert_close(cache.attend(0, q, k, v), attention(q, k, v), rtol=1e-5, atol=1e-6)
    assert cache.entries(0)[1][0, 0].tolist() == list(range(5, 14))
    assert len(outs) == 2


# --- broken answers and orders ------------------------------------------------------------------------------------------------


def broken(make: Callable[[Tensor], Retain]) -> Toy:
    return Toy(chosen=lambda ctx, group: make(newest(ctx, group).cache_index.clone()))


@pytest.mark.parametrize(
    "method, message",
    [
        (broken(lambda index: Retain(index[..., 1:])), r"must have the shape \(2, 4, 6\), got \(2, 4, 5\)"),
        (broken(lambda index: Retain(index.flip(-1))), "must ascend"),
        (broken(lambda index: Retain(index - index[..., :1] - 1)), "must ascend within the 14"),
        (broken(lambda index: Retain(index + 1)), "must ascend within the 14"),
        (broken(lambda index: Retain(index, attend_index=index[..., :0])), "at least one entry"),
        (broken(lambda index: Retain(index, ok=torch.zeros_like(index, dtype=torch.bool))), "left without an entry"),
        (Toy(budgets=(((0, 1, 2), 6),)), "each of its 4 heads once"),
        (Toy(budgets=(((0, 1, 2, 3), 6), ((3,), 2))), "each of its 4 heads once"),
        (Toy(budgets=(((0, 1, 2, 3), 0),)), "below one entry"),
    ],
    ids=["too few", "not ascending", "negative", "too high", "nothing to attend", "nothing valid", "head missing", "head twice", "no budget"],
)
def test_answers_that_break_the_protocol_raise(method: Toy, message: str) -> None:
    with pytest.raises(PatchError, match=message):
        run(new_cache(method))


def test_a_second_generation_and_scales_out_of_order_raise() -> None:
    cache = new_cache(Toy())
    run(cache)
    with pytest.raises(PatchError, match="one generation"):
        cache.begin(0)
    skipped = new_cache(Toy())
    skipped.begin(0)
    skipped.begin(1)
    with pytest.raises(PatchError, match="layer 0 has seen 0 of the 1"):
        skipped.attend(0, *parts(1))
    with pytest.raises(PatchError, match="no scale was begun"):
        new_cache(Toy()).attend(0, *parts(0))


def test_an_exception_in_a_method_frees_the_cache_and_leaves_the_model_usable() -> None:
    model = tiny_var()
    plain = model.generate([1], seed=0, output="tensor")

    def fails(ctx: CompressionContext, group: HeadGroup) -> Retain:
        raise RuntimeError("broken")

    with patched(model, Toy(chosen=fails)) as handle:
        with pytest.raises(RuntimeError, match="broken"):
            model.generate([1], seed=0)
        with handle.paused():
            assert torch.equal(model.generate([1], seed=0, output="tensor"), plain)
    assert torch.equal(model.generate([1], seed=0, output="tensor"), plain)


# --- whole models -------------------------------------------------------------------------------------------------------------


class Masked(ScaleCache):
    """The definition: a full cache, and per head a mask of what the newest `n` entries so far are."""

    def __init__(self, schedule: Schedule, n: int) -> None:
        super().__init__(schedule)
        self.n = n

    def update(self, layer: int, k: Tensor, v: Tensor, *, query: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, _ = super().update(layer, k, v, query=query)
        visible = torch.arange(k.shape[2]) >= k.shape[2] - self.n
        return k, v, visible.expand(query.shape[2] if query is not None else 1, -1)


def test_a_generation_equals_a_full_cache_under_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    with patched(model, Toy(budgets=(((0, 2), 7), ((1, 3), 7)))):
        compressed = last_logits(model, [1, 2])
    monkeypatch.setattr(model, "new_cache", lambda schedule, **_: Masked(schedule, 7))
    torch.testing.assert_close(compressed, last_logits(model, [1, 2]), rtol=1e-4, atol=1e-5)


def test_guidance_is_told_and_without_it_there_are_no_pairs() -> None:
    model, method = tiny_var(), Toy()
    with patched(model, method):
        model.generate_codes([1, 2], seed=0)
        model.generate_codes([1, 2], seed=0, guidance_scale=0)
    assert [(ctx.has_guidance_pairs, len(ctx.k)) for ctx, _ in method.seen[::4]] == [(True, 4), (False, 2)]


def test_the_hack_skeleton_runs_with_unequal_groups_and_merges() -> None:
    for model, options in ((tiny_var(), {}), (tiny_infinity(), {"schedule": [1, 2, 3, 4]})):
        with accel.apply(model, skeletons.HACK(keep=0.5, renorm_keys=True)) as handle:
            inputs: Any = [1, 2] if isinstance(model, VAR) else [torch.randn(5, 24, generator=torch.Generator().manual_seed(0))] * 2
            outs = [model.generate(inputs, seed=0, output="tensor", **options) for _ in range(2)]
        assert torch.equal(*outs)
        # budgets 5 and 25 of 30, half of the heads each, 4 rows, 4 heads, 2 layers, two generations
        assert handle.stats.cache.attended[3] == 2 * 4 * 2 * 2 * (5 + 25)


def test_scores_are_computed_in_full_precision_under_autocast() -> None:
    found: list[torch.dtype] = []

    def chosen(ctx: CompressionContext, group: HeadGroup) -> Retain:
        found.append((ctx.q.float() @ ctx.k.float().mT).dtype)
        return newest(ctx, group)

    model = tiny_var()
    method = Toy(chosen=chosen, wants=CacheNeeds(attention_mass=True))
    with patched(model, method), torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate_codes([1], seed=0)
    assert set(found) == {torch.float32}
    ctx = method.seen[0][0]
    assert ctx.k.dtype == torch.bfloat16
    assert ctx.attention_mass is not None
    assert ctx.attention_mass.dtype == torch.float32
