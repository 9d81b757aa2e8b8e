"""fastft: a kernel-first ``torch.compile`` backend for fine-tuning stock models.

``torch.compile(model, backend="fastft")`` needs no import of this package. What is here is for looking at what the
backend did. Everything is loaded on first use, because ``torch.backends`` autoload imports this module while torch
itself is being imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "Options": "fastft.options",
    "Report": "fastft.reporting",
    "report": "fastft.reporting",
    "reports": "fastft.reporting",
    "explain": "fastft.explaining",
    "Verification": "fastft.verifying",
    "variants": "fastft.variants",
    "verify": "fastft.verifying",
}

__all__ = [*_LAZY, "__version__"]

if TYPE_CHECKING:
    from fastft import variants as variants
    from fastft.explaining import explain as explain
    from fastft.options import Options as Options
    from fastft.reporting import Report as Report
    from fastft.reporting import report as report
    from fastft.reporting import reports as reports
    from fastft.verifying import Verification as Verification
    from fastft.verifying import verify as verify


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'fastft' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    module = importlib.import_module(_LAZY[name])
    value = module if _LAZY[name] == f"fastft.{name}" and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
