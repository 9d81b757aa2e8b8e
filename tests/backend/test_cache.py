"""torch's compile caches across processes: used when nothing changed, missed when a formula did.

AOTAutograd's cache knows a function in a graph by its name only. Without a stamp, a process that starts after an edit
of a backward formula would get the old gradient out of the cache, silently.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import fastft
import fastft.autotune
import fastft.kernels
import fastft.patterns
from fastft.stamp import source_hash

PROGRAM = """
import json, torch, fastft
from torch._dynamo.utils import counters

def norm(x, weight):
    h = x.to(torch.float32)
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

torch.manual_seed(0)
x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(16, requires_grad=True)
def gradients(call):
    return [g.flatten().tolist() for g in torch.autograd.grad(call(x, weight).square().sum(), (x, weight))]

print(json.dumps({
    "file": fastft.__file__,
    "compiled": gradients(torch.compile(norm, backend="fastft", options={"strict": True})),
    "eager": gradients(norm),
    "sites": fastft.report().counts,
    "aot": dict(counters["aot_autograd"]),
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, to be edited."""
    root = tmp_path_factory.mktemp("copy")
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(fastft.__file__).parent, root / "fastft", ignore=leave)
    for part in (fastft.patterns, fastft.kernels, fastft.autotune):
        shutil.copytree(Path(part.__path__[0]), root / "fastft" / part.__name__.split(".")[1], ignore=leave)
    return root


def run(package: Path) -> dict[str, Any]:
    """What a new process gets, with the cache folder that they all share."""
    environment = os.environ | {
        "PYTHONPATH": str(package),
        "TORCHINDUCTOR_CACHE_DIR": str(package / "cache"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "OMP_NUM_THREADS": "1",
        # A .pyc is known by time (in seconds) and size: an edit right after the first run could be overlooked.
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, cwd=package, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert Path(result["file"]).is_relative_to(package)
    assert result["sites"] == {"rms_norm": 1}
    return result


def flat(gradients: list[list[float]]) -> list[float]:
    return [number for gradient in gradients for number in gradient]


def edit_backward(file: Path) -> None:
    """Make the op's gradient three times what it is."""
    source = file.read_text(encoding="utf-8")
    edited, times = re.subn(r"(    def backward\(ctx.*?, (\w+)\b[^)]*\).*?:\n)", r"\1        \2 = 3 * \2\n", source)
    assert times == 1
    file.write_text(edited, encoding="utf-8")


def test_the_stamp_changes_with_every_file(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastft.kernels, "__path__", [str(package / "fastft" / "kernels")])
    before = source_hash.__wrapped__()
    file = package / "fastft" / "kernels" / "glu.py"
    source = file.read_text(encoding="utf-8")
    file.write_text(source.replace("1.0 + g", "1.0 - g"), encoding="utf-8")
    assert source_hash.__wrapped__() != before
    file.write_text(source, encoding="utf-8")
    assert source_hash.__wrapped__() == before


@pytest.mark.slow
def test_an_edited_backward_is_never_stale(package: Path) -> None:
    first = run(package)
    assert flat(first["compiled"]) == pytest.approx(flat(first["eager"]), rel=1e-4, abs=1e-5)
    assert first["aot"]["autograd_cache_miss"] >= 1
    assert "autograd_cache_bypass" not in first["aot"]

    again = run(package)
    assert again["aot"]["autograd_cache_hit"] >= 1
    assert again["compiled"] == first["compiled"]

    edit_backward(package / "fastft" / "kernels" / "rms_norm.py")
    edited = run(package)
    assert edited["aot"].get("autograd_cache_hit", 0) == 0
    assert flat(edited["compiled"]) == pytest.approx([3 * n for n in flat(first["eager"])], rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_what_is_recomputed_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is the same, but for tags that torch's cache does not see."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    # Products alone, and no sum of gradients: there is no C++ to compile.
    given = [torch.randn(8, 8, requires_grad=True) for _ in range(3)]
    for recompute in ("asked", "never"):
        torch._dynamo.reset()
        counters.clear()
        call = torch.compile(
            lambda *xyz: checkpoint(lambda x, y, z: (x @ y) @ z, *xyz, use_reentrant=False),
            backend="fastft",
            options={"strict": True, "recompute": recompute},
        )
        call(*given).backward(torch.ones(8, 8))
        assert "autograd_cache_hit" not in counters["aot_autograd"], recompute
