"""Which library path this machine is fast in: a few timings in the first processes, remembered per process and on disk (kernels.md §2.5).

Nothing is assumed from the CPU's name: beside fp32, bf16 products are four times as fast with AVX512-BF16 and take twelve times as long with
AVX2. Delete `cpu_probe.json` in the cache folder to measure anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from accel.kernels.block_sparse import cpu_native
from accel.settings import cache_folder

# "medium" may mean bf16 products (AMX does that): it is used only where it measurably does not
MAX_ROUTED_ERROR = 2e-6
# routed products and torch's own attention must win by more than the noise of the probe
MIN_GAIN = 1.1
# a bf16 product this many times slower than fp32 is not timed at full size, which would take seconds
HOPELESS = 4.0

# processes that measure before the shortest times stand: threads that wait for a core can make a product a thousand times as slow for a whole probe
PROBES = 3

Precision = Literal["accurate", "fast"]

# query rows, head size and keys of one tile
_ROWS, _DIM, _KEYS = 128, 128, 1024


@dataclass(frozen=True)
class Timings:
    """Milliseconds of a product of n tiles (n, 128, 128) x (n, 128, 1024) by precision, and of attention over the same shape; n ≥ 4 by threads."""

    fp32_ms: float
    routed_ms: float        # fp32 with float32_matmul_precision "medium"
    routed_error: float     # its relative error against float64
    bf16_ms: float
    softmax_ms: float       # fp32, (n, 128, 1024)
    sdpa_fp32_ms: float     # torch's own attention by tiles: both products and the softmax
    sdpa_bf16_ms: float
    dense_fp32_ms: float    # the same over many query rows at once, where its larger tiles run
    dense_bf16_ms: float
    native_ms: float        # the compiled kernel on bf16: both products and the softmax; inf where it cannot run
    probes: float = 1       # processes that measured so far; the times are the shortest of theirs

    def and_then(self, other: Timings) -> Timings:
        """The shortest times of both, for a busy machine can only add; errors do not depend on it, and the larger one counts."""
        shortest = {f.name: min(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Timings(**{**shortest, "routed_error": max(self.routed_error, other.routed_error), "probes": self.probes + other.probes})


@dataclass(frozen=True)
class Route:
    """How attention is computed: by which kernel and, for "gemm", in which precision its two products run.

    "sdpa" computes in the inputs' dtype, "native" (`cpu_native`) bf16 inputs with fp32 scores. is_routed: fp32 products go to oneDNN while
    our operator runs.
    """

    kernel: Literal["gemm", "sdpa", "native"]
    score_dtype: torch.dtype = torch.float32
    value_dtype: torch.dtype = torch.float32
    is_routed: bool = False

    @property
    def by_products(self) -> Route:
        """The same through matrix products, for what the other kernels cannot do. torch's own kernel sums in fp32, so that fp32 replaces it."""
        return Route("gemm") if self.kernel == "sdpa" else replace(self, kernel="gemm")


# the compiled kernel, which has no choice of precision: its scores are always fp32
NATIVE = Route("native", torch.float32, torch.bfloat16)


def choose_route(timings: Timings, dtype: torch.dtype, precision: Precision) -> Route:
    """The fastest path for inputs of `dtype` that is accurate enough: scores in bf16 only when `precision` is "fast"."""
    is_routed = timings.routed_error < MAX_ROUTED_ERROR and timings.routed_ms * MIN_GAIN < timings.fp32_ms
    routes = [Route("gemm", torch.float32, torch.float32, is_routed)]
    if dtype == torch.bfloat16:
        routes.append(Route("gemm", torch.float32, torch.bfloat16, is_routed))
        if precision == "fast":
            routes.append(Route("gemm", torch.bfloat16, torch.bfloat16))
    candidates = {route: gemm_ms(timings, route) for route in routes}
    if dtype == torch.bfloat16:
        candidates[Route("sdpa", dtype, dtype)] = timings.sdpa_bf16_ms * MIN_GAIN
        candidates[NATIVE] = timings.native_ms
    elif dtype == torch.float32:
        candidates[Route("sdpa", dtype, dtype)] = timings.sdpa_fp32_ms * MIN_GAIN
    # float16 is always up-cast: its products and its SDPA are slow everywhere
    return min(candidates, key=lambda route: candidates[route])


def choose_dense_route(timings: Timings, dtype: torch.dtype, precision: Precision) -> Route:
    """`choose_route` for a whole causal prefill: torch's own attention unless ours clearly beats it."""
    route = choose_route(timings, dtype, precision)
    if dtype not in (torch.bfloat16, torch.float32):
        return route
    torch_ms = timings.dense_bf16_ms if dtype == torch.bfloat16 else timings.dense_fp32_ms
    own_ms = {"gemm": gemm_ms(timings, route), "native": timings.native_ms, "sdpa": torch.inf}[route.kernel]
    return route if own_ms * MIN_GAIN < torch_ms else Route("sdpa", dtype, dtype)


def gemm_ms(timings: Timings, route: Route) -> float:
    """Expected time of both products and the softmax between them."""
    fp32_ms = timings.routed_ms if route.is_routed else timings.fp32_ms
    return sum(timings.bf16_ms if dtype == torch.bfloat16 else fp32_ms for dtype in (route.score_dtype, route.value_dtype)) + timings.softmax_ms


def route_for(dtype: torch.dtype, precision: Precision, *, is_dense: bool = False) -> Route:
    """This machine's `choose_route`, or `choose_dense_route`, with the present number of threads."""
    choose = choose_dense_route if is_dense else choose_route
    return choose(machine_timings(torch.get_num_threads()), dtype, precision)


@cache
def machine_timings(n_threads: int) -> Timings:
    """Timings of this machine: from the cache file where `PROBES` processes measured them, measured and written there otherwise."""
    kernels = "without" if cpu_native.why_unavailable() else "with"
    cores = f"{n_threads} threads on {usable_cores()} cores"
    key = f"{cpu_name()}/torch {torch.__version__}/{torch.backends.cpu.get_cpu_capability()}/{cores}/{kernels} compiled kernel"
    path = cache_folder() / "cpu_probe.json"
    known = read_timings(path)
    before = known.get(key)
    if before is None or before.probes < PROBES:
        known[key] = measure() if before is None else before.and_then(measure())
        write_timings(path, known)
    return known[key]


def usable_cores() -> int:
    """Cores that a thread started here may run on; one where OMP_PROC_BIND ties the main thread, and with it the compiled kernel's, to a core."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_timings(path: Path) -> dict[str, Timings]:
    """The measurements in the file by machine; whatever is damaged is left out and so measured anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {f.name for f in fields(Timings)}
    if not isinstance(found, dict):
        return {}
    return {
        key: Timings(**{name: float(value) for name, value in entry.items()})
        for key, entry in found.items()
        if isinstance(entry, dict) and entry.keys() == names and all(_is_measurement(v) for v in entry.values())
    }


def write_timings(path: Path, known: dict[str, Timings]) -> None:
    """Replaces the file in one step. A folder that cannot be written costs the next process a probe, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({key: asdict(value) for key, value in known.items()}, file, indent=2, sort_keys=True)
        Path(name).replace(path)


def _is_measurement(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def cpu_name() -> str:
    """The CPU's model name where the system tells it, for the cache key."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # family and model too: virtual machines hide the name
    wanted = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
    named = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in named.items()}
    return " ".join(facts[name] for name in wanted if name in facts) or platform.machine()


def measure() -> Timings:
    """Times the candidates on this machine: about 20 ms, more where bf16 is emulated."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        return _measure()


def _measure() -> Timings:
    n = max(4, 2 * torch.get_num_threads())
    # dtype and device are said: somebody may have changed the defaults
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator("cpu").manual_seed(0)
    q, k = (torch.randn(n, rows, _DIM, generator=generator, **options) for rows in (_ROWS, _KEYS))
    kt = k.transpose(1, 2)
    scores = torch.empty(n, _ROWS, _KEYS, **options)
    # torch's attention over a part that keeps every thread busy and ends within a scheduler slice; from 768 rows on it takes larger tiles
    n_some, n_rows, n_keys = max(1, n // 4), 768, 256

    def routed() -> Tensor:
        with fp32_products_routed(True):
            return torch.bmm(q, kt, out=scores)

    exact = torch.bmm(q[:1].double(), kt[:1].double())
    error = float((routed()[:1] - exact).norm() / exact.norm())
    runs: dict[str, Callable[[], object]] = {
        "fp32_ms": lambda: torch.bmm(q, kt, out=scores),
        "routed_ms": routed,
        "softmax_ms": lambda: torch.softmax(scores, -1),
    }
    for name, (b_q, b_k) in {"fp32": (q, k), "bf16": (q.bfloat16(), k.bfloat16())}.items():
        runs[f"sdpa_{name}_ms"] = partial(_attend, b_q[:n_some, None], b_k[:n_some, None])
        runs[f"dense_{name}_ms"] = partial(_attend, b_k[:n_some, None, :n_rows], b_k[:n_some, None, :n_keys])
    best = _best_ms(runs)
    # scaled to the multiplications of the other timings
    for name in ("fp32", "bf16"):
        best[f"sdpa_{name}_ms"] *= n / n_some
        best[f"dense_{name}_ms"] *= n * _ROWS * _KEYS / (n_some * n_rows * n_keys)
    if cpu_native.why_unavailable() is None:
        best["native_ms"] = _native_ms(q.bfloat16(), k[:1].bfloat16())
    # an exact product still counts as measured
    return Timings(**{"native_ms": torch.inf, **best}, bf16_ms=_bf16_ms(q.bfloat16(), kt.bfloat16(), best["fp32_ms"]), routed_error=max(error, 1e-12))


def _attend(q: Tensor, k: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, k)


def _native_ms(q: Tensor, k: Tensor) -> float:
    # several tiles on the same keys, as in a prefill: packing them must not count as if every tile did it
    tiles = 4
    rows = q[:1].repeat(1, tiles, 1).transpose(0, 1)
    run = partial(
        cpu_native.native_attention, rows, k, k, None, block_size=_ROWS, scale=1.0, softcap=None, out=torch.empty_like(rows), lse=None, threads=1
    )
    # on one thread: in calls as short as these a loaded machine would not start a second one in time, in a prefill it does. Tiles share
    # nothing, so that threads divide the time, as far as there are cores for them
    n_threads = min(torch.get_num_threads(), usable_cores())
    # the last tile reads all blocks of keys, the ones before it one less each
    n_blocks = _KEYS // _ROWS
    share = n_blocks / sum(range(n_blocks - tiles + 1, n_blocks + 1))
    return _best_ms({"native": run})["native"] * share * q.shape[0] / n_threads


def _bf16_ms(q: Tensor, kt: Tensor, fp32_ms: float) -> float:
    # one tile and few keys first: where bf16 is emulated the full product takes a quarter of a second
    share = 16
    small = kt[:1, :, : kt.shape[2] // share]
    estimate_ms = share * q.shape[0] * _best_ms({"small": lambda: torch.bmm(q[:1], small)})["small"]
    if estimate_ms > HOPELESS * fp32_ms:
        return estimate_ms
    return _best_ms({"full": lambda: torch.bmm(q, kt)})["full"]


def _best_ms(runs: dict[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Shortest time of each, in milliseconds. Taken in turn, so that a busy moment of the machine meets all of them; it can only add."""
    best = dict.fromkeys(runs, float("inf"))
    # the first round warms up
    for is_warm in [False] + [True] * rounds:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if is_warm:
                best[name] = min(best[name], (time.perf_counter() - begin) * 1e3)
    return best


_precision_lock = threading.Lock()
_n_inside = 0
_before: tuple[str, str, str] = ("highest", "none", "none")


@contextlib.contextmanager
def fp32_products_routed(is_routed: bool) -> Iterator[None]:
    """Sends fp32 products to oneDNN while inside, where `is_routed`; the process-wide setting is given back at the end, errors included.

    Uses torch's older setter: after the newer one the older *getter* raises, and other libraries call it. Where somebody has used the newer
    one already, the setting is theirs and stays. The older setter writes the backends' own settings too, so these are given back as well.
    """
    global _n_inside, _before
    try:
        is_ours = is_routed and bool(torch.get_float32_matmul_precision())
    except RuntimeError:
        is_ours = False
    if not is_ours:
        yield
        return
    # threads may be inside at once: the first one in remembers the setting, the last one out restores it
    with _precision_lock:
        if _n_inside == 0:
            _before = _read_precision()
            torch.set_float32_matmul_precision("medium")
        _n_inside += 1
    try:
        yield
    finally:
        with _precision_lock:
            _n_inside -= 1
            if _n_inside == 0:
                _write_precision(*_before)


def _read_precision() -> tuple[str, str, str]:
    mkldnn, cuda = _matmul_settings()
    return torch.get_float32_matmul_precision(), mkldnn.fp32_precision, cuda.fp32_precision


def _write_precision(everywhere: str, on_mkldnn: str, on_cuda: str) -> None:
    torch.set_float32_matmul_precision(everywhere)
    mkldnn, cuda = _matmul_settings()
    mkldnn.fp32_precision, cuda.fp32_precision = on_mkldnn, on_cuda


def _matmul_settings() -> tuple[Any, Any]:
    # not in torch's type stubs
    backends: Any = torch.backends
    return backends.mkldnn.matmul, backends.cuda.matmul
