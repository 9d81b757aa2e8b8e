"""Run pytest with one mistake in one of fastft's files: ``python tests/mutation/_inject.py FILE OLD NEW [ARGUMENTS]``.

Nothing on disk changes: when the file's module is imported, a copy with the mistake is, from a temporary folder, where
Triton and ``inspect`` find its source too. Compiler caches are a folder of its own: their keys hash the sources that
are on disk.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: pytest knows 0 to 5.
NOT_IMPORTED, STALE = 90, 91


def module_name(file: str) -> str:
    """``kernels/glu.py`` is ``fastft.kernels.glu``, ``backend/bridges/trl_head.py`` is ``fastft.bridges.trl_head``."""
    parts = Path(file).with_suffix("").parts
    return ".".join(("fastft", *(parts[1:] if parts[0] == "backend" else parts)))


class Injector:
    """Finds one module, in another place than it is."""

    def __init__(self, name: str, copy: Path) -> None:
        self.name, self.copy, self.found = name, copy, False

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        self.found = True
        return importlib.util.spec_from_file_location(name, self.copy)


def main(file: str, old: str, new: str, *arguments: str) -> int:
    source = (ROOT / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        print(f"{file} has {source.count(old)} times: {old}")
        return STALE
    with tempfile.TemporaryDirectory(prefix="fastft-mutant-") as folder:
        for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
            os.environ[cache] = os.path.join(folder, cache)
        copy = Path(folder, Path(file).name)
        copy.write_text(source.replace(old, new), encoding="utf-8")
        injector = Injector(module_name(file), copy)
        sys.meta_path.insert(0, injector)  # type: ignore[arg-type]
        import pytest

        code = int(
            pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=line", *arguments])
        )
        return code if injector.found else NOT_IMPORTED


if __name__ == "__main__":
    # Python put this file's folder first on the path; the repository's root is not to be there either.
    del sys.path[0]
    os.chdir(ROOT)
    sys.exit(main(*sys.argv[1:]))
