"""What runs under the kernel tests: the Triton kernels on a GPU or, with TRITON_INTERPRET=1, in the interpreter;
PyTorch bodies otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from fastft.kernels._op import INTERPRET
from fastft.kernels._triton import HAS_TRITON

if INTERPRET and HAS_TRITON:
    from tests.kernels._interpreter import repair

    repair()


# For test_fuzz.py: "short" runs the same cases each time, --hypothesis-profile long new ones.
_ANY: dict[str, Any] = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
_ANY["phases"] = [Phase.explicit, Phase.generate]
settings.register_profile("short", max_examples=24 if INTERPRET else 240, derandomize=True, **_ANY)
settings.register_profile("long", max_examples=500 if INTERPRET else 3_000, **_ANY)
settings.load_profile("short")


def pytest_report_header() -> str:
    body = "Triton on CUDA" if torch.cuda.is_available() else "Triton's interpreter" if INTERPRET else "PyTorch bodies"
    return f"fastft kernels: {body}"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
