"""A test double of the VAR class of FoundationVision/VAR, from specification §6.3 and §6.4: attribute names, state dict, order of a generation.

It keeps keys and values on its attention modules as the original does, and draws all images from one generator. The decoder is ours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.models.conv import ConvDecoder, ConvEncoder

SIDES = (1, 2, 3, 4)
WIDTH, HEADS, CODES, CODE_WIDTH, CLASSES = 32, 4, 16, 8, 5


class Attention(nn.Module):
    def __init__(self, *, is_normalised: bool, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_l2_norm = HEADS, WIDTH // HEADS, is_normalised
        if is_normalised:
            self.scale, self.max_scale_mul = 1, math.log(100)
            self.scale_mul_1H11 = nn.Parameter(torch.zeros(1, HEADS, 1, 1))
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(WIDTH)) for _ in range(2))
        self.register_buffer("zero_k_bias", torch.zeros(WIDTH))
        self.proj, self.proj_drop, self.attn_drop = nn.Linear(WIDTH, WIDTH), nn.Identity(), dropout
        self.using_flash = self.using_xform = False
        self.kv_caching(False)

    def kv_caching(self, enable: bool) -> None:
        self.caching = enable
        self.cached_k = self.cached_v = None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        if self.using_flash or self.using_xform:
            raise ImportError("the fast libraries are not here")
        projected = F.linear(x, self.mat_qkv.weight, torch.cat((self.q_bias, self.zero_k_bias, self.v_bias)))
        q, k, v = projected.reshape(*x.shape[:2], 3, HEADS, self.head_dim).permute(2, 0, 3, 1, 4)
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * torch.exp(torch.clamp(self.scale_mul_1H11, max=self.max_scale_mul))
            k = F.normalize(k, dim=-1)
        if self.caching:
            if self.cached_k is not None:
                k, v = torch.cat([self.cached_k, k], 2), torch.cat([self.cached_v, v], 2)
            self.cached_k, self.cached_v = k, v
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_bias, dropout_p=dropout, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, *, is_shared: bool, **attention: Any) -> None:
        super().__init__()
        self.shared_aln = is_shared
        self.attn, self.ffn = Attention(**attention), FeedForward()
        self.ln_wo_grad = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        if is_shared:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, WIDTH))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, cond_BD: Tensor, attn_bias: Tensor | None) -> Tensor:
        six = self.ada_gss + cond_BD if self.shared_aln else self.ada_lin(cond_BD).reshape(-1, 1, 6, WIDTH)
        gate_a, gate_f, scale_a, scale_f, shift_a, shift_f = (six[:, :, i] for i in range(6))
        x = x + gate_a * self.attn(self.ln_wo_grad(x) * (1 + scale_a) + shift_a, attn_bias=attn_bias)
        return x + gate_f * self.ffn(self.ln_wo_grad(x) * (1 + scale_f) + shift_f)


class SixVectors(nn.Linear):
    def forward(self, condition: Tensor) -> Tensor:
        return super().forward(condition).reshape(-1, 1, 6, WIDTH)


class BeforeHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_wo_grad = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.ada_lin(condition).reshape(-1, 1, 2, WIDTH).unbind(2)
        return self.ln_wo_grad(x) * (1 + scale) + shift


class Refinements(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(nn.Conv2d(CODE_WIDTH, CODE_WIDTH, 3, padding=1) for _ in range(4))

    def at(self, place: float) -> nn.Module:
        return self.qresi_ls[min(range(4), key=lambda i: abs((1 + i * 10 / 3) / 12 - place))]


class Quantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODES, CODE_WIDTH)
        self.quant_resi = Refinements()
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(SIDES), CODES))

    def step(self, scale: int, f: Tensor, codes: Tensor) -> tuple[Tensor, Tensor | None]:
        """Adds the codes of a scale (images, n) to the map and gives the next scale's input codes (images, n, width)."""
        side, last = SIDES[scale], len(SIDES) - 1
        h = self.embedding(codes).transpose(1, 2).reshape(len(codes), CODE_WIDTH, side, side)
        h = h if scale == last else F.interpolate(h, (SIDES[-1], SIDES[-1]), mode="bicubic")
        f = f + 0.5 * h + 0.5 * self.quant_resi.at(scale / last)(h)
        return f, None if scale == last else F.interpolate(f, (SIDES[scale + 1],) * 2, mode="area").flatten(2).transpose(1, 2)


class Tokenizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shape = (8, [1, 2], 1, CODE_WIDTH)
        self.encoder, self.decoder = ConvEncoder(*shape, has_attention=True), ConvDecoder(*shape, has_attention=True)
        self.quant_conv, self.post_quant_conv = (nn.Conv2d(CODE_WIDTH, CODE_WIDTH, 3, padding=1) for _ in range(2))
        self.quantize = Quantizer()

    def fhat_to_img(self, f: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(f)).clamp(-1, 1)


class OfficialVAR(nn.Module):
    def __init__(self, *, depth: int = 2, is_shared: bool = False, is_normalised: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.patch_nums, self.num_classes, self.prog_si = SIDES, CLASSES, -1
        self.rng = torch.Generator()
        vae = Tokenizer()
        # in a tuple, so that the tokenizer is no part of the model
        self.vae_proxy, self.vae_quant_proxy = (vae,), (vae.quantize,)
        total = sum(side * side for side in SIDES)
        self.word_embed, self.class_emb = nn.Linear(CODE_WIDTH, WIDTH), nn.Embedding(CLASSES + 1, WIDTH)
        self.pos_start, self.pos_1LC = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.zeros(1, total, WIDTH))
        self.lvl_embed = nn.Embedding(len(SIDES), WIDTH)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), SixVectors(WIDTH, 6 * WIDTH)) if is_shared else nn.Identity()
        self.blocks = nn.ModuleList(Block(is_shared=is_shared, is_normalised=is_normalised, dropout=dropout) for _ in range(depth))
        self.head_nm, self.head = BeforeHead(), nn.Linear(WIDTH, CODES)
        level = torch.repeat_interleave(torch.arange(len(SIDES)), torch.tensor([side * side for side in SIDES]))
        self.register_buffer("lvl_1L", level[None])
        hidden = level[None, :] > level[:, None]
        self.register_buffer("attn_bias_for_masking", torch.zeros(total, total).masked_fill(hidden, -math.inf)[None, None])

    def get_logits(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.head(self.head_nm(x.float(), condition).float()).float()

    @torch.no_grad()
    def autoregressive_infer_cfg(self, B: int, label_B: Any, g_seed: int | None = None, cfg: float = 1.5, top_k: int = 0) -> Tensor:
        rng = None if g_seed is None else self.rng.manual_seed(g_seed)
        labels = torch.as_tensor(label_B)
        condition = self.class_emb(torch.cat([labels, torch.full_like(labels, CLASSES)]))
        places = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        x = condition[:, None] + self.pos_start + places[:, :1]
        f, start = torch.zeros(B, CODE_WIDTH, SIDES[-1], SIDES[-1]), 0
        for block in self.blocks:
            block.attn.kv_caching(True)
        for scale, side in enumerate(SIDES):
            start += side * side
            vectors = self.shared_ada_lin(condition)
            for block in self.blocks:
                x = block(x=x, cond_BD=vectors, attn_bias=None)
            weight = cfg * scale / (len(SIDES) - 1)
            logits = self.get_logits(x, condition)
            logits = (1 + weight) * logits[:B] - weight * logits[B:]
            if top_k:
                logits = logits.masked_fill(logits < logits.topk(top_k, -1).values[..., -1:], -math.inf)
            codes = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, replacement=True, generator=rng).reshape(B, -1)
            f, inputs = self.vae_quant_proxy[0].step(scale, f, codes)
            if inputs is not None:
                x = (self.word_embed(inputs) + places[:, start : start + SIDES[scale + 1] ** 2]).repeat(2, 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return (self.vae_proxy[0].fhat_to_img(f) + 1) / 2

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        condition = self.class_emb(label_B)
        x = torch.cat([condition[:, None] + self.pos_start, self.word_embed(x_BLCv_wo_first_l)], 1) + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        vectors = self.shared_ada_lin(condition)
        for block in self.blocks:
            x = block(x=x, cond_BD=vectors, attn_bias=self.attn_bias_for_masking)
        return self.get_logits(x, condition)


def official_var(**options: Any) -> OfficialVAR:
    """Every parameter random, tokenizer included, and large enough that a mistake anywhere moves the logits by more than rounding does."""
    model = OfficialVAR(**options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for part in (model, model.vae_proxy[0]):
            for name, parameter in part.named_parameters():
                is_matrix = name.endswith("weight") and parameter.dim() > 1 and "emb" not in name
                std = parameter[0].numel() ** -0.5 if is_matrix else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
                if "norm" in name and name.endswith("weight"):
                    parameter.add_(1)
            part.eval()
        for block in model.blocks:
            if block.attn.attn_l2_norm:
                block.attn.scale_mul_1H11.add_(math.log(4))
                # above the limit of ln 100
                block.attn.scale_mul_1H11[0, 1] = 5.0
    return model
