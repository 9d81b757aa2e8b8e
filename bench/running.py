"""One training run in this process: load, compile, warm up, measure; profile and memory over one more step."""

from __future__ import annotations

import importlib.metadata
import linecache
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.implementations import IMPLEMENTATIONS, QUIET, ROOT, SFT_BACKENDS, arguments_of, checkpoint, say, targets_of
from bench.setting import OPTIMIZERS, Setup, batches, described

SCHEMA = 1
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "unsloth",
    "xformers",
    "fastft",
)


@contextmanager
def timed(result: dict[str, Any], key: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    result[key] = round(time.perf_counter() - start, 3)
    say(f"{key} {result[key]}")


#: When this process began: nothing else of it was imported before.
STARTED = time.monotonic()


def time_is_up(setup: Setup, times: Sequence[float], seconds: float | None, result: dict[str, Any]) -> bool:
    """Whether the next measured step may end later than ``seconds`` after the start, by the longest of the last ones
    (``times``, ms); then ``result`` says so. One step is always taken.
    """
    if seconds is None or not times or time.monotonic() - STARTED + 1.5e-3 * max(times[-4:]) < seconds:
        return False
    result["cut_short"] = f"ended after {len(times)} of {setup.steps} steps: its time ({seconds:.0f} s) was up"
    say(result["cut_short"])
    return True


def measure(
    setup: Setup,
    folder: Path,
    result: dict[str, Any],
    profile: bool = False,
    timeline: bool = False,
    seconds: float | None = None,
) -> None:
    """Load, compile, warm up, measure. Figures go into ``result`` as they come, so that a failure keeps what it had."""
    implementation = IMPLEMENTATIONS[setup.impl]
    if implementation.first is not None:
        implementation.first()
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    result["device"] = device_info()
    result["versions"] = package_versions()
    torch.manual_seed(setup.seed)

    with timed(result, "load_s"):
        model = implementation.load(setup, folder)
    if implementation.compile is not None:
        implementation.compile(model, setup.options)
    # A peer's packages have no fastft beside them, which knows where torch keeps such figures.
    compiles = implementation.compile is not None and not implementation.peer
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(setup, trained)
    result["trained_parameters"] = sum(p.numel() for p in trained)
    result["weights_bytes"] = torch.cuda.memory_allocated() if cuda else None
    result["data"] = described(setup, next(batches(setup, "cpu")))

    data = batches(setup, device)

    def step(batch: dict[str, Any], begins: Callable[[str], None] = lambda phase: None) -> torch.Tensor:
        begins("forward")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(**batch).loss
        begins("backward")
        loss.backward()
        begins("optimizer")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def synchronize() -> None:
        if cuda:
            torch.cuda.synchronize()

    losses: list[torch.Tensor] = []
    lengths: list[int] = []
    graphs: list[int] = []

    compilations = Compilations()
    compiled: list[tuple[int, float]] = []

    def timed_step() -> float:
        batch, before = next(data), len(compilations.found)
        synchronize()
        start = time.perf_counter()
        losses.append(step(batch))
        synchronize()
        seconds = time.perf_counter() - start
        lengths.append(batch["input_ids"].shape[1])
        compiled.append(compilations.since(before))
        if compiles:
            graphs.append(_graphs())
        return seconds

    with timed(result, "first_step_s"):
        timed_step()
    result["first_step_peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    if compiles:
        result["compile_s"] = _compile_seconds()
    if cuda:  # the second step is as the others; in it CUDA graphs are recorded, whose replays allocate nothing
        torch.cuda.reset_peak_memory_stats()
    result["warmup_ms"] = [round(timed_step() * 1e3, 3) for _ in range(setup.warmup - 1)]
    times: list[float] = []
    while len(times) < setup.steps and not time_is_up(setup, times, seconds, result):
        times.append(timed_step() * 1e3)
    result["step_ms"] = milliseconds(times)
    if setup.lengths == "random":
        result["lengths"] = lengths.copy()
    result["tokens_per_s"] = tokens_per_s([result], result["data"]["real_tokens"])
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() if cuda else None
    if cuda:
        result["allocator"] = {"retries": torch.cuda.memory_stats()["num_alloc_retries"], "settings": _allocator()}
    result["loss"] = [round(float(x), 6) for x in losses]
    result["triton"] = {"kernels": [n for n, _ in compiled], "seconds": [s for _, s in compiled]}
    if compiles:
        result["graphs"] = graphs.copy()
    say(f"{result['tokens_per_s']:.0f} tokens/s, step {result['step_ms']['median']:.1f} ms, losses {result['loss']}")
    if setup.impl == "fastft":
        import fastft

        result["report"] = fastft.report().to_dict()
        print(fastft.report(), file=sys.stderr, flush=True)
    if profile:
        result["kernels"], result["idle"] = _profile(timed_step, cuda)
    if timeline and cuda:
        last = next(data)
        result["timeline"] = _timeline(lambda begins: step(last, begins))
    elif timeline:
        result["timeline_note"] = "no memory timeline: PyTorch keeps no memory history of a CPU"
        say(result["timeline_note"])


def _optimizer(setup: Setup, trained: list[Any]) -> Any:
    import torch

    if setup.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, lr=setup.lr, weight_decay=0.0)
    return torch.optim.AdamW(trained, lr=setup.lr, weight_decay=0.0, fused=True)


class Compilations:
    """What Triton compiles in this process from now on: each kernel's name and seconds, without those that its cache on
    the disk has, among which are Inductor's own, which other processes compile, and without what threads of fastft's
    compile, for which no step waits. Nothing is noted by a Triton that tells nobody (before 3.4), and without one.
    """

    def __init__(self) -> None:
        self.found: list[tuple[str, float]] = []
        with suppress(ImportError):
            from triton import knobs

            knobs.compilation.listener = self

    def __call__(self, *, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit and not threading.current_thread().name.startswith("fastft"):
            self.found.append((str(getattr(src, "name", "")), times.total / 1e6))

    def since(self, start: int) -> tuple[int, float]:
        """How many, and their seconds together, behind the first ``start``."""
        new = self.found[start:]
        return len(new), round(sum(seconds for _, seconds in new), 3)


def _allocator() -> str:
    """What PyTorch's allocator is told by the environment, empty for nothing."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")


def _graphs() -> int:
    """How many graphs Dynamo has handed to a backend in this process."""
    from fastft import _torch_compat as compat

    return compat.dynamo_counters().get("stats", {}).get("unique_graphs", 0)


def _compile_seconds() -> dict[str, float]:
    """What torch spent a tenth of a second on in compiling, most first. Phases lie in each other."""
    from fastft import _torch_compat as compat

    found = {phase: round(seconds, 2) for phase, seconds in compat.compile_seconds().items() if seconds >= 0.1}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def measure_sft(setup: Setup, folder: Path, result: dict[str, Any], seconds: float | None = None) -> None:
    """As :func:`measure`, with the steps of TRL's ``SFTTrainer``."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    result["device"] = device_info()
    result["versions"] = package_versions()
    torch.manual_seed(setup.seed)
    with timed(result, "load_s"):
        model = AutoModelForCausalLM.from_pretrained(folder, **arguments_of(setup))
    steps = setup.warmup + setup.steps
    data = batches(setup, "cpu")
    ids = torch.cat([next(data)["input_ids"] for _ in range(steps)])
    result["data"] = described(setup, next(data))
    times: list[float] = []

    class Clock(TrainerCallback):
        """Milliseconds of every step; the first one's peak of memory, and that of the measured ones."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
                if len(times) == setup.warmup:
                    torch.cuda.reset_peak_memory_stats()
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - self.start))
            if len(times) == 1:
                result["first_step_peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
            if len(times) < steps:
                control.should_training_stop = time_is_up(setup, times[setup.warmup :], seconds, result)

    lora = LoraConfig(r=setup.rank, lora_alpha=16, lora_dropout=0.0, target_modules=targets_of(setup), bias="none")
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as output:
        arguments = SFTConfig(
            output_dir=output,
            torch_compile=SFT_BACKENDS[setup.impl] is not None,
            torch_compile_backend=SFT_BACKENDS[setup.impl],
            max_steps=steps,
            per_device_train_batch_size=setup.batch,
            max_length=setup.seq,
            learning_rate=setup.lr,
            optim=OPTIMIZERS[setup.optimizer],
            lr_scheduler_type="constant",
            gradient_checkpointing=setup.checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            bf16=True,
            use_cpu=not cuda,
            seed=setup.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora if setup.train == "lora" else None,
            callbacks=[Clock()],
        )
        result["trained_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        result["weights_bytes"] = torch.cuda.memory_allocated() if cuda else None
        trainer.train()
    first, *warmup = times[: setup.warmup]
    result["first_step_s"] = round(first / 1e3, 3)
    result["warmup_ms"] = [round(ms, 3) for ms in warmup]
    result["step_ms"] = milliseconds(times[setup.warmup :])
    result["tokens_per_s"] = tokens_per_s([result], result["data"]["real_tokens"])
    result["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else None
    result["peak_reserved_bytes"] = torch.cuda.max_memory_reserved() if cuda else None
    result["loss"] = [round(float(row["loss"]), 6) for row in trainer.state.log_history if "loss" in row]
    say(f"{result['tokens_per_s']:.0f} tokens/s, step {result['step_ms']['median']:.1f} ms, losses {result['loss']}")
    if setup.impl == "fastft":
        import fastft

        result["report"] = fastft.report().to_dict()
        print(fastft.report(), file=sys.stderr, flush=True)


def tokens_per_s(runs: Sequence[dict[str, Any]], tokens: int) -> float:
    """Tokens per second of a step of ``tokens`` in the median time; where each step has other lengths, of all."""
    times = [t for run in runs for t in run["step_ms"]["all"]]
    if "lengths" not in runs[0]:
        return round(tokens / (statistics.median(times) / 1e3), 2)
    done = sum(n for run in runs for n in run["lengths"][-len(run["step_ms"]["all"]) :])
    return round(runs[0]["setup"]["batch"] * done / (sum(times) / 1e3), 2)


def milliseconds(times: Sequence[float]) -> dict[str, Any]:
    """Milliseconds: the median, the fastest and the slowest step, and all of them."""
    return {
        "median": round(statistics.median(times), 3),
        "min": round(min(times), 3),
        "max": round(max(times), 3),
        "all": [round(t, 3) for t in times],
    }


def _profile(step: Callable[[], float], cuda: bool) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """One more step's 60 kernels with most device time (on a CPU: operators): name, calls, milliseconds. And when the
    GPU had nothing to do: :func:`idle`.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        seconds = step()
    rows = [
        {
            "name": e.key,
            "calls": e.count,
            "ms": round((e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3, 3),
        }
        for e in profiler.key_averages()
    ]
    ran = [
        (e.time_range.start, e.time_range.end, e.name) for e in profiler.events() if e.device_type == DeviceType.CUDA
    ]
    rows = sorted((r for r in rows if r["ms"] > 0), key=lambda r: -r["ms"])[:60]
    return rows, idle(ran, seconds * 1e3) if cuda else None


def idle(ran: Sequence[tuple[float, float, str]], wall_ms: float) -> dict[str, Any]:
    """When the GPU had nothing to do in a step of ``wall_ms`` milliseconds, of what ran on it: ``(start, end, name)``,
    in µs.

    ``outside_ms``: before the first and after the last. ``gaps_ms``: in between, of which ``short_ms`` in gaps under
    20 µs (from one launch to the next); ``largest``: the ten longest gaps, with what ran before and after; ``copying``:
    the same of the times when nothing but copies between host and device ran, which kernels waited for.
    """
    copies = [row for row in ran if "Pinned" in row[2]]
    kernels = [row for row in ran if "Pinned" not in row[2]]
    return {**_gaps(ran, wall_ms), "copying": _waits(kernels, copies)}


def _waits(kernels: Sequence[tuple[float, float, str]], copies: Sequence[tuple[float, float, str]]) -> dict[str, Any]:
    """Gaps between kernels, as far as copies ran in them."""
    found: list[tuple[float, str, str, float]] = []
    end, last = float("inf"), ""
    for start, stop, name in sorted(kernels):
        inside = sum(max(0.0, min(start, b) - max(end, a)) for a, b, _ in copies) if start > end else 0.0
        if inside:
            found.append((inside, last, name, end))
        if not last or stop > end:
            end, last = stop, name
    first = min((start for start, *_ in kernels), default=0.0)
    return {
        "ms": round(sum(us for us, *_ in found) / 1e3, 3),
        "largest": [
            {"ms": round(us / 1e3, 3), "at_ms": round((at - first) / 1e3, 1), "after": a[:60], "before": b[:60]}
            for us, a, b, at in sorted(found, reverse=True)[:40]
        ],
    }


def _gaps(ran: Sequence[tuple[float, float, str]], wall_ms: float) -> dict[str, Any]:
    """The rest of :func:`idle`."""
    gaps: list[tuple[float, str, str]] = []
    busy, end, last = 0.0, float("-inf"), ""
    for start, stop, name in sorted(ran):
        if last and start > end:
            gaps.append((start - end, last, name))
        busy += max(0.0, stop - max(start, end))
        if stop > end:
            end, last = stop, name
    between = sum(us for us, *_ in gaps)
    return {
        "wall_ms": round(wall_ms, 3),
        "busy_ms": round(busy / 1e3, 3),
        "outside_ms": round(wall_ms - (busy + between) / 1e3, 3),
        "gaps_ms": round(between / 1e3, 3),
        "short_ms": round(sum(us for us, *_ in gaps if us < 20) / 1e3, 3),
        "largest": [
            {"ms": round(us / 1e3, 3), "after": after[:100], "before": before[:100]}
            for us, after, before in sorted(gaps, reverse=True)[:10]
        ],
    }


def _timeline(step: Callable[[Callable[[str], None]], Any]) -> dict[str, Any]:
    """One more step's allocated bytes over time, from the allocator's own history: it sees compiled code too."""
    import torch

    phases: list[tuple[str, float]] = []
    torch.cuda.synchronize()
    start_bytes, start_us = torch.cuda.memory_allocated(), time.time_ns() / 1e3
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=2_000_000)
    try:
        step(lambda phase: phases.append((phase, time.time_ns() / 1e3)))
        torch.cuda.synchronize()
        events = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    return timeline_of(events, start_bytes, start_us, phases)


def timeline_of(
    events: Sequence[dict[str, Any]],
    start_bytes: int,
    start_us: float,
    phases: Sequence[tuple[str, float]],
    bins: int = 300,
) -> dict[str, Any]:
    """Points (ms, bytes) of the allocator's ``events``: of each of ``bins`` equal times the most and the last. The
    time is the host's, when memory was asked for or given back, which is ahead of when the device used it. And what
    was there at the peak of what the step itself had asked for.
    """
    sizes, size, most = [], start_bytes, start_bytes
    alive: dict[int, dict[str, Any]] = {}
    at_peak: list[dict[str, Any]] = []
    for event in events:
        if event["action"] not in ("alloc", "free_requested"):
            continue
        allocated = event["action"] == "alloc"
        size += event["size"] if allocated else -event["size"]
        sizes.append(((event["time_us"] - start_us) / 1e3, size))
        if allocated:
            alive[event["addr"]] = event
        else:
            alive.pop(event["addr"], None)
        if size > most:
            most, at_peak = size, list(alive.values())
    points: list[tuple[float, int]] = [(0.0, start_bytes)]
    width = max(sizes[-1][0] if sizes else 0.0, 1e-3) / bins
    at = 0
    for i in range(bins):
        inside = []
        while at < len(sizes) and (sizes[at][0] <= (i + 1) * width or i == bins - 1):
            inside.append(sizes[at])
            at += 1
        points += dict.fromkeys([max(inside, key=lambda p: p[1]), inside[-1]]) if inside else ()
    return {
        "start_bytes": start_bytes,
        "peak_bytes": max([start_bytes, *(s for _, s in sizes)]),
        "phases_ms": {phase: round((us - start_us) / 1e3, 3) for phase, us in phases},
        "points": [[round(ms, 3), b] for ms, b in points],
        "at_peak": largest(at_peak),
    }


def largest(events: Sequence[dict[str, Any]], count: int = 60) -> list[dict[str, Any]]:
    """Allocations of one size and place together, by bytes: ``bytes``, ``count``, ``at``, the line that asked."""
    together: dict[tuple[int, str], int] = {}
    for event in events:
        frames = event.get("frames") or [{}]
        file, line = frames[0].get("filename", ""), frames[0].get("line", 0)
        at = f"{Path(file).name}:{line} {linecache.getline(file, line).strip()[:120]}"
        key = event["size"], at
        together[key] = together.get(key, 0) + 1
    rows = [{"bytes": size * n, "count": n, "at": at} for (size, at), n in together.items()]
    return sorted(rows, key=lambda r: -r["bytes"])[:count]


def device_info() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"host": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"name": "cpu", **found}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **found,
    }


def package_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def measured_commit() -> str | None:
    """The commit measured, ``-dirty`` where the tree differs from it; without a repository, ``FASTFT_COMMIT``."""
    if known := os.environ.get("FASTFT_COMMIT"):
        return known
    try:
        head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run(
            ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changes.stdout.strip() else "")


def run(
    setup: Setup, root: Path, profile: bool = False, timeline: bool = False, seconds: float | None = None
) -> dict[str, Any]:
    """Measure one implementation in this process. A failure is a result too: ``status`` ``failed``, and ``error``.
    ``seconds``: when no more steps are begun, counted from the process's start (None: all are).
    """
    setup.check()
    os.environ.update(QUIET)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "impl": setup.impl,
        "setup": asdict(setup),
        "status": "failed",
        "error": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": measured_commit(),
        "argv": sys.argv,
    }
    try:
        folder = checkpoint(setup.model, root)
        if setup.trainer == "sft":
            measure_sft(setup, folder, result, seconds)
        else:
            measure(setup, folder, result, profile, timeline, seconds)
        result["status"] = "ok"
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["traceback"] = traceback.format_exc()[-4000:]
        traceback.print_exc()
    return result
