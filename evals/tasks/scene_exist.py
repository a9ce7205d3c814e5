"""Is there a thing of this colour and shape? Yes and no are equally frequent."""

from __future__ import annotations

from accel.evals.tasks._scenes import scene_task

TASK = scene_task("exist")
