"""The visual information flow: how much of what a prompt's last token knows survives when visual tokens are dropped (visual-token-pruning.md §4.7).

It needs prompts with pictures and no answers, so that any token-pruning method can be tuned on a user's own data.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import accel
from accel.errors import AccelError, OptionError
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedModel
from accel.evals.pictures.questions import inputs_of, open_picture, picture_of, prompt_of, vision_model
from accel.protocols import Objective

if TYPE_CHECKING:
    from accel.evals.scenes import Scene
    from accel.protocols import Method

N_SAMPLES = 30
SCENES = "scenes"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# asked about pictures that come without a question
QUESTION = "Describe this picture."
_WHAT = f'--data {SCENES} (drawn pictures), a folder of pictures, or a .jsonl file with {{"image": path, "text": question}} in each line'

# The picture is opened when it is needed: of a large folder only a few are.
Asked = tuple[Callable[[], Any], str]


@dataclass(frozen=True, eq=False)
class FlowSamples:
    """Prompts, each ready for the model's forward, and what its unpruned last token knows: `full` (n, D) fp64."""

    inputs: list[dict[str, Any]]
    full: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __str__(self) -> str:
        digest = hashlib.sha256()
        for inputs in self.inputs:
            for name, value in sorted(inputs.items()):
                if isinstance(value, Tensor):
                    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.double().cpu().numpy().tobytes())
        return f"{len(self)} samples {digest.hexdigest()[:12]}"


def prepare(loaded: LoadedModel, data: Any, seed: int = 0, *, n: int = N_SAMPLES) -> FlowSamples:
    """The first `n` scenes of the validation split, or `n` pictures that `seed` draws from a folder or .jsonl file, all where it holds fewer.

    One forward of the unpruned model for each, here and never again. Raises OptionError for a model that reads no pictures and for data that cannot
    be read.
    """
    vision = vision_model(loaded)
    inputs = [inputs_of(vision, picture(), prompt_of(vision, question)) for picture, question in _asked(data, n, seed)]
    full = torch.stack([last_state(vision.model, sample) for sample in inputs])
    if not bool(full.isfinite().all()):
        raise AccelError(f"{loaded.name} without pruning gives hidden states that are not finite: nothing can be compared to them")
    return FlowSamples(inputs, full)


def information_flow(method: Method, model: Any, data: FlowSamples) -> float:
    """The sum over the samples of the cosine between the last token's state with and without `method`: at most `len(data)`; NaN counts as 0."""
    with quiet_notices(), accel.apply(model, method):
        pruned = torch.stack([last_state(model, sample) for sample in data.inputs])
    cosine = torch.nn.functional.cosine_similarity(pruned, data.full, dim=-1)
    # rounding must not lift a score above that of the whole picture
    return float(cosine.nan_to_num(nan=0.0).clamp(-1, 1).sum())


def last_state(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The last prompt token behind the final norm, (D,) fp64: one forward without the head. `inputs`: of one prompt without padding."""
    with torch.no_grad():
        state: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[0, -1].double()
    return state


OBJECTIVE = Objective("information_flow", information_flow, prepare=prepare)


# --- data ---------------------------------------------------------------------------------------------------------------------


def _asked(data: Any, n: int, seed: int) -> Sequence[Asked]:
    """Pictures and questions. Raises OptionError where `data` names none."""
    if data is None:
        raise OptionError(f"name what to tune on: {_WHAT}")
    if data == SCENES:
        return _scenes(n)
    path = Path(data)
    if path.is_dir():
        found = _folder(path)
    elif path.suffix == ".jsonl" and path.is_file():
        found = _lines(path)
    else:
        raise OptionError(f"there is no {data!r} to tune on; give {_WHAT}")
    chosen = sorted(random.Random(seed).sample(range(len(found)), min(n, len(found))))
    return [found[i] for i in chosen]


def _scenes(n: int) -> list[Asked]:
    """Scenes of the validation split, never of the one that scores are reported on; the families of questions in turn."""
    from accel.evals.scenes import FAMILIES, held_out

    names = list(FAMILIES)
    items = {family: held_out(family, "validation", n) for family in names}
    chosen = [items[names[i % len(names)]][i] for i in range(n)]
    return [(partial(_drawn, item.scene), item.question.text) for item in chosen]


def _drawn(scene: Scene) -> Any:
    return picture_of(scene.image)


def _folder(path: Path) -> list[Asked]:
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise OptionError(f"the folder {path} holds no pictures ({', '.join(SUFFIXES)})")
    return [(partial(open_picture, file), QUESTION) for file in files]


def _lines(path: Path) -> list[Asked]:
    """Paths in the file are relative to its folder."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read {path}: {error}") from error
    found: list[Asked] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number} is not JSON: {error}") from error
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("image", "text"))):
            raise OptionError(f'{path}, line {number}: expected {{"image": path, "text": question}}, got {line.strip()[:80]}')
        file = path.parent / row["image"]
        if not file.is_file():
            raise OptionError(f"{path}, line {number}: there is no picture {file}")
        found.append((partial(open_picture, file), row["text"]))
    if not found:
        raise OptionError(f"{path} is empty")
    return found
