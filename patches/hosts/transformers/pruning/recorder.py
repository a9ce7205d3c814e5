"""Watches the vision encoder, and turns each call of `get_image_features` into pictures with their scores."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import replace_method
from accel.patches.hosts.transformers.pruning.decoder import Decoder
from accel.patches.hosts.transformers.pruning.observe import encoder_maps, watch
from accel.patches.hosts.transformers.pruning.prompt import Seen
from accel.patches.hosts.transformers.pruning.runtime import mark
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, Tower, VisionFamily
from accel.protocols import Observation, TokenPruning


class Recorder:
    """Turns a call of `get_image_features` into `Seen` pictures, waiting for the prompt that they belong to."""

    def __init__(self, family: VisionFamily, base: nn.Module, methods: Sequence[TokenPruning], towers: dict[Modality, Tower], front: Decoder) -> None:
        self.family, self.base, self.towers, self.front = family, base, towers, front
        self.wanted = [(i, m, o) for i, m in enumerate(methods) for o in m.observe() if o.what != "last_row"]

    def attach(self, handle: Handle) -> None:
        watched: set[tuple[int, int]] = set()
        for tower in self.towers.values():
            for layer in {self._layer(tower, o) for _, _, o in self.wanted if o.what != "pixel_map"}:
                module = tower.attentions[layer]
                if (id(module), layer) not in watched:
                    watched.add((id(module), layer))
                    watch(module, partial(self._see, tower, layer), handle)
        for modality in self.towers:
            name = f"get_{modality}_features"
            if hasattr(self.base, name):
                replace_method(self.base, name, partial(self._around, modality), handle)

    def _layer(self, tower: Tower, observation: Observation) -> int:
        layer = tower.scoring_layer if observation.layer is None else observation.layer
        if not -len(tower.attentions) <= layer < len(tower.attentions):
            raise UnsupportedError(f"the vision encoder has {len(tower.attentions)} layers, asked to score by layer {layer}")
        return layer % len(tower.attentions)

    def _see(self, tower: Tower, layer: int, q: Tensor, k: Tensor, mask: Any, scale: float, softcap: float | None) -> None:
        recording: dict[Any, list[Tensor]] | None = self.front.runtime.recording
        if recording is None:
            return
        here = [(i, m, o) for i, m, o in self.wanted if o.what != "pixel_map" and self._layer(tower, o) == layer]
        with torch.no_grad():
            maps = encoder_maps(q.detach(), k.detach(), mask, scale, prefix=tower.prefix, wanted=[(m, o) for _, m, o in here])
        for (i, _, o), rows in zip(here, maps, strict=True):
            recording.setdefault((i, o.what), []).extend(rows)

    def _around(self, modality: Modality, original: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = self.front.runtime
        if not self.front.is_on or runtime.recording is not None:
            return original(*args, **kwargs)
        runtime.recording = {}
        try:
            features = original(*args, **kwargs)
            maps = runtime.recording
        finally:
            runtime.recording = None
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            seen = self._pictures(modality, dict(bound.arguments), features, maps)
        mark(features, seen)
        runtime.encoded(modality, seen)
        return features

    def _pictures(self, modality: Modality, call: dict[str, Any], features: Any, maps: dict[tuple[int, str], list[Tensor]]) -> list[Seen]:
        reason = self.family.why_unfit(self.base, call)
        if reason is not None:
            raise UnsupportedError(f"these {modality}s cannot be scored: {reason}")
        pictures = self.family.pictures(self.base, modality, call, features)
        flat = self.family.flat_features(features).detach()
        if sum(len(p) for p in pictures) != len(flat):
            raise UnsupportedError(
                f"accel expects {sum(len(p) for p in pictures)} visual tokens from these {modality}s, the model made {len(flat)}: "
                f"its adapter ({type(self.family).__name__}) does not fit"
            )
        for i, method, o in self.wanted:
            if o.what == "pixel_map":
                maps[i, o.what] = [method.map_pixels(p) for p in grey_patches(self.family, self.base, modality, call, o)]
        return seen_pictures(pictures, flat, maps, type(self.family).__name__)


def seen_pictures(pictures: Sequence[Picture], features: Tensor, maps: dict[tuple[int, str], list[Tensor]], adapter: str) -> list[Seen]:
    """The pictures with their tokens' scores. features: (tokens of all, D); maps: of each segment of all, (patches,); adapter: for messages."""
    expected = [n for p in pictures for n in p.segments]
    for rows in maps.values():
        if [len(r) for r in rows] != expected:
            raise UnsupportedError(f"the encoder attended in stretches of {[len(r) for r in rows]} patches, the adapter {adapter} expects {expected}")
    # one copy for all segments: each would wait for the device
    flat_maps = {key: torch.cat([r.float() for r in rows]).cpu() for key, rows in maps.items()}
    found, token, patch = [], 0, 0
    for picture in pictures:
        n_patches = sum(picture.segments)
        own = {key: picture.pooled(values[patch : patch + n_patches]) for key, values in flat_maps.items()}
        found.append(Seen(picture, own, features[token : token + len(picture)]))
        token, patch = token + len(picture), patch + n_patches
    return found


def grey_patches(family: VisionFamily, base: Any, modality: Modality, call: dict[str, Any], o: Observation) -> list[Tensor]:
    """The pixels of each segment as they were before normalisation, (patches, pixels) uint8, mean of the colours."""
    mean, std = (_per_colour(given, own) for given, own in ((o.pixel_mean, family.pixel_mean), (o.pixel_std, family.pixel_std)))
    found = []
    for patches in family.pixel_patches(base, modality, call):
        raw = patches * std.to(patches.device) + mean.to(patches.device)
        found.append((raw * 255).round().clamp(0, 255).mean(1).round().to(torch.uint8))
    return found


def _per_colour(given: float | tuple[float, ...] | None, own: tuple[float, ...]) -> Tensor:
    """(colours, 1) fp32."""
    values = own if given is None else given if isinstance(given, (tuple, list)) else (given,) * len(own)
    return torch.tensor(values, device="cpu")[:, None]
