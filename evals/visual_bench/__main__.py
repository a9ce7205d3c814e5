"""What dropping visual tokens saves: encoder, prefill and decoding time, KV bytes and peak memory, each beside what arithmetic promises.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 python -m accel.evals.visual_bench --method fastervlm --keeps 1.0,0.25,0.1
    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 python -m accel.evals.visual_bench --shape llava-1.5-7b --layers 2 --method fastervlm

Without the two variables OpenMP's spinning barriers cost a scheduler slice per small operation on a shared machine (kernels.md §2.1).
Read the ratios; single times follow the load. Where others work on the machine, `--clock processor --threads 1` repeats within a percent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, OptionError

if TYPE_CHECKING:
    from accel.evals.latency import Spread
    from accel.evals.visual_bench.shapes import VisualPrompt
    from accel.evals.visual_bench.timing import Part, VisualRow
    from accel.protocols import Method

HEADERS = (
    "variant", "visual tokens", "encoder ms", "prefill ms", "speed-up", "predicted", "head ms", "TTFT ms", "speed-up", "predicted",
    "decode ms/token", "speed-up", "predicted", "KV MiB", "visual KV MiB", "predicted", "peak MiB",
)  # fmt: skip
NOTE = """\
Times: median (p20–p80). Speed-up: dense time / this time, median over the rounds. predicted, of prefill and TTFT: ratio of FLOPs, a multiply-add
counted as two, at equal FLOP/s; of decoding: ratio of the bytes read. The encoder includes observing it, prefill includes choosing among its tokens;
TTFT is encoder + prefill + head, which gives the first token."""
RANDOM = "random weights: time and bytes only, no quality"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit code 0."""
    args = _parser().parse_args(arguments)
    from accel.cli.measuring import settle_threads

    try:
        settle_threads(args.threads)
        return _measure(args)
    except AccelError as error:
        print(f"visual_bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accel.evals.visual_bench", description=str(__doc__).partition("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="small-vlm", help="an embedded vision-language model (default: %(default)s)")
    which.add_argument("--shape", help="a known shape with random weights instead, such as llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=2, help="decoder layers of the shape that run (default: %(default)s)")
    parser.add_argument("--tower-layers", type=int, help="encoder layers of the shape that run (default: all)")
    parser.add_argument("--tokens", type=int, help="patch tokens of the shape's prompt, 576 or 2880 for llava-1.5-7b (default: the fewer)")
    parser.add_argument("--text-tokens", type=int, help="other tokens of the shape's prompt (default: 100)")
    parser.add_argument("--method", action="append", help="a token-pruning method, with options as in vflowopt:r2=0.8; may be repeated")
    parser.add_argument("--keeps", default="1.0,0.5,0.25,0.1,0.05", help="shares or counts of visual tokens kept (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: %(default)s)")
    parser.add_argument("--decode-steps", type=int, default=8, help="tokens decoded behind each prompt (default: %(default)s)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall",
        help="processor: time that a processor spent on it, with --threads 1, for machines where others work too (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="also write the numbers there, as JSON")
    return parser


def _measure(args: argparse.Namespace) -> int:
    from accel.cli.measuring import choose_dtype, progress_bar
    from accel.cli.options import parse_keeps, parse_method
    from accel.cli.table import print_table
    from accel.evals.controls import add_variant, swept
    from accel.evals.visual_bench.timing import measure_visual
    from accel.protocols import TokenPruning

    methods = [parse_method(text) for text in args.method or ["fastervlm"]]
    if other := [m.method_name() for m in methods if not isinstance(m, TokenPruning)]:
        raise OptionError(f"visual_bench measures methods that drop visual tokens, which these do not: {', '.join(other)}")
    given: dict[str, list[Method]] = {}
    for method in methods:
        add_variant(given, [method])
    variants = swept(given, parse_keeps(args.keeps))
    dtype, dtype_reason = choose_dtype(args.dtype, args.device)
    model, prompt, name, notes = _subject(args, dtype)
    with progress_bar((1 + args.repeats) * (1 + len(variants))) as step:
        rows = measure_visual(model, prompt, variants, decode_steps=args.decode_steps, repeats=args.repeats, clock=args.clock, progress=step)
    facts = _facts(args, name, dtype, prompt)
    print_table(HEADERS, [cells(row) for row in rows], title="\n".join([", ".join(facts), *notes]))
    print(NOTE)
    if args.out:
        _write(args, rows, name=name, facts=facts, notes=notes, dtype_reason=dtype_reason)
    return 0


def _subject(args: argparse.Namespace, dtype: str) -> tuple[Any, VisualPrompt, str, list[str]]:
    """The model, its prompt, its name, and what a reader must know of it."""
    import torch

    from accel.evals.models import LoadedVisionModel, load_model, torch_dtype
    from accel.evals.visual_bench.shapes import SHAPES, TEXT_TOKENS, patch_tokens, random_model, random_prompt, scene_prompt

    if args.shape is None:
        if args.tokens or args.text_tokens or args.tower_layers:
            raise OptionError("--tokens, --text-tokens and --tower-layers belong to a --shape")
        loaded = load_model(args.model, dtype=dtype, device=args.device)
        if not isinstance(loaded, LoadedVisionModel):
            raise OptionError(f"{args.model} reads no pictures")
        return loaded.model, scene_prompt(loaded, batch=args.batch), loaded.name, []
    if args.shape not in SHAPES:
        raise OptionError(f"known shapes: {', '.join(SHAPES)}; got {args.shape!r}")
    sizes = SHAPES[args.shape]
    n_patches = args.tokens or patch_tokens(sizes)[0]
    n_tower_layers = args.tower_layers or sizes.n_tower_layers
    torch.manual_seed(0)
    model = random_model(
        sizes, n_patches, n_layers=args.layers, n_tower_layers=n_tower_layers, dtype=torch_dtype(dtype), device=args.device
    )
    n_text = args.text_tokens or TEXT_TOKENS
    prompt = random_prompt(sizes, n_patches, n_text=n_text, batch=args.batch, dtype=torch_dtype(dtype), device=args.device)
    ran = f"{args.layers} of {sizes.n_layers} decoder layers and {n_tower_layers} of {sizes.n_tower_layers} tower layers ran"
    notes = [f"{RANDOM}; {ran}"]
    if (args.layers, n_tower_layers) != (sizes.n_layers, sizes.n_tower_layers):
        notes.append("TTFT, decoding and KV are those of the layers that ran; prefill goes with the decoder layers, the encoder with the tower's.")
    return model, prompt, f"{args.shape} shape ({type(model).__name__})", notes


def _facts(args: argparse.Namespace, name: str, dtype: str, prompt: VisualPrompt) -> list[str]:
    import torch

    structural = prompt.n_visual - prompt.n_patches
    visual = f"{prompt.n_visual} visual tokens" + (f" ({structural} of them newlines)" if structural else "")
    facts = [name, dtype, f"batch {prompt.batch}", f"{visual} + {prompt.n_text} text", f"{torch.get_num_threads()} threads", f"{args.repeats} rounds"]
    facts.append(f"{args.clock} time")
    return [*facts, f"load {os.getloadavg()[0]:.1f}"] if hasattr(os, "getloadavg") else facts


def cells(row: VisualRow) -> list[str]:
    """One row of the table, as HEADERS names it."""
    left = f"{row.visual_tokens:g}"
    if row.mean_layer_tokens != row.visual_tokens:
        left += f" (mean {row.mean_layer_tokens:.1f})"
    prefill, ttft, decode = (_compared(row, part) for part in ("prefill", "ttft", "decode"))
    timed = [spread(row.ms["encoder"]), *prefill, digits(row.ms["head"].median), *ttft, *decode]
    peak = "–" if row.peak_bytes is None else mib(row.peak_bytes)
    return [row.label, left, *timed, mib(row.kv_bytes), mib(row.visual_kv_bytes), mib(row.predicted_visual_kv_bytes), peak]


def _compared(row: VisualRow, part: Part) -> list[str]:
    promised = row.predicted.get(part)
    return [spread(row.ms[part]), f"{row.speedup[part]:.2f}", "–" if promised is None else f"{promised:.2f}"]


def spread(ms: Spread) -> str:
    """`812 (805–830)`: median, p20 and p80, three digits each."""
    return f"{digits(ms.median)} ({digits(ms.p20)}–{digits(ms.p80)})"


def digits(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.2f}"


def _write(args: argparse.Namespace, rows: Sequence[VisualRow], **head: Any) -> None:
    from accel.cli.measuring import OPENMP
    from accel.evals.results import environment

    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    env = {**environment(), **{name: os.environ.get(name, "not set") for name in OPENMP}}
    found = {"schema": 1, "task": "visual_bench", **head, "config": settings, "env": env, "rows": [row.as_dict() for row in rows]}
    args.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
