"""The search: who wins, who may not, and what is written down. A made-up machine stands for the GPU."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastft
import fastft.kernels
from fastft import cli
from fastft.autotune import database, search, store, timing, tuning, variants
from fastft.autotune.cases import SMALL, Case, cases, small_cases
from fastft.autotune.search import Race, TuningError, race
from fastft.autotune.timing import in_turns, median_and_spread
from fastft.kernels import rms_norm
from fastft.kernels._config import Space, shown
from fastft.kernels._op import OPS
from fastft.kernels._triton import HAS_TRITON
from tests.autotune import _mine

fastft.kernels.load()
KEY = (torch.device("cpu"), torch.bfloat16, 8192, 4096)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "user"))
    monkeypatch.setattr(store, "_PROBLEMS", {})
    monkeypatch.setattr(variants, "_USERS", {})
    monkeypatch.setattr(variants, "_LOADED", True)
    database.forget()
    yield
    database.forget()


class Made:
    """Times by label, µs; ``jitter``: a sequence of factors that samples go through; ``broken``: label → what happens
    (a string is a wrong result, an exception is raised)."""

    def __init__(self, times: dict[str, float], broken: dict[str, Any] | None = None, jitter: float = 0.0) -> None:
        self.times, self.broken = times, broken or {}
        self.floors: dict[str, float] = {}
        self.jitter = itertools.cycle([1.0, 1.0 + jitter, 1.0 - jitter])
        self.compiled: list[str] = []
        self.sampled: list[str] = []

    def compile(self, labels: Sequence[str]) -> None:
        self.compiled += labels

    def check(self, label: str) -> str | None:
        found = self.broken.get(label)
        if isinstance(found, Exception):
            raise found
        return found

    def sample(self, label: str) -> float:
        self.sampled.append(label)
        return self.times[label] * next(self.jitter)

    def floor_us(self, label: str) -> float | None:
        return self.floors.get(label)


def test_the_fastest_wins() -> None:
    done = race(["a", "b"], Made({"": 10.0, "a": 8.0, "b": 5.0}), seconds=0.0)
    assert done == Race("b", 5.0, 10.0, search.LEAST, 3)


def test_who_is_not_faster_than_the_noise_does_not_win() -> None:
    done = race(["a"], Made({"": 10.0, "a": 9.5}, jitter=0.1), seconds=0.0)
    assert done.best == "" and done.us == done.default_us and done.noise > 0.05
    assert race(["a"], Made({"": 10.0, "a": 9.5}, jitter=0.01), seconds=0.0).best == "a"
    assert race(["a"], Made({"": 10.0, "a": 9.95}), seconds=0.0).best == "", "less than a hundredth"


def test_a_candidate_that_fails_is_written_down_and_does_not_win() -> None:
    broken = {"a": RuntimeError("out of resource:\nshared memory"), "b": "error 3.0e-1 is over its bound"}
    bench = Made({"": 10.0, "a": 1.0, "b": 1.0, "c": 9.0}, broken)
    done = race(["a", "b", "c"], bench, seconds=0.0)
    assert done.best == "c" and done.tried == 2
    assert done.failures == {"a": "RuntimeError: out of resource: shared memory", "b": "error 3.0e-1 is over its bound"}
    assert bench.compiled == ["a", "b", "c"] and not {"a", "b"} & set(bench.sampled)


def test_one_that_fails_while_it_is_timed() -> None:
    bench = Made({"": 10.0, "b": 5.0})  # no time for a: KeyError
    done = race(["a", "b"], bench, seconds=0.0)
    assert done.best == "b" and "KeyError" in done.failures["a"]


def test_where_the_heuristic_fails_the_best_of_the_others_is_taken() -> None:
    done = race(["a", "b"], Made({"a": 8.0, "b": 9.0}, {"": RuntimeError("no")}), seconds=0.0)
    assert (done.best, done.default_us) == ("a", 0.0) and "no" in done.failures[""]
    assert "heuristic" in search.to_record(done, {"BLOCK_M": 1})["failures"]


def test_only_all_failing_is_an_error() -> None:
    broken = {"": RuntimeError("no"), "a": RuntimeError("neither")}
    with pytest.raises(TuningError, match=r"the heuristic: RuntimeError: no; a: RuntimeError: neither"):
        race(["a"], Made({}, broken), seconds=0.0)
    with pytest.raises(TuningError):
        race(["a"], Made({}), seconds=0.0)


def test_nothing_is_searched_near_the_floor() -> None:
    bench = Made({"": 10.0, "a": 1.0})
    bench.floors = {"": 9.8}
    done = race(["a"], bench, seconds=0.0)
    assert done == Race("", 10.0, 10.0, 0.0, 1, skipped={"floor": 1}) and not bench.compiled
    bench.floors = {"": 5.0}
    assert race(["a"], bench, seconds=0.0).best == "a"


def test_who_is_too_slow_by_the_roofline_is_not_compiled() -> None:
    bench = Made({"": 10.0, "a": 1.0, "b": 2.0, "c": 3.0})
    bench.floors = {"": 1.0, "a": 10.6, "b": 10.4}  # of c nobody knows
    done = race(["a", "b", "c"], bench, seconds=0.0)
    assert done.best == "b" and bench.compiled == ["b", "c"] and done.skipped == {"roofline": 1}
    assert "a" not in bench.sampled
    bench = Made({"a": 1.0, "b": 2.0}, {"": RuntimeError("no")})
    bench.floors = {"a": 1e9}
    assert race(["a", "b"], bench, seconds=0.0).best == "a", "with no time to compare with, nobody is left out"


def test_those_that_are_too_many_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "MOST", 2)
    bench = Made({label: 10.0 for label in ("", *"abcd")})
    bench.floors = {"a": 20.0}
    done = race([*"abcd"], bench, seconds=0.0)
    assert bench.compiled == ["b", "c"], "whom the roofline leaves out takes nobody's place"
    assert done.skipped == {"roofline": 1, "cap": 1}


def test_only_the_fastest_go_into_the_long_race() -> None:
    labels = [str(n) for n in range(20)]
    bench = Made({"": 10.0, **{label: 20.0 - int(label) / 10 for label in labels}})
    race(labels, bench, rounds=(9, 9))
    assert bench.sampled.count("19") == 12 and bench.sampled.count("3") == 3 and bench.sampled.count("") == 12


def test_turns() -> None:
    asked: list[str] = []
    ticks = itertools.count()
    samples, failed = in_turns(
        ["a", "b"],
        lambda label: float(asked.append(label) or 1.0),
        rounds=(2, 9),
        seconds=3.0,
        clock=lambda: next(ticks),
    )
    assert asked[:4] == ["a", "b", "b", "a"] and not failed
    assert len(samples["a"]) == len(samples["b"]) == 4, "two rounds at least, then until the clock says 3 s"


def test_median_and_spread() -> None:
    assert median_and_spread([3.0]) == (3.0, 0.0)
    assert median_and_spread([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0 / 3.0)


def test_what_failures_say_can_be_stored() -> None:
    store.text(300)(timing.said(RuntimeError("a\n\x00" * 1000)))


def test_a_search_of_a_real_space() -> None:
    legal, refused = rms_norm.FORWARD.candidates(*KEY)
    near = search.nearest_first(rms_norm.FORWARD, KEY, legal)
    assert rms_norm.FORWARD.chosen(*KEY) not in near and len(near) == len(legal) - 1 and refused
    best = near[3]
    times = {"": 10.0, **{shown(c): 12.0 for c in legal}, shown(best): 5.0}
    record = search.search(rms_norm.FORWARD, KEY, Made(times, {shown(near[0]): "wrong"}), seconds=0.0)
    database.RECORD(record)
    assert record["config"] == best and record["us"] == 5.0 and record["heuristic_us"] == 10.0
    assert record["failures"] == {shown(near[0]): "wrong"} and record["failed"] == 1
    assert record["skipped"] == {"illegal": len(refused)} and record["tried"] == len(legal) - 1
    assert tuning.parsed(shown(best)) == best and tuning.parsed("") is None


# ------------------------------------------------------------------------------------------------------- a whole tuning


class Machine:
    """A device of kind ``h100`` on which the third candidate of each kernel is twice as fast as all others."""

    kind = "h100"

    def __init__(self) -> None:
        self.benches: list[str] = []

    def jobs(self, case: Case) -> list[tuning.Job]:
        if case.op != "rms_norm":
            return []
        spaces = (rms_norm.FORWARD, rms_norm.BACKWARD)
        return [tuning.Job(case, database.config_key(s, KEY, self.kind), "forward", s, KEY) for s in spaces]

    @contextlib.contextmanager
    def bench(self, job: tuning.Job) -> Iterator[Any]:
        space: Space = job.space  # type: ignore[assignment]
        self.benches.append(space.kernel)
        near = search.nearest_first(space, KEY, space.candidates(*KEY)[0])
        yield Made({"": 10.0, **{shown(c): 10.0 for c in near}, shown(near[2]): 5.0})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(cli, "_tuned_device", lambda dtype: made)
    monkeypatch.setattr(database, "device_kind", lambda device=None: "h100")
    return made


def tune(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["tune", *arguments])


def test_what_is_tuned_is_launched(machine: Machine) -> None:
    before = rms_norm.FORWARD(*KEY)
    found = tune("--model", "llama-3.1-8b", "--ops", "rms_norm")
    assert found.exit_code == 0, found.output
    assert "2 tuned, 0 known before, 0 failed." in found.output and "5.0 µs; heuristic 10.0 µs" in found.output
    legal, refused = rms_norm.FORWARD.candidates(*KEY)
    assert f"; {len(legal)} timed, {len(refused)} cannot run" in found.output
    near = search.nearest_first(rms_norm.FORWARD, KEY, rms_norm.FORWARD.candidates(*KEY)[0])
    assert rms_norm.FORWARD(*KEY) == {**before, **near[2]} != before
    again = tune("--model", "llama-3.1-8b")
    assert "0 tuned, 2 known before" in again.output and len(machine.benches) == 2
    assert "2 tuned" in tune("--model", "llama-3.1-8b", "--again").output


def test_list_and_export(machine: Machine, tmp_path: Path) -> None:
    file = tmp_path / "h100.json"
    assert tune("--export", str(file)).exit_code == 2, "nothing there yet"
    tune("--model", "llama-3.1-8b")
    listed = tune("--list")
    assert listed.exit_code == 0 and "rms_norm.backward" in listed.output and "2 tuned in" in listed.output
    assert tune("--export", str(file)).exit_code == 0
    mine = database.user_store().items()
    assert len(mine) == 2 and database.read_file(file, "h100") == {
        key: {**found, "failures": {}, "failed": 0} for key, found in mine.items()
    }
    assert tune("--export", str(file), "--device", "h200").exit_code == 2
    database.user_store().put(f"{next(iter(mine))[:-12]}{'a' * 12}", next(iter(mine.values())))
    found = tune("--export", str(file))
    assert "2 records of h100 are in" in found.output and "; 1 are left out" in found.output
    assert len(database.read_file(file, "h100")) == 2
    for bad, why in ((tmp_path / "nodir" / "x.json", "there is no folder"), (tmp_path, "Is a directory")):
        found = tune("--export", str(bad))
        assert found.exit_code == 2 and found.output.startswith(f"fastft: cannot write {bad}: {why}")


def test_it_can_be_stopped_and_goes_on(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Machine.bench

    def interrupted(self: Machine, job: tuning.Job) -> Any:
        if len(self.benches) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, job)

    monkeypatch.setattr(Machine, "bench", interrupted)
    stopped = tune("--model", "llama-3.1-8b")
    assert stopped.exit_code == 130 and "Stopped. 1 tuned and kept" in stopped.output
    assert len(database.user_store().items()) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    monkeypatch.setattr(Machine, "bench", whole)
    assert "1 tuned, 1 known before" in tune("--model", "llama-3.1-8b").output


def test_a_budget(machine: Machine) -> None:
    ticks = itertools.count()
    found = [*tuning.tune(cases(*SMALL[0]), machine, budget=1.5, clock=lambda: next(ticks), seconds=0.0)]
    assert len(found) == 1 and found[0].record is not None


def test_a_kernel_of_which_nothing_runs_is_an_error_of_its_own(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "bench", lambda self, job: contextlib.nullcontext(Made({})))
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 1 and "0 tuned, 0 known before, 2 failed." in found.output
    assert database.user_store().items() == {}


def test_a_bench_that_raises_stops_no_other_kernel(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Machine.bench

    def bench(self: Machine, job: tuning.Job) -> Any:
        if job.space is rms_norm.FORWARD:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, job)

    monkeypatch.setattr(Machine, "bench", bench)
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 1 and "1 tuned, 0 known before, 1 failed." in found.output
    assert "rms_norm.forward: OutOfMemoryError: CUDA out of memory" in found.output


def test_a_call_that_raises_stops_no_other(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Machine.jobs

    def jobs(self: Machine, case: Case) -> Iterator[tuning.Job | tuning.Done]:
        if case.op == "attention":
            raise RuntimeError("out of resource: shared memory")
        yield from whole(self, case)

    monkeypatch.setattr(Machine, "jobs", jobs)
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 1 and "2 tuned, 0 known before, 3 failed." in found.output
    assert "attention: RuntimeError: out of resource: shared memory" in found.output


def test_a_call_is_looked_at_when_those_before_it_are_tuned(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, there = Machine.jobs, []

    def jobs(self: Machine, case: Case) -> Iterator[tuning.Job | tuning.Done]:
        for job in whole(self, case):
            there.append(len(database.user_store().items()))
            yield job

    monkeypatch.setattr(Machine, "jobs", jobs)
    reached: list[int] = []
    calls = [case for case in cases(*SMALL[0]) if case.op in ("glu", "rms_norm")]
    assert [d.error for d in tuning.tune(calls, machine, seconds=0.0, reached=reached.append)] == ["", ""]
    assert there == [0, 1] and reached == [*range(len(calls) + 1)]


def test_what_cannot_be_kept_is_not_tuned(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "file"))
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 1 and "0 tuned, 0 known before, 2 failed." in found.output
    said = " ".join(found.output.split())
    assert "rms_norm.forward: not measured, for it could not be kept: " in said and "File exists" in said
    assert machine.benches == [], "nobody waits for what is lost"


def test_a_record_of_a_newer_fastft_is_not_replaced(machine: Machine) -> None:
    assert tune("--model", "llama-3.1-8b").exit_code == 0
    file = database.user_store().path(database.config_key(rms_norm.FORWARD, KEY, "h100"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": database.VERSION + 1}))
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 1 and "0 tuned, 1 known before, 1 failed." in found.output
    assert f"it has version {database.VERSION + 1}" in " ".join(found.output.split())
    assert json.loads(file.read_text())["version"] == database.VERSION + 1


def test_a_disk_that_fills_up_meanwhile(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", full)
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 1 and "0 tuned, 0 known before, 2 failed." in found.output
    assert "measured, and could not be kept: " in found.output and "No space left on device" in found.output


#: A GPU without what only a GPU has: streams, graphs, its clock. Triton's interpreter runs the kernels.
ON_A_CPU = """
import contextlib, time, types
import torch
from fastft.autotune import database, search, tuning
from fastft.autotune.cases import cases

stream = types.SimpleNamespace(wait_stream=lambda other: None)
for name, value in dict(
    is_available=True, synchronize=None, empty_cache=None, current_device=0, set_device=None, graph_pool_handle=None,
    Stream=stream, current_stream=stream, stream=contextlib.nullcontext(), get_device_name="",
).items():
    setattr(torch.cuda, name, lambda *_, value=value: value)
database.device_kind = lambda device=None: "h100"

class Samples:
    def __init__(self, run, copies, pool):
        self.run = run
    def __call__(self):
        start = time.perf_counter()
        self.run(0)
        return 1e6 * (time.perf_counter() - start)

tuning.Samples, tuning.copies_of, tuning.copy_bytes_per_us, search.MOST = Samples, lambda _: 2, lambda: 1e9, 3
tuning.GPU._inputs = lambda self, case: case.make(tuning.New(self.dtype, "cpu"))
fields = dict(hidden_size=8, intermediate_size=48, num_attention_heads=1, vocab_size=9, hidden_act="silu")
calls = [case for case in cases(fields, 1, 4) if case.op == "glu"]
for done in tuning.tune(calls, tuning.GPU(torch.float16), rounds=(2, 2), seconds=0.0):
    print(done.job.space.kernel, done.job.phase, done.record["tried"], len(done.record["failures"]), done.error)
"""


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_gpu_from_its_jobs_to_its_records() -> None:
    """In a process of its own, that has loaded no kernel."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(
        [sys.executable, "-c", ON_A_CPU], env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.stdout.splitlines() == ["glu.forward forward 4 0 ", "glu.backward backward 4 0 "], found.stderr
    assert len(database.user_store().items()) == 2


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    found = tune("--model", "llama-3.1-8b")
    assert found.exit_code == 2 and "tuning needs a CUDA GPU, and torch sees none here" in found.output
    assert tune("--export", "x.json").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tune needs --model"),
        (["--model", "llama-3.1-8"], "did you mean 'llama-3.1-8b'?"),
        (["--model", "/tmp/nothing"], "--model /tmp/nothing: no such file, and bench/shapes.py has no model"),
        (["--model", "nowhere/config.json"], "No such file"),
        (["--model", "llama-3.1-8b", "--ops", "rmsnorm"], "did you mean 'rms_norm'?"),
        (["--model", "llama-3.1-8b", "--dtype", "int8"], "it is bfloat16, float16 or float32"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    found = tune(*arguments)
    assert found.exit_code == 2 and message in " ".join(found.output.split())


def test_the_help_has_an_example() -> None:
    assert "Example: fastft tune --model" in tune("--help").output


def test_a_config_file(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL[0][0]))
    assert tune("--model", str(tmp_path)).exit_code == 0
    (tmp_path / "without_a_suffix").write_text(json.dumps(SMALL[0][0]))
    assert tune("--model", str(tmp_path / "without_a_suffix")).exit_code == 0
    (tmp_path / "config.json").write_text("{}")
    assert tune("--model", str(tmp_path / "config.json")).exit_code == 2
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in tune("--model", str(tmp_path)).output


def test_every_op_has_cases_and_every_model_of_the_list() -> None:
    from bench.shapes import MODELS

    assert {op for op in OPS if small_cases(op)} == set(OPS)
    for name, config in MODELS.items():
        assert {"attention", "rotary", "nf4_dequantize"} <= {c.op for c in cases(config, 1, 8)}, name


# ------------------------------------------------------------------------------------------------------------- verified


def verify(asked: str, *more: str) -> Any:
    return CliRunner().invoke(cli.app, ["verify", "--variant", asked, *more])


def test_what_is_not_exact_is_never_raced() -> None:
    for op in ("linear_cross_entropy", "linear_log_prob"):
        assert [v.name for v in tuning.offered(op, database.device_kind())] == ["fused"]
        assert [v.name for v in fastft.variants.list(op)] == ["triton", "fused", "filtered", "reference"]


def test_a_right_variant_passes_and_is_offered() -> None:
    fastft.variants.register("rms_norm", "mine")(_mine.rms_norm)
    assert "mine" not in {v.name for v in tuning.offered("rms_norm", database.device_kind())}
    found = verify("rms_norm=mine")
    assert found.exit_code == 0 and "It passed, in " in found.output
    assert "mine" in {v.name for v in tuning.offered("rms_norm", database.device_kind())}


def test_a_wrong_variant_does_not() -> None:
    fastft.variants.register("glu", "mine", supported=_mine.only_silu)(_mine.wrong_glu)
    found = verify("glu=mine", "--json")
    assert found.exit_code == 1
    body = json.loads(found.stdout)
    assert not body["ok"] and {row["status"] for row in body["cases"] if "no tokens" not in row["inputs"]} == {
        "wrong",
        "refused",
    }
    assert "mine" not in {v.name for v in tuning.offered("glu", database.device_kind())}


def test_a_verdict_that_cannot_be_kept_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fastft.variants.register("rms_norm", "mine")(_mine.rms_norm)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "file"))
    found = verify("rms_norm=mine")
    assert "It passed" in found.output and "the verdict could not be kept" in found.output
    assert "File exists" in found.output
    assert json.loads(verify("rms_norm=mine", "--json").stdout)["kept"] is False
    monkeypatch.setenv("FASTFT_CACHE_DIR", str(tmp_path / "user"))
    found = verify("rms_norm=mine", "--json")
    assert json.loads(found.stdout)["kept"] is True and "could not be kept" not in found.output


def test_variants_are_raced_too(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    fastft.variants.register("rms_norm", "mine")(_mine.rms_norm)
    fastft.variants.register("rms_norm", "unverified")(_mine.other_rms_norm)
    variants.note_verified(variants.get("rms_norm", "mine"), "h100", True)
    x, w = torch.randn(2, 8, 64), torch.randn(64)
    _, name = variants.site_key(OPS["rms_norm"], (x, w, 1e-6), {})
    monkeypatch.setattr(Machine, "jobs", lambda self, case: [tuning.Job(case, name)])
    raced = Made({"": 10.0, "mine": 5.0})
    monkeypatch.setattr(Machine, "bench", lambda self, job: contextlib.nullcontext(raced))
    found = tune("--model", "llama-3.1-8b", "--ops", "rms_norm")
    assert found.exit_code == 0 and "variants of rms_norm" in found.output and set(raced.sampled) == {"", "mine"}
    # As the rule of norms spells it: another eps, and the dtype of the result, which is x's.
    chosen = variants.choose(OPS["rms_norm"], None, (x, w, 1e-5, 0.0, x.dtype), {})
    assert chosen.name == "mine"  # type: ignore[union-attr]
    assert variants.choose(OPS["rms_norm"], None, (x, w, 1e-5, 1.0), {}).name == "triton"  # type: ignore[union-attr]


def test_a_variant_that_refuses_everything_did_not_pass() -> None:
    fastft.variants.register("rms_norm", "mine", supported=_mine.never)(_mine.rms_norm)
    assert verify("rms_norm=mine").exit_code == 1


def test_unknown_variants_to_verify() -> None:
    for asked in ("glu", "glu=nope", "gluu=mine"):
        found = verify(asked)
        assert found.exit_code == 2 and "it has" in found.output
    assert CliRunner().invoke(cli.app, ["verify"]).exit_code == 2
