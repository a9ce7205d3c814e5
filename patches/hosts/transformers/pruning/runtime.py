"""What a patched model is in the middle of, per thread: which pictures belong to which prompt.

Pictures that are encoded inside a forward belong to that forward; those that `generate` encodes ahead belong to that call of `generate`, for all
of its steps. Features that a user encoded earlier and hands over are known by the mark that they were given then.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.passes import Pass
from accel.patches.hosts.transformers.pruning.prompt import Prompt, Seen
from accel.patches.hosts.transformers.pruning.vision import Modality

Pictures = dict[Modality, list[Seen]]
SEEN = "_accel_seen"        # on what `get_image_features` returned


def mark(features: Any, seen: list[Seen]) -> None:
    """Has encoded features remember what was seen while they were made; plain tensors and tuples cannot."""
    if hasattr(features, "__dict__") and not isinstance(features, Tensor):
        object.__setattr__(features, SEEN, seen)


@dataclass
class Source:
    """Where the ids and pictures of a prompt come from: a call of `generate`, or a forward.

    ids: (B, S), the whole prompt or what was passed of it; None where embeddings came instead. has_strangers: ready-made features were passed that
    nobody saw being made.
    """

    ids: Tensor | None
    pictures: Pictures = field(default_factory=dict)
    has_strangers: bool = False

    @classmethod
    def of(cls, ids: Any, given: Any) -> Source:
        """given: `mm_encoder_outputs`, features by modality."""
        found = cls(ids if isinstance(ids, Tensor) and ids.dim() == 2 else None)
        for modality, features in (given.items() if isinstance(given, Mapping) else ()):
            if features is None:
                continue
            seen = getattr(features, SEEN, None)
            if seen is None:
                found.has_strangers = True
            else:
                found.pictures[modality] = seen
        return found


@dataclass
class Generation(Source):
    """A call of `generate`. prompt: as planned, once it was."""

    prompt: Prompt | None = None

    def brings(self, here: Tensor | None, past: int, length: int) -> bool:
        """Whether a pass over columns from `past` on is one of this call, and not somebody else's forward during it.

        Columns behind the prompt are its answer, or candidates for it.
        """
        if self.ids is None:
            return False
        if here is None:
            return past + length <= self.ids.shape[1]
        n = min(length, self.ids.shape[1] - past)
        if n <= 0:
            return True
        own = self.ids[:, past : past + n].to(here.device)
        return len(here) % len(own) == 0 and torch.equal(here[:, :n], own.repeat_interleave(len(here) // len(own), dim=0))


class Runtime(threading.local):
    """The present call of `generate`, forward and pass; `finished` is the last pass until the loss has been computed."""

    def __init__(self) -> None:
        self.generation: Generation | None = None
        self.forward: Source | None = None
        self.recording: dict[Any, list[Tensor]] | None = None
        self.running: Pass | None = None
        self.finished: Pass | None = None
        self.computes_loss = False      # the model around the decoder runs too

    def encoded(self, modality: Modality, seen: list[Seen]) -> None:
        """Notes pictures for whoever encodes them; outside forward and `generate` only their mark knows them."""
        owner = self.forward if self.forward is not None else self.generation
        if owner is not None:
            owner.pictures[modality] = seen


def pictures_for(source: Source) -> Pictures:
    """The pictures of a prompt that holds placeholders. Raises UnsupportedError where their features came from elsewhere."""
    if not source.pictures and source.has_strangers:
        raise UnsupportedError(
            "the visual features were made before accel was applied, or by another model: no scores are known for them. "
            "Encode them again under the handle, or pass the pixels"
        )
    return source.pictures
