"""Questions about pictures for any model with a processor: the prompt, the model's own answer, and what was left of the picture's tokens."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accel.errors import AccelError, OptionError
from accel.evals.models import LoadedModel, LoadedVisionModel, require_positions
from accel.evals.timing import Lap, Stopwatch, Times

if TYPE_CHECKING:
    from accel.evals.tasks import PictureSample


@dataclass(frozen=True)
class Reply:
    """What the model wrote. prefill_ms: until its first token, picture included. n_prompt: tokens of the prompt, n_visual of them placeholders.

    times: of the same, and of the tokens behind it; the picture was preprocessed before.
    """

    text: str
    prefill_ms: float
    n_prompt: int
    n_visual: int
    times: Times = field(default_factory=Times)


def vision_model(loaded: LoadedModel) -> LoadedVisionModel:
    """The same object, where it can be given pictures; else OptionError."""
    if isinstance(loaded, LoadedVisionModel) and "picture" in loaded.reads:
        return loaded
    why = "it draws pictures" if "class" in loaded.reads else "it is a text model"
    if isinstance(loaded, LoadedVisionModel):
        why = "it came without a processor"
    raise OptionError(f"{loaded.name} cannot be asked about pictures: {why}. small-vlm can, and so can vision-language models with a processor")


def open_picture(file: Path) -> Any:
    """The Pillow picture in a file, turned the way its camera says. Raises OptionError where it cannot be read."""
    from PIL import Image, ImageOps

    try:
        return ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    except OSError as error:
        raise OptionError(f"cannot read the picture {file}: {error}") from error


def picture_of(image: Any) -> Any:
    """The Pillow picture of an array (height, width, 3) uint8."""
    from PIL import Image

    return Image.fromarray(image)


def prompt_of(loaded: LoadedVisionModel, question: str, instruction: str = "") -> str:
    """The text of a prompt with one picture: by the chat template, else by the model's own form, else the placeholder and the question.

    instruction: added to the question, but not for a model with a form of its own, which knows nothing else.
    """
    processor = loaded.processor
    if getattr(processor, "chat_template", None) is None and loaded.prompt_text is not None:
        return loaded.prompt_text(question)
    asked = f"{question} {instruction}".strip()
    if getattr(processor, "chat_template", None) is None:
        placeholder = getattr(processor, "image_token", None)
        if placeholder is None:
            raise OptionError(f"the processor of {loaded.name} has neither a chat template nor an image token: no prompt can be written for it")
        return f"{placeholder} {asked}"
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": asked}]}
    return str(processor.apply_chat_template([message], add_generation_prompt=True))


def inputs_of(loaded: LoadedVisionModel, picture: Any, text: str) -> dict[str, Any]:
    """What the model's forward takes for one Pillow picture and a prompt, on its device; floating tensors in its dtype."""
    begin = getattr(loaded.tokenizer, "bos_token", None)
    # a chat template writes the begin token itself; the tokenizer would add another
    special = {"add_special_tokens": False} if begin and text.startswith(begin) else {}
    weight = next(iter(loaded.model.parameters()))
    batch = loaded.processor(images=picture, text=text, return_tensors="pt", **special)
    return {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def reply_to(loaded: LoadedVisionModel, inputs: dict[str, Any], max_new_tokens: int, *, on_prefill: Callable[[], None] | None = None) -> Reply:
    """The model's greedy answer. `on_prefill` is called behind the prompt. Raises AccelError where the logits are no numbers."""
    prompt = inputs["input_ids"]
    require_positions(loaded, prompt.shape[1] + max_new_tokens, "a question with its picture and reply")
    laps, stopwatch = ExitStack(), Stopwatch(prompt.device)
    reading, writing = laps.enter_context(stopwatch.lap()), Lap()

    def watch(_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor: the first call ends the prefill."""
        nonlocal writing
        if not reading.ms:
            laps.close()
            if on_prefill:
                on_prefill()
            writing = laps.enter_context(stopwatch.lap())
        if bool(scores.isnan().any()):
            raise AccelError(f"{loaded.name} gives logits that are not finite")
        return scores

    # the second lap is left with the reply
    with laps, torch.no_grad():
        # a model's own settings may sample or penalise
        ids = loaded.model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, repetition_penalty=1.0,
            logits_processor=[watch],
        )  # fmt: skip
    new = ids[0, prompt.shape[1] :].tolist()
    end = loaded.model.generation_config.eos_token_id
    has_ended = new[-1] in (end if isinstance(end, list) else [end])
    times = Times.of_reply(reading, writing, n_output_tokens=len(new), finish_reason="stop" if has_ended else "length")
    text = loaded.tokenizer.decode(new, skip_special_tokens=True)
    return Reply(text.strip(), reading.ms, prompt.shape[1], int(is_placeholder(loaded.model.config, prompt).sum()), times)


def ask(loaded: LoadedVisionModel, sample: PictureSample, *, on_prefill: Callable[[], None] | None = None) -> Reply:
    """The model's answer to one sample, under whatever is applied to it."""
    text = prompt_of(loaded, sample.question, sample.instruction)
    return reply_to(loaded, inputs_of(loaded, picture_of(sample.image), text), sample.max_new_tokens, on_prefill=on_prefill)


def is_right(reply: str, answers: Sequence[str]) -> bool:
    """Whether the whole reply is one of the answers, but for case, spaces and punctuation around it."""
    return _plain(reply) in {_plain(answer) for answer in answers}


def seen_picture(loaded: LoadedVisionModel, inputs: dict[str, Any], picture: Any) -> Any:
    """The Pillow picture under the grid of patches: what the encoder was given where that is one image, which may be cropped; else `picture`."""
    pixels = inputs.get("pixel_values")
    if not (isinstance(pixels, Tensor) and pixels.dim() == 4 and pixels.shape[:2] == (1, 3)):
        return picture
    images = loaded.processor.image_processor
    mean, std = (torch.tensor(getattr(images, name, None) or [0.5] * 3).view(3, 1, 1) for name in ("image_mean", "image_std"))
    shown = (pixels[0].float().cpu() * std + mean).clamp(0, 1) * 255
    return picture_of(shown.round().to(torch.uint8).permute(1, 2, 0).numpy())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(string.punctuation + " ")


def is_placeholder(config: Any, ids: Tensor) -> Tensor:
    """Which tokens of a prompt stand for pictures, bool like `ids`; none where the config names no placeholder."""
    for name in ("image_token_id", "image_token_index"):
        if (placeholder := getattr(config, name, None)) is not None:
            return ids.eq(placeholder)
    return torch.zeros_like(ids, dtype=torch.bool)
