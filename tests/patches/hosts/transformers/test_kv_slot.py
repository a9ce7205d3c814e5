"""What a cache method is shown behind attention, when it is asked, and what happens to an answer that breaks the protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from conformance.families import instance, text_config
from conformance.kv_runs import CACHE, Uneven, groups_of, small
from support import tiny_llama
from torch import Tensor
from transformers import DynamicCache

import accel
from accel.errors import PatchError
from accel.patches._cache import attention_of
from accel.protocols import UNLIMITED, CacheNeeds, CompressionContext, HeadGroup, ModelInfo, Retain, When


@dataclass(frozen=True, kw_only=True)
class Spy(Uneven):
    """Notes every question. wanted: queries; answers: in the place of `Uneven`'s."""

    wanted: int = 0
    mass: bool = False
    every_step: bool = False
    moments: tuple[str, ...] = ("after_prefill", "every_n_steps")
    asked: list[tuple[str, CompressionContext, HeadGroup]] = field(default_factory=list, compare=False)
    change: Callable[[Retain, CompressionContext], Retain] | None = None
    regroup: Callable[[list[HeadGroup], int], list[HeadGroup]] | None = None

    @property
    def when(self) -> tuple[When, ...]:
        return tuple(When(moment, self.every if moment == "every_n_steps" else None) for moment in self.moments)     # type: ignore[arg-type]

    def needs(self) -> CacheNeeds:
        return CacheNeeds(n_queries=self.wanted, attention_mass=self.mass, every_step=self.every_step)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        found = super().groups(model, layer, step=step, n_entries=n_entries, shared=shared)
        return found if self.regroup is None else self.regroup(found, step)

    def observe(self, ctx: CompressionContext, group: HeadGroup) -> None:
        self.asked.append(("observe", ctx, group))

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        self.asked.append(("select", ctx, group))
        found = super().select(ctx, group)
        return found if self.change is None else self.change(found, ctx)

    def of(self, layer: int, head: int) -> list[CompressionContext]:
        return [ctx for _, ctx, group in self.asked if ctx.layer == layer and head in group.heads]


def ids(length: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(2, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def passes(model: Any, method: Spy, *lengths: int, mask: Tensor | None = None) -> DynamicCache:
    held, text = DynamicCache(config=model.config), ids(sum(lengths), batch=1 if mask is None else len(mask))
    with accel.apply(model, method):
        for i, length in enumerate(lengths):
            past = sum(lengths[:i])
            own = None if mask is None else mask[:, : past + length]
            model(text[:, past : past + length], attention_mask=own, **{CACHE: held})
    return held


# --- when it is asked ----------------------------------------------------------------------------------------------------------


def steps_asked(spy: Spy) -> list[tuple[str, int, int]]:
    """(question, decoding step, entries) of one head of layer 1."""
    return [(what, ctx.step, ctx.k.shape[2]) for what, ctx, group in spy.asked if ctx.layer == 1 and 0 in group.heads]


def test_it_is_asked_behind_the_prompt_and_every_n_steps() -> None:
    spy = Spy(few=20, many=20, every=3)
    passes(tiny_llama(), spy, 50, *[1] * 7, 9, *[1] * 4)
    # a second turn counts as a prompt, and steps begin anew behind it
    assert steps_asked(spy) == [("select", 0, 50), ("select", 3, 23), ("select", 6, 23), ("select", 0, 30), ("select", 3, 23)]


def test_moments_that_it_does_not_name_are_not_asked() -> None:
    spy = Spy(few=20, many=20, every=2, moments=("every_n_steps",))
    held = passes(tiny_llama(), spy, 50, 1, 1, 1)
    assert steps_asked(spy) == [("select", 2, 52)]
    assert len(groups_of(held, 1)[0]) == 21
    spy = Spy(few=20, many=20, every=2, moments=("after_prefill",))
    held = passes(tiny_llama(), spy, 50, *[1] * 6)
    assert steps_asked(spy) == [("select", 0, 50)]
    assert len(groups_of(held, 1)[0]) == 26


def test_groups_that_fit_are_observed_where_it_wants_to_see_every_step() -> None:
    spy = Spy(few=20, many=60, every=2, every_step=True)
    passes(tiny_llama(), spy, 50, 1, 1, 1, 1)
    for head in (0, 1):
        found = [(what, ctx.k.shape[2]) for what, ctx, group in spy.asked if ctx.layer == 1 and head in group.heads]
        assert found in ([("select", 50), ("select", 22), ("select", 22)], [("observe", 50), ("observe", 52), ("observe", 54)])
    assert {what for what, _, _ in spy.asked} == {"select", "observe"}


def test_unlimited_budgets_leave_the_model_alone() -> None:
    model = tiny_llama()
    with accel.apply(model, Spy(few=UNLIMITED, many=UNLIMITED)) as handle:
        assert "keeps every cache entry" in handle.report()
        assert not handle.patched_layers


def test_the_budget_counts_the_whole_conversation_also_what_is_gone() -> None:
    seen: list[tuple[int, int]] = []

    @dataclass(frozen=True, kw_only=True)
    class Counting(Spy):
        def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Any = None) -> list[HeadGroup]:
            if layer == 1 and n_entries > 1:
                seen.append((step, n_entries))
            return super().groups(model, layer, step=step, n_entries=n_entries, shared=shared)

    passes(tiny_llama(), Counting(few=20, many=20, every=2), 50, 1, 1, 1, 9, 1, 1)
    assert seen == [(0, 50), (2, 50), (0, 62), (2, 62)]


# --- what it is shown ----------------------------------------------------------------------------------------------------------


def test_queries_are_the_newest_of_the_prompt_then_those_of_the_steps() -> None:
    spy = Spy(few=20, many=20, every=2, wanted=5)
    passes(tiny_llama(), spy, 50, *[1] * 8)
    shown = [ctx.q_position[0].tolist() for ctx in spy.of(1, 0)]
    # a ring of the newest decoding queries, which evictions do not empty
    assert shown == [[45, 46, 47, 48, 49], [50, 51], [50, 51, 52, 53], [51, 52, 53, 54, 55], [53, 54, 55, 56, 57]]
    assert all(ctx.q.shape[2] == ctx.q_position.shape[1] for ctx in spy.of(1, 0))


def test_a_short_last_chunk_is_filled_with_queries_from_before() -> None:
    spy = Spy(few=20, many=20, wanted=8)
    passes(tiny_llama(), spy, 30, 3, 2)
    assert [ctx.q_position[0].tolist() for ctx in spy.of(1, 0)] == [[*range(22, 30)], [30, 31, 32], [30, 31, 32, 33, 34]]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_queries_and_keys_are_those_that_attention_reads(family: str) -> None:
    """The weights that they give are the model's own: norms, rotation, scale and soft-capping are in them."""
    sizes: dict[str, Any] = {"layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}
    if family == "llama":
        model: Any = instance("LlamaForCausalLM", text_config("LlamaConfig"), attention="eager")
    else:
        model = instance("Gemma2ForCausalLM", text_config("Gemma2Config", **sizes), attention="eager")
    with torch.no_grad():
        weights = model(ids(60), output_attentions=True).attentions
    spy = Spy(few=20, many=25, wanted=6)
    passes(model, spy, 60)
    assert spy.asked
    for _, ctx, group in spy.asked:
        assert ctx.softcap == (None if family == "llama" else 5.0)
        q = ctx.q.view(1, len(group.heads), 2, 6, 16)
        logits = q @ ctx.k.mT[:, :, None] * ctx.scale
        logits = logits if ctx.softcap is None else ctx.softcap * torch.tanh(logits / ctx.softcap)
        hidden = ctx.position[:, :, None, None] > ctx.q_position[:, None, None, :, None]
        found = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        want = weights[ctx.layer].view(1, 2, 2, 60, 60)[:, list(group.heads), :, -6:]
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
        # and so are those that methods score by
        torch.testing.assert_close(attention_of(ctx, torch.arange(6)), want.flatten(2, 3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "left padding", "right padding", "softcap"])
def test_mass_is_the_column_sum_of_the_models_own_attention(kind: str) -> None:
    sizes: dict[str, Any] = {"layer_types": ["full_attention"] * 3, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}
    if kind == "softcap":
        model: Any = instance("Gemma2ForCausalLM", text_config("Gemma2Config", **sizes), attention="eager")
    else:
        model = instance("LlamaForCausalLM", text_config("LlamaConfig"), attention="eager")
    mask = torch.ones(2, 62, dtype=torch.int64)
    if "padding" in kind:
        mask[1, slice(0, 21) if kind == "left padding" else slice(35, 60)] = 0
    spy = Spy(few=20, many=25, mass=True, every=2, moments=("every_n_steps",))
    # the whole cache, filled in three ways: a prompt, a chunk, two steps
    passes(model, spy, 40, 20, 1, 1, mask=mask)
    with torch.no_grad():
        weights = model(ids(62, batch=2), attention_mask=mask, output_attentions=True).attentions
    real = mask.bool()
    assert spy.asked
    for _, ctx, group in spy.asked:
        # padding neither gives nor takes
        own = weights[ctx.layer].view(2, 2, 2, 62, 62)[:, list(group.heads)] * real[:, None, None, :, None]
        assert ctx.attention_mass is not None
        torch.testing.assert_close(ctx.attention_mass, own.sum((2, 3)) * real[:, None], rtol=1e-4, atol=1e-5)
        assert torch.equal(ctx.valid, real[:, None].expand_as(ctx.valid))


def test_snapkv_keeps_what_the_models_own_attention_says() -> None:
    model: Any = instance("LlamaForCausalLM", text_config("LlamaConfig"), attention="eager")
    held, window, keep = DynamicCache(config=model.config), 6, 16
    with torch.no_grad():
        weights = model(ids(60), output_attentions=True).attentions
        with accel.apply(model, small("snapkv", keep=keep, window=window, kernel=3)):
            model(ids(60), **{CACHE: held})
    for number in range(3):
        # (KV heads, entries): votes of the window's queries, which rank nobody by their own entries
        votes = weights[number][0].view(2, 2, 60, 60)[:, :, -window:].sum((1, 2))
        votes[:, -window:] = 0
        pooled = torch.nn.functional.max_pool1d(votes, 3, stride=1, padding=1)
        for head, row in enumerate(pooled[:, :-window]):
            best = row.argsort(descending=True, stable=True)[: keep - window].sort().values.tolist()
            assert groups_of(held, number)[0].positions()[0, head].tolist() == [*best, *range(60 - window, 60)]


def test_mass_goes_on_behind_an_eviction() -> None:
    spy = Spy(few=20, many=25, mass=True, every=2)
    passes(tiny_llama(), spy, 50, *[1] * 4, 6)
    for head in (0, 1):
        before, *later = spy.of(1, head)
        assert before.attention_mass is not None
        assert float(before.attention_mass[0, 0].sum()) == pytest.approx(2 * 50, rel=1e-4)
        for ctx in later:
            assert ctx.attention_mass is not None
            assert before.attention_mass is not None
            # every query gives 1 for each query head, spread over what is left
            old = dict(zip(before.position[0, 0].tolist(), before.attention_mass[0, 0].tolist(), strict=True))
            kept = [old[place] for place in ctx.position[0, 0].tolist() if place in old]
            n_new = int((ctx.position[0, 0] > before.position[0, 0].max()).sum())
            assert float(ctx.attention_mass[0, 0].sum()) == pytest.approx(sum(kept) + 2 * n_new, rel=1e-4)
            before = ctx


def test_groups_share_state_and_layers_share_plain_values() -> None:
    spy = Spy(few=20, many=25)
    passes(tiny_llama(), spy, 50, 1, 1)
    states = {id(ctx.state) for _, ctx, _ in spy.asked if ctx.layer == 1}
    assert len(states) == 1
    assert len({id(ctx.shared) for _, ctx, _ in spy.asked}) == 1
    assert {ctx.layer for _, ctx, _ in spy.asked} == {0, 1, 2}


# --- answers that break the protocol -------------------------------------------------------------------------------------------


def changed(**parts: Callable[[Tensor], Any]) -> Callable[[Retain, CompressionContext], Retain]:
    return lambda retain, ctx: replace(retain, **{name: part(retain.cache_index) for name, part in parts.items()})


WRONG: dict[str, Callable[[Retain, CompressionContext], Retain]] = {
    "too few": changed(cache_index=lambda index: index[..., 1:]),
    "one row": changed(cache_index=lambda index: index[:0]),
    "twice the same": changed(cache_index=lambda index: torch.cat([index[..., :1], index[..., :-1]], -1)),
    "not in order": changed(cache_index=lambda index: index.flip(-1)),
    "below 0": changed(cache_index=lambda index: torch.cat([index[..., :1] * 0 - 1, index[..., 1:]], -1)),
    "past the end": changed(cache_index=lambda index: torch.cat([index[..., :-1], index[..., -1:] * 0 + 500], -1)),
    "nothing that is there": changed(ok=lambda index: torch.zeros_like(index, dtype=torch.bool)),
    "asked behind attention": changed(attend_index=lambda index: index),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_a_wrong_answer_raises_and_the_model_stays_usable(wrong: str) -> None:
    model = tiny_llama()
    with pytest.raises(PatchError, match="test_kv_slot: "):
        passes(model, Spy(change=WRONG[wrong]), 50)
    spy = Spy()
    passes(model, spy, 50, 1)
    assert spy.asked


REGROUPED: dict[str, tuple[Callable[[list[HeadGroup], int], list[HeadGroup]], str]] = {
    "a head is missing": (lambda groups, step: groups[:1], "each of its 2 KV heads once"),
    "a head twice": (lambda groups, step: [*groups, groups[0]], "each of its 2 KV heads once"),
    "an empty budget": (lambda groups, step: [replace(groups[0], budget=0), *groups[1:]], "below one entry"),
    "others later": (lambda groups, step: groups if step == 0 else groups[::-1], "changed within a request"),
}


@pytest.mark.parametrize("kind", list(REGROUPED))
def test_wrong_groups_raise(kind: str) -> None:
    regroup, message = REGROUPED[kind]
    with pytest.raises(PatchError, match=message):
        passes(tiny_llama(), Spy(regroup=regroup), 50, 1, 1)


def test_an_error_of_the_method_in_a_step_leaves_the_model_usable() -> None:
    model = tiny_llama()
    want = passes(model, Spy(), 50, 1, 1, 1)

    def fail(retain: Retain, ctx: CompressionContext) -> Retain:
        if ctx.step:
            raise ZeroDivisionError
        return retain

    with pytest.raises(ZeroDivisionError):
        passes(model, Spy(change=fail), 50, 1, 1)
    got = passes(model, Spy(), 50, 1, 1, 1)
    for number in range(3):
        for one, other in zip(groups_of(got, number), groups_of(want, number), strict=True):
            assert torch.equal(one.k, other.k)


def test_methods_of_scales_are_refused_on_decoders() -> None:
    with pytest.raises(accel.UnsupportedError, match="next-scale"):
        accel.apply(tiny_llama(), "cake")
    with pytest.raises(accel.UnsupportedError, match="before attention only"):
        accel.apply(tiny_llama(), Spy(moments=("before_attention",)))
    assert small("snapkv")
