"""The front end's half of token pruning: as many placeholders in a prompt as tokens of its pictures will stay (vllm-integration.md §5).

vLLM's processors see the model's configuration alone, where the recipe travels too. What a request asks for goes on to the model beside its pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from accel.errors import AccelError, OptionError
from accel.patches.hosts.transformers.pruning.vision import Modality
from accel.patches.hosts.vllm.compat import MULTIMODAL_REGISTRY, MultiModalFieldConfig, PromptUpdateDetails
from accel.patches.hosts.vllm.engine import describe
from accel.patches.hosts.vllm.models.counts import FIELDS, KEEP, FrontPruning, Whole, front_pruning, keep_row, kept_of
from accel.patches.hosts.vllm.options import read_options


class PrunedProcessor:
    """In front of a multimodal processor of vLLM: takes `keep` from a request's `mm_processor_kwargs`, and shortens its placeholders."""

    info: Any

    @cached_property
    def pruning(self) -> FrontPruning | None:
        """What the recipe drops in front of the language model."""
        config = self.info.ctx.model_config
        if KEEP in (self.info.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise OptionError(f"{KEEP} stands in the engine's mm_processor_kwargs; give it in the recipe, or with a request")
        return front_pruning(config.hf_config, describe(config), read_options(config.hf_config))

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Pictures to measure memory by: whole, for a request may ask for all of its tokens."""
        found = super().get_dummy_inputs(*args, **kwargs)   # type: ignore[misc]
        if self.pruning is None:
            return found
        return dataclasses.replace(found, hf_processor_mm_kwargs={**found.hf_processor_mm_kwargs, KEEP: Whole.WHOLE})

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, object]) -> Any:
        keep, rest = self._taken(hf_kwargs)
        found = super()._apply_hf_processor_main(mm_items, rest)    # type: ignore[misc]
        if self.pruning is not None:
            for modality, items in mm_items.items():
                if modality in FIELDS and len(items):
                    is_made = f"{modality}_embeds" in found
                    if is_made and keep is not None:
                        raise ValueError(f"{KEEP}={keep!r}, but the {modality}'s features were made outside: pass the pixels, or leave it out")
                    # features that somebody made outside stay whole: nobody has seen what they are of
                    found[FIELDS[modality]] = torch.stack([keep_row(Whole.WHOLE if is_made else keep)] * len(items))
        return found

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Mapping[str, Any]:
        _, rest = self._taken(hf_processor_mm_kwargs)
        found = super()._get_mm_fields_config(hf_inputs, rest)      # type: ignore[misc]
        ours = {name: MultiModalFieldConfig.batched(modality, keep_on_cpu=True) for modality, name in FIELDS.items() if name in hf_inputs}
        return {**found, **ours}

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any) -> Mapping[str, Any]:
        _, rest = self._taken(hf_processor_mm_kwargs)
        found = super()._get_mm_prompt_updates(mm_items, rest, out_mm_kwargs)       # type: ignore[misc]
        if self.pruning is None:
            return dict(found)
        return {
            modality: [self._shortened(modality, updates, item) for updates, item in zip(rows, out_mm_kwargs[modality], strict=True)]
            if modality in FIELDS and rows else rows
            for modality, rows in found.items()
        }  # fmt: skip

    def _taken(self, kwargs: Mapping[str, object]) -> tuple[Any, dict[str, object]]:
        """What a request asks for, checked, and its other arguments. ValueError, which fails the request and no other one."""
        rest = dict(kwargs)
        keep: Any = rest.pop(KEEP, None)
        if keep is not None and self.pruning is None:
            raise OptionError(f"{KEEP}={keep!r} of a request has no say: the recipe drops no token in front of the language model; leave it out")
        if keep is not None and self.pruning is not None:
            self.pruning.asked(keep)
        return keep, rest

    def _shortened(self, modality: Modality, updates: Sequence[Any], item: Any) -> list[Any]:
        """The ways to put one picture into a prompt, with fewer placeholders. item: what the processor made of it."""
        assert self.pruning is not None
        method = self.pruning.asked(kept_of(item[FIELDS[modality]].data))
        if method is None or not updates:
            return list(updates)
        batch = {name: element.data[None] for name, element in item.items() if isinstance(element.data, torch.Tensor)}
        [picture] = self.pruning.pictures(modality, batch)
        try:
            n = self.pruning.count(method, picture)
        except AccelError as error:
            raise ValueError(str(error)) from error
        return [dataclasses.replace(update, content=_first(update.content, n, len(picture))) for update in updates]


def _first(content: Any, n: int, n_whole: int) -> Any:
    """The first n of equal placeholders."""
    if len(content.full) != n_whole or len(set(content.full)) > 1:
        raise ValueError(f"accel expects {n_whole} equal placeholders for this picture, vLLM has {len(content.full)}: its adapter does not fit")
    return PromptUpdateDetails(content.full[:n], content.is_embed)


def register_processor(model: type) -> Callable[[type], type]:
    """Decorates a subclass of vLLM's `model` with its processor, ours in front of it."""
    stock: Any = model._processor_factory   # type: ignore[attr-defined]

    def build(info: Any, dummy_inputs: Any) -> Any:
        # which class it is depends on the model's configuration
        chosen = type(stock.processor(info, dummy_inputs))
        return type(f"Accel{chosen.__name__}", (PrunedProcessor, chosen), {})(info, dummy_inputs)

    decorate: Callable[[type], type] = MULTIMODAL_REGISTRY.register_processor(build, info=stock.info, dummy_inputs=stock.dummy_inputs)
    return decorate
