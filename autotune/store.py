"""Where fastft keeps files of its own: one folder of the user's, JSON only, one file for each record.

The folder is ``$FASTFT_CACHE_DIR``, or ``fastft`` in ``$XDG_CACHE_HOME`` (``~/.cache``); it is made with mode 0700.
What is read from it is data, never code, and nothing of it is believed unread:

* the folder and each file must belong to this user, and nobody else may be able to write to them; links are not
  followed;
* a file is at most :data:`MAX_BYTES` long, is JSON of the version that this fastft writes, and fits its store's schema,
  which bounds every number, text and list.

What does not is left alone as if it were not there, with one warning, and a line in the report.

A record is written to a file beside it, synchronised, and renamed: a reader sees the old record or the new one, whoever
is killed, and however full the disk is. Records have files of their own, so processes that write at the same time lose
nothing and wait for nobody. A store never raises, unless it is ``strict``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("fastft")

#: A longer file is no record of ours.
MAX_BYTES = 64 * 1024
#: More files than this in one store are not listed.
MAX_RECORDS = 100_000
#: A temporary file that is older belongs to a process that was killed. Seconds.
ABANDONED = 3600.0

#: Schema: raises ``ValueError`` unless a value has this form.
Check = Callable[[Any], None]

#: What was refused or could not be written so far, by path.
_PROBLEMS: dict[str, str] = {}


class StoreError(RuntimeError):
    """A record or a folder that cannot be used (raised by a ``strict`` store only)."""


class _Newer(StoreError):
    """A record that a newer fastft wrote."""


def problems() -> list[str]:
    """What the stores of this process refused, or could not write: one line each."""
    return [f"{path}: {why}" for path, why in _PROBLEMS.items()]


def refuse(what: Path | str, why: str) -> None:
    """Say once that a file (or something else that was read) is not used, and keep it for the report."""
    if str(what) not in _PROBLEMS:
        log.warning("fastft's file %s is not used: %s", what, why)
    _PROBLEMS[str(what)] = why


def user_folder() -> Path:
    """Where this user's files are. It may not exist yet."""
    named = os.environ.get("FASTFT_CACHE_DIR")
    if named:
        return Path(named).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "fastft"


def distrust(info: os.stat_result) -> str:
    """Why what lies in a file or folder may be somebody else's; empty when it is this user's (or root's) alone."""
    if not hasattr(os, "getuid"):
        return ""
    if info.st_uid not in (os.getuid(), 0):
        return f"it belongs to user {info.st_uid}, not to {os.getuid()}"
    others = stat.S_IWOTH if _is_private(info.st_gid) else stat.S_IWOTH | stat.S_IWGRP
    if info.st_mode & others and not stat.S_ISLNK(info.st_mode):
        return f"others than its owner may write to it (mode {stat.S_IMODE(info.st_mode):04o})"
    return ""


@functools.cache
def _is_private(group: int) -> bool:
    """Whether nobody but this user is in ``group``: the group of their own that most Linux distributions give every
    user, and because of which new folders are often open to the group.
    """
    import grp
    import pwd

    try:
        user, found = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    alone = not set(found.gr_mem) - {user.pw_name}
    return group != 0 and group == user.pw_gid and found.gr_name == user.pw_name and alone


# --------------------------------------------------------------------------------------------------------------- schema


def integer(low: int, high: int) -> Check:
    """A whole number from ``low`` to ``high``."""

    def check(value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{_short(value)} is no whole number from {low} to {high}")

    return check


def number(low: float, high: float) -> Check:
    """A finite number from ``low`` to ``high``."""

    def check(value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{_short(value)} is no number from {low} to {high}")

    return check


def text(longest: int = 200) -> Check:
    """A string of printable characters."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest or not value.isprintable():
            raise ValueError(f"{_short(value)} is no text of at most {longest} printable characters")

    return check


def one_of(*choices: Any) -> Check:
    """One of these values, of the same type."""

    def check(value: Any) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{_short(value)} is none of {', '.join(map(repr, choices))}")

    return check


def listing(item: Check, most: int) -> Check:
    """A list of at most ``most`` values."""

    def check(value: Any) -> None:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"{_short(value)} is no list of at most {most}")
        for one in value:
            item(one)

    return check


def table(item: Check, most: int) -> Check:
    """A mapping from at most ``most`` texts to values of one form."""

    named = text()

    def check(value: Any) -> None:
        if not isinstance(value, dict) or len(value) > most:
            raise ValueError(f"{_short(value)} is no mapping of at most {most} entries")
        for name, one in value.items():
            named(name)
            item(one)

    return check


def record(optional: Mapping[str, Check] | None = None, /, **fields: Check) -> Check:
    """A mapping with exactly these fields. With ``optional``: it may lack those, and may have others, which nobody
    reads, so that the form can grow while what is written stays good.
    """
    more = optional or {}

    def check(value: Any) -> None:
        if not isinstance(value, dict) or not fields.keys() <= value.keys():
            raise ValueError(f"{_short(value)} does not have the fields {', '.join(fields)}")
        if optional is None and value.keys() != fields.keys():
            raise ValueError(f"{_short(value)} does not have the fields {', '.join(fields)}, and no others")
        for name, one in fields.items():
            one(value[name])
        for name, one in more.items():
            if name in value:
                one(value[name])

    return check


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


# ---------------------------------------------------------------------------------------------------------------- store


class Store:
    """Records by key, in the folder ``name`` of the user's. ``schema`` is the form of a record, ``version`` the number
    of that form: records of another version are refused, and those of an older one replaced by what is written.
    ``strict``: raise :class:`StoreError` where a warning would be given otherwise.
    """

    def __init__(
        self, name: str, schema: Check, *, version: int, folder: Path | None = None, strict: bool = False
    ) -> None:
        self.name, self.schema, self.version, self.strict = name, schema, version, strict
        self._root = folder

    @property
    def folder(self) -> Path:
        return (self._root or user_folder()) / self.name

    def path(self, key: str) -> Path:
        """The file of one record."""
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"

    def get(self, key: str) -> Any:
        """The record of ``key``; None when there is none that can be believed."""
        path = self.path(key)
        with self._kept(path), self._opened() as folder:
            if folder is not None:
                return self._read(folder, path, key)
        return None

    def put(self, key: str, value: Any) -> bool:
        """Write the record of ``key``, in place of what there was; False when it could not be. A value that does not
        fit the schema is a ``ValueError``: nobody could read it.
        """
        text()(key)
        self.schema(value)
        body = json.dumps({"store": self.name, "version": self.version, "key": key, "value": value}, allow_nan=False)
        if len(body.encode()) > MAX_BYTES:
            raise ValueError(f"the record of {key!r} has {len(body.encode())} bytes; {MAX_BYTES} are allowed")
        path = self.path(key)
        with self._kept(path), self._opened(make=True) as folder:
            if folder is not None:
                self._refuse_newer(folder, path)
                _write(folder, path.name, body.encode())
                return True
        return False

    def refuses(self, key: str) -> str:
        """Why :meth:`put` would not write the record of ``key``, said before anything is done for its sake; empty: it
        would, unless the disk is full by then.
        """
        try:
            with self._opened(make=True) as folder:
                if folder is not None:
                    self._refuse_newer(folder, self.path(key))
                return "" if os.access(self.folder, os.W_OK | os.X_OK) else f"{self.folder}: it cannot be written to"
        except (OSError, StoreError) as error:
            return f"{self.path(key)}: {error}"

    def items(self) -> dict[str, Any]:
        """All records that can be believed, by key."""
        found: dict[str, Any] = {}
        with self._kept(self.folder), self._opened() as folder:
            names = [] if folder is None else sorted(n for n in os.listdir(folder) if n.endswith(".json"))
            if len(names) > MAX_RECORDS:
                raise StoreError(f"it holds {len(names)} records; at most {MAX_RECORDS} are read")
            for name in names:
                with self._kept(self.folder / name):
                    if folder is not None and (body := self._load(folder, self.folder / name)) is not None:
                        found[body["key"]] = body["value"]
        return found

    # ------------------------------------------------------------------------------------------------------------ files

    @contextlib.contextmanager
    def _kept(self, path: Path) -> Iterator[None]:
        """Whatever is wrong with ``path`` is said once, and raised only under ``strict``."""
        try:
            yield
        except (OSError, ValueError, RecursionError, StoreError) as error:
            why = str(error) if isinstance(error, (StoreError, ValueError)) else f"{type(error).__name__}: {error}"
            if self.strict:
                raise StoreError(f"{path}: {why}") from error
            refuse(path, why)

    @contextlib.contextmanager
    def _opened(self, make: bool = False) -> Iterator[int | None]:
        """The folder, open, so that what was checked is what is used; None when it does not exist."""
        root = self._root or user_folder()
        if make:
            os.makedirs(root, 0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.mkdir(root / self.name, 0o700)
        with contextlib.ExitStack() as stack:
            folder: int | None = None
            for part in (root, self.name):
                try:
                    folder = os.open(part, _FOLDER if folder is None else _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
                except FileNotFoundError:
                    folder = None
                    break
                stack.callback(os.close, folder)
                if why := distrust(os.fstat(folder)):
                    raise StoreError(f"of its folder {part}: {why}")
            yield folder

    def _read(self, folder: int, path: Path, key: str) -> Any:
        body = self._load(folder, path)
        if body is None:
            return None
        if body["key"] != key:
            raise StoreError(f"it holds the record of {body['key']!r}, not of {key!r}")
        return body["value"]

    def _refuse_newer(self, folder: int, path: Path) -> None:
        """What a newer fastft wrote is not overwritten; anything else that cannot be read is."""
        try:
            self._load(folder, path)
        except _Newer:
            raise
        except (OSError, ValueError, RecursionError, StoreError):
            return

    def _load(self, folder: int, path: Path) -> dict[str, Any] | None:
        """A file's content, checked; None when there is no such file."""
        try:
            # Not blocking: what looks like a file may be a pipe that nobody writes to.
            file = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except FileNotFoundError:
            return None
        try:
            info = os.fstat(file)
            if not stat.S_ISREG(info.st_mode):
                raise StoreError("it is no regular file")
            if why := distrust(info):
                raise StoreError(why)
            if info.st_size > MAX_BYTES:
                raise StoreError(f"it is longer than {MAX_BYTES} bytes")
            content = os.read(file, MAX_BYTES)
        finally:
            os.close(file)
        body = parsed(content)
        if not isinstance(body, dict) or body.keys() != {"store", "version", "key", "value"}:
            raise StoreError("it is no record of fastft's")
        if body["store"] != self.name:
            raise StoreError(f"it is a record of the store {_short(body['store'])}")
        if body["version"] != self.version:
            newer = type(body["version"]) is int and body["version"] > self.version
            kind = _Newer if newer else StoreError
            raise kind(f"it has version {_short(body['version'])}; this fastft reads and writes {self.version}")
        text()(body["key"])
        if path != self.path(body["key"]):
            raise StoreError(f"it holds the record of {body['key']!r}, whose file has another name")
        self.schema(body["value"])
        return body


_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)


def parsed(content: bytes | str) -> Any:
    """What a JSON text says; :class:`StoreError` where it is none."""
    try:
        return json.loads(content, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"it is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _write(folder: int, name: str, content: bytes) -> None:
    """Put ``content`` under ``name``, whole or not at all."""
    _sweep(folder)
    beside = f".{name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        with open(file, "wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(file)
        os.replace(beside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside, dir_fd=folder)
        raise
    os.fsync(folder)


def _sweep(folder: int) -> None:
    """Remove what killed processes left half written."""
    for name in os.listdir(folder):
        if name.endswith(".tmp"):
            with contextlib.suppress(OSError):
                if time.time() - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime > ABANDONED:
                    os.unlink(name, dir_fd=folder)
