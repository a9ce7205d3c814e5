"""Losses, batches and the optimiser of scripts/train_small_vlm.py. Nothing here is needed to use the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from accel.evals.models.small_vlm.architecture import PIXEL_MEAN, PIXEL_STD, SPECIAL, WIDTH
from accel.evals.scenes.draw import COLORS, GRID, SHAPES, Scene, scene
from accel.evals.scenes.questions import Question, question, vocabulary

N_PATCHES = GRID * GRID
SLOT = 10                       # tokens of the longest question with its answer, without the end
IGNORED = -100
EARLY = ("exist", "exist", "color", "color", "shape", "shape", "count", "word")
LATE = ("exist", "color", "shape", "count", "count", "relation", "relation", "word")
WORD_LAYER, ANSWER_LAYER, N_LOOKING = 2, 4, 2   # text layers, and heads of each, whose attention is taught
_COLORS, _IDS = list(COLORS), {word: i for i, word in enumerate([*SPECIAL, *vocabulary()])}
N_CLASSES = 1 + len(SHAPES) + 10


class TowerHeads(nn.Module):
    """Linear readers of the tower, used in training alone: what every patch shows and where it lies, and what [CLS] knows of the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_norm = nn.LayerNorm(WIDTH)
        self.kind = nn.Linear(WIDTH, N_CLASSES)
        self.color = nn.Linear(WIDTH, 1 + len(COLORS))
        self.row, self.column = nn.Linear(WIDTH, GRID), nn.Linear(WIDTH, GRID)
        n_facts = len(COLORS) * len(SHAPES) + 30
        self.facts = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, n_facts)) for _ in range(2))


@dataclass
class Pictures:
    """pixels (B, 3, SIZE, SIZE); kind, color (B, patches) class numbers; facts (B, facts) 0 or 1: colour-shape pairs, digits by place."""

    pixels: Tensor
    kind: Tensor
    color: Tensor
    facts: Tensor


@dataclass
class Slots:
    """Questions as rows of tokens.

    ids, targets: (B, S, SLOT), targets IGNORED where nothing is answered. is_answer, has_look: (B, S, SLOT) bool, where an answer token is to be told
    and where attention is taught. looks: (B, N_LOOKING, S, SLOT, patches) bool, to what, by head.
    evidence: (B, S, patches) bool. families: by picture and slot.
    """

    ids: Tensor
    targets: Tensor
    looks: Tensor
    has_look: Tensor
    is_answer: Tensor
    evidence: Tensor
    families: list[list[str]]


def pixels_of(scenes: Sequence[Scene]) -> Tensor:
    """(B, 3, SIZE, SIZE) as the processor would make them."""
    images = torch.from_numpy(np.stack([s.image for s in scenes]))
    return ((images.float() / 255 - PIXEL_MEAN) / PIXEL_STD).permute(0, 3, 1, 2).contiguous()


def pictures(scenes: Sequence[Scene]) -> Pictures:
    """Pixels and the labels that the tower is taught."""
    kind, color = (torch.zeros(len(scenes), N_PATCHES, dtype=torch.long) for _ in range(2))
    facts = torch.zeros(len(scenes), len(COLORS) * len(SHAPES) + 30)
    for i, one in enumerate(scenes):
        for thing in one.things:
            shape, hue = SHAPES.index(thing.shape), _COLORS.index(thing.color)
            kind[i, thing.cell], color[i, thing.cell] = 1 + shape, 1 + hue
            facts[i, hue * len(SHAPES) + shape] = 1
        for place, (cell, digit) in enumerate(zip(one.sign_cells, one.digits, strict=True)):
            kind[i, cell] = 1 + len(SHAPES) + digit
            facts[i, len(COLORS) * len(SHAPES) + place * 10 + digit] = 1
    return Pictures(pixels_of(scenes), kind, color, facts)


def draw_batch(split: str, numbers: Iterable[int], families: Sequence[str], seed: int) -> tuple[list[Scene], list[list[Question]]]:
    """Scenes and one question per family and scene; where a scene has none of a family, one of existence stands in."""
    scenes = [scene(split, i, seed=seed) for i in numbers]
    asked = []
    for i, one in zip(numbers, scenes, strict=True):
        rng = np.random.default_rng([seed, i, 5])
        asked.append([question(f, one, rng) or question("exist", one, rng) for f in families])
    return scenes, asked      # type: ignore[return-value]


def slots(asked: Sequence[Sequence[Question]]) -> Slots:
    """Questions as token rows: question, answer, padding."""
    b, s = len(asked), len(asked[0])
    ids = np.zeros((b, s, SLOT), np.int64)
    targets = np.full((b, s, SLOT), IGNORED, np.int64)
    looks = np.zeros((b, N_LOOKING, s, SLOT, N_PATCHES), bool)
    has_look, is_answer = np.zeros((b, s, SLOT), bool), np.zeros((b, s, SLOT), bool)
    evidence = np.zeros((b, s, N_PATCHES), bool)
    for i, row in enumerate(asked):
        for j, one in enumerate(row):
            words = [*one.text.split(), *one.answer.split()]
            n_question, n = len(one.text.split()), len(words)
            numbers = [_IDS[w] for w in words]
            ids[i, j, :n] = numbers
            targets[i, j, n_question - 1 : n] = [*numbers[n_question:], SPECIAL.index("<eos>")]
            is_answer[i, j, n_question - 1 : n] = True
            evidence[i, j, list(one.evidence)] = True
            for at, groups in one.looks:
                has_look[i, j, at] = True
                for head in range(N_LOOKING):
                    looks[i, head, j, at, list(groups[min(head, len(groups) - 1)])] = True
    return Slots(
        ids=torch.from_numpy(ids), targets=torch.from_numpy(targets), looks=torch.from_numpy(looks), has_look=torch.from_numpy(has_look),
        is_answer=torch.from_numpy(is_answer), evidence=torch.from_numpy(evidence), families=[[one.family for one in row] for row in asked],
    )  # fmt: skip


def tower_loss(tower: Any, heads: TowerHeads, batch: Pictures) -> tuple[Tensor, dict[str, float]]:
    """Loss of patches and [CLS] at the layer whose output the text model reads, and of [CLS] at the last one."""
    out = tower(pixel_values=batch.pixels, output_hidden_states=True, output_attentions=True)
    read, last = out.hidden_states[-2].float(), out.hidden_states[-1].float()
    patches = heads.patch_norm(read[:, 1:])
    weight = torch.where(batch.kind > 0, 1.0, 0.1)
    scale = weight.sum()
    kind = (functional.cross_entropy(heads.kind(patches).transpose(1, 2), batch.kind, reduction="none") * weight).sum() / scale
    color = (functional.cross_entropy(heads.color(patches).transpose(1, 2), batch.color, reduction="none") * weight).sum() / scale
    cells = torch.arange(N_PATCHES).expand(len(patches), -1)
    place = sum(
        (functional.cross_entropy(head(patches).transpose(1, 2), where, reduction="none") * weight).sum() / scale
        for head, where in ((heads.row, cells // GRID), (heads.column, cells % GRID))
    )
    facts = sum(functional.binary_cross_entropy_with_logits(head(x[:, 0]), batch.facts) for head, x in zip(heads.facts, (read, last), strict=True))
    loss = kind + color + 0.3 * place + 8 * facts
    with torch.no_grad():
        is_content = batch.kind > 0
        right = (heads.kind(patches).argmax(-1) == batch.kind) & (heads.color(patches).argmax(-1) == batch.color)
        attention = out.attentions[-2][:, :, 0, 1:].float().mean(1)
        top = attention.topk(int(N_PATCHES * 0.1), -1).indices
        seen = torch.zeros_like(is_content).scatter(1, top, True)
        shares = {
            "kind": kind, "color": color, "place": place, "facts": facts, "patch_right": right[is_content].float().mean(),
            "background_right": right[~is_content].float().mean(),
            "cls_on_content": (attention * is_content).sum(-1).mean() / attention.sum(-1).mean(),
            "content_in_top_10%": seen[is_content].float().mean(),
        }  # fmt: skip
    return loss, {name: float(value.detach()) for name, value in shares.items()}


def choose_patches(kind: Tensor, share: float, *, content_first: bool, generator: torch.Generator) -> Tensor:
    """(B, k) patches that stay, in order: at random, or with all patches that show something first."""
    score = torch.rand(kind.shape, generator=generator)
    if content_first:
        score += (kind > 0).float()
    return score.topk(max(1, round(share * N_PATCHES)), -1).indices.sort(-1).values


def answer_logits(model: Any, features: Tensor, kept: Tensor, asked: Slots, *, is_compact: bool, with_attention: bool) -> tuple[Tensor, Any]:
    """Logits (B, S, SLOT, vocabulary) and the text model's attention maps.

    features: (B, patches, width) from the tower. kept: (B, k). All questions of a picture share its tokens: each stands in a slot of its own behind
    them, sees them and itself, and has the positions of a single question.
    """
    b, s = asked.ids.shape[:2]
    k = kept.shape[1]
    visual = model.model.multi_modal_projector(features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1])))
    embed = model.get_input_embeddings()
    begin = embed(torch.full((b, 1), SPECIAL.index("<bos>")))
    inputs = torch.cat([begin.to(visual.dtype), visual, embed(asked.ids.view(b, -1)).to(visual.dtype)], 1)
    at = torch.arange(1, k + 1).expand(b, -1) if is_compact else kept + 1
    behind = (k if is_compact else N_PATCHES) + 1 + torch.arange(SLOT).repeat(s)
    positions = torch.cat([torch.zeros(b, 1, dtype=torch.long), at, behind.expand(b, -1)], 1)
    out = model.model.language_model(
        inputs_embeds=inputs, attention_mask=_slot_mask(k + 1, s).to(inputs.dtype), position_ids=positions, use_cache=False,
        output_attentions=with_attention,
    )  # fmt: skip
    logits = model.lm_head(out.last_hidden_state[:, k + 1 :])
    return logits.view(b, s, SLOT, -1).float(), out.attentions


def _slot_mask(n_shared: int, n_slots: int) -> Tensor:
    """(1, 1, T, T) additive: causal, and no slot sees another."""
    slot = torch.cat([torch.full((n_shared,), -1), torch.arange(n_slots).repeat_interleave(SLOT)])
    n = len(slot)
    is_seen = torch.ones(n, n).tril().bool() & ((slot[None] == -1) | (slot[None] == slot[:, None]))
    return torch.where(is_seen, 0.0, -1e9)[None, None]


def answer_loss(model: Any, features: Tensor, kept: Tensor, asked: Slots, *, is_compact: bool, look_weight: float) -> tuple[Tensor, float, float]:
    """Loss, and the answers' and the looks' part of it. Questions that lost evidence are left out: their answers cannot be known."""
    is_kept = torch.zeros(kept.shape[0], N_PATCHES, dtype=torch.bool).scatter(1, kept, True)
    is_fair = (~asked.evidence | is_kept[:, None]).all(-1)                  # (B, S)
    logits, attentions = answer_logits(model, features, kept, asked, is_compact=is_compact, with_attention=look_weight > 0)
    targets = asked.targets.masked_fill(~is_fair[..., None], IGNORED)
    # not reduction="mean": where every question lost its evidence that would be 0 / 0
    total = functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    answers = total / (targets != IGNORED).sum().clamp_min(1)
    if look_weight == 0:
        return answers, float(answers.detach()), 0.0
    looking = _look_loss(attentions, kept, asked, is_fair)
    return answers + look_weight * looking, float(answers.detach()), float(looking.detach())


def _look_loss(attentions: Any, kept: Tensor, asked: Slots, is_fair: Tensor) -> Tensor:
    """Cross-entropy between some heads' attention and an even spread over what the question is about and the first token.

    The first token stands for "nothing more": a half, a third or a quarter of the attention on it tells how many things fit, all of it none.
    """
    b, s = asked.ids.shape[:2]
    k = kept.shape[1]
    looks = asked.looks.gather(4, kept[:, None, None, None].expand(-1, N_LOOKING, s, SLOT, -1)).float()
    target = torch.cat([torch.ones(b, N_LOOKING, s, SLOT, 1), looks], -1)
    target = target / target.sum(-1, keepdim=True)
    loss = torch.zeros(())
    for layer, rows in ((WORD_LAYER, ~asked.is_answer), (ANSWER_LAYER, asked.is_answer)):
        weight = (asked.has_look & rows & is_fair[..., None]).float()
        maps = attentions[layer][:, :N_LOOKING, k + 1 :, : k + 1].float().view(b, N_LOOKING, s, SLOT, k + 1)
        per_row = -(target * (maps + 1e-6).log()).sum(-1).mean(1)
        loss = loss + (per_row * weight).sum() / weight.sum().clamp_min(1)
    return loss


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are applied; matrices of one shape go together, as one batch."""

    def __init__(self, weights: Iterable[Tensor], lr: float, *, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(list(weights), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:       # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    shapes.setdefault(weight.shape, []).append(weight)
            for shape, weights in shapes.items():
                self._step_together(weights, group, max(1.0, shape[0] / shape[1]) ** 0.5)

    def _step_together(self, weights: list[Tensor], group: dict[str, Any], scale: float) -> None:
        grads = []
        for weight in weights:
            memory = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            assert weight.grad is not None
            memory.lerp_(weight.grad, 1 - group["momentum"])
            grads.append(weight.grad.lerp(memory, group["momentum"]))
        for weight, update in zip(weights, orthogonal(torch.stack(grads)), strict=True):
            weight.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, a, b) with their singular values brought near 1 by five Newton–Schulz steps."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if is_tall else x
