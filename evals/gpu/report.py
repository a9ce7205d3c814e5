"""What a visit to a GPU leaves behind: a JSON file that is complete after every benchmark, and a markdown page."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from accel.evals.gpu.bars import Row, bars, bars_table, best_dense, dense_ms
from accel.evals.gpu.crossovers import crossovers, crossovers_section
from accel.evals.gpu.timing import Times

SCHEMA = 1


@dataclass
class Record:
    """Results so far. `save` writes everything, so that a visit cut short loses only what had not been measured."""

    path: Path
    env: dict[str, Any]
    copies: Path | None = None
    checks: list[Row] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    benches: list[Row] = field(default_factory=list)
    poisonous: list[list[str]] = field(default_factory=list)    # [benchmark, contestant] after which the device answered no more
    is_complete: bool = False

    @classmethod
    def resumed(cls, path: Path, copies: Path | None) -> Record:
        """What an earlier process of the same visit wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, data["env"], copies, data["checks"], data["rows"], data["benches"], data["poisonous"])

    def add(self, bench: str, what: str, times: Times | None, **facts: Any) -> None:
        """One measured contestant."""
        ms = {} if times is None else {"ms": times.median, "p20_ms": times.p20, "p80_ms": times.p80, "n": times.n}
        self.rows.append({"bench": bench, "what": what, **facts, **ms})

    def done(self, bench: str) -> bool:
        return any(entry["bench"] == bench for entry in self.benches)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA, "status": "complete" if self.is_complete else "partial", "env": self.env, "bars": bars(self.rows),
            "crossovers": crossovers(self.rows, sm=self.env.get("sm", "")),
            "checks": self.checks, "benches": self.benches, "poisonous": self.poisonous, "rows": self.rows,
        }  # fmt: skip

    def save(self) -> None:
        """Writes JSON and markdown; a reader never sees half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        page = self.path.with_suffix(".md")
        for path, text in ((self.path, json.dumps(self.as_dict(), indent=1) + "\n"), (page, markdown(self.as_dict()))):
            draft = path.with_name(path.name + ".part")
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
            if self.copies is not None:
                self.copies.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.copies / path.name)


COLUMNS = {
    "what": "what", "density": "density", "ms": "ms", "p20_ms": "p20", "p80_ms": "p80", "n": "n", "tflops": "TFLOP/s", "gbs": "GB/s",
    "of_copy": "of copy", "to_flash": "SDPA flash ÷ this", "to_best": "best dense ÷ this", "host_us": "host µs", "note": "",
}  # fmt: skip


def markdown(data: dict[str, Any]) -> str:
    """The page beside the JSON file."""
    env = data["env"]
    lines = [f"# {env.get('device', 'unknown device')}, {env.get('date', '')}", ""]
    lines += [f"Status: {data['status']}. " + ", ".join(f"{name} {value}" for name, value in env.items() if name not in ("device", "date")) + ".", ""]
    lines += ["## Bars", "", *bars_table(data["bars"]), "", *crossovers_section(data["crossovers"]), *_checks_section(data["checks"])]
    lines += [
        "Times are medians with the 20th and 80th percentile, device events, caches cold, contestants in turn; compilation is left out.",
        "TFLOP/s count the listed blocks, those on the diagonal with their visible pairs only. Density is reached, not asked for.", "",
    ]  # fmt: skip
    for entry in data["benches"]:
        lines += _bench_section(entry, [with_ratios(r, data["rows"]) for r in data["rows"] if r["bench"] == entry["bench"]])
    return "\n".join(lines).rstrip() + "\n"


def with_ratios(row: Row, rows: Sequence[Row]) -> Row:
    """A row with how much faster it is than the dense attention of the same benchmark."""
    flash, best = dense_ms(rows, row["bench"], "sdpa flash"), best_dense(rows, row["bench"])
    if "ms" not in row or row["bench"].startswith("decode"):
        return row
    return {**row, **{name: dense / row["ms"] for name, dense in (("to_flash", flash), ("to_best", best)) if dense is not None}}


def _checks_section(checks: Sequence[Row]) -> list[str]:
    counts = {state: sum(c["state"] == state for c in checks) for state in ("passed", "failed", "skipped")}
    lines = ["## Checks", "", ", ".join(f"{n} {state}" for state, n in counts.items()) if checks else "not run", ""]
    unusual = [f"- {c['state']}: {c['name']}: {_one_line(c['detail'])}" for c in checks if c["state"] != "passed"]
    return [*lines, *unusual, ""] if unusual else lines


def _bench_section(entry: Row, rows: Sequence[Row]) -> list[str]:
    lines = [f"## {entry['bench']}", ""]
    if entry.get("about"):
        lines += [entry["about"], ""]
    if rows:
        used = [name for name in COLUMNS if any(r.get(name) is not None for r in rows)]
        lines += ["| " + " | ".join(COLUMNS[name] for name in used) + " |", "|" + "---|" * len(used)]
        lines += ["| " + " | ".join(_cell(r.get(name)) for name in used) + " |" for r in rows]
        lines.append("")
    if entry.get("clocks"):
        lines += ["nvidia-smi behind it: " + ", ".join(f"{name} {value}" for name, value in entry["clocks"].items()) + ".", ""]
    if entry["state"] != "measured":
        lines += [f"{entry['state']}: {_one_line(entry.get('reason', ''))}", ""]
    for name, why in entry.get("failed", {}).items():
        lines.append(f"- {name}: not measured, {_one_line(why)}")
    return [*lines, ""] if entry.get("failed") else lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _one_line(str(value))


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "/")


def environment(device: torch.device, root: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    env: dict[str, Any] = {"device": "cpu", "date": datetime.now(UTC).strftime("%Y-%m-%d")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        env["device"] = properties.name
        env["sm"] = f"{properties.major}.{properties.minor}"
        env["multiprocessors"] = properties.multi_processor_count
        env["memory_gib"] = round(properties.total_memory / 2**30)
        env["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    software = {"torch": torch.__version__, "cuda": torch.version.cuda, "triton": _triton(), "python": platform.python_version()}
    return {**env, **software, "git": _git(root)}


def _git(root: Path) -> str:
    revision = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return revision + ("" if changed in ("", "unknown") else " and changes")


def _output(command: list[str]) -> str:
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return asked.stdout.strip().splitlines()[0] if asked.stdout.strip() else ""


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return str(triton.__version__)


def result_path(folder: Path, env: dict[str, Any]) -> Path:
    """`<device>-<date>.json`, with a number behind it where that one exists."""
    name = re.sub(r"[^a-z0-9]+", "-", env["device"].lower()).strip("-")
    path, i = folder / f"{name}-{env['date']}.json", 1
    while path.exists():
        i += 1
        path = folder / f"{name}-{env['date']}-{i}.json"
    return path


def copies_folder() -> Path | None:
    """`$OUT`, where the results are copied to."""
    return Path(os.environ["OUT"]) if os.environ.get("OUT") else None
