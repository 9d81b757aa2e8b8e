"""One file for each op: maths, reference, Triton forward and backward, op, cost. ``fastft.kernels.load()`` imports
them all.
"""

from __future__ import annotations

import importlib
import pkgutil

from fastft.kernels._op import OPS, Op


def load() -> dict[str, Op]:
    """Import every op's file (a name without a leading underscore) and return the ops by name."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return OPS
