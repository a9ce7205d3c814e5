"""`accel bench`: time to first token, decoding, peak memory and the attention operator, beside both dense baselines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import (
    check_model,
    choose_dtype,
    describe_run,
    finish_run,
    load,
    merge_settings,
    new_folder,
    print_settings,
    progress_bar,
    require_least,
    settle_threads,
)
from accel.cli.options import add_machine_arguments, add_method_argument, add_settings_arguments, parse_lengths, read_variants, split_items
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.evals.latency import LatencyRow, Variants
    from accel.evals.models import LoadedModel

HELP = "time to first token, decode, peak memory and the attention operator, against both dense baselines"

DEFAULTS: dict[str, Any] = {
    "model": "smollm2", "method": None, "recipe": None, "lengths": "4k,8k", "what": "operator,ttft,decode,cache", "dtype": "auto", "device": "cpu",
    "repeats": 5, "warmup": 1, "decode_steps": 16, "chunk": 512, "heads": "8,2", "head_dim": 128, "densities": "0.25,0.1,0.05",
    "threads": None, "seed": 0, "out": None,
}  # fmt: skip
PARTS = ("operator", "ttft", "decode", "cache")


@dataclass(frozen=True)
class OperatorShape:
    """What the operator part measures: query and key heads, their size, and the shares of the causal blocks that are read."""

    heads: tuple[int, int]
    head_dim: int
    densities: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # no default here: a flag that was not given must not override the settings file
    parser.add_argument("--model", help="an embedded model, a folder, or a hub id (default: smollm2)")
    add_method_argument(parser, "repeatable (default: the model's recipe, or flexprefill)")
    parser.add_argument("--recipe", help="a recipe file, measured as one more variant")
    parser.add_argument("--lengths", help="prompt lengths, such as 4k,16k,64k (default: 4k,8k)")
    parser.add_argument("--what", help="parts to run: operator, ttft (with peak memory), decode, cache (of methods that compress it) (default: all)")
    parser.add_argument("--repeats", type=int, help="timed rounds, each over all variants in turn (default: 5)")
    parser.add_argument("--warmup", type=int, help="rounds before, in which peak memory is measured (default: 1)")
    parser.add_argument("--decode-steps", type=int, help="tokens per decoding pass (default: 16)")
    parser.add_argument("--chunk", type=int, help="cache: tokens per pass of a chunked prefill (default: 512)")
    parser.add_argument("--heads", help="operator: query and key heads (default: 8,2)")
    parser.add_argument("--head-dim", type=int, help="operator: size of a head (default: 128)")
    parser.add_argument("--densities", help="operator: shares of the causal blocks (default: 0.25,0.1,0.05)")
    add_machine_arguments(parser)
    parser.add_argument("--seed", type=int, help="of the prompts (default: 0)")
    parser.add_argument("--out", help="folder for the results (default: runs/<date>-bench)")
    add_settings_arguments(parser)
    parser.epilog = (
        "examples:\n  accel bench --model smollm2 --method flexprefill:min_budget=256 --method powerattention --lengths 4k,8k --what ttft\n"
        "  accel bench --model smollm2 --method snapkv:keep=0.3 --lengths 2k,4k --what ttft,decode,cache --decode-steps 64"
    )


def main(args: argparse.Namespace) -> int:
    """Measures, prints the tables and writes the run folder. 0 when every part was measured for every method and length."""
    settings = merge_settings(args, DEFAULTS)
    require_least(settings, repeats=1, warmup=0, decode_steps=1, chunk=1, head_dim=1)
    settle_threads(settings["threads"])
    variants, lengths, parts = read_variants(settings), parse_lengths(settings["lengths"]), _parts(settings)
    shape = _operator_shape(settings)
    if parts == ["cache"] and not has_cache_part(variants):
        raise OptionError(f"the cache part measures methods that compress the cache, got {', '.join(variants)}: name one, such as --method snapkv")
    if args.dry_run:
        print_settings(settings)
        return 0
    runs_model = bool(set(parts) & {"ttft", "decode", "cache"})
    if runs_model:
        check_model(settings["model"])
    dtype, reason = choose_dtype(settings["dtype"], settings["device"])
    result: dict[str, Any] = {"latency": [], "notices": [], "limits": []}
    with new_folder("bench", settings["out"]) as folder:
        if runs_model:
            loaded = load(settings, dtype, reason)
            result |= describe_run("bench", f"{loaded.name}: latency against both dense baselines", loaded, settings, dtype_reason=reason)
            prompts = _prompts(loaded, lengths, settings["seed"])
            result["notices"] = check_variants(loaded.model, variants)
            result["limits"] = ["Prompts are prose with four facts in it: text of another kind has another density, and so another speed."]
            result |= measure(loaded, variants, prompts, parts, settings)
        else:
            result |= describe_run("bench", "The attention operator against both dense baselines", None, settings, dtype_reason=reason)
        if "operator" in parts:
            result |= measure_operator(lengths, shape, dtype, settings)
        print_result(result)
        finish_run(folder, result)
    return 0


def measure_operator(lengths: Sequence[int], shape: OperatorShape, dtype: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the attention operator alone, on random inputs, and what was measured in a line."""
    from accel.evals.models import torch_dtype
    from accel.evals.operator_bench import operator_table

    rows = []
    with progress_bar(len(lengths)) as progress:
        for n_tokens in lengths:
            progress(f"operator, {n_tokens} tokens")
            rows += operator_table(
                [n_tokens], shape.densities, heads=shape.heads, head_dim=shape.head_dim, dtype=torch_dtype(dtype),
                repeats=settings["repeats"], seed=settings["seed"],
            )  # fmt: skip
    heads = f"{shape.heads[0]} query and {shape.heads[1]} key heads of {shape.head_dim}"
    about = f"{dtype}, {heads}, batch 1, random blocks of 128 with sink and own block"
    return {"operator": rows, "operator_about": about}


def measure(loaded: LoadedModel, variants: Variants, prompts: Mapping[int, Any], parts: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the parts that run the model, and how memory was measured. prompts: ids (1, L) by length."""
    from accel.evals.latency import count_passes, measure_decode, measure_ttft, memory_note

    functions: dict[str, Callable[..., list[LatencyRow]]] = {
        "ttft": measure_ttft,
        "decode": partial(measure_decode, steps=settings["decode_steps"]),
    }
    timed = [function for part, function in functions.items() if part in parts]
    rounds = {"repeats": settings["repeats"], "warmup": settings["warmup"]}
    rows: list[LatencyRow] = []
    cache: list[dict[str, Any]] = []
    if timed:
        with progress_bar(len(timed) * len(prompts) * count_passes(loaded.model, variants, **rounds)) as progress:
            for function in timed:
                for ids in prompts.values():
                    rows += function(loaded.model, ids, variants, **rounds, progress=progress)
    if "cache" in parts and has_cache_part(variants):
        from accel.evals.decoder_bench import measure_cache

        with progress_bar(len(prompts) * settings["repeats"] * count_passes(loaded.model, variants, repeats=1, warmup=0)) as progress:
            for ids in prompts.values():
                held = measure_cache(loaded.model, ids, variants, repeats=settings["repeats"], chunk=settings["chunk"], progress=progress)
                cache += [row.as_dict() for row in held]
    how = {"memory_how": memory_note(loaded.model)} if cache or (rows and settings["warmup"]) else {}
    return {"latency": [row.as_dict() for row in rows], **({"cache_memory": cache} if cache else {}), **how}


def has_cache_part(variants: Variants) -> bool:
    """Whether a variant compresses its cache; without one there is nothing to tell of caches."""
    from accel.evals.decoder_cache import is_compressing

    return any(map(is_compressing, variants.values()))


def check_variants(model: Any, variants: Variants) -> list[str]:
    """Puts every variant on once and takes it off, so that one that cannot work fails before any measuring. Returns what users must know."""
    import accel
    from accel.evals.latency import quiet_notices

    notices = []
    for label, methods in variants.items():
        with quiet_notices(), accel.apply(model, *methods) as handle:
            notices += handle.notices
            if handle.skipped_layers:
                reasons = ", ".join(sorted(set(handle.skipped_layers.values())))
                notices.append(f"{label}: {len(handle.skipped_layers)} layers stay as they are ({reasons})")
    return list(dict.fromkeys(notices))


def print_result(result: Mapping[str, Any]) -> None:
    """The tables on stdout."""
    from accel.cli.table import print_table
    from accel.evals.report.sections import METRIC_TITLES, latency_table, operator_table

    for metric, title in METRIC_TITLES.items():
        rows = [row for row in result["latency"] if row["metric"] == metric]
        if rows:
            table = latency_table(rows)
            print_table(table.headers, table.rows, title=title, text_columns=table.text_columns)
    if result.get("cache_memory"):
        from accel.evals.report.caches import bench_table

        table = bench_table(result["cache_memory"])
        print_table(table.headers, table.rows, title="Cache and memory", text_columns=table.text_columns)
    if result.get("operator"):
        table = operator_table(result["operator"])
        print_table(table.headers, table.rows, title=f"Attention operator alone ({result['operator_about']})", text_columns=table.text_columns)
    for notice in result["notices"]:
        print(notice)


def _operator_shape(settings: Mapping[str, Any]) -> OperatorShape:
    """Raises OptionError for settings that the operator benchmark cannot run."""
    heads, densities = _numbers(settings, "heads"), _numbers(settings, "densities")
    if len(heads) != 2 or any(n != int(n) or n < 1 for n in heads) or heads[0] % heads[1]:
        raise OptionError(f"--heads takes query heads and key heads, the first a multiple of the second, as 8,2; got {settings['heads']!r}")
    if not all(0.0 < d <= 1.0 for d in densities):
        raise OptionError(f"--densities are shares in (0, 1], as 0.25,0.1; got {settings['densities']!r}")
    if "operator" in _parts(settings) and settings["device"] != "cpu":
        raise OptionError(f"the operator part runs on the cpu in this release, got --device {settings['device']}; pass --what ttft,decode")
    return OperatorShape((int(heads[0]), int(heads[1])), settings["head_dim"], densities)


def _numbers(settings: Mapping[str, Any], key: str) -> list[float]:
    given = settings[key]
    try:
        return [float(item) for item in (given if isinstance(given, list) else str(given).split(","))]
    except ValueError as error:
        raise OptionError(f"--{key} takes numbers separated by commas, got {given!r}") from error


def _parts(settings: Mapping[str, Any]) -> list[str]:
    asked = split_items(settings["what"])
    if not asked or not set(asked) <= set(PARTS):
        raise OptionError(f"--what knows {', '.join(PARTS)}; got {', '.join(part for part in asked if part not in PARTS) or 'nothing'}")
    return asked


def _prompts(loaded: LoadedModel, lengths: Sequence[int], seed: int) -> dict[int, Any]:
    """Ids (1, L) by length: real text, since what a method selects depends on it."""
    import torch

    from accel.evals.tasks import load_text_task

    if loaded.tokenizer is None:
        raise OptionError(f"{loaded.name} reads no text, so there is no prompt to be timed with")
    limit = loaded.max_positions
    if limit is not None and max(lengths) > limit:
        raise OptionError(f"{loaded.name} has {limit} positions, asked for {max(lengths)} tokens; pass --lengths up to {limit}")
    device = next(iter(loaded.model.parameters())).device
    samples = {n: load_text_task("needle").samples(loaded.tokenizer, n, 1, seed)[0] for n in lengths}
    return {n: torch.tensor([sample.input_ids], device=device) for n, sample in samples.items()}
