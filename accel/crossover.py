"""The length from which a sparse method pays: measured here by `accel tune crossover`, else shipped for the GPU's architecture, else a default."""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, OptionError
from accel.settings import cache_folder

if TYPE_CHECKING:
    from accel.protocols import AttentionStep, SparseAttention

# Where nothing was measured: on CPUs 4K is break-even with a small trained model (smollm2-baseline.md §4),
# on GPUs 16K (sparse-attention.md §2.2).
DEFAULT_TOKENS = {"cpu": 4096, "cuda": 16384}
# On a GPU with heads wider than 128, of methods that choose their blocks by the prompt: a guess on the safe side. On an H200 cuDNN's dense
# attention reaches 750 TFLOP/s there and our kernel 480 (evals/results/gpu), and nothing was measured beyond 32K tokens.
WIDE_HEAD_DIM, WIDE_HEAD_TOKENS = 128, 131_072

# Recorded where sparse was slower at every measured length: above any prompt, and readable as what it is in a recipe.
NEVER_TOKENS = 1_000_000_000


# Measured on GPUs by `scripts/gpu_check.sh` and put here by `scripts/ship_crossovers.py`; an architecture that is missing was not measured.
SHIPPED_FILE = Path(__file__).with_name("crossovers.json")


def crossover_file() -> Path:
    """Where this machine's measured crossovers live; `ACCEL_CACHE` overrides the folder."""
    return cache_folder() / "crossover.json"


def crossover_key(method: SparseAttention, *, device: str, dtype: str, head_dim: int) -> str:
    """Name of one measurement: what the crossover depends on most. `flexprefill:gamma=0.9/sm_90/bfloat16/d128`.

    Options at their defaults are left out, and those that say which calls run sparse rather than how.
    """
    changed = {name: value for name, value in method.changed_options().items() if name not in method.reach_options}
    options = ":" + ",".join(f"{name}={value}" for name, value in changed.items()) if changed else ""
    return f"{method.method_name()}{options}/{_where(device, dtype, head_dim)}"


@cache
def architecture(device: str) -> str:
    """`sm_90` for the current NVIDIA GPU, else the device as torch calls it: lengths differ more between GPUs than between processors.

    A process whose GPUs are of several architectures goes by the current one.
    """
    if device != "cuda":
        return device
    import torch

    if torch.version.cuda is None or not torch.cuda.is_available():
        return device
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@cache
def shipped_crossovers() -> dict[str, int]:
    """Crossovers that were measured on GPUs and come with accel, by `crossover_key`; those of bfloat16 hold for float16, too."""
    measured = _read(SHIPPED_FILE)
    # tensor cores take both at one rate, and dense attention gains as much
    return {**{key.replace("/bfloat16/", "/float16/"): tokens for key, tokens in measured.items()}, **measured}


@cache
def measured_crossovers() -> dict[str, int]:
    """This machine's measured crossovers by `crossover_key`; empty when none was measured.

    Read once per process. A damaged file or entry is left out with a warning, never guessed at: the default applies instead.
    """
    return _read(crossover_file())


def record_crossover(key: str, tokens: int) -> Path:
    """Writes one measured crossover beside the others, and returns the file.

    Processes that record at the same time keep each other's entries, and a reader never sees half a file. A damaged file is set aside as
    `crossover.json.damaged`. Raises OptionError for a value that is no length, AccelError where the folder cannot be written.
    """
    if not _is_length(tokens):
        raise OptionError(f"a crossover is a whole number of tokens, at least 0; got {tokens!r} for {key}")
    path = crossover_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if path.exists() and _entries(path) is None:
                path.replace(path.with_name(path.name + ".damaged"))
            _write_whole(path, {**_read(path), key: tokens})
    except OSError as error:
        raise AccelError(f"cannot record the crossover in {path}: {error}. ACCEL_CACHE names another folder.") from error
    measured_crossovers.cache_clear()
    return path


def crossover_tokens(method: SparseAttention, step: AttentionStep) -> int:
    """Keys from which `method` is expected to beat dense attention here: measured with its options, or else a cautious default.

    What was measured with the method's default options proves nothing of others, but makes the default more cautious where it is longer.
    Shapes and options only: nothing is read from the device.
    """
    measured, shipped = measured_crossovers(), shipped_crossovers() if step.device == "cuda" else {}
    # asked by every call of every layer: names are made where there is something to find
    if not measured and not shipped:
        return _default_tokens(method, step)
    where = (step.device, step.dtype, step.head_dim)
    try:
        exact, usual = _keys(method, *where)
    # a method from elsewhere may have options that cannot be hashed
    except TypeError:
        exact, usual = _keys.__wrapped__(method, *where)
    if (found := measured.get(exact, shipped.get(exact))) is not None:
        return found
    return max(_default_tokens(method, step), measured.get(usual, shipped.get(usual, 0)))


def _default_tokens(method: SparseAttention, step: AttentionStep) -> int:
    is_wide = step.device == "cuda" and step.head_dim > WIDE_HEAD_DIM and method.static_pattern(step) is None
    return WIDE_HEAD_TOKENS if is_wide else DEFAULT_TOKENS.get(step.device, DEFAULT_TOKENS["cuda"])


@lru_cache(maxsize=256)
def _keys(method: SparseAttention, device: str, dtype: str, head_dim: int) -> tuple[str, str]:
    """The key of a method with its options, and that of its default options."""
    exact = crossover_key(method, device=device, dtype=dtype, head_dim=head_dim)
    return exact, f"{method.method_name()}/{_where(device, dtype, head_dim)}"


def _where(device: str, dtype: str, head_dim: int) -> str:
    return f"{architecture(device)}/{dtype}/d{head_dim}"


def _is_length(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entries(path: Path) -> dict[str, Any] | None:
    """What the file holds, unchecked; None where it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:      # broken JSON and broken UTF-8 both
        return None
    return found if isinstance(found, dict) else None


def _read(path: Path) -> dict[str, int]:
    """The valid entries of the file; every reason to leave something out is one warning."""
    try:
        found = _entries(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        warnings.warn(f"accel: {path} cannot be read ({error}); using the default crossover lengths", stacklevel=3)
        return {}
    if found is None:
        warnings.warn(f"accel: {path} is damaged; using the default crossover lengths. `accel tune crossover` measures anew.", stacklevel=3)
        return {}
    wrong = sorted(key for key, value in found.items() if not _is_length(value))
    if wrong:
        warnings.warn(f"accel: {path}: no length of tokens for {', '.join(wrong)}; ignored", stacklevel=3)
    return {key: value for key, value in found.items() if _is_length(value)}


def _write_whole(path: Path, values: dict[str, int]) -> None:
    """Replaces the file in one step."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".new")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(values, indent=2, sort_keys=True) + "\n")
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds `<path>.lock` against other processes. Where the system has no such lock, the last writer wins."""
    with path.with_name(path.name + ".lock").open("w") as lock:
        try:
            import fcntl
        except ImportError:     # not a Unix
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield       # closing the file releases the lock
