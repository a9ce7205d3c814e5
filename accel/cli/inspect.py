"""`accel inspect`: the layers of a model, what each method would patch and why not, what its heads read, and which parts of a picture it keeps."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accel.cli.measuring import choose_dtype, describe_run, finish_run, new_folder, require_least, settle_threads
from accel.cli.options import add_machine_arguments, add_method_argument, parse_length, parse_method
from accel.errors import AccelError, OptionError, UnsupportedError
from accel.protocols import KVCompression, TokenPruning

if TYPE_CHECKING:
    from accel.evals.models import LoadedModel
    from accel.protocols import Method, ModelInfo

HELP = "layers of a model, what each method would patch and why not, and which blocks or parts of a picture it reads"

QUESTION = "What is in this picture?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="M", help="an embedded model (smollm2), a folder, or a hub id")
    shown = "show what its heads read in a prompt, what it keeps of --image, or of the cache of a model that draws; repeatable"
    add_method_argument(parser, shown)
    parser.add_argument("--image", type=Path, help="a picture: draw over it what each --method keeps (default: every token-pruning method)")
    parser.add_argument("--question", default=QUESTION, help=f"asked about the picture (default: {QUESTION})")
    parser.add_argument("--attention", action="store_true", help="with --image: plot what text and picture read in every layer")
    parser.add_argument("--tokens", default="4k", help="length of the prompt (default: 4k)")
    parser.add_argument("--prompt", type=Path, help="a text file as the prompt, cut to --tokens (default: prose of Python's help)")
    parser.add_argument("--heads", type=int, default=3, help="block maps per method, from the sparsest head to the densest (default: 3)")
    add_machine_arguments(parser)
    parser.set_defaults(dtype="auto", device="cpu")
    parser.add_argument("--out", help="folder for the report (default: runs/<date>-inspect)")
    parser.epilog = (
        "examples:\n  accel inspect smollm2 --method flexprefill:gamma=0.9,min_seq_len=0 --tokens 2k\n"
        "  accel inspect llava-hf/llava-1.5-7b-hf --image photo.jpg --question 'What is this?' --method fastervlm:keep=0.25 --attention\n"
        "  accel inspect small-var --method h2o:keep=0.3"
    )


def main(args: argparse.Namespace) -> int:
    """Prints the model and its layers, and what the methods do in it; writes a report. 0 unless a method named by --method cannot be applied."""
    settle_threads(args.threads)
    from accel.evals.models import load_model

    methods = [parse_method(text) for text in args.method or []]
    n_tokens = parse_length(args.tokens)
    _check_kinds(methods, args.image)
    require_least(vars(args), heads=1)
    if args.prompt is not None and not args.prompt.is_file():
        raise OptionError(f"there is no text file {args.prompt}")
    if args.attention and args.image is None:
        raise OptionError("--attention shows what text and a picture read: name one with --image")
    dtype, reason = choose_dtype(args.dtype, args.device)
    with new_folder("inspect", args.out) as folder:
        loaded = load_model(args.model, dtype=dtype, device=args.device)
        result = _found(args, loaded, methods, n_tokens, folder, dtype_reason=reason)
        print_result(result)
        finish_run(folder, result)
    return 0


def _found(args: argparse.Namespace, loaded: LoadedModel, methods: Sequence[Method], n_tokens: int, folder: Path, *, dtype_reason: str
           ) -> dict[str, Any]:  # fmt: skip
    """The result: facts, layers, and what the methods read or keep, whose pictures are written to the folder."""
    from accel.patching import host_for

    info = host_for(loaded.model).describe(loaded.model)
    is_drawing = info.scale_shapes is not None
    if is_drawing and args.prompt is not None:
        raise OptionError(f"{loaded.name} draws pictures and reads no prompt: leave --prompt out")
    _check_methods(loaded, methods)
    layers = [row for method in methods or registered() for row in layer_rows(loaded.model, method, info)]
    settings = {key: value if not isinstance(value, Path) else str(value) for key, value in vars(args).items() if key not in ("more", "command")}
    result = {
        **describe_run("inspect", f"{loaded.name}: what can be patched, and what is read", loaded, settings, dtype_reason=dtype_reason),
        "facts": facts(loaded, info),
        "layers": layers,
        "block_maps": [],
        "notices": [] if methods or args.image else [_nothing_shown(is_drawing)],
    }
    if args.image:
        from accel.evals.pictures.gallery import inspect_attention, inspect_picture

        if args.attention:
            result["attention"] = inspect_attention(loaded, args.image, args.question)
        chosen = methods or [method for method in registered() if isinstance(method, TokenPruning)]
        result |= inspect_picture(loaded, folder, chosen, args.image, args.question, must_apply=bool(methods))
    elif methods and is_drawing:
        from accel.evals.cache_inspection import inspect_caches

        print(f"drawing one picture dense and with {', '.join(method.method_name() for method in methods)}", file=sys.stderr)
        result |= inspect_caches(loaded, folder, methods)
    elif methods:
        prompt = prompt_ids(loaded, n_tokens, args.prompt)
        for method in methods:
            map_heads(loaded, method, prompt, args.heads, result)
    return result


def _check_kinds(methods: Sequence[Method], image: Path | None) -> None:
    """Raises OptionError where a method cannot show anything of what was given."""
    for method in methods:
        if isinstance(method, TokenPruning) and image is None:
            raise OptionError(f"{method.method_name()} drops parts of pictures: show it one with --image")
        if not isinstance(method, TokenPruning) and image is not None:
            raise OptionError(f"{method.method_name()} drops no parts of a picture: leave --image out to see what its heads read in a text")
    if image is not None and not image.is_file():
        raise OptionError(f"there is no picture {image}")


def _check_methods(loaded: LoadedModel, methods: Sequence[Method]) -> None:
    """Raises UnsupportedError for a method that the model cannot run, before anything is written."""
    import accel
    from accel.evals.latency import quiet_notices

    for method in methods:
        with quiet_notices(), accel.apply(loaded.model, method):
            pass


def _nothing_shown(is_drawing: bool) -> str:
    if is_drawing:
        return "no picture drawn: --method names a cache method whose budgets, heads and cache are shown"
    return "no block maps: --method names a method whose maps are drawn"


def registered() -> list[Method]:
    """Every registered method that runs with its defaults."""
    from accel.registry import build, method_names

    return [build(name) for name in method_names()]


def facts(loaded: LoadedModel, info: ModelInfo) -> dict[str, str]:
    """The model in a few lines."""
    n_parameters = sum(p.numel() for p in loaded.model.parameters())
    return {
        "model": f"{loaded.name} ({info.family}, {type(loaded.model).__name__})",
        "parameters": f"{n_parameters / 1e6:.1f} million, {info.dtype} on {info.device}",
        "attention": f"{info.n_layers} layers, {info.n_heads} query and {info.n_kv_heads} key heads of {info.head_dim}, runs "
        f"{getattr(loaded.model.config, '_attn_implementation', 'its own code')}",
        **_size_facts(info),
        "vision": ("yes, with [CLS]" if info.has_cls else "yes") if info.has_vision else "no",
    }


def _size_facts(info: ModelInfo) -> dict[str, str]:
    """How much the model reads, or draws."""
    if info.scale_shapes is None:
        return {"positions": str(info.max_positions or "not limited by the config")}
    sides = " ".join(str(height) if height == width else f"{height}×{width}" for height, width in info.scale_shapes)
    return {"scales": f"{sides}, {sum(height * width for height, width in info.scale_shapes)} tokens in all"}


def layer_rows(model: Any, method: Method, info: ModelInfo) -> list[dict[str, Any]]:
    """One row per run of layers of the same kind and fate, found by applying the method and taking it off again."""
    import accel
    from accel.evals.latency import quiet_notices

    try:
        with quiet_notices(), accel.apply(model, method) as handle:
            fate = {**dict.fromkeys(handle.patched_layers, ""), **handle.skipped_layers}
        if isinstance(method, KVCompression) and info.scale_shapes is not None:
            return _cache_rows(method, info)
    except AccelError as error:
        return [{"method": method.method_name(), "layers": "all", "type": "–", "patched": False, "reason": _why_not(error, method)}]
    if isinstance(method, TokenPruning):
        return _stage_rows(method, info)
    groups: dict[tuple[str, str, bool], list[int]] = {}
    for layer in range(info.n_layers):
        kind = info.layer_types[layer].replace("_", " ") if layer < len(info.layer_types) else "unknown"
        groups.setdefault((kind, fate.get(layer, "no attention that accel knows"), layer in handle.patched_layers), []).append(layer)
    return [
        {"method": method.method_name(), "layers": as_ranges(layers), "type": kind, "patched": is_patched, "reason": reason}
        for (kind, reason, is_patched), layers in groups.items()
    ]


def _why_not(error: AccelError, method: Method) -> str:
    """The reasons alone: which method cannot be applied stands in front of them already."""
    reasons = error.reasons if isinstance(error, UnsupportedError) and error.reasons else [str(error)]
    return " ".join("; ".join(reason.removeprefix(f"{method.method_name()}: ") for reason in reasons).split())


def _cache_rows(method: KVCompression, info: ModelInfo) -> list[dict[str, Any]]:
    """One row per run of layers of a next-scale model with equal budgets: what attention reads at the last scale, of each group of heads."""
    assert info.scale_shapes is not None
    bound, whole, last = method.bind(info), sum(height * width for height, width in info.scale_shapes), len(info.scale_shapes) - 1
    runs: dict[tuple[str, bool], list[int]] = {}
    for layer in range(info.n_layers):
        groups = [group for group in bound.groups(info, layer, step=last, n_entries=whole) if group.heads]
        texts = [f"{group.label} heads {as_ranges(group.heads)}: {min(group.budget, whole)} of {whole}".strip() for group in groups]
        runs.setdefault((f"{'; '.join(texts)} entries", all(group.budget >= whole for group in groups)), []).append(layer)
    return [
        {"method": method.method_name(), "layers": as_ranges(layers), "type": text, "patched": not keeps_all,
         "reason": "these options keep everything" if keeps_all else ""}
        for (text, keeps_all), layers in runs.items()
    ]  # fmt: skip


def _stage_rows(method: TokenPruning, info: ModelInfo) -> list[dict[str, Any]]:
    """One row per stage: the layers that run without what it drops."""
    stages = method.bind(info).stages(info)
    common = {"method": method.method_name(), "type": "visual tokens"}
    if not stages:
        return [{**common, "layers": "all", "patched": False, "reason": "these options keep everything"}]
    return [{**common, "layers": as_ranges(range(stage.layer or 0, info.n_layers)), "patched": True, "reason": ""} for stage in stages]


def as_ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] → "0–2, 5"; the numbers ascend."""
    # numbers of one run share their distance to their rank
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def prompt_ids(loaded: LoadedModel, n_tokens: int, file: Path | None) -> Any:
    """Token ids (1, n_tokens): the file's text, or prose with four facts in it. Raises OptionError where the model or the text is too short."""
    import torch

    from accel.evals.tasks import load_text_task

    if loaded.max_positions is not None and n_tokens > loaded.max_positions:
        raise OptionError(f"{loaded.name} has {loaded.max_positions} positions, asked for {n_tokens} tokens")
    if file is None:
        ids = list(load_text_task("needle").samples(loaded.tokenizer, n_tokens, 1, 0)[0].input_ids)
    else:
        ids = loaded.tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"][:n_tokens]
        if len(ids) < n_tokens:
            raise OptionError(f"{file} has {len(ids)} tokens, asked for {n_tokens}; pass --tokens {len(ids)}")
    return torch.tensor([ids], device=next(iter(loaded.model.parameters())).device)


def map_heads(loaded: LoadedModel, method: Method, prompt: Any, n_heads: int, result: dict[str, Any]) -> None:
    """Adds the method's block maps to the result, or a notice that says why there are none, or of a cache method what it dropped."""
    from accel.evals.block_maps import record_block_maps
    from accel.evals.latency import describe_method

    label = describe_method(method)
    print(f"reading {prompt.shape[1]} tokens with {label}", file=sys.stderr)
    if isinstance(method, KVCompression):
        from accel.evals.cache_inspection import report_of_prompt

        result["notices"].append(report_of_prompt(loaded, method, prompt))
        return
    found = record_block_maps(loaded.model, [method], prompt)
    if found.calls:
        result["block_maps"].append(found.as_dict(label, found.typical_heads(n_heads)))
    else:
        reasons = ", ".join(found.dense_calls) or "it plans no blocks"
        result["notices"].append(f"{label} ran dense in every layer at {prompt.shape[1]} tokens: {reasons}. min_seq_len=0 makes it sparse.")


def print_result(result: dict[str, Any]) -> None:
    """Facts, layers, densities and what was kept on stdout."""
    from accel.cli.table import print_table
    from accel.evals.report.pictures import attention_table
    from accel.evals.report.sections import layer_table, maps_table

    width = max(len(name) for name in result["facts"])
    print("\n".join(f"{name:<{width}}  {value}" for name, value in result["facts"].items()), end="\n\n")
    tables: list[Any] = [layer_table(result["layers"]), *([maps_table(result["block_maps"])] if result["block_maps"] else [])]
    if result.get("attention"):
        tables.append(attention_table(result["attention"]))
    for table in tables:
        print_table(table.headers, table.rows, text_columns=table.text_columns)
    for heads in result.get("heads", []):
        _print_heads(heads)
    for row in [*result.get("overlays", []), *result.get("pictures", [])]:
        print(f"{row['title']}: {row['caption']} {row['file']}")
    for notice in result["notices"]:
        print(notice)


def _print_heads(heads: Mapping[str, Any]) -> None:
    """A number of every head, and the first letter of its kind. heads: the fields of `HeadNumbers`, and the label of the method."""
    from accel.cli.table import print_table

    kinds = heads["kinds"] or [[""] * len(row) for row in heads["values"]]
    letters = {kind: kind[:1] for row in kinds for kind in row if kind}
    rows = [
        [str(layer), *(f"{value:.3g} {kind[:1]}".strip() for value, kind in zip(values, names, strict=True))]
        for layer, (values, names) in enumerate(zip(heads["values"], kinds, strict=True))
    ]
    legend = f" ({', '.join(f'{letter}: {kind}' for kind, letter in letters.items())})" if letters else ""
    headers = ["layer", *(f"head {i}" for i in range(len(heads["values"][0])))]
    print_table(headers, rows, title=f"{heads['title']} of {heads['label']}: {heads['caption']}{legend}", text_columns=())
