"""What is made of result files: the gate between two of them, tables, the HTML page."""

from __future__ import annotations

import copy
import json
import random
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import fastft.cli
from bench import cli, files, gate, report, running, tables, train
from bench.tables import OURS
from fastft.autotune.search import LEAST

RESULTS = Path(__file__).resolve().parents[1] / "bench" / "results"
COMPARED = sorted(RESULTS.glob("*compare.json"))


def figure(median: float, spread: float = 0.0) -> dict[str, float]:
    low, high = median * (1 - spread / 2), median * (1 + spread / 2)
    return {"median": median, "q1": low, "q3": high, "min": low, "max": high, "samples": 9}


def kernels(times: dict[str, float | str], spread: float = 0.0, **more: Any) -> dict[str, Any]:
    """A result file: ``"op shape implementation"`` → µs, or an error."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for key, us in times.items():
        op, shape, name = key.split(" ", 2)
        new = {
            "op": op,
            "shape": shape,
            "model": f"model-{shape}",
            "dtype": "bfloat16",
            "implementations": {},
            "floor_us": {"full": 80.0},
        }
        new |= {"copy_us": {"forward": 36.0, "backward": 54.0, "full": 90.0}}
        new |= {"bound": "memory", "forward_bytes": 2e8, "backward_bytes": 3e8, "forward_flops": 0.0}
        found: dict[str, Any] = {"error": us}
        if not isinstance(us, str):
            found = {f"{p}_us": figure(k * us, spread) for p, k in (("forward", 0.4), ("backward", 0.6), ("full", 1.0))}
            found |= {"timed": "graph", "roofline": {"forward": 0.8, "full": 80 / us}}
            found |= {"forward_GBps": 2500.0, "backward_GBps": 2400.0, "kept_bytes": 2**20, "first_call_s": 1.5}
        rows.setdefault((op, shape), new)["implementations"][name] = found
    head = {"schema": 1, "kind": "kernels", "device": {"name": "H100"}, "versions": {"torch": "2.11.0"}, "commit": "c"}
    ceilings = {"copy_GBps": 3000.0, "matmul_TFLOPps": 750.0}
    return {**head, "argv": ["x"], "ceilings": ceilings, "missing": {"quack": "no"}, "rows": [*rows.values()], **more}


def steps(times: dict[str, list[float] | str], **setup: Any) -> dict[str, Any]:
    """A training comparison: implementation → ms of its steps, or an error."""

    def run(impl: str, ms: list[float] | str) -> dict[str, Any]:
        said = {"schema": 1, "impl": impl, "argv": [], "status": "failed", "error": ms, "setup": {**SETUP, **setup}}
        if isinstance(ms, str):
            return said
        spread = {"all": ms, "median": ms[len(ms) // 2], "min": min(ms), "max": max(ms)}
        good = {"status": "ok", "error": None, "step_ms": spread, "peak_bytes": 9 * 2**30, "first_step_s": 60.0}
        more = {"loss": [5.0, 4.0], "device": {"name": "H100"}, "versions": {"torch": "2.11.0"}}
        more["kernels"] = [{"name": "nvjet_gemm", "calls": 3, "ms": 60.0}, {"name": "mystery", "calls": 1, "ms": 2.0}]
        more["timeline"] = running.timeline_of(EVENTS, 2**30, 0.0, [("forward", 0.0), ("backward", 1500.0)])
        return {**said, **good, **more}

    return train.compared({impl: [run(impl, ms)] for impl, ms in times.items()}, 1, next(iter(times)))


SETUP = {"model": "tiny", "quant": "nf4", "train": "lora", "rank": 16, "batch": 2, "seq": 8, "checkpointing": True}
EVENTS = [
    {"action": "alloc", "size": 2**30, "addr": 1, "time_us": 1000.0, "frames": [{"filename": __file__, "line": 1}]},
    {"action": "alloc", "size": 2**30, "addr": 2, "time_us": 1001.0},
    {"action": "free_requested", "size": 2**30, "addr": 2, "time_us": 1002.0},
    {"action": "free_completed", "size": 2**30, "addr": 2, "time_us": 1003.0},
    {"action": "free_requested", "size": 2**30, "addr": 1, "time_us": 3000.0},
]
BASE = {"rms_norm a fastft": 100.0, "rms_norm a eager": 200.0, "glu a fastft": 50.0}


@pytest.fixture
def compare(tmp_path, capsys):
    """Writes two files, runs the gate, gives its status and what it printed."""

    def run(old: Any, new: Any, *options: str) -> tuple[int, str]:
        for name, data in (("old", old), ("new", new)):
            text = data if isinstance(data, str) else json.dumps(data)
            (tmp_path / f"{name}.json").write_text(text)
        status = cli.main(["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json"), *options])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


# -- the gate


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({}, 0, "9 same"),  # forward, backward and both
        ({"rms_norm a fastft": 104.0}, 0, "9 same"),
        ({"rms_norm a fastft": 106.0}, 1, "3 slower"),
        ({"rms_norm a fastft": 60.0}, 0, "3 faster"),
        ({"rms_norm a eager": 400.0}, 0, "3 slower"),  # somebody else's
        ({"rms_norm a fastft": "OutOfMemoryError"}, 1, "1 gone"),
        ({"glu b fastft": 10.0}, 0, "1 new"),
    ],
)
def test_gate_of_kernels(compare, changed, status, says):
    found, said = compare(kernels(BASE), kernels({**BASE, **changed}))
    assert found == status and says in said
    assert ("Regressed" in said) == (status == 1)


def test_gate_of_a_row_that_is_gone(compare):
    fewer = {k: v for k, v in BASE.items() if not k.startswith("glu")}
    status, said = compare(kernels(BASE), kernels(fewer))
    assert status == 1 and "1 gone" in said
    without_eager = {k: v for k, v in BASE.items() if "eager" not in k}
    assert compare(kernels(BASE), kernels(without_eager))[0] == 0
    failed = {**BASE, "glu a fastft": "RuntimeError: no"}
    assert compare(kernels(failed), kernels(failed))[0] == 0  # as it was
    assert compare(kernels(failed), kernels(BASE))[0] == 0


def test_gate_allows_noise_that_the_files_have(compare):
    slower = {**BASE, "rms_norm a fastft": 110.0}
    assert compare(kernels(BASE), kernels(slower))[0] == 1
    assert compare(kernels(BASE), kernels(slower), "--band", "0.12")[0] == 0
    assert compare(kernels(BASE, spread=0.15), kernels(slower))[0] == 0
    assert compare(kernels(BASE), kernels(slower, spread=0.15))[0] == 0
    assert compare(kernels(BASE), kernels({**BASE, "rms_norm a fastft": 103.0}), "--band", "0.02")[0] == 1


def test_gate_of_forward_and_backward_apart(compare):
    """A forward that wins what the backward loses; each phase has a noise band of its own."""
    old, new = kernels(BASE), kernels(BASE)
    ours = new["rows"][0]["implementations"][OURS]
    ours |= {"forward_us": figure(30.0), "backward_us": figure(70.0)}  # 40 and 60
    status, said = compare(old, new)
    assert status == 1 and "1 slower, 1 faster, 7 same" in said
    assert "backward" in said and "70.0 µs" in said and "1.167" in said
    ours["backward_us"] = figure(70.0, 0.2)
    assert compare(old, new)[0] == 0
    del ours["backward_us"]
    status, said = compare(old, new)
    assert status == 1 and "1 gone" in said


def test_gate_of_peak_memory(compare):
    """A step as fast as before that needs more memory; the band of peaks is not that of times."""
    old, new = steps({"fastft": [60.0]}), steps({"fastft": [60.0]})
    (run,) = new["rows"][0]["runs"]
    run["peak_bytes"] = int(1.02 * 9 * 2**30)
    status, said = compare(old, new)
    assert status == 1 and "1 more memory" in said and "9.00 GiB" in said and "9.18 GiB" in said
    assert compare(new, old)[0] == 0 and "1 less memory" in compare(new, old)[1]
    assert compare(old, new, "--memory-band", "0.03")[0] == 0
    assert compare(old, new, "--band", "0.5")[0] == 1
    new["rows"][0]["runs"] += [{**run, "peak_bytes": 9 * 2**30}, {**run, "peak_bytes": int(9.4 * 2**30)}]
    assert compare(old, new)[0] == 0  # runs that scatter by more
    run["peak_bytes"] = None  # a CPU has none
    new["rows"][0]["runs"] = [run]
    assert compare(new, new)[0] == 0


def test_gate_of_training_steps(compare):
    old = steps({"eager": [100.0, 101.0, 102.0], "fastft": [60.0, 60.5, 61.0]})
    assert compare(old, old)[0] == 0
    status, said = compare(old, steps({"eager": [100.0, 101.0, 102.0], "fastft": [69.0, 70.0, 71.0]}))
    assert status == 1 and "1.157" in said and "slower" in said
    assert compare(old, steps({"eager": [100.0, 101.0, 102.0], "fastft": "out of memory"}))[0] == 1
    assert compare(old, steps({"eager": "timed out", "fastft": [60.0, 60.5, 61.0]}))[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("{", kernels(BASE), "is not JSON"),
        ([1], kernels(BASE), "not an object"),
        ({"a": 1}, kernels(BASE), "no schema"),
        ({**kernels(BASE), "schema": 99}, kernels(BASE), "schema 99; this version reads schema 1"),
        ({"schema": 1, "command": "ops", "rows": []}, kernels(BASE), "neither `bench kernels` nor `bench train`"),
        ({"benchmarks": [], "machine_info": {}}, kernels(BASE), "not of bench/kernels.py"),
        (kernels(BASE, device={"name": "H200"}), kernels(BASE), "measured on H200"),
        (kernels(BASE), steps({"fastft": [1.0]}), "kernels results"),
        (steps({"fastft": [1.0]}, seq=16), steps({"fastft": [1.0]}), "different settings: seq 16 and 8"),
        (steps({"fastft": [1.0]}, data="packed"), steps({"fastft": [1.0]}), "settings: data packed and full"),
    ],
)
def test_gate_refuses_what_says_nothing(compare, old, new, says):
    status, said = compare(old, new)
    assert status == 2 and says in said and "Traceback" not in said


def test_gate_reads_files_from_before_there_were_documents(compare):
    assert compare(steps({"fastft": [1.0]}), steps({"fastft": [1.0]}, data="full", document=512))[0] == 0


def test_gate_compares_devices_when_asked(compare):
    assert compare(kernels(BASE, device={"name": "H200"}), kernels(BASE), "--any-device")[0] == 0


def test_gate_arguments(compare, tmp_path, capsys):
    status, said = compare(kernels(BASE), kernels(BASE), "--band", "5")
    assert status == 2 and "--band is 5.0; it is a fraction" in said
    status, said = compare(kernels(BASE), kernels(BASE), "--memory-band=-1")
    assert status == 2 and "--memory-band is -1.0; it is a fraction" in said
    assert cli.main(["compare", str(tmp_path / "none.json"), str(tmp_path / "new.json")]) == 2
    assert "No such file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        cli.main(["compare", "old", "new", "--wide"])
    assert stopped.value.code == 2


def test_gate_shows_what_did_not_change_when_asked(compare):
    assert "rms_norm a" not in compare(kernels(BASE), kernels(BASE))[1]
    assert "rms_norm a" in compare(kernels(BASE), kernels(BASE), "--all")[1]


def test_the_worst_of_ours_is_first():
    old, new = ({"a": 10.0, "b": 10.0, "c": 10.0}, {"a": 12.0, "b": 20.0, "c": 40.0})
    found = [
        gate.Change(what, "eager" if what == "c" else OURS, "full", old[what], new[what], 0.05, gate.SLOWER)
        for what in old
    ]
    assert [row[0] for row in gate.table(found).rows] == ["b", "a", "c"]


# -- the targets


@pytest.fixture
def targets(tmp_path, capsys):
    """Writes one file, judges it, gives the status and what was printed."""

    def run(data: Any) -> tuple[int, str]:
        (tmp_path / "k.json").write_text(json.dumps(data))
        status = cli.main(["targets", str(tmp_path / "k.json")])
        said = capsys.readouterr()
        return status, said.out + said.err

    return run


def test_the_least_noise_band_is_the_tuners():
    assert files.LEAST == LEAST


@pytest.mark.parametrize(
    ("ours", "inductor", "spread", "status", "counts"),
    [
        (99.0, 100.0, 0.0, 0, "0 of 1"),
        (100.9, 100.0, 0.0, 0, "0 of 1"),  # within 1 %
        (101.1, 100.0, 0.0, 1, "1 of 1"),
        (101.1, 100.0, 0.02, 0, "0 of 1"),  # within what the samples scatter
        (103.0, 100.0, 0.02, 1, "1 of 1"),
        (100.0, None, 0.0, 1, None),  # not measured is not met
        (100.0, "OutOfMemoryError: no", 0.0, 0, None),  # nothing to be slower than
        ("RuntimeError: no", 100.0, 0.0, 1, None),
    ],
)
def test_target_none_slower_than_inductor(targets, ours, inductor, spread, status, counts):
    times = {"rms_norm a fastft": ours, "rms_norm a eager": 500.0}
    if inductor is not None:
        times["rms_norm a inductor"] = inductor
    data = kernels(times, spread=spread)
    data["rows"][0]["copy_us"] = {"forward": 40.0, "backward": 60.0, "full": 100.0}  # as fast as ours
    found, said = targets(data)
    assert found == status and "Traceback" not in said
    assert ("Every target is met" in said) == (status == 0)
    if inductor is None:
        assert "Not judged: rms_norm: no time of Inductor (1 shape)" in said
    if isinstance(inductor, str):
        assert "nothing to be slower than, Inductor failed: OutOfMemoryError" in said
    if isinstance(ours, str):
        assert "Failed: rms_norm a: RuntimeError: no" in said and "1 failed" in said
    (grid,) = [g for g in tables.kernel_tables(data) if g.title.startswith("fastft beside")]
    shown = dict(zip(grid.columns, grid.rows[0], strict=True))
    assert shown.get("slower than Inductor") == counts
    assert ("Slower than Inductor" in said) == (counts == "1 of 1")


@pytest.mark.parametrize(("recomputed", "status"), [(101.0, 0), (90.0, 1)])
def test_what_keeps_its_inputs_alone_is_judged_beside_inductor_that_does(targets, recomputed, status):
    data = kernels({"lora_mlp a fastft": 100.0, "lora_mlp a inductor": 80.0})
    (row,) = data["rows"]
    row["copy_us"] = {"forward": 40.0, "backward": 60.0, "full": 100.0}
    assert targets(data)[0] == 1
    row["implementations"][tables.RECOMPUTED] = {**row["implementations"]["inductor"], "full_us": figure(recomputed)}
    found, said = targets(data)
    assert found == status and ("1 slower than Inductor" in said) == bool(status)


def test_targets_show_the_phases_of_what_misses_them(targets):
    """Inductor takes 40 µs forward and 60 back, ours 30 and 90, of which copies of the bytes take 36 and 54."""
    data = kernels({"rms_norm a fastft": 120.0, "rms_norm a inductor": 100.0, "glu b fastft": 80.0})
    data["rows"][1]["implementations"]["inductor"] = {"error": "no"}
    data["rows"][0]["implementations"][OURS] |= {"forward_us": figure(30.0), "backward_us": figure(90.0)}
    status, said = targets(data)
    assert status == 1 and "glu │" not in said
    slower, far = (" ".join(line.split()) for line in said.splitlines() if line.startswith("│"))
    assert slower == "│ rms_norm │ a │ 0.750 ± 0.010 │ 1.500 ± 0.010 │ 1.200 ± 0.010 │ 120.0 │"
    assert far == "│ rms_norm │ a │ 120 │ 60 │ 75 │ 120.0 │"
    assert "of 2 shapes, 1 slower than Inductor" in said and "of 2 that memory binds, 1 below 90 % of a copy" in said


@pytest.mark.parametrize(("us", "status"), [(99.0, 0), (101.0, 1)])  # copies: 90 µs
def test_target_of_a_copys_rate(targets, us, status):
    data = kernels({"rms_norm a fastft": us, "rms_norm a inductor": 200.0})
    assert targets(data)[0] == status
    grid = list(tables.kernel_tables(data))[-1]
    assert dict(zip(grid.columns, grid.rows[0], strict=True))["< 90 % of a copy"] == f"{status} of 1"
    data["rows"][0]["bound"] = "compute"
    data["rows"][0]["copy_us"] = {}
    assert targets(data)[0] == 0
    grid = list(tables.kernel_tables(data))[-1]
    assert "< 90 % of a copy" not in grid.columns


def loss(ours: float, trained: bool = False, ignored: float = 0.0, extra: float = 500.0, **others: float) -> Any:
    """A file of one loss. ``others``: µs by name; its GEMMs take 100, ours with every label 200, Liger 300, and
    Inductor, with 5 GiB, as many as ours.
    """
    times = {"fastft": ours, "inductor": ours, "Liger": 300.0, tables.PRODUCTS: 100.0, tables.EVERY: 200.0, **others}
    data = kernels({f"linear_cross_entropy a {name}": us for name, us in times.items() if us})
    (row,) = data["rows"]
    row |= {"tags": ["loss"], "dims": {"trained": trained, "ignored": ignored}, "bound": "compute"}
    for name, figures in row["implementations"].items():
        figures["extra_bytes"] = {"fastft": extra, "inductor": 5 * 1024}.get(name, 1000.0) * 2**20
    return data


@pytest.mark.parametrize(
    ("data", "missed"),
    [
        (loss(120.0), []),
        (loss(126.0), ["time / its GEMMs │ 1.260 │ ≤ 1.25"]),
        (loss(120.0, extra=615.0), ["extra MiB │ 615.0 │ ≤ 614.4"]),
        (loss(120.0, extra=3000.0, trained=True), []),  # the gradient of a head is summed in fp32
        (loss(120.0, Liger=110.0, inductor=130.0), ["time / Liger's, of 1,000.0 MiB │ 1.091 │ < 1"]),
        (loss(117.0, ignored=0.5), []),
        (loss(118.0, ignored=0.5), ["none ignored / half ignored │ 1.695 │ ≥ 1.7"]),
        (loss(118.0), []),
    ],
)
def test_targets_of_the_losses(targets, data, missed):
    status, said = targets(data)
    lines = [" ".join(line.split()) for line in said.splitlines() if line.startswith("│")]
    assert lines == [f"│ a │ {line} │" for line in missed] and status == bool(missed)
    assert f"of 1 losses, {len(missed)} miss targets of their own" in said
    data["rows"][0]["tags"] = ["real"]
    assert targets(data)[0] == 0


def test_targets_of_losses_that_were_not_measured(targets):
    data = loss(120.0, ignored=0.5, **{tables.PRODUCTS: 0.0, tables.EVERY: 0.0})
    del data["rows"][0]["implementations"][OURS]["extra_bytes"]
    status, said = targets(data)
    assert status == 1
    for what in ("no time of its GEMMs alone", "no peak of memory", "no time with every label"):
        assert f"Not judged: linear_cross_entropy: {what} (1 shape)" in said


def test_tables_of_losses_have_ratios():
    details, overview, _ = tables.kernel_tables(loss(120.0, ignored=0.5))
    ours = dict(zip(details.columns, next(r for r in details.rows if r[1] == OURS), strict=True))
    assert (ours["/ its GEMMs"], ours["/ none ignored"], ours["extra MiB"]) == ("1.200", "0.600", "500.0")
    assert dict(zip(overview.columns, overview.rows[0], strict=True))["ours / its GEMMs"] == "1.200"


def test_targets_that_were_not_measured_are_not_met(targets):
    data = kernels({"rms_norm a fastft": 50.0, "rms_norm a inductor": 100.0, "rms_norm b fastft": 50.0})
    data["rows"][1]["implementations"]["inductor"] = {"error": "no"}
    for row in data["rows"]:
        del row["copy_us"]  # files before copies were timed
    status, said = targets(data)
    assert status == 1 and "Not judged: rms_norm: no copy of as many bytes was timed (2 shapes)" in said
    grid = list(tables.kernel_tables(data))[-1]
    assert dict(zip(grid.columns, grid.rows[0], strict=True))["< 90 % of a copy"] == "not measured"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (kernels(BASE, ceilings=None), "the targets are those of a GPU"),
        (kernels({}), "nothing to judge"),
        (steps({"fastft": [1.0]}), "the targets are those of kernels"),
        ({"a": 1}, "no schema"),
    ],
)
def test_targets_refuse_what_says_nothing(targets, data, says):
    status, said = targets(data)
    assert status == 2 and says in said and "Traceback" not in said


# -- committed files


@pytest.mark.parametrize("path", COMPARED, ids=lambda p: p.stem)
def test_committed_comparisons_are_read(path, compare):
    result = files.load(path)
    assert result.kind == "train" and result.setup["model"] and result.versions["torch"]
    assert compare(path.read_text(), path.read_text())[0] == 0


def test_a_single_run_is_a_comparison_of_one(tmp_path):
    row = json.loads(COMPARED[0].read_text())["rows"][0]
    (tmp_path / "run.json").write_text(json.dumps(row["runs"][0]))
    result = files.load(tmp_path / "run.json")
    assert result.kind == "train" and [r["impl"] for r in result.rows] == [row["impl"]]
    assert result.rows[0]["tokens_per_s"] == row["tokens_per_s"]


# -- the report


class Page(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.references: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(found["src"] or "")
        self.references += [v for k, v in attrs if k in ("src", "href", "data") and v and not v.startswith("data:")]
        assert tag not in ("script", "link", "iframe")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def render(tmp_path: Path, *paths: Path) -> tuple[str, Page]:
    out = tmp_path / "out" / "report.html"
    assert cli.main(["report", *map(str, paths), "--html", str(out), "--png", str(tmp_path / "png")]) == 0
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.references and "http" not in text and "@import" not in text
    assert page.images and all(image.startswith("data:image/png;base64,iVBOR") for image in page.images)
    plots = list((tmp_path / "png").glob("*.png"))
    assert len(plots) == len(page.images) and all(p.read_bytes().startswith(b"\x89PNG") for p in plots)
    return text, page


def test_report_of_synthetic_files(tmp_path):
    times = {**BASE, "rms_norm b fastft": 180.0, "rms_norm b Liger": 190.0, "rms_norm b eager": "ValueError: <no>"}
    first = kernels(times)
    first["rows"][0]["bound"] = "memory"
    second = steps({"eager": [10.0, 11.0, 12.0], "fastft": [5.0, 6.0, 7.0], "unsloth": "cannot be <imported>"})
    for name, data in (("kernels", first), ("steps", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    text, page = render(tmp_path, tmp_path / "kernels.json", tmp_path / "steps.json")
    # best other, a rate for each of two ops; speed, parts, timeline
    assert {p.stem for p in (tmp_path / "png").iterdir()} == {
        "1-best-other", "1-rms-norm", "1-glu", "2-speed", "2-parts", "2-timeline",
    }  # fmt: skip
    assert "&lt;no&gt;" in text and "cannot be &lt;imported&gt;" in text and "quack (no)" in text
    assert "H100" in text and "torch 2.11.0" in text and len(page.images) == 6


def test_report_says_what_data_a_step_had(tmp_path):
    """Files from before there was a choice say nothing of it."""
    data = steps({"unsloth": [5.0], "unsloth:data=padded": [8.0], "fastft": "no"}, data="packed", document=512)
    for row, (form, shape) in zip(data["rows"], (("packed", [1, 16]), ("padded", [3, 7])), strict=False):
        row["data"] = {"form": form, "shape": shape}
    result = files.Result(Path("steps.json"), "train", data)
    assert "2×8 real tokens in documents of 512 ± 256" in report.title_of(result)
    rows = [dict(zip(grid.columns, row, strict=True)) for grid in [report.step_table(result)] for row in grid.rows]
    assert [row["input"] for row in rows] == ["packed 1×16", "padded 3×7", ""]
    assert [row["tokens/s"] for row in rows] == ["3,200", "2,000", "failed"]

    before = files.Result(Path("steps.json"), "train", steps({"fastft": [5.0]}))
    assert "2×8 tokens" in report.title_of(before) and "input" not in report.step_table(before).columns


def test_report_of_losses(tmp_path):
    """Curves beside the first one: a bias of 0.003 nats is found under noise of up to 0.01, and its absence too."""
    data = steps({"fastft:memory=fast": [5.0], "fastft:memory=lean": [6.0], "fastft": [6.0], "eager": [7.0]})
    draw = random.Random(0)
    noise = [draw.uniform(-0.01, 0.01) for _ in range(300)]
    curve = [9 - 0.01 * i for i in range(300)]
    of = [curve, [c + n for c, n in zip(curve, noise, strict=True)]]
    of += [[c + 0.003 for c in of[1]], curve[:40]]
    for row, losses in zip(data["rows"], of, strict=True):
        row["runs"] = [{"loss": losses}]
    result = files.Result(Path("steps.json"), "train", data)
    grid = report.losses_table(result)
    assert grid is not None and "Losses of 300 steps beside fastft:memory=fast's (9.0000 to 6.0100)" in grid.title
    assert [row[0] for row in grid.rows] == ["fastft:memory=lean", "fastft"]
    assert grid.notes == ["eager has 40 losses: not compared"]
    (_, first, last, mean, error, size, most), (*_, biased, error_too, _, _) = grid.rows
    assert (first, last) == (f"{of[1][0]:.4f}", f"{of[1][-1]:.4f}")
    assert abs(float(mean)) <= 3 * float(error) and abs(float(biased) - 3) <= 3 * float(error_too) < 3
    assert float(size) == pytest.approx(5, rel=0.1) and float(most) == pytest.approx(10, rel=0.02)
    (tmp_path / "steps.json").write_text(json.dumps(data))
    text, _ = render(tmp_path, tmp_path / "steps.json")
    assert {p.stem for p in (tmp_path / "png").iterdir()} == {"1-speed", "1-losses"}
    assert "Losses of 300 steps" in text

    data["rows"][0]["runs"][0]["loss"] = curve[:40]
    assert report.losses_table(result) is None


def test_report_of_committed_files(tmp_path):
    text, page = render(tmp_path, *COMPARED)
    profiled = [path for path in COMPARED if '"kernels": [' in path.read_text()]
    assert "11,818" in text and "15,476" in text and len(page.images) == len(COMPARED) + len(profiled)


@pytest.mark.parametrize("copies", [True, False])
def test_rate_plot_is_points_by_model(monkeypatch, copies):
    """Two shapes of one size stand in columns of their own, nothing joins them, and the ceiling's label is outside."""
    drawn: list[Any] = []
    axes = report._axes
    monkeypatch.setattr(report, "_axes", lambda *a: drawn.append(axes(*a)) or drawn[-1])
    data = kernels({"rms_norm a fastft": 90.0, "rms_norm a eager": 200.0, "rms_norm b fastft": 180.0})
    for row in data["rows"] if not copies else ():
        row["copy_us"] = {}
    assert report._rate_plot("rms_norm", data["rows"], files.Result(Path("k.json"), "kernels", data))
    ((_, (axis,)),) = drawn
    points = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(points) == 2 and all(line.get_linestyle() == "None" for line in points)
    assert [round(float(x)) for line in points for x in line.get_xdata()] == [0, 0, 1]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["model-a\n500.0 MB", "model-b\n500.0 MB"]
    assert [list(line.get_ydata()) for line in points] == [
        [pytest.approx(2500.0)],
        pytest.approx([5555.6, 2777.8], 1e-3),
    ]
    # 500 MB of copies in 90 µs
    heights = [segment[0][1] for collection in axis.collections for segment in collection.get_segments()]
    assert heights == pytest.approx([5555.6] * 2 if copies else [], 1e-3)
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["eager", "fastft", *[report.COPY] * copies]
    (label,) = axis.texts
    assert label.get_text().startswith("a large copy") and label.xy[0] > 1


@pytest.mark.parametrize(
    ("option", "path", "says"),
    [
        ("--html", "/proc/x/y.html", "No such file or directory"),
        ("--html", "{tmp}", "Is a directory"),
        ("--png", "/proc/x", "No such file or directory"),
        ("--png", "{tmp}/k.json", "it is no folder"),
        ("--png", "{tmp}/k.json/plots", "Not a directory"),
    ],
)
def test_report_that_cannot_be_written(tmp_path, capsys, monkeypatch, option, path, says):
    (tmp_path / "k.json").write_text(json.dumps(kernels(BASE)))
    monkeypatch.setattr(report, "figures", lambda results: pytest.fail("it is said before anything is drawn"))
    path = path.format(tmp=tmp_path)
    assert cli.main(["report", str(tmp_path / "k.json"), option, path]) == 2
    assert capsys.readouterr().err == f"fastft bench: cannot write {path}: {says}\n"


def test_a_report_that_fails_leaves_no_empty_page(tmp_path, monkeypatch):
    (tmp_path / "k.json").write_text(json.dumps(kernels(BASE)))
    monkeypatch.setattr(report, "figures", lambda results: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", str(tmp_path / "k.json"), "--html", str(tmp_path / "r.html")])
    assert not (tmp_path / "r.html").exists()


def test_report_without_a_page_prints_the_tables(tmp_path, capsys):
    (tmp_path / "k.json").write_text(json.dumps(kernels(BASE)))
    assert cli.main(["report", str(tmp_path / "k.json")]) == 0
    said = capsys.readouterr().out
    assert "rms_norm: µs, forward and backward" in said and "2.00" in said and "% of roofline" in said


def test_what_memory_binds_is_held_against_a_copy_of_as_many_bytes():
    """BASE's ours takes 100 µs, the copies of its bytes 90; without copies there is no such column."""
    result = kernels({"rms_norm a fastft": 100.0, "rms_norm a eager": 200.0})
    for grid in tables.kernel_tables(result):
        i = list(grid.columns).index("% of a copy")
        assert {cells[i] for cells in grid.rows} in ({"90", "45"}, {"90"}, {"90–90"})
    for row in result["rows"]:
        row["copy_us"] = {}
    assert not any("% of a copy" in grid.columns for grid in tables.kernel_tables(result))


def test_a_run_without_any_result_has_a_report(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(steps({"fastft": "out of memory"})))
    out = tmp_path / "r.html"
    assert cli.main(["report", str(tmp_path / "s.json"), "--html", str(out)]) == 0
    assert "out of memory" in out.read_text() and not Page(out.read_text()).images


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_sm90_tst_320x128_64x3_1x2_h_bz_coopB_TNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>(…)", "GEMM"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(…)", "GEMM"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<…>", "attention"),
        ("_dkdv_kernel", "attention"),
        ("_nf4_dequantize_kernel", "dequantise"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(…)", "dequantise"),
        ("_rms_norm_forward_kernel", "norm"),
        ("triton_poi_fused_add_rms_norm_backward_2", "norm"),
        ("_forward_kernel", "norm, rotary, GLU"),
        ("_swiglu_forward_kernel", "norm, rotary, GLU"),
        ("void (anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>", "loss"),
        ("liger_cross_entropy_kernel", "loss"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::bfloat16_copy_kernel_cuda(…)", "copies"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AUnaryFunctor<float>>", "elementwise"),
        ("triton_poi_fused_add_4", "elementwise"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<…>", "optimizer"),
        ("mystery", "other"),
    ],
)
def test_parts_of_a_step(kernel, part):
    assert report.part_of(kernel) == part


def test_timeline_of_events():
    line = running.timeline_of(EVENTS, 2**30, 0.0, [("forward", 0.0), ("backward", 1500.0)], bins=3)
    assert line["peak_bytes"] == 3 * 2**30 and line["phases_ms"] == {"forward": 0.0, "backward": 1.5}
    # a bin's most and its last: the peak is kept, however short it was
    assert line["points"] == [[0.0, 2**30], [1.0, 2 * 2**30], [1.001, 3 * 2**30], [1.002, 2 * 2**30], [3.0, 2**30]]
    (here, nowhere) = line["at_peak"]
    assert here["bytes"] == nowhere["bytes"] == 2**30 and here["count"] == 1
    name, text = here["at"].split(" ", 1)
    assert name == f"{Path(__file__).name}:1" and text and Path(__file__).read_text().startswith(text)
    assert running.timeline_of([], 5, 0.0, [])["points"] == [[0.0, 5]]


def test_timeline_switches_the_history_off_again(monkeypatch):
    said: list[Any] = []
    events = [{"action": "alloc", "size": 7, "addr": 1, "time_us": time.time() * 1e6 + 5000}]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda: {"device_traces": [[], events]})
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda enabled, **more: said.append(enabled))

    def step(begins: Any) -> None:
        begins("forward")
        begins("backward")

    line = running._timeline(step)
    assert (line["start_bytes"], line["peak_bytes"]) == (3, 10) and list(line["phases_ms"]) == ["forward", "backward"]
    with pytest.raises(ZeroDivisionError):
        running._timeline(lambda begins: 1 / 0)
    assert said == ["all", None, "all", None]


# -- the command


def test_fastft_bench_hands_over(tmp_path):
    for name, data in (("old", kernels(BASE)), ("new", kernels({**BASE, "glu a fastft": 500.0}))):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")

    def fastft_bench(*arguments: str) -> Any:
        return CliRunner().invoke(fastft.cli.app, ["bench", *arguments])

    assert fastft_bench("compare", old, old).exit_code == 0
    assert fastft_bench("compare", old, new).exit_code == 1
    assert fastft_bench("compare", old).exit_code == 2
    assert fastft_bench("targets", old).exit_code == 1  # nobody measured Inductor
    assert fastft_bench("train", "run", "--impl", "nobody").exit_code == 2
    assert fastft_bench().exit_code == 2
    shown = fastft_bench("--help")
    assert shown.exit_code == 0 and all(
        word in shown.output for word in ("kernels", "train", "compare", "targets", "report")
    )


def test_bench_without_the_repository_says_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(fastft.cli, "__file__", str(tmp_path / "site-packages" / "fastft" / "cli.py"))
    found = CliRunner().invoke(fastft.cli.app, ["bench", "kernels"])
    assert found.exit_code == 2 and "Clone the repository" in found.stderr


def test_bench_names_what_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = CliRunner().invoke(fastft.cli.app, ["bench", "kernels"])
    assert found.exit_code == 2 and "this needs pytest_benchmark: pip install 'fastft[bench]'" in found.stderr


def test_merging_leaves_files_as_they_are():
    data = kernels(BASE)
    before = copy.deepcopy(data)
    result = files.Result(Path("k.json"), "kernels", data)
    list(report.tables(result))
    assert data == before
