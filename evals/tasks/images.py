"""Draw one picture per sample, the classes in turn, each from a seed of its own: does the judge see the class that was asked for?"""

from __future__ import annotations

from accel.evals.tasks import ClassSample, ImageTask

# so that runs with neighbouring seeds share no picture
STRIDE = 1_000_003


def samples(n: int, seed: int) -> list[ClassSample]:
    return [ClassSample(i, seed, number=i, picture_seed=seed * STRIDE + i) for i in range(n)]


TASK = ImageTask(
    samples,
    caveat="The judge is a small network that knows clean drawings: it tells a wrong digit from a right one, not a fine drawing from a rough one. "
    "Fréchet distances compare only under the same judge and the same number of pictures.",
)
