"""`accel serve`: vLLM's OpenAI-compatible server with methods in its engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from accel.cli.options import add_method_argument
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.protocols import Method

HELP = "an OpenAI-compatible server: vLLM with methods in its engine, refused where a worker does not run them"

# words that are not ours go on to vLLM
TAKES_MORE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "accel serve MODEL [--method NAME[:OPTION=VALUE,…] | --recipe FILE] [--dry-run] [any flag of vllm serve]"
    # the beginning of a flag of vLLM's may be one of ours
    parser.allow_abbrev = False
    add_method_argument(parser, "repeatable: several methods stand together")
    parser.add_argument("--recipe", help="a recipe file, instead of --method")
    dry = "check everything that can be checked without weights, print what accel adds to vLLM's options"
    parser.add_argument("--dry-run", action="store_true", help=dry)
    parser.epilog = (
        "MODEL is what vLLM takes, or an embedded model (smollm2). Without a method vLLM serves as it is, the dense baseline.\n"
        "vLLM's own flags: vllm serve --help=all. Counters are in /metrics, names beginning with accel_.\n\n"
        "examples:\n  accel serve smollm2 --method flexprefill:min_budget=256,min_seq_len=1024 --max-model-len 4096 --port 8000\n"
        "  accel serve llava-hf/llava-1.5-7b-hf --method fastervlm:keep=0.25 --method flexprefill --dry-run"
    )


def main(args: argparse.Namespace) -> int:
    """Serves until it is told to end; 0 then. What is wrong without vLLM is told first, what is wrong with the model before weights are loaded."""
    methods = given_methods(args.method, args.recipe)
    if not any(not word.startswith("-") or word.startswith(("--model=", "--config=")) for word in args.more):
        raise OptionError("name the model to serve, as in: accel serve smollm2 --method powerattention")
    from accel.patches.hosts.vllm.launch import serve

    return serve(args.more, methods, is_dry_run=args.dry_run)


def given_methods(method: list[str] | None, recipe: str | None) -> list[Method]:
    """The methods of the flags --method and --recipe; none without either. UnsupportedError for those that vLLM runs in no model."""
    if method and recipe:
        raise OptionError("--method and --recipe do not go together: write the methods into the recipe")
    if not method and not recipe:
        return []
    from accel.cli.options import parse_method
    from accel.patches.hosts.vllm.checks import check_methods
    from accel.recipe import Recipe

    methods = [parse_method(text) for text in method] if method else list(Recipe.load(str(recipe)).methods)
    check_methods(methods)
    return methods
