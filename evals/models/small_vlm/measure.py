"""Prints what card.md says: right answers by family beside both baselines, and after pruning the picture's tokens.

    python -m accel.evals.models.small_vlm.measure --n 400
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accel.evals.models.small_vlm import training as T
from accel.evals.scenes import FAMILIES, Item, baselines, held_out

GATE = 0.20                     # above both baselines: small-models.md §9.5
KEEPS = (0.5, 0.25, 0.1, 0.05)
Chooser = Callable[[Tensor, Tensor, int, torch.Generator], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--n", type=int, default=400, help="questions per family")
    parser.add_argument("--split", default="test")
    parser.add_argument("--keeps", type=float, nargs="*", default=KEEPS)
    parser.add_argument("--compact", action="store_true", help="number the kept tokens 1, 2, 3 … instead of keeping their positions")
    args = parser.parse_args()
    from transformers import LlavaForConditionalGeneration

    # eager: SDPA gives no attention of [CLS]
    model = LlavaForConditionalGeneration.from_pretrained(args.weights, dtype=torch.float32, attn_implementation="eager", local_files_only=True)
    model.eval()
    items = {family: held_out(family, args.split, args.n) for family in FAMILIES}
    print("| family | n | dense | no image | among present | passes |\n|---|---|---|---|---|---|")
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    dense: dict[str, list[float]] = {}
    passing: list[str] = []
    for family, asked in items.items():
        seen[family] = look(model, asked)
        dense[family] = right(model, asked, seen[family], None)
        base = baselines(asked)
        mean = statistics.fmean(dense[family])
        if mean >= base.best + GATE:
            passing.append(family)
        print(
            f"| {family} | {len(asked)} | {percent(dense[family])} | {100 * base.no_image:.1f} | {100 * base.present:.1f} "
            f"| {'yes' if family in passing else 'no'} |", flush=True,
        )  # fmt: skip
    print("\n| keep | tokens | choice | " + " | ".join(items) + " | mean of those that pass |\n|" + "---|" * (len(items) + 4))
    print("| 100 % | 144 | dense | " + " | ".join(percent(dense[f]) for f in items) + f" | {percent([*chain(*(dense[f] for f in passing))])} |")
    for keep in args.keeps:
        for name, choose in CHOICES.items():
            hits = {f: right(model, items[f], seen[f], (choose, keep), is_compact=args.compact) for f in items}
            row = " | ".join(percent(hits[f]) for f in items)
            print(f"| {100 * keep:g} % | {count(keep)} | {name} | {row} | {percent([*chain(*(hits[f] for f in passing))])} |", flush=True)


def count(keep: float) -> int:
    return max(1, round(keep * T.N_PATCHES))


def percent(hits: Sequence[float]) -> str:
    """Mean ± standard error, in percent."""
    mean = statistics.fmean(hits)
    return f"{100 * mean:.1f} ± {100 * (mean * (1 - mean) / len(hits)) ** 0.5:.1f}"


@torch.no_grad()
def look(model: Any, items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
    """Of each picture: tower features (n, patches, width), attention of [CLS] in the layer that gave them (n, patches), content (n, patches) bool."""
    features, attention = [], []
    for first in range(0, len(items), 32):
        pixels = T.pixels_of([item.scene for item in items[first : first + 32]])
        out = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True, output_attentions=True)
        features.append(out.hidden_states[-2][:, 1:])
        attention.append(out.attentions[-2][:, :, 0, 1:].mean(1))
    content = torch.zeros(len(items), T.N_PATCHES, dtype=torch.bool)
    for i, item in enumerate(items):
        content[i, list(item.scene.content_cells)] = True
    return torch.cat(features), torch.cat(attention), content


@torch.no_grad()
def right(
    model: Any, items: Sequence[Item], seen: tuple[Tensor, Tensor, Tensor], pruned: tuple[Chooser, float] | None, *, is_compact: bool = False
) -> list[float]:
    """1.0 for each question whose every answer token, and the end, is the likeliest: what greedy decoding would write. Seeded."""
    features, attention, content = seen
    draw = torch.Generator().manual_seed(0)
    hits: list[float] = []
    for first in range(0, len(items), 32):
        part = slice(first, first + 32)
        kept = torch.arange(T.N_PATCHES).expand(len(features[part]), -1)
        if pruned is not None:
            choose, keep = pruned
            kept = choose(attention[part], content[part], count(keep), draw).sort(-1).values
        rows = T.slots([[item.question] for item in items[part]])
        logits, _ = T.answer_logits(model, features[part], kept, rows, is_compact=is_compact, with_attention=False)
        hits += ((logits.argmax(-1) == rows.targets) | (rows.targets == T.IGNORED)).all(-1)[:, 0].float().tolist()
    return hits


def _evenly(attention: Tensor, k: int) -> Tensor:
    return ((torch.arange(k) + 0.5) * T.N_PATCHES / k).long().expand(len(attention), -1)


CHOICES: dict[str, Chooser] = {
    "cls": lambda attention, content, k, draw: attention.topk(k, -1).indices,
    "random": lambda attention, content, k, draw: torch.rand(attention.shape, generator=draw).topk(k, -1).indices,
    "uniform": lambda attention, content, k, draw: _evenly(attention, k),
    "bottom": lambda attention, content, k, draw: (-attention).topk(k, -1).indices,
    "oracle": lambda attention, content, k, draw: (torch.rand(attention.shape, generator=draw) + content).topk(k, -1).indices,
}


if __name__ == "__main__":
    main()
