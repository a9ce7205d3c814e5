"""What is seen of a vision tower's attention, with towers that have the attribute names of vLLM's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.fastervlm import FasterVLM
from accel.patches.hosts.vllm.models.scores import VisionTower, clip_projection, qwen_projection, recorded, tower_maps, why_unseen
from accel.patches.vflowopt import VFlowOpt
from accel.protocols import ModelInfo

H, D = 2, 8
INFO = ModelInfo("llava", 4, 4, 4, 8, ("full_attention",) * 4, "cpu", "float32", has_vision=True, has_cls=True)


class Projected(nn.Linear):
    """vLLM's linear layers return their bias beside their output."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class ClipAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.tp_size = D, 1
        self.qkv_proj = Projected(H * D, 3 * H * D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class QwenAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads_per_partition, self.hidden_size_per_attention_head, self.tp_size = H, D, 1
        self.qkv = Projected(H * D, 3 * H * D)

    def apply_rotary_emb(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # (2, rows, H, d): halves rotated
        half = D // 2
        c, s = cos[None, :, None], sin[None, :, None]
        return torch.cat([x[..., :half] * c - x[..., half:] * s, x[..., half:] * c + x[..., :half] * s], -1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x


def same(t: Tensor) -> Tensor:
    return t


def softmax_rows(q: Tensor, k: Tensor) -> Tensor:
    """(rows, keys): mean over the heads of one segment. q, k: (rows, H, d)."""
    return torch.einsum("ihd,jhd->hij", q, k).div(D**0.5).softmax(-1).mean(0)


def clip_tower(n_layers: int = 3, scoring: int = 1) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower([ClipAttention() for _ in range(n_layers)], scoring, clip_projection(same), prefix=1)


def run(tower: VisionTower, hidden: Tensor, **kwargs: Any) -> None:
    for attention in tower.attentions:
        attention(hidden_states=hidden, **kwargs)


def test_the_cls_row_is_that_of_the_scoring_layer() -> None:
    tower, hidden = clip_tower(), torch.randn(2, 1 + 9, H * D)
    with recorded(tower, FasterVLM().bind(INFO), [9, 9]) as maps:
        run(tower, hidden)
    layer: Any = tower.attentions[1]
    q, k, _ = layer.qkv_proj(hidden)[0].unflatten(-1, (3, H, D)).unbind(2)
    assert list(maps) == ["cls_row"]
    for tile in range(2):
        torch.testing.assert_close(maps["cls_row"][tile], softmax_rows(q[tile], k[tile])[0, 1:])


def test_another_layer_may_score_and_other_passes_are_not_watched() -> None:
    tower, hidden = clip_tower(), torch.randn(1, 1 + 4, H * D)
    with recorded(tower, FasterVLM(scoring_layer=0).bind(INFO), [4]) as first:
        run(tower, hidden)
    with recorded(tower, FasterVLM().bind(INFO), [4]) as second:
        run(tower, hidden)
    before = first["cls_row"][0].clone()
    run(tower, torch.randn(1, 1 + 4, H * D))
    assert not torch.allclose(first["cls_row"][0], second["cls_row"][0])
    assert torch.equal(first["cls_row"][0], before)
    assert not any(attention._forward_pre_hooks for attention in tower.attentions)


def test_hooks_go_when_the_tower_fails() -> None:
    tower = clip_tower()
    with pytest.raises(RuntimeError, match="broken"), recorded(tower, FasterVLM().bind(INFO), [4]):
        raise RuntimeError("broken")
    assert not any(attention._forward_pre_hooks for attention in tower.attentions)


def test_heads_of_all_ranks_count() -> None:
    tower, hidden = clip_tower(1, 0), torch.randn(1, 1 + 4, H * D)
    layer: Any = tower.attentions[0]
    layer.tp_size = 2
    other = torch.randn(1, H, 5, D)
    both = VisionTower(tower.attentions, 0, clip_projection(lambda t: torch.cat([t, other], 1)), prefix=1)
    with recorded(both, FasterVLM().bind(INFO), [4]) as maps:
        run(both, hidden)
    q, k, _ = layer.qkv_proj(hidden)[0].unflatten(-1, (3, H, D)).unbind(2)
    q, k = (torch.cat([t[0], other[0].transpose(0, 1)], 1) for t in (q, k))
    torch.testing.assert_close(maps["cls_row"][0], softmax_rows(q, k)[0, 1:])


@pytest.mark.parametrize("method", [FasterVLM(score="received"), VFlowOpt(hub_factor=1.2)], ids=["received", "hubs"])
def test_packed_pictures_do_not_see_each_other(method: Any) -> None:
    attention = QwenAttention()
    tower = VisionTower([attention], 0, qwen_projection(same), whole_layers=frozenset({0}), is_packed=True)
    sizes = [6, 10]
    hidden = torch.randn(sum(sizes), 1, H * D)
    angle = torch.rand(sum(sizes), D // 2)
    with recorded(tower, method.bind(INFO), sizes) as maps:
        attention(hidden, rotary_pos_emb_cos=angle.cos(), rotary_pos_emb_sin=angle.sin())
    qk = attention.qkv(hidden)[0][:, 0].unflatten(-1, (3, H, D))[:, :2].transpose(0, 1)
    q, k = attention.apply_rotary_emb(qk, angle.cos(), angle.sin())
    [what] = maps
    for rows, own_q, own_k in zip(maps[what], q.split(sizes), k.split(sizes), strict=True):
        whole = softmax_rows(own_q, own_k)
        received = whole.mean(0)
        expected = received if what == "mean_received" else whole[method.select_rows(received[None])[0]].mean(0)
        torch.testing.assert_close(rows, expected)


def test_pictures_of_another_size_than_the_tower_reads_are_refused() -> None:
    tower = VisionTower([QwenAttention()], 0, qwen_projection(same), is_packed=True)
    q = torch.randn(1, H, 16, D)
    with pytest.raises(UnsupportedError, match="16 patches"):
        tower_maps(tower, FasterVLM(), FasterVLM(score="received").observe(), q, q, [6, 9])


@pytest.mark.parametrize(
    ("tower", "method", "reason"),
    [
        (clip_tower(), FasterVLM(scoring_layer=3), "layer 3"),
        (VisionTower([ClipAttention()], 0, clip_projection(same)), FasterVLM(score="cls"), "[CLS]"),
        (VisionTower([QwenAttention()] * 3, 2, qwen_projection(same), whole_layers=frozenset({1, 2})), FasterVLM(scoring_layer=0), "windows"),
    ],
    ids=["not built", "no cls", "windows"],
)  # fmt: skip
def test_what_cannot_be_seen_is_told(tower: VisionTower, method: Any, reason: str) -> None:
    assert reason in " ".join(why_unseen(tower, method))


def test_what_can_be_seen_has_no_reason() -> None:
    assert not list(why_unseen(clip_tower(), FasterVLM().bind(INFO)))
    # pixels are no matter of the tower
    assert not list(why_unseen(SimpleNamespace(), SimpleNamespace(observe=lambda: [SimpleNamespace(what="pixel_map")])))    # type: ignore[arg-type]
