"""Reading official weight files: one file, a folder of safetensors or a state dict; wrapped or not; checked key by key before anything is loaded."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from accel.models.errors import CheckpointError

Source = str | Path | Mapping[str, object]


def read_state(source: Source, *, wrappers: Sequence[Sequence[str]] = ()) -> dict[str, Tensor]:
    """The flat state dict in a `.pth` file, a safetensors file or folder, or a mapping; out of the first of `wrappers` that is there."""
    found: object = _read(Path(source)) if isinstance(source, str | Path) else source
    for path in wrappers:
        inner = found
        for key in path:
            inner = inner.get(key) if isinstance(inner, Mapping) else None
        if inner is not None:
            found = inner
            break
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{_name(source)} holds a {type(found).__name__}, not a state dict")
    state = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if len(state) < len(found) or not state:
        others = [key for key in found if str(key) not in state]
        raise CheckpointError(f"{_name(source)} is not a state dict: beside {len(state)} tensors it holds {_some(others)}")
    # left behind by data parallelism and torch.compile
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in state.items()}


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else "the state dict"


def _some(keys: Sequence[object], most: int = 6) -> str:
    shown = ", ".join(str(key) for key in list(keys)[:most])
    return shown + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _read(path: Path) -> object:
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # the older file format cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # without torch's own words, which advise to load the file unsafely; nor as the cause, which a traceback shows
        raise CheckpointError(f"{path} {_why_refused(str(error))}") from None
    except Exception as error:
        # torch and safetensors have no common error for a damaged file: RuntimeError, EOFError, KeyError, SafetensorError are all met
        raise CheckpointError(f"{path} cannot be read; it is truncated, damaged or no weights file ({type(error).__name__}: {error})") from error


def _why_refused(said: str) -> str:
    """What is wrong with a file that torch does not load safely, by what it said."""
    if found := re.search(r"Unsupported (?:global|class): (?:GLOBAL )?(\S+)", said):
        return f"holds a Python object ({found[1]}), which is not loaded for safety: save its state dict alone"
    return "is no weights file, is damaged, or holds Python objects, which are not loaded for safety: a .pth or .safetensors of tensors is needed"


def _read_folder(folder: Path) -> dict[str, object]:
    index = next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)
    files = sorted(folder.glob("*.safetensors"))
    if index is not None:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(named.values()))]
    if not files:
        raise CheckpointError(f"{folder} holds no safetensors files")
    state: dict[str, object] = {}
    for file in files:
        part = _read(file)
        assert isinstance(part, dict)
        state |= part
    if index is not None and (absent := sorted(set(named) - set(state))):
        raise CheckpointError(f"{folder}: {index.name} lists tensors that no file holds: {_some(absent)}")
    return state


def require(state: Mapping[str, Tensor], keys: Sequence[str], what: str) -> None:
    """Raises where a key that every such file has is missing: it is another model's, or cut off."""
    missing = [key for key in keys if key not in state]
    if missing:
        raise CheckpointError(f"this is not {what}, or it is incomplete: it lacks {_some(missing)}. It holds {_some(sorted(state))}")


def count_blocks(state: Mapping[str, Tensor], pattern: str, what: str) -> int:
    """How many blocks there are, from the number that `pattern` captures in the keys; raises where one is missing between others."""
    found = {int(match[1]) for key in state if (match := re.match(pattern, key))}
    if not found or (absent := sorted(set(range(max(found) + 1)) - found)):
        raise CheckpointError(f"{what}: " + (f"blocks {_some(absent)} of {max(found) + 1} are missing" if found else "no transformer block found"))
    return len(found)


def renamed(state: Mapping[str, Tensor], rules: Sequence[tuple[str, str | None]], what: str) -> dict[str, Tensor]:
    """The state under our names. The first rule whose pattern matches the whole key counts; None drops it. Raises on a key that no rule knows."""
    result: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, key):
                if replacement is not None:
                    result[match.expand(replacement)] = value
                break
        else:
            unknown.append(key)
        if key.endswith("zero_k_bias") and value.device.type != "meta" and value.any():
            raise CheckpointError(f"{what}: {key} is not zero; these weights were trained with a key bias, which the model does not have")
    if unknown:
        raise CheckpointError(f"{what}: unknown keys {_some(unknown)}")
    return result


def load_exact(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts `state` into `model` (which may be on the meta device). Every weight must be there, none may be left over, and shapes must agree.

    Dimensions of size 1 do not count: the same vector is stored as (1, H, 1, 1) in one file and as (1, 1, H, 1) in the next.
    """
    wanted = model.state_dict()
    missing, extra = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or extra:
        parts = [f"{word} {_some(keys)}" for word, keys in (("missing", missing), ("not of this model:", extra)) if keys]
        raise CheckpointError(f"incomplete or wrong checkpoint for {type(model).__name__}: " + "; ".join(parts))
    fitting = {}
    for key, value in state.items():
        shape = wanted[key].shape
        if [n for n in value.shape if n > 1] != [n for n in shape if n > 1]:
            raise CheckpointError(f"{type(model).__name__}: {key} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        fitting[key] = value.reshape(shape)
    model.load_state_dict(fitting, assign=True)


def decoder_shape(state: Mapping[str, Tensor], what: str) -> tuple[int, list[int], int]:
    """Base channels, multipliers per level and residual blocks per level of a decoder, read from its weights (names as in `conv.py`)."""
    require(state, ["decoder.conv_in.weight", "decoder.up.0.block.0.conv1.weight", "decoder.conv_out.weight"], what)
    levels = count_blocks(state, r"decoder\.up\.(\d+)\.block", what)
    widths = [state[f"decoder.up.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    blocks = count_blocks(state, r"decoder\.up\.0\.block\.(\d+)\.", what) - 1
    if any(width % widths[0] for width in widths):
        raise CheckpointError(f"{what}: the decoder's level widths {widths} are no multiples of the finest")
    return widths[0], [width // widths[0] for width in widths], blocks
