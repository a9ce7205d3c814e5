"""Attention maps of a vision tower of vLLM, which gives none away: queries and keys are projected once more in front of the layer that scores.

Nothing is attached to the tower but while a picture is encoded of which tokens will leave. No vLLM here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.hosts.transformers.pruning.observe import encoder_maps
from accel.protocols import Observation, TokenPruning

Maps = dict[str, list[Tensor]]      # by `Observation.what`, (patches,) fp32 of each segment
# (attention module, what its forward was given) -> q, k (segments or 1, H, rows, d)
Projection = Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VisionTower:
    """A vision encoder of vLLM. attentions: of the layers that were built. scoring_layer: the one whose output is the feature.

    prefix: rows in front of the patches, 1 for [CLS]. project: queries and keys of one call, all heads, behind rotary embeddings.
    whole_layers: those that see a whole segment; None for all. is_packed: segments lie behind each other in one row of the batch.
    """

    attentions: Sequence[nn.Module]
    scoring_layer: int
    project: Projection
    prefix: int = 0
    whole_layers: frozenset[int] | None = None
    is_packed: bool = False

    def layer(self, observation: Observation) -> int:
        """The layer that an observation is of."""
        return self.scoring_layer if observation.layer is None else observation.layer


def why_unseen(tower: VisionTower, method: TokenPruning) -> Iterable[str]:
    """Why what a method looks at cannot be seen in this tower."""
    for o in method.observe():
        if o.what == "pixel_map":
            continue
        layer = tower.layer(o)
        if o.what == "cls_row" and not tower.prefix:
            yield "it looks at the attention of [CLS], which this vision tower has not"
        if not 0 <= layer < len(tower.attentions):
            yield f"it scores by layer {layer} of the vision tower, of which vLLM builds {len(tower.attentions)}, up to the feature's"
        elif tower.whole_layers is not None and layer not in tower.whole_layers:
            whole = ", ".join(map(str, sorted(tower.whole_layers)))
            yield f"it scores by layer {layer} of the vision tower, which attends within windows; layers {whole} see whole pictures"


@contextmanager
def recorded(tower: VisionTower, method: TokenPruning, segments: Sequence[int]) -> Iterator[Maps]:
    """Fills the mapping with what `method` observes of the next call of the tower. segments: patches of each stretch that attends to itself only."""
    found: Maps = {}
    by_layer: dict[int, list[Observation]] = {}
    for o in method.observe():
        if o.what != "pixel_map":
            by_layer.setdefault(tower.layer(o), []).append(o)

    def hook(wanted: list[Observation]) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            q, k = tower.project(module, {**kwargs, **({"hidden_states": args[0]} if args else {})})
            maps = tower_maps(tower, method, wanted, q, k, segments)
            found.update({o.what: rows for o, rows in zip(wanted, maps, strict=True)})

        return see

    hooks = [tower.attentions[layer].register_forward_pre_hook(hook(wanted), with_kwargs=True) for layer, wanted in by_layer.items()]
    try:
        yield found
    finally:
        for registered in hooks:
            registered.remove()


@torch.no_grad()
def tower_maps(
    tower: VisionTower, method: TokenPruning, wanted: Sequence[Observation], q: Tensor, k: Tensor, segments: Sequence[int]
) -> list[list[Tensor]]:
    """For each observation the maps of all segments. q, k: (segments, H, prefix + P, d), or (1, H, patches of all, d) where they are packed."""
    pairs = [(q, k)]
    if tower.is_packed:
        if sum(segments) != q.shape[2]:
            raise UnsupportedError(f"the vision tower reads {q.shape[2]} patches at once, its pictures have {sum(segments)}")
        pairs = list(zip(torch.split(q, list(segments), 2), torch.split(k, list(segments), 2), strict=True))
    scale = q.shape[-1] ** -0.5
    parts = [encoder_maps(a, b, None, scale, prefix=tower.prefix, wanted=[(method, o) for o in wanted]) for a, b in pairs]
    return [[row for part in parts for row in part[i]] for i in range(len(wanted))]


# --- projections -----------------------------------------------------------------------------------------------------------------


def clip_projection(gather: Callable[[Tensor], Tensor]) -> Projection:
    """Of CLIP's and SigLIP's attention in vLLM. gather: joins the heads (dimension 1) of all ranks."""

    def project(attention: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, _ = attention.qkv_proj(call["hidden_states"])[0].chunk(3, dim=-1)
        # (tiles, rows, H · d) -> (tiles, H, rows, d)
        q, k = (t.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for t in (q, k))
        return (q, k) if attention.tp_size == 1 else (gather(q.contiguous()), gather(k.contiguous()))

    return project


def qwen_projection(gather: Callable[[Tensor], Tensor]) -> Projection:
    """Of the attention of Qwen's vision towers in vLLM: rows (patches, 1, D), tables of rotary embeddings beside them."""

    def project(attention: Any, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        heads, d = attention.num_attention_heads_per_partition, attention.hidden_size_per_attention_head
        # (patches, 1, 3 · H · d) -> (q or k, patches, H, d)
        qk = attention.qkv(call["hidden_states"])[0][:, 0].unflatten(-1, (3, heads, d))[:, :2].transpose(0, 1).contiguous()
        q, k = attention.apply_rotary_emb(qk, call["rotary_pos_emb_cos"], call["rotary_pos_emb_sin"]).transpose(1, 2)[:, None]
        return (q, k) if attention.tp_size == 1 else (gather(q.contiguous()), gather(k.contiguous()))

    return project
