"""The folder of one run: `config.yaml`, `samples.jsonl` (one line per finished sample), `result.json`. What was saved survives a kill."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from accel.errors import AccelError

SCHEMA = 1
SAMPLES = "samples.jsonl"
# what the run was begun on; held by the process that adds to it
MACHINE, LOCK = "machine.json", ".lock"
# fields of a sample that differ between two runs of the same settings
MEASURED = ("prefill_ms", "selection_ms", "ttft_ms", "tpot_ms", "e2el_ms", "energy_j", "peak_bytes", "memory")
_PACKAGES = ("torch", "transformers", "triton", "vllm", "numpy")
# settings that say how far a run goes, not what a sample is: they may differ when a run is resumed
_EXTENT = ("samples", "limit", "tasks", "lengths", "controls", "keeps", "methods", "files", "command", "threads", "warmup")


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
    cache: entries per head and bytes of a compressed cache (`drawing.judged.cache_figures`, of a decoder `decoder_cache.held_figures`), None where
    none was.
    memory: what drawing one picture takes of the process's memory (`drawing.judged.memory_figures`); told by the first sample of each label only.

    prefill_ms: until the first token behind the prompt is known, or the one pass over prompt and answers has ended; behind a shared prefill, of the
    rest. ttft_ms … energy_j: as in `timing.Times`; None where the prefill was shared, of pictures that were drawn but e2el_ms. peak_bytes: growth
    of memory over what was held before: on a GPU of every sample, on a CPU of the first of each label and length, in its warm-up. batch: prompts
    read together; above 1, prefill_ms, selection_ms, density, calls, peak_bytes and energy_j are those of the batch. has_template: as in `Sample`.
    depths: of the answers, as in `Answer`; None where none of them has a place, and in older runs.
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
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2el_ms: float | None = None
    n_output_tokens: int | None = None
    finish_reason: str | None = None
    energy_j: float | None = None
    peak_bytes: int | None = None
    batch: int = 1
    has_template: bool | None = None
    depths: list[float | None] | None = None

    @property
    def selection_share(self) -> float | None:
        """Part of the prefill spent on choosing what is read (host clock); None where nothing chose, or nothing was sparse."""
        return self.selection_ms / self.prefill_ms if self.selection_ms is not None and self.sparse_calls and self.prefill_ms else None

    @property
    def last_visual_layer(self) -> int | None:
        """The last decoder layer with visual tokens, −1 where none had any; None where `layer_tokens` is."""
        return None if self.layer_tokens is None else max((i for i, n in enumerate(self.layer_tokens) if n), default=-1)

    @property
    def key(self) -> SampleKey:
        return SampleKey(self.task, self.label, self.tokens, self.sample)


class RunFolder:
    """An open run folder. Build it with `create`.

    Several processes may add to one run: the others `join` it and append to files of their own, which `collect` or the next `create` takes in.
    """

    def __init__(self, path: Path, config: dict[str, Any], records: list[SampleRecord], *, part: int = 0) -> None:
        self.path = path
        self.config = config
        self._file = path / (f"samples-{part}.jsonl" if part else SAMPLES)
        # closed with the folder, which lets others in
        self._lock: TextIO | None = None
        self._hold(records)

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> RunFolder:
        """Makes the folder and writes `config.yaml`; with `resume`, goes on with the samples of an earlier run of the same settings.

        Raises AccelError as `check` does, where another process adds to the run, and where the samples of an earlier one cannot be read. A last line
        that a kill left half-written is taken off.
        """
        import yaml

        folder, plain = Path(path), dict(config)
        cls.check(folder, plain, resume=resume)
        with _telling(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = _held_alone(folder)
            records = _read_all(folder)
            _take_in_parts(folder, records)
        _write(folder / "config.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        opened = cls(folder, plain, records)
        opened._lock = lock
        return opened

    @classmethod
    def join(cls, path: str | Path, config: Mapping[str, Any], *, part: int) -> RunFolder:
        """The folder that another process has created, for a further process that adds samples to it. part: its number, from 1.

        None may add a sample before all have joined.
        """
        folder = Path(path)
        return cls(folder, dict(config), _read_all(folder), part=part)

    def collect(self, order: Sequence[SampleKey]) -> None:
        """Takes in what other processes have added since, and sorts samples.jsonl by `order`; samples beyond it come first, as they finished."""
        place = {key: i for i, key in enumerate(order)}
        records = _read_all(self.path)
        ordered = sorted(records, key=lambda record: place.get(record.key, -1))
        _take_in_parts(self.path, ordered, is_sorted=ordered == records)
        self._hold(ordered)

    @staticmethod
    def check(path: str | Path, config: Mapping[str, Any], *, resume: bool = False) -> None:
        """Raises AccelError where the folder holds samples of a run already; with `resume`, where its settings differ (naming them), or where fewer
        samples are asked for than it holds.

        So it does where the folder cannot be written to.
        """
        import yaml

        folder = Path(path)
        _require_writable(folder)
        settings = folder / "config.yaml"
        has_samples = any(file.stat().st_size > 0 for file in _sample_files(folder))
        if has_samples and not resume:
            raise AccelError(f"{folder} holds a run already: choose another folder with --out, or go on with it by --resume")
        if resume and (has_samples or settings.exists()):
            _same_settings(folder, yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else {}, config)
            _require_samples_kept(folder, config)

    def changes_since_begun(self, machine: Mapping[str, str | None]) -> list[str]:
        """A line for what is another now than when the run was begun, which is written down at the first call. machine: device and versions."""
        file = self.path / MACHINE
        begun: dict[str, str | None] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if not begun:
            _write(file, json.dumps(dict(machine), indent=1) + "\n")
        told = [f"{key} {begun[key]}, then {value}" for key, value in machine.items() if key in begun and begun[key] != value]
        return [f"Begun and resumed with other things, which scores and times may depend on: {'; '.join(told)}."] if told else []

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
        line = _line(record)
        with _telling(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._records[record.key] = record
        self._prompts.setdefault(_place(record.key), record.prompt_hash)

    def n_saved(self) -> int:
        """Finished samples in the folder, those of other processes among them."""
        return sum(file.read_bytes().count(b"\n") for file in _sample_files(self.path))

    def _hold(self, records: Sequence[SampleRecord]) -> None:
        self._records = {record.key: record for record in records}
        self._prompts = {_place(record.key): record.prompt_hash for record in records}

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
        names = {
            "reference": "the first sparse method (the controls get its density)",
            "questions": "--method (beside one that drops cache entries, all methods are asked the questions of a text one by one)",
        }
        differing = f"{', '.join(names.get(key, key) for key in changed)} {'differs' if len(changed) == 1 else 'differ'}"
        raise AccelError(f"{folder} cannot be resumed: {differing} from its config.yaml. Use the same settings, or another --out")


def _require_samples_kept(folder: Path, now: Mapping[str, Any]) -> None:
    """Raises AccelError where finished samples of the tasks asked for would fall out of the report: they would be hard to miss there."""
    tasks, n = now.get("tasks"), now.get("samples")
    held = max((record.sample + 1 for record in _read_all(folder) if tasks is None or record.task in tasks), default=0)
    if n is not None and n < held:
        raise AccelError(
            f"{folder} holds {held} samples per task, asked for {n}: fewer would leave finished ones out of its report. "
            f"Ask for at least {held}, or choose another folder with --out"
        )


def _sample_files(folder: Path) -> list[Path]:
    """samples.jsonl, and the files of further processes that have not been taken in yet; those that exist."""
    parts = sorted(folder.glob("samples-*.jsonl"))
    return [file for file in (folder / SAMPLES, *parts) if file.exists()]


def _read_all(folder: Path) -> list[SampleRecord]:
    """The finished samples of all files; AccelError where two lines are about the same sample and differ."""
    found: dict[SampleKey, SampleRecord] = {}
    for file in _sample_files(folder):
        for number, record in _read_samples(file):
            # a kill may come between taking a part in and removing it
            if found.setdefault(record.key, record) != record:
                raise AccelError(
                    f"{file}, line {number}, tells {tuple(record.key)} a second time, and otherwise: two runs have written to {folder}. "
                    "Delete one of the two lines, then go on with --resume"
                )
    return list(found.values())


def _take_in_parts(folder: Path, records: Sequence[SampleRecord], *, is_sorted: bool = True) -> None:
    """Writes all records to samples.jsonl and removes the files of further processes; does nothing where there are none and the order is right."""
    parts = [file for file in _sample_files(folder) if file.name != SAMPLES]
    if parts or not is_sorted:
        _write(folder / SAMPLES, "".join(map(_line, records)))
        for file in parts:
            file.unlink()


def _line(record: SampleRecord) -> str:
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False) + "\n"


def _read_samples(path: Path) -> list[tuple[int, SampleRecord]]:
    """The finished samples by line number; a half-written last line is removed from the file."""
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    records = []
    # bytes, since `str.splitlines` ends lines at characters that a model may write
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            records.append((number, SampleRecord(**json.loads(line))))
        except (ValueError, TypeError) as error:
            raise AccelError(
                f"{path}, line {number}, is no sample of this version of accel: {error}. Without that line, --resume measures its sample again"
            ) from error
    return records


def _require_writable(folder: Path) -> None:
    """Raises AccelError where nothing can be written to the folder, or to the nearest one above that exists."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise AccelError(f"cannot write results to {folder}: {nearest} is a file. Choose another folder with --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise AccelError(f"cannot write results to {folder}: no permission to write to {nearest}. Choose another folder with --out")


@contextmanager
def _telling(path: Path) -> Iterator[None]:
    """Turns what the system says of a write that failed into an AccelError that names the file and what is left."""
    try:
        yield
    except OSError as error:
        raise AccelError(
            f"cannot write {path}: {error.strerror or error}. Samples that were finished before are safe; go on with --resume once that is mended"
        ) from error


def _write(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader never sees half of it."""
    part = path.with_name(f".{path.name}.part")
    with _telling(path):
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def _held_alone(folder: Path) -> TextIO | None:
    """A file that this process has locked until it is closed; None where the system has no locks. AccelError where another process has it."""
    try:
        import fcntl
    except ImportError:     # not a Unix
        return None
    file = (folder / LOCK).open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise AccelError(f"another process is adding to {folder}: wait for its end, or stop it") from None
    except OSError:         # a file system without locks
        pass
    return file
