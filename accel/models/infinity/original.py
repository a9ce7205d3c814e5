"""The official files of Infinity, key by key."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from accel.models.checkpoints import Source, count_blocks, decoder_shape, read_state, renamed, require
from accel.models.errors import CheckpointError
from accel.models.infinity.config import InfinityConfig

WEIGHTS_INSIDE = (("trainer", "gpt_fsdp"), ("gpt_fsdp",))
TOKENIZER_INSIDE = (("vae",), ("trainer", "vae_local"))

# block keys are those of `_unchunked`. None: buffers, which we compute
WEIGHTS: list[tuple[str, str | None]] = [
    (r"lvl_1L|attn_bias_for_masking|.*\.zero_k_bias", None),
    (r"cfg_uncond", "text.null_states"),
    (r"text_norm\.weight", "text.norm_weight"),
    (r"text_proj_for_sos\.ca\.mat_q", "text.pool.query"),
    (r"text_proj_for_sos\.ca\.mat_kv\.weight", "text.pool.kv.weight"),
    (r"text_proj_for_sos\.ca\.v_bias", "text.pool.kv.v_bias"),
    (r"text_proj_for_sos\.ca\.(proj\.(?:weight|bias))", r"text.pool.\1"),
    (r"text_proj_for_ca\.([02]\.(?:weight|bias))", r"text.project.\1"),
    (r"pos_start", "embed.start"),
    (r"lvl_embed\.weight", "embed.level"),
    (r"word_embed\.(weight|bias)", r"embed.word.\1"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"shared_ada.linear.\1"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"head.ada.linear.\1"),
    (r"head\.(weight|bias)", r"head.linear.\1"),
    (r"(blocks\.\d+)\.ada_gss", r"\1.gss"),
    (r"(blocks\.\d+)\.sa\.scale_mul_1H11", r"\1.attn.log_scale"),
    (r"(blocks\.\d+)\.sa\.mat_qkv\.weight", r"\1.attn.qkv.weight"),
    (r"(blocks\.\d+)\.sa\.(q_bias|v_bias)", r"\1.attn.qkv.\2"),
    (r"(blocks\.\d+)\.sa\.(proj\.(?:weight|bias))", r"\1.attn.\2"),
    (r"(blocks\.\d+)\.ca\.mat_q\.(weight|bias)", r"\1.cross.q.\2"),
    (r"(blocks\.\d+)\.ca\.mat_kv\.weight", r"\1.cross.kv.weight"),
    (r"(blocks\.\d+)\.ca\.v_bias", r"\1.cross.kv.v_bias"),
    (r"(blocks\.\d+)\.ca\.(proj\.(?:weight|bias))", r"\1.cross.\2"),
    (r"(blocks\.\d+)\.ca_norm\.(weight|bias)", r"\1.cross_norm.\2"),
    (r"(blocks\.\d+\.ffn\.fc[12]\.(?:weight|bias))", r"\1"),
]
# the encoder and the quantizer's buffers are not needed to generate
TOKENIZER: list[tuple[str, str | None]] = [(r"(?:encoder|quantizer)\..*", None), (r"(decoder\..+)", r"\1")]


def read_original(weights: Source, tokenizer: Source, *, default_size: str) -> tuple[InfinityConfig, dict[str, Tensor]]:
    """Configuration read off the shapes, and the state under our names, tokenizer included."""
    what = "an Infinity transformer"
    state = _unchunked(read_state(weights, wrappers=WEIGHTS_INSIDE), what)
    required = ["cfg_uncond", "text_proj_for_sos.ca.mat_q", "lvl_embed.weight", "word_embed.weight", "shared_ada_lin.1.weight", "head.weight"]
    require(state, [*required, "blocks.0.sa.scale_mul_1H11", "blocks.0.ffn.fc1.weight"], what)
    codes = renamed(_plain_convolutions(read_state(tokenizer, wrappers=TOKENIZER_INSIDE)), TOKENIZER, "the Infinity tokenizer")
    channels, multipliers, blocks = decoder_shape(codes, "an Infinity tokenizer")
    width, code_bits = state["word_embed.weight"].shape
    tokenizer_bits = codes["decoder.conv_in.weight"].shape[1]
    if code_bits not in (tokenizer_bits, 4 * tokenizer_bits):
        possible = f"{tokenizer_bits}, or {4 * tokenizer_bits} where a token stands for 2×2 cells"
        raise CheckpointError(f"the transformer predicts {code_bits} bits per token; with this tokenizer there are {possible}")
    config = InfinityConfig(
        num_hidden_layers=count_blocks(state, r"blocks\.(\d+)\.", what), hidden_size=width,
        num_attention_heads=state["blocks.0.sa.scale_mul_1H11"].numel(), intermediate_size=state["blocks.0.ffn.fc1.weight"].shape[0],
        text_width=state["cfg_uncond"].shape[-1], text_tokens=state["cfg_uncond"].shape[-2],
        pool_heads=state["text_proj_for_sos.ca.mat_q"].shape[-2], max_scales=state["lvl_embed.weight"].shape[0],
        code_bits=code_bits, tokenizer_bits=tokenizer_bits, default_size=default_size,
        vae_channels=channels, vae_multipliers=multipliers, vae_blocks=blocks,
    )  # fmt: skip
    ours = renamed(state, WEIGHTS, what)
    return config, ours | {f"tokenizer.{key}": value for key, value in codes.items()}


def _unchunked(state: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """`block_chunks.c.module.j.…` as `blocks.i.…` with i = c · (blocks per chunk) + j."""
    pattern = re.compile(r"block_chunks\.(\d+)\.module\.(\d+)\.(.+)")
    places = {(int(match[1]), int(match[2])) for key in state if (match := pattern.fullmatch(key))}
    if not places:
        return dict(state)
    per_chunk = 1 + max(j for _, j in places)
    if (chunks := 1 + max(c for c, _ in places)) * per_chunk != len(places):
        raise CheckpointError(f"{what}: {len(places)} blocks in {chunks} chunks of up to {per_chunk}; some are missing")

    def plain(key: str) -> str:
        match = pattern.fullmatch(key)
        return key if match is None else f"blocks.{int(match[1]) * per_chunk + int(match[2])}.{match[3]}"

    return {plain(key): value for key, value in state.items()}


def _plain_convolutions(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convolutions out of their wrapper (`conv_in.conv.weight` -> `conv_in.weight`), and separate q, k, v of an attention in one."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        # the convolution of a change of size is called `conv` itself, and may be wrapped too
        short = re.sub(r"(?<!sample)\.conv\.(weight|bias)$", r".\1", key)
        plain[short] = value
    for key in [key for key in plain if re.search(r"\.attn[._]\d+\.q\.(weight|bias)$", key)]:
        parts = [re.sub(r"\.q\.(weight|bias)$", rf".{letter}.\1", key) for letter in "qkv"]
        require(plain, parts, "an Infinity tokenizer")
        plain[re.sub(r"\.q\.(weight|bias)$", r".qkv.\1", key)] = torch.cat([plain.pop(part) for part in parts])
    return plain
