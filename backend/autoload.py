"""Runs while torch is being imported (entry point group ``torch.backends``): imports nothing heavy and
cannot raise.

It is there for one bridge. accelerate refuses the name of a backend that it does not know before torch is asked for it,
so that bridge has to be laid before any model is compiled; all the others wait until torch looks the backend up.
``FASTFT_AUTOLOAD=0`` turns it off. The import hook that the bridges use is here as well, so that this is the only file
that ``import torch`` loads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def autoload() -> None:
    """Let accelerate know the backend's name, once accelerate is imported."""
    if os.environ.get("FASTFT_AUTOLOAD", "1") == "0":
        return
    try:
        when_imported("accelerate.utils.dataclasses", _accelerate_imported)
    except Exception:  # torch makes an error here an error of `import torch`.
        return


def _accelerate_imported(module: ModuleType) -> None:
    try:
        from fastft import bridges

        bridges.install("accelerate_backend")
    except Exception:  # This is inside `import accelerate`; torch.compile will say what is wrong.
        return


Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once, right after module ``name`` ran, or now if it did.

    ``callback`` must not raise: it would break somebody's import.
    """
    module = sys.modules.get(name)
    # A module that is being imported right now is in sys.modules too, with a body that may not have run to its end.
    if module is not None and (name in _FINDER.ran or not getattr(module.__spec__, "_initializing", False)):
        callback(module)
        return
    _FINDER.waiting.setdefault(name, []).append(callback)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder:
    """First on ``sys.meta_path`` while something is waited for. Wraps the loader that the other finders found."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callback]] = {}
        self.ran: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self.waiting:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, spec)  # type: ignore[assignment]
                return spec
        return None

    def imported(self, module: ModuleType) -> None:
        self.ran.add(module.__name__)
        callbacks = self.waiting.pop(module.__name__, [])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        for callback in callbacks:
            callback(module)


class _Loader:
    """The module's own loader, with the callbacks after ``exec_module``. Takes itself out of the module before its
    body runs.
    """

    def __init__(self, loader: Any, spec: ModuleSpec) -> None:
        self.loader, self.spec = loader, spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.spec.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        _FINDER.imported(module)


_FINDER = _Finder()
