"""The example of docs/variants.md runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DOC = (Path(__file__).resolve().parents[2] / "docs" / "variants.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path: Path) -> None:
    files = dict(re.findall(r"```python title=(\S+)\n(.*?)```", DOC, re.S))
    assert [*files] == ["my_kernels.py", "use.py"]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    environment = {**os.environ, "FASTFT_CACHE_DIR": str(tmp_path / "cache")}
    found = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]


def test_the_order_is_the_functions() -> None:
    from fastft.autotune.database import select

    words = r"(?:explicit|tuned|shipped|heuristic)"
    order = re.findall(rf"^\s*\d\. \W*({words})", select.__doc__ or "", re.M)
    assert order == re.findall(rf"^\d\. \*\*({words})", DOC, re.M) == ["explicit", "tuned", "shipped", "heuristic"]
