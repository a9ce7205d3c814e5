"""Models that draw, for exports: found by name, folder or official file before their weights are read, and what they draw from."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, OptionError
from accel.evals.drawing.exports import Drawn, Picture, Subject
from accel.evals.models import did_you_mean, embedded_names, load_model, prepared, reads_ahead, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from accel.models.infinity import TextFeatures

# settings of a command -> the argument of `generate`; a model takes those that its `generate` knows
SAMPLING = {
    "guidance": "guidance_scale", "top_k": "top_k", "top_p": "top_p", "tau": "temperature", "size": "size", "aspect_ratio": "aspect_ratio",
}  # fmt: skip
# gives the features of a few prompts, by number and text
Encode = Callable[[Sequence[Picture]], "TextFeatures"]


@dataclass(frozen=True)
class FoundModel:
    """A model that draws, before its weights are read. load(dtype, device) reads them; defaults: of `generate`, where the model has its own;
    drawn: its classes, and the side of its pictures, for a size other than the model's own None.
    """

    name: str
    family: Any
    load: Callable[[torch.dtype, str], Any]
    defaults: Mapping[str, Any]
    drawn: Drawn = field(default_factory=Drawn)

    @property
    def draws_classes(self) -> bool:
        return bool(self.family.main_input_name == "labels")

    def sampling(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of `generate`: what is asked for (by the names of `SAMPLING`, None: not), else the defaults. OptionError for what it lacks."""
        from accel.models.sampling import check_output, check_sampling

        known = inspect.signature(self.family.generate).parameters
        for name, value in asked.items():
            if value is not None and SAMPLING[name] not in known:
                raise OptionError(f"{self.name} is a {self.family.__name__}, which knows no {name.replace('_', ' ')}: leave it out")
        found = {word: self.defaults.get(word, known[word].default) for word in SAMPLING.values() if word in known}
        found |= {SAMPLING[name]: value for name, value in asked.items() if value is not None}
        check_output("pil")
        check_sampling(top_k=found["top_k"], top_p=found["top_p"])
        return found


def find_model(name: str, *, tokenizer: str | None = None, size: str | None = None) -> FoundModel:
    """The embedded model, `save_pretrained` folder, or official file or folder of this name.

    tokenizer: the tokenizer's file, which goes with official files alone. size: what an Infinity draws, where not its default.
    """
    path = Path(name)
    is_ours = name in embedded_names() or (path / "config.json").exists()
    if is_ours and tokenizer:
        raise OptionError(f"{name} has its tokenizer inside: leave the tokenizer out, which goes with official files")
    if name in embedded_names():
        return _embedded(name)
    if not path.exists():
        drawing = ", ".join(known for known in embedded_names() if "class" in (reads_ahead(known) or ()))
        meant = did_you_mean(name) or "."
        raise AccelError(f"cannot load the model {name!r}: there is no such file or folder{meant} The models that ship and draw are: {drawing}")
    family, drawn = _saved(path) if is_ours else _official(path)

    def load(dtype: torch.dtype, device: str) -> Any:
        if is_ours:
            model = prepared(family.from_pretrained(path, dtype=dtype, local_files_only=True), None, device)
        else:
            model = family.from_original(path, tokenizer, dtype=dtype, device=device)
        if size is not None:
            # methods divide their budget over the scales of the default size
            model.config.default_size = size
        return model

    if not is_ours and tokenizer is None and family.__name__ == "Infinity":
        raise OptionError(f"{name} comes without its tokenizer: name the file, such as infinity_vae_d32reg.pth, as the tokenizer")
    return FoundModel(name, family, load, {}, drawn)


def _embedded(name: str) -> FoundModel:
    from accel.models.var import VAR

    if "class" not in (reads_ahead(name) or ()):
        raise OptionError(f"{name} draws no pictures; small-var, VAR and Infinity do")
    module = importlib.import_module(f"accel.evals.models.{name.replace('-', '_')}.load")
    defaults = {"guidance_scale": module.GUIDANCE, "top_k": module.TOP_K, "top_p": module.TOP_P}
    _, drawn = _saved(module.WEIGHTS)
    return FoundModel(name, VAR, lambda dtype, device: load_model(name, dtype=dtype, device=device).model, defaults, drawn)


def _saved(path: Path) -> tuple[Any, Drawn]:
    """The class of the model in a `save_pretrained` folder, and what it draws."""
    from accel.models.infinity import Infinity
    from accel.models.var import VAR

    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise AccelError(f"cannot read {path / 'config.json'}: {error}") from error
    for family in (VAR, Infinity):
        if family.config_class.model_type == kind:
            return family, _drawn_by(family.config_class.from_pretrained(path))
    raise OptionError(f"{path} holds a model of type {kind!r}, which draws no pictures here: VAR and Infinity do")


def _drawn_by(config: Any) -> Drawn:
    """What a model of this configuration draws; of an Infinity, whose size is chosen at each picture, no side."""
    if not hasattr(config, "num_classes"):
        return Drawn()
    # a level of the decoder but the last doubles the side
    return Drawn(config.num_classes, config.scales().sizes[-1][0] << (len(config.vae_multipliers) - 1))


def _official(path: Path) -> tuple[Any, Drawn]:
    """The class of the model in an official file, told by its keys, and what it draws; the weights themselves stay on disk."""
    from accel.models.checkpoints import read_state
    from accel.models.infinity import Infinity
    from accel.models.infinity.original import WEIGHTS_INSIDE as INFINITY_INSIDE
    from accel.models.var import VAR
    from accel.models.var.config import SIDES
    from accel.models.var.original import WEIGHTS_INSIDE as VAR_INSIDE

    state = read_state(path, wrappers=(*VAR_INSIDE, *INFINITY_INSIDE))
    if "cfg_uncond" in state:
        return Infinity, Drawn()
    if "class_emb.weight" in state:
        sides = SIDES.get(state["pos_1LC"].shape[-2]) if "pos_1LC" in state else None
        # one row stands for no class; the published tokenizer makes 16 pixels of a token's side
        return VAR, Drawn(state["class_emb.weight"].shape[0] - 1, 16 * sides[-1] if sides else None)
    raise AccelError(f"{path} is neither a VAR nor an Infinity transformer; it holds {', '.join(sorted(state)[:6])}, …")


@dataclass(frozen=True)
class ClassArtist:
    """Draws classes."""

    model: Any
    sampling: Mapping[str, Any]

    def draw(self, pictures: Sequence[Picture]) -> list[Any]:
        """One Pillow picture each."""
        labels, seeds = [picture.subject.label for picture in pictures], [picture.seed for picture in pictures]
        return list(self.model.generate(labels, seed=seeds, output="pil", **self.sampling))


@dataclass(frozen=True)
class PromptArtist:
    """Draws texts, from features that `encode` gives."""

    model: Any
    sampling: Mapping[str, Any]
    encode: Encode

    def draw(self, pictures: Sequence[Picture]) -> list[Any]:
        """One Pillow picture each."""
        return list(self.model.generate(self.encode(pictures), seed=[picture.seed for picture in pictures], output="pil", **self.sampling))


def make_artist(found: FoundModel, model: Any, subjects: Sequence[Subject], sampling: Mapping[str, Any], encode: Encode | None) -> Any:
    """Who draws the subjects with the loaded model; OptionError for labels out of range."""
    if not found.draws_classes:
        assert encode is not None       # `check_fit` told
        return PromptArtist(model, sampling, encode)
    classes = model.config.num_classes
    wrong = [subject.label for subject in subjects if subject.label is None or not 0 <= subject.label < classes]
    if wrong:
        shown = ", ".join(map(str, wrong[:6])) + (" and more" if len(wrong) > 6 else "")
        raise OptionError(f"{found.name} knows the labels 0-{classes - 1}, got {shown}")
    if sampling["guidance_scale"] and not model.config.has_null_class:
        raise OptionError(f"{found.name} has no class for “none”, which guidance needs: set the guidance to 0")
    return ClassArtist(model, sampling)


def check_fit(found: FoundModel, subjects: Sequence[Subject], *, text_encoder: str | None, features: str | None) -> None:
    """Raises OptionError where the model cannot draw what it is given."""
    has_labels = subjects[0].label is not None
    if found.draws_classes != has_labels:
        wants, given = ("classes: give it labels", "prompts") if found.draws_classes else ("texts: give it a prompts file", "labels")
        raise OptionError(f"{found.name} is a {found.family.__name__}, which draws {wants}, not {given}")
    if found.draws_classes and (text_encoder or features):
        raise OptionError(f"{found.name} draws classes and reads no text: leave text encoder and features out")
    if not found.draws_classes and bool(text_encoder) == bool(features):
        raise OptionError(
            f"{found.name} reads text features: name a text encoder (google/flan-t5-xl goes with the official weights; a folder, or a hub id), "
            "or a file of features that accel.evals.drawing.artists.save_features wrote for these prompts, and not both"
        )


def encoder_of(name: str, *, dtype: torch.dtype, device: str) -> Encode:
    """Features by a T5 encoder. Each prompt is read alone, so that its features do not depend on the others'."""
    import torch

    from accel.models.infinity import TextEncoder, TextFeatures

    try:
        # T5 overflows in fp16
        encoder = TextEncoder.from_pretrained(name, device=device, dtype=torch.bfloat16 if dtype == torch.float16 else dtype)
    except (OSError, ValueError) as error:
        raise AccelError(f"cannot load the text encoder {name!r}: {str(error).strip().splitlines()[0]}") from error
    return lambda pictures: TextFeatures.of([encoder(picture.subject.text).states[0] for picture in pictures])  # type: ignore[arg-type]


def features_of(path: str | Path, subjects: Sequence[Subject], *, width: int, most_tokens: int) -> Encode:
    """Features from a file of `save_features`, read when they are needed. Raises OptionError where they are not those of these prompts."""
    from safetensors import SafetensorError, safe_open

    from accel.models.infinity import TextFeatures

    try:
        file: Any = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise OptionError(f"cannot read the features in {path}: {error}") from error
    made_for = (file.metadata() or {}).get("prompts")
    if made_for is not None and made_for != prompts_hash(subjects):
        raise OptionError(f"the features in {path} were made for other prompts, or in another order")
    names = set(file.keys())
    for i in range(len(subjects)):
        shape = tuple(file.get_slice(str(i)).get_shape()) if str(i) in names else None
        if shape is None or len(shape) != 2 or shape[1] != width or not 0 < shape[0] <= most_tokens:
            given = "no features" if shape is None else f"features {shape}"
            raise OptionError(f"{path}: prompt {i} has {given}; (1-{most_tokens}, {width}) are needed")
    return lambda pictures: TextFeatures.of([file.get_tensor(str(picture.index)).float() for picture in pictures])


def save_features(path: str | Path, prompts: Sequence[str], encode: Callable[[Sequence[str]], TextFeatures]) -> Path:
    """Writes the features of all prompts, in order, as safetensors: the tensor "0" (tokens, width) of the first prompt, and so on.

    encode: such as a `TextEncoder`; each prompt is given to it alone.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {str(i): encode([prompt]).states[0].contiguous().cpu() for i, prompt in enumerate(prompts)}
    save_file(tensors, path, metadata={"prompts": prompts_hash([Subject(text=prompt) for prompt in prompts])})
    return Path(path)


def prompts_hash(subjects: Sequence[Subject]) -> str:
    """SHA-256 of what is drawn, in order."""
    return hashlib.sha256(json.dumps([subject.text for subject in subjects], ensure_ascii=False).encode()).hexdigest()


def load_found(found: FoundModel, *, dtype: str, device: str) -> Any:
    """The model, in evaluation mode."""
    return found.load(torch_dtype(dtype), device)
