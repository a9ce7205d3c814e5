"""Inputs of the GPU checks and benchmarks: attention calls of any shape, plans over them, and the numbers that follow from a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accel.kernels.block_sparse import BlockPlan, ContiguousKeys, ImplicitPlan, KeyView, ListPlan, PagedKeys, Ragged, VerticalSlashPlan
from accel.kernels.block_sparse.plan import causal_blocks


@dataclass(frozen=True)
class Call:
    """A batch of attention. Rows of q between sequences, keys around them and unused pages hold NaN."""

    q: Tensor               # (T, Hq, D)
    keys: KeyView
    lens: Ragged
    scale: float
    softcap: float | None = None

    @classmethod
    def random(
        cls, q_len: Sequence[int], kv_len: Sequence[int], *, heads: tuple[int, int], head_dim: int, value_dim: int | None = None,
        dtype: torch.dtype, device: torch.device, gap: int = 0, page_size: int = 0, softcap: float | None = None, seed: int = 0,
    ) -> Call:
        """Drawn on the CPU, so that every machine gets the same numbers. heads: query and key-value heads. gap: rows before each sequence."""
        g = torch.Generator().manual_seed(seed)

        def spread(lengths: Sequence[int], n_heads: int, dim: int, size: float) -> tuple[Tensor, list[int]]:
            whole = torch.full((sum(lengths) + gap * (len(lengths) + 1), n_heads, dim), torch.nan)
            starts, at = [], gap
            for n in lengths:
                starts.append(at)
                whole[at : at + n] = torch.randn(n, n_heads, dim, generator=g) * size
                at += n + gap
            return whole.to(dtype).to(device), starts

        q, q_start = spread(q_len, heads[0], head_dim, 2.0)
        lens = Ragged.of(list(q_len), list(kv_len), q_start=q_start, device=device)
        k, k_start = spread(kv_len, heads[1], head_dim, 1.0)
        v, _ = spread(kv_len, heads[1], value_dim or head_dim, 1.0)
        keys: KeyView = ContiguousKeys(k, v, torch.tensor(k_start, device=device), lens.kv_len)
        if page_size:
            keys = paged(k, v, k_start, list(kv_len), page_size, lens.kv_len, g)
        return cls(q, keys, lens, head_dim**-0.5, softcap)

    def on_cpu(self, dtype: torch.dtype | None = None) -> Call:
        """The same call on the CPU, in another precision where asked for."""

        def moved(t: Tensor) -> Tensor:
            return t.to("cpu", dtype or t.dtype)

        lens = self.lens
        lens = Ragged(lens.q_start.cpu(), lens.q_len.cpu(), lens.kv_len.cpu(), lens.max_q, lens.max_kv)
        if isinstance(self.keys, PagedKeys):
            keys: KeyView = PagedKeys(moved(self.keys.k_pages), moved(self.keys.v_pages), self.keys.page_table.cpu(), lens.kv_len)
        else:
            assert isinstance(self.keys, ContiguousKeys)
            keys = ContiguousKeys(moved(self.keys.k), moved(self.keys.v), self.keys.start.cpu(), lens.kv_len)
        return replace(self, q=moved(self.q), keys=keys, lens=lens)

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Output and LSE, full of NaN."""
        out = torch.full((*self.q.shape[:2], self.keys.value_dim), torch.nan, dtype=self.q.dtype, device=self.q.device)
        return out, torch.full((self.q.shape[1], self.q.shape[0]), torch.nan, device=self.q.device)


def paged(
    k: Tensor, v: Tensor, starts: Sequence[int], lengths: Sequence[int], page_size: int, kv_len: Tensor, generator: torch.Generator
) -> PagedKeys:
    """The same keys in shuffled pages; the table's unused entries lie out of bounds."""
    counts = [-(-n // page_size) for n in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator)
    table = torch.full((len(counts), max(counts) + 1), 2**30, dtype=torch.int32)
    pools = [torch.full((order.shape[0], page_size, *t.shape[1:]), torch.nan, dtype=t.dtype, device=t.device) for t in (k, v)]
    at = 0
    for b, (start, n, count) in enumerate(zip(starts, lengths, counts, strict=True)):
        pages = order[at : at + count]
        table[b, :count] = pages.int()
        for pool, t in zip(pools, (k, v), strict=True):
            rows = pool.new_full((count * page_size, *t.shape[1:]), torch.nan)
            rows[:n] = t[start : start + n]
            pool[pages.to(t.device)] = rows.view(count, page_size, *t.shape[1:])
        at += count
    return PagedKeys(pools[0], pools[1], table.to(k.device), kv_len)


def random_plan(kind: str, call: Call, block_size: int, *, seed: int = 1) -> BlockPlan:
    """"power", "window", "dense", "lists", "lines" or "lines+tiles" over a call; lists and lines also leave rows without their own block."""
    if kind in ("power", "window", "dense"):
        return ImplicitPlan.dense(block_size) if kind == "dense" else ImplicitPlan(block_size, 2, powers=kind == "power")
    g = torch.Generator().manual_seed(seed)
    cpu = call.on_cpu()
    every, n_heads = list(cpu.lens.rows()), call.q.shape[1]
    if kind == "lists":
        masks = []
        for rows in every:
            nq, nk = rows.query_blocks(block_size), rows.key_blocks(block_size)
            masks.append((torch.rand(n_heads, nq, nk, generator=g) < 0.4) & (causal_blocks(rows, block_size) >= 0))
        return ListPlan.from_mask(masks, cpu.lens, block_size).to(call.q.device)
    nq, nk = max(r.query_blocks(block_size) for r in every), max(r.key_blocks(block_size) for r in every)
    vertical, slash = (torch.rand(len(every), n_heads, nk, generator=g) < 0.25 for _ in range(2))
    extra = torch.rand(len(every), n_heads, nq, nk, generator=g) < 0.2 if kind == "lines+tiles" else None
    return VerticalSlashPlan(block_size, vertical, slash, extra).to(call.q.device)


@dataclass(frozen=True)
class Prompt:
    """One causal self-attention of n tokens, drawn on the device, tokens outermost in memory as models have it."""

    q: Tensor       # (n, Hq, D)
    k: Tensor       # (n, Hkv, D)
    v: Tensor

    @classmethod
    def random(cls, n: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Prompt:
        g = torch.Generator(device).manual_seed(seed)
        q, k, v = (torch.randn(n, h, head_dim, generator=g, dtype=dtype, device=device) for h in (heads[0], heads[1], heads[1]))
        return cls(q, k, v)

    @classmethod
    def lifelike(cls, n: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Prompt:
        """Attention that looks near, at a fixed distance, at a first token and at a few heavy keys, sharper or more diffuse from head to head.

        Spread and growing sharpness are set so that FlexPrefill's densities at gamma 0.95 and 0.9 are those of SmolLM2-135M at 4K, lie above its
        own at 8K, and come at 128K near the share of dense time that its authors tell of Llama-3.1-8B, 0.41 and 0.28. The three global layers of
        Gemma 3 270M are denser than this at 4K to 32K.
        """
        g = torch.Generator(device).manual_seed(seed)
        n_heads, n_kv = heads

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        def spread() -> Tensor:
            """0 … 1 evenly over the heads, in any order: few heads are as mixed as many."""
            return (torch.randperm(n_heads, generator=g, device=device) + 0.5) / n_heads

        # positions as turning pairs, as rotary embedding leaves them: their product falls with the distance
        n_pairs, root = head_dim // 4, head_dim**0.5
        rates = 0.3 * torch.logspace(0, -4, n_pairs, device=device)
        turns = torch.arange(n, device=device)[:, None] * rates
        place = torch.cat([turns.cos(), turns.sin()], -1)
        shift = torch.randint(0, max(n // 4, 1), (n_heads,), generator=g, device=device) * (spread() < 0.3)
        aim = (torch.arange(n, device=device)[:, None, None] - shift[:, None]) * rates
        aim = torch.cat([aim.cos(), aim.sin()], -1)
        # the attention of noise grows with n: in a long prompt it would drown logits that do not grow
        growth = 0.4 * math.log(max(n / 4096, 1))
        peak = (7 + 6 * spread() + growth)[:, None]
        first = torch.zeros(n, n_kv, 1, device=device)
        first[0] = 1
        # pooled keys blur that token, so only heads that pass it over are query-aware
        to_first = (root * (peak + 5 * spread()[:, None] - 2) * (spread() > 0.1)[:, None]).expand(n, -1, -1)
        rest = head_dim - 2 * n_pairs - 1
        topic = torch.nn.functional.normalize(noise(n_kv, rest), dim=-1)
        heavy = (torch.rand(n, n_kv, 1, generator=g, device=device) < 16 / n) * 10.0
        pull = (root / 10 * (8 * spread() + growth))[:, None]
        k = torch.cat([place[:, None].expand(-1, n_kv, -1), first, heavy * topic + 0.3 * noise(n, n_kv, rest)], -1)
        others = pull * topic.repeat_interleave(n_heads // n_kv, 0) + 0.6 * noise(n, n_heads, rest)
        q = torch.cat([aim * (root * peak / n_pairs), to_first, others], -1)
        return cls(q.to(dtype), k.to(dtype), noise(n, n_kv, head_dim).to(dtype))

    @property
    def n(self) -> int:
        return self.q.shape[0]

    @property
    def scale(self) -> float:
        return float(self.q.shape[2] ** -0.5)

    @property
    def call(self) -> Call:
        lens = Ragged.of([self.n], [self.n], device=self.q.device)
        keys = ContiguousKeys(self.k, self.v, torch.zeros_like(lens.kv_len), lens.kv_len)
        return Call(self.q, keys, lens, self.scale)

    @property
    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as SDPA takes them, (1, heads, n, D) views."""
        q, k, v = (t.transpose(0, 1)[None] for t in (self.q, self.k, self.v))
        return q, k, v


def lists_of_density(n: int, n_heads: int, block_size: int, density: float, device: torch.device, seed: int = 0) -> ListPlan:
    """Random key blocks per head and row, sink and own block always among them; `density` of the causal ones where it can be."""
    nb = -(-n // block_size)
    g = torch.Generator(device).manual_seed(seed)
    available = torch.arange(1, nb + 1, device=device)
    wanted = torch.maximum((density * available).round().long(), available.clamp_max(2))
    below = torch.ones(nb, nb, dtype=torch.bool, device=device).tril(-1)
    width = max(int(wanted[-1]) - 1, 1)
    full = torch.zeros(1, n_heads, nb, width, dtype=torch.int32, device=device)
    for head in range(n_heads):
        # one head at a time: at 256K tokens the ranks of all heads would take gigabytes
        rank_by = torch.rand(nb, nb, generator=g, device=device)
        rank_by[:, 0] = 2.0
        chosen = rank_by.masked_fill(~below, -1.0).topk(width, -1).indices
        # a row's first entries are the best ones: put these in order, whatever follows behind them
        is_kept = torch.arange(width, device=device) < (wanted - 1)[:, None]
        full[0, head] = chosen.masked_fill(~is_kept, 2**30).sort(-1).values.masked_fill(~is_kept, 0).int()
    mask_index = torch.arange(nb, dtype=torch.int32, device=device)[None, None, :, None].repeat(1, n_heads, 1, 1)
    counts = (wanted - 1).int()[None, None].repeat(1, n_heads, 1)
    return ListPlan(block_size, torch.ones_like(counts), mask_index, counts, full)


def lines_of_density(n: int, n_heads: int, block_size: int, density: float, device: torch.device, seed: int = 0) -> VerticalSlashPlan:
    """Random columns and diagonals per head, sink and own diagonal among them, that together cover about `density` of the causal blocks."""
    nb = -(-n // block_size)
    g = torch.Generator(device).manual_seed(seed)
    share = 1 - (1 - density) ** 0.5
    lines = torch.rand(2, 1, n_heads, nb, generator=g, device=device).argsort(-1) < max(1, round(share * nb))
    lines[..., 0] = True
    return VerticalSlashPlan(block_size, lines[0], lines[1])


@dataclass(frozen=True)
class Work:
    """What a plan makes of one prompt. pairs: queries times the keys they see, over all heads."""

    pairs: int
    density: float

    def tflops(self, head_dim: int, ms: float) -> float:
        """Two products of `head_dim` per pair. Blocks on the diagonal count with the pairs below it only, so this is what was useful."""
        return 4e-9 * self.pairs * head_dim / ms


def work_of(plan: BlockPlan | None, n: int, n_heads: int) -> Work:
    """Of a prompt of n tokens, a multiple of the block size; without a plan the dense one."""
    if plan is None:
        return Work(n_heads * n * (n + 1) // 2, 1.0)
    b, nb = plan.block_size, -(-n // plan.block_size)
    rows = next(Ragged.of([n], [n]).rows())
    if isinstance(plan, ListPlan):
        below, own = int(plan.full_count.sum()), int(plan.mask_count.sum())
        heads = plan.full_count.shape[1]
    else:
        below = own = 0
        masks = (part.block_mask(rows) for part in _by_head(plan))
        heads = 0
        for mask in masks:
            heads += mask.shape[0]
            diagonal = int(mask.diagonal(dim1=-2, dim2=-1).sum())
            own, below = own + diagonal, below + int(mask.sum()) - diagonal
    each = n_heads // heads
    return Work(each * (below * b * b + own * b * (b + 1) // 2), (below + own) / (heads * nb * (nb + 1) / 2))


def _by_head(plan: BlockPlan) -> list[BlockPlan]:
    """A plan in parts whose masks fit memory."""
    if not isinstance(plan, VerticalSlashPlan):
        return [plan]
    parts: list[BlockPlan] = []
    for h in range(plan.vertical.shape[1]):
        extra = None if plan.extra is None else plan.extra[:, h : h + 1]
        parts.append(VerticalSlashPlan(plan.block_size, plan.vertical[:, h : h + 1], plan.slash[:, h : h + 1], extra))
    return parts
