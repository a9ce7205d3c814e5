"""A text decoder that runs on fewer tokens from some layers on: hooks in front of the decoder and of every layer.

transformers computes masks, rotary tables and positions once per forward, for all tokens; each layer that fewer tokens reach is handed its
share of them. The whole prompt stays whole outside: ids, cache lengths and what `generate` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import outside_graph
from accel.patches.hosts.transformers.applicability import HARMLESS
from accel.patches.hosts.transformers.masks import KeptKeys, LazyMask, shortened_tensor
from accel.patches.hosts.transformers.pruning.cache import LogicalLayer, StaticLogicalLayer, Survivors, logical_layer, why_unsupported
from accel.patches.hosts.transformers.pruning.passes import Pass, begin_pass, drop, share_of, with_merged
from accel.patches.hosts.transformers.pruning.positions import compacted, continued
from accel.patches.hosts.transformers.pruning.prompt import Asked, Prompt, plan_ahead, visual_tokens
from accel.patches.hosts.transformers.pruning.runtime import Runtime, Source, pictures_for
from accel.patches.hosts.transformers.pruning.vision import Modality

_PER_TOKEN = ("position_embeddings", "position_ids")


def _refuse_unknown(kwargs: dict[str, Any], length: int) -> None:
    """Raises for a layer argument that may hold one entry per token and that accel would not cut."""
    known = {*_PER_TOKEN, *HARMLESS, "attention_mask"}
    strange = [n for n, v in kwargs.items() if n not in known and isinstance(v, Tensor) and length in v.shape[1:]]
    if strange:
        raise UnsupportedError("visual tokens cannot be dropped here: the decoder's layers take arguments accel does not know", strange)


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among a decoder's or a layer's arguments, whose name changed in transformers 5.24."""
    found = kwargs.get("cache")
    return kwargs.get("past_key_values") if found is None else found


def padding_of(mask: Any) -> Tensor | None:
    """The 2-D padding mask behind whatever was passed as attention mask, or None."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if isinstance(mask, LazyMask):
        return mask.padding
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


class Decoder:
    """The hooks of one patched model. stages: in the order in which tokens meet them."""

    def __init__(
        self, stages: Sequence[Asked], token_ids: dict[Modality, int], handle: Handle, *, n_layers: int, original: str, is_compact: bool
    ) -> None:
        self.stages, self.token_ids, self.handle = list(stages), token_ids, handle
        self.n_layers, self.original, self.is_compact = n_layers, original, is_compact
        self.runtime, self.counting = Runtime(), Lock()
        self.is_on = True

    # --- in front of the decoder ------------------------------------------------------------------------------------------------

    def before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Plans the prompt at its first pass, and makes positions compact where asked."""
        embeds = kwargs.get("inputs_embeds")
        if not self.is_on:
            return None
        if torch.compiler.is_compiling():
            # a decoding step drops nothing; a prompt is planned outside the graph
            if embeds is None or embeds.shape[1] > 1:
                return outside_graph(self._before_decoder, module, args, kwargs)
            return self._go_on(args, kwargs)
        return self._before_decoder(module, args, kwargs)

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        runtime, embeds, cache = self.runtime, kwargs.get("inputs_embeds"), cache_of(kwargs)
        # taken, not read: hooks behind a module do not run after an interrupt, and a decoder called by itself has no prompt
        forward, runtime.forward, runtime.running = runtime.forward, None, None
        prompt = None if embeds is None or forward is None else self._prompt(forward, embeds, cache)
        if prompt is None or not prompt.cuts:
            return self._go_on(args, kwargs)
        assert embeds is not None       # or there would be no prompt
        if cache is not None and (reason := why_unsupported(cache)) is not None:
            raise UnsupportedError(f"visual tokens cannot be dropped on {reason}; use DynamicCache or StaticCache")
        if _recomputes_hooks(module):
            raise UnsupportedError("this release of transformers runs hooks again inside its gradient checkpoints; turn those off, or update it")
        running = runtime.running = begin_pass(prompt, prompt.done, embeds.shape[1], padding_of(kwargs.get("attention_mask")))
        kwargs = with_merged(running, kwargs)
        return args, compacted(running, cache, kwargs) if self.is_compact else kwargs

    def _go_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """A pass without pictures of its own: only compact positions may have to know of earlier ones."""
        found = continued(cache_of(kwargs), kwargs) if self.is_compact else None
        return None if found is None else (args, found)

    def _prompt(self, forward: Source, embeds: Tensor, cache: Any) -> Prompt | None:
        """The prompt that this pass is part of, planned if it is the first one; None where nothing is to be dropped."""
        length = embeds.shape[1]
        generation = self.runtime.generation
        known = None if generation is None else generation.prompt
        is_over = generation is None or not generation.pictures if known is None else known.done >= known.n_columns
        if length == 1 and is_over and not forward.pictures and not forward.has_strangers:
            # a decoding step; asking a cache on a GPU for its length would wait
            return None
        past = 0 if cache is None else int(cache.get_seq_length())
        if generation is None or not generation.brings(forward.ids, past, length):
            if forward.ids is None and not forward.pictures:
                self.handle.stats.tokens.skipped["embeddings without input_ids"] += len(embeds)
            return self._planned(forward, forward, past, length)
        assert generation.ids is not None
        if known is not None and past == known.done < known.n_columns and past + length <= known.n_columns:
            return known
        if past >= generation.ids.shape[1]:
            return None
        owner = Source(generation.ids, forward.pictures or generation.pictures, generation.has_strangers)
        generation.prompt = self._planned(owner, forward, past, length)
        if known is not None and generation.prompt is not None:
            # without a cache the prompt comes again with every step
            generation.prompt.is_counted = False
        return generation.prompt

    def _planned(self, owner: Source, forward: Source, past: int, length: int) -> Prompt | None:
        """The prompt from column `past` on. owner: whose ids and pictures; its ids may go beyond this pass, or start with it."""
        if owner.ids is None:
            if owner.pictures:
                raise UnsupportedError("accel finds visual tokens by their placeholders: pass input_ids, not inputs_embeds alone")
            return None
        ids, here = owner.ids, owner.ids if forward.ids is None else forward.ids
        if len(ids) != len(here):
            ids = ids.repeat_interleave(len(here) // len(ids), dim=0)
        n_asked = ids.shape[1]
        if ids is here:
            # no more than this pass was passed
            ids, n_asked = torch.cat([ids.new_full((len(ids), past), -1), here], 1), past + n_asked
        elif past + length > n_asked:
            ids = torch.cat([ids.new_full((len(ids), past), -1), here], 1)
        ids = ids.cpu().clone()
        ids[:, :past] = -1
        if not self.has_placeholders(ids):
            return None
        pictures = pictures_for(owner)
        if not pictures:
            # their features came by a way that nobody watched, or never
            if not past:
                # beams are copies of their prompt
                rows = {tuple(row.tolist()) for row in ids if self.has_placeholders(row)}
                self.handle.stats.tokens.skipped["placeholders without pictures"] += len(rows)
            return None
        tokens = visual_tokens(ids, self.token_ids, pictures)
        n_copies = max(1, sum(len(row) for row in tokens.seen) // max(1, sum(len(p) for p in pictures.values())))
        prompt = Prompt(tokens, ids, past, n_copies, n_asked, done=past)
        plan_ahead(prompt, self.stages, self.handle)
        learned = [cut.asked.method.method_name() for cut in prompt.cuts if cut.asked is not None]
        if learned and past + length < n_asked:
            raise UnsupportedError(
                "a stage that looks at hidden states cannot choose among tokens of a later chunk: prefill in one piece, without prefill_chunk_size",
                learned,
            )
        return prompt

    def has_placeholders(self, ids: Tensor | None) -> bool:
        return ids is not None and any(bool((ids == token).any()) for token in self.token_ids.values())

    # --- in front of a layer ----------------------------------------------------------------------------------------------------

    def before_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.is_on:
            return None
        hidden, rest, kwargs = _taken(args, kwargs)
        if torch.compiler.is_compiling():
            if hidden.shape[1] > 1:
                return outside_graph(self._before_layer, layer, hidden, rest, kwargs)
            return (hidden, *rest), self._decode(layer, hidden, kwargs)
        return self._before_layer(layer, hidden, rest, kwargs)

    def _before_layer(self, layer: int, hidden: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        running = self.runtime.running
        while running is not None and running.cuts and running.cuts[0].layer <= layer:
            hidden = drop(running, running.cuts.pop(0), hidden, kwargs, self.handle)
        if running is None or running.survivors is None:
            return (hidden, *rest), self._decode(layer, hidden, kwargs)
        return (hidden, *rest), self._short_arguments(layer, running, running.survivors, hidden, kwargs)

    def _decode(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a layer that all tokens of this pass reach; where its cache lacks earlier ones, the mask must know which."""
        cache = cache_of(kwargs)
        if cache is None or len(cache.layers) <= layer:
            return kwargs
        held = cache.layers[layer]
        if not isinstance(held, (LogicalLayer, StaticLogicalLayer)) or not held.is_pruned:
            return kwargs
        batch, length = hidden.shape[:2]
        held.announce(None)
        mask = kwargs.get("attention_mask")
        if isinstance(held, StaticLogicalLayer):
            # the entry of this very token is written after the mask is made
            rows = torch.arange(length, device=held.device)
            assert held.index is not None
            numbers = held.seen + rows
            index = held.index.index_copy(1, held.cumulative_length + rows, numbers.expand(batch, -1))
            if isinstance(mask, Tensor):
                return {**kwargs, "attention_mask": shortened_tensor(mask, None, index)}
            keys = KeptKeys(lambda: index, index.shape[1], held.cumulative_length.clone(), True, ("static", held.history))
            return {**kwargs, "attention_mask": _short_mask(mask, None, numbers.expand(batch, -1), keys)}
        q_index = torch.arange(held.seen, held.seen + length, device=held.device).expand(batch, -1)
        n = held.n_entries
        key = ("step", held.history, n, held.window)
        keys = KeptKeys(lambda: torch.cat([held.whole_index(batch), q_index], 1), n + length, n, held.has_holes, key)
        return {**kwargs, "attention_mask": _short_mask(mask, None, q_index, keys)}

    def _short_arguments(self, layer: int, running: Pass, survivors: Survivors, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        device = hidden.device
        local = (survivors.on(device) - running.past).clamp_min(0)
        _refuse_unknown(kwargs, running.length)
        found = dict(kwargs)
        for name in _PER_TOKEN:
            if kwargs.get(name) is not None:
                key = (id(kwargs[name]), running.n_cuts)
                if key not in running.gathered:
                    # the original object is kept beside it, so that its id stays its own
                    running.gathered[key] = (kwargs[name], share_of(kwargs[name], local, is_table=name == "position_embeddings"))
                found[name] = running.gathered[key][1]
        if "flash" in self.original:
            # gaps in positions would be taken for the seams of packed sequences
            found["position_ids"] = None
        cache = cache_of(kwargs)
        if cache is None:
            index = survivors.on(device)
            keys = KeptKeys(lambda: index, index.shape[1], 0, survivors.has_holes, ("no cache", running.n_cuts))
        else:
            held = logical_layer(cache, layer)
            keys = self._keys_with(held, survivors, device)
            held.announce(survivors)
        found["attention_mask"] = _short_mask(kwargs.get("attention_mask"), local, survivors.on(device), keys)
        return found

    def _keys_with(self, held: LogicalLayer | StaticLogicalLayer, survivors: Survivors, device: torch.device) -> KeptKeys:
        """The keys of a layer once the survivors of this pass have joined them. Their numbers are put together only if the mask needs them."""
        coming = survivors.on(device)
        m, has_holes = coming.shape[1], held.has_holes or survivors.has_holes
        if isinstance(held, StaticLogicalLayer):
            offset = held.cumulative_length.to(device).clone()
            old = held.index if held.index is not None else torch.full((len(coming), held.max_cache_len), -1, dtype=torch.int64, device=device)
            index = old.index_copy(1, offset + torch.arange(m, device=device), coming)
            # slots that are not written yet are holes too
            return KeptKeys(lambda: index, index.shape[1], offset, True, ("static", held.history, survivors.number))
        n = held.n_entries
        key = ("pass", held.history, survivors.number, n, held.window)
        return KeptKeys(lambda: torch.cat([held.whole_index(len(coming)).to(device), coming], 1) if n else coming, n + m, n, has_holes, key)

    # --- behind the decoder -----------------------------------------------------------------------------------------------------

    def after_decoder(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Counts a prompt whose last pass is through, and forgets it."""
        embeds = kwargs.get("inputs_embeds")
        # a compiled decoding step was no pass of a prompt
        if not torch.compiler.is_compiling() or embeds is None or embeds.shape[1] > 1:
            outside_graph(self._after_decoder)

    def _after_decoder(self) -> None:
        running, self.runtime.running = self.runtime.running, None
        self.runtime.finished = running
        if running is None:
            return
        running.prompt.done = running.past + running.length
        if running.is_last and running.prompt.is_counted:
            self._count(running)

    def _count(self, running: Pass) -> None:
        prompt, stats = running.prompt, self.handle.stats.tokens
        tokens, n = prompt.tokens, prompt.n_copies
        patches, structural = int(tokens.is_visual.sum()) // n, int(tokens.is_structural.sum()) // n
        left, last, total = tokens.exists, 0, 0
        for cut in prompt.cuts:
            if cut.alive is not None:
                total += (cut.layer - last) * int((left & tokens.is_visual).sum()) // n
                left, last = cut.alive, cut.layer
        kept, kept_structural = (int((left & kind).sum()) // n for kind in (tokens.is_visual, tokens.is_structural))
        total += (self.n_layers - last) * kept
        # several threads may be at this point
        with self.counting:
            stats.prompts += sum(bool(row) for row in tokens.seen) // n
            stats.skipped["no picture"] += sum(not row for row in tokens.seen) // n
            stats.patches += patches
            stats.structural += structural
            stats.kept_patches += kept
            stats.kept_structural += kept_structural
            stats.layer_tokens += total
            stats.all_layer_tokens += self.n_layers * patches

    def deepstack(self, original: Any, hidden: Tensor, visual_mask: Tensor, features: Tensor) -> Any:
        """Visual features added behind a layer, to those of their tokens that are left. visual_mask: (B, q) bool; features: (its ones, D)."""
        running = self.runtime.running
        if running is None or running.index is None or not self.is_on:
            return original(hidden, visual_mask, features)
        index = running.index.to(visual_mask.device)
        ranks = (visual_mask.flatten().cumsum(0) - 1).view_as(visual_mask).gather(1, index.clamp_min(0))
        mask = visual_mask.gather(1, index.clamp_min(0)) & (index >= 0)
        return original(hidden, mask, features[ranks[mask].to(features.device)])


def _recomputes_hooks(decoder: nn.Module) -> bool:
    """Whether layers are checkpointed together with the hooks in front of them: older transformers wrap `__call__`, newer ones `forward`."""
    layer: Any = next(iter(decoder.layers))     # type: ignore[arg-type]
    is_checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
    return bool(is_checkpointed and any("__call__" in vars(cls) for cls in type(layer).__mro__ if cls.__name__ == "GradientCheckpointingLayer"))


def _taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Hidden states, and the remaining arguments of a layer."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _short_mask(mask: Any, local: Tensor | None, q_index: Tensor, keys: KeptKeys) -> Any:
    """The mask of a layer that fewer tokens reach. local: (B, m), which rows of the pass reach it; None where all do."""
    if isinstance(mask, LazyMask):
        return mask.shortened(q_index, keys)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return shortened_tensor(mask, local, keys.index())
    if mask is None and not keys.has_holes:
        return None
    raise UnsupportedError(f"visual tokens cannot be dropped under an attention mask of type {type(mask).__name__}")
