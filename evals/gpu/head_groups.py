"""Attention over groups of KV heads with different numbers of entries: its inputs, its checks, and what HACK costs in a layer of Infinity-8B."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accel.evals.gpu.checks import Check, Profile, Skipped, captured, floor_of, forbidden_sync
from accel.evals.gpu.contestants import SDPA_BACKENDS
from accel.evals.gpu.timing import Run
from accel.kernels.head_grouped import KVGroup, grouped_attention
from accel.kernels.head_grouped.api import Impl
from accel.kernels.head_grouped.naive import naive_grouped
from accel.kernels.probe import mean_attention

if TYPE_CHECKING:
    from accel.evals.gpu.bench import Lab

# the checks' KV heads: two groups whose heads are mixed, a third of one head
MIXED = ((3, 0), (1, 4), (2,))


@dataclass(frozen=True)
class GroupCall:
    """One attention call. Spare room of the buffers and entries past a head's length hold NaN."""

    q: Tensor
    groups: list[KVGroup]
    scale: float
    softcap: float | None = None
    n_causal: int = 0

    @classmethod
    def random(
        cls, entries: Sequence[int], *, heads: Sequence[tuple[int, ...]] = MIXED, batch: int = 2, each: int = 1, n_rows: int = 1,
        head_dim: int = 16, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", has_lengths: bool = False,
        is_token_major: bool = True, softcap: float | None = None, n_causal: int = 0, seed: int = 0,
    ) -> GroupCall:
        """Drawn on the CPU, so that every machine gets the same numbers. entries: of each group. each: query heads per KV head."""
        g = torch.Generator().manual_seed(seed)

        def view(whole: Tensor, n: int) -> Tensor:
            return (whole.transpose(1, 2) if is_token_major else whole)[:, :, :n]

        def drawn(n_heads: int, n: int, size: float, room: int) -> Tensor:
            """(batch, n_heads, n, head_dim) in a buffer with room for more entries; the buffer."""
            whole = torch.full((batch, n + room, n_heads, head_dim) if is_token_major else (batch, n_heads, n + room, head_dim), torch.nan)
            view(whole, n).copy_(torch.randn(batch, n_heads, n, head_dim, generator=g) * size)
            return whole

        groups = []
        for own, n in zip(heads, entries, strict=True):
            k, v = (drawn(len(own), n, 1.0, room=3) for _ in range(2))
            length = torch.randint(0, n + 1, (batch, len(own)), generator=g, dtype=torch.int32) if has_lengths else None
            if length is not None:
                for whole in (k, v):
                    view(whole, n).masked_fill_((torch.arange(n) >= length[..., None])[..., None], torch.nan)
                length = length.to(device)
            k, v = (view(whole.to(device, dtype), n) for whole in (k, v))
            groups.append(KVGroup(own, k, v, length))
        q = view(drawn(each * sum(len(own) for own in heads), n_rows, 2.0, room=0).to(device, dtype), n_rows)
        return cls(q, groups, head_dim**-0.5, softcap, n_causal)

    def run(self, impl: Impl = "triton") -> tuple[Tensor, Tensor]:
        """Output and LSE."""
        return grouped_attention(
            self.q, self.groups, scale=self.scale, softcap=self.softcap, n_causal=self.n_causal, return_lse=True, impl=impl
        )

    def exact(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """The definition's output and LSE in this precision, on the CPU."""
        groups = [
            replace(group, k=group.k.cpu().to(dtype), v=group.v.cpu().to(dtype), length=None if group.length is None else group.length.cpu())
            for group in self.groups
        ]
        return naive_grouped(self.q.cpu().to(dtype), groups, scale=self.scale, softcap=self.softcap, n_causal=self.n_causal)

    def check(self, found: tuple[Tensor, Tensor], *, block: int = 1, floor: float = 1e-3) -> float:
        """The worst share of the allowed error, twice that of the definition in this precision plus `floor`, by blocks of rows and heads."""
        (exact, exact_lse), (low, _) = self.exact(), self.exact(self.q.dtype)
        out, lse = (t.cpu().double() for t in found)
        worst = 0.0
        for lo in range(0, out.shape[2], block):
            got, want, naive = (t[:, :, lo : lo + block].double() for t in (out, exact, low))
            size = want.pow(2).mean((2, 3)).sqrt()
            error, allowed = ((t - want).pow(2).mean((2, 3)).sqrt() / size.clamp_min(1e-12) for t in (got, naive))
            share = (error / (2 * allowed + floor)).max().item()
            # written as `<=`, never as `not >`: a NaN must fail
            assert share <= 1, f"rows from {lo} on: {share:.2f} times the allowed error; errors by row and head {error.tolist()}"
            worst = max(worst, share)
        torch.testing.assert_close(lse, exact_lse, atol=20 * floor, rtol=max(floor, 1e-5))
        return worst


def group_checks(p: Profile) -> Iterator[Check]:
    """The checks of these kernels; rows and entries follow the profile's."""
    long, short = p.decode_kv, p.decode_kv // 5

    def check(name: str, **changes: object) -> Check:
        return Check(f"head groups: {name}", lambda: check_groups(p, **changes))

    for phase, n_rows in (("rows", p.q_len[0]), ("decode", 1)):
        yield check(phase, n_rows=n_rows)
        yield check(f"{phase}, lengths", n_rows=n_rows, has_lengths=True, each=p.heads[0] // p.heads[1])
        yield check(f"{phase}, soft-cap, heads outermost", n_rows=n_rows, softcap=20.0, is_token_major=False)
        yield check(f"{phase}, the other dtype", n_rows=n_rows, dtype=p.other_dtype)
        yield check(f"{phase}, fp32", n_rows=n_rows, dtype=torch.float32)
        for head_dim in p.other_dims:
            yield check(f"{phase}, head_dim {head_dim}", n_rows=n_rows, head_dim=head_dim)
    for n_rows in (p.q_len[1], 5):
        yield check(f"second turn of {n_rows} rows", n_rows=n_rows, n_causal=n_rows, each=p.heads[0] // p.heads[1])
    yield check("two groups, one empty", entries=(long, 0), heads=((1, 2), (0,)), n_rows=p.q_len[1])
    yield check("one group", entries=(short,), heads=((0, 1, 2),), n_rows=p.q_len[1])
    yield Check("graph: head groups", partial(check_group_graph, p))
    yield Check("no sync: head groups", partial(check_group_no_sync, p))


def _call(p: Profile, **changes: object) -> GroupCall:
    options: dict[str, object] = {"entries": (p.decode_kv // 5, p.decode_kv, 3), "head_dim": p.head_dim, "dtype": p.dtype, "device": p.device}
    return GroupCall.random(**{**options, **changes})  # type: ignore[arg-type]


def check_groups(p: Profile, **changes: object) -> str:
    """Error against fp64, by blocks of rows and heads."""
    call = _call(p, **changes)
    return f"worst block at {call.check(call.run(), block=p.block, floor=floor_of(call.q.dtype)):.2f} of the allowed error"


def check_group_graph(p: Profile) -> str:
    """A captured decoding call reads lengths from the device: replayed with other ones it gives what an eager call gives."""
    _needs_cuda(p)
    call = _call(p, has_lengths=True)
    found: list[Tensor] = []
    graph = captured(lambda: found.append(call.run()[0]))
    for group in call.groups:
        assert group.length is not None
        # shorter only: what lies past the old lengths is NaN
        group.length.div_(2, rounding_mode="floor")
    graph.replay()
    torch.testing.assert_close(found[-1], call.run()[0], atol=1e-3, rtol=1e-3)
    return "replayed with other lengths"


def check_group_no_sync(p: Profile) -> str:
    """Warm calls read nothing back from the device."""
    _needs_cuda(p)
    calls = [_call(p, has_lengths=True, n_rows=n_rows) for n_rows in (1, p.q_len[1])]
    for call in calls:
        call.run()
    with forbidden_sync():
        for call in calls:
            call.run()
    return "no synchronisation"


def _needs_cuda(p: Profile) -> None:
    if p.device.type != "cuda":
        raise Skipped("needs a CUDA device")


@dataclass(frozen=True)
class LastScale:
    """The largest step of a next-scale model, in one layer. Infinity-8B at 1M pixels with guidance, of which HACK keeps 0.3 (alpha 0.5)."""

    batch: int = 2
    n_heads: int = 28
    head_dim: int = 128
    n_rows: int = 4096
    n_entries: int = 10521
    budgets: tuple[int, int] = (1052, 5260)     # contextual and structural heads, half of each
    n_first: int = 5                            # entries that structural heads keep whatever their score
    n_observed: int = 32                        # queries that score


def bench_last_scale(lab: Lab, name: str) -> None:
    """Attention over two groups beside dense attention, and everything HACK does before it: scores, top-k, gather."""
    s, dtype, device = lab.sizes.last_scale, lab.sizes.dtype, lab.device
    q, k, v = (
        torch.nn.functional.normalize(torch.randn(s.batch, n, s.n_heads, s.head_dim, device=device), dim=-1).to(dtype).transpose(1, 2)
        for n in (s.n_rows, s.n_entries, s.n_entries)
    )
    # the learned temperature of the queries, about; the scale of such layers is 1
    q = q * 10
    half = s.n_heads // 2
    heads = (tuple(range(half)), tuple(range(half, s.n_heads)))
    observed = q[:, :, :: max(s.n_rows // s.n_observed, 1)][:, :, : s.n_observed]
    score = partial(mean_attention, observed, k, scale=1.0, is_causal=False, impl="triton")
    scores = score()
    index = _selected(scores, s)
    groups = _gathered(k, v, index, heads)

    def attend(own: list[KVGroup]) -> Tensor:
        return grouped_attention(q, own, scale=1.0, impl="triton")

    def by_torch() -> Tensor:
        with sdpa_kernel(SDPA_BACKENDS["sdpa flash"]):
            return torch.cat([scaled_dot_product_attention(q[:, g.heads[0] : g.heads[-1] + 1], g.k, g.v, scale=1.0) for g in groups], 1)

    runs: dict[str, Run] = {what: partial(_dense, backend, q, k, v) for what, backend in SDPA_BACKENDS.items()}
    runs |= {
        "ours dense": partial(attend, [KVGroup(tuple(range(s.n_heads)), k, v)]),
        "two groups": partial(attend, groups),
        "sdpa flash, a call per group": by_torch,
        "scores": score,
        "scores by torch": lambda: (observed.float() @ k.float().mT).softmax(-1).sum(2),
        "selection": lambda: _selected(scores, s),
        "gather": lambda: _gathered(k, v, index, heads),
        "scores, selection, gather": lambda: _gathered(k, v, _selected(score(), s), heads),
        "all with two groups": lambda: attend(_gathered(k, v, _selected(score(), s), heads)),
    }
    found = lab.compare(runs)
    for what, times in found.times.items():
        n = s.n_entries * s.n_heads if what in ("ours dense", *SDPA_BACKENDS) else half * sum(s.budgets)
        facts = {"tflops": 4e-9 * s.batch * n * s.n_rows * s.head_dim / times.median} if what not in NO_PRODUCTS else {}
        lab.record.add(name, what, times, **facts)
    lab.about = (
        f"Batch {s.batch}, {s.n_heads} heads of {s.head_dim}, {s.n_rows} queries, {s.n_entries} entries of which half the heads keep {s.budgets[0]} "
        f"and half {s.budgets[1]}; {s.n_observed} queries score. TFLOP/s count the entries that are read. "
        "Wanted: all of it at most 0.55 of dense SDPA, scores, selection and gather together at most 0.1 (kv-compression.md §11)."
    )


def bench_group_decode(lab: Lab, name: str) -> None:
    """One token per sequence over two groups: bytes of the keys and values read, per second, beside torch's attention over the same groups."""
    s, batch, head_dim = lab.sizes, lab.sizes.batches[0], lab.sizes.head_dims[0]
    n_heads, n_kv = s.heads
    half = -(-n_kv // 2)
    sizes = (s.decode_tokens // 10, s.decode_tokens // 2)
    heads = [own for own in (tuple(range(half)), tuple(range(half, n_kv))) if own]

    def drawn(n: int, n_entries: int) -> Tensor:
        return torch.randn(batch, n_entries, n, head_dim, dtype=s.dtype, device=lab.device).transpose(1, 2)

    q, scale = drawn(n_heads, 1), head_dim**-0.5
    groups = [KVGroup(own, drawn(len(own), n), drawn(len(own), n)) for own, n in zip(heads, sizes, strict=False)]
    full = [replace(group, length=torch.full(group.k.shape[:2], group.n_entries, dtype=torch.int32, device=lab.device)) for group in groups]

    def by_torch() -> None:
        each = n_heads // n_kv
        for group in groups:
            with sdpa_kernel(SDPA_BACKENDS["sdpa flash"]):
                own = q[:, group.heads[0] * each : (group.heads[-1] + 1) * each]
                scaled_dot_product_attention(own, group.k, group.v, scale=scale, enable_gqa=each > 1)

    runs: dict[str, Run] = {
        "two groups": partial(grouped_attention, q, groups, scale=scale, impl="triton"),
        "two groups with lengths": partial(grouped_attention, q, full, scale=scale, impl="triton"),
        "sdpa flash, a call per group": by_torch,
    }
    n_bytes = sum(t.numel() * t.element_size() for group in groups for t in (group.k, group.v))
    for what, times in lab.compare(runs).times.items():
        lab.record.add(name, what, times, batch=batch, gbs=1e-6 * n_bytes / times.median)
    lab.about = f"Batch {batch}, heads {n_heads}/{n_kv} of {head_dim}, half of them with {sizes[0]} entries and half with {sizes[1]}."


NO_PRODUCTS = ("scores", "scores by torch", "selection", "gather", "scores, selection, gather", "all with two groups")


def _dense(backend: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):  # type: ignore[arg-type]
        return scaled_dot_product_attention(q, k, v, scale=1.0)


def _selected(scores: Tensor, s: LastScale) -> tuple[Tensor, Tensor]:
    """Entries that the contextual and the structural heads keep, ascending (kv-compression.md §2.4). scores: (B, H, T)."""
    half, n_new = s.n_heads // 2, s.n_rows
    contextual = scores[:, :half].topk(s.budgets[0], -1).indices.sort(-1).values
    middle = scores[:, half:, s.n_first : s.n_entries - n_new]
    chosen = middle.topk(s.budgets[1] - s.n_first - n_new, -1).indices.sort(-1).values + s.n_first
    every = torch.arange(s.n_entries, device=scores.device).expand(*chosen.shape[:2], -1)
    return contextual, torch.cat([every[..., : s.n_first], chosen, every[..., s.n_entries - n_new :]], -1)


def _gathered(k: Tensor, v: Tensor, index: tuple[Tensor, Tensor], heads: tuple[tuple[int, ...], ...]) -> list[KVGroup]:
    groups = []
    for own, chosen in zip(heads, index, strict=True):
        place = chosen[..., None].expand(*chosen.shape, k.shape[3])
        groups.append(KVGroup(own, *(t[:, own[0] : own[-1] + 1].gather(2, place) for t in (k, v))))
    return groups
