"""Text features for Infinity: from a T5 encoder, or computed beforehand."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.errors import OptionError


@dataclass(frozen=True)
class TextFeatures:
    """Encoder states of a batch of prompts: states (b, L, width), padded at the end; lengths (b,), tokens that count."""

    states: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.states.dim() != 3 or self.states.shape[0] != len(self.lengths) or not self.lengths:
            raise OptionError(f"states must be (prompts, tokens, width) with a length per prompt, got {tuple(self.states.shape)} and {self.lengths}")
        if min(self.lengths) < 1 or max(self.lengths) > self.states.shape[1]:
            raise OptionError(f"lengths must lie in 1…{self.states.shape[1]}, got {self.lengths}")

    @classmethod
    def of(cls, prompts: Sequence[Tensor]) -> TextFeatures:
        """Features of prompts of any lengths, each (tokens, width)."""
        if not prompts or any(one.dim() != 2 or one.shape[1] != prompts[0].shape[1] for one in prompts):
            raise OptionError(f"each prompt's features must be (tokens, width) with one width, got {[tuple(one.shape) for one in prompts]}")
        return cls(torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True), tuple(one.shape[0] for one in prompts))

    def mask(self, device: torch.device) -> Tensor:
        """(b, L) bool: the tokens that count."""
        return torch.arange(self.states.shape[1], device=device) < torch.tensor(self.lengths, device=device)[:, None]


class TextEncoder:
    """A T5 encoder with its tokenizer. Call it with prompts, get `TextFeatures`."""

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int = 512) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    @classmethod
    def from_pretrained(cls, name: str = "google/flan-t5-xl", *, device: torch.device | str | None = None, **kwargs: Any) -> TextEncoder:
        """The encoder half of a T5 model; `kwargs` (dtype, device_map, …) go to transformers."""
        from transformers import AutoTokenizer, T5EncoderModel

        model = T5EncoderModel.from_pretrained(name, **kwargs).eval()
        return cls(model if device is None else model.to(device), AutoTokenizer.from_pretrained(name))

    @torch.no_grad()
    def __call__(self, prompts: str | Sequence[str]) -> TextFeatures:
        """Features of one or several prompts. A prompt above `max_tokens` is cut, with a warning."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise OptionError(f"prompts must be a string or a non-empty list of strings, got {prompts!r}")
        ids = [self.tokenizer(text).input_ids for text in texts]
        if cut := [len(one) for one in ids if len(one) > self.max_tokens]:
            warnings.warn(f"{len(cut)} of {len(ids)} prompts (up to {max(cut)} tokens) were cut to {self.max_tokens} tokens", stacklevel=2)
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, padding_side="right", return_tensors="pt")
        batch = {key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}
        return TextFeatures(self.model(**batch).last_hidden_state.float(), tuple(batch["attention_mask"].sum(1).tolist()))
