"""The benchmarks of a visit to a GPU, the ones the bars need first. Each adds its rows to the record and says what fell out and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from accel.evals.gpu.bars import bench_name
from accel.evals.gpu.cases import Call, Prompt, Work, lines_of_density, lists_of_density, paged, work_of
from accel.evals.gpu.checks import decode, prefill
from accel.evals.gpu.contestants import (
    decode_configs,
    decode_run,
    dense_runs,
    optional_runs,
    prefill_configs,
    prefill_run,
    sdpa_decode,
)
from accel.evals.gpu.head_groups import GroupCall, LastScale, bench_group_decode, bench_last_scale
from accel.evals.gpu.report import Record
from accel.evals.gpu.timing import Comparison, DeviceLostError, Run, Timer, clocks, compare, host_us, reason
from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, ImplicitPlan, Ragged, block_sparse_attention
from accel.kernels.flex_index import SelectionRule, flex_index


@dataclass(frozen=True)
class Sizes:
    """What is measured. The defaults are a GPU's; tests run every benchmark once with small ones."""

    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (32, 8)
    few_heads: tuple[int, int] = (8, 2)     # from `many_tokens` on
    many_tokens: int = 200_000
    block: int = 128
    # PowerAttention's defaults
    power: ImplicitPlan = field(default_factory=lambda: ImplicitPlan(256, 5))
    densities: tuple[float, ...] = (0.5, 0.25, 0.1, 0.05)
    main_tokens: int = 32 * 1024
    long_tokens: int = 128 * 1024
    other_tokens: tuple[int, ...] = (8 * 1024, 64 * 1024, 16 * 1024, 4 * 1024, 256 * 1024)
    crossover_tokens: tuple[int, ...] = (16 * 1024, 8 * 1024, 32 * 1024, 4 * 1024)
    other_gammas: tuple[float, ...] = (0.9,)
    head_dims: tuple[int, ...] = (128, 64, 256)
    batches: tuple[int, ...] = (16, 64, 1)
    decode_tokens: int = 32 * 1024
    pages: tuple[int, ...] = (16, 64, 128)
    launch_tokens: int = 512
    launch_calls: int = 160
    copy_bytes: int = 2 << 30
    product: int = 8192
    seconds: float = 3.0                    # of measuring, per benchmark
    fewest: int = 3                         # repeats, however long they take
    wants_flex: bool = True                 # FlexAttention compiled: half a minute
    rule: SelectionRule = field(default_factory=SelectionRule)
    last_scale: LastScale = field(default_factory=LastScale)


@dataclass
class Lab:
    """Where a benchmark runs."""

    device: torch.device
    timer: Timer
    record: Record
    sizes: Sizes
    deadline: float = float("inf")          # of time.monotonic
    bench: str = ""                         # the one that runs
    about: str = ""
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def prompt(self, n: int, head_dim: int, *, is_lifelike: bool = False) -> Prompt:
        heads = self.sizes.heads if n < self.sizes.many_tokens else self.sizes.few_heads
        make = Prompt.lifelike if is_lifelike else Prompt.random
        return make(n, heads, head_dim, self.sizes.dtype, self.device)

    def compare(self, runs: dict[str, Run]) -> Comparison:
        healthy = {name: run for name, run in runs.items() if [self.bench, name] not in self.record.poisonous}
        self.failed |= {name: "it made the device unusable" for name in runs if name not in healthy}
        seconds = min(self.sizes.seconds, max(self.seconds_left / 4, 0.1))
        found = compare(self.timer, healthy, seconds=seconds, fewest=self.sizes.fewest)
        self.failed |= found.failed
        return found


@dataclass(frozen=True)
class Bench:
    """needs_s: what it takes at most, guessed generously; with less time left it is skipped."""

    name: str
    needs_s: float
    run: Callable[[Lab, str], None]


def benches(s: Sizes) -> list[Bench]:
    """In order of importance."""
    main, first, second = s.main_tokens, s.head_dims[0], s.head_dims[1]
    return [
        Bench("ceilings", 10, ceilings),
        Bench(bench_name("prefill", main, first), 40, partial(bench_prefill, n=main, head_dim=first, is_main=True)),
        Bench(bench_name("tiles", main, first), 40, partial(bench_tiles, n=main, head_dim=first)),
        Bench(bench_name("prefill", main, second), 15, partial(bench_prefill, n=main, head_dim=second, is_main=False)),
        Bench(bench_name("prefill", s.long_tokens, first), 30, partial(bench_prefill, n=s.long_tokens, head_dim=first, is_main=False)),
        Bench(bench_name("flexprefill", main, first), 15, partial(bench_flexprefill, n=main, head_dim=first)),
        Bench(bench_name("flexprefill", s.long_tokens, first), 25, partial(bench_flexprefill, n=s.long_tokens, head_dim=first)),
        *(Bench(f"decode {batch}", 10, partial(bench_decode, batch=batch)) for batch in s.batches),
        Bench("head groups, last scale", 15, bench_last_scale),
        Bench("head groups, one token", 8, bench_group_decode),
        Bench("launch", 8, bench_launch),
        Bench(bench_name("tiles", main, second), 25, partial(bench_tiles, n=main, head_dim=second)),
        Bench("tiles of decoding", 15, bench_decode_tiles),
        *(Bench(bench_name("prefill", n, first), 15, partial(bench_prefill, n=n, head_dim=first, is_main=False)) for n in s.other_tokens),
        *(
            Bench(bench_name("flexprefill", n, first), 12, partial(bench_flexprefill, n=n, head_dim=first))
            for n in s.other_tokens if n < s.many_tokens
        ),
        *(Bench(bench_name("prefill", main, d), 20, partial(bench_prefill, n=main, head_dim=d, is_main=False)) for d in s.head_dims[2:]),
        *(Bench(bench_name("tiles", main, d), 30, partial(bench_tiles, n=main, head_dim=d)) for d in s.head_dims[2:]),
        # what else decides from which length FlexPrefill pays: the head size and gamma
        *(
            Bench(bench_name("flexprefill", n, d), 12, partial(bench_flexprefill, n=n, head_dim=d))
            for d in s.head_dims[1:] for n in s.crossover_tokens
        ),
        *(
            Bench(f"{bench_name('flexprefill', n, first)} gamma {gamma}", 12, partial(bench_flexprefill, n=n, head_dim=first, gamma=gamma))
            for n in s.crossover_tokens for gamma in s.other_gammas
        ),
        Bench("pages", 15, bench_pages),
        Bench("other executors", 60, bench_executors),
    ]  # fmt: skip


def run_benches(lab: Lab, wanted: list[Bench], *, say: Callable[[str], None] = print) -> None:
    """Runs what is not yet in the record and still fits the time, saving after each.

    Raises DeviceLostError where the device is unusable; what made it so is in the record, and a fresh process goes on without it.
    """
    for bench in wanted:
        if lab.record.done(bench.name):
            continue
        entry: dict[str, Any] = {"bench": bench.name, "state": "measured"}
        lab.bench, lab.about, lab.failed = bench.name, "", {}
        begin = time.monotonic()
        if lab.seconds_left < bench.needs_s:
            entry |= {"state": "skipped", "reason": f"{lab.seconds_left:.0f} s were left, it may take {bench.needs_s:.0f} s"}
        else:
            try:
                bench.run(lab, bench.name)
                lab.timer.settle()
            except DeviceLostError as error:
                lab.record.poisonous.append([bench.name, error.contestant])
                lab.record.rows = [row for row in lab.record.rows if row["bench"] != bench.name]
                lab.record.save()
                raise
            # a benchmark that breaks must not take the others with it
            except Exception as error:
                entry |= {"state": "failed", "reason": reason(error)}
        entry |= {"about": lab.about, "failed": dict(lab.failed), "took_s": round(time.monotonic() - begin, 2), "clocks": clocks()}
        lab.record.benches.append(entry)
        lab.record.save()
        say(f"{bench.name}: {entry['state']} {entry.get('reason', '')} ({entry['took_s']} s)")
        if lab.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:
                raise DeviceLostError(bench.name, error) from error
    lab.record.is_complete = True
    lab.record.save()


def ceilings(lab: Lab, name: str) -> None:
    """Copy bandwidth and the rate of a large matrix product: what this card reaches."""
    s = lab.sizes
    source = torch.randint(0, 100, (s.copy_bytes,), dtype=torch.int8, device=lab.device)
    target = torch.empty_like(source)
    a, b = (torch.randn(s.product, s.product, dtype=s.dtype, device=lab.device) for _ in range(2))
    found = lab.compare({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    if "copy" in found.times:
        times = found.times["copy"]
        lab.record.add(name, "copy", times, gbs=2e-6 * s.copy_bytes / times.median)
    if "product" in found.times:
        times = found.times["product"]
        lab.record.add(name, "product", times, tflops=2e-9 * s.product**3 / times.median)
    lab.about = f"A copy of {s.copy_bytes >> 20} MiB, bytes read plus bytes written, and a product of {s.product}² matrices."


def bench_prefill(lab: Lab, name: str, *, n: int, head_dim: int, is_main: bool) -> None:
    """Our kernel at every density and PowerAttention beside the dense attentions."""
    s, prompt = lab.sizes, lab.prompt(n, head_dim)
    n_heads = prompt.q.shape[1]
    plans: dict[str, BlockPlan] = {}
    for density in s.densities:
        plans[f"lists {density:.0%}".replace("%", " %")] = lists_of_density(n, n_heads, s.block, density, lab.device)
        # lists and lines differ in how blocks are found, which two densities tell as well as four
        if is_main or density == 0.25:
            plans[f"lines {density:.0%}".replace("%", " %")] = lines_of_density(n, n_heads, s.block, density, lab.device)
    plans["power"] = s.power
    is_flex_wanted = s.wants_flex and n in (s.main_tokens, s.long_tokens) and head_dim == s.head_dims[0]
    runs = dense_runs(prompt, wants_flex=is_flex_wanted)
    runs |= {what: prefill_run(prompt.call, plan) for what, plan in plans.items()}
    found = lab.compare(runs)
    for what, times in found.times.items():
        work = work_of(plans.get(what), n, n_heads)
        method = _method("powerattention", s) if what == "power" else {}
        lab.record.add(name, what, times, **_facts(prompt, work, times.median), **method)
    shape = f"{n} tokens, heads {n_heads}/{prompt.k.shape[1]}, head_dim {head_dim}, {_dtype(s.dtype)}, batch 1"
    lab.about = f"{shape}; lists and lines of blocks of {s.block}; power: {_power(s.power)}."


def bench_tiles(lab: Lab, name: str, *, n: int, head_dim: int) -> None:
    """Tile sizes at a quarter of the blocks."""
    s, prompt = lab.sizes, lab.prompt(n, head_dim)
    n_heads = prompt.q.shape[1]
    plan = lists_of_density(n, n_heads, s.block, 0.25, lab.device)
    runs = {"default": prefill_run(prompt.call, plan)}
    runs |= {what: prefill_run(prompt.call, plan, config) for what, config in prefill_configs(head_dim).items()}
    found, work = lab.compare(runs), work_of(plan, n, n_heads)
    for what, times in sorted(found.times.items(), key=lambda item: item[1].median):
        lab.record.add(name, what, times, **_facts(prompt, work, times.median))
    lab.about = f"Query rows × keys per step; lists at 25 %, {n} tokens, head_dim {head_dim}, {_dtype(s.dtype)}. Fastest first."


def bench_flexprefill(lab: Lab, name: str, *, n: int, head_dim: int, gamma: float | None = None) -> None:
    """FlexPrefill's selection and its kernel, apart and together, beside dense attention on the same prompt."""
    s, prompt = lab.sizes, lab.prompt(n, head_dim, is_lifelike=True)
    # as the method has it for wide heads
    rule = replace(s.rule, gamma=gamma or s.rule.gamma, block_size=s.rule.block_size if head_dim <= 128 else s.rule.block_size // 2)
    call, n_heads = prompt.call, prompt.q.shape[1]
    plan = _select(call, rule).plan
    out, _ = call.buffers()

    def both() -> None:
        prefill(call, _select(call, rule).plan, out, None)

    runs = dense_runs(prompt, wants_flex=False)
    runs |= {"selection": lambda: _select(call, rule), "kernel": prefill_run(call, plan), "selection and kernel": both}
    found = lab.compare(runs)
    for what, times in found.times.items():
        facts = _facts(prompt, work_of(plan if "kernel" in what else None, n, n_heads), times.median)
        if "selection" in what:
            del facts["tflops"]
        if what == "selection":
            del facts["density"]
        if what == "selection and kernel":
            facts |= _method("flexprefill" if gamma is None else f"flexprefill:gamma={gamma}", s)
        lab.record.add(name, what, times, **facts)
    lab.about = (
        f"{n} tokens of lifelike structure, heads {n_heads}/{prompt.k.shape[1]}, head_dim {head_dim}, gamma {rule.gamma}, tau {rule.tau}, "
        f"min_budget {rule.min_budget}."
    )


def bench_decode(lab: Lab, name: str, *, batch: int) -> None:
    """One token per sequence over a long cache: bytes of the keys and values read, per second."""
    s, head_dim = lab.sizes, lab.sizes.head_dims[0]
    call, cache = _decode_call(lab, batch, head_dim)
    copy = next((r["gbs"] for r in lab.record.rows if r["bench"] == "ceilings" and r["what"] == "copy"), None)
    plans: dict[str, ImplicitPlan] = {"power": s.power, "dense": ImplicitPlan.dense(s.power.block_size)}
    runs: dict[str, Run] = {what: decode_run(call, plan) for what, plan in plans.items()}
    runs["sdpa flash"] = sdpa_decode(call.q.unsqueeze(2), *cache)
    runs |= {f"{what}, in a graph": _replay(lab, run) for what, run in list(runs.items()) if what != "sdpa flash"}
    found = lab.compare(runs)
    for what, times in found.times.items():
        blocks = len(s.power.row_blocks((s.decode_tokens - 1) // s.power.block_size)) if what.startswith("power") else None
        tokens = s.decode_tokens if blocks is None else min(blocks * s.power.block_size, s.decode_tokens)
        gbs = 2e-6 * batch * tokens * call.keys.n_kv_heads * head_dim * call.q.element_size() / times.median
        lab.record.add(name, what, times, tokens=s.decode_tokens, batch=batch, gbs=gbs, of_copy=None if copy is None else gbs / copy)
    lab.about = f"Batch {batch}, caches of {s.decode_tokens} tokens, heads {s.heads[0]}/{s.heads[1]}, head_dim {head_dim}; {_power(s.power)}."


def bench_decode_tiles(lab: Lab, name: str) -> None:
    """Tile sizes of decoding at the first batch size."""
    s = lab.sizes
    call, _ = _decode_call(lab, s.batches[0], s.head_dims[0])
    runs = {"default": decode_run(call, s.power)}
    runs |= {what: decode_run(call, s.power, config) for what, config in decode_configs().items()}
    for what, times in sorted(lab.compare(runs).times.items(), key=lambda item: item[1].median):
        lab.record.add(name, what, times)
    lab.about = f"PowerAttention, batch {s.batches[0]}, caches of {s.decode_tokens} tokens. Fastest first."


def bench_launch(lab: Lab, name: str) -> None:
    """Time on the host of one layer's calls, outside graphs, on inputs so small that the device never holds it up."""
    s, head_dim = lab.sizes, lab.sizes.head_dims[0]
    prompt = lab.prompt(s.launch_tokens, head_dim, is_lifelike=True)
    call, n_heads = prompt.call, prompt.q.shape[1]
    step = Call.random([1], [s.launch_tokens], heads=s.heads, head_dim=head_dim, dtype=s.dtype, device=lab.device)
    out, step_out = call.buffers()[0], step.buffers()[0]
    lists = lists_of_density(s.launch_tokens, n_heads, s.block, 0.5, lab.device)
    lines = lines_of_density(s.launch_tokens, n_heads, s.block, 0.5, lab.device)
    sizes = (s.launch_tokens, s.launch_tokens // 4)
    groups = GroupCall.random(sizes, heads=((0,), (1,)), head_dim=head_dim, dtype=s.dtype, device=lab.device)

    def api(given: Call, into: torch.Tensor) -> Run:
        return partial(
            block_sparse_attention, given.q, given.keys, s.power, given.lens, scale=given.scale, out=into, impl="triton"
        )

    runs: dict[str, tuple[Run, bool]] = {
        "prefill, power": (partial(prefill, call, s.power, out, None), True),
        "prefill, lists": (partial(prefill, call, lists, out, None), True),
        "prefill, lines": (partial(prefill, call, lines, out, None), True),
        "decode, power": (partial(decode, step, s.power, step_out, None), True),
        "public function, prefill": (api(call, out), True),
        "public function, decode": (api(step, step_out), True),
        "public function, head groups": (groups.run, False),
        "selection": (partial(_select, call, s.rule), False),
        "for comparison: PyTorch's in-place addition": (lambda: out.add_(1.0), False),
    }
    found = host_us({what: run for what, (run, _) in runs.items()}, lab.timer, calls=s.launch_calls)
    lab.failed |= found.failed
    for what, times in found.times.items():
        lab.record.add(name, what, None, host_us=times.median, p20_us=times.p20, p80_us=times.p80, is_layer=runs[what][1])
    lab.about = f"Microseconds on the host per call, {s.launch_tokens} tokens."


def bench_pages(lab: Lab, name: str) -> None:
    """Prefill from pages beside prefill from contiguous keys."""
    s, n, head_dim = lab.sizes, lab.sizes.main_tokens, lab.sizes.head_dims[0]
    prompt = lab.prompt(n, head_dim)
    n_heads = prompt.q.shape[1]
    plan = lists_of_density(n, n_heads, s.block, 0.25, lab.device)
    runs = {"contiguous": prefill_run(prompt.call, plan)}
    for size in s.pages:
        keys = paged(prompt.k, prompt.v, [0], [n], size, prompt.call.lens.kv_len, torch.Generator().manual_seed(0))
        runs[f"pages of {size}"] = prefill_run(Call(prompt.q, keys, prompt.call.lens, prompt.scale), plan)
    found, work = lab.compare(runs), work_of(plan, n, n_heads)
    for what, times in found.times.items():
        lab.record.add(name, what, times, **_facts(prompt, work, times.median))
    lab.about = f"Lists at 25 %, {n} tokens, head_dim {head_dim}."


def bench_executors(lab: Lab, name: str) -> None:
    """The other executors over the same plans, beside our kernel. Theirs read lengths on the host and build their lists in the call."""
    s, n, head_dim = lab.sizes, lab.sizes.main_tokens, lab.sizes.head_dims[0]
    prompt = lab.prompt(n, head_dim)
    n_heads = prompt.q.shape[1]
    for density in (0.25, 0.1):
        plan = lists_of_density(n, n_heads, s.block, density, lab.device)
        runs = {"triton": prefill_run(prompt.call, plan), **optional_runs(prompt.call, plan)}
        found, work = lab.compare(runs), work_of(plan, n, n_heads)
        for what, times in found.times.items():
            lab.record.add(name, f"{what} {density:.0%}", times, **_facts(prompt, work, times.median))
    lab.about = f"{n} tokens, head_dim {head_dim}, {_dtype(s.dtype)}; list conversion included."


def _decode_call(lab: Lab, batch: int, head_dim: int) -> tuple[Call, tuple[torch.Tensor, torch.Tensor]]:
    """One query per sequence, and the cache as (B, Hkv, n, D) views for SDPA."""
    s, n = lab.sizes, lab.sizes.decode_tokens
    q = torch.randn(batch, s.heads[0], head_dim, dtype=s.dtype, device=lab.device)
    k, v = (torch.randn(batch, n, s.heads[1], head_dim, dtype=s.dtype, device=lab.device).transpose(1, 2) for _ in range(2))
    lens = Ragged.of([1] * batch, [n] * batch, device=lab.device)
    return Call(q, ContiguousKeys.from_cache(k, v), lens, head_dim**-0.5), (k, v)


def _replay(lab: Lab, run: Run) -> Run:
    """The call from a graph, recorded when it is first asked for."""
    recorded: list[Run] = []

    def replay() -> None:
        if not recorded:
            recorded.append(lab.timer.replayable(run))
        recorded[0]()

    return replay


def _select(call: Call, rule: SelectionRule) -> Any:
    return flex_index(call.q, call.keys, call.lens, rule=rule, scale=call.scale, impl="triton")


def _facts(prompt: Prompt, work: Work, ms: float) -> dict[str, Any]:
    return {
        "tokens": prompt.n, "heads": list(prompt.q.shape[1:2]) + list(prompt.k.shape[1:2]), "head_dim": prompt.q.shape[2],
        "density": work.density, "tflops": work.tflops(prompt.q.shape[2], ms),
    }  # fmt: skip


def _method(label: str, s: Sizes) -> dict[str, Any]:
    """Marks the row of a whole method, selection included: from these the lengths are read from which it pays."""
    return {"method": label, "dtype": _dtype(s.dtype)}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _power(plan: ImplicitPlan) -> str:
    return f"blocks of {plan.block_size}, window of {plan.window_blocks} blocks, sink {plan.sink_blocks}, powers of two"
