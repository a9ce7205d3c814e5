"""What must hold on a GPU before any number counts: errors against fp64 block by block, CUDA graphs, no waiting for the device, 1M tokens.

`checks(profile)` lists them; each returns a line of detail or raises. The GPU tests run them under pytest,
`python -m accel.evals.gpu --check` without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.evals.gpu.cases import Call, Prompt, lines_of_density, paged, random_plan
from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, ImplicitPlan, Ragged, VerticalSlashPlan, block_sparse_attention
from accel.kernels.block_sparse.differentiable import differentiable_attention
from accel.kernels.block_sparse.naive import naive_attention, query_rows
from accel.kernels.flex_index import SelectionRule, flex_index

Attend = Callable[[Call, BlockPlan, Tensor, Tensor], None]


class Skipped(Exception):  # noqa: N818, it is no error
    """A check that cannot run on this device."""


@dataclass(frozen=True)
class Profile:
    """Sizes of the checks. The defaults are a GPU's; on a CPU, in Triton's interpreter, tests use small ones and no bf16."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    other_dtype: torch.dtype = torch.float16
    block: int = 128
    other_blocks: tuple[int, ...] = (64, 256)
    head_dim: int = 128
    other_dims: tuple[int, ...] = (64, 80, 256)
    heads: tuple[int, int] = (8, 2)
    other_heads: tuple[tuple[int, int], ...] = ((3, 3), (6, 2), (8, 1))
    pages: tuple[int, ...] = (16, 64, 128)
    q_len: tuple[int, ...] = (1009, 300, 1)
    kv_len: tuple[int, ...] = (1009, 812, 129)
    batches: tuple[int, ...] = (1, 4, 16)
    decode_kv: int = 1500
    prompt: int = 2048
    most_tokens: int = 2**20

    def ragged(self, **changes: object) -> Call:
        """Whole prompt, chunk behind a cached prefix off the block grid, single row; gaps between them."""
        options: dict[str, object] = {"heads": self.heads, "head_dim": self.head_dim, "dtype": self.dtype, "gap": 5, **changes}
        return Call.random(self.q_len, self.kv_len, device=self.device, **options)  # type: ignore[arg-type]

    def decoding(self, batch: int, *, rows: int = 1, **changes: object) -> Call:
        """One row, or a few, for each of `batch` sequences of different lengths."""
        kv_len = [max(rows, self.decode_kv - 37 * b) for b in range(batch)]
        options: dict[str, object] = {"heads": self.heads, "head_dim": self.head_dim, "dtype": self.dtype, "gap": 1, **changes}
        return Call.random([rows] * batch, kv_len, device=self.device, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[], str]


def prefill(call: Call, plan: BlockPlan, out: Tensor, lse: Tensor | None, config: object = None) -> None:
    """The prefill kernel, whatever the number of rows."""
    from accel.kernels.block_sparse.triton_launch import triton_attention

    triton_attention(call.q, call.keys, plan, call.lens, scale=call.scale, softcap=call.softcap, out=out, lse=lse, config=config)  # type: ignore[arg-type]


def decode(call: Call, plan: BlockPlan, out: Tensor, lse: Tensor | None, config: object = None) -> None:
    """The decode kernel."""
    from accel.kernels.block_sparse.triton_decode import triton_decode

    triton_decode(call.q, call.keys, plan, call.lens, scale=call.scale, softcap=call.softcap, out=out, lse=lse, config=config)  # type: ignore[arg-type]


def public(call: Call, plan: BlockPlan, out: Tensor, lse: Tensor) -> None:
    """Through the function that users call."""
    found = block_sparse_attention(
        call.q, call.keys, plan, call.lens, scale=call.scale, softcap=call.softcap, out=out, return_lse=True, impl="triton"
    )
    lse.copy_(found[1])


def checks(p: Profile) -> list[Check]:
    """All checks, the ones that say most first."""
    # imported here: that file builds on this one
    from accel.evals.gpu.head_groups import group_checks

    found = [*_prefill_checks(p), *_decode_checks(p), *_selection_checks(p), *group_checks(p)]
    # larger blocks go through FlexAttention there, whose compilation takes longer than all checks
    found += [Check(f"gradients: {kind}, masked", partial(check_gradients, p, kind)) for kind in ("power", "lists")]
    for kind in ("power", "lists", "lines"):
        found.append(Check(f"graph: prefill, {kind}", partial(check_graph, p, prefill, kind)))
        found.append(Check(f"graph: decode, {kind}", partial(check_graph, p, decode, kind)))
        found.append(Check(f"no sync: prefill, {kind}", partial(check_no_sync, p, prefill, kind)))
        found.append(Check(f"no sync: decode, {kind}", partial(check_no_sync, p, decode, kind)))
    found.append(Check("graph: selection", partial(check_selection_graph, p)))
    found.append(Check("no sync: selection", partial(check_selection_no_sync, p)))
    for kind in ("power", "lines"):
        found.append(Check(f"{p.most_tokens} tokens: prefill, {kind}", partial(check_most_tokens, p, kind, "prefill")))
    found.append(Check(f"{p.most_tokens} tokens: decode, power", partial(check_most_tokens, p, "power", "decode")))
    # last: before torch 2.12 a capture that fails leaves an allocator that can end the process
    return sorted(found, key=lambda check: check.name.startswith("graph"))


def _prefill_checks(p: Profile) -> Iterator[Check]:
    def check(name: str, kind: str, *, block: int = p.block, attend: Attend = prefill, **changes: object) -> Check:
        return Check(f"prefill: {name}", lambda: check_error(attend, p.ragged(**changes), kind, block))

    for kind in ("lists", "power", "lines", "lines+tiles", "window", "dense"):
        yield check(kind, kind)
    for head_dim in p.other_dims:
        yield check(f"lists, head_dim {head_dim}", "lists", head_dim=head_dim)
    yield check("lists, the other dtype", "lists", dtype=p.other_dtype)
    yield check("lists, fp32", "lists", dtype=torch.float32)
    yield check(f"power, the other dtype, head_dim {p.other_dims[0]}", "power", dtype=p.other_dtype, head_dim=p.other_dims[0])
    for page_size in p.pages:
        yield check(f"power, pages of {page_size}", "power", page_size=page_size)
    yield check(f"lists, pages of {p.pages[0]}", "lists", page_size=p.pages[0])
    for heads in p.other_heads:
        yield check(f"lists, heads {heads[0]}/{heads[1]}", "lists", heads=heads)
    for block in p.other_blocks:
        yield check(f"power, blocks of {block}", "power", block=block)
    yield check("lists, soft-cap", "lists", softcap=20.0)
    yield check("power, values narrower than keys", "power", head_dim=p.head_dim * 3 // 2, value_dim=p.head_dim)
    yield check("lists, by the public function", "lists", attend=public)


def _decode_checks(p: Profile) -> Iterator[Check]:
    def check(name: str, kind: str, batch: int = p.batches[1], *, rows: int = 1, attend: Attend = decode, **changes: object) -> Check:
        return Check(f"decode: {name}", lambda: check_error(attend, p.decoding(batch, rows=rows, **changes), kind, p.block))

    for batch in p.batches:
        yield check(f"power, batch {batch}", "power", batch)
    for kind in ("lists", "lines", "dense"):
        yield check(kind, kind)
    for page_size in p.pages:
        yield check(f"power, pages of {page_size}", "power", page_size=page_size)
    yield check(f"lists, pages of {p.pages[0]}", "lists", page_size=p.pages[0])
    for head_dim in p.other_dims:
        yield check(f"power, head_dim {head_dim}", "power", head_dim=head_dim)
    yield check("power, the other dtype", "power", dtype=p.other_dtype)
    yield check("power, fp32", "power", dtype=torch.float32)
    for heads in p.other_heads:
        yield check(f"power, heads {heads[0]}/{heads[1]}", "power", heads=heads)
    yield check("power, 5 rows each", "power", rows=5)
    yield check("power, soft-cap", "power", softcap=20.0)
    yield check("power, by the public function", "power", attend=public)


def _selection_checks(p: Profile) -> Iterator[Check]:
    yield Check("selection: whole prompts", lambda: check_selection(p, [p.prompt, p.prompt - p.block // 3], None))
    yield Check("selection: cached prefix", lambda: check_selection(p, [p.prompt // 2, p.prompt // 4], [p.prompt, p.prompt - 7]))
    yield Check(f"selection: pages of {p.pages[0]}", lambda: check_selection(p, [p.prompt], None, page_size=p.pages[0]))
    yield Check("selection: the other dtype", lambda: check_selection(p, [p.prompt], None, dtype=p.other_dtype))
    # every head follows the pooled map; above, hardly one does
    yield Check("selection: maps", lambda: check_selection(p, [p.prompt, p.prompt - p.block // 3], None, tau=1.0))
    yield Check("selection: maps, cached prefix", lambda: check_selection(p, [p.prompt // 2], [p.prompt - 7], tau=1.0))
    yield Check(f"selection: head_dim {p.other_dims[0]}", lambda: check_selection(p, [p.prompt], None, head_dim=p.other_dims[0]))


def floor_of(dtype: torch.dtype) -> float:
    """Relative error beside twice naive's own. Of fp32 it is below that of products in tf32, above that of their threefold split."""
    return 5e-5 if dtype == torch.float32 else 1e-3


def check_error(attend: Attend, call: Call, kind: str, block: int) -> str:
    """Relative RMS error against fp64 at most twice naive's own in this dtype plus a floor, for each query block and head; every row written."""
    plan = random_plan(kind, call, block)
    out, lse = call.buffers()
    attend(call, plan, out, lse)
    cpu, exact_call, cpu_plan = call.on_cpu(), call.on_cpu(torch.float64), plan.to(torch.device("cpu"))
    exact, exact_lse = naive_attention(exact_call.q, exact_call.keys, cpu_plan, exact_call.lens, scale=call.scale, softcap=call.softcap)
    low, _ = naive_attention(cpu.q, cpu.keys, cpu_plan, cpu.lens, scale=call.scale, softcap=call.softcap)
    got, got_lse = out.double().cpu(), lse.double().cpu()
    worst, is_gap, floor = 0.0, torch.ones(call.q.shape[0], dtype=torch.bool), floor_of(call.q.dtype)
    for rows in cpu.lens.rows():
        is_gap[rows.q_start : rows.q_start + rows.q_len] = False
        for i in range(rows.query_blocks(block)):
            own = query_rows(rows, i, block)
            place = slice(rows.q_start + own.start, rows.q_start + own.stop)
            scale = exact[place].pow(2).mean((0, 2)).sqrt().clamp_min(1e-12)
            error, allowed = ((t[place] - exact[place]).pow(2).mean((0, 2)).sqrt() / scale for t in (got, low.double()))
            share = (error / (2 * allowed + floor)).max().item()
            # written as `<=`, never as `not >`: a NaN must fail
            assert share <= 1, f"sequence {rows.index}, query block {i}: {share:.2f} times the allowed error; errors by head {error.tolist()}"
            worst = max(worst, share)
    assert not got[is_gap].any(), "rows of no sequence are not 0"
    torch.testing.assert_close(got_lse, exact_lse, atol=2e-2, rtol=1e-3)
    return f"worst block at {worst:.2f} of the allowed error"


def check_gradients(p: Profile, kind: str, block: int = 16) -> str:
    """Attention with a mask, forward and backward, against fp64 on the CPU; keys behind a cached prefix, rows between the sequences."""
    call = Call.random(p.q_len, p.kv_len, heads=p.heads, head_dim=p.other_dims[0], dtype=torch.float32, device=p.device, gap=5)
    plan = random_plan(kind, call, block)
    found = []
    for one, its_plan in ((call, plan), (call.on_cpu(torch.float64), plan.to(torch.device("cpu")))):
        assert isinstance(one.keys, ContiguousKeys)
        q, k, v = (t.detach().nan_to_num().requires_grad_() for t in (one.q, one.keys.k, one.keys.v))
        out = differentiable_attention(q, replace(one.keys, k=k, v=v), its_plan, one.lens, scale=one.scale)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
        found.append([out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    worst = 0.0
    for name, got, want in zip(("output", "q", "k", "v"), *found, strict=True):
        error = float((got.double().cpu() - want).norm() / want.norm())
        assert error <= 1e-4, f"{name}: relative error {error:.1e}"
        worst = max(worst, error)
    return f"relative error of output and gradients at most {worst:.1e}"


def check_selection(
    p: Profile, q_len: Sequence[int], kv_len: Sequence[int] | None, *, page_size: int = 0, dtype: torch.dtype | None = None,
    head_dim: int | None = None, gamma: float = 0.9, tau: float = 0.1,
) -> str:
    """The kernels' plan against the definition in fp64: masses of columns and diagonals, classes, tiles, and the attention that is kept."""
    call = lifelike_batch(p, q_len, kv_len or q_len, page_size=page_size, dtype=dtype or p.dtype, head_dim=head_dim or p.head_dim)
    rule = SelectionRule(block_size=p.block, gamma=gamma, tau=tau, min_budget=2 * p.block)
    found = flex_index(call.q, call.keys, call.lens, rule=rule, scale=call.scale, impl="triton", diagnostics=True)
    exact = call.on_cpu(torch.float64)
    want = flex_index(exact.q, exact.keys, exact.lens, rule=rule, scale=call.scale, impl="naive", diagnostics=True)
    assert bool(found.is_finite.all())
    assert found.diagnostics is not None
    assert want.diagnostics is not None
    got_plan, least, different, total = found.plan.to(torch.device("cpu")), 1.0, 0, 0
    for rows, got, right in zip(exact.lens.rows(), found.diagnostics, want.diagnostics, strict=True):
        assert got is not None
        assert right is not None
        for name in ("vertical_mass", "slash_mass"):
            torch.testing.assert_close(getattr(got, name).double().cpu(), getattr(right, name).double(), atol=4e-3, rtol=2e-2)
        torch.testing.assert_close(got.distance.double().cpu(), right.distance.double(), atol=1e-2, rtol=2e-2)
        is_clear = (right.distance - rule.tau).abs() > 1e-2
        assert torch.equal(got.is_query_aware.cpu()[is_clear], right.is_query_aware[is_clear])
        masks = [plan.block_mask(rows) for plan in (got_plan, want.plan)]
        different += int((masks[0] != masks[1])[is_clear].sum())
        total += rows.causal_tiles(p.block) * int(is_clear.sum())
        assert got.probe_coverage is not None
        lines_only = ~got.is_query_aware
        if bool(lines_only.any()):
            least = min(least, got.probe_coverage[lines_only].min().item())
    assert least >= gamma - 1e-2, f"a head keeps {least:.3f} of its probe's attention, wanted {gamma}"
    # scores that tie within rounding may be ranked the other way round
    assert different <= 0.03 * total, f"{different} of {total} tiles differ"
    aware = sum(int(found.is_query_aware.sum()) for found in want.diagnostics if found is not None)
    return f"{different} of {total} tiles differ, {aware} heads by the map, least mass kept {least:.3f}"


def lifelike_batch(
    p: Profile, q_len: Sequence[int], kv_len: Sequence[int], *, page_size: int, dtype: torch.dtype, head_dim: int
) -> Call:
    """Sequences with structure: the keys of a longer prompt, the queries its last ones."""
    prompts = [Prompt.lifelike(n, p.heads, head_dim, torch.float32, torch.device("cpu"), seed=n) for n in kv_len]
    call = Call.random(q_len, kv_len, heads=p.heads, head_dim=head_dim, dtype=dtype, device=torch.device("cpu"), gap=3)
    keys = call.keys
    assert isinstance(keys, ContiguousKeys)
    for rows, start, prompt in zip(call.lens.rows(), keys.start.tolist(), prompts, strict=True):
        call.q[rows.q_start : rows.q_start + rows.q_len] = prompt.q[rows.offset :].to(dtype)
        keys.k[start : start + rows.kv_len] = prompt.k.to(dtype)
    lens = Ragged.of(list(q_len), list(kv_len), q_start=call.lens.q_start.tolist(), device=p.device)
    k, v = keys.k.to(p.device), keys.v.to(p.device)
    if page_size:
        pages = paged(k, v, keys.start.tolist(), list(kv_len), page_size, lens.kv_len, torch.Generator().manual_seed(0))
        return replace(call, q=call.q.to(p.device), keys=pages, lens=lens)
    return replace(call, q=call.q.to(p.device), keys=ContiguousKeys(k, v, keys.start.to(p.device), lens.kv_len), lens=lens)


def check_graph(p: Profile, attend: Callable[..., None], kind: str) -> str:
    """A captured call, replayed on other inputs in the same memory, gives what an eager call gives."""
    _needs_cuda(p)
    call, plan = _inputs(p, attend, kind)
    out, lse = call.buffers()
    graph = captured(lambda: attend(call, plan, out, lse))
    fresh, _ = _inputs(p, attend, kind, seed=5)
    _copy_inputs(call, fresh)
    out.fill_(torch.nan)
    graph.replay()
    want, want_lse = call.buffers()
    attend(call, plan, want, want_lse)
    torch.testing.assert_close(out, want, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=1e-3)
    return "replayed on other inputs"


def check_selection_graph(p: Profile) -> str:
    """The captured selection, replayed on other inputs, gives the plan that an eager call gives."""
    _needs_cuda(p)
    prompt, fresh = (Prompt.lifelike(p.prompt, p.heads, p.head_dim, p.dtype, p.device, seed=seed) for seed in (0, 1))
    found: list[VerticalSlashPlan] = []
    # made outside: its lengths are sent to the device, which no capture allows
    call = prompt.call
    graph = captured(lambda: found.append(_select(call, p)))
    for t, new in ((prompt.q, fresh.q), (prompt.k, fresh.k)):
        t.copy_(new)
    graph.replay()
    want, got = _select(call, p), found[-1]
    for name in ("vertical", "slash", "extra"):
        a, b = getattr(got, name), getattr(want, name)
        assert a is b is None or torch.equal(a, b), f"{name} differs after a replay"
    return "replayed on other inputs"


def check_no_sync(p: Profile, attend: Callable[..., None], kind: str) -> str:
    """A warm call reads nothing back from the device."""
    _needs_cuda(p)
    call, plan = _inputs(p, attend, kind)
    out, lse = call.buffers()
    attend(call, plan, out, lse)
    with forbidden_sync():
        attend(call, plan, out, lse)
    return "no synchronisation"


def check_selection_no_sync(p: Profile) -> str:
    """A warm selection, followed by the prefill over its plan, reads nothing back from the device."""
    _needs_cuda(p)
    prompt = Prompt.lifelike(p.prompt, p.heads, p.head_dim, p.dtype, p.device)
    call = prompt.call
    out, lse = call.buffers()
    prefill(call, _select(call, p), out, lse)
    with forbidden_sync():
        prefill(call, _select(call, p), out, lse)
    return "no synchronisation"


def check_most_tokens(p: Profile, kind: str, phase: str) -> str:
    """One KV head of a cache whose offsets pass 2**31: rows in the middle and at the end against fp64."""
    n, n_buffer_heads = p.most_tokens, 17
    pitch = n_buffer_heads * p.head_dim
    need = 4 * n * pitch * p.dtype.itemsize
    if p.device.type == "cuda" and torch.cuda.mem_get_info(p.device)[0] < need + (4 << 30):
        raise Skipped(f"needs {need >> 30} GiB of free memory")
    n_rows = n if phase == "prefill" else 1
    g = torch.Generator(p.device).manual_seed(0)
    # only the last heads of the buffers are used: their offsets are the largest
    q, out = (torch.empty(n_rows, n_buffer_heads, p.head_dim, dtype=p.dtype, device=p.device)[:, -2:] for _ in range(2))
    k, v = (torch.empty(n, n_buffer_heads, p.head_dim, dtype=p.dtype, device=p.device)[:, -1:] for _ in range(2))
    for t in (q, k, v):
        t.normal_(generator=g)
    out.fill_(torch.nan)
    lens = Ragged.of([n_rows], [n], device=p.device)
    keys = ContiguousKeys(k, v, torch.zeros_like(lens.kv_len), lens.kv_len)
    call = Call(q, keys, lens, p.head_dim**-0.5)
    plan: BlockPlan = ImplicitPlan(p.block, 4)
    if kind == "lines":
        plan = lines_of_density(n, 2, p.block, min(0.5, 24 / (n / p.block)), p.device)
    (prefill if phase == "prefill" else decode)(call, plan, out, None)
    assert not bool(out.isnan().any()), "rows were left unwritten, or hold NaN"
    places = [0, n // 2 + 1, n - 1] if phase == "prefill" else [n - 1]
    worst = max(_row_error(call, plan, out, place - (n - n_rows), place) for place in places)
    assert worst <= 2e-2, f"relative error {worst:.1e}"
    offset = (n - 1) * pitch + pitch
    return f"largest offset {offset} ({'past' if offset > 2**31 else 'below'} 2**31), worst row {worst:.1e}"


def _row_error(call: Call, plan: BlockPlan, out: Tensor, row: int, position: int) -> float:
    """Relative error of one row, over its heads."""
    keys = call.keys
    assert isinstance(keys, ContiguousKeys)
    i, b = position // plan.block_size, plan.block_size
    worst = 0.0
    for head in range(call.q.shape[1]):
        if isinstance(plan, ImplicitPlan):
            blocks = torch.tensor(plan.row_blocks(i), device=out.device)
        else:
            assert isinstance(plan, VerticalSlashPlan)
            j = torch.arange(i + 1, device=out.device)
            blocks = j[plan.vertical[0, head, : i + 1] | plan.slash[0, head, i - j]]
        token = (blocks[:, None] * b + torch.arange(b, device=out.device)).flatten()
        token = token[token <= position]
        k, v = (t[token, 0].double() for t in (keys.k, keys.v))
        want = (k @ call.q[row, head].double() * call.scale).softmax(0) @ v
        worst = max(worst, ((out[row, head].double() - want).norm() / want.norm()).item())
    return worst


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, which runs twice before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@contextmanager
def forbidden_sync() -> Iterator[None]:
    """Makes every wait for the device an error inside."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _inputs(p: Profile, attend: Callable[..., None], kind: str, seed: int = 0) -> tuple[Call, BlockPlan]:
    call = p.ragged(seed=seed) if attend is prefill else p.decoding(p.batches[1], seed=seed)
    return call, random_plan(kind, call, p.block)


def _copy_inputs(into: Call, new: Call) -> None:
    assert isinstance(into.keys, ContiguousKeys)
    assert isinstance(new.keys, ContiguousKeys)
    for t, fresh in ((into.q, new.q), (into.keys.k, new.keys.k), (into.keys.v, new.keys.v)):
        t.copy_(fresh)


def _select(call: Call, p: Profile) -> VerticalSlashPlan:
    rule = SelectionRule(block_size=p.block, min_budget=2 * p.block)
    return flex_index(call.q, call.keys, call.lens, rule=rule, scale=call.scale, impl="triton").plan


def _needs_cuda(p: Profile) -> None:
    if p.device.type != "cuda":
        raise Skipped("needs a CUDA device")


def run_check(check: Check) -> tuple[str, str]:
    """"passed", "failed" or "skipped", and a line of detail."""
    try:
        return "passed", check.run()
    except Skipped as reason:
        return "skipped", str(reason)
    except UnsupportedError as error:
        return "failed", f"not supported: {'; '.join(error.reasons) or error}"
    # whatever breaks one check must not hide the results of the others
    except Exception as error:
        return "failed", f"{type(error).__name__}: {str(error)[:600]}"
