"""The model's half of token pruning: of each picture that its encoder has read, the rows that stay (vllm-integration.md §5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError, UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.transformers.pruning.prompt import Prompt, Seen, ordered_stages, plan_ahead, visual_tokens
from accel.patches.hosts.transformers.pruning.recorder import grey_patches, seen_pictures
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture
from accel.patches.hosts.vllm.engine import Engine, describe, engine_of
from accel.patches.hosts.vllm.models.counts import FIELDS, front_pruning, in_front, kept_of
from accel.patches.hosts.vllm.models.exit_checks import exit_layer
from accel.patches.hosts.vllm.models.scores import Maps, VisionTower, recorded, why_unseen
from accel.patches.hosts.vllm.options import read_options
from accel.protocols import ModelInfo, TokenPruning


def all_heads(t: Tensor) -> Tensor:
    """The heads, dimension 1, of all ranks."""
    from accel.patches.hosts.vllm.compat import tensor_model_parallel_all_gather

    found: Tensor = tensor_model_parallel_all_gather(t, dim=1)
    return found


@dataclass(frozen=True)
class Kept:
    """What is left of a picture. rows: (n, D); index: (n,) int64 on the CPU, which of its tokens they are."""

    rows: Tensor
    index: Tensor


class PrunedMixin:
    """In front of a vision-language model of vLLM: drops visual tokens where the recipe asks for it, and is the stock model elsewhere.

    Models say how their tower is read (`vision_tower_of`), how many segments it is given (`tower_segments`) and what its pixels are
    (`normalised_pixels`). UnsupportedError where a recipe cannot be had of this engine.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)    # type: ignore[call-arg]
        config = vllm_config.model_config
        asked, info = read_options(config.hf_config), describe(config)
        self._accel_pruning = front_pruning(config.hf_config, info, asked)
        # the counters of an engine that was given the recipe in `hf_overrides` alone are nobody's
        self._accel_engine = engine_of(vllm_config) or Engine(info, ())
        if self._accel_pruning is not None:
            reasons = [*self._accel_pruning.typical.supports(info, "vllm", ()), *_engine_reasons(vllm_config), *self.pruning_reasons(vllm_config)]
            if (tower := self.vision_tower_of()) is not None:
                reasons += why_unseen(tower, self._accel_pruning.typical)
            if reasons:
                raise UnsupportedError(f"{self._accel_pruning.method.method_name()} cannot run in this engine:", list(dict.fromkeys(reasons)))
            self._accel_engine.notices |= set(self._accel_pruning.notices())
            self._accel_engine.pruned |= {m.method_name() for m in in_front(asked, info)}

    # --- what models say ------------------------------------------------------------------------------------------------------

    def vision_tower_of(self) -> VisionTower | None:
        """The encoder; None where this process has none."""
        raise NotImplementedError

    def pruning_reasons(self, vllm_config: Any) -> Sequence[str]:
        """Why options of the engine stand in the way of this model in particular."""
        return ()

    def tower_segments(self, pictures: Sequence[Picture], call: Mapping[str, Any]) -> list[list[int]]:
        """Patches of each segment that the tower is given, by picture; those behind a picture's own are padding."""
        return [list(p.segments) for p in pictures]

    def normalised_pixels(self, pictures: Sequence[Picture], call: Mapping[str, Any]) -> dict[str, Any]:
        """The call with the pixels that belong to the pictures' segments, normalised."""
        return dict(call)

    def finished(self, rows: Any, index: Sequence[Tensor | None], modality: Modality, call: Mapping[str, Any]) -> Any:
        """What vLLM is given for the pictures of a call: rows (n, D) of each, and which of its tokens they are; None for all."""
        return rows

    # --- what happens ---------------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """The rows of each picture that stay, (n, D) each; what the stock model gives where no picture of the call loses any."""
        keeps = {modality: kwargs.pop(name) for modality, name in FIELDS.items() if name in kwargs}
        pruning = self._accel_pruning
        if pruning is None or not keeps:
            return super().embed_multimodal(**kwargs)       # type: ignore[misc]
        # vLLM calls with pictures of one modality
        [(modality, rows)] = keeps.items()
        methods = [pruning.asked(kept_of(row)) for row in rows]
        acting = [m for m in methods if m is not None]
        if not acting:
            return self.finished(super().embed_multimodal(**kwargs), [None] * len(methods), modality, kwargs)   # type: ignore[misc]
        seen = self._seen(acting[0], pruning.pictures(modality, kwargs), modality, kwargs)
        kept = [None if method is None else self._kept(method, one) for method, one in zip(methods, seen, strict=True)]
        return self.finished(
            [one.features if k is None else k.rows for one, k in zip(seen, kept, strict=True)], [None if k is None else k.index for k in kept],
            modality, kwargs,
        )  # fmt: skip

    def _seen(self, method: TokenPruning, pictures: Sequence[Picture], modality: Modality, call: dict[str, Any]) -> list[Seen]:
        """The pictures of a call, encoded, with what `method` looks at; another `keep` does not change what that is."""
        segments = self.tower_segments(pictures, call)
        tower = self.vision_tower_of()
        assert tower is not None    # pictures came
        with recorded(tower, method, [n for own in segments for n in own]) as maps:
            features = list(super().embed_multimodal(**call))       # type: ignore[misc]
        maps = self._own(pictures, segments, maps) | self._pixel_maps(method, modality, pictures, call)
        by_key = {(0, what): rows for what, rows in maps.items()}
        return seen_pictures(pictures, torch.cat(features), by_key, type(self).__name__)

    @staticmethod
    def _own(pictures: Sequence[Picture], segments: Sequence[Sequence[int]], maps: Maps) -> Maps:
        """The maps of the pictures' own segments, without those of padding."""
        is_own = [i < len(p.segments) for p, given in zip(pictures, segments, strict=True) for i in range(len(given))]
        return {what: [row for row, own in zip(rows, is_own, strict=True) if own] for what, rows in maps.items()}

    def _pixel_maps(self, method: TokenPruning, modality: Modality, pictures: Sequence[Picture], call: Mapping[str, Any]) -> Maps:
        wanted = [o for o in method.observe() if o.what == "pixel_map"]
        if not wanted:
            return {}
        pruning = self._accel_pruning
        assert pruning is not None
        grey = grey_patches(pruning.family, SimpleNamespace(config=pruning.config), modality, self.normalised_pixels(pictures, call), wanted[0])
        return {"pixel_map": [method.map_pixels(patches) for patches in grey]}

    def _kept(self, method: TokenPruning, seen: Seen) -> Kept:
        pruning = self._accel_pruning
        assert pruning is not None
        kept, promised = kept_rows(method, pruning.info, seen), pruning.count(method, seen.picture)
        if len(kept.index) != promised:
            raise AccelError(f"{method.method_name()} promised to leave {promised} tokens of a picture, and left {len(kept.index)}")
        self._count(seen.picture, kept)
        return kept

    def _count(self, picture: Picture, kept: Kept) -> None:
        """Adds a picture to the counters. Their `prompts` are pictures here: vLLM encodes one once for all prompts that show it."""
        tokens, n_layers = self._accel_engine.stats.tokens, self._accel_engine.info.n_layers
        n_patches, n_kept = int((~picture.is_structural).sum()), int((~picture.is_structural[kept.index]).sum())
        tokens.prompts += 1
        tokens.patches += n_patches
        tokens.structural += len(picture) - n_patches
        tokens.kept_patches += n_kept
        tokens.kept_structural += len(kept.index) - n_kept
        # those that leave inside the language model reach fewer layers
        tokens.layer_tokens += (exit_layer(self._accel_engine.methods, self._accel_engine.info) or n_layers) * n_kept
        tokens.all_layer_tokens += n_layers * n_patches


@torch.no_grad()
def kept_rows(method: TokenPruning, info: ModelInfo, seen: Seen) -> Kept:
    """What a bound method leaves of one picture, recycled rows in their anchors' places."""
    ids = torch.zeros(1, len(seen.picture), dtype=torch.int64)
    tokens = visual_tokens(ids, {"image": 0}, {"image": [seen]})
    prompt = Prompt(tokens, ids, start=0, n_copies=1, n_asked=len(seen.picture))
    plan_ahead(prompt, ordered_stages([method], lambda m: m.stages(info)), Handle((method,), "vllm"))
    index = prompt.front()[0].nonzero().flatten()
    rows = seen.features if prompt.features is None else prompt.features[0]
    return Kept(rows[index.to(rows.device)], index)


def _engine_reasons(vllm_config: Any) -> list[str]:
    """Options of an engine beside which no tokens can leave behind the encoder."""
    found = []
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal.mm_encoder_tp_mode == "data" and vllm_config.parallel_config.tensor_parallel_size > 1:
        found.append("mm_encoder_tp_mode is 'data': each device reads some of the pictures, and none has the scores of all; use 'weights'")
    if vllm_config.compilation_config.compile_mm_encoder:
        found.append("compile_mm_encoder is on: nobody can look into a compiled vision tower; turn it off")
    if vllm_config.compilation_config.cudagraph_mm_encoder:
        found.append("cudagraph_mm_encoder is on: replayed graphs pass by what drops tokens; turn it off")
    if multimodal.is_multimodal_pruning_enabled():
        found.append("video_pruning_rate is set: vLLM would drop tokens of videos itself, beside the recipe; leave it out")
    if vllm_config.lora_config is not None and vllm_config.lora_config.enable_tower_connector_lora:
        found.append("enable_tower_connector_lora is on: its adapters count the tokens that reach the language model; turn it off")
    return found
