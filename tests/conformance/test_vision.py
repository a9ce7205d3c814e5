"""Vision-language models: the text stack is patched, the vision tower is not."""

from __future__ import annotations

import inspect

import pytest
import torch
from conformance.families import FAMILIES
from conformance.methods import SPARSE_METHODS
from conformance.subjects import subject
from torch import Tensor, nn

import accel
from accel.patches.hosts.transformers.layers import SLOT

with_images = pytest.mark.parametrize("name", [f.name for f in FAMILIES.values() if f.has_images])
METHOD = SPARSE_METHODS[0]
IMAGE_ARGUMENTS = ("pixel_values", "pixel_values_images", "image_sizes", "image_grid_thw")


def tensors_of(features: object) -> list[Tensor]:
    """All tensors in whatever `get_image_features` returned."""
    if isinstance(features, Tensor):
        return [features]
    parts = features.values() if hasattr(features, "values") else features if isinstance(features, list | tuple) else []
    return [t for part in parts for t in tensors_of(part)]


def image_features(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    wanted = inspect.signature(model.get_image_features).parameters
    images = {name: value for name, value in inputs.items() if name in IMAGE_ARGUMENTS}
    # Video-LLaVA calls the pictures differently in its forward and, from release to release, here
    images = {name if name in wanted else name.removesuffix("_images"): value for name, value in images.items()}
    return tensors_of(model.get_image_features(**images))


@with_images
@torch.no_grad()
def test_the_picture_reaches_the_text(name: str) -> None:
    it = subject(name)
    other = {key: value + 1 if key.startswith("pixel_values") else value for key, value in it.inputs.items()}
    assert (it.model(**other).logits - it.dense.logits).abs().max() > 1e-3


@with_images
@torch.no_grad()
def test_the_vision_tower_stays_as_it_is(name: str) -> None:
    it = subject(name)
    plain = image_features(it.model, it.inputs)
    tower = it.model.get_encoder(modality="image")
    implementations = [m.config._attn_implementation for m in tower.modules() if hasattr(m, "config")]
    assert plain
    assert implementations
    with accel.apply(it.model, "streaming", block_size=16, window_blocks=1, min_seq_len=0):
        patched = image_features(it.model, it.inputs)
        assert not any(hasattr(m, SLOT) for m in tower.modules())
        assert [m.config._attn_implementation for m in tower.modules() if hasattr(m, "config")] == implementations
    assert len(patched) == len(plain)
    assert all(torch.equal(a, b) for a, b in zip(patched, plain, strict=True))


@pytest.mark.parametrize("name", ["llava", "qwen2.5 vl", "qwen3 vl", "idefics3"])
@torch.no_grad()
def test_a_text_prompt_is_sparse_in_a_vision_language_model(name: str) -> None:
    it = subject(name)
    ids = it.inputs["input_ids"].clone()
    ids[ids < 10] = 10
    dense = it.model(input_ids=ids).logits
    with accel.apply(it.model, METHOD.sparse()) as handle:
        assert not torch.equal(it.model(input_ids=ids).logits, dense)
        assert handle.stats.total.sparse_calls == 3
