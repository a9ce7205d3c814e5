"""The official files of VAR, key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from accel.models.checkpoints import Source, count_blocks, decoder_shape, read_state, renamed, require
from accel.models.errors import CheckpointError
from accel.models.var.config import SIDES, VARConfig

# what the training script wraps the weights and the tokenizer in
WEIGHTS_INSIDE = (("trainer", "var_wo_ddp"), ("var_wo_ddp",))
TOKENIZER_INSIDE = (("trainer", "vae_local"), ("vae_local",))

# None: buffers, which we compute
WEIGHTS: list[tuple[str, str | None]] = [
    (r"lvl_1L|attn_bias_for_masking|blocks\.\d+\.attn\.zero_k_bias", None),
    (r"pos_start", "embed.start"),
    (r"pos_1LC", "embed.position"),
    (r"lvl_embed\.weight", "embed.level"),
    (r"word_embed\.(weight|bias)", r"embed.word.\1"),
    (r"class_emb\.weight", "class_embed.weight"),
    (r"shared_ada_lin\.1\.(weight|bias)", r"shared_ada.linear.\1"),
    (r"(blocks\.\d+)\.ada_gss", r"\1.gss"),
    (r"(blocks\.\d+)\.ada_lin\.1\.(weight|bias)", r"\1.ada.linear.\2"),
    (r"(blocks\.\d+\.attn)\.scale_mul_1H11", r"\1.log_scale"),
    (r"(blocks\.\d+\.attn)\.mat_qkv\.weight", r"\1.qkv.weight"),
    (r"(blocks\.\d+\.attn)\.(q_bias|v_bias)", r"\1.qkv.\2"),
    (r"(blocks\.\d+\.(?:attn\.proj|ffn\.fc[12])\.(?:weight|bias))", r"\1"),
    (r"head_nm\.ada_lin\.1\.(weight|bias)", r"head.ada.linear.\1"),
    (r"head\.(weight|bias)", r"head.linear.\1"),
]
TOKENIZER: list[tuple[str, str | None]] = [
    (r"quantize\.ema_vocab_hit_SV", None),
    (r"quantize\.embedding\.weight", "quantizer.codebook.weight"),
    (r"quantize\.quant_resi\.qresi_ls\.(\d\.(?:weight|bias))", r"quantizer.phi.\1"),
    (r"((?:encoder|decoder|quant_conv|post_quant_conv)\..+)", r"\1"),
]


def read_original(
    weights: Source, tokenizer: Source | None, *, schedule: Sequence[int] | None, num_classes: int | None
) -> tuple[VARConfig, dict[str, Tensor]]:
    """Configuration read off the shapes, and the state under our names, tokenizer included."""
    state = read_state(weights, wrappers=WEIGHTS_INSIDE)
    what = "a VAR transformer"
    required = ["pos_start", "pos_1LC", "lvl_embed.weight", "class_emb.weight", "word_embed.weight", "head.weight", "blocks.0.attn.scale_mul_1H11"]
    require(state, [*required, "blocks.0.ffn.fc1.weight"], what)
    found = read_state(weights if tokenizer is None else tokenizer, wrappers=TOKENIZER_INSIDE)
    if tokenizer is None and "quantize.embedding.weight" not in found:
        raise CheckpointError("these weights come without a tokenizer; pass the path of vae_ch160v4096z32.pth as the second argument")
    require(found, ["quantize.embedding.weight"], "a VAR tokenizer")
    codes = renamed(found, TOKENIZER, "the VAR tokenizer")
    channels, multipliers, blocks = decoder_shape(codes, "a VAR tokenizer")
    classes, has_null = _classes(state["class_emb.weight"].shape[0], num_classes)
    depth = count_blocks(state, r"blocks\.(\d+)\.", what)
    heads, width = state["blocks.0.attn.scale_mul_1H11"].numel(), state["class_emb.weight"].shape[1]
    if width == 64 * heads and depth != heads:
        raise CheckpointError(f"incomplete checkpoint: {depth} blocks of width {width}, and a published VAR of this width has {heads}")
    config = VARConfig(
        num_hidden_layers=depth, hidden_size=width, num_attention_heads=heads, intermediate_size=state["blocks.0.ffn.fc1.weight"].shape[0],
        shared_adaln="shared_ada_lin.1.weight" in state, num_classes=classes, has_null_class=has_null,
        schedule=_sides(state, schedule), codebook_size=codes["quantizer.codebook.weight"].shape[0], code_width=state["word_embed.weight"].shape[1],
        vae_channels=channels, vae_multipliers=multipliers, vae_blocks=blocks,
    )  # fmt: skip
    ours = renamed(state, WEIGHTS, what)
    return config, ours | {f"tokenizer.{key}": value for key, value in codes.items()}


def _classes(rows: int, num_classes: int | None) -> tuple[int, bool]:
    """Number of classes and whether one more row stands for none."""
    if num_classes is None or rows == num_classes + 1:
        return rows - 1, True
    if rows == num_classes:
        return rows, False
    raise CheckpointError(f"the class table has {rows} rows, which does not go with num_classes={num_classes}")


def _sides(state: Mapping[str, Tensor], schedule: Sequence[int] | None) -> list[int]:
    scales, tokens = state["lvl_embed.weight"].shape[0], state["pos_1LC"].shape[-2]
    sides = list(schedule) if schedule is not None else SIDES.get(tokens, [])
    if len(sides) != scales or sum(side * side for side in sides) != tokens:
        asked = f"schedule={sides}" if schedule is not None else "no published schedule"
        raise CheckpointError(f"the file is for {scales} scales with {tokens} tokens, and {asked} has as many; pass schedule=[side lengths]")
    return sides
