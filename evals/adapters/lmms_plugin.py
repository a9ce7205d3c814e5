"""What lmms-eval reads at its start (entry-point group `lmms_eval.models`): the name `accel_hf`, and where its classes lie. Loads nothing else."""

from __future__ import annotations

from typing import Any

HOME = "accel.evals.adapters.lmms_harness"


def manifest() -> Any:
    """The `ModelManifest` of `accel_hf`; lmms-eval takes the second class with --force_simple."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="accel_hf", chat_class_path=f"{HOME}.AccelHF", simple_class_path=f"{HOME}.AccelHFSimple")
