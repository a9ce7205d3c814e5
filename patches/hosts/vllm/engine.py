"""What one engine of this process runs: its methods, bound to its model, and their counters. One entry per engine, made when first asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accel.patches.hosts.decoder_config import decoder_sizes
from accel.patches.hosts.vllm.options import read_options
from accel.protocols import Method, ModelInfo, SparseAttention, TokenPruning
from accel.stats import Stats


@dataclass
class Engine:
    """methods: bound, in the order of the recipe. patched, skipped: attention layers by index, the latter with the reason.

    pruned: names of the pruning methods that the model which was built runs. steps: by reason, forward passes that passed a method by.
    notices: what users must know of the methods in this engine, beyond what each says of the model.
    exit_rows: rows of all passes that came to the layer in front of which visual tokens leave ("before"), and that went on ("behind").
    is_warm: whether vLLM has warmed up, and the counters are those of requests.
    """

    info: ModelInfo
    methods: tuple[Method, ...]
    stats: Stats = field(default_factory=Stats)
    patched: set[int] = field(default_factory=set)
    skipped: dict[int, str] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)
    pruned: set[str] = field(default_factory=set)
    steps: Counter[str] = field(default_factory=Counter)
    notices: set[str] = field(default_factory=set)
    exit_rows: Counter[str] = field(default_factory=Counter)
    is_warm: bool = False

    @property
    def attention(self) -> SparseAttention | None:
        """The sparse method, or None."""
        return next((m for m in self.methods if isinstance(m, SparseAttention)), None)

    @property
    def pruning(self) -> tuple[TokenPruning, ...]:
        """The pruning methods, in their order."""
        return tuple(m for m in self.methods if isinstance(m, TokenPruning))

    def forget_warm_up(self) -> None:
        """Sets the counters back, once."""
        if not self.is_warm:
            self.is_warm = True
            self.stats.reset()
            self.steps.clear()
            self.exit_rows.clear()

    def problems(self) -> list[str]:
        """Why this worker does not run what was asked for; empty where it does."""
        found = []
        if self.attention is not None and not self.patched:
            seen = "; ".join(f"layer {i}: {reason}" for i, reason in sorted(self.skipped.items())) or "no layer came by"
            found.append(f"{self.attention.method_name()} runs in no attention layer ({seen})")
        # those whose options keep everything have no place in it
        acting = [m.method_name() for m in self.pruning if m.stages(self.info)]
        found += [f"{name} is not in the model that was built" for name in acting if name not in self.pruned]
        return found

    def report(self) -> dict[str, Any]:
        """Plain values for other processes."""
        return {
            "methods": [m.method_name() for m in self.methods],
            "problems": self.problems(),
            "patched_layers": sorted(self.patched),
            "skipped_layers": dict(sorted(self.skipped.items())),
            "backends": sorted(self.backends),
            "notices": [*(notice for m in self.methods if (notice := m.notice(self.info))), *sorted(self.notices)],
            "left_alone": dict(self.steps),
            "exit_rows": dict(self.exit_rows),
            "tokens": {
                "prompts": self.stats.tokens.prompts, "visual": self.stats.tokens.patches, "kept": self.stats.tokens.kept_patches,
                "kept_by_layer": self.stats.tokens.layer_tokens, "whole_by_layer": self.stats.tokens.all_layer_tokens,
            },
            "active_tiles": self.stats.total.active_tiles, "causal_tiles": self.stats.total.causal_tiles,
            "layers": {
                i: {
                    "sparse_calls": s.sparse_calls, "dense_calls": dict(s.dense_calls), "active_tiles": s.active_tiles,
                    "causal_tiles": s.causal_tiles,
                }
                for i, s in sorted(self.stats.layers.items())
            },
            **self.stats.as_dict(),
        }  # fmt: skip


_ENGINES: dict[str, Engine] = {}


def engine_of(vllm_config: Any) -> Engine | None:
    """The engine of a `VllmConfig`, or None where nobody asked for us.

    The configuration of the whole engine is meant: copies that vLLM makes for a part of the model have a number of their own, and so another engine,
    which nobody reports.
    """
    additional = vllm_config.additional_config
    asked = read_options(additional) if isinstance(additional, Mapping) else ()
    if not asked:
        return None
    key = str(vllm_config.instance_id)
    if key not in _ENGINES:
        info = describe(vllm_config.model_config)
        _ENGINES[key] = Engine(info, tuple(m.bind(info) for m in asked))
    return _ENGINES[key]


def describe(model_config: Any) -> ModelInfo:
    """A vLLM `ModelConfig` as methods see it."""
    from accel.patches.hosts.vllm.compat import current_platform

    return ModelInfo(
        **decoder_sizes(model_config.hf_config), device="cpu" if current_platform.is_cpu() else "cuda",
        dtype=str(model_config.dtype).removeprefix("torch."), has_cls=has_cls(model_config.hf_config),
    )  # fmt: skip


def has_cls(config: Any) -> bool:
    """Whether the vision tower has a [CLS] token."""
    return getattr(getattr(config, "vision_config", None), "model_type", None) == "clip_vision_model"
