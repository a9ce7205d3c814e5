"""How many of a picture's tokens a recipe leaves, before anything has run: for processes that see the configuration alone. No vLLM here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture, VisionFamily, family_of
from accel.protocols import Method, ModelInfo, TokenPruning, Unit

KEEP = "keep"       # the option of a method, and of a request
# what carries a request's own to the model, beside its pictures
FIELDS: dict[Modality, str] = {"image": "accel_image_keep", "video": "accel_video_keep"}
_LARGE = Unit(0, 10_000, 100, 100)
_AS_ASKED, _SHARE, _COUNT, _WHOLE = 0.0, 1.0, 2.0, 3.0


class Whole(StrEnum):
    """Our own request that nothing leaves, whatever the recipe. vLLM hashes it as the word; a user's word is no member, and is refused."""

    WHOLE = "whole"


# what may stand where a request has its keep
Asked = float | int | Whole | None


@dataclass(frozen=True)
class FrontPruning:
    """The method of a recipe that drops tokens in front of the language model. method: as asked, not bound; config: the model's."""

    method: TokenPruning
    info: ModelInfo
    config: Any
    family: VisionFamily

    def asked(self, keep: Asked = None) -> TokenPruning | None:
        """The bound method, with another `keep` where a request has one; None where nothing leaves. ValueError for what a request cannot ask."""
        if isinstance(keep, Whole):
            # recipes in which keep has no say, or does not mean what leaves here, let all stay as well
            return None
        method = self.method
        if keep is not None:
            if not self.has_keep:
                raise OptionError(f"{method.method_name()}: the recipe fixes how much stays, {KEEP}={keep!r} of a request has no say; leave it out")
            method = _with_keep(method, keep)
        bound = method.bind(self.info)
        stages = bound.stages(self.info)
        if any(stage.layer is not None for stage in stages):
            raise OptionError(f"{method.method_name()}: with {KEEP}={keep!r} tokens would leave inside the language model too, which vLLM cannot")
        return bound if stages else None

    @property
    def has_keep(self) -> bool:
        """Whether `keep` decides how much stays: some recipes fix it otherwise."""
        if KEEP not in self.method.options():
            return False
        counts = []
        for keep in (0.25, 0.5):
            try:
                bound = _with_keep(self.method, keep).bind(self.info)
                counts.append([bound.picture_count(stage, [_LARGE]) for stage in bound.stages(self.info)])
            except OptionError:
                # a share at which the other options make no sense: it decides
                return True
        return counts[0] != counts[1]

    @property
    def typical(self) -> TokenPruning:
        """The method as it drops something: of a recipe that keeps everything, one that a request may ask for."""
        acting = self.asked()
        if acting is None and self.has_keep:
            # not where the other options leave a request nothing else to ask for
            with contextlib.suppress(OptionError):
                acting = self.asked(0.25)
        return acting or self.method.bind(self.info)

    def notices(self) -> list[str]:
        """What a user must know of the way in which vLLM does it."""
        name = self.method.method_name()
        found = [f"{name}: vLLM encodes a picture once for all prompts that show it, so each is pruned as if it were alone in its prompt"]
        if self.method.position_mode == "keep" and not self.info.has_multimodal_rope:
            found.append(f"{name}: vLLM numbers the tokens of a prompt without gaps, as position_mode='compact' does")
        return found

    def pictures(self, modality: Modality, call: Mapping[str, Any]) -> list[Picture]:
        """The pictures of one call of the encoder, whole. call: what the processor made of them, by name; sizes and grids of all, in batches."""
        return self.family.pictures(SimpleNamespace(config=self.config), modality, call, None)     # type: ignore[arg-type]

    def count(self, method: TokenPruning, picture: Picture) -> int:
        """Tokens left of a picture, structural ones included. UnsupportedError where only the method itself will know."""
        found = method.picture_count(method.stages(self.info)[-1], picture.units)
        if found is None:
            raise UnsupportedError(f"{method.method_name()}: how many tokens stay of this picture is known only when it has been seen")
        return found[0]


def _with_keep(method: TokenPruning, keep: float | int) -> TokenPruning:
    changed: Any = {KEEP: keep}
    return dataclasses.replace(method, **changed)


def front_pruning(config: Any, info: ModelInfo, methods: Sequence[Method]) -> FrontPruning | None:
    """The pruning in front of the language model that a recipe asks for; None where it asks for none. UnsupportedError with the reasons.

    config: of the model, from transformers. methods: not bound; those that act behind decoder layers are others' business.
    """
    found = in_front(methods, info)
    if not found:
        return None
    reasons = why_not(config, info, methods)
    if reasons:
        raise UnsupportedError(f"visual tokens cannot leave {info.family} in vLLM as asked:", reasons)
    active = [m for m in found if m.bind(info).stages(info)]
    pruning = [FrontPruning(m, info, config, family_of(config)) for m in active or found]
    # of methods that keep everything, one of which a request may ask for less
    return next((p for p in pruning if active or p.has_keep), None)


def in_front(methods: Sequence[Method], info: ModelInfo) -> list[TokenPruning]:
    """The pruning methods with a stage in front of the language model, or with none at all."""
    found = []
    for method in methods:
        if isinstance(method, TokenPruning):
            stages = method.bind(info).stages(info)
            if not stages or any(stage.layer is None for stage in stages):
                found.append(method)
    return found


def why_not(config: Any, info: ModelInfo, methods: Sequence[Method]) -> list[str]:
    """Why the pruning in front of the language model cannot be had of vLLM with this model; empty where it can, or where none is asked for."""
    found = in_front(methods, info)
    active = [m for m in found if m.bind(info).stages(info)]
    reasons = [f"{m.method_name()}: {reason}" for m in active for reason in _reasons(m.bind(info), config, info)]
    if len(active) > 1:
        names = ", ".join(m.method_name() for m in active)
        reasons.append(f"{names}: how much the second leaves depends on what the first has left, and vLLM wants to know beforehand; give one of them")
    return reasons


def _reasons(method: TokenPruning, config: Any, info: ModelInfo) -> Iterable[str]:
    stages = method.stages(info)
    if any(stage.layer is not None for stage in stages):
        yield "tokens that leave in the middle of the model leave all together or not at all in vLLM"
        return
    if any(o.what == "last_row" for o in method.observe()):
        yield "it looks at the attention of the language model, which runs when vLLM has fixed how many tokens there are"
    try:
        family = family_of(config)
        [picture] = family.pictures(SimpleNamespace(config=config), "image", example(config), None)    # type: ignore[arg-type]
    except UnsupportedError as error:
        yield "; ".join([str(error).splitlines()[0], *error.reasons])
        return
    # of two pictures, for methods that give each unit or picture its own budget must not care about the other one
    two = [dataclasses.replace(u, picture=number) for number in (0, 1) for u in picture.units]
    if method.picture_count(stages[-1], picture.units) is None:
        follow_rows = any(unit.n_structural for unit in picture.units) and method.options().get("newline", "all") != "all"
        hint = "; newline='all' keeps newlines, whatever their rows" if follow_rows else ""
        yield f"how many tokens of a picture stay depends on the picture, and vLLM must know before it has seen it{hint}"
    elif method.picture_count(stages[-1], two) is None:
        yield "pictures of a prompt would share a budget, and vLLM encodes each on its own; budget_scope='image' or 'unit' gives each its own"


def example(config: Any) -> dict[str, Any]:
    """What a processor would make of one picture, sizes and grids without pixels: a call to try a family with."""
    vision = config.vision_config
    side = int(getattr(vision, "image_size", 0) or 0)
    found: dict[str, Any] = {"pixel_values": torch.empty(1, 3, side, side, device="meta")}
    if getattr(config, "image_grid_pinpoints", None):
        # wide, so that the mosaic has a border
        found["image_sizes"] = torch.tensor([[side, 2 * side]])
    if hasattr(vision, "spatial_merge_size"):
        merge = int(vision.spatial_merge_size)
        found["image_grid_thw"] = torch.tensor([[1, 4 * merge, 6 * merge]])
    return found


# --- a request's own keep, on its way from the processor to the model ------------------------------------------------------------


def keep_row(keep: Asked) -> Tensor:
    """(2,) fp64: what a request asks for, that it asks for nothing, or that all stays."""
    if isinstance(keep, Whole):
        return torch.tensor([_WHOLE, 0.0], dtype=torch.float64)
    kind = _AS_ASKED if keep is None else _COUNT if isinstance(keep, int) else _SHARE
    return torch.tensor([kind, float(keep or 0)], dtype=torch.float64)


def kept_of(row: Tensor) -> Asked:
    """What `keep_row` was given."""
    kind, value = row.tolist()
    if kind == _WHOLE:
        return Whole.WHOLE
    return None if kind == _AS_ASKED else int(value) if kind == _COUNT else float(value)
