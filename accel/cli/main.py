"""The `accel` command. Each sub-command is one file in this folder: `HELP`, `add_arguments(parser)` and `main(args) -> int`.

A name of two words is a file with "_" between them: `accel bench serve` is bench_serve.py.
One with `TAKES_MORE = True` gets the words that its parser does not know, in their order, as `args.more`.

The files are read, not imported, to list them; only the chosen one is imported. So help appears at once, whatever a sub-command needs.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accel import __version__
from accel.errors import AccelError
from accel.settings import is_debugging

EXIT_FAILED = 2
EXIT_INTERRUPTED = 130
# of a program that SIGPIPE ended
EXIT_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code: 0 only when everything asked for was done."""
    try:
        try:
            return _run(_joined(list(sys.argv[1:] if argv is None else argv)))
        finally:
            # here, also for --help, which ends by SystemExit: while Python closes stdout, a reader that went away is an error that nobody catches
            # None where the caller closed it
            if sys.stdout is not None:
                sys.stdout.flush()
    except AccelError as error:
        return _failed(error, str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "accel":
            raise
        return _failed(error, f"this needs the package {error.name!r}. `pip install 'accel-inference[demo]'` brings all optional ones.")
    except KeyboardInterrupt:
        print("accel: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader went away (`accel ls | head`); without this Python complains once more while it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except OSError as error:        # a full disk, a file that cannot be written
        return _failed(error, str(error))


def _run(words: Sequence[str]) -> int:
    """The exit code of the sub-command in these words; all commands on stderr where there is none."""
    parser, command, module = _parser(words)
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_FAILED
    if not words[0].startswith("-") and words[0] not in commands():
        close = difflib.get_close_matches(words[0], commands(), n=1)
        parser.error(f"there is no command {words[0]!r}" + (f"; did you mean {close[0]!r}?" if close else "; accel --help lists them"))
    args, more = parser.parse_known_args(words)
    if more and not getattr(module, "TAKES_MORE", False):
        command.error(f"unrecognized arguments: {' '.join(more)}{_meant(command, more)}")
    args.more = more
    code: int = module.main(args)
    return code


def _meant(command: argparse.ArgumentParser, more: Sequence[str]) -> str:
    """A question after the flags that mistyped ones resemble; empty where none does."""
    known = re.findall(r"--[\w-]+", command.format_usage())
    close = [difflib.get_close_matches(word.partition("=")[0], known, n=1) for word in more if word.startswith("-")]
    names = " ".join(dict.fromkeys(name for found in close for name in found))
    return f"; did you mean {names}?" if names else ""


def commands(folder: Path | None = None) -> dict[str, str]:
    """Sub-commands and their one-line help, sorted: the files that define `add_arguments`."""
    found = {}
    for path in sorted((folder or Path(__file__).parent).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "add_arguments" for node in tree.body):
            found[path.stem.replace("_", " ")] = _help_line(tree)
    return found


def _joined(words: list[str]) -> list[str]:
    """The words of a command line, a command of two words as one of them."""
    name = " ".join(words[:2])
    return [name, *words[2:]] if name in commands() else words


def _help_line(tree: ast.Module) -> str:
    """The text of `HELP = "…"`, or else the first line of the docstring."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="HELP")], value=ast.Constant(value=str(text))):
                return text
    return (ast.get_docstring(tree) or "").split("\n", 1)[0]


def _parser(words: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser, Any]:
    """The command line, that of the chosen sub-command, and its module: the whole one and None where none is chosen.

    Options are added to the chosen sub-command only.
    """
    parser = argparse.ArgumentParser(
        prog="accel",
        description="Sparse attention and visual-token pruning for Hugging Face models: one call, reversible, dense where sparse would be slower.",
        epilog="accel COMMAND --help explains a command. Start with: accel demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accel {__version__}")
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    chosen_parser, module = parser, None
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, line in commands().items():
        as_help = line.replace("%", "%%")
        command = choices.add_parser(name, help=as_help, description=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            chosen_parser, module = command, importlib.import_module(f"accel.cli.{name.replace(' ', '_')}")
            module.add_arguments(command)
    return parser, chosen_parser, module


def _failed(error: Exception, message: str) -> int:
    if is_debugging():
        traceback.print_exception(error)
    else:
        print(f"accel: {message}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
