"""Compiled code is loaded from nobody else's folder; whatever state a cache is in, and whoever else writes to it, the
gradients are right.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastft import _torch_compat as compat
from fastft import caches
from fastft.autotune import store
from tests.backend import _compile_here

NEEDS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file to another user")


# ----------------------------------------------------------------------------------------------- which folders are used


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder with something in it."""
    monkeypatch.setattr(store, "_is_private", lambda group: False)
    folder = tmp_path / "cache"
    (folder / "fxgraph").mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "fxgraph" / "entry").touch()
    return folder


def test_a_folder_of_ones_own(folder: Path) -> None:
    assert caches.unusable(folder) == ""
    assert [path.name for path in folder.iterdir()] == ["fxgraph"]  # the probe is gone


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1777])
@pytest.mark.parametrize("inside", [False, True])
def test_others_may_write(folder: Path, mode: int, inside: bool) -> None:
    (folder / "fxgraph" if inside else folder).chmod(mode)
    assert f"others than its owner may write to it (mode {mode:04o})" in caches.unusable(folder)


def test_what_others_cannot_reach(folder: Path) -> None:
    """With umask 002 what torch makes is open to the group, but nobody gets there."""
    (folder / "fxgraph").chmod(0o775)
    folder.chmod(0o700)
    assert caches.unusable(folder) == ""


@NEEDS_ROOT
@pytest.mark.parametrize("inside", [False, True])
def test_another_users(folder: Path, inside: bool) -> None:
    folder.chmod(0o700)
    os.chown(folder / "fxgraph" if inside else folder, 12345, 12345)
    assert "it belongs to user 12345" in caches.unusable(folder)


@NEEDS_ROOT
def test_another_users_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert caches.unusable(link) == ""
    os.chown(link, 12345, 12345, follow_symlinks=False)
    assert "it belongs to user 12345" in caches.unusable(link)


def test_a_folder_that_is_made_is_closed(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert caches.unusable(tmp_path / "a" / "b") == ""
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder", Path("/proc/nothing")):
        assert "it cannot be written to" in caches.unusable(path)


@pytest.fixture
def bad_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What everybody may write to is named as Inductor's cache."""
    folder.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(caches, "_EXCHANGED", {})
    return folder


def test_it_is_exchanged_and_said_once(bad_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastft"):
        for _ in range(3):
            caches.secure()
    used = tmp_path / "user" / "inductor-cache"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(used) == str(caches.INDUCTOR.folder)
    assert caches.exchanged(caches.INDUCTOR) == caches._EXCHANGED["TORCHINDUCTOR_CACHE_DIR"]
    assert caches.exchanged(caches.TRITON) is None
    (message,) = caplog.messages
    assert str(bad_folder) in message and "others than its owner" in message and f"{used} is used" in message


def test_where_the_users_folder_is_no_better(bad_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "user").mkdir()
    (tmp_path / "user").chmod(0o777)
    caches.secure()
    used = caches.INDUCTOR.folder
    assert used.parent == Path(tempfile.gettempdir()) and stat.S_IMODE(used.stat().st_mode) == 0o700


def test_no_place_at_all(bad_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "unusable", lambda folder: "it is full")
    with pytest.raises(
        caches.NoFolder, match=r"inductor cache: .* is not used, it is full: and there is no other folder"
    ):
        caches.secure()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(bad_folder)


def test_an_empty_folder_stays_only_if_it_helped(bad_folder: Path) -> None:
    with pytest.raises(ValueError), caches.empty_folder():
        assert caches.INDUCTOR.folder != bad_folder
        raise ValueError
    assert caches.INDUCTOR.folder == bad_folder
    with caches.empty_folder():
        pass
    assert caches.unusable(caches.INDUCTOR.folder) == "" and not list(caches.INDUCTOR.folder.iterdir())


# ------------------------------------------------------------------------------------------- real caches, new processes


class Processes:
    """New processes that train a step, with a cache folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "unused"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "0",
        }
        command = [sys.executable, _compile_here.__file__]
        self.parent = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=environment, cwd="/",
        )  # fmt: skip

    def start(self, cache: Path, room: int = caches.ROOM, **env: str) -> tuple[int, Path]:
        """A process's id, and the file that it will write. ``room``: what must fit into the folder."""
        assert self.parent.stdin is not None and self.parent.stdout is not None
        self.number += 1
        result = self.folder / f"result{self.number}"
        ours = {"FASTFT_CACHE_DIR": str(self.folder / "user"), "TMPDIR": str(self.folder)}
        env = {**ours, **env, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        self.parent.stdin.write(json.dumps({"env": env, "result": str(result), "room": room}) + "\n")
        self.parent.stdin.flush()
        return int(self.parent.stdout.readline()), result

    def wait(self, result: Path) -> dict[str, Any]:
        """What a process found; its gradients are right."""
        end = time.monotonic() + 120
        while not result.exists():
            assert time.monotonic() < end, "the process died, or hangs"
            time.sleep(0.02)
        found = json.loads(result.read_text())
        assert "raised" not in found, found["raised"]
        assert found["error"] < 1e-6
        return found

    def train(self, cache: Path, **how: Any) -> dict[str, Any]:
        return self.wait(self.start(cache, **how)[1])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(tmp_path_factory.mktemp("processes"))
    yield started
    started.parent.communicate()


@pytest.fixture(scope="module")
def filled(processes: Processes) -> tuple[Path, dict[str, Any]]:
    """A cache that several processes filled at once, and what they found."""
    cache = processes.folder / "filled"
    started = [processes.start(cache)[1] for _ in range(3)]
    found = [processes.wait(result) for result in started]
    for one in found:
        assert one["counts"] == {"rms_norm": 1} and one["errors"] == [] and one["folder"] == str(cache)
        assert one["found"] == found[0]["found"]
    return cache, found[0]


@pytest.fixture
def cache(filled: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of that cache."""
    subprocess.run(["cp", "-a", filled[0], tmp_path / "cache"], check=True)
    return tmp_path / "cache"


def files(cache: Path, *folders: str) -> list[Path]:
    return sorted(
        p for p in cache.rglob("*") if p.is_file() and (not folders or p.relative_to(cache).parts[0] in folders)
    )


def test_several_processes_at_once(processes: Processes, filled: Any, cache: Path) -> None:
    """They started with an empty cache; the next one finds all of it."""
    again = processes.train(cache)
    assert again["hits"] == 1 and again["found"] == filled[1]["found"]


def poison(cache: Path, marker: Path) -> None:
    """Code that Inductor wrote leaves a mark when it runs."""
    touched = [path for path in files(cache) if path.suffix == ".py"]
    assert touched
    for path in touched:
        path.write_text(path.read_text() + f"\nopen({str(marker)!r}, 'w').close()\n")


def test_what_is_loaded_is_executed(processes: Processes, cache: Path, tmp_path: Path) -> None:
    """Why it matters whose the folder is: the next test is worth something."""
    poison(cache, tmp_path / "mark")
    assert processes.train(cache)["hits"] == 1
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("whose", ["another user's", "everybody's"])
def test_nothing_is_executed_from_an_untrusted_place(
    processes: Processes, cache: Path, tmp_path: Path, whose: str
) -> None:
    if whose == "everybody's":
        cache.chmod(0o777)
    elif os.getuid() == 0:
        subprocess.run(["chown", "-R", "12345:12345", cache], check=True)
    else:
        pytest.skip("only root can give a folder to another user")
    poison(cache, tmp_path / "mark")
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    found = processes.train(cache, FASTFT_CACHE_DIR=str(tmp_path / "user"))
    assert not (tmp_path / "mark").exists()
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == before
    assert found["counts"] == {"rms_norm": 1} and found["hits"] == 0
    assert str(cache) in found["plan"]["inductor cache"] and found["folder"] == str(tmp_path / "user/inductor-cache")
    if whose == "another user's":  # and from there on that is the cache
        assert processes.train(cache, FASTFT_CACHE_DIR=str(tmp_path / "user"))["hits"] == 1


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One bit in a hundred bytes is another."""
    changed, chance = bytearray(content), random.Random(0)
    for _ in range(max(1, len(content) // 100)):
        changed[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def one_bit(content: bytes) -> bytes:
    """Of the source text in an entry: a digit is another digit, if it may be."""
    places = [i for i in range(len(content) // 2, len(content) - 1) if content[i : i + 1] in b"0246"]
    at = places[len(places) // 2] if places else len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [truncated, flipped, one_bit, lambda _: b""], ids=["half", "flipped", "bit", "empty"]
)
def test_damaged_entries(processes: Processes, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    """They are no entries any more, and are written again."""
    entries = files(cache, "fxgraph", "aotautograd")
    whole = {path: path.read_bytes() for path in entries}
    for path in entries:
        path.write_bytes(damage(whole[path]))
    found = processes.train(cache)
    assert (found["counts"], found["errors"], found["hits"]) == ({"rms_norm": 1}, [], 0)
    assert not any(path.exists() and path.read_bytes() != whole[path] for path in entries)
    assert processes.train(cache)["hits"] == 1


def test_what_a_damaged_entry_is(tmp_path: Path) -> None:
    """One that is not what its name says; what another process is still writing is none."""
    from torch._inductor.codecache import GuardedCache, sha256_hash

    class Entries(GuardedCache[Any]):
        @classmethod
        def _get_tmp_dir_for_key(cls, _key: str) -> str:
            return str(tmp_path / _key)

    (tmp_path / "key").mkdir()
    contents = [pickle.dumps(number) for number in range(3)]
    for content in contents:
        (tmp_path / "key" / sha256_hash(content)).write_bytes(content)
    (tmp_path / "key" / sha256_hash(contents[1])).write_bytes(contents[0])
    (tmp_path / "key" / ".1.2.tmp").write_bytes(b"half")
    for _ in range(2):
        with compat.whole_cache_entries():
            assert {found for found, *_ in Entries.iterate_over_candidates(True, None, "key")} == {0, 2}
            assert list(Entries.iterate_over_candidates(True, None, "other")) == []
    names = {sha256_hash(contents[0]), sha256_hash(contents[2]), ".1.2.tmp"}
    assert {path.name for path in (tmp_path / "key").iterdir()} == names
    assert "whole_cache_entries" not in Entries.iterate_over_candidates.__func__.__qualname__


def test_damaged_code(processes: Processes, cache: Path) -> None:
    """Code that cannot be loaded: the cache is left aside."""
    for path in files(cache):
        if path.suffix == ".py":
            path.write_bytes(truncated(path.read_bytes()))
    found = processes.train(cache)
    assert found["counts"] == {"rms_norm": 1} and found["folder"] != str(cache)
    assert f"it is tried without what is in {cache}" in found["errors"][0]


def test_a_process_that_is_killed(processes: Processes, tmp_path: Path) -> None:
    """SIGKILL at several moments of a compilation; the next process goes on with what there is."""
    cache = tmp_path / "cache"
    for seen in (1, 4, 9):
        process, result = processes.start(cache)
        while len(files(cache)) < seen and not result.exists():
            time.sleep(0.001)
        os.kill(process, signal.SIGKILL)
    found = processes.train(cache)
    assert found["counts"] == {"rms_norm": 1}
    assert found["errors"] == [] or "it is tried without what is in" in found["errors"][0]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small disk."""
    mounted = []

    def make(limit: str) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"{limit},mode=700", "tmpfs", path]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("nothing can be mounted here")
        mounted.append(path)
        return path

    yield make
    for path in mounted:
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk(processes: Processes, disk: Callable[[str], Path], tmp_path: Path) -> None:
    path = disk("size=512k")
    found = processes.train(path / "cache", FASTFT_CACHE_DIR=str(tmp_path / "user"))
    assert found["counts"] == {"rms_norm": 1} and found["errors"] == []
    assert "No space left on device" in found["plan"]["inductor cache"]


@pytest.mark.parametrize(
    ("room", "what"),
    [("nr_inodes=3", "compiling failed, it is tried without what is in"), ("size=4k", "compiling a backward failed")],
)
def test_a_disk_that_fills_up(processes: Processes, disk: Callable[[str], Path], room: str, what: str) -> None:
    """While the forward is compiled, and while the backward is."""
    path = disk(room)
    found = processes.train(path / "cache", room=0)
    assert found["counts"] == {"rms_norm": 1}
    (error,) = found["errors"]
    assert error.startswith(what) and "No space left on device" in error


def test_a_read_only_disk(processes: Processes, disk: Callable[[str], Path], cache: Path, tmp_path: Path) -> None:
    path = disk("size=64m")
    subprocess.run(["cp", "-a", cache, path / "cache"], check=True)
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    found = processes.train(path / "cache", FASTFT_CACHE_DIR=str(tmp_path / "user"))
    assert found["counts"] == {"rms_norm": 1} and found["errors"] == []
    assert "Read-only file system" in found["plan"]["inductor cache"]


def test_no_disk_at_all(processes: Processes, disk: Callable[[str], Path]) -> None:
    """Nowhere to write to: the step runs op by op."""
    path = disk("size=512k")
    found = processes.train(path / "cache", FASTFT_CACHE_DIR=str(path / "user"), TMPDIR=str(path))
    assert found["counts"] == {}
    assert "the graph runs op by op as it came" in found["errors"][0]
