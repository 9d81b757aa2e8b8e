"""Where torch and Triton keep what they compiled: only in a folder that is the user's alone.

Both caches hold code, and pickles, that are executed when they are read, and neither library looks at who wrote them:
whoever can write to the folder can run anything here. Inductor's default is in a place where everybody can make folders
(``/tmp/torchinductor_<user>``). So before anything is compiled, a folder that belongs to somebody else, or that others
may write to, is exchanged for one that is not; so is one that cannot be written to, or is full. The exchange is made in
the environment variable that both libraries read, since the backward is compiled, and kernels are loaded, later.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastft import _torch_compat as compat
from fastft.autotune.store import distrust, user_folder

log = logging.getLogger("fastft")

#: Bytes that must fit before a compilation is begun.
ROOM = 1 << 20


class NoFolder(OSError):
    """There is no folder that compiled code could be kept in."""


@dataclass(frozen=True)
class Cache:
    """A library's folder, named by an environment variable."""

    name: str
    variable: str
    default: Callable[[], str]

    @property
    def folder(self) -> Path:
        return Path(os.environ.get(self.variable) or self.default()).absolute()


def _triton_default() -> str:
    return str(Path(os.environ.get("TRITON_HOME") or Path.home(), ".triton", "cache"))


INDUCTOR = Cache("inductor cache", "TORCHINDUCTOR_CACHE_DIR", compat.inductor_cache_dir)
TRITON = Cache("triton cache", "TRITON_CACHE_DIR", _triton_default)
CACHES = (INDUCTOR, TRITON)


@dataclass(frozen=True)
class Exchange:
    """``folder`` is not used because of ``why``; ``used`` is. None: there is no place for one."""

    folder: Path
    why: str
    used: Path | None

    def __str__(self) -> str:
        instead = f"{self.used} is used" if self.used else "and there is no other folder"
        return f"{self.folder} is not used, {self.why}: {instead}"


#: What was exchanged, by variable.
_EXCHANGED: dict[str, Exchange] = {}


def secure() -> None:
    """Make both caches' folders ones that can be used. Raises :class:`NoFolder` when there is no place for one of them:
    then nothing may be compiled to code.
    """
    nowhere = []
    for cache in CACHES:
        folder = cache.folder
        why = unusable(folder)
        if not why:
            continue
        used = next((place for place in _places(cache) if not unusable(place)), None)
        exchange = Exchange(folder, why, used)
        known = _EXCHANGED.get(cache.variable)
        _EXCHANGED[cache.variable] = exchange
        if used is None:
            nowhere.append(f"{cache.name}: {exchange}")
            continue
        os.environ[cache.variable] = str(used)
        if known is None or known.folder != folder:
            log.warning("%s: %s", cache.name, exchange)
    if nowhere:
        raise NoFolder("; ".join(nowhere))


def exchanged(cache: Cache) -> Exchange | None:
    """What was done about the folder that was asked for, if it is not the one in use."""
    found = _EXCHANGED.get(cache.variable)
    return found if found is not None and cache.folder in (found.used, found.folder) else None


@contextlib.contextmanager
def empty_folder() -> Iterator[None]:
    """Compile in here as if nothing had been compiled before. The new folder stays Inductor's, unless an exception
    leaves this block.
    """
    before = os.environ.get(INDUCTOR.variable)
    os.environ[INDUCTOR.variable] = str(_temporary())
    compat.forget_loaded_code()
    try:
        yield
    except BaseException:
        os.environ.pop(INDUCTOR.variable)
        if before is not None:
            os.environ[INDUCTOR.variable] = before
        raise


def unusable(folder: Path) -> str:
    """Why nothing is to be loaded from ``folder``, or can be written there; empty when it can be used. It is made if it
    does not exist.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(0o700)
        # Of a link both ends must be ours: who owns it can point it to elsewhere.
        info = os.stat(folder)
        if why := distrust(os.lstat(folder)) or distrust(info) or _distrusted_inside(folder, info):
            return why
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
    except OSError as error:
        return f"it cannot be written to ({error.strerror or error})"
    return ""


def _distrusted_inside(folder: Path, info: os.stat_result) -> str:
    """The same for what lies in it. What others may write to is harmless where they cannot get to it."""
    reached = (0o020 if info.st_mode & stat.S_IXGRP else 0) | (0o002 if info.st_mode & stat.S_IXOTH else 0)
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # Another process's temporary file.
                continue
            if (why := distrust(found)) and (found.st_mode & reached or "belongs" in why):
                return f"{entry.name} in it: {why}"
    return ""


def _places(cache: Cache) -> Iterator[Path]:
    """Where else a cache may be."""
    root = user_folder()
    if not unusable(root):
        yield root / cache.name.replace(" ", "-")
    with contextlib.suppress(OSError):
        yield _temporary()


def _temporary() -> Path:
    """An empty folder, 0700, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="fastft-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
