"""On and off: which models the next-scale host takes, what it changes on them, what it says, and that nothing is left."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from next_scale import INFO, last_logits, tiny_infinity, tiny_var

import accel
from accel.errors import PatchError, UnsupportedError
from accel.models.var import VAR
from accel.patches.random_kv import RandomKV
from accel.patching import host_for, hosts
from accel.protocols import HeadGroup, KVCompression, ModelInfo
from accel.registry import method_class, method_names

METHODS = [name for name in method_names() if issubclass(method_class(name), KVCompression)]
FEATURES = [torch.randn(n, 24, generator=torch.Generator().manual_seed(n)) for n in (4, 7)]


def image(model: Any) -> torch.Tensor:
    if isinstance(model, VAR):
        return model.generate([1, 2], seed=0, output="tensor")
    return model.generate(FEATURES, seed=0, schedule=[1, 2, 3, 4], output="tensor")


@pytest.fixture(params=["var", "infinity"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_var() if request.param == "var" else tiny_infinity()


def test_next_scale_models_belong_to_exactly_one_host(model: Any) -> None:
    assert [host.__name__.split(".")[-2] for host in hosts() if host.matches(model)] == ["nextscale"]
    assert host_for(model).__name__.split(".")[-2] == "nextscale"


def test_transformers_models_are_not_taken_and_refuse_what_works_from_scale_to_scale() -> None:
    from support import tiny_llama

    llama = tiny_llama()
    assert [host.__name__.split(".")[-2] for host in hosts() if host.matches(llama)] == ["transformers"]
    with pytest.raises(UnsupportedError, match="cannot apply cake") as caught:
        accel.apply(llama, "cake")
    assert any("needs a next-scale model" in reason for reason in caught.value.reasons)


@pytest.mark.parametrize("name", ["flexprefill", "fastervlm"])
def test_other_kinds_of_methods_are_refused_with_the_reason(model: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match="the next-scale host runs KV-compression methods only"):
        accel.apply(model, name)
    assert "new_cache" not in vars(model)


def test_two_cache_methods_at_once_are_refused(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="at most one KV-compression method"):
        accel.apply(model, RandomKV(), accel.H2O())


def test_a_var_is_described_by_its_own_scales() -> None:
    found = replace(host_for(tiny_var()).describe(tiny_var()), fingerprint=None)
    assert found == INFO
    wide = host_for(tiny_infinity()).describe(tiny_infinity(default_size="0.06M"))
    assert wide.scale_shapes is not None
    assert [h * w for h, w in wide.scale_shapes] == [1, 4, 16, 36, 64, 144, 256]
    assert wide.fingerprint is not None
    assert wide.fingerprint() == host_for(tiny_infinity()).describe(tiny_infinity()).fingerprint()


@pytest.mark.parametrize("name", METHODS)
def test_undo_gives_back_the_same_model(model: Any, name: str) -> None:
    before, keys, attributes = image(model), list(model.state_dict()), dict(vars(model))
    handle = accel.apply(model, name, keep=0.2)
    assert list(model.state_dict()) == keys
    image(model)
    handle.undo()
    handle.undo()
    assert vars(model).keys() == attributes.keys()
    assert all(vars(model)[key] is value for key, value in attributes.items())
    assert torch.equal(image(model), before)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_bit_equal_and_keeping_less_is_not(name: str) -> None:
    model = tiny_var()
    plain = last_logits(model, [1, 2])
    for keep in (1.0, 30, 999):
        with accel.apply(model, name, keep=keep):
            assert torch.equal(last_logits(model, [1, 2]), plain), keep
    with accel.apply(model, name, keep=0.5) as handle:
        assert not torch.equal(last_logits(model, [1, 2]), plain)
        with handle.paused():
            assert torch.equal(last_logits(model, [1, 2]), plain)
        assert not torch.equal(last_logits(model, [1, 2]), plain)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_bit_equal_on_infinity_and_with_schedules_given_per_call(name: str) -> None:
    model = tiny_infinity()
    plain = image(model)
    with accel.apply(model, name, keep=1.0):
        assert torch.equal(image(model), plain)
    # 0.5 of the 30 tokens of this schedule, whatever the model's default
    with accel.apply(model, name, keep=0.5) as handle:
        image(model)
    assert handle.stats.cache.attended[3] == 15 * 4 * 4 * 2


def test_a_second_apply_is_refused_and_names_the_first(model: Any) -> None:
    handle = accel.apply(model, "random_kv")
    with pytest.raises(PatchError, match="patched already, with random_kv"):
        accel.apply(model, "h2o")
    assert handle.is_active
    handle.undo()
    accel.apply(model, "h2o").undo()


def test_copies_and_pickles_of_a_patched_model_are_plain(model: Any) -> None:
    plain = image(model)
    with accel.apply(model, "streaming_kv", keep=5) as handle:
        copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (copied, unpickled):
            generations = handle.stats.cache.generations
            assert torch.equal(image(other), plain)
            assert handle.stats.cache.generations == generations
        # a copy may be patched on its own
        with accel.apply(copied, "random_kv", keep=5) as own:
            image(copied)
        assert own.stats.cache.generations == 1
    assert torch.equal(image(copied), plain)


def test_a_model_inside_peft_is_patched_where_it_is() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny_var(), peft.LoraConfig(r=2, target_modules=["proj", "fc1"], init_lora_weights=False))
    plain = wrapped.generate(labels=[1, 2], seed=0, output="tensor")
    with accel.apply(wrapped, "streaming_kv", keep=5) as handle:
        assert not torch.equal(wrapped.generate(labels=[1, 2], seed=0, output="tensor"), plain)
        assert handle.stats.cache.kept_share == 5 / 30
    assert torch.equal(wrapped.generate(labels=[1, 2], seed=0, output="tensor"), plain)


def test_compiled_blocks_give_the_same_image() -> None:
    model = tiny_var()
    with accel.apply(model, "h2o", keep=6):
        eager = last_logits(model, [1, 2])
        for block in model.blocks:
            block.compile(backend="eager", dynamic=True)
        torch.testing.assert_close(last_logits(model, [1, 2]), eager, rtol=1e-4, atol=1e-5)


def test_half_precision_keeps_bits_and_halves_bytes() -> None:
    model = tiny_var().to(torch.bfloat16)
    plain = last_logits(model, [1, 2])
    with accel.apply(model, "h2o", keep=1.0) as handle:
        assert torch.equal(last_logits(model, [1, 2]), plain)
    assert handle.stats.cache.whole_bytes == 28672 // 2


def test_a_patched_model_thrown_away_is_freed() -> None:
    model = tiny_var()
    accel.apply(model, "random_kv", keep=5)
    image(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_a_teacher_forced_pass_raises_and_runs_while_paused() -> None:
    model = tiny_var()
    codes, _ = model.generate_codes([1], seed=0)
    before = model.forward(torch.tensor([1]), codes).logits
    with accel.apply(model, "random_kv", keep=5) as handle:
        with pytest.raises(UnsupportedError, match="teacher-forced"):
            model.forward(torch.tensor([1]), codes)
        with handle.paused():
            assert torch.equal(model.forward(torch.tensor([1]), codes).logits, before)


def test_the_report_says_how_many_entries_and_bytes() -> None:
    model = tiny_var()
    with accel.apply(model, "snapkv", keep=0.2) as handle:
        assert handle.report().splitlines() == ["snapkv(keep=0.2) on nextscale: patched", "cache: no generation yet"]
        image(model)
        text = handle.report()
    # 2 images, doubled by guidance, 4 heads, 2 layers: 32 rows of 30 tokens, of which 6 stay
    assert "192 of 960 entries read at step 3 (20.0%), 1 generations" in text
    assert "at most 13056 bytes held by one, 28672 without compression" in text
    assert "cache by step: 2048, 10240, 13056, 13056 bytes" in text
    assert "calls:" not in text
    assert handle.stats.as_dict()["cache"]["peak_cache_bytes"] == 13056
    handle.stats.reset()
    assert "cache" not in handle.stats.as_dict()


def test_budgets_that_save_nothing_say_so() -> None:
    model = tiny_var()
    for keep, notice in (
        (1.0, "snapkv: keeps all 30 entries of every head with these options; images stay bit for bit the same"),
        (14, "snapkv: 14 entries per head save attention but no memory: without the last scale, never stored, a cache holds 14"),
        (13, None),
    ):
        with accel.apply(model, "snapkv", keep=keep) as handle:
            assert handle.notices == ([] if notice is None else [notice])


def test_ls_shows_where_cache_methods_run() -> None:
    from accel.cli.ls import host_notes, method_rows

    rows = {row.name: row for row in method_rows()}
    for name in METHODS:
        assert rows[name].hosts["nextscale"] == []
        assert bool(rows[name].hosts["transformers"]) == (name == "cake")
    assert rows["flexprefill"].hosts["nextscale"]
    assert "autocast" in host_notes()["nextscale"]


def test_a_method_that_does_not_fit_the_default_scales_waits_for_those_that_it_fits() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Picky(RandomKV):
        """Takes pictures of four scales only."""

        @classmethod
        def method_name(cls) -> str:
            return "picky"

        def groups(self, model: ModelInfo, layer: int, **options: Any) -> list[HeadGroup]:
            if len(model.scale_shapes or ()) != 4:
                raise UnsupportedError("picky knows four scales", ["others are too many"])
            return super().groups(model, layer, **options)

    model = tiny_infinity()
    with accel.apply(model, Picky(keep=0.5)) as handle:
        assert any("picky will not draw with the default scales: picky knows four scales" in notice for notice in handle.notices)
        with pytest.raises(UnsupportedError, match="picky knows four scales"):
            model.generate(FEATURES, seed=0, schedule=[1, 2, 3], output="tensor")
        assert image(model).shape[0] == 2
