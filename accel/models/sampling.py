"""Choosing codes from logits, one random stream per image, and turning the result into pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from accel.errors import AccelError, OptionError

Seed = int | Sequence[int | torch.Generator] | None


def check_sampling(*, top_k: int, top_p: float) -> None:
    """Raises OptionError where top-k or top-p is out of range. 0 turns either off, and so does a top-k above the number of choices."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 0:
        raise OptionError(f"top_k must be a whole number, 0 (off) or above, got {top_k!r}")
    if not 0.0 <= top_p <= 1.0:
        raise OptionError(f"top_p must lie in [0, 1] (0 or 1: off), got {top_p!r}")


def filtered(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Logits (…, V) with −inf outside the top-k and then outside the top-p, as published.

    Entries equal to the k-th largest all stay. Top-p sorts ascending and drops what has a cumulative probability ≤ 1 − p; the largest always stays.
    """
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if 0.0 < top_p < 1.0:
        ascending, order = logits.sort(dim=-1)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        dropped[..., -1] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -torch.inf)
    return logits


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One sample per distribution: logits (images, …, V) -> indices (images, …), image i from `generators[i]`.

    The largest of log-probability plus Gumbel noise. Against inverting the cumulative distribution this costs V random numbers instead of one, but a
    rounding difference in the logits (another batch size) then changes the outcome only where the two best sums tie.
    """
    noise = torch.empty_like(logits, dtype=torch.float32)
    for image, generator in enumerate(generators):
        drawn = torch.empty(logits.shape[1:], dtype=torch.float32, device=generator.device).exponential_(generator=generator)
        noise[image] = drawn.to(logits.device)
    return (logits.float() - noise.log()).argmax(-1)


def generators_for(seed: Seed, images: int, device: torch.device) -> list[torch.Generator]:
    """One generator per image. An int seeds image i with seed + i; a list gives each its own seed or generator; None takes torch's random state."""
    if seed is None:
        seed = torch.randint(2**62, (images,)).tolist()
    elif isinstance(seed, int) and not isinstance(seed, bool):
        seed = [seed + i for i in range(images)]
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        raise OptionError(f"seed is an int, a list with an int or torch.Generator per image, or None, got {seed!r}")
    wrong = [one for one in seed if not isinstance(one, Integral | torch.Generator) or isinstance(one, bool)]
    if wrong:
        raise OptionError(f"seed is an int, a list with an int or torch.Generator per image, or None; the list holds {wrong[0]!r}")
    if len(seed) != images:
        raise OptionError(f"{len(seed)} seeds for {images} images")
    given = [id(one) for one in seed if isinstance(one, torch.Generator)]
    if len(set(given)) < len(given):
        raise OptionError("the same torch.Generator was given for two images, which would make an image depend on its neighbours; give each its own")
    return [one if isinstance(one, torch.Generator) else torch.Generator(device).manual_seed(one) for one in seed]


def scale_progress(scales: int, *, shown: bool) -> Any:
    """A tqdm bar over the scales, on stderr; silent unless `shown`."""
    from tqdm.auto import tqdm

    return tqdm(range(scales), desc="scales", disable=not shown)


def check_output(output: str) -> None:
    """Raises before anything is computed where the result could not be returned as asked."""
    if output not in ("pil", "tensor"):
        raise OptionError(f"output must be 'pil' or 'tensor', got {output!r}")
    if output == "pil" and importlib.util.find_spec("PIL") is None:
        raise AccelError("output='pil' needs Pillow, which is missing. Install it (pip install pillow) or ask for output='tensor'")


def as_output(pixels: Tensor, output: str) -> Any:
    """pixels (images, 3, height, width) in [0, 1], RGB -> PIL images, or the tensor itself."""
    if output == "tensor":
        return pixels
    from PIL import Image

    # 8 bits by cutting, as the published samplers do, not by rounding
    bytes_ = pixels.mul(255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(one) for one in bytes_]
