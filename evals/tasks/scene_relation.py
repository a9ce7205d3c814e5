"""Whether one thing lies left of, right of, above or below another."""

from __future__ import annotations

from accel.evals.tasks._scenes import scene_task

TASK = scene_task("relation")
