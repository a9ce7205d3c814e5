"""HACK: two kinds of heads, two budgets, two ways to choose (AAAI-26, arXiv 2504.09261), and its decoupled variant HACK++ (arXiv 2606.08302)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch.nn import functional as F

from accel.errors import OptionError, UnsupportedError
from accel.patches._cache import attention_received, budget, largest, n_tokens, newest, scales_needed
from accel.patches._head_budgets import CONTEXTUAL, STRUCTURAL, ScoredCache
from accel.patches._head_decoupled import cache_budgets, prior_scores
from accel.patches._head_plan import HeadPlan
from accel.patches._head_profile import Shapes, named
from accel.patches._head_selectors import merge_dropped, query_sample, structural_index
from accel.patches._options import require, require_choice, require_flag, require_keep, require_number, require_whole
from accel.protocols import CacheNeeds, Calibration, CompressionContext, HeadGroup, HeadNumbers, Method, ModelInfo, Retain

# neighbours over which scores of contextual heads are pooled in decoders (§10.3) and in the decoupled variant, whose paper's number is not known
POOL = 5
SINKS = 4


@dataclass(frozen=True, kw_only=True)
class HACK(ScoredCache):
    """Contextual heads, whose queries all read the same few entries, keep few; structural heads keep more, and where things stand (arXiv 2504.09261).

    keep: share of all tokens of all scales, or of a decoder's prompt, that a head keeps as a mean (1 − ρ), as a float; or how many, as an int.
    profile: a file that `accel tune hack` measured on this model. Without one all heads are taken for structural ones, with equal budgets.
    plan: a file with types and budgets made of a profile for one list of scales, used as it is; `keep` must be that of the file.
    n_queries: how many queries of a scale, or of the newest of a decoder, score the entries; the first knob for quality. None takes all.
    n_protected: how many of the first entries structural heads always keep; None for the first two scales, in a decoder 4.
    window: of a decoder, how many of the newest entries all heads keep; small budgets give these at most half.
    middle_share, recent_policy: where the budget does not hold the whole scale being made, structural heads give middle_share of what the first
        entries leave to those between, and of the scale keep an even "grid" filled up by score, or its best by "score".
    merge: contextual heads merge what they drop at the last scale into the most similar entry they keep, "lookm" by the published average,
        "normalised" by one whose weights sum to 1; None drops. renorm_keys: merged keys get unit length. Decoders drop.
    selectors, protect: for ablations: both kinds choose the "contextual" way, the "structural" one, or "swapped"; structural heads protect nothing.
    mode: "decoupled" is HACK++: `keep` bounds what attention reads, `cache_keep` (None: a third of it) what stays, divided among layers, kinds and
        scales by how much later scales rely on it to the power of `reliance_power`; structural heads choose without a product. It needs a profile.
        What was dropped cannot be read again, so that attention may find less than `keep`.
    """

    # for `accel ls`: `notice` says what a user of this very model must know
    needs_training: ClassVar[str | None] = "with profile=FILE: `accel tune hack --model … --data …` measures the heads; without one all are alike"

    keep: float | int = 0.3
    plan: str | None = field(default=None, metadata={"is_path": True})
    n_queries: int | None = 32
    n_protected: int | None = None
    window: int = 64
    middle_share: float = 0.25
    recent_policy: Literal["grid", "score"] = "grid"
    merge: Literal["lookm", "normalised"] | None = "lookm"
    renorm_keys: bool = False
    selectors: Literal["own", "contextual", "structural", "swapped"] = "own"
    protect: bool = True
    mode: Literal["coupled", "decoupled"] = "coupled"
    cache_keep: float | int | None = None
    reliance_power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.plan, os.PathLike):
            object.__setattr__(self, "plan", os.fspath(self.plan))
        require(self, self.plan is None or isinstance(self.plan, str), f"plan must be the path of a file, got {self.plan!r}")
        require_whole(self, "n_queries", 1, or_none=True)
        require_whole(self, "n_protected", 0, or_none=True)
        require_whole(self, "window", 1)
        require_number(self, "middle_share", 0, 1)
        require_choice(self, "recent_policy", ("grid", "score"))
        require(self, self.merge in ("lookm", "normalised", None), f"merge must be lookm, normalised or None, got {self.merge!r}")
        for name in ("renorm_keys", "protect"):
            require_flag(self, name)
        require_choice(self, "selectors", ("own", "contextual", "structural", "swapped"))
        require_choice(self, "mode", ("coupled", "decoupled"))
        self._check_decoupled()
        if self.plan is not None:
            why = "a plan holds types and budgets that were made of a profile already; give one or the other"
            require(self, self.profile is None, f"both plan={self.plan!r} and profile={self.profile!r} were given, and {why}")
            given = [name for name in ("alpha", "contextual_share") if getattr(self, name) != "auto"]
            given += ["n_protected"] * (self.n_protected is not None) + ["diffuse_guard"] * self.diffuse_guard
            require(self, not given, f"a plan holds types and budgets already, so {', '.join(given)} would change nothing; give one or the other")

    def _check_decoupled(self) -> None:
        require_number(self, "reliance_power", 0, 100)
        if self.mode == "coupled":
            require(self, self.cache_keep is None, "cache_keep belongs to mode='decoupled'; in the coupled one attention reads what stays")
            require(self, self.reliance_power == 1, "reliance_power belongs to mode='decoupled'; in the coupled one it would change nothing")
            return
        of_coupled = ("middle_share", "recent_policy", "renorm_keys", "selectors", "protect", "n_protected")
        given = [name for name in of_coupled if name in self.changed_options()] + ["merge"] * (self.merge == "normalised")
        require(self, not given, f"mode='decoupled' chooses and drops in its own way, so {', '.join(given)} would change nothing; leave it out")
        require(self, self.plan is None, "mode='decoupled' needs a profile, not a plan: its budgets change from scale to scale")
        if self.cache_keep is not None:
            require_keep(self, "cache_keep")
            alike = isinstance(self.cache_keep, int) == isinstance(self.keep, int)
            require(self, not alike or self.cache_keep <= self.keep, f"cache_keep={self.cache_keep!r} is more than attention reads, {self.keep!r}")

    # --- model ----------------------------------------------------------------------------------------------------------------

    def supports(self, model: ModelInfo, host: str, others: Sequence[Method]) -> list[str]:
        """Reasons why it cannot work on `model`: a profile of other sizes or weights, what belongs to scales on a decoder. OptionError for an
        unreadable file.
        """
        of_scales = ["mode='decoupled'"] * (self.mode == "decoupled") + ["a plan file"] * (self.plan is not None)
        if of_scales and (reasons := scales_needed(model)):
            return [f"{', '.join(of_scales)}: {reason}" for reason in reasons]
        if self.mode == "decoupled" and self.profile is None:
            return ["mode='decoupled' chooses by what a profile knows of each head; `accel tune hack --model … --data …` makes one"]
        return super().supports(model, host, others)

    def notice(self, model: ModelInfo) -> str | None:
        """What a user must know: heads that nobody looked at, a profile of another model or scales, budgets too small for the last scale."""
        found, shapes = [], model.scale_shapes
        if self.profile is None and self.plan is None:
            found.append(
                "no head profile: all heads are treated as structural ones, with equal budgets, which is not the published method; "
                "`accel tune hack --model … --data …` makes a profile"
            )
        if self.plan is None and (of_profile := super().notice(model)) is not None:
            found.append(of_profile)
        has_protection = self.mode == "coupled" and self.protect and self.selectors in ("own", STRUCTURAL)
        plan = self._usual_plan(model) if shapes is not None and has_protection else None
        if plan is not None and plan.truncates_newest:
            found.append(
                f"structural heads keep {min(plan.structural)} entries, too few for the first {plan.n_protected} and the {plan.n_newest} of the last "
                "scale: they keep a part of those too"
            )
        return "; ".join(found) or None

    def _usual_plan(self, model: ModelInfo) -> HeadPlan | None:
        """The plan of the model's usual scales; None where the method is not for those, which the host tells when it comes to them."""
        bound = self.bind(model)
        try:
            return bound.plan_for(model)
        except UnsupportedError:
            return None

    def bind(self, model: ModelInfo) -> Self:
        """The method with its profile or plan, checked against the model."""
        bound = super().bind(model)
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

    # --- budgets --------------------------------------------------------------------------------------------------------------

    def n_first(self, shapes: Shapes | None) -> int:
        if not self.protect:
            return 0
        if self.n_protected is not None:
            return self.n_protected
        return SINKS if shapes is None else sum(height * width for height, width in shapes[:2])

    def n_window(self) -> int:
        return self.window

    def plan_for(self, model: ModelInfo, n_entries: int = 0) -> HeadPlan:
        """Types and budgets; of a bound method, which knows its heads. UnsupportedError for scales that profile or plan are not of."""
        shapes = model.scale_shapes
        if self.plan is not None and None not in self._plans:
            raise OptionError("hack: this method was not bound to a model, so its plan is not loaded; bind(model) gives one that is")
        if None in self._plans:
            plan = self._plans[None]
            if plan.scale_shapes != shapes:
                asked = "none" if shapes is None else named(shapes)
                raise UnsupportedError(f"hack: {self.plan} is for the scales {named(plan.scale_shapes)}, this picture has {asked}",
                                       ["a plan is for one list of scales; use a profile instead"])  # fmt: skip
            return plan
        if self.mode == "decoupled" and self._profile is not None and shapes is not None:
            calibrated = self._profile.header.scale_shapes
            if len(shapes) > len(calibrated) and shapes[: len(calibrated)] == calibrated:
                raise UnsupportedError(f"hack: {self.profile} does not fit these scales", [
                    f"mode='decoupled' needs to know what is read at every scale, and beyond {named(calibrated)} nothing was measured"
                ])  # fmt: skip
        return super().plan_for(model, n_entries)

    def head_numbers(self, model: ModelInfo) -> list[HeadNumbers]:
        """How much each head moves with its queries, and what it is given; of a plan file alone, nothing."""
        return [] if self.plan is not None else super().head_numbers(model)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        """The contextual heads, and the structural ones."""
        if model.scale_shapes is None and self.keeps_all:
            return super().groups(model, layer, step=step, n_entries=n_entries)
        plan = self.plan_for(model, n_entries)
        # what attention reads at the last scale is what counts: nothing stays
        if self.mode == "decoupled" and model.scale_shapes is not None and step < len(model.scale_shapes) - 1:
            return self.groups_of(plan, layer, self._cache_budgets(model, plan, step, n_entries)[layer])
        return self.groups_of(plan, layer)

    def _cache_budgets(self, model: ModelInfo, plan: HeadPlan, step: int, n_entries: int) -> list[tuple[int, int]]:
        assert self._profile is not None        # `supports` asks for it
        whole = n_tokens(model, n_entries)
        mean = budget(whole, self.keep) / 3 if self.cache_keep is None else float(budget(whole, self.cache_keep))
        return cache_budgets(self._profile.scale_use, plan, step=step, n_entries=n_entries, mean=mean, power=self.reliance_power)

    def needs(self) -> CacheNeeds:
        return CacheNeeds(n_queries=self.n_queries or 0)

    # --- selection ------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """The entries of one kind of heads that stay; at the last scale contextual heads merge the others into them."""
        chooses_structurally = self._chooses_structurally(group)
        if ctx.scale_shapes is None:
            return self._select_of_prompt(ctx, group, is_pooled=not chooses_structurally)
        if self.mode == "decoupled":
            return self._select_decoupled(ctx, group)
        scores = self.over_pairs(attention_received(ctx, query_sample(ctx, self.n_queries)), ctx)
        if chooses_structurally and self.protect:
            return Retain(structural_index(
                ctx, scores, group.budget, n_protected=self._n_first(ctx), middle_share=self.middle_share, recent_policy=self.recent_policy
            ))  # fmt: skip
        index = largest(scores, group.budget)
        if chooses_structurally or self.merge is None or ctx.step < len(ctx.scale_shapes) - 1:
            return Retain(index)
        return Retain(index, merge=merge_dropped(ctx.k, index, is_normalised=self.merge == "normalised"), renorm_keys=self.renorm_keys)

    def _chooses_structurally(self, group: HeadGroup) -> bool:
        if self.selectors in ("own", "swapped"):
            return (group.label == STRUCTURAL) != (self.selectors == "swapped")
        return self.selectors == STRUCTURAL

    def _select_of_prompt(self, ctx: CompressionContext, group: HeadGroup, *, is_pooled: bool) -> Retain:
        """Sinks, the window, and the entries that the newest queries attend to; contextual heads keep the neighbours of those too (§10.3)."""
        n = ctx.q.shape[2]
        scores = attention_received(ctx, torch.arange(max(0, n - (self.n_queries or n)), n, device=ctx.q.device))
        if is_pooled:
            scores = F.max_pool1d(scores, POOL, stride=1, padding=POOL // 2)
        stays = None
        if self.protect:
            n_first = min(self.n_first(None), max(0, group.budget - 1))
            is_first = ctx.valid & (ctx.valid.cumsum(-1) <= n_first)
            stays = is_first | newest(ctx, min(self.window, group.budget // 2))
        return Retain(self.best(ctx, scores, group.budget, forced=stays))

    def _select_decoupled(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        """What attention reads now, and what stays for later scales: the best of one score each."""
        assert self._profile is not None        # `supports` asks for it
        if group.label == CONTEXTUAL:
            mean = attention_received(ctx, query_sample(ctx, self.n_queries))
            scores = F.max_pool1d(mean, POOL, stride=1, padding=POOL // 2)
        else:
            scores = prior_scores(ctx, self._profile.scale_use[ctx.layer, list(group.heads)])
        scores = self.over_pairs(scores, ctx)
        index = largest(scores, group.budget)
        n_read = min(self._n_read(ctx, group), scores.shape[2])
        return Retain(index, attend_index=None if n_read == group.budget else largest(scores, n_read))

    def _n_read(self, ctx: CompressionContext, group: HeadGroup) -> int:
        """How many entries attention reads of each of these heads."""
        assert ctx.scale_shapes is not None
        plan = next(plan for key, plan in self._plans.items() if key is not None and key[0] == ctx.scale_shapes)
        return (plan.contextual if group.label == CONTEXTUAL else plan.structural)[ctx.layer]

    def _n_first(self, ctx: CompressionContext) -> int:
        return self._plans[None].n_protected if None in self._plans else self.n_first(ctx.scale_shapes)

    @classmethod
    def calibration(cls) -> Calibration | None:
        """Measures the heads of a model while it draws, or reads."""
        from accel.patches._hack_calibration import CALIBRATION

        return CALIBRATION
