"""Prints what card.md says: how good the judge, the tokenizer and the drawings are.

    python -m accel.evals.models.small_var.measure --n 2000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from accel.evals import image_metrics as M
from accel.evals.models import LoadedImageModel, load_model
from accel.evals.models.small_var.drawings import CLASSES, Drawn, drawings
from accel.evals.models.small_var.load import GUIDANCE, TOP_K, TOP_P

BATCH = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="pictures")
    parser.add_argument("--split", default="test")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=10**6)
    parser.add_argument("--guidance", type=float, nargs="*", default=[GUIDANCE], help="scales to compare")
    parser.add_argument("--top-p", type=float, nargs="*", default=[TOP_P], help="to compare, at each guidance")
    args = parser.parse_args()
    loaded = load_model("small-var", dtype=args.dtype)
    assert isinstance(loaded, LoadedImageModel)
    real = drawings(args.split, range(args.n))
    others = drawings(args.split, range(args.n, 2 * args.n))
    found = M.class_accuracy(real.pixels, real.labels, loaded.judge)
    print(f"judge on {args.n} real drawings: {_accuracy(found)}")
    print(f"two sets of {args.n} real drawings: Fréchet distance {M.frechet_distance(real.pixels, others.pixels, loaded.judge):.3f}")
    tokenizer(loaded, real)
    print("| guidance | top-p | right, % | Fréchet distance | s for 64 |\n|---|---|---|---|---|")
    for guidance in args.guidance:
        for top_p in args.top_p:
            begin = time.monotonic()
            made = generated(loaded, real.labels.tolist(), args.seed, guidance=guidance, top_p=top_p)
            seconds = (time.monotonic() - begin) * 64 / args.n
            found = M.class_accuracy(made, real.labels, loaded.judge)
            distance = M.frechet_distance(made, real.pixels, loaded.judge)
            print(f"| {guidance:g} | {top_p:g} | {_accuracy(found)} | {distance:.3f} | {seconds:.2f} |", flush=True)
    print("by class: " + ", ".join(f"{CLASSES[c]} {100 * share:.1f}" for c, share in found.by_class.items()))


@torch.no_grad()
def tokenizer(loaded: LoadedImageModel, real: Drawn) -> None:
    """Prints what encoding and decoding costs, and how sure the transformer is of real codes."""
    made, losses, used = [], [], set()
    schedule = loaded.model.schedule
    for first in range(0, len(real.labels), BATCH):
        pixels, labels = real.pixels[first : first + BATCH], real.labels[first : first + BATCH]
        codes = loaded.model.tokenizer.encode(pixels, schedule)
        f = None
        for scale, ids in enumerate(codes):
            f, _ = loaded.model.tokenizer(ids, f, scale, schedule)
        made.append(loaded.model.tokenizer.decode(f))
        losses.append(float(loaded.model(labels, codes).loss))
        used |= set(torch.cat(codes, 1).flatten().tolist())
    again = torch.cat(made)
    right = M.class_accuracy(again, real.labels, loaded.judge)
    seen = float(M.perceptual_distance(again, real.pixels, loaded.judge).mean())
    print(
        f"tokenizer: {float(M.psnr(again, real.pixels).mean()):.2f} dB, perceptual distance {seen:.4f}, judge {_accuracy(right)}, Fréchet distance "
        f"{M.frechet_distance(again, real.pixels, loaded.judge):.3f}, {len(used)} of {loaded.model.config.codebook_size} codes used"
    )
    print(f"transformer: cross-entropy {sum(losses) / len(losses):.3f} nats a code, teacher-forced")


def generated(loaded: LoadedImageModel, labels: Sequence[int], seed: int, *, guidance: float, top_p: float) -> Tensor:
    """One picture per label."""
    return torch.cat([
        loaded.model.generate(labels[i : i + BATCH], seed=seed + i, guidance_scale=guidance, top_k=TOP_K, top_p=top_p, output="tensor")
        for i in range(0, len(labels), BATCH)
    ])  # fmt: skip


def _accuracy(found: M.Accuracy) -> str:
    return f"{100 * found.value:.2f}" if found.stderr is None else f"{100 * found.value:.2f} ± {100 * found.stderr:.2f}"


if __name__ == "__main__":
    main()
