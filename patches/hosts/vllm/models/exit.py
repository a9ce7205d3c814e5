"""Visual tokens that leave a decoder of vLLM in front of a layer known beforehand, all of them (vllm-integration.md §7).

Hooks on the decoder's layers: in front of the exit layer the rows of visual tokens are taken out, and the attention of all layers from there on
is told of shorter sequences; in front of the last norm the rows are put back into their places, for vLLM finds the newest of each request by
its place in the step. Layers behind the exit compute and read less; they occupy as many blocks as before, for vLLM counts tokens once for all layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.patches.hosts.vllm.engine import Engine, describe, engine_of
from accel.patches.hosts.vllm.models.compaction import Departed, ShortStep, Step, check_slots, shortened
from accel.patches.hosts.vllm.models.exit_checks import exit_layer, resolved_options, why_not
from accel.patches.hosts.vllm.options import read_options

# by the name of an attention backend: its metadata is a dataclass that can be told of a shorter sequence
BACKENDS = ("CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN")


class ExitMixin:
    """In front of a vision-language model of vLLM: visual tokens leave where a method of the recipe says so; the stock model elsewhere.

    The model must have its decoder at `language_model.model`. UnsupportedError where an engine asks for an exit that it cannot have.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)    # type: ignore[call-arg]
        engine = engine_of(vllm_config) or _recipe_of_the_model(vllm_config.model_config)
        layer = exit_layer(engine.methods, engine.info)
        self._accel_exit = None
        if layer is not None:
            self._accel_exit = Exit(self.language_model.model, layer, engine, vllm_config)      # type: ignore[attr-defined]

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None) -> Tensor:
        """As the stock model; vLLM tells here which rows of a step are visual, and nowhere else."""
        if self._accel_exit is not None:
            # without a mask where no picture may come
            self._accel_exit.is_visual = is_multimodal
        found: Tensor = super().embed_input_ids(    # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal,
        )  # fmt: skip
        return found


def _recipe_of_the_model(model_config: Any) -> Engine:
    """The engine of a recipe that was given in `hf_overrides` alone; nobody reads its counters."""
    info = describe(model_config)
    return Engine(info, tuple(m.bind(info) for m in read_options(model_config.hf_config)))


@dataclasses.dataclass
class _Running:
    """A pass whose visual tokens have left. rows: those that are left, None for all; n_rows: of the pass; positions: of what is left."""

    rows: Tensor | None
    n_rows: int
    positions: Tensor


class Exit:
    """The hooks of one decoder. layer: the first that no visual token reaches.

    is_visual: (n,) bool on the CPU, which rows of the coming pass are visual; taken by the pass. None: nobody has embedded it.
    """

    is_visual: Tensor | None = None

    def __init__(self, decoder: nn.Module, layer: int, engine: Engine, vllm_config: Any) -> None:
        layers: Any = decoder.layers
        reasons = why_not(engine.methods, engine.info, resolved_options(vllm_config)) or why_unfit(decoder)
        if reasons:
            raise UnsupportedError(f"visual tokens cannot leave in front of layer {layer} of this engine", reasons)
        self._layer, self._engine = layer, engine
        # pictures that lose tokens in front of the model are counted there, once each
        self._counts_tokens = all(stage.layer is not None for m in engine.pruning for stage in m.stages(engine.info))
        self._attentions = {a.layer_name: a for a in (deep.self_attn.attn for deep in layers[layer:])}
        self._dtype = vllm_config.model_config.dtype
        self._running: _Running | None = None
        self._departed: Departed | None = None
        layers[layer].register_forward_pre_hook(self._leave)
        for deep in layers[layer + 1 :]:
            deep.register_forward_pre_hook(self._stay_away)
        decoder.norm.register_forward_pre_hook(self._return)    # type: ignore[union-attr]
        names = {m.method_name() for m in engine.pruning if exit_layer([m], engine.info) is not None}
        engine.pruned |= names
        engine.notices |= {f"{name}: layers behind the exit compute and read less; their share of the cache is not freed" for name in names}

    # --- hooks ------------------------------------------------------------------------------------------------------------------

    def _leave(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of the exit layer: takes visual rows out, and shortens the sequences of the layers from here on."""
        from accel.patches.hosts.vllm.compat import get_forward_context

        context = get_forward_context()
        is_visual, self.is_visual, self._running = self.is_visual, None, None
        # vLLM measures itself on passes without requests, or on made-up ones that nobody embedded; from others nothing would leave
        if context.attn_metadata is not None and is_visual is None:
            self._engine.steps["nobody embedded their rows, as where vLLM measures itself"] += 1
        if context.attn_metadata is None or is_visual is None:
            return None
        positions, hidden, residual, *rest = args
        short = self._shortened(context, is_visual)
        self._tell(context, short)
        self._count(is_visual, short)
        rows = short.rows
        if rows is None and len(hidden) > len(is_visual):
            # rows beyond the step fill it up to a size that vLLM likes
            rows = torch.arange(len(is_visual), device=hidden.device)
        if rows is not None:
            positions, hidden, residual = positions[..., rows], hidden[rows], None if residual is None else residual[rows]
        self._running = _Running(rows, len(args[1]), positions)
        return positions, hidden, residual, *rest

    def _stay_away(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of every later layer, which is handed the positions of the whole pass."""
        return None if self._running is None else (self._running.positions, *args[1:])

    def _return(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In front of the last norm: puts rows back into their places. Those that left hold NaN: nothing can be read from them."""
        running, self._running = self._running, None
        if running is None or running.rows is None:
            return None
        rows, n = running.rows, running.n_rows
        return tuple(None if t is None else t.new_full((n, *t.shape[1:]), torch.nan).index_copy(0, rows, t) for t in args)

    # --- attention ----------------------------------------------------------------------------------------------------------------

    def _shortened(self, context: Any, is_visual: Tensor) -> ShortStep:
        """The present step behind the exit, noted for the next one."""
        name, attention = next(iter(self._attentions.items()))
        stock, cache = context.attn_metadata[name], attention.kv_cache
        step = Step(stock.query_start_loc, stock.seq_lens, stock.block_table, is_visual)
        # (blocks, KV heads, tokens of a block, …), on CPUs and GPUs alike
        n_blocks, block_size = cache.shape[0], cache.shape[2]
        if self._departed is None:
            check_slots(step, context.slot_mapping[name], block_size)
            self._departed = Departed(n_blocks, stock.seq_lens.device)
        n_gone = self._departed.before(step)
        short = shortened(step, n_gone, block_size)
        self._departed.add(step, n_gone, short)
        return short

    def _tell(self, context: Any, short: ShortStep) -> None:
        """Gives the attention of the layers from the exit on the short step. The context lives as long as the pass; what is in it is the runner's."""
        told: dict[int, Any] = {}
        for name, attention in self._attentions.items():
            stock = context.attn_metadata[name]
            # layers of one group share their metadata
            if id(stock) not in told:
                told[id(stock)] = replaced(stock, short, attention, self._dtype)
        context.attn_metadata = {**context.attn_metadata, **{name: told[id(context.attn_metadata[name])] for name in self._attentions}}
        context.slot_mapping = {**context.slot_mapping, **dict.fromkeys(self._attentions, short.slots)}

    def _count(self, is_visual: Tensor, short: ShortStep) -> None:
        n = int(is_visual.sum())
        self._engine.exit_rows.update(before=len(is_visual), behind=len(short.slots))
        if self._counts_tokens and n:
            tokens, info = self._engine.stats.tokens, self._engine.info
            tokens.patches += n
            tokens.layer_tokens += self._layer * n
            tokens.all_layer_tokens += info.n_layers * n


def replaced(stock: Any, short: ShortStep, attention: Any, dtype: torch.dtype) -> Any:
    """The metadata of an attention layer for the short step. Upper bounds of lengths stay as they are."""
    found = dataclasses.replace(
        stock, num_actual_tokens=len(short.slots), query_start_loc=short.query_start, seq_lens=short.seq_lens, slot_mapping=short.slots,
        # shares of the work, made for the whole step; kernels for GPUs do without
        scheduler_metadata=None,
    )  # fmt: skip
    if attention.attn_backend.get_name() == "CPU_ATTN":
        found.scheduler_metadata = _cpu_schedule(found, attention, dtype)
    return found


def _cpu_schedule(metadata: Any, attention: Any, dtype: torch.dtype) -> Tensor:
    from accel.patches.hosts.vllm.compat import cpu_attn_get_scheduler_metadata, envs

    impl = attention.impl
    found: Tensor = cpu_attn_get_scheduler_metadata(
        num_reqs=len(metadata.seq_lens), num_heads=impl.num_heads, num_kv_heads=impl.num_kv_heads, head_dim=impl.head_size,
        seq_lens=metadata.seq_lens, dtype=dtype, query_start_loc=metadata.query_start_loc, causal=metadata.causal, sliding_window_size=-1,
        isa=attention.isa, enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV, kv_cache_dtype=impl.kv_cache_dtype,
    )  # fmt: skip
    return found


def why_unfit(decoder: nn.Module) -> list[str]:
    """Why rows cannot leave this decoder."""
    from accel.patches.hosts.vllm.compat import LlamaModel, MistralModel, Qwen2Model

    known = (LlamaModel, MistralModel, Qwen2Model)
    # subclasses that go through their layers otherwise are not known
    if type(decoder).forward not in [cls.forward for cls in known]:
        return [f"the decoder is a {type(decoder).__name__}; known: {', '.join(cls.__name__ for cls in known)}, and what runs their forward"]
    attentions = [layer.self_attn.attn for layer in decoder.layers]     # type: ignore[union-attr]
    backends = sorted({a.attn_backend.get_name() for a in attentions} - set(BACKENDS))
    found = [f"its attention runs on {', '.join(backends)}; possible: {', '.join(BACKENDS)}"] if backends else []
    if any(a.sliding_window is not None for a in attentions):
        found.append("a sliding window counts entries, which move up")
    return found
