"""Measures the heads of a model while it draws or reads, and plans their budgets (kv-compression.md §2.2, §10.2): `accel tune hack`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from accel.errors import OptionError
from accel.patches._hack_profiler import HeadProfiler, Sums
from accel.patches._hack_subjects import N_TOKENS, Subject, named_data, pictures, prompts
from accel.patches._head_profile import HeadProfile
from accel.patches.hack import HACK
from accel.protocols import Calibration, ModelInfo
from accel.recipe import Recipe

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel

# pictures, and prompts of a language model
N_SAMPLES, N_PROMPTS = 50, 32


def profile_heads(
    loaded: LoadedModel, data: Any, folder: Path, *, fixed: Mapping[str, Any] | None = None, seed: int = 0, show_progress: bool = True,
    n_samples: int | None = None,
) -> HACK:  # fmt: skip
    """HACK with a profile of this model; leaves `profile.safetensors`, `recipe.yaml` and of an image model `plan.json` in `folder`.

    data: "classes", which are drawn in turn; for a model that draws texts a file of their features
    (`accel.evals.drawing.artists.save_features`); for a language model a text task, or a .txt or .jsonl of prose.
    n_samples: 50 pictures, or 32 prompts of 4096 tokens, unless told otherwise.
    fixed: options of the result. A killed call goes on where it was: `profile.partial.safetensors` is written behind every picture. A folder with a
    whole profile gets another plan and recipe. OptionError where the folder holds a profile that was made or begun otherwise.
    """
    from accel.patching import host_for

    fixed = dict(fixed or {})
    if wrong := [name for name in ("profile", "plan") if fixed.get(name) is not None]:
        raise OptionError(f"hack: this makes the profile; leave out {', '.join(wrong)}")
    if n_samples is not None and n_samples < 1:
        raise OptionError(f"hack: a profile needs at least one picture or prompt, got n_samples={n_samples}")
    # a wrong option is told before hours of drawing, not behind them
    HACK(**fixed)
    info = host_for(loaded.model).describe(loaded.model)
    # every host tells weights apart
    assert info.fingerprint is not None
    reads = info.scale_shapes is None
    n_samples = n_samples or (N_PROMPTS if reads else N_SAMPLES)
    about = {
        "model": loaded.name, "weights": info.fingerprint(), "dtype": info.dtype, "data": named_data(data), "seed": str(seed),
        "samples": f"{n_samples} {'prompts' if reads else 'pictures'}", "scales": str(info.scale_shapes or ()),
    }  # fmt: skip
    subjects = (prompts if reads else pictures)(loaded, data, seed, n_samples)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "profile.safetensors"
    profile = _finished(path, about) if path.exists() else _measured(loaded, subjects, folder, info, about, show_progress=show_progress)
    return _recipe(folder, HACK(profile=str(path), **fixed), profile, info)


@torch.no_grad()
def _measured(
    loaded: LoadedModel, subjects: Sequence[Subject], folder: Path, info: ModelInfo, about: Mapping[str, str], *, show_progress: bool
) -> HeadProfile:
    """Runs the model on the subjects that are not yet in the sums of the folder, and writes the profile there."""
    import accel
    from accel.evals.latency import quiet_notices
    from accel.tune.search import progress_bar

    partial = folder / "profile.partial.safetensors"
    sums = Sums.load(partial, about) if partial.exists() else Sums.of(info.n_layers, info.n_kv_heads, len(info.scale_shapes or ()))
    full = [layer for layer, kind in enumerate(info.layer_types) if kind == "full_attention"]
    profiler = HeadProfiler(sums=sums, scale_shapes=info.scale_shapes, first_layer=full[0] if full else 0)
    what = about["samples"].split()[1]
    with progress_bar(len(subjects), what, is_shown=show_progress) as advance, quiet_notices(), accel.apply(loaded.model, profiler):
        for number, run in enumerate(subjects):
            if number >= sums.n:
                run()
                sums.save(partial, about)
            advance()
    profile = sums.profile(info, about, _described(about))
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
    f"a profile of the heads: of an image model from {N_SAMPLES} pictures (--data classes, or a .safetensors file of text features), of a language "
    f"model from {N_PROMPTS} prompts of {N_TOKENS} tokens (--data needle or another text task, or a .txt or .jsonl); in the model's own time",
    profile_heads,
)


def _described(about: Mapping[str, str]) -> str:
    return f"{about['samples']} of {about['data']}, seed {about['seed']}"


def _recipe(folder: Path, method: HACK, profile: HeadProfile, info: ModelInfo) -> HACK:
    """Writes the recipe, and the plan where budgets are known ahead, and reads the recipe back."""
    plan, header = method.bind(info).plan_for(info, N_TOKENS), profile.header
    if info.scale_shapes is not None:
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
