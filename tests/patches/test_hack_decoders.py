"""HACK on decoders: the statistic of a prompt's last quarter, profiles of language models, budgets, and what both kinds of heads keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.test_kv_families import shared_model
from next_scale import INFO
from tiny_llama import byte_tokenizer, tiny_model
from torch import Tensor

import accel
from accel.errors import OptionError, UnsupportedError
from accel.evals.models import LoadedModel
from accel.patches._hack_calibration import profile_heads
from accel.patches._head_profile import HeadProfile, classify
from accel.patches.hack import HACK
from accel.patches.snapkv import SnapKV
from accel.protocols import UNLIMITED, CompressionContext, HeadGroup
from accel.recipe import Recipe

PROSE = "The quick brown fox jumps over the lazy dog, and nobody minds. " * 30
DECODER = replace(INFO, family="llama", scale_shapes=None)


def loaded(**changes: Any) -> LoadedModel:
    return LoadedModel(tiny_model(**changes), byte_tokenizer(), "toy")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A profile of three prompts."""
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "prose.txt").write_text(PROSE)
    model = loaded()
    profile_heads(model, folder / "prose.txt", folder / "run", fixed={"keep": 0.4}, n_samples=3, show_progress=False)
    return model, folder


def test_layers_whose_cache_stays_whole_have_no_kinds_of_heads(tmp_path: Path) -> None:
    # of three layers with full attention the last two share keys and values
    toy = LoadedModel(shared_model(), lambda text, **how: {"input_ids": [byte % 90 + 2 for byte in text.encode()]}, "toy")
    (tmp_path / "prose.txt").write_text(PROSE)
    method = profile_heads(toy, tmp_path / "prose.txt", tmp_path / "run", fixed={"alpha": 0.5}, n_samples=1, show_progress=False)
    profile = HeadProfile.load(tmp_path / "run" / "profile.safetensors")
    assert (profile.sigma >= 0).all(1).tolist() == [True] + [False] * 5
    with accel.apply(toy.model, method) as handle:
        assert handle.patched_layers == [0]
    assert sorted(map(sum, classify(profile, alpha=0.5, fallback=0.5))) == [0] * 5 + [1]


# --- the profile --------------------------------------------------------------------------------------------------------------


def weights_of(model: Any, ids: Tensor) -> list[Tensor]:
    """(Hq, L, L) attention of every layer."""
    model.set_attn_implementation("eager")
    try:
        return [one[0].double() for one in model(ids, output_attentions=True).attentions]
    finally:
        model.set_attn_implementation("sdpa")


@torch.no_grad()
def test_sigma_is_the_variance_over_the_last_quarter_of_the_keys_before_it(run: tuple[LoadedModel, Path]) -> None:
    model, folder = run
    profile = HeadProfile.load(folder / "run" / "profile.safetensors")
    assert profile.mass is not None
    length = min(model.max_positions or 0, 4096)
    ids = byte_tokenizer()(PROSE, add_special_tokens=False)["input_ids"]
    rows = [ids[i : i + length] for i in range(0, max(1, len(ids) - length // 2), length)]
    expected, mass = torch.zeros_like(profile.sigma), torch.zeros_like(profile.sigma)
    for number in range(3):
        row = torch.tensor([rows[number % len(rows)]])
        n = row.shape[1]
        first = n - n // 4
        for layer, a in enumerate(weights_of(model.model, row)):
            # fewer than 512 queries: all of the quarter count
            picked = a[:, first:, :first]
            assert picked.shape[1] <= 512
            each = picked.var(1, correction=0).sum(-1)
            expected[layer] += each.view(profile.sigma.shape[1], -1).amax(1).float() / 3
            mass[layer] += picked.mean(1).sum(-1).view(profile.sigma.shape[1], -1).mean(1).float() / 3
    torch.testing.assert_close(profile.sigma, expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(profile.mass, mass, rtol=1e-3, atol=1e-5)
    assert profile.scale_use.numel() == 0
    assert profile.header.scale_shapes == ()


def test_the_recipe_of_a_language_model_runs_and_says_what_it_knows(run: tuple[LoadedModel, Path]) -> None:
    model, folder = run
    assert not (folder / "run" / "plan.json").exists()
    recipe = Recipe.load(folder / "run" / "recipe.yaml")
    [method] = recipe.methods
    assert isinstance(method, HACK)
    assert method.keep == 0.4
    with accel.apply(model.model, method) as handle:
        model.model.generate(torch.randint(5, 50, (1, 200)), max_new_tokens=3, do_sample=False)
    assert not any("no head profile" in notice for notice in handle.notices)
    # 200 tokens, 80 entries per head as a mean
    assert handle.stats.cache.most_held < 0.75 * handle.stats.cache.whole_bytes


def test_data_that_cannot_be_read_raises(tmp_path: Path) -> None:
    for data in ("gone.txt", "wrong.jsonl", "short.txt"):
        (tmp_path / "wrong.jsonl").write_text('{"prompt": "x"}\n')
        (tmp_path / "short.txt").write_text("too short")
        with pytest.raises(OptionError, match=r"hack: cannot read|hack: .*holds no text of"):
            profile_heads(loaded(), tmp_path / data, tmp_path / "run", n_samples=1, show_progress=False)


def test_a_profile_of_an_image_model_is_refused_by_a_decoder_and_the_other_way_round(run: tuple[LoadedModel, Path]) -> None:
    path = str(run[1] / "run" / "profile.safetensors")
    header = HeadProfile.load(path).header
    sizes = {"n_layers": header.n_layers, "n_kv_heads": header.n_heads}
    [reason] = HACK(profile=path, allow_other_model=True).supports(replace(INFO, **sizes), "nextscale", [])
    assert reason == f"the profile is of a decoder, toy, this {INFO.family} model is an image model"
    assert HACK(profile=path, allow_other_model=True).supports(replace(DECODER, **sizes), "transformers", []) == []


def test_layers_without_a_cache_of_everything_are_not_measured_and_get_no_budget(tmp_path: Path) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=300, sliding_window=16, max_position_embeddings=512, **sizes)).eval()
    (tmp_path / "prose.txt").write_text(PROSE)
    method = profile_heads(LoadedModel(model, byte_tokenizer(), "gemma"), tmp_path / "prose.txt", tmp_path / "run", n_samples=1, show_progress=False)
    sigma = HeadProfile.load(tmp_path / "run" / "profile.safetensors").sigma
    assert (sigma < 0).all(1).tolist() == [True, False, True, False]
    with accel.apply(model, method) as handle:
        model.generate(torch.randint(5, 250, (1, 300)), max_new_tokens=3, do_sample=False)
    assert sorted(handle.skipped_layers) == [0, 2]
    assert handle.stats.cache.most_held > 0


# --- budgets ------------------------------------------------------------------------------------------------------------------


def test_budgets_are_shares_of_the_prompt_and_short_prompts_stay_whole() -> None:
    method = SnapKV(keep=0.25).bind(DECODER)
    budgets = [method.groups(DECODER, 0, step=0, n_entries=n)[0].budget for n in (40, 64, 200, 400)]
    # the least is a least: what is written behind a short prompt fills it
    assert budgets == [64, 64, 64, 100]
    assert SnapKV(keep=30, min_entries=1).bind(DECODER).groups(DECODER, 0, step=0, n_entries=400)[0].budget == 30
    for whole in (SnapKV(keep=1.0), HACK(keep=1.0)):
        assert whole.bind(DECODER).groups(DECODER, 0, step=0, n_entries=400) == [HeadGroup((0, 1, 2, 3), UNLIMITED)]


def test_any_cache_method_takes_the_budgets_of_a_profile(run: tuple[LoadedModel, Path]) -> None:
    model, folder = run
    from accel.patching import host_for

    info = host_for(model.model).describe(model.model)
    path = str(folder / "run" / "profile.safetensors")
    plans = [one(profile=path, keep=0.3, alpha=0.5).bind(info) for one in (SnapKV, HACK)]
    for n in (20, 100, 400):
        both = [[(g.heads, g.label) for layer in range(info.n_layers) for g in plan.groups(info, layer, step=0, n_entries=n)] for plan in plans]
        assert both[0] == both[1]
        total = sum(g.budget * len(g.heads) for layer in range(info.n_layers) for g in plans[0].groups(info, layer, step=0, n_entries=n))
        mean = max(64, int(0.3 * n))
        assert mean * info.n_layers * info.n_kv_heads - info.n_kv_heads < total <= mean * info.n_layers * info.n_kv_heads


def test_decoupled_budgets_and_plans_belong_to_scales() -> None:
    for options in ({"mode": "decoupled", "profile": "x.safetensors"}, {"plan": "plan.json"}):
        with pytest.raises(UnsupportedError, match="cannot apply hack"):
            accel.apply(tiny_model(), HACK(**options))


# --- selection ----------------------------------------------------------------------------------------------------------------


def prompt(n: int = 40, *, read: int = 17, protected: Tensor | None = None) -> CompressionContext:
    """One KV head of two query heads, whose newest four queries read entry `read`."""
    q, k = torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, n, 8)
    q[..., 0], k[0, 0, read, 0] = 20.0, 1.0
    position = torch.arange(n).expand(1, 1, n)
    return CompressionContext(
        layer=0, step=0, q=q, k=k, v=torch.zeros(1, 1, n, 8), scale=1.0, position=position, valid=torch.ones(1, 1, n, dtype=torch.bool),
        q_position=torch.arange(n - 4, n)[None], protected=protected,
    )  # fmt: skip


def test_both_kinds_keep_sinks_and_window_and_contextual_heads_the_neighbours_of_what_is_read() -> None:
    method = HACK(window=4, n_protected=2).bind(DECODER)
    kept = {
        label: method.select(prompt(), HeadGroup((0,), 11, label)).cache_index[0, 0].tolist() for label in ("contextual", "structural")
    }
    assert kept["contextual"] == [0, 1, *range(15, 20), *range(36, 40)]
    # nothing else is read: ties go to the lower places
    assert kept["structural"] == [0, 1, 2, 3, 4, 5, 17, *range(36, 40)]


def test_a_small_budget_gives_the_window_at_most_half() -> None:
    method = HACK(window=64, n_protected=4).bind(DECODER)
    index = method.select(prompt(), HeadGroup((0,), 9, "structural")).cache_index[0, 0].tolist()
    assert index == [0, 1, 2, 3, 17, 36, 37, 38, 39]


def test_text_beside_pictures_stays_first_unless_told_otherwise() -> None:
    is_text = torch.zeros(1, 40, dtype=torch.bool)
    is_text[0, 25:30] = True
    group = HeadGroup((0,), 12, "structural")
    spared, others = (
        HACK(window=4, n_protected=2, protect_text=on).bind(DECODER).select(prompt(protected=is_text), group).cache_index[0, 0].tolist()
        for on in (True, False)
    )
    assert spared == [0, 1, 17, *range(25, 30), *range(36, 40)]
    assert others == [*range(7), 17, *range(36, 40)]


def test_later_entries_are_not_seen_by_earlier_queries() -> None:
    """The first of the four newest queries must not vote for the entries behind its own."""
    ctx = prompt(read=39)
    from accel.patches._cache import attention_of

    weights = attention_of(ctx, torch.arange(4))
    assert weights.shape == (1, 1, 8, 40)
    assert (weights[0, 0, [0, 1, 2, 4, 5, 6], 39] == 0).all()
    assert (weights[0, 0, [3, 7], 39] > 0.9).all()
