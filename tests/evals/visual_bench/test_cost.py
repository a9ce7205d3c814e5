"""The cost model gives the specification's numbers, and exactly the FLOPs that torch counts in a small model, whole and pruned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import accel
from accel.errors import OptionError, UnsupportedError
from accel.evals.visual_bench.cost import DecoderShape, EncoderShape, decode_bytes, encoder_flops, kv_bytes, layer_flops, prefill_flops
from accel.evals.visual_bench.shapes import SHAPES, Sizes, config_of, random_model, random_prompt

LLAMA_7B = DecoderShape(n_layers=32, hidden_size=4096, n_heads=32, n_kv_heads=32, head_dim=128, mlp_size=11008, vocab_size=32064)
TINY = Sizes(
    {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32},
    {"vocab_size": 32064, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2},
    n_tower_layers=3,
    n_layers=4,
)


@pytest.mark.parametrize("tokens, tera", [(676, 9.00), (3000, 43.6)], ids=["llava-1.5-7b", "llava-next-7b"])
def test_prefill_flops_are_those_of_the_specification(tokens: int, tera: float) -> None:
    found = prefill_flops(LLAMA_7B, [tokens] * 32) / 1e12
    assert round(found, 3 - len(str(int(found)))) == tera


def test_cache_bytes_are_those_of_the_specification() -> None:
    assert kv_bytes(LLAMA_7B, [1] * 32, 2) == 2**19
    assert kv_bytes(LLAMA_7B, [2880] * 32, 2) == 1440 * 2**20
    assert kv_bytes(LLAMA_7B, [2880] * 32, 4) == 2880 * 2**20


def test_the_encoder_of_clip_large_at_336_pixels() -> None:
    clip = EncoderShape.from_config(config_of(SHAPES["llava-1.5-7b"], 576, n_layers=32, n_tower_layers=24))
    assert clip is not None
    assert (clip.n_patches, clip.n_prefix, clip.projected_size) == (576, 1, 4096)
    # 577 rows: four projections, both products of attention, two MLP matrices; 576 patches of 588 numbers; two linear layers behind
    layer = 577 * 4 * 1024**2 + 2 * 577**2 * 1024 + 577 * 2 * 1024 * 4096
    assert encoder_flops(clip) == 2 * (24 * layer + 576 * 588 * 1024 + 576 * (1024 * 4096 + 4096**2))
    assert encoder_flops(clip, 5) == 5 * encoder_flops(clip)


def test_the_shape_of_7b_is_read_from_its_config() -> None:
    config = config_of(SHAPES["llava-1.5-7b"], 2880, n_layers=32, n_tower_layers=24)
    assert config.model_type == "llava_next"
    assert DecoderShape.from_config(config) == LLAMA_7B


def test_layers_count_with_their_own_tokens() -> None:
    shape = LLAMA_7B.with_layers(3)
    assert prefill_flops(shape, [9, 5, 2]) == layer_flops(shape, 9) + layer_flops(shape, 5) + layer_flops(shape, 2)
    assert kv_bytes(shape, [9, 5, 2], 2) == 16 * kv_bytes(LLAMA_7B.with_layers(1), [1], 2)
    with pytest.raises(OptionError, match="3 layers"):
        prefill_flops(shape, [9, 5])


def test_grouped_heads_save_projections_and_cache() -> None:
    grouped = DecoderShape(n_layers=1, hidden_size=8, n_heads=4, n_kv_heads=1, head_dim=2, mlp_size=16, vocab_size=10)
    assert grouped.layer_weights == 2 * 8 * 8 + 2 * 8 * 2 + 3 * 8 * 16
    assert kv_bytes(grouped, [3], 2) == 3 * 2 * 2 * 2
    assert decode_bytes(grouped, 100, 2) == 2 * (grouped.layer_weights + 80) + 100


def test_what_it_cannot_describe_is_refused_or_unknown() -> None:
    text = SimpleNamespace(num_experts=8, model_type="some_moe")
    with pytest.raises(UnsupportedError, match="mixture of experts"):
        DecoderShape.from_config(SimpleNamespace(get_text_config=lambda decoder: text))
    vision = SimpleNamespace(model_type="qwen2_vl")
    assert EncoderShape.from_config(SimpleNamespace(model_type="qwen2_vl", vision_config=vision)) is None


@pytest.mark.parametrize("n_patches", [16, 80], ids=["one picture", "five tiles"])
def test_torch_counts_the_same_flops_in_encoder_and_layers(n_patches: int) -> None:
    model, prompt = tiny(n_patches)
    counted = flops(model, prompt)
    encoder = EncoderShape.from_config(model.config)
    assert encoder is not None
    assert counted["vision"] == encoder_flops(encoder, prompt.n_tiles)
    assert counted["layers"] == prefill_flops(DecoderShape.from_config(model.config), [prompt.n_visual + prompt.n_text] * 4)


@pytest.mark.parametrize(
    "method, options, kept, reading",
    [
        ("fastervlm", {"keep": 0.25}, [4, 4, 4, 4], 0),
        # FastV reads the newest row of one layer's attention: 22 keys of width 32
        ("fastv", {"keep": 0.5, "layer": 3}, [16, 16, 16, 8], 2 * 22 * 32),
    ],
    ids=["front", "layer"],
)
def test_a_pruned_prefill_runs_the_flops_of_the_tokens_that_are_left(method: str, options: dict[str, Any], kept: list[int], reading: int) -> None:
    model, prompt = tiny(16)
    whole = flops(model, prompt)
    with accel.apply(model, method, **options):
        counted = flops(model, prompt)
    assert counted["layers"] == prefill_flops(DecoderShape.from_config(model.config), [n + prompt.n_text for n in kept]) + reading
    assert counted["layers"] < whole["layers"]


def tiny(n_patches: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = random_model(TINY, n_patches, n_layers=4, n_tower_layers=3, dtype=torch.float32, device="cpu")
    # torch counts what it sees, and a fused attention on a CPU is not among it
    model.set_attn_implementation("eager")
    return model, random_prompt(TINY, n_patches, n_text=6, batch=1, dtype=torch.float32, device="cpu")


def flops(model: Any, prompt: Any) -> dict[str, int]:
    """FLOPs that torch counts in the matrix products and convolutions of encoder ("vision") and decoder layers."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**prompt.inputs)
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def of(*ends: str) -> int:
        found = {name: n for name, n in by_module.items() if any(name.endswith(end) for end in ends)}
        assert len(found) == len(ends), sorted(by_module)
        return sum(found.values())

    layers = [f"language_model.layers.{i}" for i in range(len(model.model.language_model.layers))]
    return {"vision": of("vision_tower", "multi_modal_projector"), "layers": of(*layers)}
