"""Tiny random vision-language models with an image in the prompt: the rows of the matrix whose vision tower must stay untouched."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from conformance.families import FAMILIES, N_TOKENS, Family, add, instance, text_config, words
from torch import Tensor
from transformers import PreTrainedModel

IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 7, 8     # token ids

# Sizes of the towers in the manner of CLIP: 4 × 4 patches of 4 × 4 pixels.
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.2,
}
# Sizes of Qwen's towers: patches of 4 × 4 pixels and 2 frames, 2 × 2 of them merged into a token.
_QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_M_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}


def tower(name: str, **changes: Any) -> Any:
    return getattr(transformers, name)(**{**_TOWER, **changes})


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


def prompt(n_image_tokens: int, *, first: int = 4) -> dict[str, Tensor]:
    """A prompt of `N_TOKENS` in which tokens `first` … `first + n_image_tokens − 1` are image placeholders."""
    ids = words()
    ids[:, first : first + n_image_tokens] = IMAGE
    assert ids.shape[1] == N_TOKENS
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _vlm(
    name: str, cls: str, config: str, *, text: Any, vision: Any, images: dict[str, Tensor], n_image_tokens: int,
    is_sparse: bool = True, dense_reason: str | None = None, **changes: Any,
) -> None:  # fmt: skip
    def build() -> tuple[PreTrainedModel, dict[str, Tensor]]:
        whole = getattr(transformers, config)(text_config=text(), vision_config=vision(), tie_word_embeddings=False, **changes)
        return instance(cls, whole), {**prompt(n_image_tokens), **images}

    add(Family(name, build, is_sparse, dense_reason, has_images=True))


def _llama() -> Any:
    return text_config("LlamaConfig")


def _qwen2() -> Any:
    return text_config("Qwen2Config", without=("head_dim",))


_LLAVA = {"image_token_index": IMAGE, "vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

_vlm(
    "llava", "LlavaForConditionalGeneration", "LlavaConfig", text=_llama, vision=lambda: tower("CLIPVisionConfig"),
    images={"pixel_values": pixels(1, 3, 16, 16)}, n_image_tokens=16, image_seq_length=16, **_LLAVA,
)  # fmt: skip
_vlm(
    # one image of 2 × 2 tiles and its thumbnail: 16 + 8 · 8 tokens and a newline behind each of 8 rows
    "llava next", "LlavaNextForConditionalGeneration", "LlavaNextConfig", text=_llama, vision=lambda: tower("CLIPVisionConfig"),
    images={"pixel_values": pixels(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]])}, n_image_tokens=88,
    image_seq_length=16, image_grid_pinpoints=[[32, 32]], **_LLAVA,
)  # fmt: skip
_vlm(
    "llava onevision", "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionConfig", text=_qwen2, vision=lambda: tower("SiglipVisionConfig"),
    images={"pixel_values": pixels(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32]])}, n_image_tokens=88,
    image_grid_pinpoints=[[32, 32]], image_token_index=IMAGE, video_token_index=VIDEO, vision_feature_layer=-1, vision_feature_select_strategy="full",
)  # fmt: skip
_vlm(
    "video llava", "VideoLlavaForConditionalGeneration", "VideoLlavaConfig", text=_llama, vision=lambda: tower("CLIPVisionConfig"),
    images={"pixel_values_images": pixels(1, 3, 16, 16)}, n_image_tokens=16,
    video_token_index=VIDEO, image_seq_length=16, video_seq_length=136, **_LLAVA,
)  # fmt: skip
_vlm(
    "internvl", "InternVLForConditionalGeneration", "InternVLConfig", text=_qwen2, vision=lambda: tower("InternVLVisionConfig"),
    images={"pixel_values": pixels(1, 3, 16, 16)}, n_image_tokens=4, image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5,
)  # fmt: skip
_vlm(
    "idefics3", "Idefics3ForConditionalGeneration", "Idefics3Config", text=_llama, vision=lambda: tower("Idefics3VisionConfig"),
    images={"pixel_values": pixels(1, 1, 3, 16, 16)}, n_image_tokens=4, image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
)  # fmt: skip
_vlm(
    "smolvlm", "SmolVLMForConditionalGeneration", "SmolVLMConfig", text=_llama, vision=lambda: tower("SmolVLMVisionConfig"),
    images={"pixel_values": pixels(1, 1, 3, 16, 16)}, n_image_tokens=4, image_token_id=IMAGE, scale_factor=2, pad_token_id=0,
)  # fmt: skip
_vlm(
    "paligemma", "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
    text=lambda: text_config("GemmaConfig"), vision=lambda: tower("SiglipVisionConfig", projection_dim=64),
    images={"pixel_values": pixels(1, 3, 16, 16)}, n_image_tokens=16, image_token_index=IMAGE, projection_dim=64, hidden_size=64,
    is_sparse=False, dense_reason="not causal",
)  # fmt: skip


def _token_types(n_image_tokens: int, *, first: int = 4) -> Tensor:
    return (torch.arange(N_TOKENS)[None] >= first).long() * (torch.arange(N_TOKENS)[None] < first + n_image_tokens).long()


def _gemma3_text() -> Any:
    layers = ["sliding_attention", "full_attention", "full_attention"]
    return text_config("Gemma3TextConfig", sliding_window=24, layer_types=layers, query_pre_attn_scalar=16)


def _gemma3(name: str, **outcome: Any) -> None:
    _vlm(
        name, "Gemma3ForConditionalGeneration", "Gemma3Config", text=_gemma3_text, vision=lambda: tower("SiglipVisionConfig"),
        images={"pixel_values": pixels(1, 3, 16, 16), "token_type_ids": _token_types(4)}, n_image_tokens=4,
        mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=VISION_START, eoi_token_index=VISION_END, initializer_range=0.2, **outcome,
    )  # fmt: skip


# tokens of an image see each other in both directions, hence every full layer needs its mask
_gemma3("gemma3 vlm", is_sparse=False, dense_reason="mask is not plain causal")


def _gemma3_without_an_image() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    model, _ = FAMILIES["gemma3 vlm"].build()
    ids = words()
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


add(Family("gemma3 vlm, text only", _gemma3_without_an_image))

# 8 × 8 patches of 3 colours, 2 frames and 4 × 4 pixels, merged into 16 tokens
_QWEN_IMAGES = {"pixel_values": pixels(64, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 8, 8]])}
_QWEN_TOKENS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END,
}  # fmt: skip
_QWEN_PROMPT = {**_QWEN_IMAGES, "mm_token_type_ids": _token_types(16)}

_vlm(
    "qwen2 vl", "Qwen2VLForConditionalGeneration", "Qwen2VLConfig",
    text=lambda: text_config("Qwen2VLTextConfig", without=("head_dim",), rope_parameters=_M_ROPE),
    vision=lambda: transformers.Qwen2VLConfig().vision_config.__class__(embed_dim=32, hidden_size=64, mlp_ratio=1, **_QWEN_TOWER),
    images=_QWEN_PROMPT, n_image_tokens=16, **_QWEN_TOKENS,
)  # fmt: skip
_vlm(
    "qwen2.5 vl", "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
    text=lambda: text_config("Qwen2_5_VLTextConfig", without=("head_dim",), rope_parameters=_M_ROPE),
    vision=lambda: transformers.Qwen2_5_VLConfig().vision_config.__class__(
        hidden_size=32, intermediate_size=32, out_hidden_size=64, window_size=16, fullatt_block_indexes=[1], **_QWEN_TOWER
    ),
    images=_QWEN_PROMPT, n_image_tokens=16, **_QWEN_TOKENS,
)  # fmt: skip
_vlm(
    "qwen3 vl", "Qwen3VLForConditionalGeneration", "Qwen3VLConfig",
    text=lambda: text_config("Qwen3VLTextConfig", rope_parameters={**_M_ROPE, "mrope_interleaved": True}),
    vision=lambda: transformers.Qwen3VLVisionConfig(
        hidden_size=32, intermediate_size=32, out_hidden_size=64, num_position_embeddings=64, deepstack_visual_indexes=[0, 1], **_QWEN_TOWER
    ),
    images=_QWEN_PROMPT, n_image_tokens=16, **_QWEN_TOKENS,
)  # fmt: skip
