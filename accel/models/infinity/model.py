"""Infinity, text-to-image next-scale generation with bitwise codes (arXiv 2412.04431), as a Hugging Face model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from accel.errors import OptionError
from accel.models.base import NextScaleModel, NextScaleOutput, device_of
from accel.models.blocks import (
    NORM_EPS,
    ConditionVectors,
    FeedForward,
    LogitsHead,
    ScaleAttention,
    ScaleEmbedding,
    in_weights_dtype,
    modulated,
    six_vectors,
)  # fmt: skip
from accel.models.cache import ScaleCache, Schedule
from accel.models.checkpoints import Source
from accel.models.infinity.config import InfinityConfig
from accel.models.infinity.original import read_original
from accel.models.infinity.rope import rope_tables
from accel.models.infinity.schedules import longest, schedule_for
from accel.models.infinity.text import TextFeatures
from accel.models.infinity.tokenizer import BitTokenizer
from accel.models.sampling import Seed, as_output, check_output, check_sampling, draw, filtered, generators_for, scale_progress

Prompt = str | Sequence[str] | Sequence[Tensor] | TextFeatures
Encode = Callable[[Sequence[str]], TextFeatures]


@dataclass
class TextMemory:
    """What the blocks read the text from: states (b, L, C), mask (b, 1, 1, L) or None where nothing is padded, and each layer's keys and values.

    Keys and values of the text are the same at every scale, so a layer computes them once per generation.
    """

    states: Tensor
    mask: Tensor | None
    kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class FusedKV(nn.Module):
    """Keys and values from one matrix; values have a bias, keys have none."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * width, inputs))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """(b, L, inputs) -> keys and values, each (b, heads, L, d)."""
        kv = F.linear(x.to(self.weight.dtype), self.weight, torch.cat([torch.zeros_like(self.v_bias), self.v_bias]))
        k, v = kv.reshape(*x.shape[:2], 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return k, v


class CrossAttention(nn.Module):
    """Attention from image tokens to the text, scale 1/√d."""

    def __init__(self, width: int, heads: int, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = heads, layer
        self.q = nn.Linear(width, width)
        self.kv = FusedKV(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: TextMemory) -> Tensor:
        """(b, n, C) -> (b, n, C)."""
        if self.layer not in text.kv:
            text.kv[self.layer] = self.kv(text.states.to(x.device), self.heads)
        k, v = text.kv[self.layer]
        q = in_weights_dtype(self.q, x).reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if text.mask is None else text.mask.to(x.device))
        return in_weights_dtype(self.proj, out.transpose(1, 2).flatten(2))


class AttentivePool(nn.Module):
    """One learned query per head over the text: (b, L, text width) -> (b, C)."""

    def __init__(self, text_width: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.empty(heads, width // heads))
        self.kv = FusedKV(text_width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """See the class; mask (b, 1, 1, L) or None."""
        k, v = self.kv(states, self.heads)
        q = self.query.to(k.dtype).expand(states.shape[0], -1, -1)[:, :, None]
        return in_weights_dtype(self.proj, F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1))


class TextProjection(nn.Module):
    """Text features -> the condition vector, which is also the first token, and the states the blocks attend to."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.norm_weight = nn.Parameter(torch.ones(config.text_width))
        # stands for "no text": as many of its rows as the prompt has tokens
        self.null_states = nn.Parameter(torch.empty(config.text_tokens, config.text_width))
        self.pool = AttentivePool(config.text_width, width, config.pool_heads)
        self.project = nn.Sequential(nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width))

    def forward(self, states: Tensor, mask: Tensor, *, add_null: bool) -> tuple[Tensor, TextMemory]:
        """states (b, L, text width), mask (b, L) bool -> condition (b', C) and memory; with `add_null` b' = 2b, the second half without text."""
        states = states.float()
        if add_null:
            states = torch.cat([states, self.null_states[: states.shape[1]].float().expand_as(states)])
            mask = torch.cat([mask, mask])
        visible = None if bool(mask.all()) else mask[:, None, None]
        states = F.rms_norm(states, states.shape[-1:], self.norm_weight.float(), NORM_EPS)
        projected = self.project(states.to(self.null_states.dtype))
        return self.pool(states, visible), TextMemory(projected, visible)


class CrossLayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32 whatever its weights are in."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) -> (…, C)."""
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class InfinityBlock(nn.Module):
    """Gated self-attention, ungated attention to the text, gated feed-forward. The six vectors are shared but for a learned offset."""

    def __init__(self, config: InfinityConfig, layer: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.attn = ScaleAttention(width, heads, layer)
        self.cross_norm = CrossLayerNorm(width, eps=NORM_EPS)
        self.cross = CrossAttention(width, heads, layer)
        self.ffn = FeedForward(width, config.intermediate_size)
        self.gss = nn.Parameter(torch.empty(6, width))

    def forward(self, h: Tensor, shared: Tensor, *, text: TextMemory, cache: ScaleCache, rope: tuple[Tensor, Tensor]) -> Tensor:
        """h (b, n, C) fp32; shared (b, 1, 6, C); rope: cos and sin of these n tokens."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = six_vectors(shared + self.gss.float())
        h = h + gamma1 * self.attn(modulated(h, scale1, shift1), cache=cache, rope=rope)
        h = h + self.cross(self.cross_norm(h), text=text)
        return h + gamma2 * self.ffn(modulated(h, scale2, shift2))  # type: ignore[no-any-return]


class Infinity(NextScaleModel):
    """A prompt in, an image out.

    >>> model = Infinity.from_original("infinity_2b_reg.pth", "infinity_vae_d32reg.pth", dtype=torch.bfloat16, device="cuda")
    >>> encode = TextEncoder.from_pretrained("google/flan-t5-xl", dtype=torch.bfloat16, device="cuda")
    >>> image, = model.generate("a red fox in snow", text_encoder=encode, size="1M", aspect_ratio=1.5, seed=1)
    """

    config_class = InfinityConfig
    main_input_name = "text"
    _no_split_modules = ("InfinityBlock", "TextProjection", "ConvDecoder")

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.text = TextProjection(config)
        self.embed = ScaleEmbedding(config.code_bits, width, scales=config.max_scales, positions=None)
        self.shared_ada = ConditionVectors(width, width, 6)
        self.blocks = nn.ModuleList(InfinityBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.head = LogitsHead(width, width, 2 * config.code_bits)
        self.tokenizer = BitTokenizer(config)
        self.post_init()

    def default_schedule(self) -> Schedule:
        """The square schedule of the default size."""
        return schedule_for(self.config.default_size, 1.0)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InfinityBlock):
            init.normal_(module.gss, std=self.config.hidden_size**-0.5)
        elif isinstance(module, FusedKV):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.v_bias)
        elif isinstance(module, AttentivePool):
            init.normal_(module.query, std=(self.config.hidden_size * 3) ** -0.5)
        elif isinstance(module, TextProjection):
            init.ones_(module.norm_weight)
            init.normal_(module.null_states, std=self.config.text_width**-0.5)

    @classmethod
    def from_original(
        cls, weights: Source, tokenizer: Source, *, default_size: str = "1M", dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:  # fmt: skip
        """The model of an official file or folder, or of a training checkpoint, with its tokenizer's file.

        `default_size`: what `generate` makes when it is not told: "0.06M" for the 256-pixel model, "0.25M" for `infinity_8b_512x512_weights`.
        """
        config, state = read_original(weights, tokenizer, default_size=default_size)
        return cls._from_renamed(config, state, dtype=dtype, device=device)

    def forward(self, text: TextFeatures | Sequence[Tensor], codes: Sequence[Tensor], schedule: Schedule | Sequence[Any]) -> NextScaleOutput:
        """Teacher-forced: logits (b, T_K, code_bits, 2) of all scales given the true bits of the coarser ones, and their mean cross-entropy.

        codes: per scale (b, n_k, code_bits) int64 in {0, 1}. In training mode the inputs are resized by area, as published; else as in generation.
        """
        schedule = Schedule.of(schedule)
        features = self._features(text, None)
        expected = [(len(features.lengths), n, self.config.code_bits) for n in schedule.tokens]
        if [tuple(one.shape) for one in codes] != expected:
            raise OptionError(f"codes must have the shapes {expected}, got {[tuple(one.shape) for one in codes]}")
        self._check_schedule(schedule)
        condition, memory = self._text(features, add_null=False)
        f, x, inputs = None, None, []
        for scale in range(len(schedule)):
            inputs.append(self.embed(condition if x is None else x, scale, 0))
            f, x = self.tokenizer(codes[scale], f, scale, schedule, mode="area" if self.training else "bilinear")
        cos, sin = zip(*self._rope(schedule, condition.device), strict=True)
        cache = self.new_cache(schedule, teacher_forced=True)
        logits = self._transform(torch.cat(inputs, 1), condition, memory, cache, (torch.cat(cos), torch.cat(sin)))
        loss = F.cross_entropy(logits.flatten(0, 2), torch.cat(list(codes), 1).flatten().to(logits.device))
        return NextScaleOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(
        self, prompt: Prompt, *, text_encoder: Encode | None = None, negative_prompt: Prompt | None = None, size: str | None = None,
        aspect_ratio: float = 1.0, schedule: Schedule | Sequence[Any] | None = None, guidance_scale: float = 4.0, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 0.97, seed: Seed = None, output: str = "pil", progress: bool = False,
    ) -> Any:  # fmt: skip
        """One image per prompt: a list of PIL images, or with `output="tensor"` (images, 3, height, width) fp32 in [0, 1], RGB.

        prompt: text, which needs `text_encoder` (a `TextEncoder`), or features: `TextFeatures`, or a list with a (tokens, width) tensor per image.
        size, aspect_ratio (height / width): choose a trained schedule; `schedule` gives side lengths or (height, width) pairs instead.
        guidance_scale: the same at every scale; 1 turns guidance (and its doubled batch) off. temperature: divides the logits.
        seed: an int (image i gets seed + i), one int or torch.Generator per image, or None. An image depends on its own seed only, not on its batch;
        on another kind of device the same int gives another image, unless CPU generators are passed.
        """
        check_output(output)
        _, f = self.generate_codes(
            prompt, text_encoder=text_encoder, negative_prompt=negative_prompt, size=size, aspect_ratio=aspect_ratio, schedule=schedule,
            guidance_scale=guidance_scale, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, progress=progress,
        )  # fmt: skip
        return as_output(self.tokenizer.decode(f), output)

    @torch.no_grad()
    def generate_codes(
        self, prompt: Prompt, *, text_encoder: Encode | None = None, negative_prompt: Prompt | None = None, size: str | None = None,
        aspect_ratio: float = 1.0, schedule: Schedule | Sequence[Any] | None = None, guidance_scale: float = 4.0, temperature: float = 1.0,
        top_k: int = 0, top_p: float = 0.97, seed: Seed = None, progress: bool = False,
    ) -> tuple[list[Tensor], Tensor]:  # fmt: skip
        """The bits per scale, each (images, n_k, code_bits), and their map (images, tokenizer_bits, H, W): `generate` before decoding."""
        check_sampling(top_k=top_k, top_p=top_p)
        if not temperature > 0 or not 0 <= guidance_scale < math.inf:
            raise OptionError(f"temperature must be above 0, guidance_scale at least 0 and finite, got {temperature!r} and {guidance_scale!r}")
        chosen = Schedule.of(schedule) if schedule is not None else schedule_for(size or self.config.default_size, aspect_ratio)
        self._check_schedule(chosen)
        is_guided = guidance_scale != 1
        features = self._features(prompt, text_encoder)
        images = len(features.lengths)
        if negative_prompt is not None:
            if not is_guided:
                raise OptionError("a negative_prompt has no effect at guidance_scale=1; raise the scale or leave the prompt out")
            features = _joined(features, self._features(negative_prompt, text_encoder), images)
        condition, memory = self._text(features, add_null=is_guided and negative_prompt is None)
        generators, rope = generators_for(seed, images, condition.device), self._rope(chosen, condition.device)
        codes: list[Tensor] = []
        f, x = None, None
        cache = self.new_cache(chosen, is_guided=is_guided)
        try:
            for scale in scale_progress(len(chosen), shown=progress):
                logits = self._scale_logits(x, scale, condition, memory, cache, rope[scale]) / temperature
                if is_guided:
                    logits = guidance_scale * logits[:images] + (1 - guidance_scale) * logits[images:]
                codes.append(draw(filtered(logits, top_k=top_k, top_p=top_p), generators))
                f, x = self.tokenizer(codes[-1], f, scale, chosen)
                if is_guided and x is not None:
                    x = torch.cat([x, x])
        finally:
            cache.release()
        assert f is not None
        return codes, f

    def _features(self, prompt: Prompt, text_encoder: Encode | None) -> TextFeatures:
        """Features of the prompts, checked against this model."""
        if isinstance(prompt, TextFeatures):
            features = prompt
        else:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Iterable) else []
            if prompts and all(isinstance(one, Tensor) for one in prompts):
                features = TextFeatures.of(prompts)  # type: ignore[arg-type]
            elif not prompts or not all(isinstance(one, str) for one in prompts):
                raise OptionError("prompt must be text, a non-empty list of texts, a list with a (tokens, width) tensor per image, or TextFeatures")
            elif text_encoder is None:
                raise OptionError("text prompts need a text encoder; pass text_encoder=TextEncoder.from_pretrained('google/flan-t5-xl'), or features")
            else:
                features = text_encoder(prompts)  # type: ignore[arg-type]
        width, most = self.config.text_width, self.config.text_tokens
        if features.states.shape[2] != width or features.states.shape[1] > most:
            raise OptionError(f"this model reads features of width {width} and up to {most} tokens, got {tuple(features.states.shape)}")
        return features

    def _check_schedule(self, schedule: Schedule) -> None:
        if len(schedule) > self.config.max_scales:
            raise OptionError(f"this model knows {self.config.max_scales} scales, the schedule has {len(schedule)}")

    def _text(self, features: TextFeatures, *, add_null: bool) -> tuple[Tensor, TextMemory]:
        device = device_of(self.text)
        return self.text(features.states.to(device), features.mask(device), add_null=add_null)  # type: ignore[no-any-return]

    def _rope(self, schedule: Schedule, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        extent = longest(schedule) if self.config.rope_extent == "longest" else schedule
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        return rope_tables(schedule, extent.sizes[-1], head_dim, base=self.config.rope_base, device=device)

    def _scale_logits(
        self, x: Tensor | None, scale: int, condition: Tensor, memory: TextMemory, cache: ScaleCache, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Logits (b, n_k, code_bits, 2) of one scale from its input (None at the first)."""
        cache.begin(scale)
        return self._transform(self.embed(condition if x is None else x, scale, 0), condition, memory, cache, rope)

    def _transform(self, h: Tensor, condition: Tensor, memory: TextMemory, cache: ScaleCache, rope: tuple[Tensor, Tensor]) -> Tensor:
        shared = self.shared_ada(condition)
        for block in self.blocks:
            h = block(h, shared, text=memory, cache=cache, rope=rope)
        return self.head(h, condition).reshape(*h.shape[:2], self.config.code_bits, 2)  # type: ignore[no-any-return]


def _joined(features: TextFeatures, negative: TextFeatures, images: int) -> TextFeatures:
    """The prompts' rows, then the negative prompts' (one for all images, or one per image)."""
    if len(negative.lengths) not in (1, images):
        raise OptionError(f"{len(negative.lengths)} negative prompts for {images} images; give one, or one per image")
    every = [one[:length] for half in (features, negative) for one, length in zip(half.states, half.lengths, strict=True)]
    if len(negative.lengths) < images:
        every += every[-1:] * (images - 1)
    return TextFeatures.of(every)
