"""What runs at every ``import torch``: cheap, silent, and off when asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastft import autoload as module
from fastft import bridges


def python(code: str, **environment: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_cheap(tmp_path: Path) -> None:
    # torch calls it at the end of its own import; here it runs after `import torch`, to be timed alone.
    times = [
        float(
            python(
                "import torch, sys, time\n"
                f"sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}\n"
                "start = time.thread_time()\n"
                "from fastft.autoload import autoload\n"
                "autoload()\n"
                "print(1e3 * (time.thread_time() - start))\n"
                "assert sorted(m for m in sys.modules if m.startswith('fastft')) == ['fastft', 'fastft.autoload']\n",
                TORCH_DEVICE_BACKEND_AUTOLOAD="0",
            )
        )
        for _ in range(4)
    ]
    # The first run compiles the two files; of the others the best counts, since this machine does other things too.
    # Far above what it takes on an idle machine, far below what any heavy import takes.
    assert min(times[1:]) < 6.0, f"milliseconds: {times}"


def test_accelerate_takes_the_name_without_any_import_of_ours() -> None:
    out = python(
        "from accelerate.utils import TorchDynamoPlugin, DynamoBackend\n"
        "import sys\n"
        "print(TorchDynamoPlugin(backend='fastft').to_kwargs()['backend'], DynamoBackend('FASTFT').value)\n"
        "print('fastft.compiler' in sys.modules, [f for f in sys.meta_path if 'fastft.autoload' in repr(f)])\n"
        "import accelerate.utils.dataclasses as d\n"
        "print(type(d.__spec__.loader).__name__, type(d.__loader__).__name__)\n"
    )
    name, compiler, loader = out.splitlines()[-3:]
    assert name.lower() == "fastft fastft"
    # The import hook has left nothing behind.
    assert compiler == "False []"
    assert loader == "SourceFileLoader SourceFileLoader"


def test_switched_off() -> None:
    out = python(
        "import sys, torch\n"
        "print('fastft.bridges' in sys.modules)\n"
        "from accelerate.utils import DynamoBackend\n"
        "print('FASTFT' in DynamoBackend.__members__)\n",
        FASTFT_AUTOLOAD="0",
    )
    assert out.splitlines()[-2:] == ["False", "False"]


def test_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*names: str) -> None:
        raise RuntimeError("anything")

    monkeypatch.setattr(bridges, "install", broken)
    module._accelerate_imported(sys)
    monkeypatch.setattr(module, "when_imported", broken)
    module.autoload()


def test_a_mistyped_switch_does_not_break_the_import_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTFT_BRIDGES", "-nonsense")
    module.autoload()
    with pytest.raises(ValueError, match="nonsense"):
        bridges.install()
