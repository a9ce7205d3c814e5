"""The folder of one run: `config.yaml`, `samples.jsonl` (one line per finished sample), `result.json`. What was saved survives a kill."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from accel.errors import AccelError

SCHEMA = 1
_PACKAGES = ("torch", "transformers", "triton", "vllm", "numpy")
# settings that say how far a run goes, not what a sample is: they may differ when a run is resumed
_EXTENT = ("samples", "limit", "tasks", "lengths", "controls", "keeps", "methods", "files", "command")


class SampleKey(NamedTuple):
    """What makes a sample of a run unique."""

    task: str
    label: str
    tokens: int
    sample: int


@dataclass(frozen=True)
class SampleRecord:
    """One finished sample under one method; a line of `samples.jsonl`.

    label: the method's name in tables. options: [{method: options}], empty for dense. tokens: the length asked for, 0 for pictures; n_tokens: the
    length of the prompt. log_prob, exact: means over the answers, whose own values are the lists log_probs and hits; answers about pictures are
    written, not scored, and have no log_prob. density: share of the causal tiles that the sparse calls of the prefill computed, None where there was
    none. sparse_calls, dense_calls (by reason): attention calls of the prefill.

    picture_hash: the same for questions about one picture. visual_tokens: tokens of the picture; kept_tokens of them were left behind the last
    layer at which tokens leave, and kept_share as a mean over the decoder layers; both None where nothing was asked to leave. keep: what was asked
    for, a share or a count. not_pruned: prompts left whole, by reason. structural_tokens: visual tokens without a patch, such as row ends.
    layer_tokens: visual tokens, structural ones included, that reached each decoder layer; None where no method could drop any, and in older runs.
    features: what the judge makes of a picture that the model drew, and prefill_ms is the time of the whole picture then; None for other samples.
    psnr, perceptual: of that picture, to the one that the unpatched model draws from the same seed; None for that one, and in older runs.
    cache: entries per head and bytes of a compressed cache (`drawn.cache_figures`, of a decoder `decoder_cache.held_figures`), None where none was.
    memory: what drawing one picture takes of the process's memory (`drawn.memory_figures`); told by the first sample of each label only.
    """

    task: str
    label: str
    options: list[dict[str, dict[str, Any]]]
    tokens: int
    sample: int
    seed: int
    n_tokens: int
    prompt_hash: str
    log_prob: float | None
    exact: float
    log_probs: list[float]
    hits: list[float]
    questions: list[str]
    expected: list[str]
    answers: list[str]
    density: float | None
    sparse_calls: int
    dense_calls: dict[str, int]
    prefill_ms: float
    selection_ms: float | None = None
    picture_hash: str | None = None
    visual_tokens: int = 0
    kept_tokens: int | None = None
    kept_share: float | None = None
    keep: float | int | None = None
    not_pruned: dict[str, int] = field(default_factory=dict)
    structural_tokens: int = 0
    layer_tokens: list[int] | None = None
    features: list[float] | None = None
    psnr: float | None = None
    perceptual: float | None = None
    cache: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None

    @property
    def last_visual_layer(self) -> int | None:
        """The last decoder layer with visual tokens, −1 where none had any; None where `layer_tokens` is."""
        return None if self.layer_tokens is None else max((i for i, n in enumerate(self.layer_tokens) if n), default=-1)

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.task, self.label, self.tokens, self.sample)


class RunFolder:
    """An open run folder. Build it with `create`."""

    def __init__(self, path: Path, config: dict[str, Any], records: list[SampleRecord]) -> None:
        self.path = path
        self.config = config
        self._records = {record.key: record for record in records}
        self._prompts = {_place(record.key): record.prompt_hash for record in records}

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> RunFolder:
        """Makes the folder and writes `config.yaml`; with `resume`, goes on with the samples of an earlier run of the same settings.

        Raises AccelError as `check` does, and where the samples of an earlier run cannot be read. A last line that a kill left half-written is
        taken off.
        """
        import yaml

        folder, plain = Path(path), dict(config)
        cls.check(folder, plain, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        return cls(folder, plain, _read_samples(folder / "samples.jsonl"))

    @staticmethod
    def check(path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        """Raises AccelError where the folder holds samples of a run already; with `resume`, where its settings differ (naming them)."""
        import yaml

        folder = Path(path)
        settings, samples = folder / "config.yaml", folder / "samples.jsonl"
        has_samples = samples.exists() and samples.stat().st_size > 0
        if has_samples and not resume:
            raise AccelError(f"{folder} holds a run already: choose another folder with --out, or go on with it by --resume")
        if resume and (has_samples or settings.exists()):
            _same_settings(folder, yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else {}, config)

    @property
    def records(self) -> list[SampleRecord]:
        """Finished samples, in the order in which they finished."""
        return list(self._records.values())

    def done(self) -> set[SampleKey]:
        """Keys of the finished samples."""
        return set(self._records)

    def get(self, key: SampleKey) -> SampleRecord | None:
        return self._records.get(key)

    def prompt_hash(self, key: SampleKey) -> str | None:
        """The hash of the prompt that this sample was given under some label; None where none of them has finished."""
        return self._prompts.get(_place(key))

    def append(self, record: SampleRecord) -> None:
        """Saves one finished sample. A failure to save raises: a run that loses results has failed."""
        if record.key in self._records:
            raise AccelError(f"sample {tuple(record.key)} of {self.path} is saved already")
        with (self.path / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[record.key] = record
        self._prompts.setdefault(_place(record.key), record.prompt_hash)

    def finish(self, rows: Sequence[Mapping[str, Any]], **sections: Any) -> Path:
        """Writes `result.json` and returns its path. rows: one per task, length and method (`scores`); sections: further entries, or others for
        `created` and `env`."""
        result = {
            "schema": SCHEMA,
            "created": sections.pop("created", None) or datetime.now(UTC).isoformat(timespec="seconds"),
            **sections,
            "config": self.config,
            "env": sections.get("env") or environment(),
            "scores": list(rows),
        }
        target = self.path / "result.json"
        _write(target, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return target


def _place(key: SampleKey) -> tuple[str, int, int]:
    return key.task, key.tokens, key.sample


def environment() -> dict[str, Any]:
    """What a number depends on besides the code: versions, processor, threads, and the commit where accel runs from a checkout."""
    import torch

    import accel

    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {
        "accel": accel.__version__, **packages, "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}",
        "device": device, "cpu": _cpu_name(), "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    return {**found, "git": commit} if (commit := _commit()) else found


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that holds this file, "+" behind it where files were changed; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):       # no git, or no commit yet: the commit is a help, not a condition
        return None
    return commit.strip() + ("+" if changes.strip() else "")


def _same_settings(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    old = before if isinstance(before, dict) else {}
    changed = [key for key in {**old, **now} if key not in _EXTENT and old.get(key) != now.get(key)]
    earlier = old.get("methods") or {}
    changed += [f"method {label}" for label, methods in (now.get("methods") or {}).items() if earlier.get(label, methods) != methods]
    if changed:
        names = {"reference": "the first sparse method (the controls get its density)"}
        differing = f"{', '.join(names.get(key, key) for key in changed)} {'differs' if len(changed) == 1 else 'differ'}"
        raise AccelError(f"{folder} cannot be resumed: {differing} from its config.yaml. Use the same settings, or another --out")


def _read_samples(path: Path) -> list[SampleRecord]:
    """The finished samples; a half-written last line is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.decode("utf-8").splitlines(), start=1):
        try:
            records.append(SampleRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise AccelError(f"{path}, line {number}, is no sample of this version of accel: {error}") from error
    return records


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
