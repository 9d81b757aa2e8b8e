"""Which configuration and which variant was measured to be the fastest, for which sizes on which device.

A record's key has everything in it that its worth depends on: the device's kind, the kernel (or op), the dtype, the
sizes, the versions of torch and Triton, and the kernel's source. What was measured on another device, or with other
code, is never found.

Records are in two places, with one schema: this user's (:mod:`fastft.autotune.store`, written by ``fastft tune``), and
files that come with the package, ``databases/<device kind>.json`` (written by ``fastft tune --export``). A file that is
damaged, belongs to somebody else, is about another device, or was written by a newer fastft is refused as a whole, with
a line in the report.

All ranks of a distributed run take the same configurations: rank 0's records are handed to the others through the
process group's store, once, before anybody looks anything up. That is no collective: the ranks need not look anything
up at the same time, and a rank that never does holds nobody up.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import stat
import threading
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastft.autotune import store
from fastft.autotune.store import Store, StoreError, integer, listing, number, one_of, record, table, text
from fastft.autotune.timing import said
from fastft.kernels import _config
from fastft.kernels._config import Config, Space
from fastft.kernels._op import Op

log = logging.getLogger("fastft")

#: Of the records' form. Records and files of another version are refused.
VERSION = 1
#: Longest file that comes with the package, bytes.
MAX_BYTES = 16 * 2**20
#: Records in one file.
MAX_RECORDS = 20_000
#: Candidates that failed of which a record says why.
MAX_FAILURES = 100
#: A rank waits for rank 0's records for so many seconds, then takes the heuristics.
WAIT_S = 10.0
SHIPPED = Path(__file__).parent / "databases"

#: One measurement's outcome. ``config``: the best configuration (empty: the heuristic's). ``variant``: the best variant
#: of an op, ``source``: the beginning of its file's hash (both empty for kernels). ``us``: its time, ``heuristic_us``:
#: the time of what is taken otherwise, median µs; ``noise``: the larger spread of the two, as a share. ``tried``:
#: candidates that were measured; ``failures``: those that could not be, and why. Records of before may lack the
#: others: ``failed``, how many could not be measured (a file that is shipped says no more of them), and ``skipped``,
#: how many were not tried, by why (:data:`fastft.autotune.search.SKIPPED`).
RECORD = record(
    {"failed": integer(0, 10**6), "skipped": table(integer(0, 10**6), 8)},
    config=table(integer(0, 2**20), 16),
    variant=text(60),
    source=text(64),
    us=number(0.0, 1e9),
    heuristic_us=number(0.0, 1e9),
    noise=number(0.0, 1e3),
    tried=integer(0, 10**6),
    failures=table(text(300), MAX_FAILURES),
)
_FILE = record(
    database=one_of("fastft tuned"),
    version=one_of(VERSION),
    device=text(60),
    records=table(RECORD, MAX_RECORDS),
)
_MANY = listing(record(key=text(), value=RECORD), MAX_RECORDS)


def user_store(folder: Path | None = None, strict: bool = False) -> Store:
    """This user's records."""
    return Store("tuned", RECORD, version=VERSION, folder=folder, strict=strict)


# ------------------------------------------------------------------------------------------------------------------ key


def kind_of(name: str) -> str:
    """A device's name without its maker, memory and socket: ``NVIDIA H100 80GB HBM3`` → ``h100``. What makes it another
    device for a kernel stays: ``NVIDIA H100 PCIe`` → ``h100-pcie``.
    """
    words = re.findall(r"[a-z0-9.]+", name.lower())
    dropped = r"nvidia|tesla|geforce|hbm\w*|sxm\d*|\d+gb"
    return "-".join(w for w in words if not re.fullmatch(dropped, w))


@functools.cache
def device_kind(device: torch.device | None = None) -> str:
    """The kind of a CUDA device (None: the current one); empty for others, for which nothing is tuned."""
    if device is None:
        return device_kind(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else ""
    return kind_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


@functools.cache
def versions() -> str:
    """torch's and Triton's, without the last number: ``torch 2.11, triton 3.6``."""
    torchs = ".".join(torch.__version__.split(".")[:2])
    try:
        triton = ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return f"torch {torchs}, triton {triton}"


def bucket(tokens: int) -> int:
    """The next power of two: batches of about the same size share what was measured."""
    return 1 << max(tokens - 1, 0).bit_length()


def key_of(kernel: str, tokens: Iterable[str], sizes: Iterable[str], /, **arguments: Any) -> str:
    """The key of a record: ``device``, ``dtype``, ``source`` (a hash), and one argument for each name in ``tokens`` (it
    is rounded up to a power of two) and ``sizes`` (exact). Every argument is in it.
    """
    left = dict(arguments)
    device, dtype, source = left.pop("device"), left.pop("dtype"), left.pop("source")
    parts = [f"{name}={bucket(int(left.pop(name)))}" for name in tokens]
    for name in sizes:
        value = left.pop(name)
        parts.append(f"{name}={int(value) if isinstance(value, bool) else value}")
    if left:
        raise ValueError(f"not in the key of {kernel}: {', '.join(left)}")
    key = f"{device}/{kernel}/{str(dtype).removeprefix('torch.')}/{' '.join(parts)}/{versions()}/{source[:12]}"
    # A store's keys are short. Sizes that make it long (many tensors) are hashed.
    return key if len(key) <= 200 else f"{key[:140]}…{hashlib.sha256(key.encode()).hexdigest()[:40]}/{source[:12]}"


def config_key(space: Space, key: tuple[Any, ...], device: str) -> str:
    """The key of a launch: ``key`` as :class:`Space` takes it, on a device of this kind."""
    _, dtype, *values = key
    named = dict(zip((*space.tokens, *space.sizes), values, strict=True))
    return key_of(space.kernel, space.tokens, space.sizes, device=device, dtype=dtype, source=space.source, **named)


@functools.cache
def _ops() -> dict[str, Op]:
    """Every op by name, when all that there is has been imported: a command may have imported none."""
    from fastft import kernels

    return kernels.load()


def void(key: str) -> bool:
    """Whether what a record of this key was measured with was edited since, or is gone: nobody will find it."""
    from fastft.autotune import variants  # which needs the keys

    kernel, source = key.split("/")[1], key.rpartition("/")[2]
    op = _ops().get(kernel.removeprefix("variant of "))
    now = variants.source_of_op(op) if op else _config.SPACES[kernel].source if kernel in _config.SPACES else ""
    return not now or source != now[:12]


# ---------------------------------------------------------------------------------------------------------- the records


class Found(NamedTuple):
    """A record, and where it is from: ``tuned`` (this user's) or ``shipped``."""

    value: dict[str, Any]
    source: str


class Table:
    """The records that one process looks in, for one kind of device: the user's and the package's."""

    def __init__(self, device: str, given: Mapping[str, Any] | None = None) -> None:
        self.device = device
        #: Of another rank; None: this process reads its own.
        self.given = given
        self.store = user_store()
        self._found: dict[str, Found | None] = {}
        self.shipped = read_file(SHIPPED / f"{device}.json", device) if given is None else {}

    def find(self, key: str) -> Found | None:
        """The record of ``key``, read once: a model's layers are alike."""
        if key not in self._found:
            self._found[key] = self._find(key)
        return self._found[key]

    def _find(self, key: str) -> Found | None:
        if self.given is not None:
            found = self.given.get(key)
            return None if found is None else Found(found["value"], found["source"])
        if (value := self.store.get(key)) is not None:
            return Found(value, "tuned")
        value = self.shipped.get(key)
        return None if value is None else Found(value, "shipped")

    def everything(self) -> dict[str, Any]:
        """All that :meth:`find` could find, ready for another process."""
        mine = {k: v for k, v in self.store.items().items() if k.startswith(f"{self.device}/")}
        both = [(self.shipped, "shipped"), (mine, "tuned")]
        return {k: {"value": _brief(v), "source": source} for records, source in both for k, v in records.items()}


def read_file(path: Path, device: str) -> dict[str, Any]:
    """The records of a file written by :func:`write_file`, by key; empty, with a line in the report, unless it can be
    believed and is about ``device``.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return {}
    except OSError as error:
        store.refuse(path, f"{type(error).__name__}: {error}")
        return {}
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise StoreError("it is no regular file")
        if why := store.distrust(info):
            raise StoreError(why)
        if info.st_size > MAX_BYTES:
            raise StoreError(f"it is longer than {MAX_BYTES} bytes")
        with open(file, "rb", closefd=False) as opened:
            body = store.parsed(opened.read(MAX_BYTES))
        return _checked(body, device)
    except (OSError, ValueError, RecursionError, StoreError) as error:
        store.refuse(path, str(error))
        return {}
    finally:
        os.close(file)


def _checked(body: Any, device: str) -> dict[str, Any]:
    if not isinstance(body, dict) or body.get("database") != "fastft tuned":
        raise StoreError("it is no database of fastft's")
    if body.get("version") != VERSION:
        raise StoreError(f"it has version {body.get('version')!r}; this fastft reads {VERSION}")
    _FILE(body)
    if body["device"] != device:
        raise StoreError(f"it is about {body['device']!r}, and this device is {device!r}")
    for key in body["records"]:
        if not key.startswith(f"{device}/"):
            raise StoreError(f"it has a record of another device: {key!r}")
    return dict(body["records"])


def write_file(path: Path, device: str, records: Mapping[str, Any]) -> None:
    """Write the records of one kind of device as a file that can be put into ``databases/``, whole or not at all."""
    brief = {key: _brief(value) for key, value in sorted(records.items())}
    body = {"database": "fastft tuned", "version": VERSION, "device": device, "records": brief}
    _checked(body, device)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(body, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _brief(value: dict[str, Any]) -> dict[str, Any]:
    """A record without what the candidates that failed said: every process would read it, and none needs it."""
    return {**value, "failures": {}, "failed": value.get("failed", len(value["failures"]))}


# ------------------------------------------------------------------------------------------------ one for a process

_LOCK = threading.RLock()
_TABLE: tuple[str, Any, Table] | None = None  # device kind, process group's store, records


def current(device: str) -> Table:
    """The records for devices of this kind. Read when they are first asked for, and again when a process group has come
    up since.
    """
    global _TABLE
    with _LOCK:
        group = _group()
        if _TABLE is None or _TABLE[0] != device or _TABLE[1] is not (group and group[0]):
            if _TABLE is not None:
                _config.forget()
            _TABLE = (device, group and group[0], Table(device) if group is None else _shared(device, *group))
        return _TABLE[2]


def forget() -> None:
    """Read everything again: records were written, or a file has changed."""
    global _TABLE
    with _LOCK:
        _TABLE = None
    _config.forget()


def share() -> None:
    """Called when a graph is compiled: rank 0 hands its records out, so that nobody waits for it later."""
    if _group() is not None and (device := device_kind()):
        current(device)


def _group() -> tuple[Any, int] | None:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    from fastft import _torch_compat as compat  # not above: it imports Dynamo, which a kernel alone does not need

    return compat.process_group_store()


def _shared(device: str, group: Any, rank: int) -> Table:
    """Rank 0's records, on every rank."""
    from fastft.autotune import variants  # it imports this file

    name, mine = "fastft/tuned", variants.of_users()
    if rank == 0:
        records = Table(device).everything()
        group.set(name, json.dumps([device, mine, records]))
        return Table(device, records)
    try:
        try:
            group.wait([name], timedelta(seconds=WAIT_S))
        except Exception as error:
            raise StoreError(
                f"this rank gave up after waiting {WAIT_S:g} s ({said(error)}): it takes the heuristics, and may "
                "launch other kernels than rank 0"
            ) from None
        theirs, variants_there, records = json.loads(group.get(name))
        if theirs != device:
            raise StoreError(f"rank 0 has a {theirs}, this rank a {device}")
        if variants_there != mine:
            there, here = (", ".join(map(str, found)) or "none" for found in (variants_there, mine))
            why = f"it has {there}; this rank has {here}. Where one of them was tuned, ranks compute it differently"
            store.refuse("rank 0's list of users' variants", why)
        _MANY([{"key": key, "value": one["value"]} for key, one in records.items()])
        return Table(device, records)
    except Exception as error:
        store.refuse("rank 0's tuned configurations", str(error) if isinstance(error, StoreError) else said(error))
        return Table(device, {})


def prune(folder: Path | None = None) -> int:
    """Take out of the files that come with the package (or of ``folder``) what is :func:`void`: after an edit of a
    kernel that cannot be measured again at once. The number of records that went.
    """
    gone = 0
    for path in sorted((folder or SHIPPED).glob("*.json")):
        records = read_file(path, path.stem)
        left = {key: value for key, value in records.items() if not void(key)}
        if len(left) < len(records):
            write_file(path, path.stem, left)
        gone += len(records) - len(left)
    return gone


# ------------------------------------------------------------------------------------------------------------ selection


def select(key: str, device: str, explicit: Any = None) -> tuple[Any, str]:
    """What a launch, or a site, is to use instead of the default, and where that comes from:

    1. ``explicit``: what the user (``options={"variants": ...}``) or a test (``Space.using``) asked for;
    2. ``tuned``: what this user's ``fastft tune`` measured for this key;
    3. ``shipped``: what was measured for this key, and came with the package;
    4. ``heuristic``: None, and the op decides as it does where nothing was measured.

    2 and 3 answer with a record (:data:`RECORD`).
    """
    # 1. Explicit.
    if explicit is not None:
        return explicit, "explicit"
    # 2., 3. Tuned, shipped.
    if device and (found := current(device).find(key)) is not None:
        return found
    # 4. Heuristic.
    return None, "heuristic"


def select_config(space: Space, key: tuple[Any, ...], explicit: Config | None) -> tuple[Config | None, str]:
    """:func:`select` for a kernel's launch. A record with a configuration that is not legal is refused."""
    device = device_kind(key[0])
    name = config_key(space, key, device) if device else ""
    found, source = select(name, device, explicit)
    if source in ("explicit", "heuristic"):
        return found, source
    config: Config = found["config"]
    if not config:  # the heuristic was the best
        return None, source
    if (why := space.legal(config, *key)) is not None:
        store.refuse(f"the {source} configuration of {space.kernel}", f"{_config.shown(config)}: {why}")
        return None, "heuristic"
    return config, source
