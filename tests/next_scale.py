"""Tiny random next-scale models, and the context that a cache method sees of one of their layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from accel.models.infinity import Infinity, InfinityConfig
from accel.models.var import VAR, VARConfig
from accel.protocols import CompressionContext, ModelInfo

TINY_VAR = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_classes": 5, "schedule": [1, 2, 3, 4],
    "codebook_size": 16, "code_width": 8, "vae_channels": 8, "vae_multipliers": [1, 2], "vae_blocks": 1,
}  # fmt: skip
TINY_INFINITY = {
    "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "text_width": 24, "text_tokens": 10,
    "pool_heads": 2, "code_bits": 4, "tokenizer_bits": 4, "vae_channels": 8, "vae_multipliers": [1, 2], "vae_blocks": 1,
}  # fmt: skip


def lively(model: Any) -> Any:
    """Every parameter random and large enough that a mistake anywhere moves the logits by more than rounding does."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            std = 0.3 if fan == 1 or "gss" in name or "embed" in name else fan**-0.5
            parameter.normal_(0, std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def tiny_var(**changes: Any) -> VAR:
    """Two layers of four heads of 8 channels; scales of 1, 4, 9 and 16 tokens."""
    return lively(VAR(VARConfig(**(TINY_VAR | changes))))


def tiny_infinity(**changes: Any) -> Infinity:
    """Two layers of four heads of 8 channels; takes schedules."""
    return lively(Infinity(InfinityConfig(**(TINY_INFINITY | changes))))


SHAPES = ((1, 1), (2, 2), (3, 3), (4, 4))
INFO = ModelInfo("accel_var", 2, 4, 4, 8, ("full_attention",) * 2, "cpu", "float32", hidden_size=32, scale_shapes=SHAPES)


def last_logits(model: Any, labels: list[int], **options: Any) -> Tensor:
    """Logits (rows, n, codes) of the last scale of one generation, guidance rows included: more telling than drawn codes."""
    found: list[Tensor] = []
    hook = model.head.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        model.generate_codes(labels, **{"seed": 0, **options})
    finally:
        hook.remove()
    return found[-1]


def context(n_old: int, step: int = 3, *, batch: int = 2, heads: int = 4, seed: int = 0, **changes: Any) -> CompressionContext:
    """`n_old` entries of earlier scales, the newest of them, and all of scale `step`; random q, k, v unless given."""
    generator = torch.Generator().manual_seed(seed)
    starts = [sum(h * w for h, w in SHAPES[:i]) for i in range(len(SHAPES) + 1)]
    start, end = starts[step], starts[step + 1]
    n = n_old + end - start
    q, k, v = (torch.randn(batch, heads, rows, 8, generator=generator) for rows in (end - start, n, n))
    scale_of = torch.repeat_interleave(torch.arange(len(SHAPES)), torch.tensor([h * w for h, w in SHAPES]))
    position = torch.arange(start - n_old, end).expand(batch, heads, n)
    entries: dict[str, Any] = {
        "q": q, "k": k, "v": v, "position": position, "valid": torch.ones(batch, heads, n, dtype=torch.bool),
        "q_position": torch.arange(start, end).expand(batch, -1), "entry_scale": scale_of[position], "scale_shapes": SHAPES,
        "attention_mass": torch.zeros(batch, heads, n),
    }  # fmt: skip
    return CompressionContext(layer=1, step=step, scale=1.0, **{**entries, **changes})
