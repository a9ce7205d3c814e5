"""How a recipe travels to vLLM's processes: as plain values in the engine's options, under one key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accel.errors import OptionError
from accel.protocols import Method, TokenPruning
from accel.recipe import Recipe

KEY = "accel"
WORKER = "accel.patches.hosts.vllm.extension.AccelWorker"


def engine_options(methods: Sequence[Method], given: Mapping[str, Any], architecture: str | None) -> dict[str, Any]:
    """The options of an engine that runs these methods, on top of those `given`, which stay.

    Attention reads `additional_config`, which every worker has; pictures are laid out in processes that see the model's configuration alone, so
    what prunes travels in `hf_overrides`. architecture: our model class for it, or None. OptionError where the user's options stand in the way.
    """
    pruning = [m for m in methods if isinstance(m, TokenPruning)]
    overrides, additional = given.get("hf_overrides") or {}, given.get("additional_config") or {}
    if pruning and not isinstance(overrides, Mapping):
        raise OptionError("hf_overrides must be a mapping beside token pruning, which travels in it; a function was given")
    if given.get("worker_extension_cls") not in (None, "", WORKER):
        theirs = given["worker_extension_cls"]
        raise OptionError(f"worker_extension_cls is {theirs!r}; accel asks its workers through its own and cannot share the place")
    for name, taken in (("hf_overrides", overrides), ("additional_config", additional)):
        if isinstance(taken, Mapping) and KEY in taken:
            raise OptionError(f"{name} holds the key {KEY!r} already; the recipe is given by method or recipe alone")
    found = dict(given)
    # asked of every worker, so that none can be silently dense: without a sparse method too
    found["additional_config"] = {**additional, KEY: Recipe(tuple(methods)).as_dict()}
    found["worker_extension_cls"] = WORKER
    if pruning:
        swapped = {"architectures": [architecture]} if architecture else {}
        found["hf_overrides"] = {**overrides, **swapped, KEY: Recipe(tuple(pruning)).as_dict()}
    return found


def read_options(holder: Any) -> tuple[Method, ...]:
    """The methods in `additional_config` (a mapping) or a model's configuration (an object with the key as attribute); none where nobody asked."""
    found = holder.get(KEY) if isinstance(holder, Mapping) else getattr(holder, KEY, None)
    return () if not found else Recipe.from_dict(found, source="the engine's options").methods
