"""Calls of `get_image_features` and `get_video_features` with several pictures of different shapes, and the tokens that each must become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from conformance.families import instance, text_config
from conformance.vision_families import IMAGE, VIDEO, VISION_END, VISION_START, tower
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model and one call of `get_image_features` or `get_video_features`. tokens: of each picture; units: (height, width, n_structural) of each."""

    build: Callable[[], nn.Module]
    call: dict[str, Any]
    tokens: list[int]
    units: list[list[tuple[int, int, int]]]
    modality: str = "image"


CASES: dict[str, Case] = {}


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def model_of(name: str, text: str, vision: Any, **changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        without = () if text.startswith(("Gemma", "Llama", "Qwen3")) else ("head_dim",)
        extra: dict[str, Any] = {"rope_parameters": M_ROPE} if "VL" in text else {}
        whole = getattr(transformers, f"{name}Config")(
            text_config=text_config(text, without=without, **extra), vision_config=vision(), tie_word_embeddings=False, **changes
        )
        return instance(f"{name}ForConditionalGeneration", whole)

    return build


M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
LLAVA = {"image_token_index": IMAGE, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48], [48, 16]]
# 4 × 4 patches each
CLIP, SIGLIP = (lambda: tower("CLIPVisionConfig")), (lambda: tower("SiglipVisionConfig"))

llava = model_of("Llava", "LlamaConfig", CLIP, image_seq_length=16, **LLAVA)
llava_next = model_of("LlavaNext", "LlamaConfig", CLIP, image_grid_pinpoints=PINPOINTS, image_seq_length=16, **LLAVA)
video_llava = model_of("VideoLlava", "LlamaConfig", CLIP, video_token_index=VIDEO, image_seq_length=16, video_seq_length=136, **LLAVA)
paligemma = model_of(
    "PaliGemma", "GemmaConfig", lambda: tower("SiglipVisionConfig", projection_dim=64), image_token_index=IMAGE, projection_dim=64, hidden_size=64
)
internvl = model_of(
    "InternVL", "Qwen2Config", lambda: tower("InternVLVisionConfig", image_size=32), image_token_id=IMAGE, image_seq_length=16, downsample_ratio=0.5
)


def onevision(aspect: str, side: int = 4) -> Callable[[], nn.Module]:
    return model_of(
        "LlavaOnevision", "Qwen2Config", lambda: tower("SiglipVisionConfig", image_size=4 * side), image_grid_pinpoints=[*PINPOINTS, [32, 48]],
        image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full", vision_aspect_ratio=aspect,
    )  # fmt: skip


def idefics(name: str, merge: int = 2) -> Callable[[], nn.Module]:
    vision = lambda: tower(f"{name}VisionConfig", image_size=24)    # noqa: E731
    return model_of(name, "LlamaConfig", vision, image_token_id=IMAGE, scale_factor=merge, pad_token_id=0)


def gemma3(image_size: int) -> Callable[[], nn.Module]:
    return model_of(
        "Gemma3", "Gemma3TextConfig", lambda: tower("SiglipVisionConfig", image_size=image_size), mm_tokens_per_image=4,
        image_token_index=IMAGE, boi_token_index=VISION_START, eoi_token_index=VISION_END, initializer_range=0.2,
    )  # fmt: skip


def qwen(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    def vision() -> Any:
        cls = type(getattr(transformers, f"{name}Config")().vision_config)
        return cls(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, **sizes)

    return model_of(
        name, f"{name}TextConfig", vision,
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
    )  # fmt: skip


def add(name: str, build: Callable[[], nn.Module], call: dict[str, Any], *units: list[tuple[int, int, int]], modality: str = "image") -> None:
    tokens = [sum(height * width + n_structural for height, width, n_structural in picture) for picture in units]
    CASES[name] = Case(build, call, tokens, list(units), modality)


add("llava", llava, {"pixel_values": pixels(2, 3, 16, 16)}, [(4, 4, 0)], [(4, 4, 0)])
add("llava, wide", llava, {"pixel_values": pixels(2, 3, 16, 24), "interpolate_pos_encoding": True}, [(4, 6, 0)], [(4, 6, 0)])
add("llava full", llava, {"pixel_values": pixels(2, 3, 16, 16), "vision_feature_select_strategy": "full"}, [(4, 4, 1)], [(4, 4, 1)])
# 2 × 2 tiles; three in a row, of which the border takes a row above and below; a column whose tiles lose their outer columns
add(
    "llava next", llava_next, {"pixel_values": pixels(3, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32], [10, 48], [40, 7]])},
    [(4, 4, 0), (4, 4, 0), (4, 4, 4), (4, 4, 0), (4, 4, 4)],
    [(4, 4, 0), (2, 4, 0), (2, 4, 0), (2, 4, 2)],
    [(4, 4, 0), (4, 2, 4), (4, 2, 4), (4, 2, 4)],
)  # fmt: skip
add(
    "llava onevision", onevision("anyres_max_9"), {"pixel_values": pixels(2, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32], [10, 48]])},
    [(4, 4, 0), (8, 8, 8)], [(4, 4, 0), (2, 12, 2)],
)  # fmt: skip
# √(8 · 12 / (1 · 16)) = 2.45: 8 × 12 patches shrink to 3 × 4 tokens
add(
    "llava onevision, shrunk", onevision("anyres_max_1"),
    {"pixel_values": pixels(2, 7, 3, 16, 16), "image_sizes": torch.tensor([[32, 48], [22, 48]])},
    [(4, 4, 0), (3, 4, 3)], [(4, 4, 0), (2, 5, 2)],
)  # fmt: skip
add(
    "llava onevision, several", onevision("anyres_max_9"),
    {"pixel_values": pixels(2, 1, 3, 16, 16), "image_sizes": torch.tensor([[32, 32], [10, 48]]), "batch_num_images": torch.tensor([2])},
    [(4, 4, 1)], [(4, 4, 1)],
)  # fmt: skip
add(
    "llava onevision video", onevision("anyres_max_9", side=5), {"pixel_values_videos": pixels(2, 3, 3, 20, 20)},
    *[[(3, 3, 0), (3, 3, 0), (3, 3, 1)]] * 2, modality="video",
)  # fmt: skip
add("video llava", video_llava, {"pixel_values": pixels(2, 3, 16, 16)}, [(4, 4, 0)], [(4, 4, 0)])
add("video llava video", video_llava, {"pixel_values_videos": pixels(2, 3, 3, 16, 16)}, *[[(4, 4, 1)] * 3] * 2, modality="video")
add("internvl", internvl, {"pixel_values": pixels(2, 3, 32, 32)}, [(4, 4, 0)], [(4, 4, 0)])
add("paligemma", paligemma, {"pixel_values": pixels(2, 3, 16, 16)}, [(4, 4, 0)], [(4, 4, 0)])
add("paligemma, wide", paligemma, {"pixel_values": pixels(1, 3, 12, 20), "interpolate_pos_encoding": True}, [(3, 5, 0)])
add("gemma3", gemma3(24), {"pixel_values": pixels(2, 3, 24, 24)}, [(2, 2, 0)], [(2, 2, 0)])
# 7 × 7 patches, of which squares of 3 × 3 leave a row and a column over
add("gemma3, rest", gemma3(28), {"pixel_values": pixels(2, 3, 28, 28)}, [(2, 2, 0)], [(2, 2, 0)])

# two rows of the batch; the second has one tile and two that pad
_TILES = pixels(2, 3, 3, 24, 24)
_TILES[1, 1:] = 0
for _name in ("Idefics3", "SmolVLM"):
    add(_name.lower(), idefics(_name), {"pixel_values": _TILES}, *[[(3, 3, 0)]] * 4)
    add(f"{_name.lower()}, r = 3", idefics(_name, 3), {"pixel_values": _TILES}, *[[(2, 2, 0)]] * 4)

_SIZES = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": 64}
QWENS = {
    "qwen2 vl": qwen("Qwen2VL", embed_dim=32, hidden_size=64, mlp_ratio=1),
    # windows of 2 × 2 tokens
    "qwen2.5 vl": qwen("Qwen2_5_VL", window_size=16, fullatt_block_indexes=[0], **_SIZES),
    "qwen3 vl": qwen("Qwen3VL", num_position_embeddings=64, deepstack_visual_indexes=[0, 1], **_SIZES),
}
for _name, _build in QWENS.items():
    add(
        _name, _build, {"pixel_values": pixels(60 + 24, 96), "image_grid_thw": torch.tensor([[1, 10, 6], [1, 4, 6]])},
        [(5, 3, 0)], [(2, 3, 0)],
    )  # fmt: skip
    add(
        f"{_name} video", _build, {"pixel_values_videos": pixels(2 * 60 + 3 * 8, 96), "video_grid_thw": torch.tensor([[2, 6, 10], [3, 2, 4]])},
        [(3, 5, 0)] * 2, [(1, 2, 0)] * 3, modality="video",
    )  # fmt: skip
