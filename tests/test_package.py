"""The package: its map of folders, its entry points, what importing it costs, and what a wheel holds."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import fastft
import fastft.kernels

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
#: Folder in the repository → package. What pyproject.toml maps.
MAP = {"backend": "fastft", "patterns": "fastft.patterns", "kernels": "fastft.kernels", "autotune": "fastft.autotune"}

pytestmark = pytest.mark.skipif(not (ROOT / "Makefile").is_file(), reason="these look at the repository")


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_version_is_the_distributions() -> None:
    assert fastft.__version__ == importlib.metadata.version("fastft")


def test_importing_fastft_imports_nothing_heavy() -> None:
    # torch runs the autoload hook while it is being imported itself: that may need neither torch nor anything slow.
    heavy = "{'torch', 'triton', 'sympy', 'numpy', 'transformers', 'rich', 'typer'}"
    assert (
        run(f"import sys, fastft, fastft.autoload, fastft.bridges; print(sorted({heavy} & set(sys.modules)))") == "[]"
    )


def test_an_attribute_that_is_missing_names_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"'fastft' has no attribute 'nope'; it has .*report"):
        fastft.nope  # noqa: B018


def test_every_public_name_can_be_imported() -> None:
    assert all(getattr(fastft, name) is not None for name in fastft.__all__)


@pytest.mark.parametrize("group", ["torch_dynamo_backends", "torch.backends", "console_scripts"])
def test_entry_points_load(group: str) -> None:
    (entry,) = importlib.metadata.entry_points(group=group, name="fastft")
    assert callable(entry.load())


def test_torch_finds_the_backend_without_importing_it() -> None:
    code = "import sys, torch; print('fastft' in torch.compiler.list_backends(), 'fastft.compiler' in sys.modules)"
    assert run(code) == "True False"


def test_every_folder_with_code_is_in_the_package() -> None:
    listed = set(re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*)\]", PYPROJECT, re.M).group(1)))  # type: ignore[union-attr]
    found = set()
    for folder, package in MAP.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([package, *init.parent.relative_to(ROOT / folder).parts]))
    assert listed == found


def test_every_direct_dependency_is_pinned_for_ci() -> None:
    pinned = {
        requirement.name: str(requirement.specifier)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    wanted = {requirement.name for requirement in map(Requirement, importlib.metadata.requires("fastft") or [])}
    assert wanted <= pinned.keys()
    assert all(specifier.startswith("==") for specifier in pinned.values())


def test_dependencies_have_no_upper_bound() -> None:
    # An upper bound here would make pip move a user's torch or transformers down.
    for requirement in map(Requirement, importlib.metadata.requires("fastft") or []):
        assert all(specifier.operator in (">=", "!=") for specifier in requirement.specifier), requirement


def test_every_op_has_a_reference_a_cost_and_a_test_of_its_file() -> None:
    # Shapes and benchmarks of every op: tests/test_bench.py.
    for name, op in fastft.kernels.load().items():
        assert op.reference is not op.call, name
        assert op.cost is not None, name
        file = Path(inspect.getfile(op.reference))
        test = ROOT / "tests" / "kernels" / f"test_{file.stem}.py"
        assert test.is_file(), f"{name}: {test} is missing"
        assert f"{op.call.__name__}(" in test.read_text(encoding="utf-8"), f"{test} does not call {name}"


@pytest.mark.slow
def test_a_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in (*MAP, "examples", "bench", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("fastft-*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{file.relative_to(ROOT / folder)}"
        for folder, package in MAP.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed" or file.suffix == ".json"
    }
    assert names == expected


def test_the_readme_lists_every_pattern() -> None:
    from fastft.patterns import table_names

    listed = (ROOT / "README.md").read_text(encoding="utf-8").split("## What is replaced")[1].split("##")[0]
    assert not [name for name in table_names() if f"`{name}`" not in listed]
