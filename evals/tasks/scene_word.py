"""Three digits on a sign, in their order."""

from __future__ import annotations

from accel.evals.tasks._scenes import scene_task

TASK = scene_task("word")
