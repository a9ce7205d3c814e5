"""The shape of the thing whose colour stands once in the picture."""

from __future__ import annotations

from accel.evals.tasks._scenes import scene_task

TASK = scene_task("shape")
