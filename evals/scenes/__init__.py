"""Drawn scenes with questions about them: made by code from a seed, with the patches that hold each answer.

scene(split, index) draws one; question(family, scene, rng) asks; held_out(family, split, n) gives what an evaluation needs.
"""

from accel.evals.scenes.baselines import Baselines, baselines
from accel.evals.scenes.draw import GRID, PATCH, SIZE, SPLITS, Scene, Thing, scene
from accel.evals.scenes.questions import FAMILIES, Item, Question, held_out, question

__all__ = [
    "FAMILIES", "GRID", "PATCH", "SIZE", "SPLITS", "Baselines", "Item", "Question", "Scene", "Thing", "baselines", "held_out", "question", "scene",
]  # fmt: skip
