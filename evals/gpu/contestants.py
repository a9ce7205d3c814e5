"""Who is timed on a GPU: the dense attentions that are installed, our kernels over a plan, and the tile sizes to try."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from accel.evals.gpu.cases import Call, Prompt
from accel.evals.gpu.checks import decode, prefill
from accel.evals.gpu.timing import Run
from accel.kernels.block_sparse import BlockPlan, ImplicitPlan, Ragged
from accel.kernels.block_sparse.differentiable import flex_block_mask

# modules that hold a dense `flash_attn_func(q, k, v, softmax_scale=, causal=)` over (B, L, H, D)
FLASH_MODULES = {
    "flash-attn 2": ("flash_attn",),
    "flash-attn 3": ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
    "flash_attn.cute": ("flash_attn.cute",),
}
SDPA_BACKENDS = {"sdpa flash": SDPBackend.FLASH_ATTENTION, "sdpa cudnn": SDPBackend.CUDNN_ATTENTION}

# rows, cols, warps, stages, registers per thread: the compiler's own reports leave these in doubt (kernels.md §1.2)
PREFILL_TILES: dict[int, tuple[tuple[int, int, int, int, int | None], ...]] = {
    64: (
        (128, 64, 8, 2, None), (128, 64, 8, 3, None), (128, 64, 8, 3, 128), (128, 128, 8, 2, None), (128, 128, 8, 3, None),
        (128, 64, 4, 3, None), (64, 64, 4, 3, None),
    ),
    128: (
        (128, 64, 8, 2, None), (128, 64, 8, 2, 128), (128, 64, 8, 3, None), (128, 64, 8, 3, 128), (128, 64, 8, 4, None),
        (128, 128, 8, 2, None), (128, 32, 8, 3, 128), (64, 64, 4, 2, None), (64, 64, 4, 3, None), (64, 128, 4, 2, None),
    ),
    256: ((128, 64, 8, 2, None), (128, 32, 8, 2, None), (128, 32, 8, 3, None), (64, 64, 4, 2, None), (64, 32, 4, 3, None)),
}  # fmt: skip
# keys per step, warps, stages
DECODE_TILES = ((32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 8, 3))


def dense_runs(prompt: Prompt, *, wants_flex: bool) -> dict[str, Run]:
    """Every dense causal attention there might be. Those that are not installed raise when they are run."""
    runs: dict[str, Run] = {name: _sdpa(prompt, backend) for name, backend in SDPA_BACKENDS.items()}
    runs |= {name: partial(_flash, prompt, modules) for name, modules in FLASH_MODULES.items()}
    if wants_flex:
        runs["flex attention"] = _flex_dense(prompt)
    runs["ours dense"] = prefill_run(prompt.call, ImplicitPlan.dense(128))
    return runs


def prefill_run(call: Call, plan: BlockPlan, config: object = None) -> Run:
    """Our prefill kernel into a buffer of its own."""
    out, _ = call.buffers()
    return partial(prefill, call, plan, out, None, config)


def decode_run(call: Call, plan: BlockPlan, config: object = None) -> Run:
    """Our decode kernel into a buffer of its own."""
    out, _ = call.buffers()
    return partial(decode, call, plan, out, None, config)


def prefill_configs(head_dim: int) -> dict[str, object]:
    """Tile sizes to try, by a name that says them."""
    from accel.kernels.block_sparse.triton_launch import PrefillConfig

    found: dict[str, object] = {}
    for rows, cols, warps, stages, registers in PREFILL_TILES.get(head_dim, ()):
        name = f"{rows}×{cols}, {warps} warps, {stages} stages" + (f", {registers} registers" if registers else "")
        found[name] = PrefillConfig(rows=rows, cols=cols, num_warps=warps, num_stages=stages, maxnreg=registers)
    return found


def decode_configs() -> dict[str, object]:
    """The same for decoding."""
    from accel.kernels.block_sparse.triton_decode import DecodeConfig

    return {f"{n} keys, {w} warps, {s} stages": DecodeConfig(block_n=n, num_warps=w, num_stages=s) for n, w, s in DECODE_TILES}


def optional_runs(call: Call, plan: BlockPlan) -> dict[str, Run]:
    """The executors that are there besides our own, over the same plan; those that cannot run raise with the reason."""
    from accel.kernels.block_sparse import cute_executor, flex_executor

    def run(available: Callable[[], str | None], attend: Callable[..., None]) -> None:
        why_not = available()
        if why_not is not None:
            raise RuntimeError(why_not)
        attend(call.q, call.keys, plan, call.lens, scale=call.scale, softcap=call.softcap, out=out, lse=None)

    out, _ = call.buffers()
    return {
        "flex": partial(run, flex_executor.available, flex_executor.flex_executor),
        "cute": partial(run, cute_executor.available, cute_executor.cute_attention),
    }


def sdpa_decode(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """SDPA's flash attention of one query per sequence over a whole cache: q (B, Hq, 1, D), k and v (B, Hkv, n, D)."""

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return run


def _sdpa(prompt: Prompt, backend: SDPBackend) -> Run:
    q, k, v = prompt.heads_first
    repeated: list[tuple[Tensor, Tensor]] = []

    def run() -> Tensor:
        with sdpa_kernel(backend):
            if not repeated:
                try:
                    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=prompt.scale, enable_gqa=True)
                except RuntimeError:
                    # a backend that wants as many key heads as query heads; made once, so that the copy is not timed
                    each = q.shape[1] // k.shape[1]
                    repeated.append((k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)))
            return scaled_dot_product_attention(q, *repeated[0], is_causal=True, scale=prompt.scale)

    return run


def _flash(prompt: Prompt, modules: tuple[str, ...]) -> object:
    return _flash_function(modules)(prompt.q[None], prompt.k[None], prompt.v[None], softmax_scale=prompt.scale, causal=True)


@cache
def _flash_function(modules: tuple[str, ...]) -> Callable[..., object]:
    problems = []
    for name in modules:
        try:
            function: Callable[..., object] = importlib.import_module(name).flash_attn_func
        # a build for another torch shows as OSError or RuntimeError
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            problems.append(f"{name}: {error}")
        else:
            return function
    raise ImportError("; ".join(problems))


def _flex_dense(prompt: Prompt) -> Run:
    made: list[Run] = []

    def run() -> None:
        # made when it is first run, so that a torch where it cannot be made loses this contestant only
        if not made:
            made.append(_compiled_flex(prompt))
        made[0]()

    return run


def _compiled_flex(prompt: Prompt) -> Run:
    from torch.nn.attention.flex_attention import BlockMask

    from accel.kernels.block_sparse.flex_executor import compiled_flex_attention

    def causal(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return row >= key

    # made from block lists: FlexAttention's own helper would look at n² booleans
    rows = next(Ragged.of([prompt.n], [prompt.n]).rows())
    lists = flex_block_mask(ImplicitPlan.dense(128), rows, device=prompt.q.device)
    mask = BlockMask.from_kv_blocks(
        lists.kv_num_blocks, lists.kv_indices, lists.full_kv_num_blocks, lists.full_kv_indices,
        BLOCK_SIZE=128, mask_mod=causal, seq_lengths=(prompt.n, prompt.n),
    )  # fmt: skip
    q, k, v = prompt.heads_first
    attention = compiled_flex_attention()
    return lambda: attention(q, k, v, block_mask=mask, scale=prompt.scale, enable_gqa=True)
