"""Puts token-pruning methods into a vision-language model: what watches its encoder, and what makes its decoder run on fewer tokens."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.bound import Hook, Loss, Mark, outside_graph, replace_method
from accel.patches.hosts.transformers.dispatch import original_of, register
from accel.patches.hosts.transformers.implementation import switch_implementation
from accel.patches.hosts.transformers.pruning.decoder import Decoder
from accel.patches.hosts.transformers.pruning.observe import newest_row, watch
from accel.patches.hosts.transformers.pruning.prompt import FRONT, Asked, ordered_stages
from accel.patches.hosts.transformers.pruning.recorder import Recorder
from accel.patches.hosts.transformers.pruning.runtime import Generation, Source
from accel.patches.hosts.transformers.pruning.vision import family_of
from accel.protocols import ModelInfo, Observation, TokenPruning

IGNORED = -100      # what losses skip among labels
MARK = "_accel_pruning"


def prune_tokens(
    model: Any, decoder: nn.Module, attentions: list[nn.Module], methods: Sequence[TokenPruning], info: ModelInfo, handle: Handle
) -> None:
    """Attaches the methods, in order. model: the one that generates; attentions: of its decoder. Methods that keep everything change nothing."""
    base = model.base_model
    family = family_of(model.config)
    if not hasattr(model, "generate"):
        raise UnsupportedError(f"{type(model).__name__} does not generate: apply to the …ForConditionalGeneration around it")
    active = [m for m in methods if m.stages(info)]
    idle = [m.method_name() for m in methods if m not in active]
    handle.notices += [f"{name}: keeps every visual token of this model with these options; nothing was changed for it" for name in idle]
    for method in active:
        twice = [what for what, n in Counter(o.what for o in method.observe()).items() if n > 1]
        if twice:
            raise UnsupportedError(f"{method.method_name()} asks for {', '.join(twice)} more than once; a host records one of each")
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
        # lazy masks are cheaper, but finished ones are cut as well
        switch_implementation(config, register(original), handle, is_needed=False)
    front = Decoder(stages, token_ids, handle, n_layers=info.n_layers, original=original, is_compact=active[0].position_mode == "compact")
    handle.prunes_tokens = True
    handle.set_attr(model, MARK, Mark([m.method_name() for m in active]))
    handle.on_pause(partial(setattr, front, "is_on"))
    Recorder(family, base, active, towers, front).attach(handle)
    _hook_model(model, base, front, handle)
    _hook_decoder(decoder, front, handle)
    _watch_rows(attentions, stages, active, front, handle)


# --- hooks --------------------------------------------------------------------------------------------------------------------


def _hook_model(model: Any, base: nn.Module, front: Decoder, handle: Handle) -> None:
    """Notes the ids of a prompt on their way in, and trims labels."""
    runtime = front.runtime

    def around_generate(original: Any, *args: Any, **kwargs: Any) -> Any:
        ids = inspect.signature(original).bind_partial(*args, **kwargs).arguments.get("inputs")
        ids = kwargs.get("input_ids") if ids is None else ids
        before = runtime.generation, runtime.forward
        source = Source.of(_with_columns_before(ids, kwargs.get("attention_mask")), kwargs.get("mm_encoder_outputs"))
        runtime.generation, runtime.forward = Generation(source.ids, source.pictures, source.has_strangers), None
        try:
            return original(*args, **kwargs)
        finally:
            runtime.generation, runtime.forward = before
            runtime.running = runtime.finished = None

    def begin_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime.forward = Source.of(_ids_of(args, kwargs), kwargs.get("mm_encoder_outputs"))

    def end_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        runtime.forward = runtime.running = None
        if not runtime.computes_loss:
            runtime.finished = None

    replace_method(model, "generate", around_generate, handle)
    handle.on_undo(base.register_forward_pre_hook(Hook(_unless_step(begin_forward)), with_kwargs=True).remove)
    handle.on_undo(base.register_forward_hook(Hook(_unless_step(end_forward)), with_kwargs=True, always_call=True).remove)
    _hook_loss(model, front, handle)


def _unless_step(hook: Any) -> Any:
    """The hook, run outside the graph where a compiler traces, and not at all in a compiled decoding step, which must stay one graph."""

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        if torch.compiler.is_compiling() and (ids := _ids_of(args, kwargs)) is not None and ids.shape[1] == 1:
            return
        outside_graph(hook, module, args, kwargs, *output)

    return run


def _ids_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    found = kwargs.get("input_ids", args[0] if args else None)
    return found if isinstance(found, Tensor) else None


def _with_columns_before(ids: Any, mask: Any) -> Any:
    """The ids of the whole prompt, −1 where only its new part was passed and the mask tells of more."""
    if isinstance(ids, Tensor) and ids.dim() == 2 and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > ids.shape[1]:
        return torch.cat([ids.new_full((len(ids), mask.shape[1] - ids.shape[1]), -1), ids], 1)
    return ids


def _hook_loss(model: Any, front: Decoder, handle: Handle) -> None:
    """Has labels lose the columns that the logits have lost."""
    runtime = front.runtime

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

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime.computes_loss, runtime.finished = True, None
        is_asked = kwargs.get("labels") is not None or isinstance(kwargs.get("logits_to_keep"), Tensor)
        if not (front.is_on and is_asked and front.has_placeholders(_ids_of(args, kwargs))):
            return
        inside = {asked.method.method_name() for asked in front.stages if asked.layer > FRONT}
        if inside and kwargs.get("labels") is not None:
            raise UnsupportedError("labels cannot be used while visual tokens leave inside the language model", sorted(inside))
        if isinstance(kwargs.get("logits_to_keep"), Tensor):
            raise UnsupportedError("logits_to_keep as a tensor names columns that visual tokens may have left; pass a number, or 0 for all")

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runtime.computes_loss, runtime.finished = False, None

    had, before = "_loss_function" in vars(model), vars(model).get("_loss_function")
    ours = model._loss_function = Loss(model.loss_function, trimmed_loss)

    def restore() -> None:
        # a loss that somebody set meanwhile stays
        if vars(model).get("_loss_function") is ours:
            if had:
                model._loss_function = before
            else:
                del model._loss_function

    handle.on_undo(restore)
    handle.on_undo(model.register_forward_pre_hook(Hook(_unless_step(begin)), with_kwargs=True).remove)
    handle.on_undo(model.register_forward_hook(Hook(_unless_step(end)), with_kwargs=True, always_call=True).remove)


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
            watch(module, partial(_see_row, front, by_layer[layer]), handle)


def _see_row(
    front: Decoder, wanted: list[tuple[int, Observation]], q: Tensor, k: Tensor, mask: Any, scale: float, softcap: float | None
) -> None:
    running = front.runtime.running
    if running is None:
        return
    newest = running.newest
    if running.index is not None:
        # their places among the tokens that reach this layer
        newest = (running.index == newest[:, None]).long().argmax(1)
    for i, o in wanted:
        with torch.no_grad():
            running.observed[i] = newest_row(q.detach(), k.detach(), mask, scale, softcap, row=newest.to(q.device), observation=o)
