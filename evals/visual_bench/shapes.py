"""Random-weight models of known shapes with prompts for them, to measure time and bytes. Their answers mean nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import OptionError
from accel.evals.models import LoadedVisionModel, prepared

IMAGE_TOKEN, PAD_TOKEN = 32000, 32001
TEXT_TOKENS = 100               # with 576 visual ones the 676 tokens of visual-token-pruning.md §9.1


@dataclass(frozen=True)
class VisualPrompt:
    """What a model's forward takes for B equal prompts without padding.

    n_visual: visual tokens of each, structural ones included; n_patches: without them. n_text: all other tokens. n_tiles: pictures that the tower
    sees for each.
    """

    inputs: dict[str, Tensor]
    n_visual: int
    n_patches: int
    n_text: int
    n_tiles: int

    @property
    def batch(self) -> int:
        return int(self.inputs["input_ids"].shape[0])


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, its layers apart. `tower` and `text` go to their configs as they are."""

    tower: dict[str, int]
    text: dict[str, int]
    n_tower_layers: int
    n_layers: int

    @property
    def grid(self) -> int:
        """Patches along a side of a picture."""
        return self.tower["image_size"] // self.tower["patch_size"]


SHAPES = {
    "llava-1.5-7b": Sizes(
        # CLIP-L/14 at 336 pixels, and Llama 7B
        {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768},
        {"vocab_size": 32064, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32},
        n_tower_layers=24,
        n_layers=32,
    )
}


def patch_tokens(sizes: Sizes) -> tuple[int, int]:
    """The patch tokens that a prompt may have: one picture, or an overview with four tiles (LLaVA-NeXT)."""
    return sizes.grid**2, 5 * sizes.grid**2


def random_model(sizes: Sizes, n_patches: int, *, n_layers: int, n_tower_layers: int, dtype: torch.dtype, device: str) -> Any:
    """A LLaVA (one picture per prompt) or LLaVA-NeXT (five tiles) with random weights and so many of its layers. The caller seeds torch."""
    from transformers import AutoModelForImageTextToText

    if not 1 <= n_layers <= sizes.n_layers or not 2 <= n_tower_layers <= sizes.n_tower_layers:
        raise OptionError(
            f"this shape has 1 to {sizes.n_layers} decoder layers and 2 to {sizes.n_tower_layers} tower layers, got {n_layers} and {n_tower_layers}"
        )
    model = AutoModelForImageTextToText.from_config(config_of(sizes, n_patches, n_layers=n_layers, n_tower_layers=n_tower_layers), dtype=dtype)
    return prepared(model, dtype, device)


def config_of(sizes: Sizes, n_patches: int, *, n_layers: int, n_tower_layers: int) -> Any:
    """The transformers configuration of that model."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

    one, five = patch_tokens(sizes)
    if n_patches not in (one, five):
        raise OptionError(f"this shape's prompts have {one} or {five} patch tokens, got {n_patches}")
    vision = CLIPVisionConfig(num_hidden_layers=n_tower_layers, **sizes.tower)
    text = LlamaConfig(num_hidden_layers=n_layers, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=PAD_TOKEN, **sizes.text)
    shared = {
        "vision_config": vision, "text_config": text, "image_token_id": IMAGE_TOKEN, "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default", "image_seq_length": one,
    }  # fmt: skip
    if n_patches == one:
        return LlavaConfig(**shared)
    side = 2 * sizes.tower["image_size"]
    return LlavaNextConfig(image_grid_pinpoints=[[side, side]], **shared)


def random_prompt(sizes: Sizes, n_patches: int, *, n_text: int, batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> VisualPrompt:
    """Random pictures, and text of random words around their tokens."""
    if n_text < 2 or batch < 1:
        raise OptionError(f"a prompt has at least 2 text tokens and a batch at least 1 prompt, got {n_text} and {batch}")
    draw = torch.Generator().manual_seed(seed)
    side, is_one = sizes.tower["image_size"], n_patches == sizes.grid**2
    # a mosaic of 2 × 2 tiles has a newline behind each of its rows
    n_visual = n_patches if is_one else n_patches + 2 * sizes.grid
    words = torch.randint(3, IMAGE_TOKEN, (batch, n_text), generator=draw)
    images = torch.full((batch, n_visual), IMAGE_TOKEN)
    ids = torch.cat([words[:, : n_text // 2], images, words[:, n_text // 2 :]], 1)
    pixels = torch.randn(batch, *(() if is_one else (5,)), 3, side, side, generator=draw)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(dtype)}
    if not is_one:
        inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * batch)
    return VisualPrompt({name: t.to(device) for name, t in inputs.items()}, n_visual, n_patches, n_text, 1 if is_one else 5)


def scene_prompt(loaded: LoadedVisionModel, *, batch: int) -> VisualPrompt:
    """The same question about `batch` drawn scenes, through the model's own processor."""
    from PIL import Image

    from accel.evals.scenes import held_out

    if loaded.processor is None or loaded.prompt_text is None:
        raise OptionError(f"{loaded.name} has no processor and prompt of its own: measure a --shape, or a model that ships with accel")
    items = held_out("color", "test", batch)
    question = loaded.prompt_text(items[0].question.text)
    pictures = [Image.fromarray(item.scene.image) for item in items]
    device = next(iter(loaded.model.parameters())).device
    inputs = dict(loaded.processor(images=pictures, text=[question] * batch, return_tensors="pt").to(device))
    inputs["pixel_values"] = inputs["pixel_values"].to(loaded.model.dtype)
    n_visual = int((inputs["input_ids"][0] == loaded.model.config.image_token_id).sum())
    return VisualPrompt(inputs, n_visual, n_visual, inputs["input_ids"].shape[1] - n_visual, 1)
