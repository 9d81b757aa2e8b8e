"""Run a function when a module gets imported, or at once if it is imported already. Imports nothing but the standard library."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback(module)`` once, right after module ``name`` ran, or now. ``callback`` must not raise: it would break somebody's import."""
    module = sys.modules.get(name)
    # A module that is being imported right now is past its finder: it is in sys.modules, and its body has not run to the end.
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        callback(module)
        return
    _FINDER.waiting.setdefault(name, []).append(callback)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)


class _Finder:
    """First on ``sys.meta_path`` while something is waited for; finds nothing itself, wraps the loader that the others found."""

    def __init__(self) -> None:
        self.waiting: dict[str, list[Callback]] = {}

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
        callbacks = self.waiting.pop(module.__name__, [])
        if not self.waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        for callback in callbacks:
            callback(module)


class _Loader:
    """The module's own loader, with the callbacks after ``exec_module``. Takes itself out of the module before its body runs."""

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
