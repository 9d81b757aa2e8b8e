"""What docs/new-kernel.md promises: a kernel touches four files."""

from __future__ import annotations

from pathlib import Path

from bench.shapes import REAL_SIZES, shapes
from fastft import patterns

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("autotune", "backend", "bench", "examples", "kernels", "patterns", "tests")
#: The example.
OP = "squared_relu"


def test_the_example_is_in_four_files() -> None:
    this = Path(__file__).resolve()
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".toml") and path != this and OP in path.read_text(encoding="utf-8")
    }
    assert found == {
        f"kernels/{OP}.py",
        "patterns/mlp.py",
        f"tests/kernels/test_{OP}.py",
        "bench/shapes.py",
    }


def test_the_page_names_them() -> None:
    page = (ROOT / "docs" / "new-kernel.md").read_text(encoding="utf-8")
    for file in (f"kernels/{OP}.py", "patterns/mlp.py", f"tests/kernels/test_{OP}.py", "bench/shapes.py"):
        assert file in page, file


def test_its_row_is_one_of_the_table() -> None:
    (table,) = (t for t in patterns.tables() if t.name == "mlp")
    assert sum(OP in rule.build.__name__ for rule in table.rows) == 2  # the square as an operation, and as a product


def test_the_benchmark_has_its_sizes() -> None:
    assert len(shapes(OP, tag="real")) == REAL_SIZES and shapes(OP, tag="test")
