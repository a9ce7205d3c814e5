"""The losses that the small VAR, its tokenizer and its judge are trained with. The loop is in `scripts/train_small_var.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accel.evals.models.small_var.architecture import Judge
from accel.models.cache import Schedule
from accel.models.var import VAR, VARTokenizer

COMMITMENT = 0.25
NULL_SHARE = 0.1                # labels replaced by "no class", for guidance


def judge_loss(judge: Judge, pixels: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy on pictures, half of them with noise, so that the judge does not depend on the exact edge of a stroke."""
    noise = torch.randn_like(pixels) * torch.rand(len(pixels), 1, 1, 1) * 0.1
    is_noisy = torch.rand(len(pixels), 1, 1, 1) < 0.5
    return F.cross_entropy(judge(torch.where(is_noisy, (pixels + noise).clamp(0, 1), pixels)), labels, label_smoothing=0.02)


class Coded(NamedTuple):
    """loss: to be minimised. error: mean squared error of the pixels in [0, 1]. ids: codes (b, T_K). rests: what the codes were chosen for."""

    loss: Tensor
    error: Tensor
    ids: Tensor
    rests: Tensor


def tokenizer_loss(tokenizer: VARTokenizer, pixels: Tensor, schedule: Schedule, *, is_quantised: bool) -> Coded:
    """Reconstruction, and codes and encoder drawn together after every scale; without codes at first (`is_quantised` False)."""
    target = pixels * 2 - 1
    f = tokenizer.quant_conv(tokenizer.encoder(target))
    ids, rests, drawn = [], [], torch.zeros(())
    total: Tensor | None = None
    rest = f.detach()
    for scale, size in enumerate(schedule.sizes):
        small = rest if scale == schedule.last else F.interpolate(rest, size, mode="area")
        rests.append(small.flatten(2).transpose(1, 2).flatten(0, 1))
        ids.append(tokenizer.quantizer.nearest(small))
        if is_quantised:
            added = tokenizer.quantizer.contribution(ids[-1], scale, schedule)
            total = added if total is None else total + added
            rest = f.detach() - total.detach()
            drawn = drawn + COMMITMENT * F.mse_loss(f, total.detach()) + F.mse_loss(total, f.detach())
    coded = f if total is None else f + (total - f).detach()
    made = tokenizer.decoder(tokenizer.post_quant_conv(coded))
    error = F.mse_loss(made, target)
    # the size of the map is held near 1 while there are no codes, or these would start far from it
    held = drawn / len(schedule) if is_quantised else 0.01 * (f.pow(2).mean() - 1).pow(2)
    return Coded(error + 0.1 * F.l1_loss(made, target) + held, error.detach() / 4, torch.cat(ids, 1), torch.cat(rests))


class CodeUse:
    """How often each code was chosen lately; codes that nothing chooses are moved to where something is."""

    def __init__(self, codes: int) -> None:
        self.share = torch.full((codes,), 1 / codes)

    def count(self, ids: Tensor) -> None:
        """Notes the codes of a batch."""
        found = torch.bincount(ids.flatten(), minlength=len(self.share)).float()
        self.share.lerp_(found / found.sum(), 0.02)

    @torch.no_grad()
    def move_unused(self, codebook: nn.Embedding, rests: Tensor) -> int:
        """Puts codes used less than a tenth of their fair share onto vectors among `rests` (n, width). Returns how many."""
        unused = (self.share < 0.1 / len(self.share)).nonzero().flatten()
        codebook.weight[unused] = rests[torch.randperm(len(rests))[: len(unused)]]
        self.share[unused] = 1 / len(self.share)
        return len(unused)


@torch.no_grad()
def place_codes(codebook: nn.Embedding, rests: Tensor, *, rounds: int = 10) -> None:
    """Puts the codes onto cluster centres of `rests` (n, width)."""
    centres = rests[torch.randperm(len(rests))[: codebook.num_embeddings]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(rests, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, rests)
        n = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(n > 0, sums / n.clamp_min(1), centres)
    codebook.weight.copy_(centres)


def transformer_loss(model: VAR, pixels: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the codes of all scales given the coarser ones; a tenth of the labels is hidden."""
    with torch.no_grad():
        codes = model.tokenizer.encode(pixels, model.schedule)
    is_hidden = torch.rand(len(labels)) < NULL_SHARE
    loss = model(labels.masked_fill(is_hidden, model.config.num_classes), codes).loss
    assert isinstance(loss, Tensor)
    return loss
