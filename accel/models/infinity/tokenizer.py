"""The bitwise tokenizer of Infinity: every bit of every scale is ±1/√bits, the scales add up to one map, a decoder turns it into pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.cache import Schedule
from accel.models.conv import ConvDecoder
from accel.models.infinity.config import InfinityConfig


class BitTokenizer(nn.Module):
    """Bits to a map of codes, and the map to pixels. The sum is fp32. There is no encoder: generation does not need one."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.bits, self.is_patchified = config.tokenizer_bits, config.is_patchified
        self.decoder = ConvDecoder(config.vae_channels, config.vae_multipliers, config.vae_blocks, config.tokenizer_bits, has_attention=False)

    def _cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """Size of the tokenizer's map for a map of tokens."""
        factor = 2 if self.is_patchified else 1
        return size[0] * factor, size[1] * factor

    def values(self, bits: Tensor, size: tuple[int, int]) -> Tensor:
        """bits (b, n, code_bits) in {0, 1} -> (b, tokenizer_bits, h, w), each ±1/√bits, so that every cell has norm 1."""
        # (b, n, code_bits) -> (b, code_bits, h, w)
        x = (bits.float() * 2 - 1).mul(self.bits**-0.5).transpose(1, 2).reshape(bits.shape[0], -1, *size)
        return F.pixel_shuffle(x, 2) if self.is_patchified else x

    def forward(self, bits: Tensor, f: Tensor | None, scale: int, schedule: Schedule, *, mode: str = "bilinear") -> tuple[Tensor, Tensor | None]:
        """Adds the bits of a scale to the map f (None before the first). Returns f and the input of the next scale (b, n, code_bits), or None.

        `mode`: how f is brought to the next size. The published code resizes volumes of one frame trilinearly, which is bilinear on the frame;
        in training it goes down by "area".
        """
        added = self.values(bits, schedule.sizes[scale])
        if scale < schedule.last:
            added = F.interpolate(added, self._cells(schedule.sizes[-1]), mode="bilinear")
        f = added if f is None else f + added
        if scale == schedule.last:
            return f, None
        x = F.interpolate(f, self._cells(schedule.sizes[scale + 1]), mode=mode)
        if self.is_patchified:
            x = F.pixel_unshuffle(x, 2)
        return f, x.flatten(2).transpose(1, 2)

    def decode(self, f: Tensor) -> Tensor:
        """The finished map -> pixels (b, 3, height, width) RGB in [0, 1], fp32. (The published code returns BGR.)"""
        # image by image: at 1024 px the decoder's maps are large, and the transformer's batch is the one worth having
        return torch.cat([(self.decoder(one[None]).float().clamp(-1, 1) + 1) / 2 for one in f])
