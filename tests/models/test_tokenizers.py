"""From codes to maps to pixels: the tables, resizings, orders and paddings that are easy to get wrong, on values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.cache import Schedule
from accel.models.conv import ConvDecoder, ConvEncoder, Downsample, MapAttention
from accel.models.infinity import BitTokenizer, Infinity, InfinityConfig
from accel.models.var import VAR, VARTokenizer
from accel.models.var.tokenizer import VARQuantizer, phi_index


def test_which_phi_a_scale_uses() -> None:
    # scales 2 and 7 of 10 are exact ties (8/36 lies between the ticks 3/36 and 13/36)
    assert [phi_index(k, 10) for k in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert [phi_index(k, 14) for k in range(14)] == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    # 0, 12/36, 24/36, 1 against 3, 13, 23, 33
    assert [phi_index(k, 4) for k in range(4)] == [0, 1, 2, 3]
    assert phi_index(0, 1) == 0


def quantizer(codes: int = 8, width: int = 4) -> VARQuantizer:
    torch.manual_seed(0)
    return VARQuantizer(codes, width)


@torch.no_grad()
def test_codes_are_raised_bicubically_and_half_of_the_result_is_refined() -> None:
    q, schedule, ids = quantizer(), Schedule.of([1, 2, 3]), torch.tensor([[1, 5, 2, 7]])
    f, following = q(ids, torch.ones(1, 4, 3, 3), 1, schedule)
    coarse = q.codebook.weight[ids[0]].T.reshape(1, 4, 2, 2)
    raised = F.interpolate(coarse, (3, 3), mode="bicubic")
    # scale 1 of 3 stands at 18/36, between the ticks 13/36 and 23/36: a tie, which goes up
    phi = q.phi[2]
    expected = 1 + 0.5 * raised + 0.5 * F.conv2d(raised, phi.weight, phi.bias, padding=1)
    assert torch.allclose(f, expected, atol=1e-6)
    assert torch.allclose(following, F.interpolate(f, (3, 3), mode="area").reshape(1, 4, 9).transpose(1, 2))


@torch.no_grad()
def test_the_next_input_is_the_average_over_cells() -> None:
    q, schedule = quantizer(), Schedule.of([1, 2, 5])
    f, following = q(torch.tensor([[3]]), torch.randn(1, 4, 5, 5), 0, schedule)
    # two cells over five rows: rows 0–2 and 2–4, the middle one shared
    by_hand = torch.stack([f[0, :, r : r + 3, c : c + 3].mean((1, 2)) for r in (0, 2) for c in (0, 2)])
    assert torch.allclose(following[0], by_hand, atol=1e-5)


@torch.no_grad()
def test_the_last_scale_is_not_resized_and_has_no_next_input() -> None:
    q, ids = quantizer(), torch.arange(4)[None]
    f, following = q(ids, None, 1, Schedule.of([1, 2]))
    codes = q.codebook.weight[ids[0]].T.reshape(1, 4, 2, 2)
    assert following is None
    assert torch.allclose(f, 0.5 * codes + 0.5 * q.phi[3](codes), atol=1e-6)


@torch.no_grad()
def test_encoding_takes_the_nearest_code_of_what_is_left(tiny_var: Callable[..., VAR]) -> None:
    model = tiny_var()
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 8, 8)
    ids = model.tokenizer.encode(pixels, model.schedule)
    assert [tuple(one.shape) for one in ids] == [(2, 1), (2, 4), (2, 9), (2, 16)]
    rest = model.tokenizer.quant_conv(model.tokenizer.encoder(2 * pixels - 1))
    codebook = model.tokenizer.quantizer.codebook.weight
    for scale, (side, found) in enumerate(zip((1, 2, 3, 4), ids, strict=True)):
        points = (F.interpolate(rest, (side, side), mode="area") if side < 4 else rest).flatten(2).transpose(1, 2)
        distance = (points[:, :, None] - codebook).pow(2).sum(-1)
        assert torch.equal(distance.argmin(-1), found)
        rest = rest - model.tokenizer.quantizer.contribution(found, scale, model.schedule)
    model.tokenizer.decoder = nn.Identity()
    model.tokenizer.post_quant_conv.weight.zero_()
    model.tokenizer.post_quant_conv.bias.copy_(torch.tensor([-3.0, -1, -0.5, 0, 0.5, 1, 2, 0]))
    assert model.tokenizer.decode(rest)[0, :, 0, 0].tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 0.5]


def test_downsampling_pads_right_and_bottom_only() -> None:
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()
        down.conv.bias.zero_()
        down.conv.weight[0, 0, 2, 2] = 1
        x = torch.arange(16.0).reshape(1, 1, 4, 4)
        # the corner of the window at (0, 0) is x[2, 2]; the other windows reach into the padding
        assert down(x)[0, 0].tolist() == [[10, 0], [0, 0]]


@torch.no_grad()
def test_map_attention_is_one_head_with_the_square_root_of_all_channels() -> None:
    torch.manual_seed(0)
    attention, x = MapAttention(32), torch.randn(2, 32, 3, 2)
    q, k, v = (attention.qkv(attention.norm(x)).reshape(2, 3, 32, 6)[:, i].transpose(1, 2) for i in range(3))
    out = ((q @ k.transpose(1, 2)) * 32**-0.5).softmax(-1) @ v
    assert torch.allclose(attention(x), x + attention.proj_out(out.transpose(1, 2).reshape(x.shape)), atol=1e-5)


def test_the_convolutions_of_the_published_tokenizer() -> None:
    with torch.device("meta"):
        encoder, decoder = (half(160, (1, 1, 2, 2, 4), 2, 32, has_attention=True) for half in (ConvEncoder, ConvDecoder))
    assert encoder(torch.empty(1, 3, 256, 256, device="meta")).shape == (1, 32, 16, 16)
    assert decoder(torch.empty(1, 32, 16, 16, device="meta")).shape == (1, 3, 256, 256)
    assert (decoder.norm_out.num_groups, decoder.norm_out.eps) == (32, 1e-6)
    assert [len(level.attn) for level in decoder.up] == [0, 0, 0, 0, 3]
    assert [len(level.attn) for level in encoder.down] == [0, 0, 0, 0, 2]


# --- bits


def bit_tokenizer(**changes: Any) -> BitTokenizer:
    config = {"tokenizer_bits": 4, "code_bits": 4, "hidden_size": 16, "num_attention_heads": 2, "pool_heads": 2, "vae_channels": 4, "vae_blocks": 1}
    return BitTokenizer(InfinityConfig(**(config | {"vae_multipliers": [1]} | changes)))


def test_bits_are_plus_or_minus_one_over_the_root_of_the_tokenizers_bits() -> None:
    x = bit_tokenizer().values(torch.tensor([[[1, 0, 0, 1], [1, 1, 1, 1]]]), (1, 2))
    assert x[0, :, 0, 0].tolist() == [0.5, -0.5, -0.5, 0.5]
    assert x[0, :, 0, 1].tolist() == [0.5] * 4
    # the tokenizer's 4 bits count, not the 16 of the token
    patchified = bit_tokenizer(code_bits=16).values(torch.ones(1, 1, 16), (1, 1))
    assert torch.equal(patchified, torch.full((1, 4, 2, 2), 0.5))
    assert patchified.norm(dim=1).unique().tolist() == [1.0]


def test_a_token_with_four_times_the_bits_is_two_by_two_cells() -> None:
    tokenizer, size = bit_tokenizer(code_bits=16), (2, 3)
    torch.manual_seed(0)
    bits = torch.randint(2, (1, 6, 16))
    cells = tokenizer.values(bits, size)
    assert cells.shape == (1, 4, 4, 6)
    # channel c·4 + 2·i + j of token (y, x) is channel c of cell (2y + i, 2x + j)
    for y, x, c, i, j in ((0, 0, 0, 0, 1), (1, 2, 3, 1, 0), (0, 1, 2, 1, 1)):
        assert cells[0, c, 2 * y + i, 2 * x + j] == (1 if bits[0, 3 * y + x, 4 * c + 2 * i + j] else -1) * 0.5
    schedule = Schedule.of([size, size])
    # the next input of the same size is the same map, back in the token's layout
    _, following = tokenizer(bits, None, 0, schedule)
    assert torch.allclose(following, bits - 0.5, atol=1e-6)


@pytest.mark.parametrize("code_bits", [4, 16], ids=["plain", "patchified"])
def test_maps_are_resized_as_volumes_of_one_frame(code_bits: int) -> None:
    tokenizer, schedule = bit_tokenizer(code_bits=code_bits), Schedule.of([(2, 1), (3, 2), (5, 4)])
    factor = 2 if code_bits == 16 else 1
    torch.manual_seed(0)
    bits, f = torch.randint(2, (1, 2, code_bits)), torch.randn(1, 4, 5 * factor, 4 * factor)
    total, following = tokenizer(bits, f, 0, schedule)

    def volume(x: Tensor, size: tuple[int, int]) -> Tensor:
        return F.interpolate(x[:, :, None], (1, size[0] * factor, size[1] * factor), mode="trilinear")[:, :, 0]

    assert torch.allclose(total, f + volume(tokenizer.values(bits, (2, 1)), (5, 4)), atol=1e-6)
    smaller = volume(total, (3, 2))
    smaller = F.pixel_unshuffle(smaller, 2) if factor == 2 else smaller
    assert torch.allclose(following, smaller.flatten(2).transpose(1, 2), atol=1e-6)
    by_area = F.interpolate(total, (3 * factor, 2 * factor), mode="area")
    by_area = F.pixel_unshuffle(by_area, 2) if factor == 2 else by_area
    in_training = tokenizer(bits, f, 0, schedule, mode="area")[1]
    assert torch.allclose(in_training, by_area.flatten(2).transpose(1, 2), atol=1e-6)
    assert not torch.allclose(in_training, following, atol=1e-3)


def test_pixels_stay_in_the_decoders_order(tiny_infinity: Callable[..., Infinity], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_infinity()
    red = torch.tensor([1.0, -1.0, 0.0])[None, :, None, None].expand(1, 3, 2, 2)
    monkeypatch.setattr(model.tokenizer.decoder, "forward", lambda codes: red)
    image = model.generate([torch.randn(3, 24)], schedule=[1, 2], seed=0)[0]
    assert image.getpixel((0, 0)) == (255, 0, 127)


def test_var_tokenizer_is_whole(tiny_var: Callable[..., VAR]) -> None:
    tokenizer = tiny_var().tokenizer
    assert isinstance(tokenizer, VARTokenizer)
    assert {name for name, _ in tokenizer.named_children()} == {"quantizer", "encoder", "quant_conv", "post_quant_conv", "decoder"}
