"""Puts token-pruning methods into a vision-language model: what watches its encoder, and what makes its decoder run on fewer tokens."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.transformers.dispatch import original_of, register
from accel.patches.hosts.transformers.implementation import switch_implementation
from accel.patches.hosts.transformers.pruning.bound import Hook, Loss, replace_method
from accel.patches.hosts.transformers.pruning.decoder import Decoder
from accel.patches.hosts.transformers.pruning.observe import encoder_maps, newest_row, watch
from accel.patches.hosts.transformers.pruning.prompt import FRONT, Asked, Seen, ordered_stages
from accel.patches.hosts.transformers.pruning.vision import Modality, Tower, VisionFamily, family_of
from accel.protocols import ModelInfo, Observation, TokenPruning

IGNORED = -100      # what losses skip among labels


def prune_tokens(
    model: Any, decoder: nn.Module, attentions: list[nn.Module], methods: Sequence[TokenPruning], info: ModelInfo, handle: Handle
) -> None:
    """Attaches the methods, in order. model: the one that generates; attentions: of its decoder. Methods that keep everything change nothing."""
    base = model.base_model
    family = family_of(model.config)
    active = [m for m in methods if m.stages(info)]
    for method in active:
        if method.position_mode == "compact" and info.has_multimodal_rope:
            raise UnsupportedError(f"{method.method_name()}: position_mode='compact' would break this model's positions, which have several axes")
    if not active:
        return
    if len({m.position_mode for m in active}) > 1:
        raise UnsupportedError("token-pruning methods in one model must agree on position_mode")
    stages = ordered_stages(active, lambda m: m.stages(info))
    towers = family.towers(base)
    token_ids = {modality: token for modality in towers if (token := family.token_id(model.config, modality)) is not None}
    for module in attentions:
        config: Any = module.config
        original = original_of(config._attn_implementation) or config._attn_implementation
        switch_implementation(config, register(original), handle)
    front = Decoder(stages, token_ids, handle, n_layers=info.n_layers, original=original, is_compact=active[0].position_mode == "compact")
    handle.on_pause(partial(setattr, front, "is_on"))
    recorder = _Recorder(family, base, active, towers, front)
    recorder.attach(handle)
    _hook_model(model, base, front, handle)
    _hook_decoder(decoder, front, handle)
    _watch_rows(attentions, stages, active, front, handle)


class _Recorder:
    """Turns a call of `get_image_features` into `Seen` pictures, waiting for the prompt that they belong to."""

    def __init__(self, family: VisionFamily, base: nn.Module, methods: Sequence[TokenPruning], towers: dict[Modality, Tower], front: Decoder) -> None:
        self.family, self.base, self.towers, self.front = family, base, towers, front
        self.wanted = [(i, m, o) for i, m in enumerate(methods) for o in m.observe() if o.what != "last_row"]

    def attach(self, handle: Handle) -> None:
        watched: set[tuple[int, int]] = set()
        for tower in self.towers.values():
            for layer in {self._layer(tower, o) for _, _, o in self.wanted if o.what != "pixel_map"}:
                module = tower.attentions[layer]
                if (id(module), layer) not in watched:
                    watched.add((id(module), layer))
                    watch(module, partial(self._see, tower, layer), handle)
        for modality in self.towers:
            name = f"get_{modality}_features"
            if hasattr(self.base, name):
                replace_method(self.base, name, partial(self._around, modality), handle)

    def _layer(self, tower: Tower, observation: Observation) -> int:
        layer = tower.scoring_layer if observation.layer is None else observation.layer
        if not -len(tower.attentions) <= layer < len(tower.attentions):
            raise UnsupportedError(f"the vision encoder has {len(tower.attentions)} layers, asked to score by layer {layer}")
        return layer % len(tower.attentions)

    def _see(self, tower: Tower, layer: int, q: Tensor, k: Tensor, mask: Any, scale: float, softcap: float | None) -> None:
        recording: dict[Any, list[Tensor]] | None = self.front.runtime.recording
        if recording is None:
            return
        here = [(i, m, o) for i, m, o in self.wanted if o.what != "pixel_map" and self._layer(tower, o) == layer]
        with torch.no_grad():
            maps = encoder_maps(q.detach(), k.detach(), mask, scale, prefix=tower.prefix, wanted=[(m, o) for _, m, o in here])
        for (i, _, o), rows in zip(here, maps, strict=True):
            recording.setdefault((i, o.what), []).extend(rows)

    def _around(self, modality: Modality, original: Any, *args: Any, **kwargs: Any) -> Any:
        runtime = self.front.runtime
        if not self.front.is_on or runtime.recording is not None:
            return original(*args, **kwargs)
        runtime.recording = {}
        try:
            features = original(*args, **kwargs)
            maps = runtime.recording
        finally:
            runtime.recording = None
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        with torch.no_grad():
            runtime.pending[modality] = self._pictures(modality, dict(bound.arguments), features, maps)
        return features

    def _pictures(self, modality: Modality, call: dict[str, Any], features: Any, maps: dict[tuple[int, str], list[Tensor]]) -> list[Seen]:
        pictures = self.family.pictures(self.base, modality, call, features)
        flat = self.family.flat_features(features).detach()
        if sum(len(p) for p in pictures) != len(flat):
            raise UnsupportedError(
                f"accel expects {sum(len(p) for p in pictures)} visual tokens from these {modality}s, the model made {len(flat)}: "
                f"its adapter ({type(self.family).__name__}) does not fit"
            )
        for i, method, o in self.wanted:
            if o.what == "pixel_map":
                maps[i, o.what] = [method.map_pixels(p) for p in self._grey(modality, call, o)]
        found, token, segment = [], 0, 0
        for picture in pictures:
            part = slice(segment, segment + len(picture.segments))
            own = {}
            for key, rows in maps.items():
                if tuple(len(r) for r in rows[part]) != picture.segments:
                    raise UnsupportedError(
                        f"the encoder attended in stretches of {[len(r) for r in rows]} patches, the adapter {type(self.family).__name__} expects "
                        f"{[n for p in pictures for n in p.segments]}"
                    )
                own[key] = picture.pooled(rows[part])
            found.append(Seen(picture, own, flat[token : token + len(picture)]))
            token, segment = token + len(picture), segment + len(picture.segments)
        return found

    def _grey(self, modality: Modality, call: dict[str, Any], o: Observation) -> list[Tensor]:
        """The pixels of each segment as they were before normalisation, (patches, pixels) uint8, mean of the colours."""
        mean, std = (_per_colour(given, own) for given, own in ((o.pixel_mean, self.family.pixel_mean), (o.pixel_std, self.family.pixel_std)))
        found = []
        for patches in self.family.pixel_patches(self.base, modality, call):
            raw = patches * std.to(patches.device) + mean.to(patches.device)
            found.append((raw * 255).round().clamp(0, 255).mean(1).round().to(torch.uint8))
        return found


def _per_colour(given: float | tuple[float, ...] | None, own: tuple[float, ...]) -> Tensor:
    """(colours, 1) fp32."""
    values = own if given is None else given if isinstance(given, (tuple, list)) else (given,) * len(own)
    return torch.tensor(values)[:, None]


# --- hooks --------------------------------------------------------------------------------------------------------------------


def _hook_model(model: Any, base: nn.Module, front: Decoder, handle: Handle) -> None:
    """Notes the ids of a prompt on their way in, and trims labels."""
    runtime = front.runtime

    def around_generate(original: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind_partial(*args, **kwargs)
        ids = bound.arguments.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        mask = kwargs.get("attention_mask")
        if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > ids.shape[1]:
            # only the new part of the prompt was passed
            ids = torch.cat([ids.new_full((len(ids), mask.shape[1] - ids.shape[1]), -1), ids], 1)
        before, runtime.ids = runtime.ids, ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        try:
            return original(*args, **kwargs)
        finally:
            runtime.ids, runtime.prompt, runtime.pending = before, None, {}

    def note_ids(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            runtime.here = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)

    def forget_ids(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            runtime.here = runtime.running = None

    def trimmed_loss(original: Any, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Any:
        finished = runtime.finished
        if finished is None or finished.index is None:
            return original(logits, labels, *args, **kwargs)
        if kwargs.get("shift_labels") is not None:
            raise UnsupportedError("visual tokens were dropped: pass labels, not shift_labels, so that accel can trim them")
        index = finished.index.to(labels.device)
        # neither a hole nor what stands behind one, whose prediction would come from the hole
        is_hole = index < 0
        is_ignored = is_hole | nn.functional.pad(is_hole, (1, 0))[:, :-1]
        return original(logits, labels.gather(1, index.clamp_min(0)).masked_fill(is_ignored, IGNORED), *args, **kwargs)

    def refuse_labels(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside = {asked.method.method_name() for asked in front.stages if asked.layer > FRONT}
        ids = kwargs.get("input_ids", args[0] if args else None)
        if front.is_on and inside and kwargs.get("labels") is not None and front.has_placeholders(ids):
            raise UnsupportedError("labels cannot be used while visual tokens leave inside the language model", sorted(inside))

    def forget(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            runtime.finished = None

    replace_method(model, "generate", around_generate, handle)
    handle.set_attr(model, "_loss_function", Loss(model.loss_function, trimmed_loss))
    handle.on_undo(model.register_forward_pre_hook(Hook(refuse_labels), with_kwargs=True).remove)
    handle.on_undo(model.register_forward_hook(Hook(forget), with_kwargs=True, always_call=True).remove)
    handle.on_undo(base.register_forward_pre_hook(Hook(note_ids), with_kwargs=True).remove)
    handle.on_undo(base.register_forward_hook(Hook(forget_ids), with_kwargs=True, always_call=True).remove)


def _hook_decoder(decoder: nn.Module, front: Decoder, handle: Handle) -> None:
    handle.on_undo(decoder.register_forward_pre_hook(Hook(front.before_decoder), with_kwargs=True).remove)
    handle.on_undo(decoder.register_forward_hook(Hook(front.after_decoder), with_kwargs=True).remove)
    for i, layer in enumerate(decoder.layers):      # type: ignore[arg-type]
        handle.on_undo(layer.register_forward_pre_hook(Hook(partial(front.before_layer, i)), with_kwargs=True).remove)
    if hasattr(decoder, "_deepstack_process"):
        replace_method(decoder, "_deepstack_process", front.deepstack, handle)


def _watch_rows(attentions: list[nn.Module], stages: Sequence[Asked], methods: Sequence[TokenPruning], front: Decoder, handle: Handle) -> None:
    """Has the newest row of the decoder's attention recorded where a method reads it."""
    by_layer: dict[int, list[tuple[int, Observation]]] = {}
    for i, method in enumerate(methods):
        for o in method.observe():
            if o.what == "last_row":
                assert o.layer is not None
                by_layer.setdefault(o.layer, []).append((i, o))
    for module in attentions:
        layer: Any = module.layer_idx
        if layer in by_layer:
            watch(module, partial(_see_row, front, by_layer[layer], getattr(module, "sliding_window", None)), handle)


def _see_row(
    front: Decoder, wanted: list[tuple[int, Observation]], window: int | None, q: Tensor, k: Tensor, mask: Any, scale: float, softcap: float | None
) -> None:
    running = front.runtime.running
    if running is None:
        return
    for i, o in wanted:
        with torch.no_grad():
            running.observed[i] = newest_row(q.detach(), k.detach(), mask, scale, softcap, observation=o, window=window)
