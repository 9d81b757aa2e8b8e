"""Lets tests and benchmarks import ``bench.shapes``.

The repository's root is never on ``sys.path``: there the folder ``kernels/`` would pass for the Hub's package of that
name, which transformers, TRL and bitsandbytes look for.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

folder = Path(__file__).parent / "bench"
spec = importlib.util.spec_from_file_location("bench", folder / "__init__.py", submodule_search_locations=[str(folder)])
assert spec is not None and spec.loader is not None
sys.modules["bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bench"])
