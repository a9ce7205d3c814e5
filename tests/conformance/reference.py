"""What a sparse run must equal: dense attention, by one softmax over an explicit mask, with the blocks that the run recorded.

Nothing of accel's host or kernels runs here; a plan's `block_mask` is the only thing taken over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from accel.handle import Handle

NAME = "conformance_reference"
N_NEW = 5

# Plans by (layer, queries, keys), in the order of the calls.
Plans = dict[tuple[int, int, int], list[tuple[Any, Any]]]

_plans: Plans = {}


@dataclass(frozen=True)
class Run:
    """A forward pass and a greedy generation. logits: (B, L, V); tokens: (B, L + N_NEW); scores: (B, N_NEW, V)."""

    logits: Tensor
    tokens: Tensor
    scores: Tensor


@torch.no_grad()
def run(model: Any, inputs: Mapping[str, Tensor], **how: Any) -> Run:
    """Forward and generate, twice the same prompt; `how` goes to `generate`."""
    logits = model(**inputs).logits
    out = model.generate(
        **inputs, **{"max_new_tokens": N_NEW, "do_sample": False, "output_logits": True, "return_dict_in_generate": True, **how}
    )
    return Run(logits, out.sequences, torch.stack(out.logits, 1))


@contextmanager
def recorded(handle: Handle) -> Iterator[Plans]:
    """The plans of every sparse call made inside."""
    plans: Plans = defaultdict(list)

    def note(*, step: Any, plan: Any, lens: Any) -> None:
        plans[step.layer, step.q_len, step.kv_len].append((plan, lens))

    with handle.observe(note):
        yield plans


@contextmanager
def reference(model: PreTrainedModel, plans: Plans) -> Iterator[None]:
    """Runs `model`, which must not be patched, with explicit masks; every plan must be used up in the end."""
    before = {id(config): (config, config._attn_implementation) for config in _text_configs(model)}
    _plans.clear()
    _plans.update({key: list(calls) for key, calls in plans.items()})
    for config, _ in before.values():
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        for config, implementation in before.values():
            config._attn_implementation_internal = implementation
    left = {key: len(calls) for key, calls in _plans.items() if calls}
    assert not left, f"the reference made fewer calls than the sparse run; left by (layer, queries, keys): {left}"


def _text_configs(model: PreTrainedModel) -> list[Any]:
    decoder = model.get_decoder()
    return [m.config for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """(B, L, Hq, D) from query (B, Hq, L, D), key and value (B, Hkv, N, D), attention_mask (B or 1, 1, L, N) bool."""
    batch, heads, length, dim = query.shape
    key, value = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (key, value))
    allowed = attention_mask.expand(batch, heads, -1, -1).clone()
    calls = _plans.get((module.layer_idx, length, key.shape[2]))
    if calls:
        plan, lens = calls.pop(0)
        for rows in lens.rows():
            if rows.q_len:
                _restrict(allowed[rows.index], plan, rows, length)
    scores = query @ key.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # a padding row sees nothing; whatever it becomes, nobody looks
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return (probs @ value).transpose(1, 2).contiguous(), None


def _restrict(allowed: Tensor, plan: Any, rows: Any, length: int) -> None:
    """Takes the keys outside the plan's blocks from the rows of one sequence. allowed: (Hq, L, N) bool, changed in place."""
    first_row = rows.q_start - rows.index * length
    own = allowed[:, first_row : first_row + rows.q_len]
    # the last row of a sequence sees all of its keys: the first of them is where the block grid begins
    first_key = int(own[0, -1].to(torch.int8).argmax())
    assert int(own[0, -1].sum()) == rows.kv_len
    tiles = plan.block_mask(rows).to(own.device)
    position, key = (torch.arange(n, device=own.device) for n in (rows.q_len, rows.kv_len))
    block = (position + rows.offset) // plan.block_size - rows.first_block(plan.block_size)
    own[:, :, first_key : first_key + rows.kv_len] &= tiles[:, block][:, :, key // plan.block_size]


def _mask(*, q_offset: int | Tensor = 0, **arguments: Any) -> Tensor:
    """The library's own boolean mask, written out even where it is plain causal."""
    return sdpa_mask(q_offset=q_offset, **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def deviation(got: Run, want: Run) -> float:
    """Largest difference of logits and scores, as a share of the largest logit."""
    scale = want.logits.abs().max()
    return float(max((got.logits - want.logits).abs().max(), (got.scores - want.scores).abs().max()) / scale)


# Rounding alone: the plain model under sdpa differs from the same model under one explicit softmax by up to 2.1e-6 of the largest logit,
# over all families; spec §0's 3e-7 was measured on models whose weights are ten times smaller.
ROUNDING = 5e-6


def assert_same(got: Run, want: Run, *, atol: float = ROUNDING) -> None:
    """Logits and scores within rounding, greedy tokens equal."""
    off = deviation(got, want)
    # written as `<=`, never as `not >`: a NaN must fail
    assert off <= atol, f"logits differ by {off:.1e} of the largest"
    assert torch.equal(got.tokens, want.tokens)


def assert_bit_equal(got: Run, want: Run) -> None:
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got.scores, want.scores)
    assert torch.equal(got.tokens, want.tokens)
