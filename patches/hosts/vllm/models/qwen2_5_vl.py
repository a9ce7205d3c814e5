"""Qwen2.5-VL in vLLM: pictures and videos of any size through one encoder, positions with three axes.

Tokens that stay keep their positions. vLLM's own way to that, made for its pruning of videos, needs a flag that its CPU runner does not set, and
sends positions in a dtype that cannot hold large ones; the model adds them itself, in the runner's own buffer (vllm-integration.md §5, traps b–d).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture
from accel.patches.hosts.vllm.compat import Qwen2_5_VLForConditionalGeneration
from accel.patches.hosts.vllm.models.exit import ExitMixin
from accel.patches.hosts.vllm.models.placeholders import register_processor
from accel.patches.hosts.vllm.models.positions import CHANNELS, grid_offsets, prompt_positions, split_offsets, with_offsets
from accel.patches.hosts.vllm.models.pruned import PrunedMixin, all_heads
from accel.patches.hosts.vllm.models.scores import VisionTower, qwen_projection


@register_processor(Qwen2_5_VLForConditionalGeneration)
class AccelQwen2_5_VLForConditionalGeneration(ExitMixin, PrunedMixin, Qwen2_5_VLForConditionalGeneration):     # noqa: N801
    """vLLM's Qwen2.5-VL with the visual tokens that a recipe leaves."""

    # what the rows of the coming pass are beyond the start of their picture: their places (m,) and (3, m) int64
    _accel_coming: tuple[Tensor, Tensor] | None = None

    def vision_tower_of(self) -> VisionTower | None:
        if not hasattr(self.visual, "blocks"):
            return None
        whole = frozenset(layer for layer in self.visual.fullatt_block_indexes if 0 <= layer < len(self.visual.blocks))
        attentions = [block.attn for block in self.visual.blocks]
        # the adapter refuses encoders without such a layer
        return VisionTower(attentions, max(whole, default=len(attentions) - 1), qwen_projection(all_heads), whole_layers=whole, is_packed=True)

    def pruning_reasons(self, vllm_config: Any) -> list[str]:
        found = []
        parallel = vllm_config.parallel_config
        if parallel.pipeline_parallel_size > 1:
            found.append("pipeline_parallel_size is above 1: later stages are not told the positions of the tokens that stay")
        if parallel.enable_dbo or (parallel.ubatch_size or 0) > 1:
            found.append("parts of a batch run at a time (enable_dbo, ubatch_size), and positions are made for whole ones")
        if vllm_config.speculative_config is not None:
            found.append("speculative_config is set: a draft model is not told the positions of the tokens that stay")
        if vllm_config.model_config.enable_prompt_embeds:
            found.append("enable_prompt_embeds is on: embedded text comes among the rows of pictures, without the positions behind those; drop it")
        mode = vllm_config.compilation_config.cudagraph_mode
        if mode.has_full_cudagraphs():
            found.append(
                f"cudagraph_mode is {mode.name}: whole passes replayed from a graph, of single tokens too, pass by what makes positions; "
                "use --compilation-config '{\"cudagraph_mode\": \"PIECEWISE\"}'"
            )
        return found

    def normalised_pixels(self, pictures: Sequence[Picture], call: Mapping[str, Any]) -> dict[str, Any]:
        # vLLM may leave normalisation to the device
        return {
            name: self.visual.input_norm(value, torch.float32) if name.startswith("pixel_values") and value is not None else value
            for name, value in call.items()
        }  # fmt: skip

    def finished(self, rows: Sequence[Tensor], index: Sequence[Tensor | None], modality: Modality, call: Mapping[str, Any]) -> list[Tensor]:
        """Rows with their offsets behind them; those of whole pictures too, for vLLM joins the rows of a step."""
        merge = self.visual.spatial_merge_size
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        seconds = call.get("second_per_grid_ts")
        found = []
        for i, (own, kept) in enumerate(zip(rows, index, strict=True)):
            steps, height, width = call[f"{modality}_grid_thw"][i].tolist()
            factor = 1.0 if modality == "image" else per_second * (1.0 if seconds is None else float(seconds[i]))
            offsets = grid_offsets(steps, height // merge, width // merge, factor)
            found.append(with_offsets(own, (offsets if kept is None else offsets[kept]).to(own.device)))
        return found

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions of a prompt in which pictures may have lost tokens; rows of pictures stand where their picture begins."""
        if self._accel_pruning is None:
            found: tuple[Tensor, int] = super().get_mrope_input_positions(input_tokens, mm_features)
            return found
        n_rows = [f.mm_position.length for f in sorted(mm_features, key=lambda f: f.mm_position.offset)]
        grids = self.iter_mm_grid_thw(mm_features)
        pictures = [(start, n, max(int((t - 1) * seconds) + 1, h, w)) for n, (start, t, h, w, seconds) in zip(n_rows, grids, strict=True)]
        return prompt_positions(len(input_tokens), pictures)

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None) -> Tensor:
        """As the stock model, from rows with offsets behind them, which are kept for the pass that follows."""
        if self._accel_coming is not None:
            # a step of single tokens is decoding to vLLM, one of a picture among them too
            self._accel_engine.steps["replayed from a graph of decoding: a visual token had the position where its picture begins"] += 1
        self._accel_coming = None
        if self._accel_pruning is not None and multimodal_embeddings is not None and len(multimodal_embeddings) and is_multimodal is not None:
            width = self._accel_engine.info.hidden_size
            if any(rows.shape[1] != (width or 0) + CHANNELS for rows in multimodal_embeddings):
                raise AccelError("pictures came to the model without the positions of their tokens: somebody else encoded them")
            parts = [split_offsets(rows) for rows in multimodal_embeddings]
            multimodal_embeddings = [rows for rows, _ in parts]
            self._accel_coming = is_multimodal.nonzero().flatten(), torch.cat([offsets for _, offsets in parts]).T
        found: Tensor = super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)
        return found

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._accel_coming is not None:
            places, offsets = (t.to(positions.device, positions.dtype if t.dim() == 2 else None) for t in self._accel_coming)
            self._accel_coming = None
            # in place: captured pieces of a graph read the runner's buffer, which it fills anew for every step
            positions[:, places] += offsets
        return super().forward(input_ids, positions, *args, **kwargs)
