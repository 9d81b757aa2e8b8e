"""The tuned records: their key, the files they are in, what of them is refused, and that all ranks have the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastft
import fastft.kernels
from fastft.autotune import database, store, variants
from fastft.kernels import _config, glu, rms_norm
from fastft.kernels._op import OPS

fastft.kernels.load()
PACKAGE = database.SHIPPED  # tests have a folder of their own in its place
CPU, BF16 = torch.device("cpu"), torch.bfloat16
KEY = (CPU, BF16, 8192, 4096)


@pytest.fixture(autouse=True)
def h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(database, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(database, "device_kind", lambda device=None: "h100")
    monkeypatch.setattr(store, "_PROBLEMS", {})
    (tmp_path / "shipped").mkdir()
    database.forget()
    yield
    database.forget()


def of(**config: int) -> dict[str, Any]:
    one = dict(config=config, variant="", source="", us=1.0, heuristic_us=2.0, noise=0.01, tried=9)
    return {**one, "failures": {"BLOCK_M=64 num_warps=1": "out of resources"}, "failed": 1, "skipped": {"illegal": 3}}


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """As a file has it that is shipped."""
    return {**record, "failures": {}}


def name(key: tuple[Any, ...] = KEY, space: _config.Space = rms_norm.FORWARD) -> str:
    return database.config_key(space, key, "h100")


def ship(records: dict[str, Any], changed: dict[str, Any] | None = None) -> Path:
    path = database.SHIPPED / "h100.json"
    database.write_file(path, "h100", records)
    if changed:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    database.forget()
    return path


def tune(record: dict[str, Any], key: str | None = None) -> None:
    assert database.user_store().put(key or name(), record)
    database.forget()


# ------------------------------------------------------------------------------------------------------------------ key


@pytest.mark.parametrize("shipped", sorted(PACKAGE.glob("*.json")), ids=lambda path: path.stem)
def test_what_is_shipped_can_be_read(shipped: Path, tmp_path: Path) -> None:
    """And nothing in it is slower than the heuristic."""
    copied = tmp_path / shipped.name  # a checkout may be writable for others
    copied.write_bytes(shipped.read_bytes())
    copied.chmod(0o600)
    records = database.read_file(copied, shipped.stem)
    assert records and store.problems() == []
    for key, record in records.items():
        space = _config.SPACES.get(key.split("/")[1])  # none: of an op's variants
        values = set() if space is None else set(space.values)
        assert record["us"] <= record["heuristic_us"] and not set(record["config"]) - values, key


@pytest.mark.parametrize(
    ("full", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "rtx-4090-laptop-gpu"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-mig-1g.10gb"),
        ("../../x", "....-..-x"),
    ],
)
def test_kinds_of_devices(full: str, kind: str) -> None:
    found = database.kind_of(full)
    assert "/" not in found
    assert found == kind or full.startswith("..")


def test_every_argument_is_in_the_key() -> None:
    given: dict[str, Any] = dict(device="h100", dtype=BF16, source="a" * 64, rows=8192, n=4096)
    key = database.key_of("rms_norm.forward", ("rows",), ("n",), **given)
    others = dict(device="h200", dtype=torch.float16, source="b" * 64, rows=8193, n=4097)
    for argument, other in others.items():
        assert database.key_of("rms_norm.forward", ("rows",), ("n",), **{**given, argument: other}) != key, argument
    assert database.key_of("rms_norm.backward", ("rows",), ("n",), **given) != key
    assert database.key_of("rms_norm.forward", ("rows",), ("n",), **{**given, "rows": 4097}) == key, "one power of two"


def test_an_argument_cannot_be_forgotten() -> None:
    given: dict[str, Any] = dict(device="h100", dtype=BF16, source="a" * 64, rows=8192, n=4096)
    with pytest.raises(ValueError, match=r"not in the key of rms_norm.forward: kind"):
        database.key_of("rms_norm.forward", ("rows",), ("n",), **given, kind="silu")
    with pytest.raises(KeyError):
        database.key_of("rms_norm.forward", ("rows",), ("n", "kind"), **given)
    with pytest.raises(ValueError):
        database.config_key(rms_norm.FORWARD, (*KEY, 3), "h100")


@pytest.mark.parametrize("kernel", _config.SPACES)
def test_every_space_has_keys(kernel: str) -> None:
    """Whatever its sizes are called: rotary's is ``tokens``."""
    space = _config.SPACES[kernel]
    sizes = [2] * len((*space.tokens, *space.sizes))
    key = database.config_key(space, (torch.device("cuda"), BF16, *sizes), "h100")
    for i in range(len(sizes)):
        other = [*sizes[:i], 5, *sizes[i + 1 :]]
        assert database.config_key(space, (torch.device("cuda"), BF16, *other), "h100") != key


def test_versions_and_source_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = name()
    monkeypatch.setattr(database, "versions", lambda: "torch 9.9, triton 3.6")
    assert name() != before
    monkeypatch.undo()
    monkeypatch.setattr(rms_norm.FORWARD, "source", "0" * 64)
    assert name() != before


def test_versions_are_short() -> None:
    assert f"torch {'.'.join(torch.__version__.split('.')[:2])}, " in database.versions()
    assert database.versions().count(".") <= 2


def test_buckets() -> None:
    assert [database.bucket(n) for n in (0, 1, 2, 3, 4, 5, 8191, 8192, 8193)] == [1, 1, 2, 4, 4, 8, 8192, 8192, 16384]


def test_keys_are_keys_of_a_store() -> None:
    store.text()(name())
    long = database.key_of(
        "x",
        (),
        [f"s{i}" for i in range(60)],
        device="h100",
        dtype=BF16,
        source="a" * 64,
        **{f"s{i}": i for i in range(60)},
    )
    store.text()(long)
    assert long.startswith("h100/")


# ------------------------------------------------------------------------------------------------------------ selection


def test_the_order_of_selection() -> None:
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 1, "4. the heuristic"
    ship({name(): of(BLOCK_M=2, num_warps=8)})
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 2, "3. shipped"
    tune(of(BLOCK_M=4, num_warps=16))
    assert rms_norm.FORWARD(*KEY) == {**rms_norm.FORWARD.heuristic(*KEY), "BLOCK_M": 4, "num_warps": 16}, "2. tuned"
    with rms_norm.FORWARD.using({"BLOCK_M": 8, "num_warps": 16}):
        assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 8, "1. explicit"
    assert database.select_config(rms_norm.FORWARD, KEY, None)[1] == "tuned"
    assert rms_norm.FORWARD(CPU, BF16, 8192, 2048)["BLOCK_M"] == 2, "another size: the heuristic"
    assert rms_norm.FORWARD(CPU, BF16, 5000, 4096)["BLOCK_M"] == 4, "another number of rows, the same power of two"


def test_a_record_that_says_that_the_heuristic_is_best() -> None:
    ship({name(): of(BLOCK_M=2, num_warps=8)})
    tune(of())
    assert rms_norm.FORWARD(*KEY) == rms_norm.FORWARD.heuristic(*KEY)


@pytest.mark.parametrize("config", [{"BLOCK_M": 3, "num_warps": 8}, {"BLOCK_M": 64, "num_warps": 1}, {"N": 1}])
def test_an_illegal_record_is_refused(config: dict[str, int]) -> None:
    tune(of(**config))
    assert rms_norm.FORWARD(*KEY) == rms_norm.FORWARD.heuristic(*KEY)
    (line,) = store.problems()
    assert line.startswith("the tuned configuration of rms_norm.forward: ")
    assert any("rms_norm.forward" in e for e in fastft.report().errors)


def test_another_device_has_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tune(of(BLOCK_M=4, num_warps=16))
    for kind in ("h200", ""):
        monkeypatch.setattr(database, "device_kind", lambda device=None, kind=kind: kind)
        _config.forget()
        assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 1


# ---------------------------------------------------------------------------------------------------------------- files


def test_what_is_written_is_read() -> None:
    records = {name(): of(BLOCK_M=2, num_warps=8), name(space=rms_norm.BACKWARD): of()}
    assert database.read_file(ship(records), "h100") == {key: brief(record) for key, record in records.items()}
    assert store.problems() == []
    assert database.read_file(database.SHIPPED / "nope.json", "h100") == {} and store.problems() == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": 2}, "it has version 2; this fastft reads 1"),
        ({"device": "h200"}, "it is about 'h200', and this device is 'h100'"),
        ({"database": "x"}, "no database of fastft's"),
        ({"more": 1}, "does not have the fields"),
        ({"records": {"h200/rms_norm.forward": of()}}, "a record of another device"),
        ({"records": {"h100/rms_norm.forward": {**of(), "us": -1.0}}}, "no number from"),
        ({"records": {"h100/rms_norm.forward": {**of(), "config": {"BLOCK_M": "4"}}}}, "no whole number"),
    ],
)
def test_files_that_are_refused(change: dict[str, Any], why: str) -> None:
    path = ship({name(): of(BLOCK_M=2, num_warps=8)}, change)
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 1
    (line,) = store.problems()
    assert line.startswith(f"{path}: ") and why in line
    assert [e for e in fastft.report().errors if why in e]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"version": 1}', "\x00\xff", "[" * 100_000])
def test_damaged_files(content: str) -> None:
    path = database.SHIPPED / "h100.json"
    path.write_text(content)
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 1
    assert [line for line in store.problems() if line.startswith(str(path))]


def test_files_of_others_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ship({name(): of(BLOCK_M=2, num_warps=8)})
    monkeypatch.setattr(store, "distrust", lambda info: "it belongs to user 7, not to 0")
    assert database.read_file(path, "h100") == {}
    assert store.problems() == [f"{path}: it belongs to user 7, not to 0"]


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    path = ship({name(): of(BLOCK_M=2, num_warps=8)})
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    assert database.read_file(path, "h100") == {} and store.problems()


def test_records_of_before_and_of_later_are_good() -> None:
    before = {
        field: value for field, value in of(BLOCK_M=4, num_warps=16).items() if field not in ("failed", "skipped")
    }
    tune(before)
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 4
    assert database.read_file(ship({name(): before}), "h100") == {name(): {**brief(before), "failed": 1}}
    tune({**of(BLOCK_M=2, num_warps=8), "of a later fastft": [1, 2]})
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 2 and store.problems() == []
    for wrong in ({"skipped": {"illegal": "3"}}, {"failed": -1}):
        with pytest.raises(ValueError, match="no whole number"):
            database.RECORD({**of(), **wrong})
    with pytest.raises(ValueError, match="does not have the fields"):
        database.RECORD({field: value for field, value in of().items() if field != "us"})


def test_a_file_that_is_no_json_is_named() -> None:
    shipped, mine = ship({}), database.user_store().path(name())
    tune(of(BLOCK_M=4, num_warps=16))
    for path in (shipped, mine):
        path.write_text("{")
    assert rms_norm.FORWARD(*KEY) == rms_norm.FORWARD.heuristic(*KEY)
    assert [line.partition(" JSON: ")[0] for line in store.problems()] == [f"{p}: it is not" for p in (shipped, mine)]


def test_only_records_of_the_device_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(store.StoreError, match="another device"):
        database.write_file(tmp_path / "x.json", "h200", {name(): of()})
    assert list(tmp_path.glob("*x.json*")) == []


def test_the_files_that_come_with_the_package() -> None:
    folder = Path(database.__file__).parent / "databases"
    for path in folder.glob("*.json"):
        records = database.read_file(path, path.stem)
        assert records, f"{path}: {store.problems()}"
        edited = sorted({key.split("/")[1] for key in records if database.void(key)})
        assert not edited, (
            f"{path.name} has records of {', '.join(edited)}, edited since they were measured: run `fastft tune` on "
            "that device and add what it exports, or take them out by `fastft.autotune.database.prune()`"
        )


def test_a_fresh_process_takes_nothing_out() -> None:
    """Which has no kernel in it, until it asks for them."""
    path = ship({name(): of(), name(space=rms_norm.BACKWARD): of()})
    code = f"""
from pathlib import Path
from fastft.autotune import database
print(database.prune(Path({str(path.parent)!r})))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.split() == ["0"] and len(database.read_file(path, "h100")) == 2


def test_records_of_a_kernel_that_was_edited_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key says which source it is about, however many sizes are in it."""
    attention = _config.SPACES["attention.forward"]
    long = name((CPU, BF16, *[12345] * len((*attention.tokens, *attention.sizes))), attention)
    _, of_op = variants.site_key(OPS["glu"], (torch.zeros(8, 64), torch.zeros(8, 64), "silu"), {})
    keys = [name(), name(space=rms_norm.BACKWARD), long, of_op]
    assert "…" in long and not any(map(database.void, keys))
    path = ship({key: of() for key in keys})
    assert database.prune() == 0
    monkeypatch.setattr(rms_norm.BACKWARD, "source", "c" * 64)
    monkeypatch.setattr(attention, "source", "d" * 64)
    edited = [key for key in keys if database.void(key)]
    assert edited == keys[1:3]
    ship({**{key: of() for key in keys}, "h100/gone/bfloat16/n=1/torch 2.11, triton 3.6/abc": of()})
    assert database.prune() == 3
    assert set(database.read_file(path, "h100")) == {keys[0], keys[3]}


# ----------------------------------------------------------------------------------------------------------------- cost


def test_a_fresh_process_looks_a_model_up_in_50_ms(tmp_path: Path) -> None:
    """32 layers, with a full file that is shipped: their launches' configurations, and their sites' variants."""
    mine, shipped = database.user_store(), {}
    why = "OutOfResources: out of resource: shared memory, Required: 262144, Hardware limit: 232448. " * 3
    failures = {f"BLOCK_M={2**i % 61} num_warps={i} num_stages=4": why[:290] for i in range(15)}
    for n in range(1500):
        shipped[name((CPU, BF16, 8192, n + 1))] = {**of(BLOCK_M=2, num_warps=4), "failures": failures, "failed": 15}
    for n in range(40):
        mine.put(name((CPU, BF16, 8192, 4000 + n)), of(BLOCK_M=2, num_warps=8))
    mine.put(name(), of(BLOCK_M=4, num_warps=16))
    assert why[:290] not in ship(shipped).read_text()
    code = f"""
import sys, time, torch, fastft.kernels
from pathlib import Path
from torch._subclasses.fake_tensor import FakeTensorMode
fastft.kernels.load()
from fastft.kernels import attention, glu, rms_norm, rotary
from fastft.kernels._inputs import Model, New
from fastft.kernels._op import OPS
sizes = dict(
    model_type="llama", hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, rms_norm_eps=1e-5,
)
model = Model.of(sizes, 4, 2048)
ops = ("rms_norm", "lora_linears", "rotary", "attention", "lora_linear")
ops += ("rms_norm", "lora_linears", "glu", "lora_linear")  # a layer's sites: q, k, v and gate, up are one each
with FakeTensorMode():
    calls = [(op, op.inputs(New(torch.bfloat16, "cpu"), **next(op.sizes(model)))) for op in map(OPS.get, ops)]
start = time.process_time()
from fastft.autotune import database
database.SHIPPED, database.device_kind = Path({str(database.SHIPPED)!r}), lambda device=None: "h100"
key = torch.device("cpu"), torch.bfloat16
for layer in range(32):
    found = rms_norm.FORWARD(*key, 8192, 4096)
    rms_norm.BACKWARD(*key, 8192, 4096)
    glu.FORWARD(*key, 8192, 14336, "silu")
    glu.BACKWARD(*key, 8192, 14336, "silu")
    for transpose in (False, True):
        rotary.CONFIG(*key, 8192, 32, 8, 128, 128, "half", transpose)
    for space in attention.CONFIGS.values():
        space(*key, 128, 2048, 2048, 128, 128, 4, True, 0, 0, False, False, False, 0, False)
launches = time.process_time()
from fastft.autotune import variants  # a compiler has it before it looks anything up
imported = time.process_time()
for layer in range(32):
    chosen = [variants.choose(op, None, one.args, one.kwargs) for op, one in calls]
print(1e3 * (time.process_time() - imported + launches - start))
assert found["BLOCK_M"] == 4 and [v.name for v in chosen] == [op.default for op, _ in calls]
assert len(database.current("h100").shipped) == 1500
"""
    times: list[float] = []
    while len(times) < 6 and min(times, default=50.0) >= 50.0:  # others may be busy on this machine
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        times.append(float(done.stdout))
    print(f"{min(times):.1f} ms")
    assert min(times) < 50.0, times


# ---------------------------------------------------------------------------------------------------------------- ranks


def test_all_ranks_take_rank_0s_configuration(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank, block in enumerate((4, 2)):
        folder = tmp_path / f"rank{rank}"
        database.Store("tuned", database.RECORD, version=database.VERSION, folder=folder).put(
            name(), of(BLOCK_M=block, num_warps=16)
        )
        command = [sys.executable, str(Path(__file__).with_name("_ranks.py")), str(rank), "2", str(port)]
        environment = {**os.environ, "FASTFT_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = [json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in ranks]
    assert [one["alone"] for one in found] == [4, 2]
    assert [one["together"] for one in found] == [4, 4]
    assert [one["problems"] for one in found] == [[], []]


class Group:
    """A process group's store."""

    def __init__(self, **values: str) -> None:
        self.values = {"fastft/tuned": values["value"]} if values else {}

    def set(self, name: str, value: str) -> None:
        self.values[name] = value

    def wait(self, names: list[str], limit: Any) -> None:
        if not self.values:
            raise RuntimeError("wait timeout after 60000ms")

    def get(self, name: str) -> bytes:
        return self.values[name].encode()


@pytest.mark.parametrize(
    ("group", "why"),
    [
        (Group(), "wait timeout"),
        (Group(value="{"), "JSONDecodeError"),
        (Group(value=json.dumps(["h200", [], {}])), "rank 0 has a h200, this rank a h100"),
        (Group(value=json.dumps(["h100", [], {"k": {"value": {}, "source": "tuned"}}])), "does not have the fields"),
    ],
)
def test_what_rank_0_says_is_checked(monkeypatch: pytest.MonkeyPatch, group: Group, why: str) -> None:
    tune(of(BLOCK_M=4, num_warps=16))
    monkeypatch.setattr(database, "_group", lambda: (group, 1))
    assert rms_norm.FORWARD(*KEY) == rms_norm.FORWARD.heuristic(*KEY)
    (line,) = store.problems()
    assert why in line


def test_rank_0_hands_both_kinds_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tune(of(BLOCK_M=4, num_warps=16))
    ship({name(): of(BLOCK_M=2, num_warps=8), name(space=rms_norm.BACKWARD): of(BLOCK_M=2, num_warps=8, PROGRAMS=2)})
    group = Group()
    monkeypatch.setattr(database, "_group", lambda: (group, 0))
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 4
    monkeypatch.setenv("FASTFT_CACHE_DIR", "/nonexistent")
    database.forget()
    monkeypatch.setattr(database, "_group", lambda: (group, 1))
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 4
    assert rms_norm.BACKWARD(*KEY)["PROGRAMS"] == 2
    assert glu.FORWARD(CPU, BF16, 8192, 14336, "silu")["BLOCK"] == 1024


def test_a_rank_waits_10_s_at_the_most_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Group):
        """Rank 0 never says anything."""

        waited = 0.0

        def wait(self, names: list[str], limit: Any) -> None:
            self.waited += limit.total_seconds()
            raise RuntimeError(f"wait timeout after {limit.total_seconds():g} s")

    tune(of(BLOCK_M=4, num_warps=16))
    slow = Slow()
    monkeypatch.setattr(database, "_group", lambda: (slow, 1))
    database.share()
    for rows in (8192, 4096, 2048):
        for space in (rms_norm.FORWARD, rms_norm.BACKWARD):
            assert space(CPU, BF16, rows, 4096) == space.heuristic(CPU, BF16, rows, 4096)
    assert 0.0 < slow.waited <= 10.0, "once, however much is looked up"
    (line,) = [e for e in fastft.report().errors if "rank 0" in e]
    assert "this rank gave up after waiting 10 s" in line and "may launch other kernels than rank 0" in line


def test_ranks_with_other_variants_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastft.autotune import variants
    from tests.autotune import _mine

    monkeypatch.setattr(variants, "_USERS", {})
    monkeypatch.setattr(variants, "_LOADED", True)
    group = Group()
    fastft.variants.register("glu", "mine")(_mine.glu)
    monkeypatch.setattr(database, "_group", lambda: (group, 0))
    tune(of(BLOCK_M=4, num_warps=16))
    assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 4
    for rank_has_it in (True, False):
        if not rank_has_it:
            monkeypatch.setattr(variants, "_USERS", {})
        database.forget()
        monkeypatch.setattr(database, "_group", lambda: (group, 1))
        assert rms_norm.FORWARD(*KEY)["BLOCK_M"] == 4, "its records are good all the same"
        said = [e for e in fastft.report().errors if "rank 0's list of users' variants" in e]
        assert bool(said) is not rank_has_it
    assert "it has glu=mine (" in said[0] and "this rank has none" in said[0]
