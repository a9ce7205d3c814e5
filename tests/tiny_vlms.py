"""Tiny random vision-language models on disk, for `tests/vllm`: weights, tokenizer and image processor, as vLLM and transformers both read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

VOCAB = 512
IMAGE, VIDEO, VISION_START, VISION_END = 5, 6, 7, 8     # token ids
_NAMES = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>", VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
_TEXT: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB,
    "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.12, "tie_word_embeddings": False,
}  # fmt: skip
# 16 × 16 patches of 4 × 4 pixels
_TOWER: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "patch_size": 4,
    "initializer_range": 0.2,
}  # fmt: skip
_LLAVA: dict[str, Any] = {"image_token_index": IMAGE, "projector_hidden_act": "gelu", "tie_word_embeddings": False}


def tokenizer(image: str = "<|image_pad|>") -> Any:
    """A word for every id; prompts are token ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = {**_NAMES, IMAGE: image, 0: "<pad>", 1: "<s>", 2: "</s>"}
    words = Tokenizer(models.WordLevel({names.get(i, f"w{i}"): i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="w3")
    found.add_special_tokens({"additional_special_tokens": [names[i] for i in _NAMES]})
    return found


def save_llava(folder: Path, *, tower: str = "clip", text: str = "LlamaConfig") -> str:
    """A LLaVA with 256 tokens per picture; tower: "clip" or "siglip"; text: the configuration of its decoder."""
    import transformers
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, SiglipVisionConfig

    is_clip = tower == "clip"
    vision = CLIPVisionConfig(**_TOWER) if is_clip else SiglipVisionConfig(**_TOWER)
    layer, strategy = (-2, "default") if is_clip else (-1, "full")
    config = LlavaConfig(
        text_config=getattr(transformers, text)(**_TEXT), vision_config=vision, vision_feature_layer=layer, vision_feature_select_strategy=strategy,
        image_seq_length=256, **_LLAVA,
    )  # fmt: skip
    processor = LlavaProcessor(
        _image_processor("CLIPImageProcessor"), tokenizer("<image>"), patch_size=4, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(is_clip), image_token="<image>",
    )  # fmt: skip
    return _save(folder, LlavaForConditionalGeneration, config, processor)


def save_llava_next(folder: Path) -> str:
    """A LLaVA-NeXT with 64 tokens per tile and up to four tiles beside the overview."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor

    pinpoints = [[64, 128], [128, 64], [128, 128]]
    config = LlavaNextConfig(
        text_config=LlamaConfig(**_TEXT), vision_config=CLIPVisionConfig(**{**_TOWER, "patch_size": 8}), image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=64, **_LLAVA,
    )  # fmt: skip
    processor = LlavaNextProcessor(
        _image_processor("LlavaNextImageProcessor", image_grid_pinpoints=pinpoints), tokenizer("<image>"), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, image_token="<image>",
    )  # fmt: skip
    return _save(folder, LlavaNextForConditionalGeneration, config, processor)


def save_qwen2_5_vl(folder: Path) -> str:
    """A Qwen2.5-VL with tokens of 8 × 8 pixels, whose first layer attends in windows of 4 × 4 tokens."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    vision = {
        "depth": 3, "num_heads": 2, "hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 128, "patch_size": 4, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "window_size": 32, "fullatt_block_indexes": [1, 2], "initializer_range": 0.2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=VISION_START, vision_end_token_id=VISION_END, tie_word_embeddings=False, initializer_range=0.12,
    )  # fmt: skip
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 64, "longest_edge": 128 * 128}}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessor(**sizes), tokenizer(), Qwen2VLVideoProcessor(**sizes))
    return _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor)


def _image_processor(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, **changes)


def _save(folder: Path, cls: Any, config: Any, processor: Any) -> str:
    torch.manual_seed(0)
    model = cls(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if hasattr(config, "projector_hidden_act"):
        # vLLM knows the tower's weights by their older name, transformers reads both
        path = folder / "model.safetensors"
        weights = load_file(path)
        renamed = {_old_name(name): t for name, t in weights.items()}
        save_file(renamed, path, metadata={"format": "pt"})
    return str(folder)


def _old_name(name: str) -> str:
    before, found, after = name.partition("vision_tower.")
    return f"{before}{found}vision_model.{after}" if found and not after.startswith("vision_model.") else name


def picture(width: int, height: int, seed: int = 0) -> Any:
    """A random photo with large and small structure."""
    from PIL import Image

    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(3, 4, 4, generator=rng)
    fine = torch.rand(3, height, width, generator=rng)
    whole = torch.nn.functional.interpolate(coarse[None], size=(height, width), mode="bilinear")[0]
    return Image.fromarray(((0.7 * whole + 0.3 * fine) * 255).byte().permute(1, 2, 0).numpy())


def prompt(n_before: int, pictures: Sequence[Any], n_after: int, seed: int = 0) -> dict[str, Any]:
    """A prompt for vLLM: words, one placeholder per picture with a word behind each, words."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(9, VOCAB, (n_before + n_after + len(pictures),), generator=rng).tolist()
    ids = words[:n_before]
    for i in range(len(pictures)):
        ids += [VISION_START, IMAGE, VISION_END, words[n_before + i]]
    ids += words[n_before + len(pictures) :]
    return {"prompt_token_ids": ids, **({"multi_modal_data": {"image": list(pictures)}} if pictures else {})}


def for_transformers(processor: Any, given: Mapping[str, Any], n_tokens: Sequence[int]) -> dict[str, Tensor]:
    """The same prompt for transformers' `generate`. n_tokens: of each picture, whole."""
    left = list(n_tokens)
    ids = [token for i in given["prompt_token_ids"] for token in ([IMAGE] * left.pop(0) if i == IMAGE else [i])]
    pictures = given.get("multi_modal_data", {}).get("image", [])
    made = dict(processor.image_processor(pictures, return_tensors="pt")) if pictures else {}
    found = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **made}
    if "image_grid_thw" in made:
        found["mm_token_type_ids"] = (found["input_ids"] == IMAGE).long()
    return found
