"""HACK: two kinds of heads, two budgets, two ways to choose (AAAI-26, arXiv 2504.09261), and its decoupled variant HACK++ (arXiv 2606.08302)."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from accel.errors import OptionError, UnsupportedError
from accel.patches._cache import ScaleBudget, attention_received, budget, largest, mean_of_pairs, n_tokens
from accel.patches._head_decoupled import cache_budgets, prior_scores
from accel.patches._head_plan import HeadPlan, make_plan
from accel.patches._head_profile import HeadProfile, ProfileHeader, Shapes, classify, named, read_header, schedule_mismatch
from accel.patches._head_selectors import merge_dropped, query_sample, structural_index
from accel.patches._options import require, require_choice, require_flag, require_keep, require_number, require_whole
from accel.protocols import Calibration, CompressionContext, HeadGroup, HeadNumbers, Method, ModelInfo, Retain

CONTEXTUAL, STRUCTURAL = "contextual", "structural"
# heads that are contextual where no gap between the two kinds stands out (§2.3)
FALLBACK_ALPHA = {"accel_infinity": 0.8}
USUAL_ALPHA = 0.5
logger = logging.getLogger("accel")
# neighbours over which the decoupled variant pools the scores of contextual heads; the paper's number is not known
POOL = 5


@dataclass(frozen=True, kw_only=True)
class HACK(ScaleBudget):
    """Contextual heads, whose queries all read the same few entries, keep few; structural heads keep more, and where things stand (arXiv 2504.09261).

    keep: share of all tokens of all scales that a head keeps as a mean (1 − ρ), as a float; or how many entries, as an int.
    profile: a file that `accel tune hack` measured on this model. Without one all heads are taken for structural ones, with equal budgets.
    plan: a file with types and budgets made of a profile, used as it is; `keep` must be that of the file.
    alpha: share of the heads that are contextual; "auto" finds the gap, see `accel.patches._head_profile.classify`.
    contextual_share: a contextual head keeps this part of the mean; 1 gives all heads the same. "auto": a third or two thirds, see `make_plan`.
    n_queries: how many queries of a scale score the entries; the first knob for quality. None takes all.
    n_protected: how many of the first entries structural heads always keep; None for the first two scales.
    middle_share, recent_policy: what structural heads keep where not even the scale being made fits, see `structural_index`.
    merge: contextual heads merge what they drop at the last scale into the most similar entry they keep, "lookm" by the published average,
        "normalised" by one whose weights sum to 1; None drops. renorm_keys: merged keys get unit length.
    diffuse_guard: heads that attend to nearly everything alike are not taken for contextual ones.
    share_cfg_selection: both rows of a guided picture keep the same entries.
    selectors, protect: for ablations: both kinds choose the "contextual" way, the "structural" one, or "swapped"; structural heads protect nothing.
    mode: "decoupled" is HACK++: `keep` bounds what attention reads, `cache_keep` (None: a third of it) what stays, divided among layers, kinds and
        scales by how much later scales rely on it to the power of `reliance_power`; structural heads choose without a product. It needs a profile.
    allow_other_model: use a profile of other weights of the same sizes.
    """

    needs_training: ClassVar[str | None] = None

    keep: float | int = 0.3
    profile: str | None = field(default=None, metadata={"is_path": True})
    plan: str | None = field(default=None, metadata={"is_path": True})
    alpha: float | Literal["auto"] = "auto"
    contextual_share: float | Literal["auto"] = "auto"
    n_queries: int | None = 32
    n_protected: int | None = None
    middle_share: float = 0.25
    recent_policy: Literal["grid", "score"] = "grid"
    merge: Literal["lookm", "normalised"] | None = "lookm"
    renorm_keys: bool = False
    diffuse_guard: bool = False
    share_cfg_selection: bool = False
    selectors: Literal["own", "contextual", "structural", "swapped"] = "own"
    protect: bool = True
    mode: Literal["coupled", "decoupled"] = "coupled"
    cache_keep: float | int | None = None
    reliance_power: float = 1.0
    allow_other_model: bool = False
    _profile: HeadProfile | None = field(default=None, init=False, repr=False, compare=False)
    _plans: dict[Any, HeadPlan] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("profile", "plan"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            require(self, value is None or isinstance(value, str | os.PathLike), f"{name} must be the path of a file, got {value!r}")
        for name in ("alpha", "contextual_share"):
            if getattr(self, name) != "auto":
                require_number(self, name, 0, 1, above=name == "contextual_share")
        require_whole(self, "n_queries", 1, or_none=True)
        require_whole(self, "n_protected", 0, or_none=True)
        require_number(self, "middle_share", 0, 1)
        require_choice(self, "recent_policy", ("grid", "score"))
        require(self, self.merge in ("lookm", "normalised", None), f"merge must be lookm, normalised or None, got {self.merge!r}")
        for name in ("renorm_keys", "diffuse_guard", "share_cfg_selection", "protect", "allow_other_model"):
            require_flag(self, name)
        require_choice(self, "selectors", ("own", "contextual", "structural", "swapped"))
        require_choice(self, "mode", ("coupled", "decoupled"))
        self._check_decoupled()
        if self.plan is not None:
            given = [name for name in ("alpha", "contextual_share") if getattr(self, name) != "auto"]
            given += ["n_protected"] * (self.n_protected is not None) + ["diffuse_guard"] * self.diffuse_guard
            require(self, not given, f"a plan holds types and budgets already, so {', '.join(given)} would change nothing; give one or the other")

    def _check_decoupled(self) -> None:
        require_number(self, "reliance_power", 0, 100)
        if self.mode == "coupled":
            require(self, self.cache_keep is None, "cache_keep belongs to mode='decoupled'; in the coupled one attention reads what stays")
            require(self, self.reliance_power == 1, "reliance_power belongs to mode='decoupled'; in the coupled one it would change nothing")
            return
        of_coupled = ("middle_share", "recent_policy", "renorm_keys", "selectors")
        given = [name for name in of_coupled if name in self.changed_options()] + ["merge"] * (self.merge == "normalised")
        require(self, not given, f"mode='decoupled' chooses and drops in its own way, so {', '.join(given)} would change nothing; leave it out")
        require(self, self.plan is None, "mode='decoupled' needs a profile, not a plan: its budgets change from scale to scale")
        if self.cache_keep is not None:
            require_keep(self, "cache_keep")
            alike = isinstance(self.cache_keep, int) == isinstance(self.keep, int)
            require(self, not alike or self.cache_keep <= self.keep, f"cache_keep={self.cache_keep!r} is more than attention reads, {self.keep!r}")

    # --- model ----------------------------------------------------------------------------------------------------------------

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: no scales, a profile of other sizes or weights. OptionError for an unreadable file."""
        reasons = super().supports(model, host, others)
        if self.mode == "decoupled" and self.profile is None:
            reasons.append("mode='decoupled' chooses by what a profile knows of each head; `accel tune hack --model … --data …` makes one")
        if reasons or self.profile is None:
            return reasons
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
        """What a user must know: heads that nobody looked at, a profile of another model or scales, budgets too small for the last scale."""
        found, shapes = [], model.scale_shapes
        if self.profile is None and self.plan is None:
            found.append(
                "no head profile: all heads are treated as structural ones, with equal budgets, which is not the published method; "
                "`accel tune hack --model … --data …` makes a profile"
            )
        if self.profile is not None:
            header = read_header(self.profile)
            if self.allow_other_model and header.is_of_other_weights(model):
                found.append(f"the heads' profile was measured on {header.model}, not on this model")
            if self.plan is None and shapes is not None and shapes != header.scale_shapes:
                found.append(_other_scales(header, shapes))
        has_protection = self.mode == "coupled" and self.protect and self.selectors in ("own", STRUCTURAL)
        if shapes is not None and has_protection and (plan := self.bind(model).plan_for(model)).truncates_newest:
            found.append(
                f"structural heads keep {min(plan.structural)} entries, too few for the first {plan.n_protected} and the {plan.n_newest} of the last "
                "scale: they keep a part of those too"
            )
        return "; ".join(found) or None

    def bind(self, model: ModelInfo) -> Self:
        """The method with its profile or plan, checked against the model."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_plans", {})
        if self.profile is not None:
            if reasons := self.supports(model, "", []):
                raise UnsupportedError("hack cannot use this profile", reasons)
            object.__setattr__(bound, "_profile", HeadProfile.load(self.profile))
        if self.plan is not None:
            plan, about = HeadPlan.load(self.plan)
            if reasons := self._plan_mismatches(plan, about, model):
                raise UnsupportedError("hack cannot use this plan", reasons)
            bound._plans[None] = plan
        return bound

    def _plan_mismatches(self, plan: HeadPlan, about: Mapping[str, Any], model: ModelInfo) -> list[str]:
        found, sizes = [], (len(plan.is_contextual), len(plan.is_contextual[0]))
        if sizes != (model.n_layers, model.n_kv_heads):
            found.append(f"{self.plan} is for {sizes[0]} layers of {sizes[1]} heads, this model has {model.n_layers} of {model.n_kv_heads}")
        if self.keep != plan.keep:
            found.append(f"{self.plan} was made for keep={plan.keep!r}, asked for keep={self.keep!r}")
        weights = about.get("weights")
        if not found and not self.allow_other_model and weights and model.fingerprint is not None and model.fingerprint() != weights:
            found.append(f"{self.plan} was made for the weights {weights}, this model has {model.fingerprint()}")
        return found

    def plan_for(self, model: ModelInfo) -> HeadPlan:
        """Types and budgets under the scales of `model`; of a bound method, which knows its heads. UnsupportedError for scales of another kind."""
        shapes = model.scale_shapes
        assert shapes is not None   # `supports` refuses other models
        if None in self._plans:
            plan = self._plans[None]
            if plan.scale_shapes != shapes:
                raise UnsupportedError(f"hack: {self.plan} is for the scales {named(plan.scale_shapes)}, this picture has {named(shapes)}",
                                       ["a plan is for one list of scales; use a profile instead"])  # fmt: skip
            return plan
        if shapes not in self._plans:
            sizes = [height * width for height, width in shapes]
            n_protected = sum(sizes[:2]) if self.n_protected is None else min(self.n_protected, sum(sizes))
            self._plans[shapes] = make_plan(
                self._types(model), scale_shapes=shapes, n_protected=n_protected if self.protect else 0, keep=self.keep, share=self.contextual_share
            )
        return self._plans[shapes]

    def _types(self, model: ModelInfo) -> list[list[bool]]:
        if self._profile is None:
            if self.profile is not None:
                raise OptionError("hack: this method was not bound to a model, so its profile is not loaded; bind(model) gives one that is")
            return [[False] * model.n_kv_heads] * model.n_layers
        shapes, calibrated = model.scale_shapes, self._profile.header.scale_shapes
        assert shapes is not None
        if (mismatch := schedule_mismatch(calibrated, shapes)) is not None:
            raise UnsupportedError(f"hack: {self.profile} does not fit these scales", [mismatch])
        if self.mode == "decoupled" and len(shapes) > len(calibrated):
            raise UnsupportedError(f"hack: {self.profile} does not fit these scales", [
                f"mode='decoupled' needs to know what is read at every scale, and beyond {named(calibrated)} nothing was measured"
            ])  # fmt: skip
        # the usual scales come first, and the notice speaks of them
        if self._plans and shapes != calibrated:
            logger.warning("hack: %s", _other_scales(self._profile.header, shapes))
        fallback = FALLBACK_ALPHA.get(model.family, USUAL_ALPHA)
        return classify(self._profile, alpha=self.alpha, fallback=fallback, has_diffuse_guard=self.diffuse_guard)

    def head_numbers(self, model: ModelInfo) -> list[HeadNumbers]:
        """How much each head moves with its queries, and what it is given."""
        plan = self.plan_for(model)
        kinds = tuple(tuple(CONTEXTUAL if one else STRUCTURAL for one in row) for row in plan.is_contextual)
        budgets = tuple(
            tuple(float((plan.contextual if one else plan.structural)[layer]) for one in row) for layer, row in enumerate(plan.is_contextual)
        )
        found = [HeadNumbers("Budget of each head", f"entries that attention reads at the last scale, of {plan.total}", budgets, kinds)]
        if self._profile is None:
            return found
        sigma = tuple(tuple(row) for row in self._profile.sigma.tolist())
        caption = (
            f"σ, how much attention moves with the query at the last scale; low is contextual. {self._profile.header.data} of "
            f"{self._profile.header.model}. Where there are two kinds of heads, a gap lies between them"
        )
        return [HeadNumbers("Kinds of heads", caption, sigma, kinds, is_log=True), *found]

    # --- budgets --------------------------------------------------------------------------------------------------------------

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        """The contextual heads, and the structural ones."""
        plan = self.plan_for(model)
        contextual, structural = plan.contextual[layer], plan.structural[layer]
        assert model.scale_shapes is not None
        # what attention reads at the last scale is what counts: nothing stays
        if self.mode == "decoupled" and step < len(model.scale_shapes) - 1:
            contextual, structural = self._cache_budgets(model, plan, step, n_entries)[layer]
        return [
            HeadGroup(heads, n, label)
            for heads, n, label in (
                (plan.heads(layer, contextual=True), contextual, CONTEXTUAL), (plan.heads(layer, contextual=False), structural, STRUCTURAL),
            )
            if heads
        ]  # fmt: skip

    def _cache_budgets(self, model: ModelInfo, plan: HeadPlan, step: int, n_entries: int) -> list[tuple[int, int]]:
        assert self._profile is not None        # `supports` asks for it
        whole = n_tokens(model)
        mean = budget(whole, self.keep) / 3 if self.cache_keep is None else float(budget(whole, self.cache_keep))
        return cache_budgets(self._profile.scale_use, plan, step=step, n_entries=n_entries, mean=mean, power=self.reliance_power)

    # --- selection ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The entries of one kind of heads that stay; at the last scale contextual heads merge the others into them."""
        assert ctx.scale_shapes is not None
        if self.mode == "decoupled":
            return self._select_decoupled(ctx, group)
        scores = self._over_pairs(attention_received(ctx, query_sample(ctx, self.n_queries)), ctx)
        chooses_structurally = (group.label == STRUCTURAL) != (self.selectors == "swapped") if self.selectors in ("own", "swapped") else (
            self.selectors == STRUCTURAL
        )
        if chooses_structurally and self.protect:
            return Retain(structural_index(
                ctx, scores, group.budget, n_protected=self._n_first(ctx), middle_share=self.middle_share, recent_policy=self.recent_policy
            ))  # fmt: skip
        index = largest(scores, group.budget)
        if chooses_structurally or self.merge is None or ctx.step < len(ctx.scale_shapes) - 1:
            return Retain(index)
        return Retain(index, merge=merge_dropped(ctx.k, index, is_normalised=self.merge == "normalised"), renorm_keys=self.renorm_keys)

    def _select_decoupled(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """What attention reads now, and what stays for later scales: the best of one score each."""
        assert self._profile is not None        # `supports` asks for it
        if group.label == CONTEXTUAL:
            mean = attention_received(ctx, query_sample(ctx, self.n_queries))
            scores = F.max_pool1d(mean, POOL, stride=1, padding=POOL // 2)
        else:
            scores = prior_scores(ctx, self._profile.scale_use[ctx.layer, list(group.heads)])
        scores = self._over_pairs(scores, ctx)
        index = largest(scores, group.budget)
        n_read = min(self._n_read(ctx, group), scores.shape[2])
        return Retain(index, attend_index=None if n_read == group.budget else largest(scores, n_read))

    def _n_read(self, ctx: CompressionContext, group: HeadGroup) -> int:
        """How many entries attention reads of each of these heads."""
        assert ctx.scale_shapes is not None
        plan = self._plans[ctx.scale_shapes]
        return (plan.contextual if group.label == CONTEXTUAL else plan.structural)[ctx.layer]

    def _n_first(self, ctx: CompressionContext) -> int:
        if None in self._plans:
            return self._plans[None].n_protected
        assert ctx.scale_shapes is not None
        return sum(height * width for height, width in ctx.scale_shapes[:2]) if self.n_protected is None else self.n_protected

    def _over_pairs(self, scores: Tensor, ctx: CompressionContext) -> Tensor:
        return mean_of_pairs(scores, ctx) if self.share_cfg_selection else scores

    @classmethod
    def calibration(cls) -> Calibration | None:
        """Measures the heads of a model while it draws."""
        from accel.patches._hack_calibration import CALIBRATION

        return CALIBRATION


def _other_scales(header: ProfileHeader, shapes: Shapes) -> str:
    return f"the heads were measured with the scales {named(header.scale_shapes)} and are used with {named(shapes)}"
