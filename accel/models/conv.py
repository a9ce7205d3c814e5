"""The convolutional encoder and decoder around the codes, of the taming-transformers family, shared by both tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F


def group_norm(channels: int) -> nn.GroupNorm:
    """32 groups, or as many as a small test model has channels."""
    return nn.GroupNorm(min(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    """Twice norm, SiLU, 3×3 convolution, around a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h  # type: ignore[no-any-return]


class MapAttention(nn.Module):
    """One head over all pixels of a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        # (b, 3c, h, w) -> three of (b, h·w, c); the default scale of the product is 1/√c
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1)).transpose(2, 3).unbind(1)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(out)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Nearest neighbours, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """A convolution of stride 2, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, 2h, 2w) -> (b, c, h, w)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels)
        self.attn_1 = MapAttention(channels)
        self.block_2 = ResBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, c, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))  # type: ignore[no-any-return]


class Level(nn.Module):
    """The blocks of one resolution, an attention after each where `has_attention`, and a change of resolution or none."""

    def __init__(self, widths: Sequence[int], *, has_attention: bool, resample: nn.Module | None, name: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResBlock(i, o) for i, o in pairwise(widths))
        self.attn = nn.ModuleList(MapAttention(o) for o in widths[1:]) if has_attention else nn.ModuleList()
        self.resample_name = name
        if resample is not None:
            self.add_module(name, resample)

    def forward(self, x: Tensor) -> Tensor:
        """(b, widths[0], h, w) -> (b, widths[-1], h', w')."""
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        resample = getattr(self, self.resample_name, None)
        return x if resample is None else resample(x)


class ConvEncoder(nn.Module):
    """Pixels in [−1, 1] -> map of `code_width` channels, smaller by 2 per level after the first."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, code_width: int, *, has_attention: bool) -> None:
        super().__init__()
        last = len(multipliers) - 1
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = channels
        for i, multiplier in enumerate(multipliers):
            out = channels * multiplier
            resample = Downsample(out) if i < last else None
            self.down.append(Level([width, *[out] * blocks], has_attention=has_attention and i == last, resample=resample, name="downsample"))
            width = out
        self.mid = Middle(width)
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, code_width, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, h·f, w·f) -> (b, code_width, h, w)."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))  # type: ignore[no-any-return]


class ConvDecoder(nn.Module):
    """Map of `code_width` channels -> pixels, about [−1, 1]. `up[0]` is the finest level."""

    def __init__(self, channels: int, multipliers: Sequence[int], blocks: int, code_width: int, *, has_attention: bool) -> None:
        super().__init__()
        last = len(multipliers) - 1
        width = channels * multipliers[-1]
        self.conv_in = nn.Conv2d(code_width, width, 3, padding=1)
        self.mid = Middle(width)
        levels: list[Level] = []
        for i in range(last, -1, -1):
            out = channels * multipliers[i]
            resample = Upsample(out) if i > 0 else None
            levels.append(Level([width, *[out] * (blocks + 1)], has_attention=has_attention and i == last, resample=resample, name="upsample"))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(b, code_width, h, w) -> (b, 3, h·f, w·f)."""
        x = self.mid(self.conv_in(codes.to(self.conv_in.weight.dtype)))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))  # type: ignore[no-any-return]
