"""The multi-scale vector-quantised tokenizer of VAR: codes of all scales add up to one map, which a decoder turns into pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.cache import Schedule
from accel.models.conv import ConvDecoder, ConvEncoder

PHIS = 4
# Which of the four Φ a scale uses is the nearest of four ticks to k/(K−1). For 10 scales two of the choices are exact ties that the published code
# leaves to floating point, hence tables.
PHI_TABLES = {10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3), 14: (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)}


def phi_index(scale: int, scales: int) -> int:
    """Which Φ refines scale `scale` of `scales`."""
    if scales in PHI_TABLES:
        return PHI_TABLES[scales][scale]
    # ticks are (1, 13/3, 23/3, 11)/12; ×36 makes all of it whole numbers but k/(K−1); ties go up, as in the tables
    place = 36 * scale / max(scales - 1, 1)
    return min(range(PHIS), key=lambda i: (abs(3 + 10 * i - place), -i))


class VARQuantizer(nn.Module):
    """Codebook and Φ. All arithmetic in fp32."""

    def __init__(self, codes: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codes, width)
        self.phi = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(PHIS))

    def contribution(self, ids: Tensor, scale: int, schedule: Schedule) -> Tensor:
        """What the codes of a scale add to the map: ids (b, n_k) -> (b, width, H, W)."""
        h, w = schedule.sizes[scale]
        x = self.codebook(ids).float().transpose(1, 2).reshape(ids.shape[0], -1, h, w)
        if scale < schedule.last:
            x = F.interpolate(x, schedule.sizes[-1], mode="bicubic")
        phi = self.phi[phi_index(scale, len(schedule))]
        refined = phi(x.to(phi.weight.dtype)).float()
        return 0.5 * x + 0.5 * refined  # type: ignore[no-any-return]

    def forward(self, ids: Tensor, f: Tensor | None, scale: int, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
        """Adds the codes of a scale to the map f (None before the first). Returns f and the input codes of the next scale (b, n, width), or None."""
        added = self.contribution(ids, scale, schedule)
        f = added if f is None else f + added
        if scale == schedule.last:
            return f, None
        return f, F.interpolate(f, schedule.sizes[scale + 1], mode="area").flatten(2).transpose(1, 2)

    def nearest(self, x: Tensor) -> Tensor:
        """Index of the closest code: (b, width, h, w) -> (b, h·w)."""
        points = x.flatten(2).transpose(1, 2)
        # looked up, not read from the weight: an offloaded codebook is there only while it is called
        codes = self.codebook(torch.arange(self.codebook.num_embeddings, device=x.device)).float()
        return torch.cdist(points, codes[None]).argmin(-1)


class VARTokenizer(nn.Module):
    """Images to codes and back. Pixels are RGB in [0, 1]."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        shape = (config.vae_channels, config.vae_multipliers, config.vae_blocks, config.code_width)
        self.quantizer = VARQuantizer(config.codebook_size, config.code_width)
        self.encoder = ConvEncoder(*shape, has_attention=True)
        self.quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.code_width, 3, padding=1)
        self.decoder = ConvDecoder(*shape, has_attention=True)

    def forward(self, ids: Tensor, f: Tensor | None, scale: int, schedule: Schedule) -> tuple[Tensor, Tensor | None]:
        """One step of the sum over scales: see `VARQuantizer.forward`."""
        return self.quantizer(ids, f, scale, schedule)  # type: ignore[no-any-return]

    def decode(self, f: Tensor) -> Tensor:
        """The finished map (b, width, H, W) -> pixels (b, 3, height, width), fp32."""
        pixels = self.decoder(self.post_quant_conv(f.to(self.post_quant_conv.weight.dtype)))
        return (pixels.float().clamp(-1, 1) + 1) / 2  # type: ignore[no-any-return]

    def encode(self, pixels: Tensor, schedule: Schedule) -> list[Tensor]:
        """Codes per scale, each (b, n_k), of pixels (b, 3, height, width): every scale codes what the coarser ones have left."""
        rest = self.quant_conv(self.encoder(pixels.to(self.encoder.conv_in.weight.dtype) * 2 - 1)).float()
        ids = []
        for scale, size in enumerate(schedule.sizes):
            ids.append(self.quantizer.nearest(rest if scale == schedule.last else F.interpolate(rest, size, mode="area")))
            rest = rest - self.quantizer.contribution(ids[-1], scale, schedule)
        return ids
