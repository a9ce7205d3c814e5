"""What a head profile is made of: sums over pictures or prompts, and the method that adds to them as a model runs (kv-compression.md §2.7)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches._cache import CacheBudget, attention_of, evenly_spread
from accel.patches._head_profile import HeadProfile, ProfileHeader, Shapes, named, rank_correlation
from accel.patches._head_selectors import query_sample
from accel.protocols import CacheNeeds, CompressionContext, HeadGroup, ModelInfo, Retain

# rows of the last scale, or of the last quarter of a prompt, over which the variance is taken, and of every scale for what they read; §2.7: 512 do
N_ROWS, N_READING = 512, 128
FEWEST_TOKENS = 64


@dataclass
class Sums:
    """What was measured so far, summed over pictures or prompts; names as in `HeadProfile`. fp64."""

    sigma: Tensor
    sigma_unconditional: Tensor
    entropy: Tensor
    scale_use: Tensor
    mass: Tensor
    n: int = 0
    n_guided: int = 0

    @classmethod
    def of(cls, n_layers: int, n_heads: int, n_scales: int) -> Sums:
        """Nothing yet."""
        sigma, unconditional, entropy, mass = (torch.zeros(n_layers, n_heads, dtype=torch.float64, device="cpu") for _ in range(4))
        return cls(sigma, unconditional, entropy, torch.zeros(n_layers, n_heads, n_scales, n_scales, dtype=torch.float64, device="cpu"), mass)

    def profile(self, info: ModelInfo, about: Mapping[str, str], described: str) -> HeadProfile:
        """The means, with what they were made of. about: model and weights."""
        correlation = rank_correlation(self.sigma, self.sigma_unconditional) if self.n_guided else None
        header = ProfileHeader(
            about["model"], about["weights"], info.n_layers, info.n_kv_heads, info.scale_shapes or (), info.dtype, self.n, correlation, described
        )
        unconditional = (self.sigma_unconditional / self.n_guided).float() if self.n_guided else None
        sigma, entropy, scale_use, mass = ((t / self.n).float() for t in (self.sigma, self.entropy, self.scale_use, self.mass))
        # the host shows no layer with a window, nor one whose keys others read: 0 would call their heads the most contextual of all
        sigma[(self.entropy == 0).all(1)] = -1.0
        return HeadProfile(sigma, entropy, scale_use, header, unconditional, mass if info.scale_shapes is None else None)

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Writes the sums whole or not at all."""
        from safetensors.torch import save_file

        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        draft = path.with_suffix(".new")
        save_file(tensors, draft, metadata={"about": json.dumps(dict(about)), "n": str(self.n), "n_guided": str(self.n_guided)})
        draft.replace(path)

    @classmethod
    def load(cls, path: Path, about: Mapping[str, str]) -> Sums:
        """The sums of a file that was made from the same. OptionError where it was not."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                found, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118, the file is no mapping
            begun, n, n_guided = json.loads(found["about"]), int(found["n"]), int(found["n_guided"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise OptionError(f"hack: {path} is damaged ({error}); remove it to begin anew") from error
        if begun != dict(about):
            raise OptionError(f"hack: {path.parent} holds a profile begun otherwise ({json.dumps(begun)}), asked for {json.dumps(dict(about))}; "
                              "choose another folder")  # fmt: skip
        return cls(**tensors, n=n, n_guided=n_guided)


@dataclass(frozen=True, kw_only=True)
class HeadProfiler(CacheBudget):
    """Keeps everything and adds up what it sees of the heads of one generation or prompt.

    scale_shapes: the scales that `sums` are of; others raise. first_layer: the first that has a cache to look at.
    """

    keep: float | int = 1.0
    sums: Sums = field(compare=False)
    scale_shapes: Shapes | None = None
    first_layer: int = 0

    def needs(self) -> CacheNeeds:
        return CacheNeeds(every_step=True)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        return [HeadGroup(tuple(range(model.n_kv_heads)), n_entries)]

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        raise AssertionError("everything fits")

    @torch.no_grad()
    def observe(self, ctx: CompressionContext, group: HeadGroup) -> None:
        """Adds how much attention moves with the query: at the last scale of conditional rows, or in the last quarter of a prompt."""
        if ctx.scale_shapes is None:
            self._observe_prompt(ctx)
        else:
            self._observe_scale(ctx)

    def _observe_prompt(self, ctx: CompressionContext) -> None:
        """The keys before the first query that counts: all those queries see them, so that causality adds no variance."""
        from accel.kernels.probe import attention_moments

        length = ctx.q.shape[2]
        if length < FEWEST_TOKENS or ctx.k.shape[2] != length:
            raise UnsupportedError("hack cannot measure this prompt", [f"it must come in one pass, of {FEWEST_TOKENS} tokens at least"])
        first = length - length // 4
        rows = first + evenly_spread(length - first, N_ROWS, ctx.q.device)
        found = attention_moments(ctx.q, ctx.k, scale=ctx.scale, is_causal=True, rows=rows, softcap=ctx.softcap)
        begin = int(rows[0])

        def over_group(each: Tensor, reduce: str) -> Tensor:
            # (B, Hq) -> (Hkv,), summed over the batch
            grouped = each.double().view(len(each), ctx.k.shape[1], -1)
            return (grouped.amax(2) if reduce == "max" else grouped.mean(2)).sum(0).cpu()

        self.sums.sigma[ctx.layer] += over_group(found.variance[..., :begin].double().sum(-1), "max")
        self.sums.mass[ctx.layer] += over_group(found.mean[..., :begin].double().sum(-1), "mean")
        self.sums.entropy[ctx.layer] += over_group(found.row_entropy / math.log(length), "mean")
        if ctx.layer == self.first_layer:
            self.sums.n += len(ctx.q)

    def _observe_scale(self, ctx: CompressionContext) -> None:
        """What the conditional rows read by scale, and at the last scale how much that moves with the query."""
        from accel.kernels.probe import attention_moments

        assert ctx.scale_shapes is not None
        assert ctx.entry_scale is not None
        if self.scale_shapes not in (None, ctx.scale_shapes):
            raise UnsupportedError("hack cannot measure this picture", [
                f"it is drawn with the scales {named(ctx.scale_shapes)}, the model's own are {named(self.scale_shapes or ())}"
            ])  # fmt: skip
        n_images = len(ctx.q) // 2 if ctx.has_guidance_pairs else len(ctx.q)
        # (B, H, N): summed over the rows read, which are equally many for all heads
        mean = attention_of(ctx, query_sample(ctx, N_READING)).mean(2)[:n_images].double()
        by_scale = torch.zeros(*mean.shape[:2], len(ctx.scale_shapes), dtype=torch.float64, device=mean.device)
        by_scale.scatter_add_(2, ctx.entry_scale[:n_images], mean)
        self.sums.scale_use[ctx.layer, :, ctx.step] += by_scale.sum(0).cpu()
        if ctx.step < len(ctx.scale_shapes) - 1:
            return
        rows = evenly_spread(ctx.q.shape[2], N_ROWS, ctx.q.device)
        found = attention_moments(ctx.q, ctx.k, scale=ctx.scale, is_causal=False, rows=rows)
        # (B, H)
        sigma, entropy = found.variance.double().sum(-1).cpu(), found.row_entropy.double().cpu() / torch.tensor(ctx.k.shape[2], device="cpu").log()
        self.sums.sigma[ctx.layer] += sigma[:n_images].sum(0)
        self.sums.entropy[ctx.layer] += entropy[:n_images].sum(0)
        self.sums.sigma_unconditional[ctx.layer] += sigma[n_images:].sum(0)
        if ctx.layer == 0:
            self.sums.n += n_images
            self.sums.n_guided += len(ctx.q) - n_images
