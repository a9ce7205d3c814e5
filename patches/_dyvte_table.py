"""What routers of DyVTE learn from: for every question and layer, what the text knows there, and whether the picture could leave without harm.

The model is frozen, so all of it is computed once, by the model as users run it, and kept on disk (visual-token-pruning.md §3.6).
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import accel
from accel.errors import AccelError, OptionError, UnsupportedError
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedVisionModel
from accel.evals.pictures.questions import inputs_of, picture_of, prompt_of
from accel.patches._routers import text_feature
from accel.patches.dyvte import DyVTE
from accel.protocols import Keep, ModelInfo, PruningContext, Stage, TokenPruning
from accel.tune.search import progress_bar

if TYPE_CHECKING:
    from accel.evals.scenes import Scene

SCENES = "scenes"
N_SCENES = 3000
CHUNK = 32              # questions per file: what a kill can lose
_LARGEST_HALF = 6e4
_WHAT = f'--data {SCENES} (drawn pictures), or a .jsonl file with {{"image": path, "text": question, "answer": answer}} in each line'


@dataclass(frozen=True)
class Question:
    """picture: opens it; of a large file only what is needed is open."""

    picture: Callable[[], Any]
    text: str
    answer: str


@dataclass(frozen=True)
class Table:
    """Rows of questions, columns of candidate layers.

    feature: (n, layers, 2D), what a router reads. agrees: (n, layers) bool, whether the exit behind that layer left every token of the answer the
    likeliest where it was. loss: (n, layers) fp32, mean cross-entropy of the answer then; full_loss: (n,), of the whole model.
    """

    layers: tuple[int, ...]
    feature: Tensor
    agrees: Tensor
    loss: Tensor
    full_loss: Tensor

    def labels(self, scale: float, slack: float) -> Tensor:
        """(n, layers) bool: the answer is the same, and no less certain than `scale` and `slack` allow."""
        return exit_labels(self.agrees, self.loss, self.full_loss[:, None], scale, slack)


def exit_labels(agrees: Tensor, loss: Tensor, full_loss: Tensor, scale: float, slack: float = 1e-6) -> Tensor:
    """Whether visual tokens may leave: the answer is the same, and its loss at most `scale` times that of the whole model, and `slack` nats."""
    return agrees & (loss <= scale * full_loss + slack)


# --- data ---------------------------------------------------------------------------------------------------------------------


def questions(data: Any, n: int | None, seed: int) -> list[Question]:
    """`n` questions about pictures with their answers: of drawn scenes (validation split, families in turn), or drawn by `seed` from a user's file.

    n: None for all of a file, and 3000 scenes. Raises OptionError where `data` names none.
    """
    if data == SCENES:
        return _scenes(N_SCENES if n is None else n)
    path = Path(data) if isinstance(data, str | os.PathLike) else None
    if path is None or path.suffix != ".jsonl" or not path.is_file():
        raise OptionError(f"dyvte: there are no questions to train on in {data!r}; give {_WHAT}")
    found = _lines(path)
    if n is None or n >= len(found):
        return found
    return [found[i] for i in sorted(random.Random(seed).sample(range(len(found)), n))]


def _scenes(n: int) -> list[Question]:
    """Not of the training split: an answer that the model has learned by heart teaches a router nothing."""
    from accel.evals.scenes import FAMILIES, held_out

    names = list(FAMILIES)
    items = {family: held_out(family, "validation", -(-n // len(names))) for family in names}
    chosen = [items[names[i % len(names)]][i // len(names)] for i in range(n)]
    return [Question(partial(_drawn, item.scene), item.question.text, item.question.answer) for item in chosen]


def _drawn(scene: Scene) -> Any:
    return picture_of(scene.image)


def _lines(path: Path) -> list[Question]:
    """Paths in the file are relative to its folder."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise OptionError(f"{path}, line {number} is not JSON: {error}") from error
        keys = ("image", "text", "answer")
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) and row[key].strip() for key in keys)):
            raise OptionError(f'{path}, line {number}: expected {{"image": path, "text": question, "answer": answer}}, got {line.strip()[:80]}')
        file = path.parent / row["image"]
        if not file.is_file():
            raise OptionError(f"{path}, line {number}: there is no picture {file}")
        found.append(Question(partial(_open, file), row["text"], row["answer"]))
    if not found:
        raise OptionError(f"{path} is empty")
    return found


def _open(file: Path) -> Any:
    from PIL import Image

    try:
        return Image.open(file).convert("RGB")
    except OSError as error:
        raise OptionError(f"cannot read the picture {file}: {error}") from error


# --- one chunk ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Reader(TokenPruning):
    """Keeps everything, and notes at each layer what a router would read there."""

    layers: tuple[int, ...]
    seen: dict[int, Tensor] = field(default_factory=dict, compare=False)

    def stages(self, model: ModelInfo) -> list[Stage]:
        return [Stage("layer", layer + 1) for layer in self.layers]

    def select(self, ctx: PruningContext) -> Keep | None:
        assert ctx.stage.layer is not None
        self.seen[ctx.stage.layer - 1] = text_feature(ctx.features, ctx.is_text, ctx.is_visual | ctx.is_structural)[0].cpu()
        return None


@torch.no_grad()
def measure(loaded: LoadedVisionModel, asked: Sequence[Question], layers: Sequence[int]) -> dict[str, Tensor]:
    """The columns of `Table` for these questions: the whole model once, then once for each layer behind which the picture leaves.

    Teacher forcing: the prompt is one forward, as in `generate`, and the answer with its end another on its cache.
    """
    prompts = [inputs_of(loaded, question.picture(), prompt_of(loaded, question.text)) for question in asked]
    answers = [_answer_ids(loaded, question.answer).to(prompt["input_ids"].device) for question, prompt in zip(asked, prompts, strict=True)]
    reader = _Reader(layers=tuple(layers))
    features, best, full = [], [], []
    with quiet_notices(), accel.apply(loaded.model, reader):
        for prompt, answer in zip(prompts, answers, strict=True):
            reader.seen.clear()
            logits = _forced(loaded.model, prompt, answer)
            if list(reader.seen) != list(layers):
                raise AccelError(f"{loaded.name} was asked at layers {list(reader.seen)}, not at {list(layers)}: the prompt has no picture")
            features.append(torch.stack([reader.seen[layer] for layer in layers]))
            best.append(logits.argmax(-1))
            full.append(torch.nn.functional.cross_entropy(logits, answer))
    found = {"feature": torch.stack(features), "full_loss": torch.stack(full).cpu()}
    if not all(bool(t.isfinite().all()) for t in found.values()):
        raise AccelError(f"{loaded.name} without pruning gives hidden states or losses that are not finite: nothing can be learned from them")
    agrees, losses = [], []
    for layer in layers:
        with quiet_notices(), accel.apply(loaded.model, DyVTE(exit_layer=layer)):
            out = [_forced(loaded.model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        agrees.append(torch.stack([(logits.argmax(-1) == own).all() for logits, own in zip(out, best, strict=True)]).cpu())
        losses.append(torch.stack([torch.nn.functional.cross_entropy(logits, answer) for logits, answer in zip(out, answers, strict=True)]).cpu())
    # the residual stream of some models leaves fp16's range
    if float(found["feature"].abs().max()) < _LARGEST_HALF:
        found["feature"] = found["feature"].half()
    return {**found, "agrees": torch.stack(agrees, 1).to(torch.uint8), "loss": torch.stack(losses, 1)}


def _answer_ids(loaded: LoadedVisionModel, answer: str) -> Tensor:
    """(m,) int64: the answer's tokens and the end, where the tokenizer has one."""
    ids = list(loaded.tokenizer(answer, add_special_tokens=False)["input_ids"])
    end = getattr(loaded.tokenizer, "eos_token_id", None)
    return torch.tensor(ids if end is None else [*ids, end], device="cpu")


def _forced(model: Any, prompt: Mapping[str, Any], answer: Tensor) -> Tensor:
    """Logits (m, vocabulary) fp32 for each token of the answer, given those before it."""
    out = model(**prompt, use_cache=True)
    logits = [out.logits[0, -1:]]
    if len(answer) > 1:
        cache = getattr(out, "cache", None) or out.past_key_values
        name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
        # no mask: nothing is padded, and Qwen-VL would count positions over the whole of it
        logits.append(model(input_ids=answer[None, :-1], **{name: cache}, use_cache=True).logits[0])
    return torch.cat(logits).float()


# --- on disk ------------------------------------------------------------------------------------------------------------------


def make_table(
    loaded: LoadedVisionModel, asked: Sequence[Question], layers: Sequence[int], folder: Path, *, about: Mapping[str, Any], show_progress: bool = True
) -> Table:
    """The table of these questions, in `folder` a file per 32 of them; those that are there already are not measured again.

    about: what the rows depend on beside the questions. A folder of other rows is refused. Under `accelerate launch` each process measures a share.
    """
    from accelerate import PartialState
    from safetensors.torch import load_file

    # without being told, processes on CPUs do not find each other
    processes = PartialState(cpu=loaded.model.device.type == "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    if processes.is_main_process:
        _claim(folder, {**about, "questions": _digest(asked), "candidate_layers": list(layers)})
    processes.wait_for_everyone()
    files = [folder / f"{first:06d}.safetensors" for first in range(0, len(asked), CHUNK)]
    with processes.split_between_processes(list(range(len(files)))) as share:
        missing = [i for i in share if not files[i].exists()]
        with progress_bar(len(missing), f"measuring {len(asked)} questions", is_shown=show_progress and processes.is_main_process) as advance:
            for i in missing:
                _save(measure(loaded, asked[i * CHUNK : (i + 1) * CHUNK], layers), files[i])
                advance()
    processes.wait_for_everyone()
    parts = [load_file(file) for file in files]
    whole = {name: torch.cat([part[name].float() if name == "feature" else part[name] for part in parts]) for name in parts[0]}
    return Table(tuple(layers), whole["feature"], whole["agrees"].bool(), whole["loss"], whole["full_loss"])


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Notes what a folder holds, or raises UnsupportedError where it holds something else."""
    path = folder / "table.json"
    if not path.exists():
        path.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    wrong = [f"{key}: {there.get(key)!r} there, {identity.get(key)!r} asked" for key in {**there, **identity} if there.get(key) != identity.get(key)]
    if wrong:
        raise UnsupportedError(f"{folder} holds another table; choose another folder, or delete that one:", wrong)


def _digest(asked: Sequence[Question]) -> str:
    text = json.dumps([(question.text, question.answer) for question in asked])
    return f"{len(asked)} {hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _save(rows: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    # a kill must not leave half a file under the name that says it is done
    unfinished = file.with_suffix(".unfinished")
    save_file(rows, unfinished)
    unfinished.replace(file)
