"""Trains the routers of DyVTE from a table of a frozen model, and calibrates the share above which they mean exit (visual-token-pruning.md §3.6)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from accel.errors import OptionError, UnsupportedError
from accel.evals.models import LoadedModel
from accel.evals.pictures.questions import vision_model
from accel.patches._dyvte_table import Table, make_table, questions
from accel.patches._routers import EXIT, KEEP, Router, RouterHeader, save_routers
from accel.patches.dyvte import DyVTE
from accel.patching import host_for
from accel.protocols import Calibration
from accel.recipe import Recipe
from accel.tune.search import progress_bar

# shares tried as threshold; at 1 no router ever fires
THRESHOLDS = (*(i / 100 for i in range(1, 100)), 0.995, 0.999, 0.9999, 1.0)


@dataclass(frozen=True)
class RouterTraining:
    """How routers are trained. n_questions: None for all of a file, or 3000 scenes.

    router_hidden: None for 256, or half of the model's width where that is less; the published routers have 2048. held_out: share of the questions
    that stops the training early and calibrates. patience: epochs without a better router of any layer. target_agreement: share of the held-out
    questions whose answer must stay the same.
    label_scale, label_slack: how much the loss of an answer may grow, as a factor and in nats, for an exit to count as harmless. The published rule
    has a factor alone, and no slack but what a loss of 0 needs. Where a model is nearly certain of its answers, a share of nearly nothing forbids
    exits that change nothing: 0.01 is a hundredth of the answer's probability.
    """

    n_questions: int | None = None
    router_hidden: int | None = None
    learning_rate: float = 1e-3
    batch: int = 128
    max_epochs: int = 200
    patience: int = 20
    held_out: float = 0.1
    label_scale: float = 1.03
    label_slack: float = 1e-6
    target_agreement: float = 0.99


@dataclass
class Trained:
    """Routers of every candidate layer, in one tensor each. w1: (layers, hidden, 2D); w2: (layers, 2, hidden). epoch: (layers,), the best one."""

    w1: Tensor
    w2: Tensor
    epoch: Tensor

    def logits(self, feature: Tensor) -> Tensor:
        """(n, layers, 2D) -> (n, layers, 2)."""
        return torch.einsum("nlh,lkh->nlk", functional.gelu(torch.einsum("nld,lhd->nlh", feature, self.w1)), self.w2)

    def router(self, number: int) -> Router:
        return Router(self.w1[number].detach().cpu(), self.w2[number].detach().cpu())


def train_routers(
    loaded: LoadedModel, data: Any, folder: Path, *, fixed: Mapping[str, Any] | None = None, seed: int = 0, show_progress: bool = True,
    training: RouterTraining | None = None,
) -> DyVTE:  # fmt: skip
    """DyVTE with routers for this model; leaves `table/`, `routers.safetensors`, `routers.json` and `recipe.yaml` in `folder`.

    data: "scenes", or a .jsonl file of image, text and answer. fixed: options of the result; `candidate_layers` says where routers are trained,
    every second layer from a quarter of the depth on if it is not given; with `threshold` nothing is calibrated.
    """
    fixed, training = dict(fixed or {}), training or RouterTraining()
    if wrong := [name for name in ("exit_layer", "routers") if fixed.get(name) is not None]:
        raise OptionError(f"dyvte: training makes the routers; leave out {', '.join(wrong)}")
    vision = vision_model(loaded)
    info = host_for(vision.model).describe(vision.model)
    # the transformers host tells both of every model
    assert info.fingerprint is not None
    assert info.hidden_size is not None
    layers = tuple(fixed.get("candidate_layers") or range(info.n_layers // 4, info.n_layers - 1, 2))
    if not layers or max(layers) >= info.n_layers - 1:
        raise OptionError(f"dyvte: candidate_layers must lie before the last of {info.n_layers} layers, got {', '.join(map(str, layers)) or 'none'}")
    fingerprint = info.fingerprint()
    asked = questions(data, training.n_questions, seed)
    about = {"model": vision.name, "fingerprint": fingerprint, "dtype": info.dtype, "data": str(data)}
    table = make_table(vision, asked, layers, folder / "table", about=about, show_progress=show_progress)
    from accelerate import PartialState

    if PartialState().is_main_process:
        described = f"{len(asked)} questions of {data}"
        found = _fit(table, training, info.hidden_size, seed, device=vision.model.device, show_progress=show_progress)
        header = RouterHeader(
            vision.name, fingerprint, info.n_layers, info.hidden_size, found["router_hidden"], tuple(found["routers"]), found["threshold"],
            training.label_scale, training.label_slack, described,
        )  # fmt: skip
        path = save_routers(folder / "routers.safetensors", found["routers"], header)
        report = {"schema": 1, **about, "n": len(asked), "seed": seed, "training": asdict(training), **found["report"]}
        (folder / "routers.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        own = {name: value for name, value in fixed.items() if name != "candidate_layers"}
        held = found["report"]["held_out"]
        leave = f"{held['exit_share']:.0%} leave, behind layer {held['mean_exit_layer']} on average" if held["exit_share"] else "none leaves"
        note = (
            f"accel tune: routers of layers {', '.join(map(str, found['routers']))} for {vision.name} from {described}; on {held['n']} held-out "
            f"questions {held['agreement']:.1%} of the answers stay the same, {leave}"
        )
        Recipe.of(DyVTE(routers=str(path), **own), note=note).save(folder / "recipe.yaml")
    PartialState().wait_for_everyone()
    [method] = Recipe.load(folder / "recipe.yaml").methods
    assert isinstance(method, DyVTE)
    return method


CALIBRATION = Calibration(
    "routers",
    'routers, from questions about pictures with answers (--data scenes, or a .jsonl file with "image", "text" and "answer" in each line); '
    "the model answers every question once without an exit and again with one behind each candidate layer, then the routers are trained: for "
    "small-vlm 12 to 25 minutes on two processor cores",
    train_routers,
)


def _fit(table: Table, training: RouterTraining, width: int, seed: int, *, device: torch.device, show_progress: bool) -> dict[str, Any]:
    """Routers by layer, without those that never saw an exit, the threshold, and what is reported."""
    labels = table.labels(training.label_scale, training.label_slack)
    is_held_out = held_out_rows(len(labels), training.held_out, seed)
    hidden = training.router_hidden or min(256, max(1, width // 2))
    trained = fit(table.feature, labels, is_held_out, training, hidden=hidden, seed=seed, device=device, show_progress=show_progress)
    rows = layer_report(trained, table, labels, is_held_out)
    kept = [i for i, row in enumerate(rows) if row["exit_share"] > 0]
    if not kept:
        raise UnsupportedError("dyvte: behind no candidate layer could the visual tokens leave without changing answers: there is nothing to learn")
    # as the file will hold them
    routers = {table.layers[i]: Router(*(w.half().float() for w in (trained.router(i).w1, trained.router(i).w2))) for i in kept}
    held = table.feature[is_held_out]
    shares = torch.stack([routers[table.layers[i]].logits(held[:, i]).softmax(-1)[:, EXIT] for i in kept], 1)
    agrees = table.agrees[is_held_out][:, kept]
    threshold = calibrate(shares, agrees, training.target_agreement)
    exits = exit_of(shares, threshold)
    n_layers_seen = torch.tensor([*(table.layers[i] for i in kept), -1], device="cpu")[exits]
    left = n_layers_seen >= 0
    outcome = {
        "n": len(shares), "agreement": round(agreement(exits, agrees), 4), "exit_share": _number(left.float().mean()),
        "mean_exit_layer": _number(n_layers_seen[left].float().mean()),
    }  # fmt: skip
    return {
        "routers": routers, "router_hidden": hidden, "threshold": threshold,
        "report": {"router_hidden": hidden, "threshold": threshold, "held_out": outcome, "layers": rows},
    }  # fmt: skip


# --- training -----------------------------------------------------------------------------------------------------------------


def held_out_rows(n: int, share: float, seed: int) -> Tensor:
    """(n,) bool: a share of the rows, at least one, drawn by seed."""
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu")[: max(1, round(share * n))]
    return torch.zeros(n, dtype=torch.bool, device="cpu").index_fill(0, chosen, True)


def new_routers(n_layers: int, hidden: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Xavier-uniform w1 (layers, hidden, width) and w2 (layers, 2, hidden)."""
    draw = torch.Generator().manual_seed(seed)

    def xavier(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6 / (rows + columns))
        return torch.empty(n_layers, rows, columns, device="cpu").uniform_(-bound, bound, generator=draw)

    return xavier(hidden, width), xavier(2, hidden)


def fit(
    feature: Tensor, labels: Tensor, is_held_out: Tensor, training: RouterTraining, *, hidden: int, seed: int,
    device: torch.device | str = "cpu", show_progress: bool = False,
) -> Trained:  # fmt: skip
    """One router per layer, all trained at once; of each the epoch with the best balanced accuracy on the held-out rows.

    feature: (n, layers, 2D); labels: (n, layers) bool, exit. The routers share batches and nothing else: Adam and the sum of losses keep them apart.
    """
    n_layers, width = feature.shape[1:]
    y = labels.long().to(device)
    # one scale per layer: the residual stream grows with depth, and one learning rate must suit all; w1 takes it back in the end
    scale = feature[~is_held_out].float().square().mean((0, 2)).sqrt().clamp_min(1e-6)
    x = (feature.float() / scale[:, None]).to(device)
    w1, w2 = (w.to(device).requires_grad_() for w in new_routers(n_layers, hidden, width, seed))
    found = Trained(w1, w2, torch.zeros(n_layers, dtype=torch.int64, device="cpu"))
    best = Trained(w1.detach().clone(), w2.detach().clone(), found.epoch.clone())
    optimizer = torch.optim.AdamW([w1, w2], lr=training.learning_rate, weight_decay=0)
    rows, held = (~is_held_out).nonzero().flatten(), is_held_out.nonzero().flatten().to(device)
    record = torch.full((n_layers, 2), -math.inf, device="cpu")
    with progress_bar(training.max_epochs, "training routers", is_shown=show_progress) as advance:
        for epoch in range(1, training.max_epochs + 1):
            for part in _batches(rows, training.batch, seed * 1000 + epoch):
                optimizer.zero_grad()
                loss: Any = loss_of(found.logits(x[part.to(device)]), y[part.to(device)]).sum()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                logits = found.logits(x[held])
                # where accuracies tie, the surer router
                score = torch.stack([balanced_accuracy(logits.argmax(-1) == EXIT, y[held] == EXIT), -loss_of(logits, y[held])], 1).cpu()
                better = (score[:, 0] > record[:, 0]) | (score[:, 0] == record[:, 0]) & (score[:, 1] > record[:, 1])
                record[better] = score[better]
                best.epoch[better] = epoch
                for own, now in ((best.w1, w1), (best.w2, w2)):
                    own[better.to(device)] = now[better.to(device)]
            advance(f"balanced accuracy {float(record[:, 0].mean()):.3f}")
            if epoch - int(best.epoch.max()) >= training.patience:
                break
    return Trained(best.w1 / scale.to(device)[:, None, None], best.w2, best.epoch)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """(layers,) cross-entropy, mean over the rows. logits: (n, layers, 2); labels: (n, layers) int64."""
    return functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(0)


def balanced_accuracy(fires: Tensor, labels: Tensor) -> Tensor:
    """(layers,) fp32: the mean of the accuracies on both classes, of one where the other is missing. (n, layers) bool each."""
    parts = torch.stack([_share(fires == labels, labels == value) for value in (False, True)])
    return parts.nanmean(0)


def _share(hits: Tensor, among: Tensor) -> Tensor:
    """(layers,) share of hits among some rows; NaN where there are none."""
    return (hits & among).sum(0) / among.sum(0)


def _batches(rows: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")
    for first in range(0, len(rows), size):
        yield rows[order[first : first + size]]


# --- calibration and report ---------------------------------------------------------------------------------------------------


def exit_of(shares: Tensor, threshold: float) -> Tensor:
    """(n,) int64: the first column whose share lies above the threshold; −1 where none does. shares: (n, layers), shallow layers first."""
    fires = shares > threshold
    return torch.where(fires.any(1), fires.int().argmax(1), -1)


def agreement(exits: Tensor, agrees: Tensor) -> float:
    """The share of the rows whose answer stays: those that never leave, and those that leave where that changes nothing."""
    same = agrees.gather(1, exits.clamp_min(0)[:, None])[:, 0] | (exits < 0)
    return float(same.float().mean())


def calibrate(shares: Tensor, agrees: Tensor, target: float) -> float:
    """The lowest threshold from which on, at it and at every higher one, the agreement is at least `target`."""
    found = 1.0
    for threshold in reversed(THRESHOLDS):
        if agreement(exit_of(shares, threshold), agrees) < target:
            break
        found = threshold
    return found


@torch.no_grad()
def layer_report(trained: Trained, table: Table, labels: Tensor, is_held_out: Tensor) -> list[dict[str, Any]]:
    """Per layer: how many rows may exit, and how often its router is right on held-out rows that must stay and that may leave."""
    device = trained.w1.device
    fires = (trained.logits(table.feature[is_held_out].float().to(device)).argmax(-1) == EXIT).cpu()
    held = labels[is_held_out]
    accuracy = {KEEP: _share(~fires, ~held), EXIT: _share(fires, held)}
    balanced = balanced_accuracy(fires, held)
    return [
        {
            "layer": layer, "exit_share": _number(labels[:, i].float().mean()), "agreement": _number(table.agrees[:, i].float().mean()),
            "accuracy_on_keep": _number(accuracy[KEEP][i]), "accuracy_on_exit": _number(accuracy[EXIT][i]), "balanced_accuracy": _number(balanced[i]),
            "best_epoch": int(trained.epoch[i]), "is_used": bool(labels[:, i].any()),
        }
        for i, layer in enumerate(table.layers)
    ]  # fmt: skip


def _number(value: Tensor) -> float | None:
    """None for NaN, which JSON does not know."""
    return None if bool(value.isnan()) else round(float(value), 4)
