"""The colour of the shape that stands once in the picture."""

from __future__ import annotations

from accel.evals.tasks._scenes import scene_task

TASK = scene_task("color")
