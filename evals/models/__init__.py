"""Models by name: those that ship with accel (one sub-folder each), any local path, any hub id."""

from __future__ import annotations

import difflib
import importlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accel.errors import AccelError, OptionError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
# a "class" is drawn: the model is given a number and makes a picture
Kind = Literal["text", "picture", "class"]

# kinds of models of our own that draw
DRAWING = ("accel_var", "accel_infinity")

logger = logging.getLogger("accel")


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to be measured, in evaluation mode.

    recipe_path: the methods and options that suit it, where it ships with some. card: licence, origin and limits, in Markdown;
    empty for models that do not ship with accel.
    """

    model: Any
    tokenizer: Any
    name: str
    recipe_path: Path | None = None
    card: str = ""

    @property
    def max_positions(self) -> int | None:
        """Tokens the model can hold; None where its config does not say."""
        value = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if value is None else int(value)

    @property
    def reads(self) -> tuple[Kind, ...]:
        """The kinds of samples that the model can be given."""
        return ("text",)


@dataclass(frozen=True)
class LoadedVisionModel(LoadedModel):
    """A model that reads pictures too.

    processor(images=…, text=…) gives what its forward takes; None where the model came without one, and pictures cannot be read then.
    prompt_text: a question as the text of a prompt with one picture, for models without a chat template. reads_text: False for a model that was
    taught nothing but questions about pictures.
    """

    processor: Any = None
    prompt_text: Callable[[str], str] | None = None
    reads_text: bool = True

    @property
    def reads(self) -> tuple[Kind, ...]:
        return (*(("text",) if self.reads_text else ()), *(("picture",) if self.processor is not None else ()))


@dataclass(frozen=True)
class LoadedImageModel(LoadedModel):
    """A model that draws pictures of classes; it has no tokenizer.

    draw(labels, seed=…) -> pictures (n, 3, height, width) fp32 in [0, 1], picture i from seed + i, whatever the batch; a model of texts is given
    their features. real(n) -> as many held-out real pictures and their labels. judge: what the image metrics look with (image_metrics.py). Both are
    None where there is nothing to compare with. class_names: one per label.
    """

    draw: Callable[..., torch.Tensor] | None = None
    real: Callable[[int], tuple[torch.Tensor, torch.Tensor]] | None = None
    judge: Any = None
    class_names: tuple[str, ...] = ()

    @property
    def max_positions(self) -> int | None:
        """None: there is no prompt."""
        return None

    @property
    def reads(self) -> tuple[Kind, ...]:
        return ("class",)


def require_positions(loaded: LoadedModel, n_tokens: int, what: str) -> None:
    """Raises OptionError where `what` takes more tokens than the model can hold: beyond them its answers mean nothing."""
    if (most := loaded.max_positions) is not None and n_tokens > most:
        raise OptionError(f"{loaded.name} holds {most} tokens, and {what} takes {n_tokens}")


def embedded_names() -> list[str]:
    """Names of the models that ship with accel: the sub-folders here that hold a `load.py`, with "-" for "_"."""
    return sorted(path.parent.name.replace("_", "-") for path in Path(__file__).parent.glob("*/load.py"))


def embedded_recipe(name: str) -> Path | None:
    """The recipe of an embedded model, without loading the model; None where there is none."""
    path = Path(__file__).parent / name.replace("-", "_") / "recipe.yaml"
    return path if name in embedded_names() and path.exists() else None


def pretrained_path(name_or_path: str) -> str:
    """What `from_pretrained` and vLLM take: the folder of an embedded model, made first where it ships in another format; other names as they are.

    Raises AccelError for an embedded model that is no transformers model.
    """
    if name_or_path not in embedded_names():
        return name_or_path
    folder = getattr(_loader(name_or_path), "folder", None)
    if folder is None:
        raise AccelError(f"the embedded model {name_or_path} has a class of accel's own, which only accel runs")
    return str(folder())


def reads_ahead(name_or_path: str) -> tuple[Kind, ...] | None:
    """What the model reads, told without loading it; None where only loading tells."""
    if name_or_path in embedded_names():
        found: tuple[Kind, ...] | None = getattr(_loader(name_or_path), "READS", None)
        return found
    config = _local_config(name_or_path)
    if config is None:
        return None
    if config.get("model_type") in DRAWING:
        return ("class",)
    return ("text", "picture") if config.get("vision_config") is not None else ("text",)


def _local_config(name_or_path: str) -> dict[str, Any] | None:
    """The configuration of a local folder; None where it is none, or one that loading will complain about."""
    try:
        found = json.loads((Path(name_or_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def load_model(name_or_path: str, *, dtype: str | torch.dtype = "float32", device: str = "cpu") -> LoadedModel:
    """The model called `name_or_path`: an embedded one, a local folder, or a Hugging Face hub id.

    dtype: "float32", "bfloat16" or "float16", or the torch dtype. Raises OptionError for an unknown dtype, and AccelError, with what to do,
    for a model that cannot be found or read.
    """
    wanted = torch_dtype(dtype)
    if name_or_path in embedded_names():
        found: LoadedModel = _loader(name_or_path).load(wanted, device)
        return found
    if (_local_config(name_or_path) or {}).get("model_type") in DRAWING:
        return _load_drawing(name_or_path, wanted, device)
    # a hub id without an owner; asking the hub for a slip of the pen takes half a minute where there is no network
    if "/" not in name_or_path and not Path(name_or_path).exists() and (meant := did_you_mean(name_or_path)):
        raise AccelError(
            f"cannot load the model {name_or_path!r}{meant} Embedded models: {', '.join(embedded_names())}. "
            "Else name a local folder, or a hub id with its owner (owner/name)"
        )
    return _load_pretrained(name_or_path, wanted, device)


def did_you_mean(name: str) -> str:
    """A question after the embedded model whose name is close to this one; empty where none is."""
    close = difflib.get_close_matches(name.lower().replace("_", "-"), embedded_names(), n=1, cutoff=0.7)
    return f"; did you mean {close[0]!r}?" if close else ""


def _loader(name: str) -> Any:
    return importlib.import_module(f"accel.evals.models.{name.replace('-', '_')}.load")


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of that name, or the same object; anything but the three of `DTYPES` raises OptionError."""
    import torch

    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def prepared(model: Any, dtype: torch.dtype | None, device: str) -> Any:
    """The same model, in `dtype` (None: as its weights are) on `device`, every weight in memory of its own and no gradients."""
    model = (model.to(device) if dtype is None else model.to(device=device, dtype=dtype)).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        # weights read from a file stay mapped to it, and pages given back under memory pressure make prefill up to six times slower
        tensor.data = tensor.data.clone()
    return model


def _load_drawing(path: str, dtype: torch.dtype, device: str) -> LoadedImageModel:
    """A VAR or Infinity that `save_pretrained` has written, drawing with the defaults of its `generate`; nothing here can judge its pictures."""
    from accel.evals.drawing.artists import find_model

    model = find_model(path).load(dtype, device)
    n_classes = getattr(model.config, "num_classes", 0)

    def draw(subjects: Any, *, seed: Any = None) -> torch.Tensor:
        # looked up at every call: a method may have replaced it
        found: torch.Tensor = model.generate(subjects, seed=seed, output="tensor")
        return found

    return LoadedImageModel(model, None, path, draw=draw, class_names=tuple(map(str, range(n_classes))))


def _load_pretrained(name_or_path: str, dtype: torch.dtype, device: str) -> LoadedModel:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

    try:
        has_vision = getattr(AutoConfig.from_pretrained(name_or_path), "vision_config", None) is not None
        processor = _processor(name_or_path) if has_vision else None
        tokenizer = AutoTokenizer.from_pretrained(name_or_path) if processor is None else processor.tokenizer
        model = (AutoModelForImageTextToText if has_vision else AutoModelForCausalLM).from_pretrained(name_or_path, dtype=dtype)
    except (OSError, ValueError) as error:      # what transformers raises for missing files, no network, and unknown architectures
        raise AccelError(_not_loaded(name_or_path, error)) from error
    if has_vision:
        return LoadedVisionModel(prepared(model, dtype, device), tokenizer, name=name_or_path, processor=processor)
    return LoadedModel(prepared(model, dtype, device), tokenizer, name=name_or_path)


def _processor(name_or_path: str) -> Any:
    """The processor for pictures and text, or None, with the reason in the log."""
    from transformers import AutoProcessor

    try:
        found = AutoProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError, ImportError) as error:     # no such files; or a package that this processor needs
        logger.warning("%s is loaded without its processor, so it reads no pictures: %s", name_or_path, _first_line(error))
        return None
    if not hasattr(found, "image_processor"):
        # where the files of a processor are missing, AutoProcessor gives the tokenizer
        logger.warning("%s has a tokenizer and no processor, so it reads no pictures", name_or_path)
        return None
    return found


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _not_loaded(name_or_path: str, error: Exception) -> str:
    if Path(name_or_path).is_dir():
        where = "a local folder with config.json, weights and tokenizer is needed"
    elif Path(name_or_path).exists() or name_or_path.startswith((".", "/", "~")):
        where = "there is no such folder"
    else:
        where = "it is no embedded model and no local folder, and the hub did not give it (no network, no such model, or no permission)"
    return f"cannot load the model {name_or_path!r}: {where}. transformers says: {_first_line(error)}\nEmbedded models: {', '.join(embedded_names())}"
