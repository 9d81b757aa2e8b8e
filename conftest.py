"""Lets tests and benchmarks import ``bench.shapes``.

The repository's root is never on ``sys.path``: there the folder ``kernels/`` would pass for the Hub's package of that
name, which transformers, TRL and bitsandbytes look for.

And keeps PyTorch from Intel's AMX, where a bf16 product of more than 32 terms, and no multiple of 32, multiplies what
lies behind a row by zero: NaN, if that is what lies there (https://github.com/uxlfoundation/oneDNN/issues/5717).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # before torch is imported

folder = Path(__file__).parent / "bench"
spec = importlib.util.spec_from_file_location("bench", folder / "__init__.py", submodule_search_locations=[str(folder)])
assert spec is not None and spec.loader is not None
sys.modules["bench"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["bench"])
