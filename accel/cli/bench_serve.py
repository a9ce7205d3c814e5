"""`accel bench serve`: vLLM's own serving benchmark against a dense and a patched server, in one report."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from accel.cli.options import add_method_argument
from accel.errors import OptionError

if TYPE_CHECKING:
    from accel.protocols import Method

HELP = "vLLM's own serving benchmark against a dense and a patched server with the same prompts, in one report"

# words that are not ours go on to vLLM's client
TAKES_MORE = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "accel bench serve --model MODEL [--method NAME[:OPTION=VALUE,…]] [--server FLAGS] [any flag of vllm bench serve]"
    parser.allow_abbrev = False
    parser.add_argument("--model", default="smollm2", help="what vLLM takes, or an embedded model (default: smollm2)")
    usual = "repeatable: one more server each (default: the model's recipe)"
    add_method_argument(parser, usual)
    parser.add_argument("--recipe", help="a recipe file, served as one more variant")
    parser.add_argument("--server", default="", metavar="FLAGS", help="flags of vllm serve for all servers, in one quoted word")
    parser.add_argument("--port", type=int, help="of the servers, which run one after the other (default: a free one)")
    parser.add_argument("--out", help="folder for the results (default: runs/<date>-bench-serve)")
    parser.epilog = (
        "The client's flags (--num-prompts, --random-input-len, --request-rate, --dataset-name, …): vllm bench serve --help.\n\n"
        "example:\n  accel bench serve --model smollm2 --method flexprefill:min_budget=256,min_seq_len=1024 --server '--max-model-len 4096' "
        "--num-prompts 16 --random-input-len 3000"
    )


def main(args: argparse.Namespace) -> int:
    """Measures, prints the table and writes the run folder. 0 where every request of every server was answered, 1 otherwise."""
    from accel.cli.measuring import finish_run, new_folder
    from accel.cli.options import read_variants
    from accel.cli.table import print_table
    from accel.evals.report.serving import serving_table
    from accel.patches.hosts.vllm import compat
    from accel.patches.hosts.vllm.checks import check_methods

    variants = read_variants({"method": args.method, "recipe": args.recipe, "model": args.model})
    for methods in variants.values():
        check_methods(methods)
    compat.require_vllm()
    try:
        server = shlex.split(args.server)
    except ValueError as error:
        raise OptionError(f"--server takes flags as a shell does, got {args.server!r}: {error}") from error
    from accel.patches.hosts.vllm.bench import measure

    with new_folder("bench-serve", args.out) as folder:
        rows = measure(args.model, variants, server=server, client=args.more, folder=folder, port=args.port)
        result = _result(args, variants, rows, server=server)
        table = serving_table(result["serving"])
        print_table(table.headers, table.rows, title=result["title"], text_columns=table.text_columns)
        print("\n".join(result["notices"]))
        finish_run(folder, result)
    return 0 if all(row["completed"] == row["asked"] for row in rows) else 1


def _result(
    args: argparse.Namespace, variants: Mapping[str, Sequence[Method]], rows: Sequence[Mapping[str, Any]], *, server: Sequence[str]
) -> dict[str, Any]:  # fmt: skip
    from accel.cli.measuring import describe_run
    from accel.patches.hosts.vllm import compat
    from accel.protocols import SparseAttention

    plain = {label: [{m.method_name(): m.changed_options()} for m in methods] for label, methods in variants.items()}
    config = {"command": "bench serve", "model": args.model, "methods": plain, "server": list(server), "client": list(args.more)}
    found = describe_run("bench serve", f"{args.model}: vLLM's serving benchmark, dense and patched", None, config, dtype_reason="vLLM's own choice")
    found["env"]["vllm"] = compat.vllm_version()
    notices = [f"{label}: {notice}" for label, methods in variants.items() for m in methods if (notice := m.needs_training)]
    sparse = {label for label, methods in variants.items() if any(isinstance(m, SparseAttention) for m in methods)}
    notices += [
        f"{row['label']}: nothing ran sparse; this compares dense with dense (prompts shorter than min_seq_len, or options that keep everything)"
        for row in rows if row["label"] in sparse and not row.get("sparse_calls")
    ]  # fmt: skip
    limits = [
        "Servers ran one after the other, each once: what else the machine did meanwhile is in the numbers.",
        "vLLM's random prompts are random tokens, which attend to nothing in particular: text has another density, and so another speed.",
    ]
    if (workers := max(row.get("workers", 1) for row in rows)) > 1:
        limits.append(f"Attention calls are added up over {workers} workers, each of which has its own heads or layers; visual tokens are not.")
    # texts are in the clients' files
    serving = [{key: value for key, value in row.items() if key != "texts"} for row in rows]
    return {**found, "serving": serving, "notices": list(dict.fromkeys(notices)), "limits": limits}
