"""How many things have a colour, none to three."""

from __future__ import annotations

from accel.evals.tasks._scenes import scene_task

TASK = scene_task("count")
