"""The `accel` command. Each sub-command is one file in this folder: `HELP`, `add_arguments(parser)` and `main(args) -> int`.

A name of two words is a file with "_" between them: `accel bench serve` is bench_serve.py.
One with `TAKES_MORE = True` gets the words that its parser does not know, in their order, as `args.more`.

The files are read, not imported, to list them; only the chosen one is imported. So help appears at once, whatever a sub-command needs.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from accel import __version__
from accel.errors import AccelError
from accel.settings import is_debugging

EXIT_FAILED = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one sub-command and returns its exit code: 0 only when everything asked for was done."""
    words = _joined(list(sys.argv[1:] if argv is None else argv))
    try:
        parser = _parser(words)
        args, more = parser.parse_known_args(words)
        if more and not args.takes_more:
            parser.error(f"unrecognized arguments: {' '.join(more)}")
        code: int = args.run(argparse.Namespace(**vars(args), more=more))
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
        return 1
    except OSError as error:        # a full disk, a file that cannot be written
        return _failed(error, str(error))
    return code


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


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The command line; options are added to the chosen sub-command only."""
    parser = argparse.ArgumentParser(
        prog="accel",
        description="Sparse attention and visual-token pruning for Hugging Face models: one call, reversible, dense where sparse would be slower.",
        epilog="accel COMMAND --help explains a command. Start with: accel demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"accel {__version__}")
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    for name, line in commands().items():
        as_help = line.replace("%", "%%")
        command = choices.add_parser(name, help=as_help, description=line, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = importlib.import_module(f"accel.cli.{name.replace(' ', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.main, takes_more=getattr(module, "TAKES_MORE", False))
    return parser


def _failed(error: Exception, message: str) -> int:
    if is_debugging():
        traceback.print_exception(error)
    else:
        print(f"accel: {message}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
