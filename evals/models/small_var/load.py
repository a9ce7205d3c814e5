"""Loads the small VAR that lies beside this file, with its judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from accel.evals.models import Kind, LoadedImageModel, prepared

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.evals.models.small_var.architecture import Judge
    from accel.models.sampling import Seed

HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
# what the model reads, told before it is loaded
READS: tuple[Kind, ...] = ("class",)
# chosen on validation: see card.md
GUIDANCE, TOP_K, TOP_P = 0.5, 0, 1.0


def load(dtype: torch.dtype, device: str) -> LoadedImageModel:
    """The trained `VAR` in `dtype` on `device`, what it keeps in fp32 excepted, and its judge; nothing is fetched."""
    from accel.evals.models.small_var.drawings import CLASSES
    from accel.models.var import VAR

    model = prepared(VAR.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True), None, device)

    def draw(labels: Sequence[int] | Tensor, *, seed: Seed = None) -> Tensor:
        # looked up at every call: a method may have replaced it
        found: Tensor = model.generate(labels, guidance_scale=GUIDANCE, top_k=TOP_K, top_p=TOP_P, seed=seed, output="tensor")
        return found

    card = (HERE / "card.md").read_text(encoding="utf-8")
    return LoadedImageModel(model, None, "small-var", card=card, draw=draw, real=real_drawings, judge=load_judge(device), class_names=CLASSES)


def load_judge(device: str = "cpu") -> Judge:
    """The trained judge, in fp32 whatever the model is, so that its verdicts compare."""
    from safetensors.torch import load_file

    from accel.evals.models.small_var.architecture import Judge

    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(WEIGHTS / "judge.safetensors").items()})
    found: Judge = prepared(judge, None, device)
    return found


def real_drawings(n: int) -> tuple[Tensor, Tensor]:
    """The first n drawings of the test split, and the digits they show."""
    from accel.evals.models.small_var.drawings import drawings

    return drawings("test", range(n))
