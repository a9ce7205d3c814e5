"""Tiny random models, and state dicts with the keys and shapes of the official files, written from the specification and not from the loaders."""

from __future__ import annotations

from collections.abc import Callable

import next_scale
import pytest
import torch
from torch import Tensor

from accel.models.infinity import Infinity
from accel.models.var import VAR

State = dict[str, Tensor]


@pytest.fixture
def tiny_var() -> Callable[..., VAR]:
    return next_scale.tiny_var


@pytest.fixture
def tiny_infinity() -> Callable[..., Infinity]:
    return next_scale.tiny_infinity


def shapes_to_state(shapes: dict[str, tuple[int, ...]], device: str) -> State:
    torch.manual_seed(1)
    state = {}
    for key, shape in shapes.items():
        std = max(shape[-1], 4) ** -0.5 if key.endswith("weight") and len(shape) > 1 else 0.3
        zero = key.endswith(("zero_k_bias", "lvl_1L", "attn_bias_for_masking"))
        state[key] = torch.zeros(shape, device=device) if zero else torch.randn(shape, device=device) * std
    return state


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def conv(name: str, outputs: int, inputs: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@pytest.fixture
def official_var() -> Callable[..., State]:
    """The transformer of specification §6.3."""

    def build(
        *, depth: int, width: int, heads: int, sides: list[int], shared: bool, codes: int, code: int, classes: int, device: str = "cpu"
    ) -> State:
        tokens, c = sum(side * side for side in sides), width
        shapes: dict[str, tuple[int, ...]] = {
            "pos_start": (1, 1, c), "pos_1LC": (1, tokens, c), "lvl_1L": (1, tokens), "attn_bias_for_masking": (1, 1, tokens, tokens),
            "class_emb.weight": (classes, c), "lvl_embed.weight": (len(sides), c),
            **linear("word_embed", c, code), **linear("head_nm.ada_lin.1", 2 * c, c), **linear("head", codes, c),
        }  # fmt: skip
        if shared:
            shapes |= linear("shared_ada_lin.1", 6 * c, c)
        for i in range(depth):
            b = f"blocks.{i}"
            shapes |= {
                f"{b}.attn.scale_mul_1H11": (1, heads, 1, 1), f"{b}.attn.q_bias": (c,), f"{b}.attn.v_bias": (c,), f"{b}.attn.zero_k_bias": (c,),
                f"{b}.attn.mat_qkv.weight": (3 * c, c), **linear(f"{b}.attn.proj", c, c), **linear(f"{b}.ffn.fc1", 4 * c, c),
                **linear(f"{b}.ffn.fc2", c, 4 * c),
            }  # fmt: skip
            shapes |= {f"{b}.ada_gss": (1, 1, 6, c)} if shared else linear(f"{b}.ada_lin.1", 6 * c, c)
        return shapes_to_state(shapes, device)

    return build


def res_block(name: str, inputs: int, outputs: int, wrapped: str) -> dict[str, tuple[int, ...]]:
    shapes = {
        **norm(f"{name}.norm1", inputs), **conv(f"{name}.conv1{wrapped}", outputs, inputs, 3), **norm(f"{name}.norm2", outputs),
        **conv(f"{name}.conv2{wrapped}", outputs, outputs, 3),
    }  # fmt: skip
    return shapes | (conv(f"{name}.nin_shortcut{wrapped}", outputs, inputs, 1) if inputs != outputs else {})


def fused_attention(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {**norm(f"{name}.norm", width), **conv(f"{name}.qkv", 3 * width, width, 1), **conv(f"{name}.proj_out", width, width, 1)}


@pytest.fixture
def official_var_tokenizer() -> Callable[..., State]:
    """The tokenizer of specification §6.3: two residual blocks, attention at the lowest resolution and in the middle."""

    def build(*, ch: int, mult: tuple[int, ...], codes: int, code: int, device: str = "cpu") -> State:
        last, top = len(mult) - 1, ch * mult[-1]
        shapes: dict[str, tuple[int, ...]] = {
            "quantize.embedding.weight": (codes, code), "quantize.ema_vocab_hit_SV": (10, codes),
            **conv("quant_conv", code, code, 3), **conv("post_quant_conv", code, code, 3),
            **conv("encoder.conv_in", ch, 3, 3), **norm("encoder.norm_out", top), **conv("encoder.conv_out", code, top, 3),
            **conv("decoder.conv_in", top, code, 3), **norm("decoder.norm_out", ch * mult[0]), **conv("decoder.conv_out", 3, ch * mult[0], 3),
        }  # fmt: skip
        for i in range(4):
            shapes |= conv(f"quantize.quant_resi.qresi_ls.{i}", code, code, 3)
        for half in ("encoder", "decoder"):
            for block in ("block_1", "block_2"):
                shapes |= res_block(f"{half}.mid.{block}", top, top, "")
            shapes |= fused_attention(f"{half}.mid.attn_1", top)
        width = ch
        for i, m in enumerate(mult):
            for j in range(2):
                shapes |= res_block(f"encoder.down.{i}.block.{j}", width, ch * m, "")
                width = ch * m
                shapes |= fused_attention(f"encoder.down.{i}.attn.{j}", width) if i == last else {}
            shapes |= conv(f"encoder.down.{i}.downsample.conv", width, width, 3) if i < last else {}
        width = top
        for i in range(last, -1, -1):
            for j in range(3):
                shapes |= res_block(f"decoder.up.{i}.block.{j}", width, ch * mult[i], "")
                width = ch * mult[i]
                shapes |= fused_attention(f"decoder.up.{i}.attn.{j}", width) if i == last else {}
            shapes |= conv(f"decoder.up.{i}.upsample.conv", width, width, 3) if i > 0 else {}
        return shapes_to_state(shapes, device)

    return build


@pytest.fixture
def official_infinity() -> Callable[..., State]:
    """The transformer of specification §6.5. `scale_shape`: how the temperatures are stored."""

    def build(
        *, layers: int, width: int, heads: int, per_chunk: int, bits: int, text: int = 2048, text_tokens: int = 512, pool: int = 16,
        scale_shape: str = "1H11", device: str = "cpu",
    ) -> State:  # fmt: skip
        c = width
        shapes: dict[str, tuple[int, ...]] = {
            "cfg_uncond": (text_tokens, text), "text_norm.weight": (text,), "text_proj_for_sos.ca.mat_q": (1, pool, c // pool),
            "text_proj_for_sos.ca.mat_kv.weight": (2 * c, text), "text_proj_for_sos.ca.v_bias": (c,), "text_proj_for_sos.ca.zero_k_bias": (c,),
            **linear("text_proj_for_sos.ca.proj", c, c), **linear("text_proj_for_ca.0", c, text), **linear("text_proj_for_ca.2", c, c),
            "pos_start": (1, 1, c), "lvl_embed.weight": (15, c), **linear("word_embed", c, bits), **linear("shared_ada_lin.1", 6 * c, c),
            **linear("head_nm.ada_lin.1", 2 * c, c), **linear("head", 2 * bits, c),
        }  # fmt: skip
        for i in range(layers):
            b = f"block_chunks.{i // per_chunk}.module.{i % per_chunk}"
            shapes |= {
                f"{b}.sa.scale_mul_1H11": (1, heads, 1, 1) if scale_shape == "1H11" else (1, 1, heads, 1), f"{b}.sa.q_bias": (c,),
                f"{b}.sa.v_bias": (c,), f"{b}.sa.zero_k_bias": (c,), f"{b}.sa.mat_qkv.weight": (3 * c, c), **linear(f"{b}.sa.proj", c, c),
                **linear(f"{b}.ca.mat_q", c, c), f"{b}.ca.mat_kv.weight": (2 * c, c), f"{b}.ca.v_bias": (c,), f"{b}.ca.zero_k_bias": (c,),
                **linear(f"{b}.ca.proj", c, c), **norm(f"{b}.ca_norm", c), **linear(f"{b}.ffn.fc1", 4 * c, c), **linear(f"{b}.ffn.fc2", c, 4 * c),
                f"{b}.ada_gss": (1, 1, 6, c),
            }  # fmt: skip
        return shapes_to_state(shapes, device)

    return build


@pytest.fixture
def official_infinity_tokenizer() -> Callable[..., State]:
    """A decoder with wrapped convolutions and separate q, k, v, and beside it an encoder and buffers that are not loaded."""

    def build(*, ch: int, mult: tuple[int, ...], bits: int, device: str = "cpu") -> State:
        last, top, w = len(mult) - 1, ch * mult[-1], ".conv"
        shapes: dict[str, tuple[int, ...]] = {
            **conv("decoder.conv_in.conv", top, bits, 3), **norm("decoder.norm_out", ch), **conv("decoder.conv_out.conv", 3, ch, 3),
            **conv("encoder.conv_in.conv", ch, 3, 3), "quantizer.lfq.zero": (), **norm("decoder.mid.attn_1.norm", top),
        }  # fmt: skip
        for part in ("q", "k", "v", "proj_out"):
            shapes |= conv(f"decoder.mid.attn_1.{part}.conv", top, top, 1)
        for block in ("block_1", "block_2"):
            shapes |= res_block(f"decoder.mid.{block}", top, top, w)
        width = top
        for i in range(last, -1, -1):
            for j in range(3):
                shapes |= res_block(f"decoder.up.{i}.block.{j}", width, ch * mult[i], w)
                width = ch * mult[i]
            shapes |= conv(f"decoder.up.{i}.upsample.conv.conv", width, width, 3) if i > 0 else {}
        return shapes_to_state({key: shape for key, shape in shapes.items() if shape}, device) | {"quantizer.lfq.zero": torch.tensor(0.0)}

    return build
