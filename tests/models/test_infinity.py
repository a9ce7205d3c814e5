"""Infinity: sizes, schedules, RoPE, the published arithmetic against a second implementation, cached against teacher-forced, text, files, errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import OptionError
from accel.models.cache import ScaleCache, Schedule
from accel.models.infinity import SCHEDULES, CheckpointError, Infinity, InfinityConfig, TextEncoder, TextFeatures, schedule_for
from accel.models.infinity import model as infinity_model
from accel.models.infinity.rope import grid_coordinates, rope_tables
from accel.models.infinity.schedules import longest

TINY_FILE = {"layers": 4, "width": 32, "heads": 4, "per_chunk": 2, "bits": 4, "text": 24, "text_tokens": 10, "pool": 2}
TINY_TOKENIZER = {"ch": 32, "mult": (1, 2), "bits": 4}
SIZES = [(1, 1), (2, 1), (3, 2)]


# published sizes of the fp32 files in GB, to the digits they are given in
@pytest.mark.parametrize(
    ("name", "parameters", "gigabytes", "tolerance"),
    [("125M", 125_148_800, 0.501, 0.001), ("2B", 2_204_564_032, 8.82, 0.005), ("8B", 8_375_791_824, 33.5, 0.05)],
)
def test_parameter_counts_of_the_published_models(name: str, parameters: int, gigabytes: float, tolerance: float) -> None:
    with torch.device("meta"):
        model = Infinity(InfinityConfig.official(name))
    count = sum(p.numel() for key, p in model.named_parameters() if not key.startswith("tokenizer."))
    assert count == parameters
    assert abs(4 * count / 1e9 - gigabytes) < tolerance


def test_sizes_of_the_published_models() -> None:
    assert InfinityConfig.official("8B").is_patchified
    assert not InfinityConfig.official("2B").is_patchified
    with pytest.raises(OptionError, match="125M, 2B, 8B"):
        InfinityConfig.official("3B")


# --- schedules


def test_square_schedules_have_the_published_lengths() -> None:
    assert {size: schedule_for(size, 1.0).total for size in ("0.06M", "0.25M", "0.60M", "1M")} == {
        "0.06M": 521, "0.25M": 2521, "0.60M": 6425, "1M": 10521,
    }  # fmt: skip
    assert [h for h, _ in SCHEDULES[1.0]] == [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64]


@pytest.mark.parametrize(
    ("ratio", "last"),
    [
        (1.25, [(45, 36), (55, 44), (70, 56)]), (1.333, [(48, 36), (60, 45), (72, 54)]), (1.5, [(48, 32), (63, 42), (78, 52)]),
        (1.75, [(56, 32), (70, 40), (84, 48)]), (2.0, [(60, 30), (74, 37), (90, 45)]), (2.5, [(65, 26), (80, 32), (100, 40)]),
        (3.0, [(72, 24), (90, 30), (111, 37)]),
    ],
    ids=str,
)  # fmt: skip
def test_other_ratios_end_as_published_and_their_inverses_are_swapped(ratio: float, last: list[tuple[int, int]]) -> None:
    sizes = schedule_for("1M", ratio).sizes
    assert (len(sizes), sizes[0], list(sizes[-3:])) == (13, (1, 1), last)
    assert schedule_for("1M", 1 / ratio).sizes == tuple((w, h) for h, w in sizes)
    areas = [h * w for h, w in sizes]
    assert areas == sorted(areas)
    # an image of a size has about the square one's area, whatever its shape
    for prefix in (7, 10, 12, 13):
        assert 0.85 < sizes[prefix - 1][0] * sizes[prefix - 1][1] / math.prod(SCHEDULES[1.0][prefix - 1]) < 1.28


def test_unknown_sizes_and_ratios_raise() -> None:
    with pytest.raises(OptionError, match=r"0\.06M, 0\.25M, 0\.60M, 1M"):
        schedule_for("2M", 1.0)
    with pytest.raises(OptionError, match=r"trained are 0\.333"):
        schedule_for("1M", 1.1)
    assert schedule_for("1M", 4 / 3) == schedule_for("1M", 1.333)
    assert len(SCHEDULES) == 15


# --- RoPE


def test_coordinates_are_stretched_to_the_final_map_with_ties_to_even() -> None:
    assert grid_coordinates(6, 64).tolist() == [0, 11, 21, 32, 43, 53]
    # 0, 1.5, 3, 4.5
    assert grid_coordinates(4, 6).tolist() == [0, 2, 3, 4]
    assert grid_coordinates(64, 64).tolist() == list(range(64))


def test_a_smaller_size_uses_the_coordinates_of_the_longest_schedule() -> None:
    assert longest(schedule_for("0.06M", 2.0)).sizes[-1] == (90, 45)
    assert longest(Schedule.of([1, 2, 3])).sizes[-1] == (3, 3)
    assert longest(Schedule.of([1])).sizes[-1] == (1, 1)


def test_rows_turn_the_first_half_of_the_pairs_and_columns_the_second() -> None:
    # head_dim 8: four pairs, frequencies 1 and 0.01 for rows and again for columns
    table = rope_tables(Schedule.of([(1, 1), (2, 3)]), (4, 6), 8)
    cos, sin = table[1]
    assert cos.shape == (6, 4)
    # token 5 is row 1 -> coordinate 2, column 2 -> coordinate 4
    angles = torch.tensor([2.0, 0.02, 4.0, 0.04])
    assert torch.allclose(cos[5], angles.cos())
    assert torch.allclose(sin[5], angles.sin())
    assert torch.equal(table[0][0], torch.ones(1, 4))


# --- a second implementation, straight from specification §6.4 and §6.6 and an official state dict, in fp64, one image, no padding, no cache


def plain_infinity(state: dict[str, Tensor], text: Tensor, codes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
    """Logits (T_K, bits, 2) under the block mask. text (L, width); codes: inputs of the scales from the second on, each (n_k, bits)."""
    s, heads = {key: value.double() for key, value in state.items()}, TINY_FILE["heads"]
    scale_of = torch.tensor([k for k, (h, w) in enumerate(sizes) for _ in range(h * w)])
    cells = [(i * sizes[-1][0] / h, j * sizes[-1][1] / w) for h, w in sizes for i in range(h) for j in range(w)]
    rows, columns = (torch.tensor([round(cell[axis]) for cell in cells]).double() for axis in (0, 1))

    def normed(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attention(q: Tensor, k: Tensor, v: Tensor, count: int, scale: float) -> Tensor:
        parts = zip(*(t.chunk(count, -1) for t in (q, k, v)), strict=True)
        return torch.cat([((a @ b.T) * scale).softmax(-1) @ c for a, b, c in parts], -1)

    def turned(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        quarter = pairs.shape[-1] // 2
        frequency = 10000.0 ** -(torch.arange(quarter).double() / quarter)
        angles = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], -1)
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    text = text.double()
    text = text / (text.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * s["text_norm.weight"]
    pool = "text_proj_for_sos.ca"
    k, v = (text @ s[f"{pool}.mat_kv.weight"].T).chunk(2, -1)
    query = s[f"{pool}.mat_q"].reshape(1, -1)
    condition = affine(f"{pool}.proj", attention(query, k, v + s[f"{pool}.v_bias"], TINY_FILE["pool"], (32 / TINY_FILE["pool"]) ** -0.5))
    memory = affine("text_proj_for_ca.2", gelu(affine("text_proj_for_ca.0", text)))
    x = torch.cat([condition + s["pos_start"][0], *[affine("word_embed", code.double()) for code in codes]]) + s["lvl_embed.weight"][scale_of]
    silu = condition / (1 + (-condition).exp())
    hidden = scale_of[None, :] > scale_of[:, None]
    for name in [f"block_chunks.{c}.module.{j}" for c in range(2) for j in range(2)]:
        shared = affine("shared_ada_lin.1", silu).chunk(6, -1)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = (one + own for one, own in zip(shared, s[f"{name}.ada_gss"][0, 0], strict=True))
        q, k, v = ((normed(x) * (1 + scale1) + shift1) @ s[f"{name}.sa.mat_qkv.weight"].T).chunk(3, -1)
        q, v, out = q + s[f"{name}.sa.q_bias"], v + s[f"{name}.sa.v_bias"], []
        for h, (a, b, c) in enumerate(zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True)):
            a, b = turned(a / a.norm(dim=-1, keepdim=True)), turned(b / b.norm(dim=-1, keepdim=True))
            scores = a @ b.T * s[f"{name}.sa.scale_mul_1H11"].flatten()[h].clamp(max=math.log(100)).exp()
            out.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ c)
        x = x + gamma1 * affine(f"{name}.sa.proj", torch.cat(out, -1))
        q = affine(f"{name}.ca.mat_q", normed(x) * s[f"{name}.ca_norm.weight"] + s[f"{name}.ca_norm.bias"])
        k, v = (memory @ s[f"{name}.ca.mat_kv.weight"].T).chunk(2, -1)
        x = x + affine(f"{name}.ca.proj", attention(q, k, v + s[f"{name}.ca.v_bias"], heads, (32 / heads) ** -0.5))
        x = x + gamma2 * affine(f"{name}.ffn.fc2", gelu(affine(f"{name}.ffn.fc1", normed(x) * (1 + scale2) + shift2)))
    scale, shift = affine("head_nm.ada_lin.1", silu).chunk(2, -1)
    return affine("head", normed(x) * (1 + scale) + shift).unflatten(-1, (-1, 2))


def inputs_of(model: Infinity, codes: list[Tensor], schedule: Schedule) -> list[Tensor]:
    """The input of every scale but the first."""
    f, inputs = None, []
    for scale, bits in enumerate(codes):
        f, x = model.tokenizer(bits, f, scale, schedule)
        inputs += [] if x is None else [x]
    return inputs


def random_bits(model: Infinity, rows: int, schedule: Schedule) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randint(2, (rows, n, model.config.code_bits)) for n in schedule.tokens]


@torch.no_grad()
@pytest.mark.parametrize("scale_shape", ["1H11", "11H1"])
def test_official_weights_give_the_published_arithmetic(official_infinity: Any, official_infinity_tokenizer: Any, scale_shape: str) -> None:
    state, schedule = official_infinity(**TINY_FILE, scale_shape=scale_shape), Schedule.of(SIZES)
    model = Infinity.from_original(state, official_infinity_tokenizer(**TINY_TOKENIZER))
    prompts, codes = [torch.randn(3, 24), torch.randn(7, 24)], random_bits(model, 2, schedule)
    got = model.forward(prompts, codes, schedule)
    inputs = inputs_of(model, codes, schedule)
    exact = torch.stack([plain_infinity(state, text, [x[i] for x in inputs], SIZES) for i, text in enumerate(prompts)])
    assert (got.logits - exact).abs().max() < 2e-5 * exact.abs().max()
    assert abs(got.loss - F.cross_entropy(exact.flatten(0, 2), torch.cat(codes, 1).flatten())) < 1e-4


def stepwise(model: Infinity, features: TextFeatures, codes: list[Tensor], schedule: Schedule, *, add_null: bool = False) -> Tensor:
    """Logits of all scales, computed scale by scale with a cache."""
    condition, memory = model._text(features, add_null=add_null)
    cache, inputs = ScaleCache(schedule), [None, *inputs_of(model, codes, schedule)]
    rope = model._rope(schedule, condition.device)
    doubled = [x if x is None or not add_null else torch.cat([x, x]) for x in inputs]
    return torch.cat([model._scale_logits(x, k, condition, memory, cache, rope[k]) for k, x in enumerate(doubled)], 1)


@torch.no_grad()
def test_the_row_without_text_reads_as_many_null_states_as_the_prompt_has_tokens(official_infinity: Any, official_infinity_tokenizer: Any) -> None:
    state, schedule = official_infinity(**TINY_FILE), Schedule.of(SIZES)
    model = Infinity.from_original(state, official_infinity_tokenizer(**TINY_TOKENIZER))
    prompts, codes = [torch.randn(2, 24), torch.randn(6, 24)], random_bits(model, 2, schedule)
    inputs = inputs_of(model, codes, schedule)
    got = stepwise(model, TextFeatures.of(prompts), codes, schedule, add_null=True)
    null = [state["cfg_uncond"][:2], state["cfg_uncond"][:6]]
    exact = torch.stack([plain_infinity(state, text, [x[i % 2] for x in inputs], SIZES) for i, text in enumerate(prompts + null)])
    assert (got - exact).abs().max() < 2e-5 * exact.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("code_bits", [4, 16], ids=["plain", "patchified"])
def test_block_masked_logits_equal_cached_logits(tiny_infinity: Callable[..., Infinity], code_bits: int) -> None:
    model, schedule = tiny_infinity(code_bits=code_bits), Schedule.of([1, (2, 3), (4, 5)])
    features, codes = TextFeatures.of([torch.randn(3, 24), torch.randn(5, 24)]), random_bits(model, 2, schedule)
    assert (model.forward(features, codes, schedule).logits - stepwise(model, features, codes, schedule)).abs().max() < 1e-5


@torch.no_grad()
def test_a_small_image_is_rotated_as_the_first_scales_of_the_large_one(tiny_infinity: Callable[..., Infinity]) -> None:
    model, device = tiny_infinity(), torch.device("cpu")
    small, large = (model._rope(schedule_for(size, 1.5), device) for size in ("0.06M", "1M"))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(small, large[:7], strict=True))
    own = tiny_infinity(rope_extent="own")._rope(schedule_for("0.06M", 1.5), device)
    assert torch.equal(own[-1][0], rope_tables(Schedule.of([(21, 14)]), (21, 14), 8)[0][0])


def test_training_resizes_by_area_and_reaches_every_weight_but_the_tokenizers(tiny_infinity: Callable[..., Infinity]) -> None:
    # the first map is the same everywhere: only the third input can tell how it was resized
    model, schedule = tiny_infinity(), Schedule.of([1, 2, 3, 5])
    features, codes = TextFeatures.of([torch.randn(3, 24)]), random_bits(model, 1, schedule)
    f, _ = model.tokenizer(codes[0], None, 0, schedule)
    _, third = model.tokenizer(codes[1], f, 1, schedule, mode="area")
    seen: list[Tensor] = []
    model.embed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    in_generation = model.forward(features, codes, schedule).logits
    output = model.train().forward(features, codes, schedule)
    assert torch.equal(seen[-2], third)
    assert not torch.allclose(output.logits, in_generation, atol=1e-4)
    output.loss.backward()
    # a batch without guidance does not read the null states
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {name for name, _ in model.named_parameters() if name.startswith("tokenizer.")} | {"text.null_states"}


def test_every_layer_is_given_the_rotation_of_its_own_scale(tiny_infinity: Callable[..., Infinity]) -> None:
    model, seen = tiny_infinity(), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda module, args, kwargs: seen.append((module.layer, kwargs["rope"][0])), with_kwargs=True)
    model.generate_codes([torch.randn(3, 24)], schedule=[1, 2, 3], seed=0)
    expected = rope_tables(Schedule.of([1, 2, 3]), (3, 3), 8)
    assert [layer for layer, _ in seen] == [0, 1] * 3
    for k in range(3):
        assert torch.equal(seen[2 * k][1], expected[k][0])
        assert torch.equal(seen[2 * k + 1][1], expected[k][0])
    assert not torch.equal(expected[1][0], expected[2][0][:4])


# --- guidance, batches, outputs


def test_guidance_is_the_same_at_every_scale_and_temperature_divides(tiny_infinity: Callable[..., Infinity], monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny_infinity(), []

    def logits(x: Any, scale: int, condition: Tensor, *rest: Any) -> Tensor:
        n = (1, 4, 9)[scale]
        return torch.tensor([2.0, 0.5])[:, None, None, None].expand(2, n, 4, 2)

    monkeypatch.setattr(model, "_scale_logits", logits)
    monkeypatch.setattr(infinity_model, "filtered", lambda logits, **_: seen.append(float(logits[0, 0, 0, 0])) or logits)
    model.generate_codes([torch.randn(3, 24)], schedule=[1, 2, 3], guidance_scale=3.0, temperature=0.5, seed=0)
    # 3 · 2/0.5 + (1 − 3) · 0.5/0.5
    assert seen == [10.0, 10.0, 10.0]


def test_guidance_of_one_runs_half_the_rows(tiny_infinity: Callable[..., Infinity], monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_infinity(), []
    model.blocks[0].register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
    text = [torch.randn(3, 24), torch.randn(2, 24)]
    for scale in (1.0, 4.0):
        model.generate_codes(text, schedule=[1, 2], guidance_scale=scale, seed=0)
    assert rows == [2, 2, 4, 4]


def test_same_seed_gives_the_same_image_in_any_batch_whatever_the_prompts_lengths(tiny_infinity: Callable[..., Infinity]) -> None:
    model = tiny_infinity()
    torch.manual_seed(1)
    prompts = [torch.randn(n, 24) for n in (2, 9, 4)]
    options: dict[str, Any] = {"schedule": [1, (2, 3), (4, 6)], "output": "tensor"}
    together = model.generate(prompts, seed=[5, 6, 7], **options)
    assert together.shape == (3, 3, 8, 12)
    for part in ([0], [1], [2], [2, 0]):
        split = model.generate([prompts[i] for i in part], seed=[5 + i for i in part], **options)
        assert torch.allclose(split, together[part], atol=1e-5)
    assert not torch.allclose(model.generate(prompts[:1], seed=8, **options), together[:1], atol=1e-2)


def test_a_negative_prompt_takes_the_place_of_no_text(tiny_infinity: Callable[..., Infinity]) -> None:
    model = tiny_infinity()
    torch.manual_seed(1)
    prompts, options = [torch.randn(2, 24), torch.randn(4, 24)], {"schedule": [1, 2, 3], "seed": 0, "output": "tensor"}
    with torch.no_grad():
        null = [model.text.null_states[:2], model.text.null_states[:4]]
    plain = model.generate(prompts, **options)
    assert torch.allclose(model.generate(prompts, negative_prompt=null, **options), plain, atol=1e-5)
    one_for_all = model.generate(prompts, negative_prompt=[torch.randn(7, 24)], **options)
    assert not torch.allclose(one_for_all, plain, atol=1e-2)


def test_default_and_named_sizes_give_the_promised_pictures(tiny_infinity: Callable[..., Infinity]) -> None:
    # a tokenizer of stride 1 and one layer keep the 1M-sized schedules cheap
    model = tiny_infinity(num_hidden_layers=1, vae_multipliers=[1], default_size="0.06M")
    text = [torch.randn(3, 24)]
    assert model.generate(text, seed=0)[0].size == (16, 16)
    assert model.generate(text, seed=0, aspect_ratio=2.0)[0].size == (11, 22)
    assert model.generate(text, seed=0, aspect_ratio=0.5, size="0.25M")[0].size == (46, 23)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": "a fox"}, "text_encoder=TextEncoder"), ({"prompt": []}, "prompt must be"), ({"prompt": [1]}, "prompt must be"),
        ({"prompt": 3}, "prompt must be"), ({"prompt": None}, "prompt must be"),
        ({"prompt": [torch.zeros(3, 23)]}, "width 24 and up to 10"), ({"prompt": [torch.zeros(11, 24)]}, "width 24 and up to 10"),
        ({"prompt": [torch.zeros(3)]}, "tokens, width"), ({"prompt": [torch.zeros(0, 24)]}, "lengths must lie"),
        ({"size": "2M", "schedule": None}, "no size"), ({"aspect_ratio": 5.0, "schedule": None}, "aspect_ratio"), ({"schedule": []}, "schedule"),
        ({"schedule": [1] * 16}, "knows 15 scales"), ({"temperature": 0.0}, "temperature"), ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"guidance_scale": float("inf")}, "finite"), ({"schedule": [(1, 1, 1), (1, 2, 2)]}, "schedule"),
        ({"guidance_scale": 1, "negative_prompt": [torch.zeros(2, 24)]}, "no effect"), ({"negative_prompt": [torch.zeros(2, 24)] * 3}, "3 negative"),
        ({"top_p": -1.0}, "top_p"), ({"seed": []}, "0 seeds for 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_arguments_explain_themselves(tiny_infinity: Callable[..., Infinity], call: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"prompt": [torch.zeros(3, 24)], "schedule": [1, 2]} | call
    with pytest.raises(OptionError, match=message):
        tiny_infinity().generate(arguments.pop("prompt"), **arguments)


def test_impossible_configurations_raise() -> None:
    for changes, message in (
        ({"hidden_size": 36, "num_attention_heads": 6}, "RoPE"), ({"code_bits": 8, "tokenizer_bits": 3}, "four times"),
        ({"default_size": "huge"}, "huge"), ({"pool_heads": 3}, "pooling"), ({"rope_extent": "far"}, "rope_extent"),
    ):  # fmt: skip
        with pytest.raises(OptionError, match=message):
            InfinityConfig(**changes)


# --- text


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "a", "red", "fox", "in", "snow"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = T5Config(vocab_size=8, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu")
    return TextEncoder(T5EncoderModel(config).eval(), tokenizer, max_tokens=6)


def test_prompts_become_features_that_do_not_depend_on_their_neighbours(encoder: TextEncoder) -> None:
    features = encoder(["a red fox in snow", "a fox"])
    assert features.lengths == (6, 3)
    alone = encoder("a fox")
    assert torch.allclose(features.states[1, :3], alone.states[0], atol=1e-5)
    assert features.mask(torch.device("cpu")).sum(1).tolist() == [6, 3]
    with pytest.raises(OptionError, match="prompts must be"):
        encoder([])


def test_a_prompt_that_is_cut_is_announced(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match=r"1 of 2 prompts \(up to 9 tokens\) were cut to 6"):
        assert encoder(["a a a a a a a a", "fox"]).lengths == (6, 2)


def test_text_prompts_generate(tiny_infinity: Callable[..., Infinity], encoder: TextEncoder) -> None:
    model = tiny_infinity()
    options: dict[str, Any] = {"schedule": [1, 2], "seed": 0, "output": "tensor"}
    from_text = model.generate("a red fox", text_encoder=encoder, **options)
    assert torch.equal(from_text, model.generate(encoder("a red fox"), **options))
    assert len(model.generate(["a red fox", "snow"], text_encoder=encoder, negative_prompt="fox", **options)) == 2


# --- files


def test_save_and_load_round_trip(tiny_infinity: Callable[..., Infinity], tmp_path: Path) -> None:
    model, text = tiny_infinity(code_bits=16), [torch.randn(3, 24)]
    model.save_pretrained(tmp_path)
    again = Infinity.from_pretrained(tmp_path)
    assert {key: value.tolist() for key, value in again.state_dict().items()} == {key: value.tolist() for key, value in model.state_dict().items()}
    options: dict[str, Any] = {"schedule": [1, 2], "seed": 0, "output": "tensor"}
    assert torch.equal(again.generate(text, **options), model.generate(text, **options))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_the_delicate_parts_and_stays_close(tiny_infinity: Callable[..., Infinity], tmp_path: Path, dtype: torch.dtype) -> None:
    model, schedule = tiny_infinity(), Schedule.of(SIZES)
    model.save_pretrained(tmp_path)
    half = Infinity.from_pretrained(tmp_path, dtype=dtype)
    kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
    assert {"blocks.1.attn.log_scale", "blocks.0.gss", "shared_ada.linear.weight"} <= kept
    assert half.text.null_states.dtype == dtype
    text, codes = [torch.randn(3, 24), torch.randn(5, 24)], random_bits(model, 2, schedule)
    exact, rounded = model.forward(text, codes, schedule).logits, half.forward(text, codes, schedule).logits
    # measured: 0.09 to 0.12 % of the largest logit in fp16, 0.5 to 1 % in bf16
    assert (exact - rounded).abs().max() < {torch.float16: 0.003, torch.bfloat16: 0.025}[dtype] * exact.abs().max()
    assert len(model.to(dtype).generate(text, schedule=[1, 2], seed=0)) == 2


def test_accelerate_may_offload_every_module(tiny_infinity: Callable[..., Infinity]) -> None:
    from accelerate import cpu_offload

    model, text = tiny_infinity(), [torch.randn(3, 24)]
    options: dict[str, Any] = {"schedule": [1, 2], "seed": 0, "output": "tensor"}
    before = model.generate(text, **options)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(model.generate(text, **options), before)


@pytest.mark.parametrize(
    ("name", "file", "tokenizer"),
    [
        ("125M", {"layers": 12, "width": 768, "heads": 8, "per_chunk": 3, "bits": 16}, {"ch": 128, "mult": (1, 2, 4, 4, 4), "bits": 16}),
        ("2B", {"layers": 32, "width": 2048, "heads": 16, "per_chunk": 4, "bits": 32}, {"ch": 128, "mult": (1, 2, 4, 4, 4), "bits": 32}),
        ("8B", {"layers": 40, "width": 3584, "heads": 28, "per_chunk": 5, "bits": 56}, {"ch": 128, "mult": (1, 2, 4, 4), "bits": 14}),
    ],
)
def test_every_official_key_of_the_full_sizes_is_known(
    official_infinity: Any, official_infinity_tokenizer: Any, name: str, file: dict[str, Any], tokenizer: dict[str, Any]
) -> None:
    expected = InfinityConfig.official(name).to_dict()
    model = Infinity.from_original(
        official_infinity(**file, device="meta"), official_infinity_tokenizer(**tokenizer, device="meta"), default_size=expected["default_size"]
    )
    assert {key: value for key, value in model.config.to_dict().items() if key != "dtype"} == {k: v for k, v in expected.items() if k != "dtype"}


def test_training_checkpoints_sharded_folders_and_wrapped_tokenizers_load(
    official_infinity: Any, official_infinity_tokenizer: Any, tmp_path: Path
) -> None:
    import json

    from safetensors.torch import save_file

    state, tokenizer = official_infinity(**TINY_FILE), official_infinity_tokenizer(**TINY_TOKENIZER)
    plain = Infinity.from_original(state, tokenizer).state_dict()
    torch.save({"iter": 5, "trainer": {"gpt_fsdp": state}}, tmp_path / "training.pth")
    torch.save({"vae": tokenizer, "step": 3}, tmp_path / "vae.pth")
    folder, keys = tmp_path / "sharded", sorted(state)
    folder.mkdir()
    shards = {"model-00001-of-00002.safetensors": keys[::2], "model-00002-of-00002.safetensors": keys[1::2]}
    for file, part in shards.items():
        save_file({key: state[key].contiguous() for key in part}, folder / file)
    index = {"weight_map": {key: file for file, part in shards.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for weights in (tmp_path / "training.pth", folder):
        loaded = Infinity.from_original(weights, tmp_path / "vae.pth").state_dict()
        assert all(torch.equal(loaded[key], plain[key]) for key in plain)
    save_file({key: state[key].contiguous() for key in keys[1::4]}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lists tensors that no file holds"):
        Infinity.from_original(folder, tokenizer)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        Infinity.from_original(folder, tokenizer)


def test_separate_query_key_and_value_of_the_tokenizer_are_put_together(official_infinity: Any, official_infinity_tokenizer: Any) -> None:
    tokenizer = official_infinity_tokenizer(**TINY_TOKENIZER)
    model = Infinity.from_original(official_infinity(**TINY_FILE), tokenizer)
    parts = [tokenizer[f"decoder.mid.attn_1.{letter}.conv.weight"] for letter in "qkv"]
    assert torch.equal(model.tokenizer.decoder.mid.attn_1.qkv.weight, torch.cat(parts))
    assert torch.equal(model.tokenizer.decoder.up[1].upsample.conv.weight, tokenizer["decoder.up.1.upsample.conv.conv.weight"])
    # a file that does not wrap them loads too
    unwrapped = {key.replace(".conv.conv.", ".CONV.").replace(".conv.", ".").replace("CONV", "conv"): value for key, value in tokenizer.items()}
    again = Infinity.from_original(official_infinity(**TINY_FILE), unwrapped).tokenizer.state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.tokenizer.state_dict().items())


def test_wrong_files_say_what_is_wrong(official_infinity: Any, official_infinity_tokenizer: Any) -> None:
    state, tokenizer = official_infinity(**TINY_FILE), official_infinity_tokenizer(**TINY_TOKENIZER)
    with pytest.raises(CheckpointError, match="not an Infinity transformer"):
        Infinity.from_original(tokenizer, tokenizer)
    with pytest.raises(CheckpointError, match="not an Infinity tokenizer"):
        Infinity.from_original(state, {"vae": {"decoder.conv_out.conv.weight": torch.zeros(3, 8, 3, 3)}})
    with pytest.raises(CheckpointError, match="some are missing"):
        Infinity.from_original({key: value for key, value in state.items() if "block_chunks.1.module.0" not in key}, tokenizer)
    with pytest.raises(CheckpointError, match=r"missing blocks\.3\.cross\.q\.bias"):
        Infinity.from_original({key: value for key, value in state.items() if key != "block_chunks.1.module.1.ca.mat_q.bias"}, tokenizer)
    with pytest.raises(CheckpointError, match=r"predicts 4 bits per token; with this tokenizer there are 3, or 12"):
        Infinity.from_original(state, official_infinity_tokenizer(ch=32, mult=(1, 2), bits=3))
