"""One visit to a machine with an NVIDIA GPU: what must hold, then how fast it is. Started by scripts/gpu_check.sh.

Needs torch and triton only, no network. Results lie in evals/results/gpu, complete after every benchmark; `$OUT` gets copies.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from accel.evals.gpu.bars import Row, bars_table
from accel.evals.gpu.bench import Lab, Sizes, benches, run_benches
from accel.evals.gpu.checks import Profile, checks, run_check
from accel.evals.gpu.report import Record, copies_folder, environment, result_path
from accel.evals.gpu.timing import CudaTimer, DeviceLostError, clocks

FOLDER = Path(__file__).resolve().parents[1] / "results" / "gpu"
# how often a process that a broken kernel has poisoned is started anew
MOST_RESTARTS = 5


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0: every check passed and everything asked for ran or was skipped for lack of time. 1: something failed. 2: no GPU."""
    args = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA device here; nothing was measured", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + args.budget_s
    if args.resume:
        record = Record.resumed(args.resume, copies_folder())
    else:
        env = environment(device, Path(__file__).resolve().parents[2])
        record = Record(result_path(args.folder, env), {**env, "clocks before": clocks()}, copies_folder())
        if args.tests:
            record.checks = read_checks(args.tests)
        record.save()
    try:
        if args.check:
            run_checks(record, Profile(device), until=time.monotonic() + args.budget_s * (0.4 if args.bench else 1.0))
        if args.bench:
            with torch.no_grad():
                lab = Lab(device, _timer(device), record, Sizes(wants_flex=not args.no_flex), deadline)
                run_benches(lab, [b for b in benches(lab.sizes) if not args.only or any(word in b.name for word in args.only)])
    except DeviceLostError as error:
        return _restart(args, record, deadline, str(error))
    if args.bench:
        print("\n".join(bars_table(record.as_dict()["bars"])))
    else:
        record.is_complete = True
        record.save()
    print(f"\nresults: {record.path} and {record.path.with_suffix('.md').name}")
    has_failed = any(c["state"] == "failed" for c in record.checks)
    has_failed = has_failed or any(b["state"] == "failed" for b in record.benches) or bool(record.poisonous)
    return 1 if has_failed else 0


def run_checks(record: Record, profile: Profile, *, until: float, say: Callable[[str], None] = print) -> None:
    """Runs those that are not yet in the record into it, as many as fit. Raises DeviceLostError behind one that broke the device."""
    done = {check["name"] for check in record.checks}
    for check in checks(profile):
        if check.name in done:
            continue
        begin = time.monotonic()
        state, detail = run_check(check) if begin < until else ("skipped", "no time left")
        record.checks.append({"name": check.name, "state": state, "detail": detail, "took_s": round(time.monotonic() - begin, 2)})
        record.save()
        say(f"{state}: {check.name}: {detail}")
        if state == "failed" and profile.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLostError(check.name, error) from error


def read_checks(folder: Path) -> list[Row]:
    """The checks that a process with --check wrote into this folder; one failed line more where it did not come to its end."""
    written = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    found: list[Row] = [check for data in written for check in data["checks"]]
    if not any(data["status"] == "complete" for data in written):
        last = f"behind: {found[-1]['name']}" if found else "before the first one"
        found.append({"name": "all checks", "state": "failed", "detail": f"the process ended or was stopped {last}", "took_s": 0.0})
    return found


def _timer(device: torch.device) -> CudaTimer:
    """The timer of a device that still answers after the checks."""
    try:
        timer = CudaTimer(device)
        timer.settle()
    except RuntimeError as error:
        raise DeviceLostError("the checks", error) from error
    return timer


def _restart(args: argparse.Namespace, record: Record, deadline: float, why: str) -> int:
    """Goes on in a fresh process: after an illegal access every later call of this one would fail."""
    print(f"gpu_check: the device no longer answers ({why}); starting anew", file=sys.stderr)
    if args.restarts < MOST_RESTARTS:
        left = max(deadline - time.monotonic(), 0)
        command = [sys.executable, "-m", "accel.evals.gpu", "--resume", str(record.path), "--budget-s", f"{left:.0f}"]
        command += ["--restarts", str(args.restarts + 1)]
        command += [flag for flag, is_set in (("--check", args.check), ("--bench", args.bench), ("--no-flex", args.no_flex)) if is_set]
        command += [word for only in args.only for word in ("--only", only)]
        sys.stdout.flush()
        os.execv(sys.executable, command)
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accel.evals.gpu", description="Checks and measures the Triton kernels on this GPU.")
    parser.add_argument("--check", action="store_true", help="run the checks")
    parser.add_argument("--bench", action="store_true", help="run the benchmarks")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds for both together (default: %(default)s)")
    parser.add_argument("--tests", type=Path, help="folder of an earlier run with --check alone, whose checks are taken over")
    parser.add_argument("--only", action="append", default=[], help="benchmarks whose name holds this; may be repeated")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention, which compiles for half a minute")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where results go (default: evals/results/gpu)")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--restarts", type=int, default=0, help=argparse.SUPPRESS)
    parser.epilog = "example: sh scripts/gpu_check.sh --budget-s 500"
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
