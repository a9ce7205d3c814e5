"""VAR, class-conditional next-scale image generation (arXiv 2404.02905), as a Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from accel.errors import OptionError
from accel.models.base import NextScaleModel, NextScaleOutput, device_of
from accel.models.blocks import ConditionVectors, FeedForward, LogitsHead, ScaleAttention, ScaleEmbedding, modulated, six_vectors
from accel.models.cache import ScaleCache, Schedule
from accel.models.checkpoints import Source
from accel.models.sampling import Seed, as_output, check_output, check_sampling, draw, filtered, generators_for, scale_progress
from accel.models.var.config import VARConfig
from accel.models.var.original import read_original
from accel.models.var.tokenizer import VARTokenizer


class VARBlock(nn.Module):
    """Modulated attention and feed-forward, each behind a learned gate."""

    def __init__(self, config: VARConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = ScaleAttention(width, config.num_attention_heads, layer)
        self.ffn = FeedForward(width, config.intermediate_size)
        if config.shared_adaln:
            self.gss = nn.Parameter(torch.empty(6, width))
        else:
            self.ada = ConditionVectors(width, width, 6)

    def forward(self, h: Tensor, condition: Tensor, cache: ScaleCache) -> Tensor:
        """h (b, n, C) fp32; condition (b, C), or where it is shared the six vectors (b, 1, 6, C)."""
        vectors = condition + self.gss.float() if condition.dim() == 4 else self.ada(condition)
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six_vectors(vectors)
        h = h + gamma1 * self.attn(modulated(h, scale1, shift1), cache=cache)
        return h + gamma2 * self.ffn(modulated(h, scale2, shift2))  # type: ignore[no-any-return]


class VAR(NextScaleModel):
    """A class label in, an image out.

    >>> model = VAR.from_original("var_d16.pth", "vae_ch160v4096z32.pth", dtype=torch.float16, device="cuda")
    >>> images = model.generate([207, 980], guidance_scale=4.0, top_p=0.95, seed=[0, 1])
    """

    config_class = VARConfig
    main_input_name = "labels"
    _no_split_modules = ("VARBlock", "VARQuantizer", "ConvEncoder", "ConvDecoder")

    def __init__(self, config: VARConfig) -> None:
        super().__init__(config)
        width, schedule = config.hidden_size, config.scales()
        self.schedule = schedule
        self.class_embed = nn.Embedding(config.num_classes + int(config.has_null_class), width)
        self.embed = ScaleEmbedding(config.code_width, width, scales=len(schedule), positions=schedule.total)
        self.shared_ada = ConditionVectors(width, width, 6) if config.shared_adaln else None
        self.blocks = nn.ModuleList(VARBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.head = LogitsHead(width, width, config.codebook_size)
        self.tokenizer = VARTokenizer(config)
        self.post_init()

    def default_schedule(self) -> Schedule:
        """The scales of the checkpoint."""
        return self.schedule

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VARBlock) and hasattr(module, "gss"):
            init.normal_(module.gss, std=self.config.hidden_size**-0.5)

    @classmethod
    def from_original(
        cls, weights: Source, tokenizer: Source | None = None, *, schedule: Sequence[int] | None = None, num_classes: int | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> Self:  # fmt: skip
        """The model of an official file (`var_d16.pth` …, `vae_ch160v4096z32.pth`), or of a training checkpoint that holds both.

        `schedule`: side lengths, for files whose number of tokens is none of the published. `num_classes`: for files without a null class.
        """
        config, state = read_original(weights, tokenizer, schedule=schedule, num_classes=num_classes)
        return cls._from_renamed(config, state, dtype=dtype, device=device)

    def forward(self, labels: Tensor, codes: Sequence[Tensor]) -> NextScaleOutput:
        """Teacher-forced: logits (b, T_K, codebook) of all scales given the true codes of the coarser ones, and their mean cross-entropy.

        labels (b,) int64, `num_classes` for no class; codes: per scale (b, n_k) int64, those of an image by `tokenizer.encode(pixels, schedule)`.
        """
        self._check_codes(codes, labels.shape[0])
        f, x = None, None
        condition, shared = self._condition(labels)
        inputs = []
        for scale in range(len(self.schedule)):
            inputs.append(self.embed(condition if x is None else x, scale, self.schedule.span(scale)[0]))
            # the tokenizer is not trained with the transformer
            with torch.no_grad():
                f, x = self.tokenizer(codes[scale], f, scale, self.schedule)
        cache = self.new_cache(self.schedule, teacher_forced=True)
        logits = self._transform(torch.cat(inputs, 1), condition, shared, cache)
        loss = F.cross_entropy(logits.flatten(0, 1), torch.cat(list(codes), 1).flatten().to(logits.device))
        return NextScaleOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self, labels: int | Sequence[int] | Tensor, *, guidance_scale: float = 1.5, top_k: int = 900, top_p: float = 0.96, seed: Seed = None,
        output: str = "pil", progress: bool = False,
    ) -> Any:  # fmt: skip
        """One image per label: a list of PIL images, or with `output="tensor"` (images, 3, height, width) fp32 in [0, 1].

        guidance_scale: weight reached at the last scale, growing from 0 at the first; 0 turns guidance (and its doubled batch) off.
        seed: an int (image i gets seed + i), one int or torch.Generator per image, or None. An image depends on its own seed only, not on its batch;
        on another kind of device the same int gives another image, unless CPU generators are passed.
        """
        check_output(output)
        _, f = self.generate_codes(labels, guidance_scale=guidance_scale, top_k=top_k, top_p=top_p, seed=seed, progress=progress)
        return as_output(self.tokenizer.decode(f), output)

    @torch.no_grad()
    def generate_codes(
        self, labels: int | Sequence[int] | Tensor, *, guidance_scale: float = 1.5, top_k: int = 900, top_p: float = 0.96, seed: Seed = None,
        progress: bool = False,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """The codes per scale, each (images, n_k), and their map (images, code_width, H, W): `generate` before decoding."""
        check_sampling(top_k=top_k, top_p=top_p)
        rows, is_guided = self._rows(labels, guidance_scale)
        images = rows.shape[0] // 2 if is_guided else rows.shape[0]
        generators = generators_for(seed, images, rows.device)
        condition, shared = self._condition(rows)
        codes: list[Tensor] = []
        f, x = None, None
        cache = self.new_cache(self.schedule, is_guided=is_guided)
        try:
            for scale in scale_progress(len(self.schedule), shown=progress):
                logits = self._scale_logits(x, scale, condition, shared, cache)
                if is_guided:
                    weight = guidance_scale * scale / max(self.schedule.last, 1)
                    logits = (1 + weight) * logits[:images] - weight * logits[images:]
                codes.append(draw(filtered(logits, top_k=top_k, top_p=top_p), generators))
                f, x = self.tokenizer(codes[-1], f, scale, self.schedule)
                if is_guided and x is not None:
                    x = torch.cat([x, x])
        finally:
            cache.release()
        assert f is not None
        return codes, f

    def _rows(self, labels: int | Sequence[int] | Tensor, guidance_scale: float) -> tuple[Tensor, bool]:
        """Labels on the model's device, followed by as many null labels where guidance is on."""
        wrong = f"labels must be an int or a non-empty one-dimensional list of ints, got {labels!r}"
        try:
            listed = [labels] if isinstance(labels, int) else labels
            found = listed if isinstance(listed, Tensor) else torch.as_tensor(listed, device="cpu")
        # texts, None, rows of several lengths, whole numbers beyond 64 bits: torch has an error of its own for each
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(wrong) from error
        if found.dim() != 1 or found.numel() == 0 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
            raise OptionError(wrong)
        known = self.class_embed.num_embeddings
        if int(found.min()) < 0 or int(found.max()) >= known:
            null = f", or {self.config.num_classes} for no class" if self.config.has_null_class else ""
            raise OptionError(f"labels must lie in 0…{self.config.num_classes - 1}{null}, got {found.tolist()}")
        if not 0 <= guidance_scale < math.inf:
            raise OptionError(f"guidance_scale must be 0 (off) or above, and finite, got {guidance_scale!r}")
        found = found.to(device=device_of(self.class_embed), dtype=torch.int64)
        if guidance_scale == 0:
            return found, False
        if not self.config.has_null_class:
            raise OptionError("guidance needs a null class, and this model's class table has none; pass guidance_scale=0")
        return torch.cat([found, torch.full_like(found, self.config.num_classes)]), True

    def _check_codes(self, codes: Sequence[Tensor], rows: int) -> None:
        expected = [(rows, n) for n in self.schedule.tokens]
        if [tuple(one.shape) for one in codes] != expected:
            raise OptionError(f"codes must have the shapes {expected}, got {[tuple(one.shape) for one in codes]}")

    def _condition(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The class vector (b, C), and what the blocks are given: the same, or the shared six vectors (b, 1, 6, C)."""
        condition = self.class_embed(labels)
        return condition, condition if self.shared_ada is None else self.shared_ada(condition)

    def _scale_logits(self, x: Tensor | None, scale: int, condition: Tensor, shared: Tensor, cache: ScaleCache) -> Tensor:
        """Logits (b, n_k, codebook) of one scale from its input codes (None at the first)."""
        cache.begin(scale)
        h = self.embed(condition if x is None else x, scale, self.schedule.span(scale)[0])
        return self._transform(h, condition, shared, cache)

    def _transform(self, h: Tensor, condition: Tensor, shared: Tensor, cache: ScaleCache) -> Tensor:
        for block in self.blocks:
            h = block(h, shared, cache=cache)
        return self.head(h, condition)  # type: ignore[no-any-return]
