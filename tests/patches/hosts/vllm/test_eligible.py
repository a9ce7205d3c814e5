"""What an engine is told of its attention layers: whose they are, and whether chunks change what is planned. vLLM's configuration is a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import accel
from accel.patches.hosts.vllm import compat
from accel.patches.hosts.vllm.attention.eligible import follows_chunks, is_draft, layer_index, note_chunks, note_foreign_layers
from accel.patches.hosts.vllm.attention.rows import LayerRule
from accel.patches.hosts.vllm.engine import Engine
from accel.patches.hosts.vllm.host import plain_vlm
from accel.protocols import SparseAttention

LONGEST = 4096
STREAMING = accel.Streaming(min_seq_len=0)


def rule(method: SparseAttention) -> LayerRule:
    return LayerRule(
        method, 0, 32, n_heads=32, n_kv_heads=8, head_dim=128, device="cpu", dtype="float32", max_positions=None, reason=None,
    )  # fmt: skip


METHODS = [
    (STREAMING, False), (accel.Streaming(density=0.3, min_seq_len=0), True), (accel.FlexPrefill(min_seq_len=0), True),
    (accel.PowerAttention(is_adapted=True, min_seq_len=0), False),
]  # fmt: skip


@pytest.mark.parametrize(("method", "is_told"), METHODS, ids=["window", "density", "from_keys", "powers"])
def test_users_are_told_where_chunks_change_what_is_planned(method: SparseAttention, *, is_told: bool) -> None:
    assert follows_chunks(rule(method), LONGEST) == is_told
    for is_cut in (True, False):
        engine = Engine(plain_vlm(), (method,))
        scheduler = SimpleNamespace(enable_chunked_prefill=is_cut, max_num_batched_tokens=2048)
        note_chunks(engine, rule(method), SimpleNamespace(model_config=SimpleNamespace(max_model_len=LONGEST), scheduler_config=scheduler))
        assert len(engine.notices) == (is_told and is_cut)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.7.self_attn.attn", 7), ("language_model.model.layers.0.self_attn.attn", 0), ("mtp.layers.0.self_attn.attn", -1),
        ("model.mtp.layers.1.self_attn.attn", -1), ("draft_model.model.layers.0.self_attn.attn", -1), ("visual.attn", -1),
    ],
)  # fmt: skip
def test_drafts_have_none_of_the_model_s_layers(name: str, index: int) -> None:
    assert layer_index(name) == index
    assert is_draft(name) == ("mtp" in name or "draft" in name)


def test_draft_heads_do_not_stand_for_the_first_layers_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    attention: Any = SimpleNamespace(get_attn_backend=lambda: SimpleNamespace(get_name=lambda: "FLASHINFER"))
    layers = {"mtp.layers.0.self_attn.attn": attention, "model.layers.0.self_attn.attn": attention}
    monkeypatch.setitem(vars(compat), "AttentionLayerBase", object)
    monkeypatch.setitem(vars(compat), "get_layers_from_vllm_config", lambda config, kind: layers)
    engine = Engine(plain_vlm(), (STREAMING,))
    note_foreign_layers(None, engine)
    assert engine.skipped.keys() == {-1, 0}
    assert engine.problems()
