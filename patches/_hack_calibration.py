"""Measures the heads of a next-scale model while it draws, and plans their budgets (kv-compression.md §2.2): `accel tune hack`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import OptionError, UnsupportedError
from accel.patches._cache import CacheBudget, attention_of, evenly_spread
from accel.patches._head_profile import HeadProfile, ProfileHeader, Shapes, named, rank_correlation
from accel.patches._head_selectors import query_sample
from accel.patches.hack import HACK
from accel.protocols import CacheNeeds, Calibration, CompressionContext, HeadGroup, ModelInfo, Retain
from accel.recipe import Recipe

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel

N_SAMPLES = 50
# rows of the last scale over which the variance is taken, and of every scale for what they read; §2.7: 512 are enough
N_ROWS, N_READING = 512, 128
# so that calibrations with neighbouring seeds share no picture, and none with the task images, which counts up from 0 in the same steps
STRIDE, FIRST_SEED = 1_000_003, 500_000


@dataclass
class Sums:
    """What was measured so far, summed over pictures; names as in `HeadProfile`. fp64."""

    sigma: Tensor
    sigma_unconditional: Tensor
    entropy: Tensor
    scale_use: Tensor
    n: int = 0
    n_guided: int = 0

    @classmethod
    def of(cls, n_layers: int, n_heads: int, n_scales: int) -> Sums:
        """Nothing yet."""
        sigma, unconditional, entropy = (torch.zeros(n_layers, n_heads, dtype=torch.float64) for _ in range(3))
        return cls(sigma, unconditional, entropy, torch.zeros(n_layers, n_heads, n_scales, n_scales, dtype=torch.float64))

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
    """Keeps everything and adds up what it sees of the heads of one generation. scale_shapes: the scales that `sums` are of; others raise."""

    keep: float | int = 1.0
    sums: Sums = field(compare=False)
    scale_shapes: Shapes | None = None

    def needs(self) -> CacheNeeds:
        return CacheNeeds(every_step=True)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        return [HeadGroup(tuple(range(model.n_kv_heads)), n_entries)]

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        raise AssertionError("everything fits")

    @torch.no_grad()
    def observe(self, ctx: CompressionContext, group: HeadGroup) -> None:
        """Adds what the conditional rows read by scale, and at the last scale how much that moves with the query."""
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
        sigma, entropy = found.variance.double().sum(-1).cpu(), found.row_entropy.double().cpu() / torch.tensor(ctx.k.shape[2]).log()
        self.sums.sigma[ctx.layer] += sigma[:n_images].sum(0)
        self.sums.entropy[ctx.layer] += entropy[:n_images].sum(0)
        self.sums.sigma_unconditional[ctx.layer] += sigma[n_images:].sum(0)
        if ctx.layer == 0:
            self.sums.n += n_images
            self.sums.n_guided += len(ctx.q) - n_images


def profile_heads(
    loaded: LoadedModel, data: Any, folder: Path, *, fixed: Mapping[str, Any] | None = None, seed: int = 0, show_progress: bool = True,
    n_samples: int = N_SAMPLES,
) -> HACK:  # fmt: skip
    """HACK with a profile of this model; leaves `profile.safetensors`, `plan.json` and `recipe.yaml` in `folder`.

    data: "classes", which are drawn in turn; for a model that draws texts a file of their features (`accel.evals.artists.save_features`).
    fixed: options of the result. A killed call goes on where it was: `profile.partial.safetensors` is written behind every picture. A folder with a
    whole profile gets another plan and recipe. OptionError where the folder holds a profile that was made or begun otherwise.
    """
    from accel.patching import host_for

    fixed = dict(fixed or {})
    if wrong := [name for name in ("profile", "plan") if fixed.get(name) is not None]:
        raise OptionError(f"hack: this makes the profile; leave out {', '.join(wrong)}")
    if n_samples < 1:
        raise OptionError(f"hack: a profile needs at least one picture, got n_samples={n_samples}")
    # a wrong option is told before hours of drawing, not behind them
    HACK(**fixed)
    info = host_for(loaded.model).describe(loaded.model)
    if info.scale_shapes is None:
        raise UnsupportedError(f"hack cannot measure {loaded.name}", ["it is no next-scale model; VAR and Infinity are, and small-var ships"])
    # every host of such models tells weights apart
    assert info.fingerprint is not None
    pictures = _pictures(loaded, data, seed, n_samples)
    about = {
        "model": loaded.name, "weights": info.fingerprint(), "dtype": info.dtype, "data": _named_data(data), "seed": str(seed),
        "samples": str(n_samples), "scales": str(info.scale_shapes),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.safetensors"
    profile = _finished(path, about) if path.exists() else _measured(loaded, pictures, folder, info, about, show_progress=show_progress)
    return _recipe(folder, HACK(profile=str(path), **fixed), profile, info)


def _measured(
    loaded: LoadedModel, pictures: list[tuple[Any, int]], folder: Path, info: ModelInfo, about: Mapping[str, str], *, show_progress: bool
) -> HeadProfile:
    """Draws the pictures that are not yet in the sums of the folder, and writes the profile there."""
    import accel
    from accel.evals.latency import quiet_notices
    from accel.tune import progress_bar

    assert info.scale_shapes is not None
    partial = folder / "profile.partial.safetensors"
    sums = Sums.load(partial, about) if partial.exists() else Sums.of(info.n_layers, info.n_kv_heads, len(info.scale_shapes))
    profiler = HeadProfiler(sums=sums, scale_shapes=info.scale_shapes)
    with progress_bar(len(pictures), "pictures", is_shown=show_progress) as advance, quiet_notices(), accel.apply(loaded.model, profiler):
        for number, (subject, picture_seed) in enumerate(pictures):
            if number >= sums.n:
                pictures_drawn = loaded.draw([subject], seed=[picture_seed])    # type: ignore[attr-defined]
                assert len(pictures_drawn) == 1
                sums.save(partial, about)
            advance()
    profile = _profile(sums, info, about)
    # whole or not at all
    profile.save(folder / "profile.new").replace(folder / "profile.safetensors")
    partial.unlink(missing_ok=True)
    return profile


def _finished(path: Path, about: Mapping[str, str]) -> HeadProfile:
    """The profile of a folder. OptionError where it was not made from the same."""
    found = HeadProfile.load(path)
    header = found.header
    made = {"model": header.model, "weights": header.fingerprint, "dtype": header.dtype, "scales": str(header.scale_shapes), "data": header.data}
    asked = {name: about[name] for name in made} | {"data": _described(about)}
    if made != asked:
        raise OptionError(f"hack: {path.parent} holds another profile ({json.dumps(made)}), asked for {json.dumps(asked)}; choose another folder")
    return found


CALIBRATION = Calibration(
    "profile",
    f"a profile of the heads, from {N_SAMPLES} pictures (--data classes, or for a model that draws texts a file of their features, .safetensors); "
    "the time of drawing them",
    profile_heads,
)


def _pictures(loaded: LoadedModel, data: Any, seed: int, n: int) -> list[tuple[Any, int]]:
    """What is drawn, and from which seeds."""
    from accel.evals.drawn import image_model

    found = image_model(loaded)
    seeds = [FIRST_SEED + seed * STRIDE + i for i in range(n)]
    if str(data).endswith(".safetensors"):
        return list(zip(_features(Path(data), n), seeds, strict=True))
    if data != "classes":
        raise OptionError(f"hack: data is “classes”, or a .safetensors file of text features, got {data!r}")
    n_classes = getattr(found.model.config, "num_classes", None)
    if n_classes is None:
        raise OptionError(f"hack: {loaded.name} draws texts: give it a .safetensors file of their features (accel.evals.artists.save_features)")
    # spread over all classes where there are more of them than pictures
    return [(i % n_classes if n >= n_classes else i * n_classes // n, own) for i, own in enumerate(seeds)]


def _named_data(data: Any) -> str:
    """What the user named, with a hash of a file's content: another file under the same name is other data."""
    if not str(data).endswith(".safetensors"):
        return str(data)
    return f"{data} (SHA-256 {hashlib.sha256(Path(data).read_bytes()).hexdigest()[:16]})"


def _features(path: Path, n: int) -> list[Tensor]:
    """The features of n prompts, in turn."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise OptionError(f"hack: cannot read the features in {path}: {error}") from error
    if not found or any(t.dim() != 2 for t in found.values()):
        raise OptionError(f"hack: {path} must hold the features (tokens, width) of at least one prompt")
    ordered = [found[name] for name in sorted(found, key=lambda name: (len(name), name))]
    return [ordered[i % len(ordered)] for i in range(n)]


def _described(about: Mapping[str, str]) -> str:
    return f"{about['samples']} pictures of {about['data']}, seed {about['seed']}"


def _profile(sums: Sums, info: ModelInfo, about: Mapping[str, str]) -> HeadProfile:
    assert info.scale_shapes is not None
    correlation = rank_correlation(sums.sigma, sums.sigma_unconditional) if sums.n_guided else None
    header = ProfileHeader(
        about["model"], about["weights"], info.n_layers, info.n_kv_heads, info.scale_shapes, info.dtype, sums.n, correlation,
        _described(about),
    )
    unconditional = (sums.sigma_unconditional / sums.n_guided).float() if sums.n_guided else None
    sigma, entropy, scale_use = ((t / sums.n).float() for t in (sums.sigma, sums.entropy, sums.scale_use))
    return HeadProfile(sigma, entropy, scale_use, header, unconditional)


def _recipe(folder: Path, method: HACK, profile: HeadProfile, info: ModelInfo) -> HACK:
    """Writes the plan and the recipe, and reads the recipe back."""
    plan, header = method.bind(info).plan_for(info), profile.header
    plan.save(folder / "plan.json", about={
        "model": header.model, "weights": header.fingerprint, "dtype": header.dtype, "data": header.data, "alpha": plan.alpha,
    })  # fmt: skip
    both = "" if header.rank_correlation is None else f"; σ of guided pictures' two halves correlates with {header.rank_correlation:.2f} by rank"
    note = (
        f"accel tune: heads of {header.model} from {header.data}; {plan.alpha:.0%} are contextual{both}. "
        f"At keep={method.keep} they hold {min(plan.contextual)} entries each and structural heads {min(plan.structural)} of {plan.total}"
    )
    Recipe.of(method, note=note).save(folder / "recipe.yaml")
    [found] = Recipe.load(folder / "recipe.yaml").methods
    assert isinstance(found, HACK)
    return found
