"""The VAR class of FoundationVision: what is known as one, that methods see what they see on our VAR, and that nothing stays on the model."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from next_scale import INFO, tiny_infinity, tiny_var
from official_var import SIDES, Attention, OfficialVAR, official_var
from torch import Tensor, nn

import accel
from accel.errors import PatchError, UnsupportedError
from accel.models.var import VAR
from accel.patches.hosts.nextscale import official
from accel.patches.hosts.nextscale.cache import CompressedCache
from accel.patching import host_for, hosts
from accel.protocols import CompressionContext, HeadGroup, KVCompression
from accel.registry import method_class, method_names

METHODS = [name for name in method_names() if issubclass(method_class(name), KVCompression)]
KINDS = {"ada per block": {}, "shared ada": {"is_shared": True}, "no norm": {"is_normalised": False}, "three blocks": {"depth": 3}}


def picture(model: Any, **options: Any) -> Tensor:
    return model.autoregressive_infer_cfg(2, [1, 2], **{"g_seed": 0, **options})


def ours(model: OfficialVAR) -> VAR:
    """Our VAR with the same weights."""
    return VAR.from_original(model.state_dict(), model.vae_proxy[0].state_dict(), schedule=SIDES)


@contextmanager
def logits_of(head: nn.Module) -> Iterator[list[Tensor]]:
    """Fills a list with the logits (rows, n, codes) of every scale, guidance rows included."""
    found: list[Tensor] = []
    hook = head.register_forward_hook(lambda module, inputs, output: found.append(output.float()))
    try:
        yield found
    finally:
        hook.remove()


def logits(model: OfficialVAR) -> list[Tensor]:
    with logits_of(model.head) as found:
        picture(model)
    return found


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def attributes(model: OfficialVAR) -> list[dict[str, Any]]:
    return [dict(vars(module)) for module in model.modules()]


def are_the_same_objects(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> bool:
    return all(a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in zip(before, after, strict=True))


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request: pytest.FixtureRequest) -> OfficialVAR:
    return official_var(**request.param)


# --- which models -------------------------------------------------------------------------------------------------------------


def test_the_class_belongs_to_one_host_and_is_described_as_our_var(model: OfficialVAR) -> None:
    assert [host.__name__.split(".")[-2] for host in hosts() if host.matches(model)] == ["nextscale"]
    depth = len(model.blocks)
    expected = replace(INFO, n_layers=depth, layer_types=("full_attention",) * depth)
    assert replace(host_for(model).describe(model), fingerprint=None) == expected


def test_the_fingerprint_is_that_of_our_var_with_the_same_weights(model: OfficialVAR) -> None:
    fingerprint = host_for(model).describe(model).fingerprint
    assert fingerprint is not None
    first = fingerprint()
    if model.blocks[0].attn.attn_l2_norm:
        own = host_for(tiny_var()).describe(ours(model)).fingerprint
        assert own is not None
        assert first == own()
    with torch.no_grad():
        model.word_embed.weight[0, 0] *= -1
    assert fingerprint() != first


def test_relatives_with_the_same_names_are_not_taken() -> None:
    class Rotating(Attention):
        def forward(self, x: Tensor, attn_bias: Tensor | None, freqs: Tensor | None = None) -> Tensor:
            return super().forward(x, attn_bias)

    class Cosine(Attention):
        def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
            return super().forward(x.cos(), attn_bias)

    assert not official.matches(nn.Linear(2, 2))
    assert not official.matches(tiny_var())
    assert not official.matches(tiny_infinity())
    model = official_var()
    model.blocks[1].attn.__class__ = Rotating
    assert not official.matches(model)
    model = official_var()
    model.blocks[0].attn.__class__ = Cosine
    before = attributes(model)
    with pytest.raises(UnsupportedError, match=r"Cosine has the attributes .* computes something else"):
        accel.apply(model, "h2o")
    assert are_the_same_objects(before, attributes(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_pass_the_check_of_the_attention(dtype: torch.dtype) -> None:
    model = official_var().to(dtype)
    assert host_for(model).describe(model).dtype == str(dtype).removeprefix("torch.")
    accel.apply(model, "h2o").undo()


# --- what methods see, and what comes of it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_bit_equal_and_keeping_less_is_not(model: OfficialVAR, name: str) -> None:
    plain = logits(model)
    with accel.apply(model, name, keep=1.0):
        assert same(logits(model), plain)
    with accel.apply(model, name, keep=0.5) as handle:
        first = logits(model)
        assert not same(first, plain)
        with handle.paused():
            assert same(logits(model), plain)
        # nothing of one generation is left for the next
        assert same(logits(model), first)
    assert handle.stats.cache.generations == 2
    assert same(logits(model), plain)


@contextmanager
def answers(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[tuple[CompressionContext, HeadGroup, Tensor]]]:
    """Fills a list with what a method is shown and the places it answers."""
    cls, found = method_class(name), []

    def select(self: KVCompression, ctx: CompressionContext, group: HeadGroup) -> Any:
        retain = plain(self, ctx, group)
        found.append((ctx, group, retain.cache_index))
        return retain

    plain = cls.select
    with monkeypatch.context() as patch:
        patch.setattr(cls, "select", select)
        yield found


@pytest.mark.parametrize("is_shared", [False, True], ids=["ada per block", "shared ada"])
@pytest.mark.parametrize("name", METHODS)
def test_methods_see_keep_and_draw_the_same_as_on_our_var(monkeypatch: pytest.MonkeyPatch, name: str, is_shared: bool) -> None:
    model = official_var(is_shared=is_shared, depth=3)
    own = ours(model)
    plain = picture(model, top_k=1)
    with answers(monkeypatch, name) as there, accel.apply(model, name, keep=0.3) as theirs, logits_of(model.head) as some:
        images = picture(model, top_k=1)
    with answers(monkeypatch, name) as here, accel.apply(own, name, keep=0.3) as handle, logits_of(own.head) as others:
        # one choice is left, whatever is drawn
        expected = own.generate([1, 2], top_k=1, top_p=0.0, output="tensor")
    assert len(there) == len(here) > 0
    for (ctx, group, index), (own_ctx, own_group, own_index) in zip(there, here, strict=True):
        assert (ctx.layer, ctx.step, ctx.scale, ctx.scale_shapes, ctx.has_guidance_pairs) == (
            own_ctx.layer, own_ctx.step, own_ctx.scale, own_ctx.scale_shapes, own_ctx.has_guidance_pairs,
        )  # fmt: skip
        assert group == own_group
        for part in ("q", "k", "v"):
            torch.testing.assert_close(getattr(ctx, part), getattr(own_ctx, part), rtol=1e-4, atol=1e-4)
        for part in ("position", "valid", "q_position", "entry_scale"):
            assert torch.equal(getattr(ctx, part), getattr(own_ctx, part)), part
        assert torch.equal(index, own_index)
    torch.testing.assert_close(some, others, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)
    assert (images - plain).abs().max() > 0.01
    assert theirs.stats.cache == handle.stats.cache


def test_attention_without_normalised_queries_keeps_its_own_softmax_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model = official_var(is_normalised=False)
    plain = logits(model)
    # 29 of 30: the scales before the last go through the method's cache and lose nothing
    with answers(monkeypatch, "h2o") as seen, accel.apply(model, "h2o", keep=29):
        found = logits(model)
    assert [ctx.scale for ctx, _, _ in seen] == [0.25 / 8**0.5] * 2
    torch.testing.assert_close(found[:3], plain[:3], rtol=1e-4, atol=1e-4)
    assert not torch.equal(found[3], plain[3])


def test_the_models_own_caching_is_off_and_bytes_fall(model: OfficialVAR) -> None:
    held: list[Any] = []
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, *_: held.append((module.caching, module.cached_k, module.cached_v)))
    with accel.apply(model, "snapkv", keep=0.2) as handle:
        picture(model)
    assert held == [(False, None, None)] * len(held)
    assert len(held) == len(SIDES) * len(model.blocks)
    cache = handle.stats.cache
    assert cache.kept_share == 0.2
    assert 0 < cache.peak_bytes < cache.whole_bytes == len(model.blocks) * 14336


def test_flags_of_the_fast_libraries_have_no_effect() -> None:
    model = official_var()
    with accel.apply(model, "h2o", keep=0.3):
        expected = picture(model)
        for block in model.blocks:
            block.attn.using_flash = block.attn.using_xform = True
        assert torch.equal(picture(model), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_bits_and_stores_keys_in_half(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = official_var()
    with torch.inference_mode(), torch.autocast("cpu", dtype=dtype):
        plain = logits(model)
        with accel.apply(model, "h2o", keep=1.0) as handle:
            assert same(logits(model), plain)
        assert handle.stats.cache.whole_bytes == 28672 // 2
        with answers(monkeypatch, "h2o") as seen, accel.apply(model, "h2o", keep=0.3):
            assert not same(logits(model), plain)
    assert {t.dtype for ctx, _, _ in seen for t in (ctx.q, ctx.k, ctx.v)} == {dtype}


# --- on and off ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_undo_gives_back_the_same_objects(model: OfficialVAR, name: str) -> None:
    # somebody else's change of an instance comes back too
    model.blocks[1].attn.forward = lambda x, attn_bias, forward=model.blocks[1].attn.forward: forward(x, attn_bias)
    before, keys, plain = attributes(model), list(model.state_dict()), logits(model)
    handle = accel.apply(model, name, keep=0.2)
    assert list(model.state_dict()) == keys
    assert not same(logits(model), plain)
    handle.undo()
    handle.undo()
    assert are_the_same_objects(before, attributes(model))
    assert "forward" not in vars(model.blocks[0].attn)
    assert list(model.state_dict()) == keys
    assert same(logits(model), plain)


def test_a_second_apply_is_refused_and_names_the_first() -> None:
    model = official_var()
    handle = accel.apply(model, "random_kv")
    with pytest.raises(PatchError, match="this OfficialVAR is patched already, with random_kv"):
        accel.apply(model, "h2o")
    assert handle.is_active
    handle.undo()
    accel.apply(model, "h2o").undo()


def stop_at(module: nn.Module, call: int) -> Any:
    """Makes the call-th call of a module raise."""
    seen: list[int] = []

    def hook(*_: Any) -> None:
        seen.append(1)
        if len(seen) == call:
            raise KeyboardInterrupt

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("call", [1, 3, 4])
def test_an_aborted_generation_leaves_nothing(model: OfficialVAR, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = []
    made = CompressedCache.__init__
    monkeypatch.setattr(CompressedCache, "__init__", lambda self, *a, **o: caches.append(weakref.ref(self)) or made(self, *a, **o))
    plain = logits(model)
    with accel.apply(model, "h2o", keep=0.3):
        expected = logits(model)
        hook = stop_at(model.blocks[1].ffn, call)
        with pytest.raises(KeyboardInterrupt):
            picture(model)
        hook.remove()
        gc.collect()
        assert [cache() for cache in caches] == [None, None]
        with pytest.raises(UnsupportedError, match="outside a generation"):
            model.blocks[0].attn(torch.zeros(1, 1, 32), attn_bias=None)
        assert same(logits(model), expected)
    assert same(logits(model), plain)


def test_what_an_aborted_generation_of_the_plain_model_left_does_no_harm() -> None:
    model = official_var()
    with accel.apply(model, "h2o", keep=0.3):
        expected = logits(model)
    hook = stop_at(model.blocks[1].ffn, 3)
    with pytest.raises(KeyboardInterrupt):
        picture(model)
    hook.remove()
    assert model.blocks[0].attn.caching
    left = attributes(model)
    accel.apply(model, "h2o").undo()
    assert are_the_same_objects(left, attributes(model))
    with accel.apply(model, "h2o", keep=0.3):
        with pytest.raises(UnsupportedError, match="teacher-forced"):
            model(torch.tensor([1]), torch.zeros(1, 29, 8))
        assert same(logits(model), expected)
    assert model.blocks[0].attn.cached_k is None


def test_a_generation_ends_as_it_began_when_the_method_is_paused_or_resumed_in_between() -> None:
    model = official_var()
    plain = logits(model)
    with accel.apply(model, "h2o", keep=0.3) as handle:
        expected = logits(model)
        pauses = ExitStack()

        def pause(*_: Any) -> None:
            if not handle._pauses:
                pauses.enter_context(handle.paused())

        hook = model.blocks[1].ffn.register_forward_pre_hook(pause)
        assert same(logits(model), expected)
        hook.remove()
        assert handle._pauses
        hook = model.blocks[1].ffn.register_forward_pre_hook(lambda *_: pauses.close())
        assert same(logits(model), plain)
        hook.remove()
        assert not handle._pauses
        assert not model.blocks[0].attn.caching
        assert same(logits(model), expected)


def test_a_teacher_forced_pass_raises_and_runs_while_paused(model: OfficialVAR) -> None:
    call = torch.tensor([1, 2]), torch.randn(2, 29, 8, generator=torch.Generator().manual_seed(1))
    before = model(*call)
    with accel.apply(model, "random_kv", keep=5) as handle:
        with pytest.raises(UnsupportedError, match="random_kv drops cache entries scale by scale, and a teacher-forced pass computes all") as caught:
            model(*call)
        assert any("paused" in reason for reason in caught.value.reasons)
        with handle.paused():
            assert torch.equal(model(*call), before)
        picture(model)
    assert torch.equal(model(*call), before)


def test_training_mode_with_attention_dropout_is_refused() -> None:
    model = official_var(dropout=0.5)
    with accel.apply(model, "h2o", keep=0.3):
        expected = picture(model)
        model.train()
        with pytest.raises(PatchError, match=r"training mode .* call eval\(\)"):
            picture(model)
        model.eval()
        assert torch.equal(picture(model), expected)
    model.train()
    accel.apply(model, "h2o").undo()


# --- loops of one's own, copies, wrappers -------------------------------------------------------------------------------------


def test_a_loop_outside_the_class_is_a_generation_too() -> None:
    model = official_var()
    loop = OfficialVAR.autoregressive_infer_cfg
    with accel.apply(model, "h2o", keep=0.3) as handle:
        expected = picture(model)
        for _ in range(2):
            assert torch.equal(loop(model, 2, [1, 2], g_seed=0), expected)
        hook = stop_at(model.blocks[1].ffn, 3)
        with pytest.raises(KeyboardInterrupt):
            loop(model, 2, [1, 2], g_seed=0)
        hook.remove()
        assert torch.equal(loop(model, 2, [1, 2], g_seed=0), expected)
        with handle.paused():
            picture(model)
        assert handle.stats.cache.generations == 5


def test_a_loop_with_other_scales_raises() -> None:
    model = official_var()
    with accel.apply(model, "h2o", keep=0.3):
        attn = model.blocks[0].attn
        attn.kv_caching(True)
        attn(torch.zeros(2, 1, 32), attn_bias=None)
        with pytest.raises(PatchError, match=r"scale 1 of the schedule \[1, 2, 3, 4\] has 4 tokens, and block 0 was given 9"):
            attn(torch.zeros(2, 9, 32), attn_bias=None)
        attn.kv_caching(False)


def test_copies_and_pickles_of_a_patched_model_are_plain() -> None:
    model = official_var()
    plain = logits(model)
    with accel.apply(model, "streaming_kv", keep=5) as handle:
        copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, unpickled):
            assert same(logits(other), plain)
            assert handle.stats.cache.generations == 0
        with accel.apply(copied, "random_kv", keep=5) as own:
            picture(copied)
        assert own.stats.cache.generations == 1
    assert same(logits(copied), plain)


def test_a_patched_model_thrown_away_is_freed() -> None:
    model = official_var()
    accel.apply(model, "random_kv", keep=5)
    picture(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@contextmanager
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def test_wrapped_models_are_patched_where_they_are() -> None:
    model, own = official_var(), tiny_var()
    plain = logits(model)
    with one_process():
        wrapped = [nn.DataParallel(model), nn.parallel.DistributedDataParallel(model), torch.compile(model), nn.DataParallel(torch.compile(model))]
        for wrapper in wrapped:
            assert [host.__name__.split(".")[-2] for host in hosts() if host.matches(wrapper)] == ["nextscale"]
            with accel.apply(wrapper, "streaming_kv", keep=5) as handle:
                assert not same(logits(model), plain)
                with pytest.raises(PatchError, match="patched already"):
                    accel.apply(model, "h2o")
            assert handle.stats.cache.kept_share == 5 / 30
            assert same(logits(model), plain)
        for wrapper in (nn.DataParallel(own), torch.compile(own)):
            with accel.apply(wrapper, "streaming_kv", keep=5) as handle:
                own.generate([1], seed=0)
            assert handle.stats.cache.generations == 1


def test_a_model_inside_peft_is_patched_where_it_is() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(official_var(), peft.LoraConfig(r=2, target_modules=["mat_qkv", "proj", "fc1"], init_lora_weights=False))
    plain = picture(wrapped)
    with accel.apply(wrapped, "streaming_kv", keep=1.0):
        assert torch.equal(picture(wrapped), plain)
    with accel.apply(wrapped, "streaming_kv", keep=5) as handle:
        assert not torch.equal(picture(wrapped), plain)
        assert handle.stats.cache.kept_share == 5 / 30
    assert torch.equal(picture(wrapped), plain)
    fingerprint = host_for(wrapped).describe(wrapped).fingerprint
    assert fingerprint is not None
    assert fingerprint()


def test_hooks_of_accelerate_go_on_running() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            type(self).calls += 100
            return output

    model = official_var()
    plain = logits(model)
    for block in model.blocks:
        add_hook_to_module(block.attn, Counting())
    with accel.apply(model, "h2o", keep=1.0):
        Counting.calls = 0
        assert same(logits(model), plain)
    assert Counting.calls == 101 * len(SIDES) * len(model.blocks)
    assert same(logits(model), plain)


def test_compiled_blocks_give_the_same_logits() -> None:
    model = official_var()
    with accel.apply(model, "h2o", keep=6):
        eager = logits(model)
        for block in model.blocks:
            block.compile(backend="eager", dynamic=True)
        torch.testing.assert_close(logits(model), eager, rtol=1e-4, atol=1e-5)
