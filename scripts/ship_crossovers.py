"""Takes the lengths from which methods pay on a GPU out of a result of scripts/gpu_check.sh into accel/crossovers.json, which the library reads."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[1] / "accel" / "crossovers.json"


def main() -> int:
    """Keeps the lengths of other architectures, and prints what it put there."""
    example = "example: python scripts/ship_crossovers.py evals/results/gpu/nvidia-h100-2026-01-02.json"
    parser = argparse.ArgumentParser(description=__doc__, epilog=example)
    parser.add_argument("result", type=Path, help="a .json file in evals/results/gpu")
    parser.add_argument("--file", type=Path, default=SHIPPED, help="where they go (default: accel/crossovers.json)")
    args = parser.parse_args()
    try:
        result = json.loads(args.result.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {args.result}: {error}")
    found = result.get("crossovers", {})
    is_sound = result.get("checks") and all(check["state"] != "failed" for check in result["checks"]) and not result.get("poisonous")
    if result.get("status") != "complete" or not is_sound:
        parser.error(f"{args.result} is not complete, or its checks did not run and pass: its lengths are not for others")
    if not found or not all(re.search(r"/sm_\d+/", key) for key in found):
        parser.error(f"{args.result} has no lengths of an NVIDIA GPU")
    shipped = json.loads(args.file.read_text(encoding="utf-8")) if args.file.exists() else {}
    args.file.write_text(json.dumps({**shipped, **found}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print("\n".join(f"{key}: {tokens}" for key, tokens in found.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
