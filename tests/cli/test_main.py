"""The command line: quick help for every sub-command, one line for a user's mistake, and the right exit code."""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import accel
from accel.cli import main as cli

FOLDER = Path(cli.__file__).parent
ROOT = FOLDER.parent.parent
COMMANDS = sorted(cli.commands())
HEAVY = ("torch", "transformers", "triton", "datasets", "matplotlib", "optuna", "yaml", "numpy")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "accel", *words], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def write_command(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Adds a sub-command `toy` whose `main` is `body`."""
    monkeypatch.setattr("accel.cli.__path__", [*accel.cli.__path__, str(folder)])
    (folder / "toy.py").write_text(f"def add_arguments(parser):\n    parser.add_argument('--n')\n\ndef main(args):\n    {body}\n")
    monkeypatch.setattr(cli, "commands", lambda: {"toy": "a 50 % toy"})
    monkeypatch.delitem(sys.modules, "accel.cli.toy", raising=False)


def test_the_issue_s_commands_are_there() -> None:
    assert {"bench", "bench serve", "demo", "env", "inspect", "ls", "run", "serve", "tune"} <= set(COMMANDS)
    assert all(line and len(line) < 110 for line in cli.commands().values()), "one line of help each"


def test_files_without_add_arguments_are_no_commands(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("HELP = 'first'\ndef add_arguments(parser): ...")
    (tmp_path / "two.py").write_text('"""Second.\n\nMore."""\ndef add_arguments(parser): ...')
    (tmp_path / "helper.py").write_text("# def add_arguments(\ndef add_model_arguments(parser): ...")
    assert cli.commands(tmp_path) == {"one": "first", "two": "Second."}


def test_a_command_of_two_words_is_not_taken_for_the_first() -> None:
    found = run("bench", "serve", "--help").stdout
    assert found.startswith("usage: accel bench serve")
    assert run("bench", "--help").stdout.startswith("usage: accel bench [-h]")


@pytest.mark.parametrize("words", [["--help"], *[[name, "--help"] for name in COMMANDS]], ids=" ".join)
def test_help_imports_nothing_heavy_and_ends_with_a_line_to_copy(words: list[str]) -> None:
    code = (
        "import sys\nfrom accel.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert end.code == 0\nprint(*sys.modules, file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    loaded = {name.split(".")[0] for name in found.stderr.split()}
    assert loaded.isdisjoint(HEAVY)
    assert found.stdout.rstrip().splitlines()[-1].strip().split("Start with: ")[-1].startswith("accel ")
    if words == ["--help"]:
        assert all(re.search(rf"^    {name}\s", found.stdout, re.MULTILINE) for name in COMMANDS)


def test_help_takes_less_than_half_a_second() -> None:
    def seconds() -> float:
        start = time.process_time() + sum(os.times()[2:4])
        assert run("--help").returncode == 0
        return time.process_time() + sum(os.times()[2:4]) - start

    # processor time, which a busy machine does not stretch as it does the clock
    assert statistics.median(seconds() for _ in range(3)) < 0.5


def test_every_command_is_written_the_same_way() -> None:
    for name in COMMANDS:
        file = FOLDER / f"{name.replace(' ', '_')}.py"
        functions = {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
        assert {"add_arguments", "main"} <= functions


def test_version_is_the_packages() -> None:
    assert run("--version").stdout == f"accel {accel.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "COMMAND"), (["benhc"], "there is no command 'benhc'; did you mean 'bench'?"), (["ls", "--jsn"], "--jsn")],
    ids=["none", "typo", "option"],
)
def test_wrong_words_are_explained_with_exit_code_2(words: list[str], message: str) -> None:
    found = run(*words)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        (["run", "--smaples", "3"], "accel run: error: unrecognized arguments: --smaples 3; did you mean --samples?"),
        (["bench", "--lenghts=4k", "--waht", "ttft"], "unrecognized arguments: --lenghts=4k --waht ttft; did you mean --lengths --what?"),
        (["env", "smollm2"], "accel env: error: unrecognized arguments: smollm2"),
    ],
    ids=["flag", "two", "word"],
)
def test_a_mistyped_flag_gets_the_usage_of_its_command_and_the_nearest_one(words: list[str], ending: str) -> None:
    found = run(*words)
    assert found.returncode == 2
    assert found.stderr.startswith(f"usage: accel {words[0]} [-h]")
    assert found.stderr.endswith(f"{ending}\n")


def test_no_words_show_all_commands_and_where_to_begin() -> None:
    found = run()
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.endswith("Start with: accel demo\n")


def test_user_s_mistake_is_one_line_without_a_traceback() -> None:
    found = run("tune", "flexprefil")
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("accel: no method is called 'flexprefil'; did you mean 'flexprefill'?")
    assert found.stderr.count("\n") == 1


def test_accel_debug_shows_the_traceback() -> None:
    found = run("tune", "flexprefil", ACCEL_DEBUG="1")
    assert found.returncode == 2
    assert "Traceback" in found.stderr
    assert "OptionError" in found.stderr
    assert "Traceback" not in run("tune", "flexprefil", ACCEL_DEBUG="0").stderr


def test_exit_code_of_the_command_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_command(tmp_path, monkeypatch, "print(args.n); return 3")
    assert cli.main(["toy", "--n", "x"]) == 3
    assert capsys.readouterr().out == "x\n"


def test_percent_sign_in_help_is_no_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_command(tmp_path, monkeypatch, "return 0")
    for words in (["--help"], ["toy", "--help"]):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "a 50 % toy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("KeyboardInterrupt", 130, "accel: interrupted"),
        ("ModuleNotFoundError(name='optuna')", 2, "needs the package 'optuna'. `pip install 'accel-inference[demo]'`"),
        ("__import__('accel.errors').errors.UnsupportedError('no way:', ['one', 'two'])", 2, "accel: no way:\n  - one\n  - two"),
    ],
    ids=["interrupted", "package_missing", "unsupported"],
)
def test_error_has_its_exit_code_and_message(
    error: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_command(tmp_path, monkeypatch, f"raise {error}")
    assert cli.main(["toy"]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", ["ModuleNotFoundError(name='accel.oops')", "ZeroDivisionError"], ids=["own_module", "bug"])
def test_bug_of_ours_is_never_hidden(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_command(tmp_path, monkeypatch, f"raise {error}")
    with pytest.raises((ModuleNotFoundError, ZeroDivisionError)):
        cli.main(["toy"])


@pytest.mark.parametrize("words", [["ls", "--notes"], ["run", "--help"], ["--version"]], ids=" ".join)
def test_reader_that_goes_away_ends_the_command_quietly(words: list[str]) -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "accel", *words]
    pipe = subprocess.Popen(command, cwd=ROOT, env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert pipe.stdout is not None
    assert pipe.stderr is not None
    pipe.stdout.close()
    assert pipe.stderr.read() == ""
    assert pipe.wait(timeout=120) == 141, "as a program that SIGPIPE ended"


