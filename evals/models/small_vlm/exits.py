"""Prints what dyvte does to this model: its trained routers beside a fixed exit behind every layer, and beside no exit at all.

    python -m accel.evals.models.small_vlm.exits --n 400

The routers that ship were made by `--train FOLDER`, which first trains them anew into that folder.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import accel
from accel.evals.latency import quiet_notices
from accel.evals.models import LoadedVisionModel, load_model
from accel.evals.models.small_vlm.measure import percent
from accel.evals.pictures.questions import picture_of, prompt_of, vision_model
from accel.evals.scenes import FAMILIES, Item, held_out
from accel.evals.visual_bench.cost import DecoderShape, prefill_flops
from accel.patches._dyvte_training import RouterTraining, train_routers
from accel.protocols import Method
from accel.recipe import Recipe
from accel.stats import PruningEvent

RECIPE = Path(__file__).parent / "dyvte.yaml"
# relation is not learned, with or without its picture: card.md
ASKED = tuple(family for family in FAMILIES if family != "relation")
# a quarter of the depth and deeper
LAYERS = (2, 3, 4, 5, 6)
# the model is nearly certain of its answers: 3 % of nothing is nothing
TRAINING = RouterTraining(label_slack=0.01)
N_TOKENS = 4            # three digits and the end
BATCH = 20


@dataclass(frozen=True)
class Outcome:
    """One question. layer: the last that saw the picture. n_text: tokens of the prompt that are no picture."""

    family: str
    reply: str
    is_right: bool
    layer: int
    n_text: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=400, help="questions per family")
    parser.add_argument("--split", default="test")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--train", type=Path, metavar="FOLDER", help="train the routers into this folder, and use them")
    args = parser.parse_args()
    loaded = vision_model(load_model("small-vlm"))
    if args.train is not None:
        train_routers(loaded, "scenes", args.train, fixed={"candidate_layers": LAYERS}, training=TRAINING)
        args.recipe = args.train / "recipe.yaml"
    shape = DecoderShape.from_config(loaded.model.config)
    items = {family: held_out(family, args.split, args.n) for family in ASKED}
    n_visual = int(loaded.model.config.image_seq_length)
    whole = answers(loaded, items, ())
    print("| exit behind layer | " + " | ".join(ASKED) + " | mean | same answer | mean layer | visual FLOPs saved | prefill FLOPs saved |")
    print("|---" * (len(ASKED) + 6) + "|")

    def show(name: str, found: Sequence[Outcome]) -> None:
        own = [percent([float(o.is_right) for o in found if o.family == family]) for family in ASKED]
        same = percent([float(a.reply == b.reply) for a, b in zip(found, whole, strict=True)])
        layers = [float(o.layer) for o in found]
        visual, prefill = saved(shape, found, n_visual)
        print(
            f"| {name} | " + " | ".join(own) + f" | {percent([float(o.is_right) for o in found])} | {same} | {mean_error(layers)} "
            f"| {100 * visual:.1f} % | {100 * prefill:.1f} % |", flush=True,
        )  # fmt: skip

    show("never", whole)
    fixed = [answers(loaded, items, [accel.DyVTE(exit_layer=layer)]) for layer in range(shape.n_layers - 1)]
    for layer, found in enumerate(fixed):
        show(str(layer), found)
    show("trained routers", learned := answers(loaded, items, Recipe.load(args.recipe).methods))
    show("oracle: the first that keeps the answer", [earliest(own) for own in zip(*fixed, whole, strict=True)])
    mean = statistics.fmean(o.layer for o in learned)
    print(f"\nfixed exits drawn at random so that their mean is layer {mean:.2f} too: {100 * mixed([*fixed, whole], mean):.1f} % right")
    for family in ASKED:
        print(f"{family}: routers leave behind " + ", ".join(f"{n} ({share:.0%})" for n, share in shares(learned, family)))


@torch.no_grad()
def answers(loaded: LoadedVisionModel, items: dict[str, list[Item]], methods: Sequence[Method]) -> list[Outcome]:
    """The greedy answers in batches of one family; a sequence's exit does not depend on its batch (tests/conformance/test_dyvte.py)."""
    last = int(loaded.model.config.text_config.num_hidden_layers) - 1
    found = []
    events: list[PruningEvent] = []
    with ExitStack() as stack:
        if methods:
            stack.enter_context(quiet_notices())
            handle = stack.enter_context(accel.apply(loaded.model, *methods))
            stack.enter_context(handle.observe_pruning(events.append))
        for family, asked in items.items():
            for first in range(0, len(asked), BATCH):
                part = asked[first : first + BATCH]
                events.clear()
                replies, n_text = _reply(loaded, part)
                layers = exit_layers(events, len(part), last)
                for item, text, n, layer in zip(part, replies, n_text, layers, strict=True):
                    found.append(Outcome(family, text, text == item.question.answer, layer, n))
    return found


def _reply(loaded: LoadedVisionModel, items: Sequence[Item]) -> tuple[list[str], list[int]]:
    """The model's replies, and how many tokens of each prompt are text."""
    inputs: dict[str, Any] = loaded.processor(
        images=[picture_of(item.scene.image) for item in items], text=[prompt_of(loaded, item.question.text) for item in items],
        return_tensors="pt", padding=True,
    )  # fmt: skip
    ids: Tensor = inputs["input_ids"]
    is_text = inputs["attention_mask"].bool() & (ids != loaded.model.config.image_token_id)
    made = loaded.model.generate(**inputs, max_new_tokens=N_TOKENS, do_sample=False)[:, ids.shape[1] :]
    return [text.strip() for text in loaded.tokenizer.batch_decode(made, skip_special_tokens=True)], is_text.sum(1).tolist()


def exit_layers(events: Sequence[PruningEvent], n: int, last: int) -> list[int]:
    """Of each sequence, the last layer that sees its picture."""
    found = [last] * n
    for event in reversed(events):
        assert event.stage.layer is not None
        for b, sees in enumerate(event.is_kept.any(1).tolist()):
            if not sees:
                found[b] = event.stage.layer - 1
    return found


def saved(shape: DecoderShape, found: Sequence[Outcome], n_visual: int) -> tuple[float, float]:
    """The shares of the decoder's prefill FLOPs that the exits save: of those that the picture costs, and of all. One prompt at a time."""
    costs = [(prefill_flops(shape, layer_tokens(shape.n_layers, o, n_visual)), o) for o in found]
    spent = sum(cost for cost, _ in costs)
    full = sum(prefill_flops(shape, [o.n_text + n_visual] * shape.n_layers) for o in found)
    blind = sum(prefill_flops(shape, [o.n_text] * shape.n_layers) for o in found)
    return (full - spent) / (full - blind), (full - spent) / full


def layer_tokens(n_layers: int, outcome: Outcome, n_visual: int) -> list[int]:
    """Tokens that reach each layer."""
    return [outcome.n_text + (n_visual if i <= outcome.layer else 0) for i in range(n_layers)]


def earliest(own: Sequence[Outcome]) -> Outcome:
    """Of one question, exits from the first layer to none: the first that keeps the last one's answer."""
    return next(o for o in own if o.reply == own[-1].reply)


def mixed(fixed: Sequence[Sequence[Outcome]], layer: float) -> float:
    """The share of right answers of fixed exits between which a coin decides: what routers that know nothing would reach."""
    right = [statistics.fmean(o.is_right for o in found) for found in fixed]
    below = min(int(layer), len(right) - 2)
    return right[below] + (layer - below) * (right[below + 1] - right[below])


def shares(found: Sequence[Outcome], family: str) -> list[tuple[int, float]]:
    """By layer, the share of a family's questions that leave behind it."""
    layers = [o.layer for o in found if o.family == family]
    return [(layer, layers.count(layer) / len(layers)) for layer in sorted(set(layers))]


def mean_error(values: Sequence[float]) -> str:
    """Mean ± standard error."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) / len(values) ** 0.5:.2f}"


if __name__ == "__main__":
    main()
