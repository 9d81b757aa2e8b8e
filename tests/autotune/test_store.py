"""fastft's own files: what is written is read back, and nothing else is believed or executed."""

from __future__ import annotations

import errno
import grp
import json
import logging
import os
import pwd
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fastft.autotune import store as module
from fastft.autotune.store import Store, StoreError, integer, listing, number, one_of, record, table, text

SCHEMA = record(block=integer(1, 1024), time=number(0.0, 1e6), name=text(20), config=table(integer(0, 64), most=4))
VALUE = {"block": 128, "time": 1.5, "name": "rms_norm", "config": {"warps": 4}}
IS_PRIVATE: Any = module._is_private
NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBLEMS", {})
    monkeypatch.setattr(module, "_is_private", lambda group: False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store("tuned", SCHEMA, version=3, folder=tmp_path / "fastft")


def refused(store: Store, key: str = "a") -> str:
    """Why the record is refused: said, not raised, and raised under ``strict``."""
    assert store.get(key) is None
    assert store.items() == {}
    (said,) = set(module.problems())
    strict = Store(store.name, store.schema, version=store.version, folder=store.folder.parent, strict=True)
    with pytest.raises(StoreError):
        strict.get(key)
    return said


def edited(store: Store, edit: Callable[[dict[str, Any]], Any], key: str = "a") -> None:
    assert store.put(key, VALUE)
    body = json.loads(store.path(key).read_text())
    store.path(key).write_text(json.dumps(edit(body) or body))


def test_what_is_written_is_read(store: Store) -> None:
    assert store.get("a") is None and store.items() == {}
    assert store.put("a", VALUE) and store.put("b", VALUE | {"block": 64})
    assert store.put("a", VALUE | {"block": 1})
    assert store.items() == {"a": VALUE | {"block": 1}, "b": VALUE | {"block": 64}}
    assert store.get("b")["block"] == 64
    assert module.problems() == []


def test_only_the_user_can_read_or_write(store: Store) -> None:
    before = os.umask(0)
    try:
        store.put("a", VALUE)
    finally:
        os.umask(before)
    for path, mode in ((store.folder.parent, 0o700), (store.folder, 0o700), (store.path("a"), 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_where_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "here"))
    assert Store("tuned", SCHEMA, version=1).folder == tmp_path / "here" / "tuned"
    monkeypatch.delenv("FASTFT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store("tuned", SCHEMA, version=1).folder == tmp_path / "cache" / "fastft" / "tuned"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert module.user_folder() == Path.home() / ".cache" / "fastft"


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "edit",
    [
        lambda body: body["value"].update(block=0),
        lambda body: body["value"].update(block=2.0),
        lambda body: body["value"].update(block=True),
        lambda body: body["value"].update(time=float("nan")),
        lambda body: body["value"].update(time=float("inf")),
        lambda body: body["value"].update(time=10**400),
        lambda body: body["value"].update(name="x" * 21),
        lambda body: body["value"].update(name="a\x1b[31m"),
        lambda body: body["value"].update(config={str(i): 1 for i in range(5)}),
        lambda body: body["value"].update(config=[1]),
        lambda body: body["value"].update(more=1),
        lambda body: body["value"].pop("name") and None,
        lambda body: body.update(value=None),
        lambda body: body.update(key="b"),
        lambda body: body.update(store="other"),
        lambda body: body.update(version=2),
        lambda body: body.update(version=4),
        lambda body: body.update(version="3"),
        lambda body: [1, 2],
    ],
)
def test_what_does_not_fit_the_schema(store: Store, edit: Any) -> None:
    edited(store, edit)
    assert str(store.path("a")) in refused(store)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[" * 50_000, b"null", b'{"a": ' + b"9" * 5000 + b"}", b" " * (module.MAX_BYTES + 1)],
    ids=["empty", "half", "bytes", "nested", "null", "digits", "long"],
)
def test_corrupted(store: Store, content: bytes) -> None:
    store.put("a", VALUE)
    store.path("a").write_bytes(content)
    refused(store)
    assert store.put("a", VALUE) and store.get("a") == VALUE  # and it can be written again


def test_every_truncation(store: Store) -> None:
    store.put("a", VALUE)
    whole = store.path("a").read_bytes()
    for length in range(len(whole)):
        store.path("a").write_bytes(whole[:length])
        assert store.get("a") is None


def test_a_newer_record_is_neither_read_nor_lost(store: Store) -> None:
    newer = Store(store.name, SCHEMA, version=4, folder=store.folder.parent)
    newer.put("a", VALUE)
    assert "it has version 4; this fastft reads and writes 3" in refused(store)
    assert not store.put("a", VALUE | {"block": 1})
    assert newer.get("a") == VALUE


@pytest.mark.parametrize("what", ["folder", "root", "file"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_may_write_to(store: Store, what: str, mode: int) -> None:
    store.put("a", VALUE)
    path = {"folder": store.folder, "root": store.folder.parent, "file": store.path("a")}[what]
    path.chmod(mode)
    assert store.get("a") is None and store.items() == {}
    assert any("others than its owner may write to it" in line for line in module.problems())
    assert store.put("a", VALUE) == (what == "file")


@pytest.mark.parametrize(
    ("name", "members", "group", "private"),
    [("ann", [], 100, True), ("ann", ["ann"], 100, True), ("ann", ["bob"], 100, False), ("staff", [], 100, False),
     ("ann", [], 101, False), ("ann", [], 0, False)],
)  # fmt: skip
def test_a_group_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, members: list[str], group: int, private: bool
) -> None:
    """Where every user has one, a umask of 002 is usual: what is open to the group is open to nobody."""
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
    monkeypatch.setattr(
        pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="ann", pw_gid=group if group != 101 else 1)
    )
    monkeypatch.setattr(module, "_is_private", IS_PRIVATE.__wrapped__)
    assert module._is_private(group) == private
    info = SimpleNamespace(st_uid=os.getuid(), st_gid=group, st_mode=stat.S_IFDIR | 0o775)
    assert bool(module.distrust(info)) != private
    info.st_mode = stat.S_IFDIR | 0o777
    assert module.distrust(info)


@NEEDS_ROOT
@pytest.mark.parametrize("what", ["folder", "root", "file"])
def test_what_is_another_users(store: Store, what: str) -> None:
    store.put("a", VALUE)
    path = {"folder": store.folder, "root": store.folder.parent, "file": store.path("a")}[what]
    os.chown(path, 12345, 12345)
    assert store.get("a") is None and store.items() == {}
    assert any("it belongs to user 12345" in line for line in module.problems())
    assert store.put("a", VALUE) == (what == "file")  # a file in our folder is ours to replace


def test_links_are_not_followed(store: Store, tmp_path: Path) -> None:
    store.put("a", VALUE)
    real = tmp_path / "real.json"
    store.path("a").rename(real)
    store.path("a").symlink_to(real)
    refused(store)
    assert store.put("a", VALUE) and not store.path("a").is_symlink()  # the link is replaced, not what it points to
    real.write_text("mine")
    store.folder.rename(tmp_path / "elsewhere")
    store.folder.symlink_to(tmp_path / "elsewhere")
    assert store.get("a") is None and not store.put("b", VALUE)
    assert real.read_text() == "mine"


def test_a_pipe_or_a_folder_is_no_record(store: Store) -> None:
    store.put("b", VALUE)
    os.mkfifo(store.path("a"), 0o600)
    assert store.get("a") is None
    store.path("c").mkdir()
    assert store.get("c") is None
    assert store.items() == {"b": VALUE}


def test_what_nobody_could_read_is_not_written(store: Store) -> None:
    with pytest.raises(ValueError, match="no whole number"):
        store.put("a", VALUE | {"block": 0})
    long = Store("tuned", listing(text(2000), most=100), version=1, folder=store.folder.parent)
    with pytest.raises(ValueError, match="are allowed"):
        long.put("a", ["x" * 2000] * 40)
    with pytest.raises(ValueError, match="printable"):
        store.put("a\n", VALUE)


def test_choices_have_a_type() -> None:
    one_of(1, "a")(1)
    for wrong in (True, 1.0, "b", None):
        with pytest.raises(ValueError, match="none of"):
            one_of(1, "a")(wrong)


# ------------------------------------------------------------------------------------------ full, read-only, concurrent


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "open", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    if call != "mkdir":
        store.put("a", VALUE)
    true_open, true_fdopen = os.open, open

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    def opens(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        return fails() if flags & os.O_CREAT else true_open(path, flags, *args, **kwargs)

    class Full:
        def __init__(self, file: int, mode: str) -> None:
            self.file = true_fdopen(file, mode)

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            self.file.close()

        write = fails

    with monkeypatch.context() as broken:
        if call == "write":
            broken.setattr(module, "open", Full, raising=False)
        else:
            broken.setattr(os, call, opens if call == "open" else fails)
        with caplog.at_level(logging.WARNING, "fastft"):
            assert not store.put("a", VALUE | {"block": 1})
            assert not store.put("a", VALUE | {"block": 1})
    assert len(caplog.records) == 1  # said once
    assert os.strerror(code) in module.problems()[0]
    if call != "mkdir":
        assert store.get("a") == VALUE  # what there was is still there
        assert os.listdir(store.folder) == [store.path("a").name]


@NEEDS_ROOT
def test_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "tmpfs", disk], check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        large = Store("tuned", listing(text(1000), most=60), version=1, folder=disk)
        written = {key: ["x" * 1000] * 20 for key in "abcdef" if large.put(key, ["x" * 1000] * 20)}
        assert 0 < len(written) < 6 and large.items() == written
        assert "No space left on device" in "".join(module.problems())
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert not large.put("a", ["y"]) and large.items() == written
        assert "Read-only file system" in "".join(module.problems())
    finally:
        subprocess.run(["umount", disk], check=True)


WRITER = """
import sys
from pathlib import Path
from fastft.autotune.store import Store, integer
store = Store("tuned", integer(0, 10**6), version=1, folder=Path(sys.argv[1]))
for n in range(int(sys.argv[3])):
    assert store.put(f"{sys.argv[2]} {n}", n) and store.put("shared", n)
"""


def writer(folder: Path, name: str, records: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(records)], cwd="/")


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    """No record is lost, and no reader sees half of one."""
    store = Store("tuned", integer(0, 10**6), version=1, folder=tmp_path / "fastft", strict=True)
    running = [writer(tmp_path / "fastft", str(name), 40) for name in range(3)]
    while any(one.poll() is None for one in running):
        store.items()
        time.sleep(0.01)
    assert [one.returncode for one in running] == [0, 0, 0]
    assert store.items() == {f"{name} {n}": n for name in range(3) for n in range(40)} | {"shared": 39}


def test_a_process_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL at any moment leaves whole records; what was half written is removed later."""
    store = Store("tuned", integer(0, 10**6), version=1, folder=tmp_path / "fastft", strict=True)
    for attempt in range(3):
        running = writer(tmp_path / "fastft", str(attempt), 10**6)
        while not store.path(f"{attempt} 3").exists():
            time.sleep(0.005)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert store.get(f"{attempt} 3") == 3
    store.items()
    abandoned = store.folder / ".a.json.1.ab.tmp"
    abandoned.write_text("{")
    store.put("a", 1)
    assert abandoned.exists()  # its process may be alive
    os.utime(abandoned, (0, 0))
    store.put("a", 1)
    assert not abandoned.exists()


def test_the_report_says_so(store: Store) -> None:
    import fastft

    store.put("a", VALUE)
    store.path("a").write_text("{")
    store.get("a")
    assert any(str(store.path("a")) in line for line in fastft.report().errors)
