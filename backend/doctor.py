"""``fastft doctor``: is this installation able to train through fastft, and if not, what to do about it.

Each check is one function that returns one :class:`Check` or several; :data:`CHECKS` is the order they run in. What a
check calls may fail in any way on a broken installation; :func:`diagnose` turns that into what was found.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

OK, WARNING, BROKEN = "ok", "warning", "broken"

#: torch releases that fastft is developed and tested for, oldest and newest (major, minor).
TORCH_WINDOW = ((2, 11), (2, 15))

#: Libraries that only some training code uses: what is missing without each.
LIBRARIES = {
    "transformers": "Hugging Face models and Trainer",
    "accelerate": "transformers' Trainer",
    "peft": "LoRA",
    "trl": "SFTTrainer and the other TRL trainers",
}


@dataclass(frozen=True)
class Check:
    """One row: ``found`` is what is there; ``fix`` what to do about it, empty when ``status`` is ``"ok"``.

    ``status`` is ``"ok"``; ``"warning"``: training works, but something optional is missing or slower; or ``"broken"``.
    """

    name: str
    status: str
    found: str
    fix: str = ""


def diagnose() -> list[Check]:
    """Run every check. A check that fails by an exception is reported as broken, with that exception."""
    rows: list[Check] = []
    for check in CHECKS:
        name = check.__name__.strip("_").replace("_", " ")
        try:
            found = check()
            rows += [found] if isinstance(found, Check) else list(found)
        except Exception as error:
            rows.append(Check(name, BROKEN, _one_line(error), "this check itself failed: mend what the message names"))
    return rows


def healthy(rows: Iterable[Check]) -> bool:
    """Whether nothing that training through fastft needs is broken."""
    return all(row.status != BROKEN for row in rows)


def to_dict(rows: list[Check]) -> dict[str, Any]:
    """The checks, ready for JSON."""
    return {"ok": healthy(rows), "checks": [asdict(row) for row in rows]}


def _python() -> Check:
    return Check("python", OK, f"{platform.python_version()} at {sys.executable}")


def _torch() -> Check:
    import torch

    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPU build"
    )
    found = f"{torch.__version__}, {built}"
    (low, high), have = TORCH_WINDOW, Version(torch.__version__).release[:2]
    window = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    if have < low:
        return Check(
            "torch", BROKEN, found, f"pip install -U 'torch>={low[0]}.{low[1]}' (fastft is for torch {window})"
        )
    if have > high:
        return Check(
            "torch",
            WARNING,
            found,
            f"newer than fastft was tested with (torch {window}); if training fails, install one of these",
        )
    return Check("torch", OK, found)


def _triton() -> Check:
    import torch

    needed = bool(torch.version.cuda)
    pinned = _requirement("torch", "triton")
    want = str(pinned) if pinned else "triton"
    try:
        have = importlib.import_module("triton").__version__
    except Exception as error:
        if needed:
            return Check(
                "triton", BROKEN, _one_line(error), f"pip install '{want}', which this torch needs for its GPU kernels"
            )
        return Check("triton", OK, "not installed; not needed by a torch without CUDA")
    if pinned and not pinned.specifier.contains(have, prereleases=True):
        return Check("triton", WARNING, f"{have}, but this torch asks for {want}", f"pip install '{want}'")
    return Check("triton", OK, f"{have}" + (f", as this torch asks ({want})" if pinned else ""))


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        found = f"{count} × {properties.name}, capability {properties.major}.{properties.minor}, {size}"
        if (properties.major, properties.minor) < (8, 0):
            return Check("gpu", WARNING, found, "bf16 needs capability 8.0 or newer: train in fp16 or fp32 on this one")
        return Check("gpu", OK, found)
    if torch.version.cuda:
        fix = "check the driver with nvidia-smi, and that CUDA_VISIBLE_DEVICES does not hide the GPU"
        return Check("gpu", WARNING, f"none that torch {torch.__version__} can use; training runs on the CPU", fix)
    if shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch: pip install --force-reinstall torch"
        return Check("gpu", WARNING, "nvidia-smi is there, but this torch is a CPU build", fix)
    return Check(
        "gpu",
        WARNING,
        "none: training runs on the CPU, slowly",
        "train on a machine with an NVIDIA GPU; everything else works here",
    )


def _compiler() -> Check:
    """Triton builds its launchers with a C compiler and Python's headers, Inductor its CPU code with a C++ compiler."""
    import torch

    on_gpu = torch.cuda.is_available()
    names = (os.environ.get("CC"), "gcc", "clang", "cc") if on_gpu else (os.environ.get("CXX"), "g++", "clang++", "c++")
    path = next((found for name in names if name and (found := shutil.which(name))), None)
    if path is None:
        return Check(
            "compiler",
            BROKEN,
            f"none of {', '.join(filter(None, names))} is there",
            "install one (Debian, Ubuntu: apt install g++)",
        )
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.is_file():
        return Check(
            "compiler",
            BROKEN,
            f"{path}, but no {headers}",
            "install Python's headers (Debian, Ubuntu: apt install python3-dev)",
        )
    return Check("compiler", OK, f"{path}, Python.h")


def _libraries() -> list[Check]:
    rows = []
    for name, use in LIBRARIES.items():
        requirement = _requirement("fastft", name) or Requirement(name)
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            rows.append(
                Check(
                    name,
                    WARNING,
                    f"not installed: no {use}",
                    f"pip install '{requirement}', or pip install 'fastft[train]'",
                )
            )
            continue
        if not requirement.specifier.contains(have, prereleases=True):
            fix = f"pip install -U '{requirement}'"
            rows.append(Check(name, BROKEN, f"{have}, fastft is for {requirement}", fix))
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            rows.append(
                Check(
                    name,
                    BROKEN,
                    f"{have}, but it cannot be imported: {_one_line(error)}",
                    f"pip install --force-reinstall {name}",
                )
            )
            continue
        rows.append(Check(name, OK, have))
    return rows


def _bitsandbytes() -> Check:
    """Imported, its native library loaded, and a tensor taken to NF4 and back."""
    import torch

    requirement = _requirement("fastft", "bitsandbytes") or Requirement("bitsandbytes")
    try:
        have = importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        return Check("bitsandbytes", WARNING, "not installed: no NF4 (QLoRA)", f"pip install '{requirement}'")
    if not requirement.specifier.contains(have, prereleases=True):
        return Check("bitsandbytes", BROKEN, f"{have}, fastft is for {requirement}", f"pip install -U '{requirement}'")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        functional = importlib.import_module("bitsandbytes.functional")
        x = torch.linspace(-1, 1, 4096, device=device).view(64, 64)
        packed, state = functional.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
        error = (functional.dequantize_4bit(packed, state) - x).abs().max().item()
    except Exception as problem:
        fix = "run `python -m bitsandbytes`: it says what its native library lacks, often another CUDA version"
        return Check("bitsandbytes", BROKEN, f"{have}, but NF4 fails on {device}: {_one_line(problem)}", fix)
    if not error < 0.2:  # half of NF4's widest step, 0.14 to 0.15, and the absmax's own rounding
        return Check(
            "bitsandbytes",
            BROKEN,
            f"{have}, but NF4 on {device} is off by {error:.2f}",
            "pip install --force-reinstall bitsandbytes",
        )
    return Check("bitsandbytes", OK, f"{have}, NF4 works on {device}")


def _entry_point() -> Check:
    """``torch.compile(backend="fastft")`` finds the backend by its entry point, and the backend can be imported."""
    import torch

    fix = "install fastft into this Python: pip install fastft, or pip install -e . in its repository"
    if "fastft" not in torch.compiler.list_backends():
        return Check("entry point", BROKEN, f"torch knows {', '.join(torch.compiler.list_backends())}, not fastft", fix)
    (entry,) = importlib.metadata.entry_points(group="torch_dynamo_backends", name="fastft")
    try:
        entry.load()
    except Exception as error:
        return Check(
            "entry point",
            BROKEN,
            f"{entry.value} cannot be imported: {_one_line(error)}",
            "mend what the message names",
        )
    return Check("entry point", OK, f"torch.compile(backend='fastft') is {entry.value}")


def _autoload() -> Check:
    """``torch_compile_backend="fastft"``, in transformers' and TRL's arguments, needs accelerate to know the name."""
    name = "autoload"
    without = "torch_compile_backend='fastft' is refused by accelerate; model.compile(backend='fastft') works"
    if not importlib.metadata.entry_points(group="torch.backends", name="fastft"):
        return Check(
            name,
            BROKEN,
            f"the entry point is missing: {without}",
            "reinstall fastft: pip install --force-reinstall fastft",
        )
    for variable in ("FASTFT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        if os.environ.get(variable) == "0":
            return Check(name, WARNING, f"switched off by {variable}=0: {without}", f"unset {variable}")
    try:
        backends = importlib.import_module("accelerate.utils.dataclasses").DynamoBackend
    except ImportError:
        return Check(name, OK, "accelerate is not installed, nothing to do")
    try:
        backends("FASTFT")
    except ValueError:
        return Check(
            name,
            WARNING,
            without,
            "see the row 'bridge accelerate_backend'; compile with model.compile(backend='fastft')",
        )
    return Check(name, OK, "accelerate takes torch_compile_backend='fastft'")


def _caches() -> list[Check]:
    from fastft import caches
    from fastft.autotune import store

    rows = []
    with contextlib.suppress(caches.NoFolder):  # the row of that cache says so
        caches.secure()
    for cache in caches.CACHES:
        exchange = caches.exchanged(cache)
        if exchange is not None:
            fix = f"if it is yours, take it back (chown, chmod go-w) or empty it; or set {cache.variable} to another"
            rows.append(Check(cache.name, WARNING if exchange.used else BROKEN, str(exchange), fix))
        else:
            rows.append(_room(cache.name, cache.folder, f"set {cache.variable} to a folder with more"))
    folder = store.user_folder()
    if why := caches.unusable(folder):
        fix = "make it a folder that only you can write to, or set FASTFT_CACHE_DIR to one"
        rows.append(Check("fastft cache", WARNING, f"{folder} is not used: {why}", fix))
    else:
        rows.append(_room("fastft cache", folder, "set FASTFT_CACHE_DIR to a folder with more"))
    rows += [Check("fastft cache", WARNING, line, "remove it: it is written again") for line in store.problems()]
    return rows


def _room(name: str, folder: Path, fix: str) -> Check:
    free = shutil.disk_usage(folder).free / 2**30
    if free < 1:
        return Check(name, WARNING, f"{folder}, {free:.1f} GiB free", f"make room, or {fix}")
    return Check(name, OK, f"{folder}, {free:.0f} GiB free")


def _bridges() -> list[Check]:
    from fastft import bridges

    bridges.install()
    for module in {module for spec in bridges.TABLE for module in spec.modules}:
        try:
            importlib.import_module(module)
        except Exception:  # a library that is missing or broken has a row of its own
            continue
    return [_bridge(row) for row in bridges.rows()]


def _bridge(row: Any) -> Check:
    status = WARNING if row.status in ("stayed out", "switched off") else OK
    fix = {
        "stayed out": "training works without it, slower; the library versions in constraints.txt are known to fit",
        "switched off": "take it out of FASTFT_BRIDGES",
    }.get(row.status, "")
    return Check(f"bridge {row.name}", status, f"{row.status}: {row.reason}", fix)


def _training_step() -> Check:
    """A module small enough for two seconds: compiled through fastft, its loss and gradients against eager's."""
    import torch

    import fastft

    device = "cuda" if torch.cuda.is_available() else "cpu"

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(0.5, 1.5, 64))
            self.linear = torch.nn.Linear(64, 64, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
            return self.linear(self.weight * (x * torch.rsqrt(variance + 1e-6)))

    torch.manual_seed(0)
    block = Block().to(device)
    x = torch.randn(8, 64, device=device)
    expected = torch.autograd.grad(block(x).square().mean(), list(block.parameters()))
    before = len(fastft.reports())
    found = torch.autograd.grad(torch.compile(block, backend="fastft")(x).square().mean(), list(block.parameters()))
    compiled = fastft.reports()[before:]
    fix = "run with TORCH_LOGS=+dynamo to see why, and report it with the output of `fastft doctor --json`"
    if not compiled:
        return Check(
            "training step",
            BROKEN,
            f"torch.compile on {device} did not call fastft",
            f"unset TORCH_COMPILE_DISABLE; or {fix}",
        )
    if errors := [error for one in compiled for error in one.errors]:
        return Check("training step", BROKEN, errors[0], fix)
    gap = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(found, expected, strict=True))
    if not gap < 1e-2:  # TF32 products, where they are switched on, are off by up to 1e-3
        return Check("training step", BROKEN, f"gradients on {device} are off by {gap:.1e} of the largest", fix)
    counts = ", ".join(f"{pattern} ×{count}" for one in compiled for pattern, count in one.counts.items()) or "no site"
    close = f"within {gap:.0e} of eager's" if gap else "equal to eager's"
    return Check("training step", OK, f"compiled on {device}, {counts} replaced, gradients {close}")


CHECKS: tuple[Callable[[], Check | list[Check]], ...] = (
    _python,
    _torch,
    _triton,
    _gpu,
    _compiler,
    _libraries,
    _bitsandbytes,
    _entry_point,
    _autoload,
    _caches,
    _bridges,
    _training_step,
)


def _requirement(distribution: str, name: str) -> Requirement | None:
    """What an installed distribution's metadata asks of ``name``, markers and extras apart; None if it asks nothing."""
    try:
        wanted = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == name:
            requirement.marker = None
            return requirement
    return None


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
