"""DyVTE: all visual tokens leave the language model at the layer from which a sample no longer needs them (NeurIPS 2025, arXiv 2411.19628)."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.patches._options import is_whole, require, require_choice, require_number, require_whole
from accel.patches._routers import EXIT, Router, RouterHeader, load_routers, read_header, text_feature
from accel.patches._tokens import answer, position_reasons
from accel.protocols import Calibration, Keep, Method, ModelInfo, PruningContext, Stage, TokenPruning, Unit

_HOW = "give exit_layer=N, which needs no training, or routers=FILE, which `accel tune dyvte --model … --data …` trains for a model"


@dataclass(frozen=True, kw_only=True)
class DyVTE(TokenPruning):
    """All visual tokens leave behind a decoder layer: a fixed one, or the first whose trained router says that the text has read enough.

    exit_layer: the last layer, from 0 on, that still sees visual tokens; the last of the model, or beyond, drops nothing. Fixed: no routers run.
    routers: a file of trained routers, one per candidate layer; each sequence leaves at the first of them that says so, or never. Untrained
        routers are not to be had.
    threshold: of a router's softmax, above which it means exit. None: what was calibrated with the routers.
    candidate_layers: those at which routers are asked; None for all that the file holds.
    batch_mode: what becomes of a sequence that leaves before others of its batch. "mask_then_drop": its visual tokens are hidden, and dropped when
        the last sequence leaves. "ragged": dropped at once; the others' set the length, so that more is moved and nothing more is saved.
    allow_other_model: use routers that were trained for other weights of the same sizes.

    Structural tokens leave as well. Decoding asks no router.
    """

    needs_training: ClassVar[str | None] = "with routers=FILE: `accel tune dyvte --model … --data …` trains them; with exit_layer=N: none"

    exit_layer: int | None = None
    routers: str | None = field(default=None, metadata={"is_path": True})
    threshold: float | None = None
    candidate_layers: tuple[int, ...] | None = None
    batch_mode: Literal["mask_then_drop", "ragged"] = "mask_then_drop"
    allow_other_model: bool = False
    _header: RouterHeader | None = field(default=None, init=False, repr=False, compare=False)
    _weights: dict[int, Router] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self, "exit_layer", 0, or_none=True)
        if isinstance(self.routers, os.PathLike):
            object.__setattr__(self, "routers", os.fspath(self.routers))
        require(self, self.routers is None or isinstance(self.routers, str), f"routers must be the path of a file, got {self.routers!r}")
        if self.threshold is not None:
            require_number(self, "threshold", 0, 1)
        require_choice(self, "batch_mode", ("mask_then_drop", "ragged"))
        require(self, isinstance(self.allow_other_model, bool), f"allow_other_model must be true or false, got {self.allow_other_model!r}")
        layers = self.candidate_layers
        if layers is not None:
            fits = isinstance(layers, list | tuple) and len(layers) > 0 and all(is_whole(i) and i >= 0 for i in layers)
            require(self, fits, f"candidate_layers must be None or a list of layers from 0 on, got {layers!r}")
            # a recipe's list; in the order in which tokens meet them
            object.__setattr__(self, "candidate_layers", tuple(sorted(set(layers))))
        if self.exit_layer is not None:
            learned = [name for name in ("routers", "threshold", "candidate_layers") if getattr(self, name) is not None]
            require(self, not learned, f"exit_layer is a fixed exit, which has no {' and no '.join(learned)}; give one or the other")

    # --- model ----------------------------------------------------------------------------------------------------------------

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: routers of other sizes, or trained for other weights. OptionError for an unreadable file."""
        reasons = position_reasons(self, model)
        if self.routers is None:
            return reasons
        header = read_header(self.routers)
        reasons += header.mismatches(model)
        if not reasons and not self.allow_other_model and header.is_of_other_weights(model):
            assert model.fingerprint is not None
            reasons.append(
                f"{self.routers} was trained for {header.model} (weights {header.fingerprint}), this {model.family} model has weights "
                f"{model.fingerprint()}; train routers for it, or say allow_other_model=True"
            )
        return reasons

    def notice(self, model: ModelInfo) -> str | None:
        """A line for an exit that comes too early to be of use, or routers of another model."""
        if self.exit_layer is not None and self.exit_layer < model.n_layers // 4:
            return (
                f"exit_layer={self.exit_layer} of {model.n_layers} layers lies before the layers that fuse text and picture: expect answers "
                f"that miss what the picture shows; a quarter of the depth ({model.n_layers // 4}) is early"
            )
        if self.routers is not None and self.allow_other_model and (header := read_header(self.routers)).is_of_other_weights(model):
            return f"these routers were trained for {header.model}, not for this model"
        return None

    def bind(self, model: ModelInfo) -> Self:
        """The method with its routers. UnsupportedError where neither routers nor an exit layer were given."""
        if self.exit_layer is not None:
            return self
        if self.routers is None:
            raise UnsupportedError("dyvte was not told where visual tokens leave", [_HOW])
        if reasons := self.supports(model, "", []):
            raise UnsupportedError("dyvte cannot use these routers", reasons)
        bound = copy.copy(self)
        object.__setattr__(bound, "_header", read_header(self.routers))
        object.__setattr__(bound, "_weights", load_routers(self.routers, self.candidate_layers))
        return bound

    def stages(self, model: ModelInfo) -> list[Stage]:
        """Before the layer behind each candidate; none behind the last layer, where nothing is left to save."""
        if self.exit_layer is not None:
            return [Stage("layer", self.exit_layer + 1, is_known_ahead=True)] if self.exit_layer < model.n_layers - 1 else []
        return [Stage("layer", i + 1, needs_learned_choice=True) for i in sorted(self._weights) if i < model.n_layers - 1]

    def count(self, stage: Stage, units: Sequence[Unit]) -> list[int] | None:
        """Nothing is left of any unit behind a fixed exit; routers decide when the model runs."""
        return None if self.exit_layer is None else [0] * len(units)

    # --- selection ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: PruningContext) -> Keep | None:
        """Nothing but text once every sequence with a picture has left; until then, what is hidden or dropped of those that have."""
        if not ctx.units:
            return None
        is_image = ctx.is_visual | ctx.is_structural
        nothing = answer(torch.zeros_like(is_image))
        if self.exit_layer is not None:
            return nothing
        has_image = is_image.any(1)
        before = ctx.state.get("has_left", torch.zeros_like(has_image))
        has_left = before | (self._exit_share(ctx, is_image) > self._threshold()) & has_image
        ctx.state["has_left"] = has_left
        # the only wait for the device
        is_new, is_all = torch.stack([(has_left & ~before).any(), (has_left | ~has_image).all()]).tolist()
        if not is_new:
            return None
        if is_all:
            return nothing
        if self.batch_mode == "ragged":
            return answer(is_image & ~has_left[:, None])
        everything = answer(is_image)
        return Keep(everything.index, everything.ok, hidden=is_image & has_left[:, None])

    def _threshold(self) -> float:
        assert self._header is not None
        return self._header.threshold if self.threshold is None else self.threshold

    def _exit_share(self, ctx: PruningContext, is_image: Tensor) -> Tensor:
        """(B,) fp32: what the router of the layer just run gives to the exit. On the device of the features, where it then stays."""
        assert ctx.stage.layer is not None
        layer, device = ctx.stage.layer - 1, ctx.features.device
        router = self._weights[layer]
        if router.w1.device != device:
            router = self._weights[layer] = router.to(device)
        return router.logits(text_feature(ctx.features, ctx.is_text, is_image)).softmax(-1)[:, EXIT]

    @classmethod
    def calibration(cls) -> Calibration | None:
        """Trains routers for a model on questions about pictures with answers."""
        from accel.patches._dyvte_training import CALIBRATION

        return CALIBRATION
