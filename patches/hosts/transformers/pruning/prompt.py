"""One prompt's visual tokens: which picture belongs to which sequence, what was seen of it, and what each pruning stage leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError, UnsupportedError
from accel.handle import Handle
from accel.patches.hosts.transformers.pruning.vision import Modality, Picture
from accel.protocols import Keep, Merge, PruningContext, Stage, TokenPruning, Unit
from accel.stats import PruningEvent

FRONT = 0       # stages behind the encoder or the projector act on what decoder layer 0 is given


@dataclass(frozen=True)
class Seen:
    """A picture that the encoder has read. maps: by (method number, observation), (tokens,) fp32. features: (tokens, D), on the model's device."""

    picture: Picture
    maps: dict[tuple[int, str], Tensor]
    features: Tensor


@dataclass(frozen=True)
class Asked:
    """One stage of one method. layer: in front of which decoder layer it acts."""

    number: int
    method: TokenPruning
    stage: Stage

    @property
    def layer(self) -> int:
        return FRONT if self.stage.layer is None else self.stage.layer

    @property
    def is_ahead(self) -> bool:
        return self.stage.layer is None or self.stage.is_known_ahead


def ordered_stages(methods: Sequence[TokenPruning], stages: Callable[[TokenPruning], Sequence[Stage]]) -> list[Asked]:
    """All stages in the order in which tokens meet them."""
    rank = {"encoder": 0, "projector": 1, "layer": 2}
    asked = [Asked(i, method, stage) for i, method in enumerate(methods) for stage in stages(method)]
    return sorted(asked, key=lambda a: (rank[a.stage.boundary], a.layer))


@dataclass
class VisualTokens:
    """The visual tokens of a batch of sequences, (B, V) in prompt order, False or −1 behind shorter sequences. Everything on the CPU.

    column: places in the whole prompt.
    """

    units: list[Unit]
    column: Tensor
    unit: Tensor
    place: Tensor
    is_visual: Tensor
    is_structural: Tensor
    seen: list[list[Seen]]          # by sequence, in prompt order

    @property
    def exists(self) -> Tensor:
        return self.is_visual | self.is_structural

    def observed(self, number: int, what: str) -> Tensor:
        """(U, n) fp32: a map of each unit's patch tokens."""
        rows = []
        for seen in (s for row in self.seen for s in row):
            values, picture = seen.maps[number, what], seen.picture
            rows += [values[(picture.unit == u) & ~picture.is_structural] for u in range(len(picture.units))]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def features(self) -> Tensor:
        """(B, V, D): what the encoder and projector gave."""
        rows = [torch.cat([s.features for s in row]) if row else None for row in self.seen]
        known = next(row for row in rows if row is not None)
        return torch.nn.utils.rnn.pad_sequence([known[:0] if row is None else row for row in rows], batch_first=True)


def visual_tokens(ids: Tensor, token_ids: dict[Modality, int], pictures: dict[Modality, list[Seen]]) -> VisualTokens:
    """Finds the sequence of every picture. ids: (R, S) on the CPU, the whole prompt; R may be a multiple of the sequences encoded (beams).

    Raises AccelError where placeholders and features do not match, naming both.
    """
    rows: list[list[tuple[Tensor, Seen]]] = [[] for _ in ids]
    for modality, seen in pictures.items():
        is_token = ids == token_ids[modality]
        for b, found in enumerate(_shared_out(is_token.sum(1).tolist(), seen, modality)):
            columns = is_token[b].nonzero().flatten()
            rows[b] += zip(torch.split(columns, [len(s.picture) for s in found]), found, strict=True)
    units: list[Unit] = []
    parts: dict[str, list[Tensor]] = {name: [] for name in ("column", "unit", "place", "visual", "structural")}
    for b, row in enumerate(rows):
        row.sort(key=lambda pair: int(pair[0][0]))
        own: dict[str, list[Tensor]] = {name: [] for name in parts}
        n_maps = 0
        for number, (columns, s) in enumerate(row):
            picture = s.picture
            own["column"].append(columns)
            own["unit"].append(picture.unit + len(units))
            own["place"].append(picture.place + torch.tensor([n_maps, 0, 0], device="cpu"))
            own["visual"].append(~picture.is_structural)
            own["structural"].append(picture.is_structural)
            units += [replace(u, sequence=b, picture=number) for u in picture.units]
            n_maps += int(picture.place[:, 0].max()) + 1
        order = torch.cat(own["column"]).argsort() if row else None
        for name in parts:
            empty = torch.zeros((0, 3) if name == "place" else 0, dtype=torch.bool if name in ("visual", "structural") else torch.int64, device="cpu")
            parts[name].append(torch.cat(own[name])[order] if row else empty)
        if order is not None and not torch.equal(order, torch.arange(len(order), device="cpu")):
            raise AccelError("the tokens of two pictures lie inside each other: accel cannot tell which token belongs to which")

    def pad(name: str, value: Any) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts[name], batch_first=True, padding_value=value)

    return VisualTokens(
        units, pad("column", -1), pad("unit", -1), pad("place", -1), pad("visual", False), pad("structural", False), [[s for _, s in r] for r in rows]
    )


def _shared_out(n_tokens: list[int], pictures: list[Seen], modality: Modality) -> list[list[Seen]]:
    """The pictures of each sequence: each takes the next ones until its placeholders are used up; copies of a sequence share theirs."""
    total, have = sum(n_tokens), sum(len(s.picture) for s in pictures)
    copies = total // have if have and total % have == 0 else 0
    message = f"the prompts hold {total} {modality} placeholders in {len(n_tokens)} sequences, but {len(pictures)} {modality}s give {have} tokens"
    if copies < 1 or len(n_tokens) % copies:
        raise AccelError(message)
    waiting = list(pictures)
    found: list[list[Seen]] = []
    for first in range(0, len(n_tokens), copies):
        own: list[Seen] = []
        while sum(len(s.picture) for s in own) < n_tokens[first] and waiting:
            own.append(waiting.pop(0))
        if any(n != sum(len(s.picture) for s in own) for n in n_tokens[first : first + copies]):
            raise AccelError(f"{message}; sequence {first} has {n_tokens[first]}, which no whole number of them gives")
        found += [own] * copies
    return found


@dataclass
class Cut:
    """What is left in front of one decoder layer. alive: (B, V) bool. asked: a stage that must see hidden states first, and is still to be asked."""

    layer: int
    alive: Tensor | None
    asked: Asked | None = None


@dataclass
class Prompt:
    """The pruning of one prompt, from the encoder to the last layer of its last chunk.

    start: tokens that a cache held before it; done: columns that passes have brought. n_columns: of the whole prompt, those of `start` included, and
    n_asked of them without the candidates of assisted decoding. features: (B, V, D), what reaches the language model, merged rows in their anchors'
    places; only where a method saw or merged them.
    """

    tokens: VisualTokens
    ids: Tensor
    start: int
    n_copies: int
    n_asked: int
    done: int = 0
    is_counted: bool = True     # whether its tokens count in the statistics
    cuts: list[Cut] = field(default_factory=list)
    features: Tensor | None = None
    merges: list[Merge] = field(default_factory=list)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)     # by method, (B, V) fp32

    @property
    def n_columns(self) -> int:
        return self.ids.shape[1]

    @property
    def is_anchor(self) -> Tensor:
        """(B, V) bool: tokens into which others were merged."""
        found = torch.zeros_like(self.tokens.exists)
        for merge in self.merges:
            rows, entries = (merge.weight > 0).nonzero(as_tuple=True)
            found[rows.cpu(), merge.anchor[rows, entries].cpu()] = True
        return found

    def front(self) -> Tensor:
        """(B, V) bool: what reaches the language model."""
        found = self.tokens.exists
        for cut in self.cuts:
            if cut.layer == FRONT and cut.alive is not None:
                found = cut.alive
        return found

    def ordinal(self, first: int, n: int) -> Tensor:
        """(B, n) int64: which visual token stands in columns `first` … `first + n − 1`, −1 for text."""
        found = torch.full(self.ids.shape, -1, device="cpu")
        rows, ordinals = self.tokens.exists.nonzero(as_tuple=True)
        found[rows, self.tokens.column[rows, ordinals]] = ordinals
        return found[:, first : first + n]


def plan_ahead(prompt: Prompt, stages: Sequence[Asked], handle: Handle) -> None:
    """Asks every stage that can be asked before the language model runs, and notes where the others will be."""
    alive = prompt.tokens.exists
    is_ahead = True
    for asked in stages:
        is_ahead = is_ahead and asked.is_ahead
        if not is_ahead:
            prompt.cuts.append(Cut(asked.layer, None, asked))
            continue
        ctx = _context_ahead(prompt, asked, alive)
        keep = asked.method.select(ctx)
        if keep is None:
            continue
        alive = kept_tokens(keep, alive)
        remember_scores(prompt, asked, keep)
        if keep.merge is not None:
            if asked.stage.layer is not None:
                raise UnsupportedError(f"{asked.method.method_name()} merges tokens at a stage inside the language model that is asked ahead of it")
            prompt.features = merged_rows(ctx.features, keep.merge)
            prompt.merges.append(keep.merge)
        if keep.hidden is not None:
            raise UnsupportedError(f"{asked.method.method_name()} hides tokens at a stage that is asked ahead of the language model")
        prompt.cuts.append(Cut(asked.layer, alive))
        report(prompt, asked, alive, keep.merge, handle)


def _context_ahead(prompt: Prompt, asked: Asked, alive: Tensor) -> PruningContext:
    tokens, method = prompt.tokens, asked.method
    is_front = asked.stage.layer is None
    if is_front and prompt.features is None:
        prompt.features = tokens.features()
    features = prompt.features if is_front and prompt.features is not None else torch.zeros(*alive.shape, 0, dtype=torch.float32, device="cpu")
    device = features.device
    return PruningContext(
        stage=asked.stage, units=tokens.units, features=features,
        is_visual=(tokens.is_visual & alive).to(device), is_structural=(tokens.is_structural & alive).to(device),
        is_text=torch.zeros_like(alive).to(device), unit=tokens.unit.to(device), place=tokens.place.to(device),
        observed={o.what: tokens.observed(asked.number, o.what).to(device) for o in method.observe() if o.what != "last_row"},
        state=prompt.states.setdefault(asked.number, {}), scores=_on(prompt.scores.get(asked.number), device), position_ids=None,
    )  # fmt: skip


def _on(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device)


def kept_tokens(keep: Keep, alive: Tensor) -> Tensor:
    """(B, V) bool on the CPU: those of `alive` that the answer lists."""
    index, ok = keep.index.cpu(), keep.ok.cpu()
    found = torch.zeros_like(alive)
    rows = torch.arange(len(alive), device="cpu")[:, None].expand_as(index)
    found[rows[ok], index[ok]] = True
    if bool((found & ~alive).any()):
        raise AccelError("a pruning method kept a token that an earlier stage had dropped")
    return found


def remember_scores(prompt: Prompt, asked: Asked, keep: Keep) -> None:
    """Keeps what a stage ranked by for the later stages of its method. `keep` lists visual tokens."""
    if keep.scores is None:
        return
    scores = torch.zeros(prompt.tokens.exists.shape, dtype=torch.float32, device="cpu")
    index, ok = keep.index.cpu(), keep.ok.cpu()
    rows = torch.arange(len(index), device="cpu")[:, None].expand_as(index)
    scores[rows[ok], index[ok]] = keep.scores.float().cpu()[ok]
    prompt.scores[asked.number] = scores


def merged_rows(rows: Tensor, merge: Merge) -> Tensor:
    """(B, n, D) with the anchors' rows replaced by their sources' weighted sums, added up in fp32."""
    b, entries = (merge.weight > 0).nonzero(as_tuple=True)
    anchor, source, weight = (t[b, entries].to(rows.device) for t in (merge.anchor, merge.source, merge.weight))
    b = b.to(rows.device)
    slot, which = torch.unique(b * rows.shape[1] + anchor, return_inverse=True)
    sums = torch.zeros(len(slot), rows.shape[2], dtype=torch.float32, device=rows.device)
    sums.index_add_(0, which, weight[:, None].float() * rows[b, source].float())
    found = rows.clone()
    found[slot // rows.shape[1], slot % rows.shape[1]] = sums.to(rows.dtype)
    return found


def report(prompt: Prompt, asked: Asked, alive: Tensor, merge: Merge | None, handle: Handle) -> None:
    """Tells the observers what a stage left."""

    def event() -> PruningEvent:
        anchor = torch.full(alive.shape, -1, device="cpu")
        if merge is not None:
            rows, entries = (merge.weight > 0).nonzero(as_tuple=True)
            anchor[rows.cpu(), merge.source[rows, entries].cpu()] = merge.anchor[rows, entries].cpu()
        tokens = prompt.tokens
        return PruningEvent(
            asked.method.method_name(), asked.stage, tokens.units, tokens.unit, tokens.place, tokens.is_structural, alive.clone(),
            anchor, prompt.scores.get(asked.number),
        )  # fmt: skip

    handle.notify_pruning(event)
