"""The attention operator alone: sparse against torch's own attention and against our best dense path, in one interleaved run (style.md §10).

On a shared machine start it as `OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 python -m accel.evals.operator_bench`: OpenMP's spinning barriers
otherwise cost a scheduler slice per small operation (kernels.md §2.1). Read the ratios; single times follow the load.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from accel.kernels.block_sparse import ContiguousKeys, ListPlan, Ragged, block_sparse_attention, dense_attention
from accel.kernels.block_sparse.cpu_probe import Route, route_for
from accel.kernels.block_sparse.cpu_steps import schedule
from accel.kernels.block_sparse.cpu_tiles import step_blocks

BLOCK = 128


@dataclass(frozen=True)
class Inputs:
    """One causal self-attention of N tokens, batch 1. q: (1, Hq, N, D); k, v: (1, Hkv, N, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: ContiguousKeys
    lens: Ragged

    @classmethod
    def random(cls, n: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, h, n, head_dim, generator=generator).to(dtype) for h in (heads[0], heads[1], heads[1]))
        return cls(q, k, v, ContiguousKeys.from_cache(k, v), Ragged.of([n], [n]))

    @property
    def rows(self) -> Tensor:
        """q as the kernel takes it, (N, Hq, D)."""
        return self.q[0].transpose(0, 1)

    @property
    def scale(self) -> float:
        return float(self.q.shape[-1] ** -0.5)


def random_lists(inputs: Inputs, density: float, seed: int) -> ListPlan:
    """Random key blocks per head and row, sink and own block always among them (kernels.md §2); `density` of the causal ones where it can be."""
    n_heads, nb = inputs.q.shape[1], -(-inputs.q.shape[2] // BLOCK)
    below = torch.ones(nb, nb, dtype=torch.bool).tril()
    rank_by = torch.rand(n_heads, nb, nb, generator=torch.Generator().manual_seed(seed))
    rank_by[:, :, 0] = 2.0
    rank_by = rank_by.masked_fill(torch.eye(nb, dtype=torch.bool), 3.0).masked_fill(~below, -1.0)
    available = torch.arange(1, nb + 1)
    wanted = torch.maximum((density * available).round(), available.clamp_max(2))
    rank = rank_by.argsort(-1, descending=True).argsort(-1)
    return ListPlan.from_mask([(rank < wanted[:, None]) & below], inputs.lens, BLOCK)


def operator_table(
    lengths: Sequence[int],
    densities: Sequence[float],
    *,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    threads: int | None = None,
    repeats: int = 7,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One row per length and density: medians, 20th and 80th percentiles in ms, and ratios to both dense baselines (below 1 is faster).

    heads: query and key-value heads. threads: None leaves torch's number. Ratios are medians over rounds in which every contestant runs once.
    """
    rows = []
    with torch_threads(threads), torch.no_grad():
        for n in lengths:
            inputs = Inputs.random(n, heads, head_dim, dtype, seed)
            plans = {density: random_lists(inputs, density, seed) for density in densities}
            seconds = interleaved(contestants(inputs, plans), repeats)
            for density, plan in plans.items():
                rows.append(_row(inputs, density, plan, seconds, repeats))
    return rows


def contestants(inputs: Inputs, plans: dict[float, ListPlan]) -> dict[str | float, Callable[[], object]]:
    """What is timed: "sdpa" and "dense", the baselines, and the sparse operator by its density."""
    out = torch.empty_like(inputs.rows)

    def sparse(plan: ListPlan) -> Callable[[], object]:
        return lambda: block_sparse_attention(inputs.rows, inputs.keys, plan, inputs.lens, scale=inputs.scale, out=out)

    return {
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, is_causal=True, enable_gqa=True),
        "dense": lambda: dense_attention(inputs.rows, inputs.keys, inputs.lens, scale=inputs.scale, out=out),
        **{density: sparse(plan) for density, plan in plans.items()},
    }


def interleaved(runs: dict[str | float, Callable[[], object]], repeats: int) -> dict[str | float, list[float]]:
    """Seconds of each, `repeats` rounds A B C A B C after one round of warming up."""
    seconds: dict[str | float, list[float]] = {name: [] for name in runs}
    for is_counted in [False] + [True] * repeats:
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if is_counted:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def plan_building_ms(inputs: Inputs, plan: ListPlan, repeats: int) -> float:
    """Median time from the plan to what the executor reads: the gather lists of every head, or the mask that the compiled kernel takes."""
    rows = next(inputs.lens.rows())
    n_heads, n_kv_heads = inputs.q.shape[1], inputs.k.shape[1]
    is_compiled = route_for(inputs.q.dtype, "accurate").kernel == "native"

    def build() -> object:
        mask = plan.block_mask(rows)
        return mask if is_compiled else schedule(mask, range(n_kv_heads), n_heads // n_kv_heads, 0, step_blocks())

    return 1e3 * statistics.median(interleaved({"plan": build}, 3 * repeats)["plan"])


def _row(inputs: Inputs, density: float, plan: ListPlan, seconds: dict[str | float, list[float]], repeats: int) -> dict[str, Any]:
    sparse, sdpa, dense = seconds[density], seconds["sdpa"], seconds["dense"]
    to_sdpa, to_dense = (statistics.median(s / d for s, d in zip(sparse, other, strict=True)) for other in (sdpa, dense))
    true_density = plan.density(inputs.lens, inputs.q.shape[1])
    p20, p80 = percentiles_ms(sparse)
    return {
        "tokens": inputs.q.shape[2],
        "density": density,
        "true_density": true_density,
        "sparse_ms": 1e3 * statistics.median(sparse),
        "sparse_p20_ms": p20,
        "sparse_p80_ms": p80,
        "sdpa_ms": 1e3 * statistics.median(sdpa),
        "dense_ms": 1e3 * statistics.median(dense),
        "to_sdpa": to_sdpa,
        "to_dense": to_dense,
        # 1.0: time falls exactly with the density, beside the better dense path
        "efficiency": true_density / max(to_sdpa, to_dense),
        "plan_ms": plan_building_ms(inputs, plan, repeats),
        "path": path_name(route_for(inputs.q.dtype, "accurate")),
        "dense_path": path_name(route_for(inputs.q.dtype, "accurate", is_dense=True)),
    }


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    """20th and 80th percentile."""
    low, high = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return 1e3 * low, 1e3 * high


def path_name(route: Route) -> str:
    """A route in a few characters: "gemm fp32/bf16, routed" computes scores in fp32 through oneDNN and values in bf16."""
    if route.kernel != "gemm":
        return {"sdpa": "torch", "native": "compiled"}[route.kernel]
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}
    return f"gemm {short[route.score_dtype]}/{short[route.value_dtype]}{', routed' if route.is_routed else ''}"


@contextmanager
def torch_threads(n: int | None) -> Iterator[None]:
    """Lets torch use `n` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if n is None else n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit code 0."""
    from accel.cli.table import print_table

    parser = argparse.ArgumentParser(prog="python -m accel.evals.operator_bench", description="Times the attention operator alone, on random inputs.")
    parser.add_argument("--lengths", default="8192", help="tokens, separated by commas (default: %(default)s)")
    parser.add_argument("--densities", default="0.25,0.1,0.05", help="shares of the causal blocks (default: %(default)s)")
    parser.add_argument("--heads", default="8,2", help="query and key-value heads (default: %(default)s)")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own number")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(arguments)
    n_heads, n_kv_heads = (int(n) for n in args.heads.split(","))
    rows = operator_table(
        [int(n) for n in args.lengths.split(",")],
        [float(d) for d in args.densities.split(",")],
        heads=(n_heads, n_kv_heads),
        head_dim=args.head_dim,
        dtype=getattr(torch, args.dtype),
        threads=args.threads,
        repeats=args.repeats,
    )
    n_threads = args.threads or torch.get_num_threads()
    facts = [args.dtype, f"heads {args.heads}", f"head_dim {args.head_dim}", f"{n_threads} threads", f"{args.repeats} rounds"]
    if hasattr(os, "getloadavg"):
        facts.append(f"load {os.getloadavg()[0]:.1f}")
    cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    headers = [name.replace("_", " ") for name in rows[0]]
    print_table(headers, cells, title=", ".join(facts), text_columns=(len(headers) - 2, len(headers) - 1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
