"""Runs of models with a compressed cache, and what they must equal: the whole cache, with what was dropped hidden from each head.

Nothing of accel's host computes the reference: plain modules, the library's own boolean masks, and per pass, layer and KV head the set of columns
that the compressed run still held, read from the positions in its cache layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import conformance.vision_families  # noqa: F401 - adds its rows to FAMILIES
import torch
from conformance.families import FAMILIES
from conformance.reference import ROUNDING, Run
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from accel.patches.hosts.entries import Entries
from accel.patches.hosts.transformers.kv.layer import CompressedLayer
from accel.protocols import CompressionContext, HeadGroup, KVCompression, ModelInfo, Retain, When
from accel.registry import method_class, method_names

NAME = "conformance_kept"
# transformers 5.24 renamed the argument
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"

# By option name, for whichever method has the option: budgets that a hundred tokens exceed, and evictions every few steps.
SMALL: dict[str, Any] = {"keep": 0.3, "min_entries": 4, "every": 2, "window": 8, "sinks": 2, "n_queries": 8}

# Columns that a layer still holds, (B, Hkv, columns so far) bool, by layer; layers that are whole are left out.
Kept = dict[int, Tensor]


def small(name: str, **changes: Any) -> KVCompression:
    """A registered method with options that make it drop entries of tiny prompts."""
    cls = method_class(name)
    known = inspect.signature(cls).parameters
    method = cls(**{option: value for option, value in {**SMALL, **changes}.items() if option in known})
    assert isinstance(method, KVCompression)
    return method


def decoder_methods() -> list[str]:
    """The registered cache methods that work on decoders."""
    info = ModelInfo("llama", 2, 4, 2, 16, ("full_attention",) * 2, "cpu", "float32")
    found = [name for name in method_names() if issubclass(method_class(name), KVCompression)]
    return [name for name in found if not method_class(name)().supports(info, "transformers", [])]


METHODS = decoder_methods()
# families in which no layer may lose entries, with a part of the reason
WHOLE = {
    "mistral sliding": "sliding window",
    "gpt oss": "s_aux",
    "deepseek v3, narrow values": "value head size",
    "paligemma": "attention is not causal",
}
COMPRESSED = [name for name in FAMILIES if name not in WHOLE]


@dataclass(frozen=True, kw_only=True)
class Uneven(KVCompression):
    """Keeps entries drawn by seed: of every second KV head `few`, of the others `many`. No two heads, rows or layers keep the same ones.

    every: decoding steps between two evictions.
    """

    few: int = 20
    many: int = 45
    every: int = 2
    seed: int = 0

    @property
    def when(self) -> tuple[When, ...]:
        return When("after_prefill"), When("every_n_steps", self.every)

    def groups(self, model: ModelInfo, layer: int, *, step: int, n_entries: int, shared: Mapping[str, Any] | None = None) -> list[HeadGroup]:
        heads = range(model.n_kv_heads)
        found = [HeadGroup(tuple(heads[layer % 2 :: 2]), self.few, "few"), HeadGroup(tuple(heads[1 - layer % 2 :: 2]), self.many, "many")]
        return [group for group in found if group.heads]

    def select(self, ctx: CompressionContext, group: HeadGroup) -> Retain:
        generator = torch.Generator().manual_seed(self.seed + 100 * ctx.layer + ctx.step)
        rank = torch.rand(ctx.valid.shape, generator=generator).masked_fill(~ctx.valid, -1.0)
        # a row that holds fewer keeps them all: padding comes last
        index = rank.argsort(-1, descending=True)[..., : group.budget].sort(-1).values
        # padding that is in the answer is said to be there, or was never valid
        return Retain(index, ok=ctx.valid.gather(2, index) if ctx.step % 2 else None)


def groups_of(cache: Any, number: int) -> list[Entries]:
    """What the groups of a layer hold that has lost entries."""
    layer = cache.layers[number]
    assert isinstance(layer, CompressedLayer)
    assert layer.is_compressed
    return layer.groups


def visual_tokens(model: Any, ids: Tensor) -> Tensor:
    """(B, L) bool: which tokens of a prompt are placeholders of pictures."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    return torch.isin(ids, torch.tensor([token for name in names if isinstance(token := getattr(model.config, name, None), int)]))


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    found = kwargs.get("cache")
    return kwargs.get("past_key_values") if found is None else found


def kept_of(cache: Any) -> Kept:
    """What the layers of a cache hold, by column."""
    found = {}
    for number, layer in enumerate(getattr(cache, "layers", [])):
        if not isinstance(layer, CompressedLayer) or not layer.groups:
            continue
        n_heads = sum(map(len, layer.heads))
        kept = torch.zeros(len(layer.groups[0].k), n_heads, layer.get_seq_length(), dtype=torch.bool)
        for heads, entries in zip(layer.heads, layer.groups, strict=True):
            position, valid = entries.positions(), entries.validity()
            for i, head in enumerate(heads):
                for row in range(len(kept)):
                    places = position[row, i][valid[row, i]]
                    assert len(places.unique()) == len(places), "an entry is held twice"
                    assert bool((places.diff() > 0).all()), "entries are out of order"
                    kept[row, head, places] = True
        found[number] = kept
    return found


@contextmanager
def recorded(model: Any) -> Iterator[list[Kept]]:
    """What the cache held before each pass made inside."""
    passes: list[Kept] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        passes.append(kept_of(cache_in(kwargs)))

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield passes
    finally:
        hook.remove()


_now: Kept = {}


@contextmanager
def showing(model: PreTrainedModel, passes: Sequence[Kept]) -> Iterator[None]:
    """Runs `model`, which must not be patched, with each pass seeing what the recorded one held. All of them must be used up."""
    decoder = model.get_decoder()
    layers = [m for m in decoder.modules() if isinstance(getattr(m, "layer_idx", None), int) and hasattr(m, "config")]
    configs = {id(m.config): (m.config, m.config._attn_implementation) for m in layers}
    left = list(passes)

    def begin(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        _now.clear()
        _now.update(left.pop(0))

    hook = decoder.register_forward_pre_hook(begin, with_kwargs=True)
    for config, _ in configs.values():
        config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        hook.remove()
        for config, before in configs.values():
            config._attn_implementation_internal = before
    assert not left, f"{len(left)} passes fewer than the compressed run made"


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, softcap: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    batch, heads, length, dim = query.shape
    each = heads // key.shape[1]
    key, value = (t.repeat_interleave(each, dim=1) for t in (key, value))
    allowed = attention_mask.expand(batch, heads, length, -1)[..., : key.shape[2]].clone()
    kept = _now.get(module.layer_idx)
    if kept is not None:
        past = key.shape[2] - length
        assert kept.shape == (batch, heads // each, past)
        allowed[..., :past] &= kept.repeat_interleave(each, dim=1)[:, :, None]
    scores = query @ key.transpose(2, 3) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probs = scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0)
    return (probs @ value).transpose(1, 2).contiguous(), None


def _mask(*, q_offset: int | Tensor = 0, **arguments: Any) -> Tensor:
    return sdpa_mask(q_offset=q_offset, **{**arguments, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def assert_equals_hiding(got: Run, want: Run, mask: Tensor | None = None) -> None:
    """Logits of real tokens, scores and greedy tokens equal within rounding."""
    scale = want.logits.abs().max()
    rows = slice(None) if mask is None else mask.bool()
    off = float(max((got.logits - want.logits)[rows].abs().max(), (got.scores - want.scores).abs().max()) / scale)
    assert off <= ROUNDING, f"logits differ by {off:.1e} of the largest"
    assert torch.equal(got.tokens, want.tokens)
