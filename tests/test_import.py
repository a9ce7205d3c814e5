"""`import accel` is light, and the type stub tells the truth about the names that appear only when they are used."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import accel

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "transformers", "triton", "vllm", "datasets", "matplotlib", "optuna", "scipy", "numpy", "yaml"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    printed = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(' '.join(sys.modules))"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert printed.returncode == 0, printed.stderr
    return {name.split(".")[0] for name in printed.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import accel",
        "from accel import Recipe, OptionError, Method, apply, Handle",
        "import accel.crossover, accel.registry, accel.tune.search, accel.cli.main",
    ],
    ids=["accel", "names", "modules"],
)
def test_importing_accel_loads_nothing_heavy(code: str) -> None:
    assert modules_after(code) & HEAVY == set()


def test_transformers_is_loaded_only_by_whoever_brings_a_model() -> None:
    loaded = modules_after("import accel\nfrom accel.registry import build, method_names\n[build(name) for name in method_names()]")
    assert loaded & (HEAVY - {"torch", "numpy"}) == set()


def test_importing_a_host_or_method_patches_nothing() -> None:
    code = """
from transformers import AttentionInterface, LlamaForCausalLM
before = (set(AttentionInterface().keys()), dict(vars(LlamaForCausalLM)))
import accel.patching
from accel.registry import build, method_names
[build(name) for name in method_names()], accel.patching.hosts()
assert before == (set(AttentionInterface().keys()), dict(vars(LlamaForCausalLM)))
"""
    modules_after(code)


def test_stub_is_what_the_generator_writes() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from write_stub import stub_text
    finally:
        sys.path.pop(0)
    assert (ROOT / "accel" / "__init__.pyi").read_text() == stub_text(), "run: make stub"


def test_every_name_in_the_stub_is_the_object_it_says() -> None:
    tree = ast.parse((ROOT / "accel" / "__init__.pyi").read_text())
    imported = [(node.module, name) for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
    assert {"apply", "Handle", "Recipe", "FlexPrefill", "PowerAttention"} <= {name.name for _, name in imported}
    for module, name in imported:
        assert name.asname == name.name, "a stub re-exports only `X as X`"
        home = __import__(str(module), fromlist=[name.name])
        assert getattr(accel, name.name) is getattr(home, name.name)


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy belongs to the newest environment only")
def test_stub_lets_a_type_checker_see_options_and_find_mistakes(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(
        "import accel\n"
        "reveal_type(accel.FlexPrefill().gamma)\n"
        "reveal_type(accel.apply(None, 'flexprefill').report())\n"
        "accel.FlexPrefill(gama=0.9)\n"
        "accel.aply\n"
    )
    found = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", str(script)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    lines = [line for line in found.stdout.splitlines() if "user.py" in line and "defined in" not in line]
    assert len(lines) == 4, found.stdout + found.stderr
    for line, expected in zip(lines, ['"float"', '"str"', 'Unexpected keyword argument "gama"', '"aply"'], strict=True):
        assert expected in line, line


def test_completion_offers_each_name_once_and_none_of_the_machinery() -> None:
    code = "import accel; accel.apply, accel.FlexPrefill; names = accel.__dir__(); print(len(names) - len(set(names)), *names)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert shown[0] == "0"
    assert {"apply", "FlexPrefill", "Recipe", "vllm"} <= set(shown)
    assert {"Any", "annotations", "importlib"}.isdisjoint(shown)
