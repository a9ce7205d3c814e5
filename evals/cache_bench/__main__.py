"""What a cache method costs and saves in a self-attention layer of a known next-scale model with random weights: time and bytes, no quality.

    OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=1000 python -m accel.evals.cache_bench --shape infinity-8b --method hack --method h2o --keeps 0.3
    python -m accel.evals.cache_bench --shape infinity-2b --clock processor --threads 1

A method that wants a head profile is given a planted one, half of the heads contextual and their budget a third, unless its options say otherwise.
Read the ratios: single times follow the load of the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.errors import AccelError, OptionError

if TYPE_CHECKING:
    from accel.evals.cache_bench.timing import CacheRow, CacheShape
    from accel.protocols import KVCompression, Method

HEADERS = (
    "variant", "read", "predicted", "attention ms", "ratio", "choosing", "module ms", "ratio", "all scales ms", "ratio", "choosing", "cache MiB",
    "predicted", "peak MiB",
)  # fmt: skip
PLANTED = (
    "Methods that want a profile of the heads and were given none have a planted one: half of the heads contextual, with a third of the mean budget, "
    "unless their options say otherwise."
)
NOTE = """\
Last scale unless it says otherwise; median (p20-p80) of interleaved runs, ratios to dense. attention: writing entries, choosing, gathering, the
products; choosing: scores, selection and merge, as a share of dense attention; module: attention with projections and rotation. read, predicted:
cache entries per head, measured and by the budgets. cache: of one layer between scales; predicted: keys, values and positions by the budgets."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; exit code 0."""
    args = _parser().parse_args(arguments)
    from accel.cli.measuring import settle_threads

    try:
        settle_threads(args.threads)
        return _measure(args)
    except AccelError as error:
        print(f"cache_bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m accel.evals.cache_bench", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--shape", default="infinity-2b", help="infinity-8b, infinity-2b, var-d36, var-d30 or var-d16 (default: %(default)s)")
    parser.add_argument("--method", action="append", help="a cache method, with options as in hack:alpha=0.8; may be repeated (default: hack)")
    parser.add_argument("--keeps", default="0.3", help="what the methods keep, shares with a point or counts (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="rows: 2 are one guided picture (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each variant, interleaved (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's own choice)")
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall", help="processor time needs --threads 1")
    parser.add_argument("--out", type=Path, help="a .json file for the numbers")
    return parser


def _measure(args: argparse.Namespace) -> int:
    from accel.cli.measuring import check_device
    from accel.evals.cache_bench.timing import SHAPES, measure
    from accel.evals.models import torch_dtype

    check_device(args.device)
    if args.clock == "processor" and (args.threads != 1 or args.device != "cpu"):
        raise OptionError("processor time is that of one thread: add --threads 1, on a CPU")
    if args.shape not in SHAPES:
        raise OptionError(f"no shape {args.shape!r}; there are {', '.join(SHAPES)}")
    if args.rows < 1 or args.repeats < 1:
        raise OptionError(f"rows and repeats must be at least 1, got {args.rows} and {args.repeats}")
    shape = replace(SHAPES[args.shape], rows=args.rows)
    with tempfile.TemporaryDirectory() as folder:
        methods = _methods(args.method or ["hack"], args.keeps, shape, Path(folder))
        rows = measure(
            shape, methods, dtype=torch_dtype(args.dtype), device=args.device, repeats=args.repeats, warmup=args.warmup,
            is_processor_time=args.clock == "processor", advance=lambda label: print(f"running {label}", file=sys.stderr),
        )  # fmt: skip
    _print(args, rows)
    if args.out:
        named = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.out.write_text(json.dumps({"schema": 1, "settings": named, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    return 0


def _methods(texts: Sequence[str], keeps: str, shape: CacheShape, folder: Path) -> dict[str, KVCompression]:
    """The methods by label, at each budget. Those that can read a profile are given a planted one where they name none."""
    from accel.cli.options import parse_keeps, parse_method
    from accel.evals.cache_bench.timing import planted_profile
    from accel.evals.controls import add_variant
    from accel.protocols import KVCompression
    from accel.registry import build

    found: dict[str, KVCompression] = {}
    labels: dict[str, list[Method]] = {}
    for text in texts:
        given = parse_method(text)
        if not isinstance(given, KVCompression):
            raise OptionError(f"{given.method_name()} is a {given.kind.replace('_', '-')} method; a cache method is needed, such as hack")
        for keep in parse_keeps(keeps):
            options: dict[str, Any] = {**given.options(), "keep": keep}
            label = add_variant(labels, [build(given.method_name(), options)])
            # what can do without a profile is measured without one
            if given.needs_training is not None and options.get("profile", "") is None and options.get("plan") is None:
                options |= {"profile": str(planted_profile(shape, folder)), "allow_other_model": True}
                options |= {name: value for name, value in (("alpha", 0.5), ("contextual_share", 1 / 3)) if options[name] == "auto"}
            method = build(given.method_name(), options)
            assert isinstance(method, KVCompression)
            found[label] = method
    return found


def _print(args: argparse.Namespace, rows: Sequence[CacheRow]) -> None:
    from accel.cli.table import print_table

    dense = rows[0]
    cells = [
        [row.label, f"{row.read:.0f}", f"{row.predicted_read:.0f}", _ms(row.attention[-2]), _ratio(row.attention[-2], dense.attention[-2]),
         _share(row.select[-2], dense.attention[-2]), _ms(row.module[-2]), _ratio(row.module[-2], dense.module[-2]), _ms(row.attention[-1]),
         _ratio(row.attention[-1], dense.attention[-1]), _share(row.select[-1], dense.attention[-1]), f"{row.cache_bytes / 2**20:.2f}",
         f"{row.predicted_bytes / 2**20:.2f}", "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}"]
        for row in rows
    ]  # fmt: skip
    title = f"{args.shape}, one layer, {args.rows} rows, {args.dtype}, {args.device}, {args.repeats} runs, {args.clock} time"
    print_table(list(HEADERS), cells, title=title, text_columns=(0,))
    print(f"\n{NOTE}\npeak: {dense.how_peak}.\n{PLANTED}\n{_whole_model(args)}")


def _whole_model(args: argparse.Namespace) -> str:
    """What the whole model takes dense, by arithmetic: a cache as published code stores it, and without what costs nothing to leave out."""
    from accel.evals.cache_bench.cost import GenerationShape, attention_flops, whole, whole_cache_bytes
    from accel.evals.cache_bench.timing import SHAPES
    from accel.evals.models import torch_dtype

    found, size = SHAPES[args.shape], torch_dtype(args.dtype).itemsize
    shape = GenerationShape(found.n_layers, found.n_heads, found.width // found.n_heads, found.schedule.tokens, args.rows)
    published, plain, least = (
        whole_cache_bytes(shape, key_bytes=keys, value_bytes=values, has_last_scale=last) / 2**30
        for keys, values, last in ((4, 2, True), (size, size, True), (size, size, False))
    )
    teraflops = attention_flops(shape, whole(shape)) / 1e12
    return (
        f"By arithmetic, all {found.n_layers} layers, {args.rows} rows, dense: attention products {teraflops:.2f} TFLOPs; cache {published:.2f} GiB "
        f"as published (fp32 keys, half-precision values), {plain:.2f} in {args.dtype}, {least:.2f} without the last scale, as dense above stores it."
    )


def _ms(spread: Any) -> str:
    return f"{spread.median * 1e3:.0f} ({spread.p20 * 1e3:.0f}-{spread.p80 * 1e3:.0f})"


def _ratio(spread: Any, dense: Any) -> str:
    return f"{spread.median / dense.median:.3f}"


def _share(spread: Any, dense: Any) -> str:
    return f"{100 * spread.median / dense.median:.1f} %"


if __name__ == "__main__":
    raise SystemExit(main())
