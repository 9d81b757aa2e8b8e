"""What runs under the kernel tests: the Triton kernels on a GPU or, with TRITON_INTERPRET=1, in the interpreter;
PyTorch bodies otherwise."""

from __future__ import annotations

import pytest
import torch

from fastft.kernels import _attention_routes as routes
from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON

if INTERPRET and HAS_TRITON:
    from tests.kernels._interpreter import repair

    repair()


def pytest_report_header() -> str:
    body = "Triton on CUDA" if torch.cuda.is_available() else "Triton's interpreter" if INTERPRET else "PyTorch bodies"
    return f"fastft kernels: {body}"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests evenly among the others: pytest-xdist gives a worker what lies side by side."""
    long = [item for item in items if "test_fuzz.py::test_error_rule" in item.nodeid]
    rest = [item for item in items if item not in long]
    for i, item in enumerate(long):
        rest.insert(i * (len(rest) + 1) // len(long), item)
    items[:] = rest


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is computed by another kernel for what tests before it called."""
    monkeypatch.setattr(routes, "PLANS", routes.Plans())
