"""GGUF files through transformers: de-quantised once, then read from a cache in seconds."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from accel.errors import AccelError
from accel.settings import cache_folder

logger = logging.getLogger("accel")


def load_gguf(file: Path, key: str) -> tuple[Any, Any]:
    """(model in fp32, tokenizer) of a GGUF file, from `<cache>/models/<key>` where an earlier call left them.

    key: names this very file, package version included. A cache that cannot be written costs time, not the run; one that cannot be read is made anew.
    """
    folder = _folder(key)
    if folder.is_dir():
        try:
            return _read(folder)
        except Exception as error:  # a damaged file raises types of safetensors, json or tokenizers: whatever it is, the source is at hand
            logger.warning("the cached model in %s cannot be read (%s): converting again", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
    model, tokenizer = _convert(file)
    _write(model, tokenizer, folder)
    return model, tokenizer


def saved_gguf(file: Path, key: str) -> Path:
    """The folder in which `load_gguf` leaves the model and its tokenizer, after it has. Raises AccelError where it could not be written."""
    folder = _folder(key)
    if not folder.is_dir():
        load_gguf(file, key)
    if not folder.is_dir():
        raise AccelError(f"the model cannot be saved in {folder}: name a folder that can be written in ACCEL_CACHE")
    return folder


def _folder(key: str) -> Path:
    return cache_folder() / "models" / key


def _read(folder: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # sdpa by name: with the hub package `kernels` installed, some architectures choose an attention of their own
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True)
    if info["missing_keys"]:
        raise AccelError(f"weights are missing: {', '.join(sorted(info['missing_keys'])[:3])}")
    return model, AutoTokenizer.from_pretrained(folder)


def _convert(file: Path) -> tuple[Any, Any]:
    """The model and tokenizer of the file itself: half a minute for a small model."""
    import torch

    try:
        import gguf  # noqa: F401  transformers needs it, and says so less clearly
    except ImportError as error:
        raise AccelError("reading GGUF files needs the package gguf. Install it with:\n    pip install 'accel-inference[demo]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        dtype=torch.float32,
        attn_implementation="sdpa",
    )
    # in some versions the loaded model still calls itself quantised and refuses to be saved: a plain one takes its weights
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.load_state_dict(packed.state_dict())
    model.generation_config = packed.generation_config
    return model, tokenizer


def _write(model: Any, tokenizer: Any, folder: Path) -> None:
    """Saves both under `folder` by one rename, so that a killed run leaves nothing that looks complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            part = Path(temporary) / "model"
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            if not folder.exists():     # another process may have been faster
                part.rename(folder)
    except OSError as error:
        logger.warning("the de-quantised model was not cached in %s (%s): the next load takes as long as this one", folder, error)
