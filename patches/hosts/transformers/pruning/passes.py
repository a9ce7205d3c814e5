"""One forward pass of a decoder from which tokens are dropped: which columns reach the present layer, and asking the stages that look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from accel.errors import UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.transformers.pruning.cache import Survivors
from accel.patches.hosts.transformers.pruning.prompt import Asked, Cut, Prompt, kept_tokens, merged_rows, remember_scores, report
from accel.protocols import Keep, PruningContext


@dataclass
class Pass:
    """One forward pass of the decoder in which tokens are dropped.

    stays: (B, q) bool, columns of this pass that stay whatever a method says (text without the padding in front). is_real: (B, q) bool, no padding.
    ordinal: (B, q) int64, the visual token in each column, −1 for text. index: (B, m) int64, the columns that reach the present layer, −1 for
    holes; None while all do.
    hidden: (B, q) bool, columns that nobody may see any more.
    """

    prompt: Prompt
    past: int
    length: int
    stays: Tensor
    is_real: Tensor
    ordinal: Tensor
    newest: Tensor
    cuts: list[Cut]
    index: Tensor | None = None
    has_holes: bool = False
    survivors: Survivors | None = None
    hidden: Tensor | None = None
    n_cuts: int = 0
    observed: dict[int, Tensor] = field(default_factory=dict)
    gathered: dict[tuple[int, int], Any] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        return self.past + self.length == self.prompt.n_columns

    @property
    def is_whole(self) -> bool:
        return self.is_last and self.past == self.prompt.start


def begin_pass(prompt: Prompt, past: int, length: int, padding: Tensor | None) -> Pass:
    """The pass over columns `past` … `past + length − 1` of the prompt, before anything is dropped. padding: (B, past + length), 0 for padding."""
    ordinal = prompt.ordinal(past, length)
    stays = ordinal < 0
    is_real = torch.ones_like(stays)
    if padding is not None:
        # padding in front is left out altogether, padding behind keeps its place
        whole = padding[:, : past + length].bool().cpu().expand(len(stays), -1)
        stays = stays & (whole.cumsum(1) > 0)[:, past:]
        is_real = whole[:, past:].clone()
    is_real[:, max(0, prompt.n_asked - past) :] = False
    newest = (is_real * torch.arange(1, length + 1, device="cpu")).amax(1) - 1
    found = Pass(prompt, past, length, stays, is_real, ordinal, newest.clamp_min(0), list(prompt.cuts))
    if found.is_last:
        # whatever a method says: the answer begins behind the last token
        found.stays[torch.arange(len(newest), device="cpu"), found.newest] = True
        found.stays[:, -1] = True
    return found


# --- dropping -----------------------------------------------------------------------------------------------------------------


def drop(running: Pass, cut: Cut, hidden: Tensor, kwargs: dict[str, Any], handle: Handle) -> Tensor:
    """The hidden states (B, m, D) that are left, and `running` brought up to date."""
    running.n_cuts += 1
    alive = cut.alive
    if cut.asked is not None:
        alive, hidden = _ask(running, cut.asked, hidden, kwargs, handle)
        if alive is None:
            return hidden
    assert alive is not None
    is_left = running.stays | (running.ordinal >= 0) & alive.gather(1, running.ordinal.clamp_min(0))
    if running.index is not None:
        was_left = torch.zeros_like(is_left)
        rows, places = (running.index >= 0).nonzero(as_tuple=True)
        was_left[rows, running.index[rows, places]] = True
        is_left &= was_left
    count = is_left.sum(1)
    # of a chunk of nothing but dropped tokens a hole is left: layers cannot be given nothing
    most = max(1, int(count.max()))
    # stable: the columns that are left come last, in order
    index = is_left.long().argsort(dim=1, stable=True)[:, is_left.shape[1] - most :]
    is_hole = torch.arange(most, device="cpu") < (most - count)[:, None]
    taken = _places(index, running.index, running.length)
    running.index = index.masked_fill(is_hole, -1)
    device = hidden.device
    hidden = hidden.gather(1, taken.to(device)[..., None].expand(-1, -1, hidden.shape[-1]))
    running.observed = {number: row.gather(1, taken.to(row.device)) for number, row in running.observed.items()}
    numbers = (index + running.past).masked_fill(is_hole, -1)
    if running.hidden is not None:
        numbers = numbers.masked_fill(running.hidden.gather(1, index), -1)
    running.survivors = Survivors(numbers.to(device), running.length, has_holes=bool((numbers < 0).any()))
    return hidden


def _ask(running: Pass, asked: Asked, hidden: Tensor, kwargs: dict[str, Any], handle: Handle) -> tuple[Tensor | None, Tensor]:
    """Asks a stage that looks at hidden states; what it leaves (B, V), and the hidden states with merged rows. None where it keeps all."""
    prompt, tokens = running.prompt, running.prompt.tokens
    index = torch.arange(running.length, device="cpu").expand(len(running.stays), -1) if running.index is None else running.index
    exists = index >= 0
    ordinal = running.ordinal.gather(1, index.clamp_min(0)).masked_fill(~exists, -1)
    is_token = ordinal >= 0
    at = ordinal.clamp_min(0)
    device = hidden.device
    if tokens.exists.shape[1] == 0 or not is_token.any():
        return None, hidden

    def of(t: Tensor, nothing: Any) -> Tensor:
        found = t.gather(1, at if t.dim() == 2 else at[..., None].expand(-1, -1, t.shape[-1]))
        return found.masked_fill(~(is_token if t.dim() == 2 else is_token[..., None]), nothing).to(device)

    scores = prompt.scores.get(asked.number)
    observed: dict[str, Tensor] = {o.what: tokens.observed(asked.number, o.what).to(device) for o in asked.method.observe() if o.what != "last_row"}
    if asked.number in running.observed:
        observed["last_row"] = running.observed[asked.number].to(device)
    text = exists & ~is_token & (running.stays & running.is_real).gather(1, index.clamp_min(0))
    positions = kwargs.get("position_ids")
    ctx = PruningContext(
        stage=asked.stage, units=tokens.units, features=hidden, is_visual=of(tokens.is_visual, False), is_structural=of(tokens.is_structural, False),
        is_text=text.to(device), unit=of(tokens.unit, -1), place=of(tokens.place, -1), observed=observed,
        state=prompt.states.setdefault(asked.number, {}), scores=None if scores is None else of(scores, 0.0),
        position_ids=None if positions is None else share_of(positions, index.clamp_min(0).to(device), is_table=False),
    )  # fmt: skip
    keep = asked.method.select(ctx)
    if keep is None:
        return None, hidden
    hidden = hidden if keep.merge is None else merged_rows(hidden, keep.merge)
    return _answered(running, asked, keep, ordinal, index, handle), hidden


def _answered(running: Pass, asked: Asked, keep: Keep, ordinal: Tensor, index: Tensor, handle: Handle) -> Tensor:
    """(B, V) bool from an answer in terms of the present tokens; remembers scores and hidden columns."""
    prompt = running.prompt
    exists = prompt.tokens.exists
    kept = keep.index.cpu()
    as_visual = Keep(ordinal.gather(1, kept).clamp_min(0), keep.ok.cpu() & (ordinal.gather(1, kept) >= 0), scores=keep.scores)
    alive = kept_tokens(as_visual, exists)
    in_sight = alive
    remember_scores(prompt, asked, as_visual)
    if keep.hidden is not None:
        hidden = torch.zeros(running.stays.shape, dtype=torch.bool, device="cpu") if running.hidden is None else running.hidden
        rows, places = keep.hidden.cpu().nonzero(as_tuple=True)
        hidden[rows, index[rows, places].clamp_min(0)] = True
        running.hidden = hidden
        rows, columns = (running.ordinal >= 0).nonzero(as_tuple=True)
        in_sight = alive.clone()
        in_sight[rows, running.ordinal[rows, columns]] &= ~hidden[rows, columns]
    prompt.cuts = [Cut(c.layer, alive) if c.asked is asked else c for c in prompt.cuts]
    report(prompt, asked, in_sight, None, handle)
    return alive


def _places(index: Tensor, before: Tensor | None, length: int) -> Tensor:
    """Where the columns `index` (B, m) stand among the columns `before` (B, m'), holes anywhere."""
    if before is None:
        return index
    at = torch.zeros(len(index), length, dtype=torch.int64, device="cpu")
    rows, places = (before >= 0).nonzero(as_tuple=True)
    at[rows, before[rows, places]] = places
    return at.gather(1, index)


def share_of(value: Any, local: Tensor, *, is_table: bool) -> Any:
    """The entries `local` (B, m) of rotary tables (…, B or 1, L, D), or of positions (…, B or 1, L)."""
    if isinstance(value, (tuple, list)):
        return tuple(share_of(v, local, is_table=is_table) for v in value)
    if isinstance(value, dict):
        return {name: share_of(v, local, is_table=is_table) for name, v in value.items()}
    index = local.to(value.device)
    if is_table:
        value = value.expand(*value.shape[:-3], len(index), *value.shape[-2:])
        return value.gather(-2, index[..., None].expand(*value.shape[:-2], index.shape[1], value.shape[-1]))
    value = value.expand(*value.shape[:-2], len(index), value.shape[-1])
    return value.gather(-1, index.expand(*value.shape[:-1], index.shape[1]))


# --- recycled rows -------------------------------------------------------------------------------------------------------------


def with_merged(running: Pass, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with recycled rows in their anchors' places."""
    prompt = running.prompt
    if not prompt.merges:
        return kwargs
    assert prompt.features is not None      # the merges changed them
    b, column = (running.ordinal >= 0).nonzero(as_tuple=True)
    ordinal = running.ordinal[b, column]
    is_anchor = prompt.is_anchor[b, ordinal]
    b, column, ordinal = b[is_anchor], column[is_anchor], ordinal[is_anchor]
    embeds = kwargs["inputs_embeds"].clone()
    device = prompt.features.device
    vectors = prompt.features[b.to(device), ordinal.to(device)]
    embeds[b.to(embeds.device), column.to(embeds.device)] = vectors.to(embeds)
    kwargs = {**kwargs, "inputs_embeds": embeds}
    if kwargs.get("deepstack_visual_embeds") is not None:
        kwargs["deepstack_visual_embeds"] = _merged_levels(running, kwargs["deepstack_visual_embeds"])
    return kwargs


def _merged_levels(running: Pass, levels: Sequence[Tensor]) -> list[Tensor]:
    """Deepstack features with the same rows merged; each (visual tokens of the batch, D), sequence by sequence."""
    if not running.is_whole:
        raise UnsupportedError("recycled tokens and deepstack features need the prompt in one piece (no prefill_chunk_size)")
    exists = running.prompt.tokens.exists
    found = []
    for level in levels:
        whole = level.new_zeros(*exists.shape, level.shape[-1])
        whole[exists.to(level.device)] = level
        for merge in running.prompt.merges:
            whole = merged_rows(whole, merge)
        found.append(whole[exists.to(level.device)])
    return found
