"""Loads the small vision-language model that lies beside this file, with its processor."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError
from accel.evals.models import LoadedVisionModel, prepared
from accel.evals.models.small_vlm.architecture import prompt_text
from accel.settings import cache_folder

if TYPE_CHECKING:
    import torch

# what the model reads, told before it is loaded
READS = ("picture",)
HERE = Path(__file__).parent
WEIGHTS = HERE / "weights"
# what `prompt_text` writes, for servers that are sent messages
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %} {{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endfor %}"
)


def load(dtype: torch.dtype, device: str) -> LoadedVisionModel:
    """The trained `LlavaForConditionalGeneration` in `dtype` on `device`, its tokenizer and its processor; nothing is fetched."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)
    processor = load_processor()
    card = (HERE / "card.md").read_text(encoding="utf-8")
    return LoadedVisionModel(
        prepared(model, dtype, device), processor.tokenizer, "small-vlm", card=card, processor=processor, prompt_text=prompt_text, reads_text=False
    )


def folder() -> Path:
    """The model as vLLM reads it, in the user's cache folder: its tower under the name that it had in transformers 4, and a chat template.

    AccelError where the folder cannot be written. transformers reads it too.
    """
    source = WEIGHTS / "model.safetensors"
    key = hashlib.sha256(source.read_bytes() + CHAT_TEMPLATE.encode()).hexdigest()[:12]
    made = cache_folder() / "models" / f"small-vlm-{key}"
    if made.is_dir():
        return made
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        # by one rename, so that a killed run leaves nothing that looks complete
        with tempfile.TemporaryDirectory(prefix=f".{made.name}-", dir=made.parent) as temporary:
            part = Path(temporary) / "model"
            shutil.copytree(WEIGHTS, part)
            _rename_tower(part / source.name)
            (part / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
            if not made.exists():       # another process may have been faster
                part.rename(made)
    except OSError as error:
        raise AccelError(f"the model cannot be saved in {made}: {error}; name a folder that can be written in ACCEL_CACHE") from error
    return made


def _rename_tower(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tower, older = "vision_tower.", "vision_tower.vision_model."
    # read whole before the file is replaced
    weights = {name.replace(tower, older) if not name.startswith(older) else name: t.clone() for name, t in load_file(file).items()}
    file.unlink()
    save_file(weights, file, metadata={"format": "pt"})


def load_processor() -> Any:
    """The `LlavaProcessor` of the model, from its saved files. Raises AccelError where Pillow is missing."""
    if importlib.util.find_spec("PIL") is None:
        raise AccelError("the small vision-language model takes pictures through Pillow, which is missing. Install it with:\n    pip install pillow")
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(WEIGHTS, local_files_only=True)
