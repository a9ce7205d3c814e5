"""Methods whose heads keep different numbers of entries, as a profile of the heads says (kv-compression.md §2.3, §10)."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches._cache import CacheBudget, budget, mean_of_pairs, n_tokens
from accel.patches._head_plan import HeadPlan, make_plan
from accel.patches._head_profile import DIFFUSE, HeadProfile, ProfileHeader, Shapes, classify, named, read_header, schedule_mismatch, standing_gap
from accel.patches._options import require, require_flag, require_number
from accel.protocols import UNLIMITED, CompressionContext, HeadGroup, HeadNumbers, Method, ModelInfo

CONTEXTUAL, STRUCTURAL = "contextual", "structural"
# heads that are contextual where no gap between the two kinds stands out (§2.3)
FALLBACK_ALPHA = {"accel_infinity": 0.8}
USUAL_ALPHA = 0.5
# of prompts of different lengths, that a bound method remembers
MOST_PLANS = 256

logger = logging.getLogger("accel")


@dataclass(frozen=True, kw_only=True)
class HeadBudgets(CacheBudget):
    """Base of the methods that give all heads the same, or with a profile less to contextual heads and more to structural ones.

    profile: a file that `accel tune hack` measured on this model.
    alpha: share of the heads that are contextual; "auto" takes the widest gap between the heads' measured spreads, or the
        usual share where no gap stands out.
    contextual_share: a contextual head keeps this part of the mean; 1 gives all heads the same. "auto": a third where fewer than 65 % of the
        heads are contextual, else two thirds; less where structural heads could not hold the last scale.
    diffuse_guard: heads that attend to nearly everything alike are not taken for contextual ones.
    allow_other_model: use a profile of other weights of the same sizes.
    """

    profile: str | None = field(default=None, metadata={"is_path": True})
    alpha: float | Literal["auto"] = "auto"
    contextual_share: float | Literal["auto"] = "auto"
    diffuse_guard: bool = False
    allow_other_model: bool = False
    _profile: HeadProfile | None = field(default=None, init=False, repr=False, compare=False)
    _plans: dict[Any, HeadPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.profile, os.PathLike):
            object.__setattr__(self, "profile", os.fspath(self.profile))
        require(self, self.profile is None or isinstance(self.profile, str), f"profile must be the path of a file, got {self.profile!r}")
        for name in ("alpha", "contextual_share"):
            if getattr(self, name) != "auto":
                require_number(self, name, 0, 1, above=name == "contextual_share")
        for name in ("diffuse_guard", "allow_other_model"):
            require_flag(self, name)

    # --- model ----------------------------------------------------------------------------------------------------------------

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: a profile of other sizes or weights. OptionError for an unreadable file."""
        if self.profile is None:
            return []
        header = read_header(self.profile)
        reasons = header.mismatches(model)
        if not reasons and not self.allow_other_model and header.is_of_other_weights(model):
            assert model.fingerprint is not None
            reasons.append(
                f"{self.profile} was measured on {header.model} (weights {header.fingerprint}), this {model.family} model has weights "
                f"{model.fingerprint()}; make a profile of it, or say allow_other_model=True"
            )
        return reasons

    def notice(self, model: ModelInfo) -> str | None:
        """A line for a profile of another model, or of other scales."""
        if self.profile is None:
            return None
        found, header, shapes = [], read_header(self.profile), model.scale_shapes
        if self.allow_other_model and header.is_of_other_weights(model):
            found.append(f"the heads' profile was measured on {header.model}, not on this model")
        if shapes is not None and shapes != header.scale_shapes:
            found.append(_other_scales(header, shapes))
        if not header.mismatches(model):
            found += self._doubts(model, HeadProfile.load(self.profile))
        return "; ".join(found) or None

    def _doubts(self, model: ModelInfo, profile: HeadProfile) -> list[str]:
        """What speaks against uneven budgets: heads of one kind, contextual heads that attend to nearly everything."""
        if self.contextual_share == 1:
            return []
        measured = profile.sigma[(profile.sigma >= 0).all(1)]
        fallback = FALLBACK_ALPHA.get(model.family, USUAL_ALPHA)
        found = []
        if self.alpha == "auto" and standing_gap(measured.flatten(), profile.window) is None:
            found.append(
                f"the heads show no two kinds: the {fallback:.0%} with the lowest σ are taken for contextual; contextual_share=1 treats all alike"
            )
        types = classify(profile, alpha=self.alpha, fallback=fallback, has_diffuse_guard=self.diffuse_guard)
        entropy = [profile.entropy[layer, head] for layer, row in enumerate(types) for head, one in enumerate(row) if one]
        if n := sum(float(value) > DIFFUSE for value in entropy):
            found.append(
                f"{n} of {len(entropy)} contextual heads attend to nearly everything alike and lose most by small budgets; diffuse_guard spares them"
            )
        return found

    def bind(self, model: ModelInfo) -> Self:
        """The method with its profile, checked against the model."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_plans", {})
        if self.profile is not None:
            if reasons := self.supports(model, "", []):
                raise UnsupportedError(f"{self.method_name()} cannot use this profile", reasons)
            object.__setattr__(bound, "_profile", HeadProfile.load(self.profile))
        return bound

    # --- budgets --------------------------------------------------------------------------------------------------------------

    def n_first(self, shapes: Shapes | None) -> int:
        """How many of the first entries structural heads must have room for."""
        return 0

    def n_window(self) -> int:
        """How many of a decoder's newest entries structural heads should have room for."""
        return 1

    def plan_for(self, model: ModelInfo, n_entries: int = 0) -> HeadPlan:
        """Types and budgets; of a bound method, which knows its heads. UnsupportedError for scales that the profile is not of.

        n_entries: of a decoder's prompt; scales know their own.
        """
        shapes = model.scale_shapes
        if shapes is None:
            # before the prompt is made longer on paper: a share is one of the prompt
            mean = self._mean(model, n_entries)
            n_entries = max(n_entries, mean)
            # a prompt counts as two scales, what came before and the window
            window = min(self.n_window(), n_entries)
            shapes = ((1, n_entries - window), (1, window)) if window < n_entries else ((1, n_entries),)
        key = shapes, model.n_layers, model.n_kv_heads
        plan = self._plans.get(key)
        if plan is None:
            n_first, types = min(self.n_first(model.scale_shapes), n_tokens(model, n_entries)), self._types(model)
            keep = self.keep if model.scale_shapes is not None else max(mean, min(n_first + 1, n_entries))
            plan = make_plan(types, scale_shapes=shapes, n_protected=n_first, keep=keep, share=self.contextual_share)
            self._remember(key, plan)
        return plan

    def _remember(self, key: Any, plan: HeadPlan) -> None:
        # prompts of ever new lengths, from several threads; what is asked again is made again. The plan of a file has no lengths, and stays
        if len(self._plans) >= MOST_PLANS:
            for old in [old for old in list(self._plans) if old is not None][: len(self._plans) - MOST_PLANS + 1]:
                self._plans.pop(old, None)
        self._plans[key] = plan

    def _mean(self, model: ModelInfo, n_entries: int) -> int:
        """Entries that a head keeps as a mean."""
        if model.scale_shapes is not None:
            return budget(n_tokens(model, n_entries), self.keep)
        # a count is a count and the least a least however short the prompt is: what is written behind it fills them
        asked = self.keep if isinstance(self.keep, int) else budget(n_entries, self.keep)
        return max(asked, self.min_entries)

    def _types(self, model: ModelInfo) -> list[list[bool]]:
        if self._profile is None:
            if self.profile is not None:
                name = self.method_name()
                raise OptionError(f"{name}: this method was not bound to a model, so its profile is not loaded; bind(model) gives one that is")
            return [[False] * model.n_kv_heads] * model.n_layers
        shapes, calibrated = model.scale_shapes, self._profile.header.scale_shapes
        if shapes is not None:
            if (mismatch := schedule_mismatch(calibrated, shapes)) is not None:
                raise UnsupportedError(f"{self.method_name()}: {self.profile} does not fit these scales", [mismatch])
            # the usual scales come first, and the notice speaks of them
            if self._plans and shapes != calibrated:
                logger.warning("%s: %s", self.method_name(), _other_scales(self._profile.header, shapes))
        fallback = FALLBACK_ALPHA.get(model.family, USUAL_ALPHA)
        return classify(self._profile, alpha=self.alpha, fallback=fallback, has_diffuse_guard=self.diffuse_guard)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        """All heads with one budget, or the contextual heads and the structural ones."""
        every = tuple(range(model.n_kv_heads))
        if model.scale_shapes is None and self.keeps_all:
            return [HeadGroup(every, UNLIMITED)]
        if self.profile is None:
            return [HeadGroup(every, self._mean(model, n_entries))]
        return self.groups_of(self.plan_for(model, n_entries), layer)

    def groups_of(self, plan: HeadPlan, layer: int, budgets: tuple[int, int] | None = None) -> list[HeadGroup]:
        """The two kinds of heads of a layer. budgets: of a contextual and of a structural head, where not those of the plan."""
        contextual, structural = budgets or (plan.contextual[layer], plan.structural[layer])
        both = ((True, contextual, CONTEXTUAL), (False, structural, STRUCTURAL))
        return [HeadGroup(heads, n, label) for kind, n, label in both if (heads := plan.heads(layer, contextual=kind))]

    def head_numbers(self, model: ModelInfo) -> list[HeadNumbers]:
        """How much each head moves with its queries, and in a next-scale model what it is given."""
        if self._profile is None:
            return []
        types = self._types(model)
        # layers that were not measured have no types
        kinds = tuple(tuple(CONTEXTUAL if one else STRUCTURAL for one in row) for row in types if row)
        header = self._profile.header
        caption = (
            f"σ, how much attention moves with the query; low is contextual. {header.data} of {header.model}. Where there are two kinds of heads, "
            "a gap lies between them"
        )
        sigma = tuple(tuple(row) for row, known in zip(self._profile.sigma.tolist(), types, strict=True) if known)
        found = [HeadNumbers("Kinds of heads", caption, sigma, kinds, is_log=True)]
        if model.scale_shapes is None:
            return found
        plan = self.plan_for(model)
        budgets = tuple(tuple(float((plan.contextual if one else plan.structural)[layer]) for one in row) for layer, row in enumerate(types))
        return [*found, HeadNumbers("Budget of each head", f"entries that attention reads at the last scale, of {plan.total}", budgets, kinds)]


@dataclass(frozen=True, kw_only=True)
class ScoredCache(HeadBudgets):
    """Base of the methods that rank entries by attention.

    share_cfg_selection: the conditional and the unconditional row of one image keep the same entries, by the mean of their scores.
    """

    share_cfg_selection: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flag(self, "share_cfg_selection")

    def over_pairs(self, scores: Tensor, ctx: CompressionContext) -> Tensor:
        """The scores (B, …), where the option says so with the mean of each guidance pair in both of its rows."""
        return mean_of_pairs(scores, ctx) if self.share_cfg_selection else scores


def _other_scales(header: ProfileHeader, shapes: Shapes) -> str:
    return f"the heads were measured with the scales {named(header.scale_shapes)} and are used with {named(shapes)}"
