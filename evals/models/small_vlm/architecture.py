"""The untrained model and its processor: standard Hugging Face classes, sized for a few CPU minutes."""

from __future__ import annotations

from typing import Any

from accel.evals.scenes.draw import PATCH, SIZE
from accel.evals.scenes.questions import vocabulary

WIDTH, MLP, HEADS = 128, 256, 4
TOWER_LAYERS, TEXT_LAYERS = 4, 8
SPECIAL = ("<pad>", "<bos>", "<eos>", "<image>")
PIXEL_MEAN, PIXEL_STD = 0.45, 0.25


def new_model() -> Any:
    """A `LlavaForConditionalGeneration` with random weights, in fp32. The caller seeds torch."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=TOWER_LAYERS, num_attention_heads=HEADS, image_size=SIZE, patch_size=PATCH,
        hidden_act="gelu", projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=TEXT_LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        # 1/√width: the usual 0.02 is meant for wider models, and there the first look-ups take three times the steps
        initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=SPECIAL.index("<image>"), projector_hidden_act="gelu",
        vision_feature_layer=-2, vision_feature_select_strategy="default", image_seq_length=(SIZE // PATCH) ** 2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(linear.weight, std=WIDTH**-0.5)
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False, max_new_tokens=4)
    return model


def new_processor() -> Any:
    """The `LlavaProcessor` that goes with it: one token per word; a prompt is `<image>` and a question."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = {word: i for i, word in enumerate([*SPECIAL, *vocabulary()])}
    assert len(words) <= 64
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", words["<bos>"])])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>", padding_side="left",
        additional_special_tokens=["<image>"], model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    images = CLIPImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, crop_size={"height": SIZE, "width": SIZE}, do_center_crop=False,
        image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        image_token="<image>",
    )  # fmt: skip


def prompt_text(question: str) -> str:
    """What the processor is given as text for one question about one image."""
    return f"<image> {question}"
