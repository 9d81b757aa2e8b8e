from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers whichever tests ran before."""
    torch.manual_seed(0)
