"""The `accel` command. Each sub-command is one file in this folder: `HELP`, `add_arguments(parser)` and `main(args) -> int`.

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
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(words).parse_args(words)
        code: int = args.run(args)
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
    return code


def commands(folder: Path | None = None) -> dict[str, str]:
    """Sub-commands and their one-line help, sorted: the files that define `add_arguments`."""
    found = {}
    for path in sorted((folder or Path(__file__).parent).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "add_arguments" for node in tree.body):
            found[path.stem] = _help_line(tree)
    return found


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
            module = importlib.import_module(f"accel.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(run=module.main)
    return parser


def _failed(error: Exception, message: str) -> int:
    if is_debugging():
        traceback.print_exception(error)
    else:
        print(f"accel: {message}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
