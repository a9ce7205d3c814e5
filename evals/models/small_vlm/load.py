"""Loads the small vision-language model that lies beside this file, with its processor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError
from accel.evals.models import LoadedVisionModel, prepared
from accel.evals.models.small_vlm.architecture import prompt_text

if TYPE_CHECKING:
    import torch

# what the model reads, told before it is loaded
READS = ("picture",)
HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"


def load(dtype: torch.dtype, device: str) -> LoadedVisionModel:
    """The trained `LlavaForConditionalGeneration` in `dtype` on `device`, its tokenizer and its processor; nothing is fetched."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)
    processor = load_processor()
    card = (HERE / "card.md").read_text(encoding="utf-8")
    return LoadedVisionModel(
        prepared(model, dtype, device), processor.tokenizer, "small-vlm", card=card, processor=processor, prompt_text=prompt_text, reads_text=False
    )


def load_processor() -> Any:
    """The `LlavaProcessor` of the model, from its saved files. Raises AccelError where Pillow is missing."""
    if importlib.util.find_spec("PIL") is None:
        raise AccelError("the small vision-language model takes pictures through Pillow, which is missing. Install it with:\n    pip install pillow")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(WEIGHTS, local_files_only=True)
